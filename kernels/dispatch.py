"""Which implementation of an operator runs: the best that can, or exactly the one that was asked for.

Every operator takes `impl`. "reference", "triton" and "cuda" run that implementation or raise; "auto" takes
Triton on a GPU, then the CUDA extension where Triton is missing, and plain PyTorch on a CPU. A GPU that is
left with plain PyTorch causes a warning, once (outside torch.compile). The environment variable
TARVIS_KERNELS says what "auto" stands for; `using` does so for a block of code. `explain` tells what a call
would take.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

Impl = Literal["auto", "triton", "cuda", "reference"]

ENVIRONMENT = "TARVIS_KERNELS"
HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"  # read once, as Triton does

FAST: tuple[Impl, ...] = ("triton", "cuda")  # in the order in which "auto" tries them
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOATS = (*KERNEL_DTYPES, torch.float64)


def _checked(impl: str, name: str = "impl") -> Impl:
    if impl not in get_args(Impl):
        raise ValueError(f"{name}={impl!r}: expected one of {', '.join(get_args(Impl))}")
    return impl  # type: ignore[return-value]


_latest = _checked(os.environ.get(ENVIRONMENT, "auto"), ENVIRONMENT)
_preferred: ContextVar[Impl] = ContextVar("preferred", default=_latest)
# _latest is that of any thread, for torch.compile, which can neither read a ContextVar nor see it change


def preferred() -> Impl:
    """What "auto" stands for now."""
    return _latest if torch.compiler.is_dynamo_compiling() else _preferred.get()


@contextmanager
def using(impl: Impl) -> Iterator[None]:
    """Let "auto" stand for `impl` within a block, instead of what TARVIS_KERNELS says; in this thread only.

    Functions under torch.compile go by the block that was entered or left last, in whatever thread.
    """
    global _latest
    before = _preferred.get()
    token = _preferred.set(_checked(impl))
    _latest = impl
    try:
        yield
    finally:
        _preferred.reset(token)
        _latest = before


_compiled: ContextVar[dict[str, set[Impl]] | None] = ContextVar("compiled", default=None)


@contextmanager
def compiled() -> Iterator[dict[str, set[Impl]]]:
    """Collect the implementations that AOTInductor compiles within the block, by operator."""
    found: dict[str, set[Impl]] = {}
    token = _compiled.set(found)
    try:
        yield found
    finally:
        _compiled.reset(token)


class Choice(NamedTuple):
    """What a call takes, as `explain` gives it."""

    operator: str
    impl: Impl | None
    """None: the call raises RuntimeError."""
    why_not: dict[Impl, str]
    """Why each of the others does not run, and an implementation that was asked for and cannot."""

    def __str__(self) -> str:
        rows = [f"{impl}: {why}" for impl, why in self.why_not.items()]
        return "\n  ".join([f"{self.operator} runs as {self.impl or 'nothing: it raises'}", *rows])


class _Explained(BaseException):
    """Carries the choice out of a call that is only to be explained."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice


_explaining: ContextVar[bool] = ContextVar("explaining", default=False)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Which implementation `function(*args, **kwargs)` takes, and why not the others; nothing is computed.

    Raises:
        ValueError: the inputs do not fit together.
    """
    token = _explaining.set(True)
    try:
        function(*args, **kwargs)
    except _Explained as explained:
        return explained.choice
    finally:
        _explaining.reset(token)
    why: dict[Impl, str] = dict.fromkeys(FAST, "it has no kernels: plain PyTorch serves every device")
    return Choice(function.__name__, "reference", why)


NOT_IN_CUDA = "not in the CUDA extension"


def choose(
    operator: str,
    impl: str,
    tensors: Sequence[Tensor],
    *,
    unfit: str = "",
    no_cuda: str = NOT_IN_CUDA,
    inside: bool = False,
    differentiable: bool = False,
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
        no_cuda: why the CUDA extension has no kernel for them, empty if it has.
        inside: whether the registered operator asks, because it runs or is traced.
        differentiable: whether the operator has gradients; by reverse mode only.

    Raises:
        ValueError: `impl` is not one of the four; tensors on different devices.
        RuntimeError: the implementation asked for cannot run here; the message says why. Or torch.jit.trace
            is at work, or forward-mode derivatives are asked for (torch.func.jvp).
    """
    asked = _checked(impl)
    first = tensors[0]
    require_one_device(operator, *tensors)
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise RuntimeError(f"{operator}: torch.jit.trace would freeze all sizes; torch.export does not")
    if differentiable and forward_ad._current_level >= 0:
        for x in tensors:
            if forward_ad.unpack_dual(x).tangent is not None:
                raise RuntimeError(f"{operator} has no forward-mode derivative (torch.func.jvp, jacfwd)")
    wanted = preferred() if asked == "auto" else asked
    if not torch.compiler.is_dynamo_compiling() and _explaining.get():
        raise _Explained(_explanation(operator, wanted, first, unfit, no_cuda))
    if not torch.compiler.is_exporting():
        return _choose(operator, wanted, first, unfit, no_cuda)
    if wanted == "auto" and not inside:
        return "auto"
    chosen = _choose(operator, wanted, first, unfit, no_cuda)
    if inside and (found := _compiled.get()) is not None:
        found.setdefault(operator, set()).add(chosen)
    return chosen


def _choose(operator: str, wanted: Impl, tensor: Tensor, unfit: str, no_cuda: str) -> Impl:
    if wanted == "reference" or (wanted == "auto" and tensor.device.type in ("cpu", "meta")):
        return "reference"
    device = str(tensor.device)
    if wanted == "auto":
        chosen, why = automatic(device, no_cuda=no_cuda, unfit=unfit)
        if not torch.compiler.is_compiling():
            if chosen == "reference" and tensor.dtype != torch.float64:
                _say(f"{operator} runs as plain PyTorch on {device}: {why}")
            elif chosen != "reference" and torch.version.hip:
                _say(f"{operator} runs as {chosen} on {device}, a ROCm device, where it was never tested")
        return chosen
    why = why_not(wanted, device, no_cuda=no_cuda, unfit=unfit)
    if why:
        raise RuntimeError(f"{operator}: impl={wanted!r} cannot run here: {why}")
    return wanted


@cache  # once in a process
def _say(message: str) -> None:
    warnings.warn(message, stacklevel=6)


def _explanation(operator: str, wanted: Impl, tensor: Tensor, unfit: str, no_cuda: str) -> Choice:
    """What `_choose` gives, with reasons."""
    device = str(tensor.device)
    why = {impl: why_not(impl, device, no_cuda=no_cuda, unfit=unfit) for impl in FAST}
    if wanted == "auto":
        chosen: Impl | None = automatic(device, no_cuda=no_cuda, unfit=unfit)[0]
        other = f"{chosen} comes first" if chosen in FAST else 'it can, but "auto" takes it on a GPU only'
        why["reference"] = f"{chosen} is faster"
    else:
        chosen = None if why.get(wanted) else wanted
        other = why["reference"] = f"{wanted} was asked for"
    return Choice(operator, chosen, {impl: text or other for impl, text in why.items() if impl != chosen})


def require(operator: str, dtypes: Sequence[torch.dtype], /, **tensors: Tensor | None) -> None:
    """Raises ValueError unless these are dense tensors of one of the dtypes (none given: of any) or None."""
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            found = str(x.layout) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{operator}: expected {name} as a dense tensor, got {found}")
        if dtypes and x.dtype not in dtypes:
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{operator}: expected {name} in {expected}, got {x.dtype}")


def unfit_dtype(*tensors: Tensor | None) -> str:
    """Why the kernels cannot take the dtypes of these tensors; empty if they can."""
    for x in tensors:
        if x is not None and x.dtype not in KERNEL_DTYPES:
            return f"its kernels take float32, float16 and bfloat16, not {str(x.dtype).split('.')[1]}"
    return ""


def require_one_device(operator: str, *tensors: Tensor) -> None:
    """Raises ValueError where tensors lie on different devices."""
    for other in tensors[1:]:
        if other.device != tensors[0].device:
            raise ValueError(f"{operator}: tensors on {tensors[0].device} and on {other.device}")


def automatic(device: str, *, no_cuda: str = "", unfit: str = "") -> tuple[Impl, str]:
    """What "auto" runs on a device, and why nothing better does."""
    if not device.startswith("cuda"):
        return "reference", f"the kernels are for GPUs of NVIDIA, tensors are on {device}"
    reasons: list[str] = []
    for impl in FAST:
        why = why_not(impl, device, no_cuda=no_cuda, unfit=unfit)
        if not why:
            return impl, "; ".join(reasons)
        reasons.append(f"{impl}: {why}")
    return "reference", "; ".join(reasons)


def _constant(function: Callable[[str], str]) -> Callable[[str], str]:
    """Let torch.compile call a function while it traces, and take the answer for a constant.

    `torch.compiler.assume_constant_result` does the same, but imports the compiler, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def why_not(impl: Impl, device: str, *, no_cuda: str = "", unfit: str = "") -> str:
    """Why an implementation cannot run an operator on a device; empty where it can."""
    if impl == "triton":
        return unfit or triton_missing(device)
    return unfit or no_cuda or cuda_missing(device)


@_constant
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


@_constant
def cuda_missing(device: str) -> str:
    """Why the CUDA extension cannot run on a device; empty where it can, if need be after compiling it."""
    from . import build  # not before: it is a program, too

    return build.missing(device) if device.startswith("cuda") else f"tensors are on {device}"
