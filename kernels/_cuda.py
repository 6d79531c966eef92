"""The CUDA extension from Python: dtypes, layouts and memory; the kernels themselves are in `csrc`.

The contracts have checked the inputs; a layout that a kernel cannot read is copied first. What must be copied
depends on addresses, which a traced tensor does not have: the functions here are operators that torch.compile
calls as they are. The first call compiles the library, if need be, and loads it. `empty_*` make results
without values, as the contracts' own operators need them under tracing, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from .dispatch import KERNEL_DTYPES
from .operator import parts

_LIMIT = 2**31 - 1024  # the library counts in 32 bits, up to whole blocks
_MOST_ENTRIES = 65535  # of a batch in one launch: the second or third dimension of a grid
_MOST_QUERIES = 64 * 65535  # of mask_bits, 64 a block

_loaded = False


def load(library: Path | None = None) -> None:
    """Load the compiled operators of `csrc`: a library, or this machine's, which is compiled if need be.

    Raises:
        RuntimeError: the library cannot be compiled or loaded, or others can write it; the message says what
            is missing or where the log is.
    """
    global _loaded
    if _loaded:
        return
    from . import build  # not before: it is a program, too

    library = library or build.library()
    build.require_private(library)
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"{library} cannot be loaded: {error}\n(delete it, and it is compiled again in a new process)"
        ) from error
    _loaded = True


def _operators() -> Any:
    """Operators of `csrc`; loaded on first use, e.g. by a program compiled in another process."""
    load()
    return torch.ops.tarvis_cuda


def _opaque(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function as tarvis::<name>_cuda."""

    def registered(body: Callable[..., Any]) -> Any:
        body.__signature__ = inspect.signature(body, eval_str=True)  # type: ignore[attr-defined]
        operator = custom_op(f"tarvis::{body.__name__}_cuda", body, mutates_args=())
        operator.register_fake(fake)
        return operator

    return registered


def empty_output(value: Tensor, _: Tensor, logit: Tensor, *__: Any) -> Tensor:
    heads, channels = value.shape[2:]
    return value.new_empty(value.shape[0], logit.shape[1], heads * channels)


@_opaque(empty_output)
def ms_deform_attn(
    value: Tensor, offset: Tensor, logit: Tensor, ref: Tensor | None, shapes: Sequence[int], classic: bool
) -> Tensor:
    """[B, S, A, D], [B, Q, A, L, P, 2], [B, Q, A, L, P], [B or 1, Q, L or 1, 2] -> [B, Q, A*D]."""
    inputs = _attention(value, offset, logit, ref)
    out = empty_output(value, offset, logit)
    for *part, to in parts(_MOST_ENTRIES, *inputs, out):
        _operators().ms_deform_attn(*part, shapes, classic, to)
    return out


def empty_gradients(_: Tensor, value: Tensor, offset: Tensor, logit: Tensor, *__: Any) -> tuple[Tensor, ...]:
    return value.new_empty(value.shape), offset.new_empty(offset.shape), logit.new_empty(logit.shape)


@_opaque(empty_gradients)
def ms_deform_attn_backward(
    grad: Tensor,
    value: Tensor,
    offset: Tensor,
    logit: Tensor,
    ref: Tensor | None,
    shapes: Sequence[int],
    classic: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, offset and logit in their dtypes; without atomics where deterministic."""
    grad = _dense(grad.to(value.dtype))
    values, offsets, logits, refs = _attention(value, offset, logit, ref)
    grad_offset = offsets.new_empty(offsets.shape)
    grad_logit = logits.new_empty(logits.shape)
    inputs = (grad, values, offsets, logits, refs)
    if deterministic:
        grad_value = value.new_empty(value.shape)
        run, most = partial(_backward_by_bins, shapes, classic), _sortable(logit, shapes)
    else:
        grad_value = value.new_zeros(value.shape, dtype=torch.float32)
        run, most = partial(_backward_by_atomics, shapes, classic), _MOST_ENTRIES
    for part in parts(most, *inputs, grad_offset, grad_logit, grad_value):
        run(*part)
    return grad_value.to(value.dtype), grad_offset.to(offset.dtype), grad_logit.to(logit.dtype)


def _backward_by_atomics(shapes: Sequence[int], classic: bool, *tensors: Tensor) -> None:
    *inputs, grad_offset, grad_logit, grad_value = tensors
    grads = (grad_offset, grad_logit, grad_value)
    _operators().ms_deform_attn_backward(*inputs, shapes, classic, *grads, None, None)


def _backward_by_bins(shapes: Sequence[int], classic: bool, *tensors: Tensor) -> None:
    *inputs, grad_offset, grad_logit, grad_value = tensors
    grad, value, _, logit, _ = inputs
    bin = logit.new_empty(logit.numel(), dtype=torch.int32)
    weight = logit.new_empty(logit.numel(), 4, dtype=torch.float32)
    grads = (grad_offset, grad_logit, None)
    _operators().ms_deform_attn_backward(*inputs, shapes, classic, *grads, bin, weight)
    ordered, order = torch.sort(bin, stable=True)
    bins = len(logit) * logit.shape[2] * _bins(shapes)
    places = torch.arange(bins + 1, dtype=torch.int32, device=value.device)
    first = torch.searchsorted(ordered, places, out_int32=True)
    _operators().ms_deform_attn_gather(grad, value, logit, shapes, order, first, weight, grad_value)


def _bins(shapes: Sequence[int]) -> int:
    """Of one (batch entry, head): places for the upper left corner of a sample."""
    return sum((h + 1) * (w + 1) for h, w in zip(shapes[::2], shapes[1::2], strict=True))


def _sortable(logit: Tensor, shapes: Sequence[int]) -> int:
    """Entries of a batch whose samples and bins 32 bits can number; one fits, as `_attention` checks."""
    per_entry = max(1, logit[:1].numel(), logit.shape[2] * _bins(shapes))
    return max(1, min(_MOST_ENTRIES, _LIMIT // per_entry))


def empty_bits(query: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    (B, Q), N = query.shape[:2], features.shape[2]
    bits = query.new_empty(B, Q, 4 * ((N + 31) // 32), dtype=torch.uint8)
    return bits, query.new_empty(B, Q, dtype=torch.bool)


@_opaque(empty_bits)
def mask_bits(query: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """[B, Q, C], [B, C, N] -> bits [B, Q, 4 * ceil(N / 32)] uint8, seen [B, Q] bool."""
    if query.dtype != features.dtype:
        query, features = _exact(query), _exact(features)
    if query.shape[1] > _MOST_QUERIES:
        results = [mask_bits(part, features) for part in query.split(_MOST_QUERIES, 1)]
        return torch.cat([bits for bits, _ in results], 1), torch.cat([seen for _, seen in results], 1)
    (B, Q, _), N = query.shape, features.shape[2]
    words = query.new_empty(B, Q, (N + 31) // 32, dtype=torch.int32)
    seen = query.new_zeros(B, Q, dtype=torch.uint8)
    for part in parts(_MOST_ENTRIES, query, features, words, seen):
        _operators().mask_bits(*part)
    return words.view(torch.uint8), seen.view(torch.bool)


def _masks(logits: Tensor, y_start: Tensor, _: Tensor, x_start: Tensor, __: Tensor, packed: bool) -> Tensor:
    (N, T), H, W = logits.shape[:2], y_start.shape[0], x_start.shape[0]
    if packed:
        return logits.new_empty(N, T, H, 4 * ((W + 31) // 32), dtype=torch.uint8)
    return logits.new_empty(N, T, H, W, dtype=torch.bool)


@_opaque(_masks)
def mask_upsample(
    logits: Tensor, y_start: Tensor, y_weight: Tensor, x_start: Tensor, x_weight: Tensor, packed: bool
) -> Tensor:
    """[N, T, h, w] -> [N, T, H, W] bool, or [N, T, H, 4 * ceil(W / 32)] uint8 of bits where packed."""
    axes = (y_start, y_weight, x_start, x_weight)
    out = _masks(logits, *axes, packed)
    if out.numel():
        memory = out.view(torch.int32 if packed else torch.uint8)
        _operators().mask_upsample(logits.contiguous(), *axes, packed, memory)
    return out


def _labels(
    logits: Tensor, y_start: Tensor, _: Tensor, x_start: Tensor, __: Tensor, background: bool
) -> Tensor:
    dtype = torch.uint8 if logits.shape[0] + int(background) <= 256 else torch.int16
    return logits.new_empty(logits.shape[1], y_start.shape[0], x_start.shape[0], dtype=dtype)


@_opaque(_labels)
def label_upsample(
    logits: Tensor, y_start: Tensor, y_weight: Tensor, x_start: Tensor, x_weight: Tensor, background: bool
) -> Tensor:
    """[K, T, h, w] -> [T, H, W] uint8, or int16 where the labels do not fit."""
    axes = (y_start, y_weight, x_start, x_weight)
    out = _labels(logits, *axes, background)
    if logits.numel() == 0:
        return out.zero_()
    _operators().label_upsample(logits.contiguous(), *axes, background, out)
    return out


def _attention(
    value: Tensor, offset: Tensor, logit: Tensor, ref: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Inputs in layouts that the kernels read: offsets and logits in the dtype of the values or float32."""
    B, S = value.shape[:2]
    Q, L = logit.shape[1], logit.shape[3]
    samples = logit.shape[1:].numel()
    _check(samples <= _LIMIT, f"{samples} samples of one batch entry are more than the kernels can number")
    if offset.dtype != logit.dtype or offset.dtype not in (value.dtype, torch.float32):
        offset, logit = _exact(offset), _exact(logit)  # unlike rounding coordinates to 16 bits
    value = _rows(value, 16 // value.element_size())
    if S * value.stride(1) > _LIMIT:
        value = value.contiguous()
    if ref is not None:
        ref = _exact(ref).expand(B, Q, L, 2)
        if ref.stride(3) != 1:
            ref = ref.contiguous()
    return value, _rows(offset, 2), _rows(logit, 1), ref


def _exact(x: Tensor) -> Tensor:
    """The same numbers in float32."""
    _check(x.dtype in KERNEL_DTYPES, f"the kernels take float32, float16 and bfloat16, not {x.dtype}")
    return x.float()


def _rows(x: Tensor, unit: int) -> Tensor:
    """`x` or a copy, such that all behind its first two dimensions is contiguous and starts at multiples of
    `unit` elements."""
    step = 1
    fits = _aligned(x, unit * x.element_size()) and all(stride % unit == 0 for stride in x.stride()[:2])
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        fits = fits and (size == 1 or stride == step)
        step *= size
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _dense(x: Tensor) -> Tensor:
    """`x` or a copy, contiguous from a multiple of 16 bytes on."""
    fits = x.is_contiguous() and _aligned(x, 16)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _aligned(x: Tensor, unit: int) -> bool:
    """By its address: memory from elsewhere (DLPack, from_blob) may begin anywhere."""
    return x.data_ptr() % unit == 0


def _check(fits: bool, message: str) -> None:
    if not fits:
        raise ValueError(message)
