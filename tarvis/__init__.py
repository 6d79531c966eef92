"""TarViS: one network for every task that segments targets in video."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tarvis.api import Model, load

__all__ = ["Model", "load"]


def __getattr__(name: str) -> Any:
    """`tarvis.load` and `tarvis.Model`, imported when first asked for: a submodule alone stays light."""
    if name in __all__:
        from tarvis import api

        return getattr(api, name)
    raise AttributeError(f"module 'tarvis' has no attribute {name!r}")
