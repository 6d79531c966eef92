"""Masks and labels of upsampled logits: one program, of one warp, makes BLOCK_Y x BLOCK_X output pixels.

The rows of a tile come from few input rows (at most 5 for 8 rows at four times the size). Each of these is
interpolated along x, three loads a pixel, and added to all rows of the tile with the weights it has there: a
small dense matrix per tile, most of it not zero. So a pixel costs 15/8 loads instead of nine, no values are
exchanged between threads, and all sums are float32 in registers. Masks are written as one byte or one bit a
pixel; labels keep the best value and its map in registers while the program goes through the maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..taps import axis_taps
from .launch import MOST_PROGRAMS, cdiv

BLOCK_Y = 8
MASK_BLOCK_X, LABEL_BLOCK_X = 256, 64


def masks(logits: Tensor, network: Sequence[int], size: Sequence[int], packed: bool) -> Tensor:
    """logits [N, T, h, w] -> [N, T, H, W] bool, or [N, T, H, 4 * ceil(W / 32)] uint8."""
    N, T, h, w = logits.shape
    H, W = size
    words = cdiv(W, 32)
    out = torch.empty(
        N * T, H, words if packed else W, dtype=torch.int32 if packed else torch.uint8, device=logits.device
    )
    if N * T == 0:
        return out.view(torch.uint8 if packed else torch.bool).unflatten(0, (N, T))
    first, y_weight = _rows(h, network[0], H, logits.device)
    x_start, x_weight = _columns(w, network[1], W, logits.device)
    maps = _with_whole_rows(logits.reshape(N * T, h, w))
    for part, result in zip(maps.split(MOST_PROGRAMS), out.split(MOST_PROGRAMS), strict=True):
        _mask_upsample[cdiv(W, MASK_BLOCK_X), cdiv(H, BLOCK_Y), len(part)](
            part, result, first, y_weight, x_start, x_weight, h, part.shape[2], H, W, part.stride(0),
            ROWS=y_weight.shape[1], PACKED=packed, BLOCK_Y=BLOCK_Y, BLOCK_X=MASK_BLOCK_X, num_warps=1,
        )  # fmt: skip
    return out.view(torch.uint8 if packed else torch.bool).unflatten(0, (N, T))


def labels(logits: Tensor, network: Sequence[int], size: Sequence[int], background: bool) -> Tensor:
    """logits [K, T, h, w] -> [T, H, W] uint8 or int16."""
    K, T, h, w = logits.shape
    H, W = size
    out = logits.new_empty(T, H, W, dtype=torch.uint8 if K + int(background) <= 256 else torch.int16)
    if K * T == 0:
        return out.zero_()
    first, y_weight = _rows(h, network[0], H, logits.device)
    x_start, x_weight = _columns(w, network[1], W, logits.device)
    maps = _with_whole_rows(logits)
    _label_upsample[cdiv(W, LABEL_BLOCK_X), cdiv(H, BLOCK_Y), T](
        maps, out, first, y_weight, x_start, x_weight, K, h, maps.shape[3], H, W, *maps.stride()[:2],
        ROWS=y_weight.shape[1], BACKGROUND=background, BLOCK_Y=BLOCK_Y, BLOCK_X=LABEL_BLOCK_X, num_warps=1,
    )  # fmt: skip
    return out


def _with_whole_rows(maps: Tensor) -> Tensor:
    """Maps with contiguous rows of at least three columns, so that the taps need no bounds."""
    h, w = maps.shape[-2:]
    if w < 3:
        return F.pad(maps, (0, 3 - w))
    return maps if maps.stride()[-2:] == (w, 1) else maps.contiguous()


# Tables are made on the host, so that any stream may read what another one's call has cached, and kept for
# good, so that a captured CUDA graph may read them: a few kilobytes for each size.
@cache
def _columns(quarter: int, network: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the taps of each column start, int32 [W], and their weights, float32 [3, W]."""
    start, weight = axis_taps(quarter, network, size, torch.device("cpu"))
    return start.to(device), weight.T.contiguous().to(device)


@cache
def _rows(quarter: int, network: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first input row of each tile, int32 [tiles], and weights, float32 [tiles, ROWS, BLOCK_Y]."""
    start, weight = axis_taps(quarter, network, size, torch.device("cpu"))
    first = start[::BLOCK_Y].long()  # [tiles]
    row = (start - first.repeat_interleave(BLOCK_Y)[:size])[:, None] + torch.arange(3)  # [H, 3]
    used = int(row[weight != 0].max()) + 1
    dense = torch.zeros(len(first) * BLOCK_Y, used + 2)
    dense[:size].scatter_(1, row, weight)
    tiles = dense[:, :used].unflatten(0, (-1, BLOCK_Y)).transpose(1, 2)  # [tiles, ROWS, BLOCK_Y]
    return first.int().to(device), tiles.contiguous().to(device)


@triton.jit
def _mask_upsample(
    logits_ptr,  # [M, h, w]
    masks_ptr,  # [M, H, W] uint8, or packed [M, H, ceil(W / 32)] int32
    first_ptr,  # [tiles] int32
    y_weight_ptr,  # [tiles, ROWS, BLOCK_Y] float32
    x_start_ptr,  # [W] int32
    x_weight_ptr,  # [3, W] float32
    h, w, H, W,
    logits_m,  # stride
    ROWS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(2).to(tl.int64)
    y = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    column, w0, w1, w2 = _load_columns(x_start_ptr, x_weight_ptr, x, W)
    first = tl.load(first_ptr + tl.program_id(1))
    y_weight_ptr += tl.program_id(1) * (ROWS * BLOCK_Y)
    value = _tile(logits_ptr + m * logits_m, h, w, first, y_weight_ptr, column, w0, w1, w2, ROWS, BLOCK_Y)
    if PACKED:
        bit = tl.where(x < W, 1 << (x % 32), 0)
        bits = tl.reshape(tl.where(value > 0.0, bit[None, :], 0), [BLOCK_Y, BLOCK_X // 32, 32])
        i = tl.program_id(0) * (BLOCK_X // 32) + tl.arange(0, BLOCK_X // 32)
        words = tl.cdiv(W, 32)
        inside = (y < H)[:, None] & (i < words)[None, :]
        tl.store(masks_ptr + m * H * words + y[:, None] * words + i[None, :], tl.sum(bits, 2), mask=inside)
    else:
        inside = (y < H)[:, None] & (x < W)[None, :]
        pixel = y[:, None] * W + x[None, :]
        tl.store(masks_ptr + m * H * W + pixel, (value > 0.0).to(tl.uint8), mask=inside)


@triton.jit
def _label_upsample(
    logits_ptr,  # [K, T, h, w]
    labels_ptr,  # [T, H, W] uint8 or int16
    first_ptr, y_weight_ptr, x_start_ptr, x_weight_ptr,  # as above
    K, h, w, H, W,
    logits_k, logits_t,  # strides
    ROWS: tl.constexpr,
    BACKGROUND: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(2).to(tl.int64)
    y = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    column, w0, w1, w2 = _load_columns(x_start_ptr, x_weight_ptr, x, W)
    first = tl.load(first_ptr + tl.program_id(1))
    y_weight_ptr += tl.program_id(1) * (ROWS * BLOCK_Y)
    logits_ptr += t * logits_t
    best = tl.full([BLOCK_Y, BLOCK_X], 0.0 if BACKGROUND else float("-inf"), tl.float32)
    label = tl.zeros([BLOCK_Y, BLOCK_X], tl.int32)
    for k in tl.range(0, K):
        value = _tile(logits_ptr, h, w, first, y_weight_ptr, column, w0, w1, w2, ROWS, BLOCK_Y)
        better = value > best  # the first of equals stays, and NaN is never better
        best = tl.where(better, value, best)
        label = tl.where(better, k + BACKGROUND, label)
        logits_ptr += logits_k
    inside = (y < H)[:, None] & (x < W)[None, :]
    pixel = y[:, None] * W + x[None, :]
    tl.store(labels_ptr + t * H * W + pixel, label.to(labels_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_columns(start_ptr, weight_ptr, x, W):
    """Start and three weights of the columns x, each [1, BLOCK_X]: 2-d, so that a tile needs no exchange."""
    x = x[None, :]
    column = tl.load(start_ptr + x, mask=x < W, other=0)
    w0 = tl.load(weight_ptr + x, mask=x < W, other=0.0)
    w1 = tl.load(weight_ptr + W + x, mask=x < W, other=0.0)
    w2 = tl.load(weight_ptr + 2 * W + x, mask=x < W, other=0.0)
    return column, w0, w1, w2


@triton.jit
def _tile(map_ptr, h, w, first, y_weight_ptr, column, w0, w1, w2, ROWS: tl.constexpr, BLOCK_Y: tl.constexpr):
    """The upsampled values of a tile, float32 [BLOCK_Y, BLOCK_X]."""
    value = tl.zeros([BLOCK_Y, column.shape[1]], tl.float32)
    for r in tl.range(0, ROWS, loop_unroll_factor=4):
        tap_ptr = map_ptr + tl.minimum(first + r, h - 1) * w + column
        line = w0 * tl.load(tap_ptr).to(tl.float32)
        line += w1 * tl.load(tap_ptr + 1).to(tl.float32)
        line += w2 * tl.load(tap_ptr + 2).to(tl.float32)  # [1, BLOCK_X]
        weight = tl.load(y_weight_ptr + r * BLOCK_Y + tl.arange(0, BLOCK_Y)[:, None])  # [BLOCK_Y, 1]
        value += weight * line
    return value
