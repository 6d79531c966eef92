"""Compile weights into AOTInductor packages of one task: the fast path that needs no TensorRT.

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
import torch._inductor

from export import folder
from export.aoti_backend import target
from export.folder import Format, Request
from export.graphs import Graph, without_tf32
from export.manifest import Manifest
from kernels import dispatch
from tarvis.api import pick_device
from tarvis.config import ModelConfig
from tarvis.model import TarVis
from tarvis.structures import InputError


def main(argv: Sequence[str] | None = None) -> int:
    return folder.command(parser(), run, argv)


def parser() -> argparse.ArgumentParser:
    p = folder.parser("python -m export.aoti", __doc__)
    p.add_argument("--device", default="auto", help="to compile on and for: auto, cpu, cuda (default: auto)")
    return p


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compile as told; returns the summary that goes to stdout."""
    device = pick_device(args.device)
    require_compiler(device)
    summary = folder.run(args, partial(package, device=device))
    return summary | {"device": str(device)}


def require_compiler(device: torch.device) -> None:
    """Raise InputError where code for a device cannot be compiled; sooner than Inductor would say it."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()  # the launchers of a GPU's kernels are C++, too
    except InvalidCxxCompiler:
        raise InputError("compiling needs a C++ compiler: install g++ or clang, or set CXX") from None
    if device.type == "cuda" and not dispatch.HAS_TRITON:
        raise InputError("compiling for a GPU needs Triton: pip install triton")
    if device.type == "cuda" and dispatch.INTERPRETED:
        raise InputError("interpreted kernels cannot be compiled for a GPU: unset TRITON_INTERPRET")


def package(
    model: TarVis, config: ModelConfig, out: Path, request: Request, *, device: torch.device
) -> Manifest:
    """Compile the graphs of one task into an empty folder.

    Raises:
        InputError: classes that the weights do not have, or Inductor cannot compile them here.
    """
    made_for = target(device)

    def write(graph: Graph, path: Path) -> None:
        with dispatch.compiled() as operators:
            write_package(graph, path, device)
        kernels.update({name: "/".join(sorted(found)) for name, found in operators.items()})
        made_for["kernels"] = ", ".join(f"{name} {impl}" for name, impl in sorted(kernels.items()))

    kernels: dict[str, str] = {}
    form = Format("aoti", ".pt2", write, target=made_for, device=device)
    return folder.fill(model, config, out, request, form)


def write_package(graph: Graph, path: Path, device: torch.device) -> None:
    """Trace and compile one graph.

    Raises:
        InputError: there is no working compiler, or Inductor gives up.
    """
    with folder.quiet(), torch.no_grad(), without_tf32():
        # on a CPU kernels are their references, and the plain forms compile in three quarters of the time
        program = graph.trace(device, plain=device.type == "cpu")
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        except RuntimeError as error:  # all of Inductor's own are
            if folder.is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:400]
            raise InputError(f"Inductor cannot compile the {path.stem} for {device}: {reason}") from None


if __name__ == "__main__":
    sys.exit(main())
