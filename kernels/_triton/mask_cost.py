"""Sums of the matching cost: a program takes BLOCK_M queries, BLOCK_G targets and a span of the points.

Logits of BLOCK_R points at a time live in registers; of them remain the products of logits and of
probabilities with the targets, and two sums a query. Spans are as many as fill the GPU; their sums are
written apart and added by PyTorch, so that nothing is atomic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, cdiv, programs, traced

BLOCK_G = 16  # the least that a product takes; more targets take further programs, each with the logits


class Config(NamedTuple):
    block_m: int  # this and block_r: at most _BLOCK of kernels/mask_cost.py
    block_r: int
    block_c: int
    num_warps: int
    num_stages: int


HALF = Config(64, 64, 32, 4, 3)
FULL = Config(64, 32, 16, 4, 2)


def sums(embedding: Tensor, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """embedding [M, C], features [R, C], targets [G, R] -> softplus, x * t, p, p * t: [M, 1 or G] float32."""
    M, C = embedding.shape
    G, R = targets.shape
    targets = targets.float()
    half = embedding.dtype == features.dtype != torch.float32
    config = HALF if half else FULL
    tiles = cdiv(M, config.block_m)
    blocks = cdiv(R, config.block_r)
    wanted = max(1, min(blocks, programs(embedding.device) // max(1, tiles)))
    span = cdiv(blocks, wanted) * config.block_r
    spans = cdiv(R, span)
    parts = embedding.new_empty(spans, 2, M, G + 1, dtype=torch.float32)
    if M * G:
        traced(_sums)[(tiles * spans, cdiv(G, BLOCK_G))](
            embedding, features, targets, parts, M, C, R, G, span,
            *embedding.stride(), *features.stride(), *targets.stride(),
            HALF=half, UPCAST=INTERPRETED or not half, BLOCK_M=config.block_m, BLOCK_R=config.block_r,
            BLOCK_G=BLOCK_G, BLOCK_C=config.block_c, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    logit, prob = parts.sum(0).unbind(0)  # [M, G + 1]
    return logit[:, G:], logit[:, :G], prob[:, G:], prob[:, :G]


@triton.jit
def _sums(
    embedding_ptr,  # [M, C]
    features_ptr,  # [R, C]
    targets_ptr,  # [G, R] float32
    out_ptr,  # [spans, 2, M, G + 1]: sums of x * t and softplus(x), and of p * t and p
    M, C, R, G, span,
    embedding_m, embedding_c, features_r, features_c, targets_g, targets_r,  # strides
    HALF: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, BLOCK_M)
    part = tl.program_id(0) // tiles
    first_m = tl.program_id(0) % tiles * BLOCK_M
    first_g = tl.program_id(1) * BLOCK_G
    i, j, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_G)
    m, g = first_m + i, first_g + k
    first_r = (part * span).to(tl.int64)  # 64 bits up to a block, 32 within
    embedding_ptr += first_m.to(tl.int64) * embedding_m
    features_ptr += first_r * features_r
    targets_ptr += first_g.to(tl.int64) * targets_g + first_r * targets_r
    softplus = tl.zeros([BLOCK_M], tl.float32)
    area = tl.zeros([BLOCK_M], tl.float32)
    overlap = tl.zeros([BLOCK_M, BLOCK_G], tl.float32)
    intersection = tl.zeros([BLOCK_M, BLOCK_G], tl.float32)
    for start in tl.range(part * span, tl.minimum(part * span + span, R), BLOCK_R):
        exists = start + j < R
        logit = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for first in tl.range(0, C, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            x = tl.load(
                embedding_ptr + i[:, None] * embedding_m + c[None, :] * embedding_c,
                mask=(m < M)[:, None] & (c < C)[None, :], other=0.0,
            )  # [BLOCK_M, BLOCK_C]  # fmt: skip
            y = tl.load(
                features_ptr + j[None, :] * features_r + c[:, None] * features_c,
                mask=exists[None, :] & (c < C)[:, None], other=0.0,
            )  # [BLOCK_C, BLOCK_R]  # fmt: skip
            if UPCAST:  # the interpreter keeps bfloat16 as raw bits and cannot multiply it
                x, y = x.to(tl.float32), y.to(tl.float32)
            logit = tl.dot(x, y, logit, input_precision="tf32x3")
        target = tl.load(
            targets_ptr + k[None, :] * targets_g + j[:, None] * targets_r,
            mask=(g < G)[None, :] & exists[:, None], other=0.0,
        )  # [BLOCK_R, BLOCK_G]  # fmt: skip
        if HALF:  # rounded once, before it enters both sums of the cross-entropy
            finite = tl.clamp(logit, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
            logit = finite.to(tl.float16).to(tl.float32)
        small = tl.exp(-tl.abs(logit))
        prob = tl.where(logit >= 0.0, 1.0, small) / (1.0 + small)
        positive = tl.maximum(logit, 0.0) + tl.log(1.0 + small)
        softplus += tl.sum(tl.where(exists[None, :], positive, 0.0), 1)
        area += tl.sum(tl.where(exists[None, :], prob, 0.0), 1)
        x, p = logit, prob
        if HALF:
            x, p, target = logit.to(tl.float16), prob.to(tl.float16), target.to(tl.float16)
        features_ptr += BLOCK_R * features_r
        targets_ptr += BLOCK_R * targets_r
        overlap = tl.dot(x, target, overlap, input_precision="tf32x3")
        intersection = tl.dot(p, target, intersection, input_precision="tf32x3")
    row = part.to(tl.int64) * 2 * M + m  # of the first of the two
    row_ptr = out_ptr + row * (G + 1)
    half = tl.cast(M, tl.int64) * (G + 1)  # M = 1 is a constant of the compiler, which has no .to
    inside = (m < M)[:, None] & (g < G)[None, :]
    tl.store(row_ptr[:, None] + g[None, :], overlap, mask=inside)
    tl.store(row_ptr[:, None] + half + g[None, :], intersection, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(row_ptr + G, softplus, mask=m < M)
        tl.store(row_ptr + half + G, area, mask=m < M)
