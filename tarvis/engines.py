"""Exported networks, which the commands take in the place of weights, from the package `export`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from tarvis.places import package

__all__ = ["FILE", "Manifest", "open_runner", "read_manifest"]

if TYPE_CHECKING:
    from export.manifest import FILE, Manifest, read_manifest
    from export.runner import open_runner
else:
    _manifest, _runner = (import_module(f"{package('export')}.{name}") for name in ("manifest", "runner"))
    FILE, Manifest, read_manifest = _manifest.FILE, _manifest.Manifest, _manifest.read_manifest
    open_runner = _runner.open_runner
