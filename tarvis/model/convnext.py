"""ConvNeXt (Liu et al., 2022), under the parameter names of the official code.

As in its use for dense prediction each of the four stages has an output with its own norm. Its norms use
eps 1e-6, as there.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarvis.model.layers import Backbone, DropPath, Pyramid, drop_path_rates, recomputable

EPS = 1e-6


class ConvNeXt(Backbone):
    """`channels` and `depths` are the widths and numbers of blocks of the four stages.

    It was trained on frames in 0..1 with ImageNet's statistics; those of `Backbone` are the same times 255.
    """

    published_scale = 255.0

    def __init__(
        self,
        channels: tuple[int, int, int, int],
        depths: tuple[int, int, int, int],
        drop_path: float = 0.3,
        layer_scale: float = 1e-6,
    ) -> None:
        super().__init__()
        self.channels = channels
        stem = nn.Sequential(nn.Conv2d(3, channels[0], kernel_size=4, stride=4), MapNorm(channels[0]))
        steps = (
            nn.Sequential(MapNorm(fine), nn.Conv2d(fine, coarse, kernel_size=2, stride=2))
            for fine, coarse in pairwise(channels)
        )
        self.downsample_layers = nn.ModuleList([stem, *steps])
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, rate, layer_scale) for rate in rates))
            for dim, rates in zip(channels, drop_path_rates(drop_path, depths), strict=True)
        )
        self.norm0, self.norm1, self.norm2, self.norm3 = (MapNorm(dim) for dim in channels)
        self.apply(_init)

    def forward(self, x: Tensor) -> Pyramid:
        """Normalised frames [N, 3, H, W] -> maps at strides 4, 8, 16, 32."""
        x = x.contiguous(memory_format=torch.channels_last)  # then the norms and linear layers need no copy
        norms = (self.norm0, self.norm1, self.norm2, self.norm3)
        outputs = []
        for downsample, stage, norm in zip(self.downsample_layers, self.stages, norms, strict=True):
            x = stage(downsample(x))
            outputs.append(norm(x))
        return outputs[0], outputs[1], outputs[2], outputs[3]


class Block(nn.Module):
    """Depthwise 7x7 convolution, norm, two linear layers with an exact GELU between; scaled and added."""

    def __init__(self, dim: int, drop_path: float, layer_scale: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path)

    @recomputable
    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        y = self.dwconv(x).permute(0, 2, 3, 1)  # [N, H, W, C]
        y = self.pwconv2(F.gelu(self.pwconv1(self.norm(y))))
        y = (self.gamma * y).permute(0, 3, 1, 2)  # [N, C, H, W]
        return x + self.drop_path(y)


class MapNorm(nn.LayerNorm):
    """Layer norm over the channels of a map [N, C, H, W]."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
