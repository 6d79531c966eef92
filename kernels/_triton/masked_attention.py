"""Masked attention in the way of FlashAttention-2 (Dao 2023), with the keys split over programs.

Forward: a program takes BLOCK_Q queries of one head and a span of keys, and where there are several spans
a second kernel merges their results by their log-sum-exp. Backward: one kernel for dq, spans as before, whose
parts PyTorch sums, and one for dk and dv, a program per BLOCK_N keys, which reads all queries. A word of the
mask is read per query and 32 keys. Nothing is added atomically: results are deterministic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operator import parts
from .launch import INTERPRETED, MOST_PROGRAMS, cdiv, is_aligned, programs, traced

BLOCK_R = 16
LOG2E = tl.constexpr(1.4426950408889634)


class Config(NamedTuple):
    block_q: int
    block_n: int
    num_warps: int
    num_stages: int
    precision: str = "ieee"  # of float32 products; "tf32x3" is about as exact, on tensor cores

    def arguments(self) -> dict[str, Any]:
        blocks = {"PRECISION": self.precision, "BLOCK_Q": self.block_q, "BLOCK_N": self.block_n}
        return {**blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


# for up to 32 channels a head and for 64; none spills registers with Triton 3.6 or 3.9 on any architecture
HALF = {"forward": Config(64, 64, 4, 2), "grad_q": Config(64, 32, 4, 3), "grad_kv": Config(32, 64, 4, 2)}
HALF_64 = HALF | {"forward": Config(64, 64, 4, 3)}
FULL = {
    "forward": Config(64, 32, 8, 2, "tf32x3"),
    "grad_q": Config(32, 32, 8, 1),
    "grad_kv": Config(16, 64, 8, 1),
}
FULL_64 = FULL | {"forward": Config(64, 32, 8, 2)}


def forward(q: Tensor, k: Tensor, v: Tensor, bits: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """-> out [B, A, Q, D] like q, a view of [B, Q, A, D]; log-sum-exp of the logits [B, A, Q] float32."""
    B, A, Q, _ = q.shape
    out = _empty(q)
    lse = q.new_empty(B, A, Q, dtype=torch.float32)
    if B * A * Q == 0:
        return out, lse
    words, seen = _words(bits), seen.contiguous().view(torch.uint8)
    for entries in parts(MOST_PROGRAMS, *(_rows(x) for x in (q, k, v)), words, seen, out, lse):
        _forward_entries(*entries)
    return out, lse


def _forward_entries(
    q: Tensor, k: Tensor, v: Tensor, words: Tensor, seen: Tensor, out: Tensor, lse: Tensor
) -> None:
    B, A, Q, D = q.shape
    N = k.shape[2]
    upcast, config = _config("forward", q, k, v)
    span, splits = _spans(B * A * cdiv(Q, config.block_q), N, config.block_n, q.device)
    part, part_lse = out[None], lse
    if splits > 1:
        part = q.new_empty(splits, B, A, Q, D, dtype=torch.float32)
        part_lse = q.new_empty(splits, B, A, Q, dtype=torch.float32)
    traced(_forward)[(cdiv(Q, config.block_q) * splits, A, B)](
        q, k, v, words, seen, part, part_lse, Q, N, span,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *part.stride()[:4],
        D=D, UPCAST=upcast, **config.arguments(),
    )  # fmt: skip
    if splits > 1:
        traced(_merge)[(cdiv(B * A * Q, BLOCK_R),)](
            part, part_lse, out, lse, splits, B * A * Q, A, Q, *out.stride()[:3], D=D, BLOCK_R=BLOCK_R
        )


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bits: Tensor, seen: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of out, and out and lse of the forward."""
    B, A, Q, D = q.shape
    N = k.shape[2]
    grad_q, grad_k, grad_v = (_empty(x) for x in (q, k, v))
    if B * A * (Q + N) == 0:
        return grad_q, grad_k, grad_v
    delta = (grad.float() * out).sum(-1).contiguous()  # [B, A, Q]: <grad, out>, the softmax's mean of dp
    words, seen = _words(bits), seen.contiguous().view(torch.uint8)
    tensors = (*(_rows(x) for x in (grad, q, k, v)), words, seen, lse.contiguous(), delta)
    for entries in parts(MOST_PROGRAMS, *tensors, grad_q, grad_k, grad_v):
        _backward_entries(*entries)
    return grad_q, grad_k, grad_v


def _backward_entries(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor,
    seen: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    B, A, Q, D = q.shape
    N = k.shape[2]
    shared = (
        q, k, v, grad, words, seen, lse, delta, Q, N,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3],
    )  # fmt: skip
    if Q:
        upcast, config = _config("grad_q", grad, q, k, v)
        span, splits = _spans(B * A * cdiv(Q, config.block_q), N, config.block_n, q.device)
        part = grad_q[None] if splits == 1 else q.new_empty(splits, B, A, Q, D, dtype=torch.float32)
        _grad_q[(cdiv(Q, config.block_q) * splits, A, B)](
            *shared, part, span, *part.stride()[:4],
            D=D, UPCAST=upcast, **config.arguments(),
        )  # fmt: skip
        if splits > 1:
            grad_q.copy_(part.sum(0))
    if N:
        upcast, config = _config("grad_kv", grad, q, k, v)
        _grad_kv[(cdiv(N, config.block_n), A, B)](
            *shared, grad_k, grad_v, *grad_k.stride()[:3], *grad_v.stride()[:3],
            D=D, UPCAST=upcast, **config.arguments(),
        )  # fmt: skip


def _empty(x: Tensor) -> Tensor:
    """[B, A, n, D] as a view of [B, n, A, D], as projections around attention have it."""
    B, A, n, D = x.shape
    return x.new_empty(B, n, A, D).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """x [B, A, n, D] if its rows are contiguous and within reach of 32 bits in a head, else a copy."""
    return x if x.stride(-1) == 1 and x.shape[2] * x.stride(2) < 2**31 else x.contiguous()


def _words(bits: Tensor) -> Tensor:
    """bits [B, Q, bytes] -> int32 [B, Q, words]."""
    if bits.numel() == 0:
        return bits.new_empty(*bits.shape[:2], 0, dtype=torch.int32)
    bits = bits.contiguous()
    return (bits if is_aligned(bits, 4) else bits.clone()).view(torch.int32)


def _config(kernel: str, *tensors: Tensor) -> tuple[bool, Config]:
    """Whether to convert to float32 after loading (mixed dtypes; the interpreter), and the blocks."""
    dtype, D = tensors[0].dtype, tensors[0].shape[-1]
    mixed = any(x.dtype != dtype for x in tensors)
    return INTERPRETED or mixed, _blocks(kernel, torch.float32 if mixed else dtype, D)


def _blocks(kernel: str, dtype: torch.dtype, D: int) -> Config:
    narrow, wide = (FULL, FULL_64) if dtype == torch.float32 else (HALF, HALF_64)
    return (narrow if D <= 32 else wide)[kernel]


def _spans(tiles_q: int, N: int, block_n: int, device: torch.device) -> tuple[int, int]:
    """Keys in a span, a multiple of block_n, and how many spans."""
    tiles = cdiv(N, block_n)
    span = max(cdiv(tiles, max(programs(device) // tiles_q, 1)), 1) * block_n
    return span, max(cdiv(N, span), 1)


@triton.jit
def _load(ptr, row, stride, inside, D: tl.constexpr, UPCAST: tl.constexpr):
    """Rows [rows, D] of a matrix; zeros where not inside."""
    x = tl.load(ptr + row[:, None] * stride + tl.arange(0, D)[None, :], mask=inside[:, None], other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _real(word, N):
    """Bits of word number `word` that stand for keys."""
    left = tl.maximum(N - 32 * word, 0)
    return tl.where(left < 32, (1 << tl.minimum(left, 31)) - 1, -1)


@triton.jit
def _visible(words_ptr, free, inside, start, N, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether queries (rows of words_ptr) see keys from start on, [BLOCK_Q, BLOCK_N]."""
    w = start // 32 + tl.arange(0, BLOCK_N // 32)
    word = tl.load(words_ptr[:, None] + w[None, :], mask=inside[:, None] & (32 * w < N)[None, :], other=0)
    word = tl.where(free[:, None], -1, word) & _real(w, N)[None, :]
    # A thread holds columns 8 i + 2 lane + {0, 1} of a product: one shift by what depends on the lane, then
    # tests of constant bits, which is one instruction a key; (word >> bit) & 1 would take two.
    bit = tl.arange(0, 32)
    one = (word[:, :, None] >> (bit & 6)[None, None, :]) & (1 << (bit & 25))[None, None, :]
    return tl.reshape(one, [BLOCK_Q, BLOCK_N]) != 0


@triton.jit
def _forward(
    q_ptr,  # [B, A, Q, D]
    k_ptr,  # [B, A, N, D]
    v_ptr,  # [B, A, N, D]
    words_ptr,  # [B, Q, ceil(N / 32)] int32
    seen_ptr,  # [B, Q] uint8
    out_ptr,  # [S, B, A, Q, D]
    lse_ptr,  # [S, B, A, Q]
    Q, N, span,
    q_b, q_a, q_q, k_b, k_a, k_n, v_b, v_a, v_n, out_s, out_b, out_a, out_q,  # strides
    D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(Q, BLOCK_Q)  # tiles of the same keys run at the same time and find them in the cache
    s = (tl.program_id(0) // tiles).to(tl.int64)
    a = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    q = tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = q < Q
    x = _load(q_ptr + b * q_b + a * q_a, q, q_q, inside, D, UPCAST)  # [BLOCK_Q, D]
    free = tl.load(seen_ptr + b * Q + q, mask=inside, other=1) == 0
    words_ptr += (b * Q + q) * tl.cdiv(N, 32)
    k_ptr += b * k_b + a * k_a
    v_ptr += b * v_b + a * v_a
    scale: tl.constexpr = D**-0.5
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    n = tl.arange(0, BLOCK_N)
    first = s.to(tl.int32) * span
    for start in tl.range(first, tl.minimum(first + span, N), BLOCK_N):
        exists = start + n < N
        key = _load(k_ptr + tl.cast(start, tl.int64) * k_n, n, k_n, exists, D, UPCAST)  # [BLOCK_N, D]
        value = _load(v_ptr + tl.cast(start, tl.int64) * v_n, n, v_n, exists, D, UPCAST)
        visible = _visible(words_ptr, free, inside, start, N, BLOCK_Q, BLOCK_N)
        logit = tl.dot(x, tl.trans(key), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_N], times sqrt(D)
        logit = tl.where(visible, logit, float("-inf"))
        new_top = tl.maximum(top, tl.max(logit, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top * (scale * LOG2E))
        decay = tl.exp2(top * (scale * LOG2E) - shift)
        p = tl.exp2(logit * (scale * LOG2E) - shift[:, None])
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(value.dtype), value, acc * decay[:, None], input_precision=PRECISION)
        top = new_top
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    out = acc / total[:, None]
    out_ptr += s * out_s + b * out_b + a * out_a
    tl.store(out_ptr + q[:, None] * out_q + tl.arange(0, D)[None, :], out, mask=inside[:, None])
    lse = tl.where(nothing, float("-inf"), top * scale + tl.log(total))
    tl.store(lse_ptr + ((s * tl.num_programs(2) + b) * tl.num_programs(1) + a) * Q + q, lse, mask=inside)


@triton.jit
def _merge(
    part_ptr,  # [S, R, D]
    part_lse_ptr,  # [S, R]
    out_ptr,  # [B, A, Q, D], R = B * A * Q
    lse_ptr,  # [R]
    S, R, A, Q,
    out_b, out_a, out_q,  # strides
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, D)
    inside = r < R
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for s in tl.range(0, S):
        top = tl.maximum(top, tl.load(part_lse_ptr + tl.cast(s, tl.int64) * R + r, mask=inside, other=0.0))
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, D], tl.float32)
    for s in tl.range(0, S):
        row = tl.cast(s, tl.int64) * R + r
        weight = tl.exp(tl.load(part_lse_ptr + row, mask=inside, other=0.0) - shift)
        part = tl.load(part_ptr + row[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        total += weight
        acc += weight[:, None] * part
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    out = acc / total[:, None]
    out_ptr += r // Q // A * out_b + r // Q % A * out_a + r % Q * out_q
    tl.store(out_ptr[:, None] + d[None, :], out, mask=inside[:, None])
    tl.store(lse_ptr + r, tl.where(nothing, float("-inf"), top + tl.log(total)), mask=inside)


@triton.jit
def _grad_q(
    q_ptr, k_ptr, v_ptr, grad_ptr, words_ptr, seen_ptr,  # as in the forward; the gradient of out
    lse_ptr,  # [B, A, Q]
    delta_ptr,  # [B, A, Q], <grad, out>
    Q, N,
    q_b, q_a, q_q, k_b, k_a, k_n, v_b, v_a, v_n, grad_b, grad_a, grad_q,  # strides
    out_ptr,  # [S, B, A, Q, D]
    span,
    out_s, out_b, out_a, out_q,
    D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(Q, BLOCK_Q)
    s = (tl.program_id(0) // tiles).to(tl.int64)
    a = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    q = tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = q < Q
    x = _load(q_ptr + b * q_b + a * q_a, q, q_q, inside, D, UPCAST)  # [BLOCK_Q, D]
    grad = _load(grad_ptr + b * grad_b + a * grad_a, q, grad_q, inside, D, UPCAST)
    row = (b * tl.num_programs(1) + a) * Q + q
    lse = tl.load(lse_ptr + row, mask=inside, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
    free = tl.load(seen_ptr + b * Q + q, mask=inside, other=1) == 0
    words_ptr += (b * Q + q) * tl.cdiv(N, 32)
    k_ptr += b * k_b + a * k_a
    v_ptr += b * v_b + a * v_a
    scale: tl.constexpr = D**-0.5
    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    n = tl.arange(0, BLOCK_N)
    first = s.to(tl.int32) * span
    for start in tl.range(first, tl.minimum(first + span, N), BLOCK_N):
        exists = start + n < N
        key = _load(k_ptr + tl.cast(start, tl.int64) * k_n, n, k_n, exists, D, UPCAST)  # [BLOCK_N, D]
        value = _load(v_ptr + tl.cast(start, tl.int64) * v_n, n, v_n, exists, D, UPCAST)
        visible = _visible(words_ptr, free, inside, start, N, BLOCK_Q, BLOCK_N)
        logit = tl.dot(x, tl.trans(key), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_N], times sqrt(D)
        p = tl.exp2(tl.where(visible, logit * (scale * LOG2E) - lse[:, None], float("-inf")))
        dp = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(key.dtype), key, acc, input_precision=PRECISION)
    out_ptr += s * out_s + b * out_b + a * out_a
    tl.store(out_ptr + q[:, None] * out_q + tl.arange(0, D)[None, :], acc * scale, mask=inside[:, None])


@triton.jit
def _grad_kv(
    q_ptr, k_ptr, v_ptr, grad_ptr, words_ptr, seen_ptr, lse_ptr, delta_ptr,  # as above
    Q, N,
    q_b, q_a, q_q, k_b, k_a, k_n, v_b, v_a, v_n, grad_b, grad_a, grad_q,  # strides
    out_k_ptr,  # [B, A, N, D]
    out_v_ptr,  # [B, A, N, D]
    out_k_b, out_k_a, out_k_n, out_v_b, out_v_a, out_v_n,
    D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    a = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = n < N
    key = _load(k_ptr + b * k_b + a * k_a, n, k_n, exists, D, UPCAST)  # [BLOCK_N, D]
    value = _load(v_ptr + b * v_b + a * v_a, n, v_n, exists, D, UPCAST)
    w = tl.program_id(0) * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
    real = _real(w, N)[:, None]
    bit = tl.arange(0, 32)
    q_ptr += b * q_b + a * q_a
    grad_ptr += b * grad_b + a * grad_a
    row_ptr = (b * tl.num_programs(1) + a) * Q
    words_ptr += b * Q * tl.cdiv(N, 32) + w[:, None]
    scale: tl.constexpr = D**-0.5
    acc_k = tl.zeros([BLOCK_N, D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, D], tl.float32)
    for start in tl.range(0, Q, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        inside = q < Q
        x = _load(q_ptr, q, q_q, inside, D, UPCAST)  # [BLOCK_Q, D]
        grad = _load(grad_ptr, q, grad_q, inside, D, UPCAST)
        lse = tl.load(lse_ptr + row_ptr + q, mask=inside, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + row_ptr + q, mask=inside, other=0.0)
        free = tl.load(seen_ptr + b * Q + q, mask=inside, other=1) == 0
        row = q.to(tl.int64)[None, :] * tl.cdiv(N, 32)
        word = tl.load(words_ptr + row, mask=inside[None, :] & (32 * w < N)[:, None], other=0)
        word = tl.where(free[None, :], -1, word) & real  # [BLOCK_N / 32, BLOCK_Q]
        # rows lane + {0, 8} of a product here: see _visible
        one = (word[:, None, :] >> (bit & 23)[None, :, None]) & (1 << (bit & 8))[None, :, None]
        visible = tl.reshape(one, [BLOCK_N, BLOCK_Q]) != 0
        logit = tl.dot(key, tl.trans(x), input_precision=PRECISION)  # [BLOCK_N, BLOCK_Q], times sqrt(D)
        p = tl.exp2(tl.where(visible, logit * (scale * LOG2E) - lse[None, :], float("-inf")))
        acc_v = tl.dot(p.to(grad.dtype), grad, acc_v, input_precision=PRECISION)
        dp = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        acc_k = tl.dot(ds.to(x.dtype), x, acc_k, input_precision=PRECISION)
    d = tl.arange(0, D)
    out_k_ptr += b * out_k_b + a * out_k_a
    out_v_ptr += b * out_v_b + a * out_v_a
    tl.store(out_k_ptr + n[:, None] * out_k_n + d[None, :], acc_k * scale, mask=exists[:, None])
    tl.store(out_v_ptr + n[:, None] * out_v_n + d[None, :], acc_v, mask=exists[:, None])
