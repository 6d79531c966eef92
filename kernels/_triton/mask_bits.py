"""Mask bits: one program multiplies BLOCK_Q queries with BLOCK_N keys and stores the signs, 32 a word.

Reads the features once per BLOCK_Q queries, writes N / 8 bytes a query. No atomics: whether a query sees
anything is a byte that programs only ever set.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operator import parts
from .launch import INTERPRETED, MOST_PROGRAMS, cdiv, traced


class Config(NamedTuple):
    block_q: int
    block_n: int
    block_c: int
    num_warps: int
    num_stages: int
    precision: str = "ieee"  # of float32 products; "tf32x3" is about as exact, on tensor cores


HALF = Config(64, 128, 64, 4, 3)
FULL = Config(64, 64, 32, 4, 3, "tf32x3")


def forward(query: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """query [B, Q, C], features [B, C, N] -> bits [B, Q, 4 * ceil(N / 32)] uint8, seen [B, Q] bool."""
    B, Q, C = query.shape
    N = features.shape[2]
    words = query.new_empty(B, Q, cdiv(N, 32), dtype=torch.int32)
    seen = query.new_zeros(B, Q, dtype=torch.uint8)
    mixed = query.dtype != features.dtype
    config = FULL if mixed or query.dtype == torch.float32 else HALF
    if Q * query.stride(1) + C * query.stride(2) >= 2**31:  # 32 bits count what lies within an entry of query
        query = query.contiguous()
    if (
        config.block_c * features.stride(1) + config.block_n * features.stride(2) >= 2**31
    ):  # and a block of it
        features = features.contiguous()
    for x, y, *out in parts(MOST_PROGRAMS, query, features, words, seen) if B * Q * N else ():
        traced(_mask_bits)[(cdiv(Q, config.block_q) * cdiv(N, config.block_n), x.shape[0])](
            x, y, *out, Q, N, C, *x.stride(), *y.stride(),
            UPCAST=INTERPRETED or mixed, PRECISION=config.precision,
            BLOCK_Q=config.block_q, BLOCK_N=config.block_n, BLOCK_C=config.block_c,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return words.view(torch.uint8), seen.view(torch.bool)


@triton.jit
def _mask_bits(
    query_ptr,  # [B, Q, C]
    features_ptr,  # [B, C, N]
    words_ptr,  # [B, Q, ceil(N / 32)] int32
    seen_ptr,  # [B, Q] uint8, zeros
    Q, N, C,
    query_b, query_q, query_c,  # strides
    features_b, features_c, features_n,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(Q, BLOCK_Q)  # tiles of the same keys run at the same time and find them in the cache
    tile_n = tl.program_id(0) // tiles
    b = tl.program_id(1).to(tl.int64)
    q = tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    i = tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    inside, exists = q < Q, tile_n * BLOCK_N + i < N
    query_ptr += b * query_b
    features_ptr += b * features_b + tile_n.to(tl.int64) * BLOCK_N * features_n
    logit = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
    for start in tl.range(0, C, BLOCK_C):
        used = start + c < C
        x = tl.load(
            query_ptr + start * query_c + q[:, None] * query_q + c[None, :] * query_c,
            mask=inside[:, None] & used[None, :], other=0.0,
        )  # [BLOCK_Q, BLOCK_C]  # fmt: skip
        y = tl.load(
            features_ptr + tl.cast(start, tl.int64) * features_c
            + c[:, None] * features_c + i[None, :] * features_n,
            mask=used[:, None] & exists[None, :], other=0.0,
        )  # [BLOCK_C, BLOCK_N]  # fmt: skip
        if UPCAST:  # the interpreter keeps bfloat16 as raw bits and cannot multiply it
            x, y = x.to(tl.float32), y.to(tl.float32)
        logit = tl.dot(x, y, logit, input_precision=PRECISION)
    visible = ((logit >= 0.0) & exists[None, :]).to(tl.int32)
    bit = tl.arange(0, 32)
    word = tl.sum(tl.reshape(visible, [BLOCK_Q, BLOCK_N // 32, 32]) << bit[None, None, :], 2)
    w = tile_n * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
    num_words = tl.cdiv(N, 32)
    tl.store(
        words_ptr + (b * Q + q)[:, None] * num_words + w[None, :],
        word, mask=inside[:, None] & (w < num_words)[None, :],
    )  # fmt: skip
    # many programs may store this 1, none ever stores anything else
    tl.store(seen_ptr + b * Q + q, 1, mask=inside & (tl.max(visible, 1) != 0))
