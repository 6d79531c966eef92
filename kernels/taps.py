"""The two bilinear steps of upsampling along one axis, as one matrix with few non-zeros a row."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]
"""(height, width)"""


@cache  # a captured CUDA graph may hold them
def axis_taps(quarter: int, network: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """One axis for the kernels: each output is a sum over three neighbouring inputs.

    Returns:
        start: int32 [size], the first of the three; never falls, at most max(quarter - 3, 0).
        weight: float32 [size, 3]; zero where fewer matter, and for what lies beyond an axis of one or two
            inputs and must not be read.
    """
    matrix = axis_matrix(quarter, network, size)
    start = (matrix != 0).int().argmax(1).clamp(max=max(quarter - 3, 0))  # [size]
    weight = F.pad(matrix, (0, 2)).gather(1, start[:, None] + torch.arange(3))  # [size, 3]
    return start.int().to(device), weight.float().to(device)


class Band(NamedTuple):
    """Some outputs of one axis and the few inputs that they come from."""

    outputs: slice
    inputs: slice
    weight: Tensor  # float32 [outputs, inputs]


@lru_cache(maxsize=64)
def bands(quarter: int, network: int, size: int, step: int, device: torch.device) -> list[Band]:
    """The matrix of one axis, cut into blocks of `step` rows and their non-zero columns."""
    matrix = axis_matrix(quarter, network, size)
    out = []
    for start in range(0, size, step):
        block = matrix[start : start + step]
        used = block.any(0).nonzero().flatten()
        inputs = slice(int(used[0]), int(used[-1]) + 1)
        weight = block[:, inputs].float().to(device)
        out.append(Band(slice(start, start + len(block)), inputs, weight))
    return out


def axis_matrix(quarter: int, network: int, size: int) -> Tensor:
    """Both steps and the cut between them as a float64 matrix [size, quarter]."""
    return _resize_matrix(network, size) @ _resize_matrix(quarter, 4 * quarter)[:network]


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
