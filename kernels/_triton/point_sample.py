"""Point sampling: a program reads BLOCK_R points of one map, BLOCK_C channels each.

Forward: where channels are contiguous a thread owns 16 bytes of them and reads each of the four cells around
a point at once; with one channel, neighbouring threads own neighbouring points. Backward: the same with four
channels a thread, so that atomics become 16-byte reductions on sm_90, into a float32 buffer. Deterministic
backward: points are sorted by the cell they lie in, and each cell of the map collects from those around it;
its sum has a fixed order and is written once, in the dtype of the map.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, traced

NUM_WARPS = 4
THREADS = 32 * NUM_WARPS


def forward(maps: Tensor, points: Tensor, deterministic: bool) -> Tensor:  # of the backward
    """maps [N, C, H, W], points [N or 1, R, 2] float32 -> [N, R, C]."""
    N, C, H, W = maps.shape
    R = points.shape[1]
    if not maps.is_floating_point():
        maps = maps.view(torch.uint8)
    out = maps.new_empty(N, R, C, dtype=maps.dtype if maps.is_floating_point() else torch.float32)
    if out.numel():
        points = points.contiguous()
        block_r, block_c = _tile(C, THREADS * 16 // out.element_size())
        grid = (N * cdiv(R, block_r), cdiv(C, block_c))
        traced(_sample)[grid](
            maps, points, out, R, C, H, W, _step(points), *maps.stride(),
            BLOCK_R=block_r, BLOCK_C=block_c, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


def backward(grad: Tensor, points: Tensor, out: Tensor, deterministic: bool) -> Tensor:
    """grad [N, R, C], points [N or 1, R, 2] -> `out`, filled with the gradient.

    `out` is [N, C, H, W], dense and uninitialised; float32 unless deterministic.
    """
    N, C, H, W = out.shape
    R = points.shape[1]
    if out.numel() == 0 or R == 0:
        return out.zero_()
    grad, points = grad.contiguous(), points.contiguous()
    if deterministic:
        order, first = _sort(points, H, W)
        block_m, block_c = _tile(C, THREADS * 16 // grad.element_size())
        _collect[(N * cdiv(H * W, block_m), cdiv(C, block_c))](
            grad, points, order, first, out, R, C, H, W,
            _step(points), _step(order), _step(first), *out.stride(),
            BLOCK_M=block_m, BLOCK_C=block_c, num_warps=NUM_WARPS,
        )  # fmt: skip
        return out
    out.zero_()
    block_r, block_c = _tile(C, THREADS * 4)
    _scatter[(N * cdiv(R, block_r), cdiv(C, block_c))](
        grad, points, out, R, C, H, W, _step(points), *out.stride(),
        BLOCK_R=block_r, BLOCK_C=block_c, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


def _tile(channels: int, values: int) -> tuple[int, int]:
    """Points (or cells) and channels of a program that owns so many values."""
    block_c = min(256, triton.next_power_of_2(channels))
    return min(2 * THREADS, max(1, values // block_c)), block_c


def _step(x: Tensor) -> int:
    """Values from one map's entry to the next; 0 where all maps share one."""
    return x[0].numel() if x.shape[0] > 1 else 0


def _sort(points: Tensor, H: int, W: int) -> tuple[Tensor, Tensor]:
    """Points ordered by their lower left cell, and where in this order each cell's begin.

    That cell may lie one to the left of a map or above it, hence the padded (H + 1) x (W + 1) grid. Returns
    order [N or 1, R] and first [N or 1, (H + 1) * (W + 1) + 1] int32; points too far outside come last.
    """
    x, y = ((points[..., i] * size - 0.5).floor() for i, size in enumerate((W, H)))  # [N or 1, R]
    near = (x >= -1) & (x < W) & (y >= -1) & (y < H)
    x, y = (torch.where(near, v, -1).to(torch.int32) + 1 for v in (x, y))
    cells = (H + 1) * (W + 1)
    key, order = torch.where(near, y * (W + 1) + x, cells).sort(dim=1, stable=True)
    bounds = torch.arange(cells + 1, device=key.device, dtype=key.dtype).expand(key.shape[0], -1)
    return order.to(torch.int32), torch.searchsorted(key, bounds.contiguous(), out_int32=True)


@triton.jit
def _load_points(points_ptr, r, inside, H, W):
    """Coordinates of points in cells, counted from the centre of the first."""
    x = tl.load(points_ptr + 2 * r, mask=inside, other=0.0)
    y = tl.load(points_ptr + 2 * r + 1, mask=inside, other=0.0)
    return x * W - 0.5, y * H - 0.5


@triton.jit
def _corner(x, y, H, W, DX: tl.constexpr, DY: tl.constexpr):
    """One of the four cells around each point: row, column, weight, and whether it exists."""
    x0, y0 = tl.floor(x), tl.floor(y)
    weight = (x - x0 if DX else 1.0 - (x - x0)) * (y - y0 if DY else 1.0 - (y - y0))
    exists = (x0 >= -DX) & (x0 < W - DX) & (y0 >= -DY) & (y0 < H - DY)  # false for NaN
    return y0.to(tl.int32) + DY, x0.to(tl.int32) + DX, weight, exists


@triton.jit
def _sample(
    maps_ptr,  # [N, C, H, W]
    points_ptr,  # [N or 1, R, 2] float32
    out_ptr,  # [N, R, C]
    R, C, H, W,
    points_n, maps_n, maps_c, maps_h, maps_w,  # strides
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(R, BLOCK_R)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    r = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    maps_ptr += n * maps_n
    x, y = _load_points(points_ptr + n * points_n, r, r < R, H, W)
    out = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for dy in tl.static_range(2):
        for dx in tl.static_range(2):
            row, column, weight, exists = _corner(x, y, H, W, dx, dy)
            cell = row * maps_h + column * maps_w
            value = tl.load(
                maps_ptr + cell[:, None] + c[None, :] * maps_c,
                mask=exists[:, None] & (c < C)[None, :], other=0,
            )  # [BLOCK_R, BLOCK_C]  # fmt: skip
            out += weight[:, None] * value.to(tl.float32)
    out_ptr += n * R * C
    tl.store(out_ptr + r[:, None] * C + c[None, :], out, mask=(r < R)[:, None] & (c < C)[None, :])


@triton.jit
def _scatter(
    grad_ptr,  # [N, R, C]
    points_ptr,  # [N or 1, R, 2] float32
    out_ptr,  # [N, C, H, W] float32, zeros
    R, C, H, W,
    points_n, out_n, out_c, out_h, out_w,  # strides
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(R, BLOCK_R)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    r = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    out_ptr += n * out_n
    x, y = _load_points(points_ptr + n * points_n, r, r < R, H, W)
    inside = (r < R)[:, None] & (c < C)[None, :]
    grad = tl.load(grad_ptr + n * R * C + r[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    for dy in tl.static_range(2):
        for dx in tl.static_range(2):
            row, column, weight, exists = _corner(x, y, H, W, dx, dy)
            cell = row * out_h + column * out_w
            tl.atomic_add(
                out_ptr + cell[:, None] + c[None, :] * out_c, weight[:, None] * grad,
                mask=exists[:, None] & inside, sem="relaxed",
            )  # fmt: skip


@triton.jit
def _collect(
    grad_ptr,  # [N, R, C]
    points_ptr,  # [N or 1, R, 2] float32
    order_ptr,  # [N or 1, R] int32
    first_ptr,  # [N or 1, (H + 1) * (W + 1) + 1] int32
    out_ptr,  # [N, C, H, W]
    R, C, H, W,
    points_n, order_n, first_n, out_n, out_c, out_h, out_w,  # strides
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(H * W, BLOCK_M)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    cell = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row, column = cell // W, cell % W
    inside = cell < H * W
    points_ptr += n * points_n
    order_ptr += n * order_n
    first_ptr += n * first_n
    grad_ptr += n * R * C
    out = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for dy in tl.static_range(2):
        # points whose lower left cell is (row - 1 + dy, column - 1) or the next; neighbours in the order
        key = (row + dy) * (W + 1) + column
        start = tl.load(first_ptr + key, mask=inside, other=0)
        stop = tl.load(first_ptr + key + 2, mask=inside, other=0)
        for i in range(tl.max(stop - start, 0)):
            exists = start + i < stop
            r = tl.load(order_ptr + start + i, mask=exists, other=0)
            x, y = _load_points(points_ptr, r, exists, H, W)
            weight = tl.maximum(1.0 - tl.abs(x - column), 0.0) * tl.maximum(1.0 - tl.abs(y - row), 0.0)
            grad = tl.load(
                grad_ptr + r[:, None] * C + c[None, :], mask=exists[:, None] & (c < C)[None, :], other=0.0
            )  # [BLOCK_M, BLOCK_C]  # fmt: skip
            out += weight[:, None] * grad.to(tl.float32)
    where = out_ptr + n * out_n + (row * out_h + column * out_w)[:, None] + c[None, :] * out_c
    tl.store(where, out, mask=inside[:, None] & (c < C)[None, :])
