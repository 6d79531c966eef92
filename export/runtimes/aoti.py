"""AOTInductor: packages of machine code and weights, for a device like the one they were compiled on."""

from __future__ import annotations

import platform
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import Tensor
from torch.export._tree_utils import reorder_kwargs
from torch.utils import _pytree as pytree

from tarvis.operators import dispatch  # with the operators that packages call back
from tarvis.structures import InputError

from ..folder import is_out_of_memory
from ..graphs import OUTPUTS, Graph, without_tf32
from ..manifest import Manifest, difference
from . import HOME, Written, first_line, progress, quiet

CODE = "data/aotinductor/model/"
"""Where a package has its machine code."""


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
        self.unpacked = tempfile.TemporaryDirectory()  # kernels of a GPU are read when they first run
        try:
            library = unpack(path, Path(self.unpacked.name))
            self.runner = load(library, device)
            taken, _ = self.runner.get_call_spec()
            self.inputs = pytree.treespec_loads(taken)
        except Exception as error:  # of the loader, of the linker, of zip files
            raise InputError(f"{path}: cannot be loaded ({first_line(error)}): package again") from None

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # contiguous, as the examples were: the compiled code reads memory by their strides
        tensors = {name: value.detach().to(self.device).contiguous() for name, value in inputs.items()}
        # a package's launches go to the current GPU, its scratch memory too
        with torch.cuda.device_of(next(iter(tensors.values()))), without_tf32():
            found = self.runner.run(list(reorder_kwargs(tensors, self.inputs).values()))
        return dict(zip(self.outputs, found, strict=False))

    def differences(self, graph: Graph, _: Manifest) -> Iterator[tuple[str, float, str]]:
        """Which tensors of the package are not those of `graph` bit for bit, and by how much."""
        program = graph.trace(self.device)
        names = self.runner.get_constant_names_to_original_fqns()
        got = {names.get(key, key): x for key, x in self.runner.extract_constants_map(False).items()}
        ours = {**program.state_dict, **program.constants}
        yield "tensors", *difference({name: x for name, x in ours.items() if name in got}, got)


def unpack(path: Path, folder: Path) -> Path:
    """Unpack a package's files into a folder, without folders of their own; returns the library among them.

    PyTorch's own loader writes a file to wherever its name in the package says.

    Raises:
        ValueError: files of other places, or not one library.
    """
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            _, found, name = entry.filename.partition(CODE)
            if not found:
                continue
            if not name or Path(name).name != name or (folder / name).exists():
                raise ValueError(f"a file with the name {name[:80]!r}")
            with archive.open(entry) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)
    (library,) = folder.glob("*.so")
    return library


def load(library: Path, device: torch.device) -> Any:
    """The runner of an unpacked package."""
    if device.type == "cpu":
        return torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1)
    return torch._C._aoti.AOTIModelContainerRunnerCuda(str(library), 1, str(device), str(library.parent))


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
            f"python -m {HOME}.aoti on this machine with --device {device.type}"
        )
