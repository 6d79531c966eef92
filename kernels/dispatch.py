"""Which implementation of an operator runs: the best that can, or exactly the one that was asked for.

Every operator takes `impl`. "reference", "triton" and "cuda" run that implementation or raise; "auto" takes
Triton on a GPU, then the CUDA extension where Triton is missing, and plain PyTorch on a CPU. A GPU that is
left with plain PyTorch causes a warning (outside torch.compile). The environment variable TARVIS_KERNELS says
what "auto" stands for; `using` does so for a block of code.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "cuda", "reference"]

ENVIRONMENT = "TARVIS_KERNELS"
HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"  # read once, as Triton does

FAST: tuple[Impl, ...] = ("triton", "cuda")  # in the order in which "auto" tries them
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _checked(impl: str, name: str = "impl") -> Impl:
    if impl not in get_args(Impl):
        raise ValueError(f"{name}={impl!r}: expected one of {', '.join(get_args(Impl))}")
    return impl  # type: ignore[return-value]


_preferred = _checked(os.environ.get(ENVIRONMENT, "auto"), ENVIRONMENT)


def preferred() -> Impl:
    """What "auto" stands for now."""
    return _preferred


@contextmanager
def using(impl: Impl) -> Iterator[None]:
    """Let "auto" stand for `impl` within a block, instead of what TARVIS_KERNELS says."""
    global _preferred
    before, _preferred = _preferred, _checked(impl)
    try:
        yield
    finally:
        _preferred = before


_compiled: dict[str, set[Impl]] | None = None


@contextmanager
def compiled() -> Iterator[dict[str, set[Impl]]]:
    """Collect the implementations that AOTInductor compiles within the block, by operator."""
    global _compiled
    before, _compiled = _compiled, {}
    try:
        yield _compiled
    finally:
        _compiled = before


def choose(
    operator: str,
    impl: str,
    tensors: Sequence[Tensor],
    *,
    unfit: str = "",
    cuda: bool = False,
    inside: bool = False,
) -> Impl:
    """The implementation to run: "triton", "cuda" or "reference"; "auto" for a program that is exported.

    An exported program decides on the machine it runs on, so it holds the operator itself. While AOTInductor
    compiles a program, PyTorch also reports an export, but then the operator asks from `inside`: AOTInductor
    compiles the implementation for the device of its inputs.

    Args:
        operator: its name, for messages.
        impl: what was asked for.
        tensors: the inputs, all on one device; the first one's device and dtype decide.
        unfit: why the kernels cannot take these inputs, empty if they can.
        cuda: whether the operator has a kernel in the CUDA extension.
        inside: whether the registered operator asks, because it runs or is traced.

    Raises:
        ValueError: `impl` is not one of the four; tensors on different devices.
        RuntimeError: the implementation asked for cannot run here; the message says why.
    """
    asked = _checked(impl)
    first = tensors[0]
    for other in tensors[1:]:
        if other.device != first.device:
            raise ValueError(f"{operator}: tensors on {first.device} and on {other.device}")
    wanted = _preferred if asked == "auto" else asked
    if not torch.compiler.is_exporting():
        return _choose(operator, wanted, first, unfit, cuda)
    if wanted == "auto" and not inside:
        return "auto"
    chosen = _choose(operator, wanted, first, unfit, cuda)
    if inside and _compiled is not None:
        _compiled.setdefault(operator, set()).add(chosen)
    return chosen


def _choose(operator: str, wanted: Impl, tensor: Tensor, unfit: str, cuda: bool) -> Impl:
    if wanted == "reference" or (wanted == "auto" and not tensor.is_cuda):
        return "reference"
    device = str(tensor.device)
    if wanted == "auto":
        chosen, why = automatic(device, cuda=cuda, unfit=unfit)
        if chosen == "reference" and tensor.dtype != torch.float64 and not torch.compiler.is_compiling():
            warnings.warn(f"{operator} runs as plain PyTorch on {device}: {why}", stacklevel=5)
        return chosen
    why = why_not(wanted, device, cuda=cuda, unfit=unfit)
    if why:
        raise RuntimeError(f"{operator}: impl={wanted!r} cannot run here: {why}")
    return wanted


def unfit_dtype(*tensors: Tensor | None) -> str:
    """Why the kernels cannot take the dtypes of these tensors; empty if they can."""
    for x in tensors:
        if x is not None and x.dtype not in KERNEL_DTYPES:
            return f"its kernels take float32, float16 and bfloat16, not {str(x.dtype).split('.')[1]}"
    return ""


def automatic(device: str, *, cuda: bool, unfit: str = "") -> tuple[Impl, str]:
    """What "auto" runs on a device, and why nothing better does."""
    if not device.startswith("cuda"):
        return "reference", f"the kernels are for GPUs, tensors are on {device}"
    reasons: list[str] = []
    for impl in FAST:
        why = why_not(impl, device, cuda=cuda, unfit=unfit)
        if not why:
            return impl, "; ".join(reasons)
        reasons.append(f"{impl}: {why}")
    return "reference", "; ".join(reasons)


def why_not(impl: Impl, device: str, *, cuda: bool, unfit: str = "") -> str:
    """Why an implementation cannot run an operator on a device; empty where it can."""
    if impl == "triton":
        return unfit or triton_missing(device)
    return unfit or ("" if cuda else "not in the CUDA extension") or cuda_missing(device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def triton_missing(device: str) -> str:
    """Why Triton kernels cannot run on a device; empty where they can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if INTERPRETED:
        return ""
    if not device.startswith("cuda"):
        return (
            f"tensors are on {device} (to interpret kernels there, set TRITON_INTERPRET=1 before the start)"
        )
    major, minor = torch.cuda.get_device_capability(torch.device(device))
    return "" if major >= 8 else f"Triton needs compute capability 8.0, this GPU has {major}.{minor}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def cuda_missing(device: str) -> str:
    """Why the CUDA extension cannot run on a device; empty where it can, if need be after compiling it."""
    from . import build  # not before: it is a program, too

    return build.missing(device) if device.startswith("cuda") else f"tensors are on {device}"
