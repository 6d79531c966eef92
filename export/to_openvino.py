"""Turn weights into graphs of one task for OpenVINO: the fastest way on a CPU.

    python -m export.to_openvino --task vis
    python -m export.to_openvino --weights weights.pth --task vos --size 480x864 --frames 12 \\
        --dynamic frames --out graphs

Writes encoder.xml, decoder.xml and, for tasks whose objects are given, object_encoder.xml, each with its
weights in a .bin beside it, queries.safetensors and manifest.json. The graphs hold and compute float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tarvis.config import ModelConfig
from tarvis.model import TarVis
from tarvis.structures import InputError

from . import folder
from .folder import Request
from .manifest import Manifest
from .runtimes import openvino


def main(argv: Sequence[str] | None = None) -> int:
    return folder.command(folder.parser("export.to_openvino", __doc__), run, argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Export as asked; returns the summary that goes to stdout."""
    openvino.require_packages()
    return folder.run(args, export, "openvino")


def export(model: TarVis, config: ModelConfig, out: Path, request: Request) -> Manifest:
    """Write the graphs of one task into an empty folder.

    Raises:
        InputError: classes that the weights do not have, another precision than fp32.
    """
    if request.precision != "fp32":
        raise InputError(f"--precision {request.precision}: graphs for OpenVINO hold fp32")
    return folder.fill(model, config, out, request, "openvino", openvino.write)


if __name__ == "__main__":
    sys.exit(main())
