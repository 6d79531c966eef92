"""The published code interpolates class numbers and cuts them to whole ones.

Where all four cells agree, rounding decides whether class 3 stays 3 or becomes 2, and PyTorch rounds with or
without fused multiply-add, as the processor has it. The losses were recorded with it; this fuses everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor


def between_labels(labels: Tensor, points: Tensor) -> Tensor:
    """Labels [N, H, W] at points [N, P, 2] (x, y) in 0..1 -> [N, P] int64, as recorded."""
    _, H, W = labels.shape
    x, y = (
        fused(2 * points[..., k] - 1 + 1, torch.tensor(size / 2), torch.tensor(-0.5))
        for k, size in enumerate((W, H))
    )
    left, top = x.floor(), y.floor()
    right_share, low_share = x - left, y - top
    total = torch.zeros_like(x)
    for row, row_share in ((top, 1 - low_share), (top + 1, low_share)):
        for column, share in ((left, 1 - right_share), (left + 1, right_share)):
            inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
            cells = (row.clamp(0, H - 1) * W + column.clamp(0, W - 1)).long()
            total = fused(labels.float().flatten(1).gather(1, cells) * inside, row_share * share, total)
    return total.long()


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of float32, rounded once."""
    return (a.double() * b + c).float()
