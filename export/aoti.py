"""Compile weights into AOTInductor packages of one task: the fast path that needs no TensorRT.

    python -m export.aoti --task vis
    python -m export.aoti --weights weights.pth --task vis --size 480x864 --frames 12 --out packages
    python -m export.aoti --weights weights.pth --task vos --size 480x864 --frames 12 --precision fp16 \\
        --dynamic frames --device cuda --out packages

Writes encoder.pt2, decoder.pt2 and, for tasks whose objects are given, object_encoder.pt2, with
queries.safetensors and manifest.json. A package holds machine code and weights: on a GPU Inductor's kernels
and this project's Triton kernels, on a CPU C++. So it is for this version of PyTorch and a device like the
one it was compiled on, and compiling needs that device (and on a CPU a C++ compiler).

The manifest says in `target.kernels` what this project's operators became: "triton" is compiled in,
"reference" is Inductor's code of plain PyTorch, "cuda" (where Triton cannot run on a GPU) and operators that
are not named there are called back in Python, so that such packages need a Python with this project.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tarvis.api import pick_device
from tarvis.config import ModelConfig
from tarvis.model import TarVis

from . import folder
from .folder import Request
from .manifest import Manifest
from .runtimes import aoti


def main(argv: Sequence[str] | None = None) -> int:
    p = folder.parser("export.aoti", __doc__)
    p.add_argument("--device", default="auto", help="to compile on and for: auto, cpu, cuda (default: auto)")
    return folder.command(p, run, argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compile as asked; returns the summary that goes to stdout."""
    device = pick_device(args.device)
    aoti.require_compiler(device)
    return folder.run(args, partial(package, device=device), "aoti") | {"device": str(device)}


def package(
    model: TarVis, config: ModelConfig, out: Path, request: Request, *, device: torch.device
) -> Manifest:
    """Compile the graphs of one task into an empty folder.

    Raises:
        InputError: classes that the weights do not have, or Inductor cannot compile them here.
    """
    write = partial(aoti.write, device=device)
    # on a CPU kernels are their references, and the plain forms compile in three quarters of the time
    return folder.fill(model, config, out, request, "aoti", write, device=device, plain=device.type == "cpu")


if __name__ == "__main__":
    sys.exit(main())
