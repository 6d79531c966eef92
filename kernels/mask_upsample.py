"""Logits at a quarter of the padded network input -> masks or labels at the size of the image.

    out = Wy logits Wx^T,  Wy = bilinear(H <- network) crop(network <- 4h) bilinear(4h <- h),  Wx alike
    mask = out > 0,  label = argmax over the maps

Two bilinear steps (half-pixel centres, no antialiasing) with the padding cut off between them, as in the
published model. Both steps are linear and separable, so each axis is one matrix with at most three non-zeros
a row, and thresholds and maxima are taken slab by slab: no float map of full size ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

Size = tuple[int, int]

_MAPS = 16  # masks upsampled at once
_COLUMNS = 256  # columns in a block of the horizontal step
_SLAB = {"cpu": 1 << 19, "cuda": 1 << 26}  # values in a slab; on the CPU it should stay in the cache


def mask_upsample(logits: Tensor, network: Size, size: Size) -> Tensor:
    """Where the upsampled logits are positive.

    Args:
        logits: [N, T, h, w], any float dtype (computed in float32); N = 0 or T = 0 are fine.
        network: (height, width) of the network input before padding, at most (4h, 4w).
        size: (height, width) of the result.

    Returns:
        [N, T, H, W] bool.

    Raises:
        ValueError: `logits` is not a four-dimensional float tensor, or `network` does not fit into it.
    """
    _check(logits, network, size)
    N, T = logits.shape[:2]
    out = logits.new_empty(N * T, *size, dtype=torch.bool)
    if N * T == 0:
        return out.view(N, T, *size)
    for maps, masks in zip(logits.flatten(0, 1).split(_MAPS), out.split(_MAPS), strict=True):
        for rows, values in _slabs(maps, network, size):
            torch.gt(values, 0, out=masks[:, rows])
    return out.unflatten(0, (N, T))


def label_upsample(logits: Tensor, network: Size, size: Size, *, background: bool = False) -> Tensor:
    """Which map has the largest upsampled logit; the first of equals.

    Args:
        logits: [K, T, h, w], any float dtype (computed in float32).
        network: (height, width) of the network input before padding, at most (4h, 4w).
        size: (height, width) of the result.
        background: label 0 then means that no logit is positive, and map k has label k + 1.

    Returns:
        [T, H, W] uint8, or int16 where the labels do not fit.

    Raises:
        ValueError: as `mask_upsample`, or there is nothing to choose from (K = 0 without background).
    """
    _check(logits, network, size)
    K, T = logits.shape[:2]
    if K == 0 and not background:
        raise ValueError("label_upsample needs at least one map")
    out = logits.new_zeros(T, *size, dtype=torch.uint8 if K + background <= 256 else torch.int16)
    if K == 0:
        return out
    for t in range(T):
        for rows, values in _slabs(logits[:, t], network, size):
            best, label = values.max(0)  # [rows, W]
            out[t, rows] = (label + 1).masked_fill_(~(best > 0), 0) if background else label
    return out


def upsample_logits(logits: Tensor, network: Size, size: Size) -> Tensor:
    """The upsampled logits themselves: [.., h, w] -> float32 [.., H, W], for those who need values."""
    maps = logits.reshape(-1, *logits.shape[-2:])
    slabs = [values for _, values in _slabs(maps, network, size)]
    return torch.cat(slabs, 1).unflatten(0, logits.shape[:-2])


def _check(logits: Tensor, network: Size, size: Size) -> None:
    if logits.ndim != 4 or not logits.is_floating_point():
        raise ValueError(f"expected float logits [N, T, h, w], got {logits.dtype} {list(logits.shape)}")
    h, w = logits.shape[2:]
    if not (0 < network[0] <= 4 * h and 0 < network[1] <= 4 * w) or min(size) < 1:
        raise ValueError(f"cannot cut {network} out of {(4 * h, 4 * w)} and resize it to {size}")


@torch.no_grad()
def _slabs(maps: Tensor, network: Size, size: Size) -> Iterator[tuple[slice, Tensor]]:
    """Full-width slabs of the upsampled maps [M, h, w]: (which rows, float32 [M, rows, W]), from the top."""
    M, h, w = maps.shape
    H, W = size
    device = maps.device
    maps = maps.float()
    rows = max(1, _SLAB.get(device.type, 1 << 24) // max(1, M * W))
    with torch.autocast(device.type, enabled=False):
        wide = maps.new_empty(M, h, W)
        for columns, taps, weight in _bands(w, network[1], W, _COLUMNS, device):
            wide[:, :, columns] = maps[:, :, taps] @ weight.T
        for lines, taps, weight in _bands(h, network[0], H, min(rows, H), device):
            yield lines, weight @ wide[:, taps]


class _Band(NamedTuple):
    """Some outputs of one axis and the few inputs that they come from."""

    outputs: slice
    inputs: slice
    weight: Tensor  # float32 [outputs, inputs]


@lru_cache(maxsize=64)
def _bands(quarter: int, network: int, size: int, step: int, device: torch.device) -> list[_Band]:
    """The matrix of one axis, cut into blocks of `step` rows and their non-zero columns."""
    matrix = _resize_matrix(network, size) @ _resize_matrix(quarter, 4 * quarter)[:network]
    bands = []
    for start in range(0, size, step):
        block = matrix[start : start + step]
        used = block.any(0).nonzero().flatten()
        inputs = slice(int(used[0]), int(used[-1]) + 1)
        weight = block[:, inputs].float().to(device)
        bands.append(_Band(slice(start, start + len(block)), inputs, weight))
    return bands


def _resize_matrix(inputs: int, outputs: int) -> Tensor:
    """Bilinear interpolation with half-pixel centres as a float64 matrix [outputs, inputs]."""
    row = torch.arange(outputs)
    source = ((row.double() + 0.5) * (inputs / outputs) - 0.5).clamp_(min=0)
    low = source.long().clamp_(max=inputs - 1)
    high = (low + 1).clamp_(max=inputs - 1)
    matrix = torch.zeros(outputs, inputs, dtype=torch.float64)
    matrix[row, low] += 1 - (source - low)
    matrix[row, high] += source - low
    return matrix
