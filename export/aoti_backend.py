"""AOTInductor: the packages of `export.aoti`, on a device like the one they were compiled on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

import torch
import torch._inductor
from torch import Tensor

from export.graphs import ENCODED, without_tf32
from export.manifest import Manifest
from tarvis.structures import InputError

OUTPUTS = {
    "encoder": ENCODED,
    "decoder": ("queries", "mask_embedding", "class_logits"),  # the last where queries have classes
    "object_encoder": ("background", "objects"),
}


class AotiGraph:
    """One package. Tensors go in by name and come out by name, on the device it was compiled for."""

    def __init__(self, path: Path, outputs: tuple[str, ...], device: torch.device) -> None:
        self.device, self.outputs = device, outputs
        index = device.index if device.index is not None else -1
        try:
            self.run = torch._inductor.aoti_load_package(str(path), device_index=index)
        except Exception as error:  # of the loader, of the linker, of zip files
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path}: cannot be loaded ({reason}): package again") from None

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # contiguous, as the examples were: the compiled code reads memory by their strides
        tensors = {name: value.detach().to(self.device).contiguous() for name, value in inputs.items()}
        # a package's launches go to the current GPU, its scratch memory too
        with torch.cuda.device_of(next(iter(tensors.values()))), without_tf32():
            found = self.run(**tensors)
        return dict(zip(self.outputs, found, strict=False))


def open_graphs(folder: Path, manifest: Manifest, device: torch.device) -> dict[str, AotiGraph]:
    """Every package of a folder, loaded.

    Raises:
        InputError: they were compiled by another PyTorch or for another kind of device, or are damaged.
    """
    require_target(folder, manifest, device)
    # what packages call back: all where Triton is missing or interpreted, and the CUDA extension
    import kernels._cuda  # noqa: F401

    return {name: AotiGraph(folder / file, OUTPUTS[name], device) for name, file in manifest.graphs.items()}


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
    different = [name for name in here if made.get(name) != here[name]]
    if different:
        name = different[0]
        raise InputError(
            f"{folder}: compiled for {name} {made.get(name, 'unknown')}, here is {name} {here[name]}: run "
            f"python -m export.aoti on this machine with --device {device.type}"
        )
