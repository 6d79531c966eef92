"""Compile weights into AOTInductor packages of one task: the fast path that needs no TensorRT.

    python -m export.aoti --weights weights.pth --task vis --size 480x864 --frames 12 --out packages
    python -m export.aoti --weights weights.pth --task vos --size 480x864 --frames 12 --precision fp16 \\
        --dynamic frames --device cuda --out packages

Writes encoder.pt2, decoder.pt2 and, for tasks whose objects are given, object_encoder.pt2, with
queries.safetensors and manifest.json. A package holds machine code and weights: on a GPU Inductor's kernels
and this project's Triton kernels, on a CPU C++. So it is for this version of PyTorch and a device like the
one it was compiled on, and compiling needs that device (and on a CPU a C++ compiler).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from safetensors.torch import save_file
from torch.export import ExportedProgram
from tqdm import tqdm

from export.aoti_backend import target
from export.graphs import Graph, graphs, in_precision
from export.manifest import (
    DTYPES,
    FORMAT,
    Free,
    Manifest,
    digest_of_file,
    digest_of_weights,
    parse_size,
    write_manifest,
)
from export.rewrites import plain_forms
from export.to_onnx import QUERIES, parse_dynamic, query_constants, quiet
from export.to_onnx import parser as onnx_parser
from kernels.dispatch import HAS_TRITON
from tarvis.api import Model, pick_device
from tarvis.config import ModelConfig
from tarvis.model import TarVis, build_model
from tarvis.model.weights import load_into, load_weights, read_config
from tarvis.results import staged
from tarvis.structures import InputError
from tarvis.tasks import TASKS


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        summary = run(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("error: out of GPU memory while compiling: try a smaller --size or --frames", file=sys.stderr)
        return 2
    print(json.dumps(summary))
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of `export.to_onnx`, and a device."""
    p = onnx_parser()
    p.prog, p.description = "python -m export.aoti", __doc__
    p.add_argument("--device", default="auto", help="to compile on and for: auto, cpu, cuda (default: auto)")
    return p


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compile as told; returns the summary that goes to stdout."""
    size, device = parse_size(args.size), pick_device(args.device)
    require_compiler(device)
    config = None if args.config is None else read_config(args.config)
    state, config = load_weights(args.weights, config=config, trust=args.trust)
    model = build_model(config)
    load_into(model, state)
    start = time.perf_counter()
    with staged(args.out) as folder:
        manifest = package(
            model,
            config,
            folder,
            task=args.task,
            dataset=args.dataset,
            size=size,
            frames=args.frames,
            precision=args.precision,
            dynamic=parse_dynamic(args.dynamic),
            device=device,
        )
    return {
        "out": str(args.out),
        "task": manifest.task,
        "class_set": manifest.class_set,
        "graphs": list(manifest.graphs),
        "device": str(device),
        "seconds": round(time.perf_counter() - start, 1),
    }


def require_compiler(device: torch.device) -> None:
    """Raise InputError where code for a device cannot be compiled; sooner than Inductor would say it."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()  # the launchers of a GPU's kernels are C++, too
    except InvalidCxxCompiler:
        raise InputError("compiling needs a C++ compiler: install g++ or clang, or set CXX") from None
    if device.type == "cuda" and not HAS_TRITON:
        raise InputError("compiling for a GPU needs Triton: pip install triton")


def package(
    model: TarVis,
    config: ModelConfig,
    folder: Path,
    *,
    task: str,
    size: tuple[int, int],
    frames: int,
    device: torch.device,
    dataset: str | None = None,
    precision: str = "fp32",
    dynamic: Sequence[Free] = (),
) -> Manifest:
    """Compile the graphs of one task into an empty folder; arguments and errors as `to_onnx.export` has them.

    Raises:
        InputError: nothing can be compiled here, besides.
    """
    if task not in TASKS:
        raise InputError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    if frames < 1:
        raise InputError(f"a clip has at least one frame, got {frames}")
    classes = Model(model, config, device="cpu").classes([task], dataset)
    weights = digest_of_weights(model.state_dict())
    model = in_precision(model, DTYPES[precision])
    constants, groups = query_constants(model, None if classes is None else classes.name)
    manifest = Manifest(
        format=FORMAT,
        task=task,
        class_set=None if classes is None else classes.name,
        size=size,
        frames=frames,
        dynamic=tuple(dynamic),
        precision=precision,  # type: ignore[arg-type]  # one of DTYPES
        groups=groups,
        model=config,
        weights=weights,
        graphs={},
        files={},
        versions={"torch": torch.__version__},
        backend="aoti",
        target=target(device),
    )
    parts = graphs(
        model.to(device),
        groups=groups,
        size=manifest.padded,
        frames=frames,
        dynamic=manifest.dynamic,
        points=task == "pet",
    )
    progress = tqdm(parts.items(), desc=f"{task} to machine code", unit="graph", file=sys.stderr)
    for name, graph in progress:
        progress.set_postfix_str(name)
        write_package(graph, folder / f"{name}.pt2", device)
        manifest.graphs[name] = f"{name}.pt2"
    save_file(constants, folder / QUERIES)
    manifest.files.update({path.name: digest_of_file(path) for path in sorted(folder.iterdir())})
    write_manifest(folder, manifest)
    return manifest


def write_package(graph: Graph, path: Path, device: torch.device) -> None:
    """Trace and compile one graph.

    Raises:
        InputError: there is no working compiler, or Inductor gives up.
    """
    with quiet(), torch.no_grad():
        # on a CPU kernels are their references, and the plain forms compile in three quarters of the time
        program = trace(graph, device, plain=device.type == "cpu")
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # all of Inductor's own are
            reason = " ".join(str(error).split())[:400]
            raise InputError(f"Inductor cannot compile the {path.stem} for {device}: {reason}") from None


def trace(graph: Graph, device: torch.device, *, plain: bool) -> ExportedProgram:
    """One graph as torch.export sees it: `plain` in the forms of `export.rewrites`, else with our kernels."""
    inputs = {name: value.to(device) for name, value in graph.inputs.items()}
    shapes = {name: graph.dynamic.get(name) for name in inputs}
    with torch.no_grad(), plain_forms() if plain else nullcontext():
        return torch.export.export(graph.module, (), inputs, dynamic_shapes=shapes, strict=False)


if __name__ == "__main__":
    sys.exit(main())
