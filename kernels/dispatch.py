"""Which implementation of an operator runs: the best that can, or exactly the one that was asked for.

Every operator takes `impl`. "reference", "triton" and "cuda" run that implementation or raise; "auto" takes
Triton on a GPU, then the CUDA extension where Triton is missing, and plain PyTorch on a CPU; where a GPU is
left to plain PyTorch it warns (outside torch.compile). The environment
variable TARVIS_KERNELS says what "auto" stands for; `using` does so for a block of code.
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.library import custom_op, triton_op

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
    """What "auto" stands for within a block, in the place of TARVIS_KERNELS."""
    global _preferred
    before, _preferred = _preferred, _checked(impl)
    try:
        yield
    finally:
        _preferred = before


_compiled: dict[str, set[Impl]] | None = None


@contextmanager
def compiled() -> Iterator[dict[str, set[Impl]]]:
    """What operators of exported programs become that AOTInductor compiles within the block, by name."""
    global _compiled
    before, _compiled = _compiled, {}
    try:
        yield _compiled
    finally:
        _compiled = before


def choose(
    operator: str,
    impl: str,
    tensor: Tensor,
    *others: Tensor | None,
    unfit: str = "",
    cuda: bool = False,
    inside: bool = False,
) -> Impl:
    """The implementation to run: "triton", "cuda" or "reference"; "auto" for a program that is exported.

    An exported program decides on the machine it runs on, so that it holds the operator itself. AOTInductor
    says that it exports, too, but asks `inside`: it compiles what the operator does on its inputs' device.

    Args:
        operator: its name, for messages.
        impl: what was asked for.
        tensor: the input whose device and dtype decide.
        others: the other inputs, which must be on the same device.
        unfit: what of the inputs the kernels cannot take, empty if they can.
        cuda: whether the operator has a kernel in the CUDA extension.
        inside: whether the operator itself asks, because it runs or is taken apart.

    Raises:
        ValueError: `impl` is not one of the four; tensors on different devices.
        RuntimeError: the implementation asked for cannot run here; the message says why.
    """
    asked = _checked(impl)
    for other in others:
        if other is not None and other.device != tensor.device:
            raise ValueError(f"{operator}: tensors on {tensor.device} and on {other.device}")
    wanted = _preferred if asked == "auto" else asked
    if torch.compiler.is_exporting():
        if inside:
            chosen = _choose(operator, wanted, tensor, unfit, cuda)
            if _compiled is not None:
                _compiled.setdefault(operator, set()).add(chosen)
            return chosen
        if wanted == "auto":
            return "auto"
    return _choose(operator, wanted, tensor, unfit, cuda)


def _choose(operator: str, wanted: Impl, tensor: Tensor, unfit: str, cuda: bool) -> Impl:
    if wanted == "reference" or (wanted == "auto" and not tensor.is_cuda):
        return "reference"
    if tensor.dtype not in KERNEL_DTYPES:
        unfit = f"its kernels take float32, float16 and bfloat16, not {str(tensor.dtype).split('.')[1]}"
    device = str(tensor.device)
    if wanted == "auto":
        chosen, why = automatic(device, cuda=cuda, unfit=unfit)
        if chosen == "reference" and tensor.dtype != torch.float64 and not torch.compiler.is_compiling():
            warnings.warn(f"{operator} runs as plain PyTorch on {device}: {why}", stacklevel=4)
        return chosen
    why = why_not(wanted, device, cuda=cuda, unfit=unfit)
    if why:
        raise RuntimeError(f"{operator}: impl={wanted!r} cannot run here: {why}")
    return wanted


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
    if not device.startswith("cuda"):
        return f"tensors are on {device}"
    from kernels import build

    return build.missing(device)


def register(
    name: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    opaque: bool = False,
    tags: Sequence[torch.Tag] = (),
) -> Any:
    """Registers `tarvis::<name>`, one node under torch.export, and returns its CustomOpDef.

    Where Triton compiles, torch.compile looks through it, so that Inductor plans the launches (and fuses the
    reference, where that is what runs); `opaque` operators, and all where Triton is interpreted or missing,
    are called as they are. `tags` are those of an opaque operator.
    """
    run = _on_its_device(body)
    if opaque or not HAS_TRITON or INTERPRETED:
        operator: Any = custom_op(f"tarvis::{name}", run, mutates_args=(), tags=tags)
    else:
        operator = triton_op(f"tarvis::{name}", run, mutates_args=())
    operator.register_fake(fake)
    return operator


def _on_its_device(body: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its first tensor's GPU as the current one, which is where kernels are launched."""

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(next(iter((*args, *kwargs.values())))):  # does nothing for other devices
            return body(*args, **kwargs)

    run.__signature__ = inspect.signature(body, eval_str=True)  # type: ignore[attr-defined]  # the schema
    return run
