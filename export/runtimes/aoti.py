"""AOTInductor: packages of machine code and weights, for a device like the one they were compiled on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

import torch
import torch._inductor
from torch import Tensor

from export.folder import is_out_of_memory
from export.graphs import OUTPUTS, Graph, without_tf32
from export.manifest import Manifest
from export.runtimes import Written, first_line, progress, quiet
from kernels import dispatch  # with the operators that packages call back
from tarvis.structures import InputError


def write(parts: Mapping[str, Graph], folder: Path, device: torch.device) -> Written:
    """Compile NAME.pt2 of every graph, on the device and for it.

    Raises:
        InputError: Inductor cannot compile them here.
    """
    kernels: dict[str, set[str]] = {}
    for name in progress(parts, "aoti"):
        with dispatch.compiled() as operators:
            write_package(parts[name], folder / f"{name}.pt2", device)
        kernels.update(operators)  # type: ignore[arg-type]
    became = ", ".join(f"{name} {'/'.join(sorted(found))}" for name, found in sorted(kernels.items()))
    return Written({name: f"{name}.pt2" for name in parts}, target=target(device) | {"kernels": became})


def open(folder: Path, manifest: Manifest, device: torch.device) -> dict[str, AotiGraph]:
    """Every package of a folder, loaded.

    Raises:
        InputError: they were compiled by another PyTorch or for another kind of device, or are damaged.
    """
    require_target(folder, manifest, device)
    return {name: AotiGraph(folder / file, OUTPUTS[name], device) for name, file in manifest.graphs.items()}


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


def write_package(graph: Graph, path: Path, device: torch.device) -> None:
    """Trace and compile one graph.

    Raises:
        InputError: there is no working compiler, or Inductor gives up.
    """
    # Inductor notes the target in its configuration, for good
    unchanged = torch._inductor.config.patch({"aot_inductor.metadata": {}})
    with quiet(), torch.no_grad(), without_tf32(), unchanged:
        program = graph.trace(device)
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        except RuntimeError as error:  # all of Inductor's own are
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:400]
            raise InputError(f"Inductor cannot compile the {path.stem} for {device}: {reason}") from None


class AotiGraph:
    """One package. Tensors go in by name and come out by name, on the device it was compiled for."""

    def __init__(self, path: Path, outputs: tuple[str, ...], device: torch.device) -> None:
        self.device, self.outputs = device, outputs
        index = device.index if device.index is not None else -1
        try:
            self.run = torch._inductor.aoti_load_package(str(path), device_index=index)
        except Exception as error:  # of the loader, of the linker, of zip files
            raise InputError(f"{path}: cannot be loaded ({first_line(error)}): package again") from None

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # contiguous, as the examples were: the compiled code reads memory by their strides
        tensors = {name: value.detach().to(self.device).contiguous() for name, value in inputs.items()}
        # a package's launches go to the current GPU, its scratch memory too
        with torch.cuda.device_of(next(iter(tensors.values()))), without_tf32():
            found = self.run(**tensors)
        return dict(zip(self.outputs, found, strict=False))


def target(device: torch.device) -> dict[str, str]:
    """What machine code depends on, by name."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return {"device": "cuda", "capability": f"{major}.{minor}", "cuda": str(torch.version.cuda)}
    instructions = torch.backends.cpu.get_cpu_capability()
    return {"device": device.type, "machine": platform.machine(), "instructions": instructions}


def require_target(folder: Path, manifest: Manifest, device: torch.device) -> None:
    """Raise InputError unless the packages were compiled for what is here."""
    here = {"torch": torch.__version__} | target(device)
    made = {"torch": manifest.versions.get("torch", "unknown")} | manifest.target
    if name := next((name for name in here if made.get(name) != here[name]), None):
        raise InputError(
            f"{folder}: compiled for {name} {made.get(name, 'unknown')}, here is {name} {here[name]}: run "
            f"python -m export.aoti on this machine with --device {device.type}"
        )
