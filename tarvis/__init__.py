"""TarViS: one network for every task that segments targets in video."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tarvis.api import Model, load
    from tarvis.files import rle
    from tarvis.structures import Reference
    from tarvis.video.segmenter import VideoSegmenter

__all__ = ["Model", "Reference", "VideoSegmenter", "load", "rle"]

_HOMES = {
    "Model": "tarvis.api",
    "Reference": "tarvis.structures",
    "VideoSegmenter": "tarvis.video.segmenter",
    "load": "tarvis.api",
    "rle": "tarvis.files.rle",
}


def __getattr__(name: str) -> Any:
    """What the package offers is imported when it is first asked for: a submodule alone stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tarvis' has no attribute {name!r}")
    home = import_module(_HOMES[name])
    return getattr(home, name, home)  # a module of that name is itself what is asked for
