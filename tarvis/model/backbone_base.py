"""What all backbones share: their interface, and stochastic depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Pyramid = tuple[Tensor, Tensor, Tensor, Tensor]
"""Maps of one backbone at strides 4, 8, 16, 32 (fine to coarse), each [N, C, H/s, W/s]."""


class Backbone(nn.Module):
    """Frames [N, 3, H, W] -> `Pyramid`.

    `channels` are the widths of the four maps. Frames are RGB in 0..255, normalised by
    (x - `pixel_mean`) / `pixel_std`. ConvNeXt was trained on x / 255 with ImageNet's statistics in 0..1;
    these are the same numbers divided by 255, so one pair serves every backbone.
    """

    channels: tuple[int, int, int, int]
    pixel_mean = (123.675, 116.28, 103.53)
    pixel_std = (58.395, 57.12, 57.375)


class DropPath(nn.Module):
    """Stochastic depth: in training drops the branch of a whole frame with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """[N, ...] -> [N, ...]; kept frames are scaled so that the mean stays."""
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        kept = torch.rand(x.shape[:1], device=x.device) < keep  # [N]
        return x * (kept.to(x.dtype) / keep).view(-1, *[1] * (x.ndim - 1))


def drop_path_rates(last: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Rates rising linearly from 0 at the first block to `last` at the last, one list a stage."""

    steps = max(sum(depths) - 1, 1)
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [
        [last * (start + i) / steps for i in range(depth)]
        for start, depth in zip(starts, depths, strict=True)
    ]
