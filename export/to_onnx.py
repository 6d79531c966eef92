"""Turn weights into ONNX graphs of one task.

    python -m export.to_onnx --task vis
    python -m export.to_onnx --weights weights.pth --task vis --size 480x864 --frames 12 --out graphs
    python -m export.to_onnx --weights weights.pth --task vos --size 480x864 --frames 12 --precision fp16 \\
        --dynamic frames --out graphs

Writes encoder.onnx, decoder.onnx and, for tasks whose objects are given, object_encoder.onnx, each with its
weights beside it, queries.safetensors and manifest.json. The graphs run in ONNX Runtime as they are, and in
TensorRT with a plugin for their nodes tarvis::MSDeformAttn. --size is that of the frames; the graphs take
them padded to multiples of 64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tarvis.config import ModelConfig
from tarvis.model import TarVis

from . import folder
from .folder import Request
from .manifest import Manifest
from .runtimes import onnx


def main(argv: Sequence[str] | None = None) -> int:
    return folder.command(folder.parser("export.to_onnx", __doc__), run, argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Export as asked; returns the summary that goes to stdout."""
    onnx.require_packages()
    return folder.run(args, export, "onnx")


def export(model: TarVis, config: ModelConfig, out: Path, request: Request) -> Manifest:
    """Write the graphs of one task into an empty folder.

    Raises:
        InputError: classes that the weights do not have.
    """
    return folder.fill(model, config, out, request, "onnx", partial(onnx.write, precision=request.precision))


if __name__ == "__main__":
    sys.exit(main())
