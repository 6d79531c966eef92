"""Deformable attention: a thread has 8 (forward) or 4 (backward) channels of one query and head.

Levels and points are unrolled within the thread, so that softmax, places and sums stay in its registers: no
shared memory, no barriers. 16-bit numbers are read as words of two, widened by a shift or a mask.
The backward reads only the inputs and adds to a float32 gradient of `value` by atomics of 16 bytes; the
deterministic one writes down where its samples lie instead, sorts them, and lets every cell sum its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import TRITON_TYPE, Variant, cdiv, is_aligned, traced

# Threads of a program. Forward: 8 channels a thread, 16 bytes a load of 16-bit values. Backward: 4 channels a
# thread are what one atomic adds on sm_90, and within a single warp sums over channels are shuffles.
FORWARD_THREADS, BACKWARD_THREADS = 128, 32
GATHER_BLOCK = 16  # samples at once

_SIZES = ("h0", "w0", "h1", "w1", "h2", "w2", "h3", "w3")
_STRIDES = ("offset_b", "offset_q", "logit_b", "logit_q", "ref_b", "ref_q", "ref_l")


def forward(
    value: Tensor,
    offset: Tensor,
    logit: Tensor,
    ref: Tensor | None,
    shapes: Sequence[int],
    classic: bool,
    deterministic: bool,  # of the backward
) -> Tensor:
    """value [B, S, A, D], offset [B, Q, A, L, P, 2], logit [B, Q, A, L, P] -> [B, Q, A*D]."""
    B, _, A, D = value.shape
    Q = logit.shape[1]
    out = value.new_empty(B, Q, A * D)
    if B * Q * A:
        tensors, sizes, strides, constants = _arguments(value, offset, logit, ref, shapes, classic)
        block = FORWARD_THREADS * 8 // D
        traced(_forward)[(B * A * cdiv(Q, block),)](
            *tensors, out, Q, *sizes, *strides, **constants, BLOCK=block, num_warps=FORWARD_THREADS // 32
        )
    return out


def backward(
    grad: Tensor,
    value: Tensor,
    offset: Tensor,
    logit: Tensor,
    ref: Tensor | None,
    shapes: Sequence[int],
    classic: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [B, Q, A*D] -> gradients of value, offset and logit, in their shapes and dtypes."""
    B, S, A, D = value.shape
    Q, _, L, P = logit.shape[1:]
    grad_offset, grad_logit = offset.new_empty(offset.shape), logit.new_empty(logit.shape)
    if not B * Q * A:
        return value.new_zeros(value.shape), grad_offset, grad_logit
    grad = grad.contiguous()
    tensors, sizes, strides, constants = _arguments(value, offset, logit, ref, shapes, classic)
    keys = B * A * sum((h + 1) * (w + 1) for h, w in zip(shapes[::2], shapes[1::2], strict=True))
    if deterministic:
        key = value.new_empty(logit.shape, dtype=torch.int32 if keys < 2**31 else torch.int64)
        fraction = value.new_empty(offset.shape, dtype=torch.float32)
        attention = value.new_empty(logit.shape, dtype=torch.float32)
        grad_value = value.new_empty(value.shape)
    else:
        grad_value = value.new_zeros(value.shape, dtype=torch.float32)
        key = fraction = attention = grad_value  # never touched
    block = BACKWARD_THREADS * 4 // D
    _backward[(B * A * cdiv(Q, block),)](
        grad, *tensors, grad_value, grad_offset, grad_logit, key, fraction, attention, keys, S, Q,
        *sizes, *strides, **constants, BLOCK=block, PADDED=triton.next_power_of_2(L * P),
        ATOMIC=not deterministic, num_warps=BACKWARD_THREADS // 32,
    )  # fmt: skip
    if deterministic:
        ordered, order = key.flatten().sort(stable=True)
        bound = torch.searchsorted(ordered, torch.arange(keys + 1, dtype=key.dtype, device=key.device))
        if grad_value.numel():
            _gather[(B * S * A,)](
                grad, order, bound, fraction, attention, grad_value, S, *sizes,
                A=A, D=D, L=L, P=P, BLOCK=GATHER_BLOCK, num_warps=1,
            )  # fmt: skip
    return grad_value.to(value.dtype), grad_offset, grad_logit


def _arguments(
    value: Tensor, offset: Tensor, logit: Tensor, ref: Tensor | None, shapes: Sequence[int], classic: bool
) -> tuple[tuple[Tensor, ...], tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """Tensors, sizes of levels, strides and constants, as both kernels take them."""
    A, D = value.shape[2:]
    L, P = logit.shape[3:]
    value, offset, logit = _rows(value, 16), _rows(offset, 1), _rows(logit, 1)
    place, points, steps = "classic" if classic else "cell", value, (0, 0, 0)
    if ref is not None:
        place, points = "ref", ref if ref.stride(3) == 1 else ref.contiguous()
        b, q, level, _ = points.stride()
        steps = (b if ref.shape[0] > 1 else 0, q, level if ref.shape[2] > 1 else 0)
    strides = (value.stride(0), *offset.stride()[:2], *logit.stride()[:2], *steps)
    constants = {
        "VALUE_S": int(value.stride(1)),  # constant, so that neighbours are offsets within a load
        "A": A, "D": D, "L": L, "P": P, "PLACE": place,
        "PAIR_OFFSET": _paired(offset), "PAIR_LOGIT": L * P % 2 == 0 and _paired(logit),
    }  # fmt: skip
    return (value, offset, logit, points), (*shapes, *(0,) * (8 - 2 * L)), strides, constants


def _rows(x: Tensor, alignment: int) -> Tensor:
    """x [B, N, ...] if its rows are contiguous and start at multiples of `alignment` numbers, else a copy.

    The numbers of an entry are then within reach of 32 bits.
    """
    inner = (n == 1 or x.stride(i) == math.prod(x.shape[i + 1 :]) for i, n in enumerate(x.shape) if i > 1)
    outer = (x.stride(i) for i in (0, 1) if x.shape[i] > 1)
    aligned = all(n % alignment == 0 for n in outer) and is_aligned(x, alignment * x.element_size())
    if all(inner) and aligned and x.shape[1] * x.stride(1) < 2**31:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _paired(x: Tensor) -> bool:
    """Whether numbers 2n and 2n + 1 of every row are one aligned word of 32 bits."""
    return x.element_size() == 2 and all(n % 2 == 0 for n in x.stride()[:2]) and is_aligned(x, 4)


@triton.jit(do_not_specialize=["Q", *_SIZES, *_STRIDES])
def _forward(
    value_ptr,  # [B, S, A, D]
    offset_ptr,  # [B, Q, A, L, P, 2]
    logit_ptr,  # [B, Q, A, L, P]
    ref_ptr,  # [B or 1, Q, L or 1, 2]
    out_ptr,  # [B, Q, A, D]
    Q, h0, w0, h1, w1, h2, w2, h3, w3,
    value_b, offset_b, offset_q, logit_b, logit_q, ref_b, ref_q, ref_l,
    VALUE_S: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIR_OFFSET: tl.constexpr,
    PAIR_LOGIT: tl.constexpr,
):  # fmt: skip
    dtype = value_ptr.dtype.element_ty
    blocks = tl.cdiv(Q, BLOCK)
    pid = tl.program_id(0)
    a = pid // blocks % A
    b = (pid // blocks // A).to(tl.int64)
    row = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    q = tl.minimum(row, Q - 1)
    out_ptr += (b * Q * A + a) * D
    value_ptr += b * value_b + a * D
    offset_ptr += b * offset_b + a * (L * P * 2) + q.to(tl.int64) * offset_q
    logit_ptr += b * logit_b + a * (L * P) + q.to(tl.int64) * logit_q
    ref_ptr += b * ref_b + q.to(tl.int64) * ref_q
    WORDS: tl.constexpr = dtype != tl.float32
    STEP: tl.constexpr = VALUE_S // 2 if WORDS else VALUE_S
    if WORDS:
        value_ptr = value_ptr.to(tl.pointer_type(tl.int32))
    HALF: tl.constexpr = D // 2
    word = tl.arange(0, HALF)
    if PLACE != "classic":
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        for s in tl.static_range(L * P):
            largest = tl.maximum(largest, _number(logit_ptr, s, PAIR_LOGIT))
        total = tl.zeros([BLOCK], tl.float32)
    if PLACE == "cell":
        rx, ry = _cell_centre(q, L, h0, w0, h1, w1, h2, w2, h3, w3)
    acc = tl.zeros([BLOCK, HALF], tl.float32)
    acc_2 = tl.zeros([BLOCK, HALF], tl.float32)
    for level in tl.static_range(L):
        h, w, start = _level(level, h0, w0, h1, w1, h2, w2, h3, w3)
        if PLACE == "ref":
            rx = tl.load(ref_ptr + level * ref_l).to(tl.float32)
            ry = tl.load(ref_ptr + level * ref_l + 1).to(tl.float32)
        if PLACE != "classic":
            left = rx * w - 0.5
            top = ry * h - 0.5
        for p in tl.static_range(P):
            s = level * P + p
            x, y = _pair(offset_ptr, s, PAIR_OFFSET)
            weight = _number(logit_ptr, s, PAIR_LOGIT)
            if PLACE == "classic":
                x = x * w - 0.5
                y = y * h - 0.5
            else:
                x += left
                y += top
                weight = tl.exp(weight - largest)
                total += weight
            x0, lx, in_x0, in_x1 = _split(x, w)
            y0, ly, in_y0, in_y1 = _split(y, h)
            lower = weight * ly
            upper = weight - lower
            upper_right = upper * lx
            lower_right = lower * lx
            at = value_ptr + ((start + y0 * w + x0) * STEP)[:, None] + word[None, :]
            acc, acc_2 = _add(acc, acc_2, upper - upper_right, at, in_x0 & in_y0, HALF, dtype)
            acc, acc_2 = _add(acc, acc_2, upper_right, at + STEP, in_x1 & in_y0, HALF, dtype)
            at += w * STEP
            acc, acc_2 = _add(acc, acc_2, lower - lower_right, at, in_x0 & in_y1, HALF, dtype)
            acc, acc_2 = _add(acc, acc_2, lower_right, at + STEP, in_x1 & in_y1, HALF, dtype)
    if PLACE != "classic":
        scale = (1.0 / total)[:, None]
        acc *= scale
        acc_2 *= scale
    inside = (q == row)[:, None]  # row < Q, without keeping Q: on Triton 3.6 it would be spilled
    out_ptr += (q.to(tl.int64) * (A * D))[:, None]
    if WORDS:
        both = tl.join(acc.to(dtype), acc_2.to(dtype)).reshape(BLOCK, D)
        tl.store(out_ptr + tl.arange(0, D)[None, :], both, mask=inside)
    else:
        tl.store(out_ptr + word[None, :], acc, mask=inside)
        tl.store(out_ptr + HALF + word[None, :], acc_2, mask=inside)


@triton.jit(do_not_specialize=["nowhere", "S", "Q", *_SIZES, *_STRIDES])
def _backward(
    grad_ptr,  # [B, Q, A, D], gradient of the output
    value_ptr,  # [B, S, A, D]
    offset_ptr,  # [B, Q, A, L, P, 2]
    logit_ptr,  # [B, Q, A, L, P]
    ref_ptr,  # [B or 1, Q, L or 1, 2]
    grad_value_ptr,  # [B, S, A, D] float32, zeros; unused in deterministic mode
    grad_offset_ptr,  # as offset, contiguous
    grad_logit_ptr,  # as logit, contiguous
    key_ptr,  # [B, Q, A, L, P], this and the next in deterministic mode: see _keys; `nowhere` if outside
    fraction_ptr,  # [B, Q, A, L, P, 2] float32
    attention_ptr,  # [B, Q, A, L, P] float32
    nowhere, S, Q, h0, w0, h1, w1, h2, w2, h3, w3,
    value_b, offset_b, offset_q, logit_b, logit_q, ref_b, ref_q, ref_l,
    VALUE_S: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    PAIR_OFFSET: tl.constexpr,
    PAIR_LOGIT: tl.constexpr,
    ATOMIC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Q, BLOCK)
    pid = tl.program_id(0)
    a = pid // blocks % A
    b = (pid // blocks // A).to(tl.int64)
    row = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = row < Q
    q = tl.minimum(row, Q - 1)
    value_ptr += b * value_b + a * D
    offset_ptr += b * offset_b + a * (L * P * 2) + q.to(tl.int64) * offset_q
    logit_ptr += b * logit_b + a * (L * P) + q.to(tl.int64) * logit_q
    ref_ptr += b * ref_b + q.to(tl.int64) * ref_q
    grad_value_ptr += b * S * (A * D) + a * D
    # channels as [D // 4, 4]: the 4 of a thread are summed before products are combined, the rest after
    d = 4 * tl.arange(0, D // 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
    index = (b * Q + row) * A + a
    g = tl.load(grad_ptr + index[:, None, None] * D + d, mask=inside[:, None, None], other=0.0).to(tl.float32)
    # what is one number a sample lies in tiles spread over the row's threads: few registers, wide stores
    sample = tl.arange(0, PADDED)[None, :]
    attention = tl.load(
        logit_ptr[:, None] + sample, mask=sample < L * P, other=0.0 if PLACE == "classic" else float("-inf")
    ).to(tl.float32)
    if PLACE != "classic":
        largest = tl.max(attention, 1)
        attention = tl.exp(attention - largest[:, None])
        scale = 1.0 / tl.sum(attention, 1)
        attention *= scale[:, None]
    by_weight = tl.zeros([BLOCK, PADDED], tl.float32)
    by_x = tl.zeros([BLOCK, PADDED], tl.float32)
    by_y = tl.zeros([BLOCK, PADDED], tl.float32)
    if not ATOMIC:
        key = tl.zeros([BLOCK, PADDED], tl.int64)
        fraction_x = tl.zeros([BLOCK, PADDED], tl.float32)
        fraction_y = tl.zeros([BLOCK, PADDED], tl.float32)
        keys = _keys(L, h0, w0, h1, w1, h2, w2, h3, w3)
    if PLACE == "cell":
        rx, ry = _cell_centre(q, L, h0, w0, h1, w1, h2, w2, h3, w3)
    for level in tl.static_range(L):
        h, w, start = _level(level, h0, w0, h1, w1, h2, w2, h3, w3)
        if PLACE == "ref":
            rx = tl.load(ref_ptr + level * ref_l).to(tl.float32)
            ry = tl.load(ref_ptr + level * ref_l + 1).to(tl.float32)
        if PLACE != "classic":
            left = rx * w - 0.5
            top = ry * h - 0.5
        for p in tl.static_range(P):
            s = level * P + p
            x, y = _pair(offset_ptr, s, PAIR_OFFSET)
            weight = _number(logit_ptr, s, PAIR_LOGIT)
            if PLACE == "classic":
                x = x * w - 0.5
                y = y * h - 0.5
            else:
                x += left
                y += top
                weight = tl.exp(weight - largest) * scale
            x0, lx, in_x0, in_x1 = _split(x, w)
            y0, ly, in_y0, in_y1 = _split(y, h)
            in_y0 &= inside
            in_y1 &= inside
            cell = start + y0 * w + x0
            at = value_ptr + (cell * VALUE_S)[:, None, None] + d
            below = at + w * VALUE_S
            in00 = (in_x0 & in_y0)[:, None, None]
            in01 = (in_x1 & in_y0)[:, None, None]
            in10 = (in_x0 & in_y1)[:, None, None]
            in11 = (in_x1 & in_y1)[:, None, None]
            dot00 = tl.sum(tl.load(at, mask=in00, other=0.0).to(tl.float32) * g, 2)
            dot01 = tl.sum(tl.load(at + VALUE_S, mask=in01, other=0.0).to(tl.float32) * g, 2)
            dot10 = tl.sum(tl.load(below, mask=in10, other=0.0).to(tl.float32) * g, 2)
            dot11 = tl.sum(tl.load(below + VALUE_S, mask=in11, other=0.0).to(tl.float32) * g, 2)
            right0 = dot01 - dot00
            right1 = dot11 - dot10
            upper = dot00 + lx[:, None] * right0
            down = dot10 + lx[:, None] * right1 - upper
            here = sample == s
            by_weight = tl.where(here, tl.sum(upper + ly[:, None] * down, 1)[:, None], by_weight)
            grad_x = tl.sum(right0 + ly[:, None] * (right1 - right0), 1)
            grad_y = tl.sum(down, 1)
            if PLACE == "classic":
                grad_x *= w
                grad_y *= h
            by_x = tl.where(here, grad_x[:, None], by_x)
            by_y = tl.where(here, grad_y[:, None], by_y)
            if ATOMIC:
                to = grad_value_ptr + (cell * (A * D))[:, None, None] + d
                to_below = to + w * (A * D)
                lower = weight * ly
                upper_weight = weight - lower
                upper_right = upper_weight * lx
                lower_right = lower * lx
                tl.atomic_add(to, (upper_weight - upper_right)[:, None, None] * g, mask=in00, sem="relaxed")
                tl.atomic_add(to + A * D, upper_right[:, None, None] * g, mask=in01, sem="relaxed")
                tl.atomic_add(to_below, (lower - lower_right)[:, None, None] * g, mask=in10, sem="relaxed")
                tl.atomic_add(to_below + A * D, lower_right[:, None, None] * g, mask=in11, sem="relaxed")
            else:
                first = _keys(level, h0, w0, h1, w1, h2, w2, h3, w3)
                place = (b * A + a) * keys + first + (y0 + 1) * (w + 1) + x0 + 1
                used = (in_x0 | in_x1) & (in_y0 | in_y1)
                key = tl.where(here, tl.where(used, place, nowhere)[:, None], key)
                fraction_x = tl.where(here, lx[:, None], fraction_x)
                fraction_y = tl.where(here, ly[:, None], fraction_y)
    grad_logit = by_weight
    if PLACE != "classic":
        grad_logit = attention * (by_weight - tl.sum(attention * by_weight, 1)[:, None])
    one = index[:, None] * (L * P) + sample
    real = inside[:, None] & (sample < L * P)
    number = tl.arange(0, 2 * PADDED)[None, :]
    two = index[:, None] * (2 * L * P) + number
    both_real = inside[:, None] & (number < 2 * L * P)
    grad_offset = tl.reshape(tl.join(attention * by_x, attention * by_y), [BLOCK, 2 * PADDED])
    tl.store(grad_logit_ptr + one, grad_logit.to(grad_logit_ptr.dtype.element_ty), mask=real)
    tl.store(grad_offset_ptr + two, grad_offset.to(grad_offset_ptr.dtype.element_ty), mask=both_real)
    if not ATOMIC:
        fraction = tl.reshape(tl.join(fraction_x, fraction_y), [BLOCK, 2 * PADDED])
        tl.store(key_ptr + one, key.to(key_ptr.dtype.element_ty), mask=real)
        tl.store(fraction_ptr + two, fraction, mask=both_real)
        tl.store(attention_ptr + one, attention, mask=real)


@triton.jit(do_not_specialize=["S", *_SIZES])
def _gather(
    grad_ptr,  # [B, Q, A, D], gradient of the output
    order_ptr,  # samples sorted by key, int64
    bound_ptr,  # [B*A*keys + 1] int64: how many samples have a smaller key
    fraction_ptr,  # [B, Q, A, L, P, 2] float32
    attention_ptr,  # [B, Q, A, L, P] float32
    grad_value_ptr,  # [B, S, A, D]
    S, h0, w0, h1, w1, h2, w2, h3, w3,
    A: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one cell and head: the samples between this cell and its neighbours, in a fixed order."""
    pid = tl.program_id(0)
    a = pid % A
    cell = pid // A % S
    b = (pid // A // S).to(tl.int64)
    keys = _keys(L, h0, w0, h1, w1, h2, w2, h3, w3)
    width = w0
    key = 0
    for level in tl.static_range(L):
        h, w, start = _level(level, h0, w0, h1, w1, h2, w2, h3, w3)
        first = _keys(level, h0, w0, h1, w1, h2, w2, h3, w3)
        y = (cell - start) // w
        width = tl.where(cell >= start, w, width)
        key = tl.where(cell >= start, first + y * (w + 1) + cell - start - y * w, key)
    bound_ptr += (b * A + a) * keys + key
    d = tl.arange(0, D)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for below in tl.static_range(2):  # samples whose upper row is the one above, then those of this row
        begin = tl.load(bound_ptr + below * (width + 1))
        middle = tl.load(bound_ptr + below * (width + 1) + 1)
        end = tl.load(bound_ptr + below * (width + 1) + 2)
        for i in tl.range(begin, end, BLOCK):
            n = i + tl.arange(0, BLOCK)
            sample = tl.load(order_ptr + n, mask=n < end, other=0)
            lx = tl.load(fraction_ptr + 2 * sample, mask=n < end, other=0.0)
            ly = tl.load(fraction_ptr + 2 * sample + 1, mask=n < end, other=0.0)
            weight = tl.load(attention_ptr + sample, mask=n < end, other=0.0)
            weight *= tl.where(n < middle, lx, 1.0 - lx)  # left cell is the one before, or this one
            weight *= 1.0 - ly if below else ly
            g = tl.load(
                grad_ptr + (sample // (L * P) * D)[:, None] + d[None, :], mask=(n < end)[:, None], other=0.0
            )
            acc += weight[:, None] * g.to(tl.float32)
    grad_value_ptr += ((b * S + cell) * A + a) * D
    tl.store(grad_value_ptr + d, tl.sum(acc, 0).to(grad_value_ptr.dtype.element_ty))


@triton.jit
def _level(level: tl.constexpr, h0, w0, h1, w1, h2, w2, h3, w3):
    """Height, width and first cell of a level."""
    h, w, start = h0, w0, 0
    if level == 1:
        h, w, start = h1, w1, h0 * w0
    if level == 2:
        h, w, start = h2, w2, h0 * w0 + h1 * w1
    if level == 3:
        h, w, start = h3, w3, h0 * w0 + h1 * w1 + h2 * w2
    return h, w, start


@triton.jit
def _cell_centre(q, L: tl.constexpr, h0, w0, h1, w1, h2, w2, h3, w3):
    """Centre (x, y) in 0..1 of cell q."""
    x = tl.zeros_like(q).to(tl.float32)
    y = x
    for level in tl.static_range(L):
        h, w, start = _level(level, h0, w0, h1, w1, h2, w2, h3, w3)
        cell = q - start
        row = cell // w
        x = tl.where(cell >= 0, (cell - row * w + 0.5) / w, x)
        y = tl.where(cell >= 0, (row + 0.5) / h, y)
    return x, y


@triton.jit
def _halves(word, dtype: tl.constexpr):
    """The two 16-bit numbers in a 32-bit word, in float32."""
    if dtype == tl.bfloat16:
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _pair(ptr, n: tl.constexpr, PAIRED: tl.constexpr):
    """Numbers 2n and 2n + 1 of each row, in float32."""
    if PAIRED:
        low, high = _halves(tl.load(ptr.to(tl.pointer_type(tl.int32)) + n), ptr.dtype.element_ty)
    else:
        low = tl.load(ptr + 2 * n).to(tl.float32)
        high = tl.load(ptr + 2 * n + 1).to(tl.float32)
    return low, high


@triton.jit
def _number(ptr, n: tl.constexpr, PAIRED: tl.constexpr):
    """Number n of each row, in float32."""
    if PAIRED:
        low, high = _pair(ptr, n // 2, PAIRED)
        x = low if n % 2 == 0 else high
    else:
        x = tl.load(ptr + n).to(tl.float32)
    return x


@triton.jit
def _add(acc, acc_2, weight, ptr, inside, HALF: tl.constexpr, dtype: tl.constexpr):
    """Adds rows, as two tensors: even and odd channels of 16 bits, else the first and the second half."""
    if dtype == tl.float32:
        x = tl.load(ptr, mask=inside[:, None], other=0.0)
        x_2 = tl.load(ptr + HALF, mask=inside[:, None], other=0.0)
    else:
        x, x_2 = _halves(tl.load(ptr, mask=inside[:, None], other=0), dtype)
    return acc + weight[:, None] * x, acc_2 + weight[:, None] * x_2


@triton.jit
def _split(x, size):
    """Cell left of x, fraction towards the next, whether either is inside; NaN and infinity are outside."""
    x = tl.minimum(tl.maximum(x, -2.0), size * 1.0)
    low = tl.floor(x)
    cell = low.to(tl.int32)
    at_low = cell.to(tl.uint32, bitcast=True) < size
    at_high = (cell + 1).to(tl.uint32, bitcast=True) < size
    return cell, x - low, at_low, at_high


@triton.jit
def _keys(level: tl.constexpr, h0, w0, h1, w1, h2, w2, h3, w3):
    """First key of a level, or their number: a sample has its upper left cell from (-1, -1) to (h-1, w-1)."""
    first = 0
    for i in tl.static_range(level):
        h, w, _ = _level(i, h0, w0, h1, w1, h2, w2, h3, w3)
        first += (h + 1) * (w + 1)
    return first


def forward_variant(
    dtype: torch.dtype, A: int = 8, D: int = 32, L: int = 3, P: int = 4, place: str = "ref"
) -> Variant:
    """The forward kernel for contiguous inputs of one dtype (`ref` is float32), compiled ahead of time."""
    kind = TRITON_TYPE[dtype]
    types = dict.fromkeys(("value_ptr", "offset_ptr", "logit_ptr", "out_ptr"), f"*{kind}")
    types |= {"ref_ptr": "*fp32", **dict.fromkeys(("Q", *_SIZES, "value_b", *_STRIDES), "i32")}
    half = dtype != torch.float32
    constants = {
        "VALUE_S": A * D, "A": A, "D": D, "L": L, "P": P, "PLACE": place, "PAIR_OFFSET": half,
        "PAIR_LOGIT": half and L * P % 2 == 0, "BLOCK": FORWARD_THREADS * 8 // D,
    }  # fmt: skip
    return Variant(
        f"ms_deform_attn {kind} D={D} {L}x{P} {place}", _forward, types, constants,
        num_warps=FORWARD_THREADS // 32, aligned=("value_b",), expect={"LDG.128": L * P * (4 if half else 8)},
    )  # fmt: skip
