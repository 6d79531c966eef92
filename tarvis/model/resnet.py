"""ResNet with frozen batch norm (He et al., 2016), under detectron2's parameter names.

The stride of a stage sits in the 3x3 convolution, as in torchvision. Batch norm is frozen for good, so it is
folded into its convolution at run time: activations are read and written once instead of twice.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarvis.model.layers import Backbone, Pyramid, recomputable


class ResNet(Backbone):
    """`depths` are the numbers of bottleneck blocks of the four stages, e.g. (3, 4, 6, 3) for ResNet-50."""

    channels = (256, 512, 1024, 2048)

    def __init__(self, depths: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.stem = Stem()
        widths = (64, *self.channels)
        self.res2 = _stage(depths[0], widths[0], widths[1], stride=1)
        self.res3 = _stage(depths[1], widths[1], widths[2], stride=2)
        self.res4 = _stage(depths[2], widths[2], widths[3], stride=2)
        self.res5 = _stage(depths[3], widths[3], widths[4], stride=2)

    def forward(self, x: Tensor) -> Pyramid:
        """Normalised frames [N, 3, H, W] -> maps at strides 4, 8, 16, 32."""
        # ResNet-50, 6 frames of 256 x 448, 2 CPU threads: 832 ms, 785 with the norms folded, 521 so as well
        x = self.stem(x.contiguous(memory_format=torch.channels_last))  # [N, 64, H/4, W/4]
        res2 = self.res2(x)
        res3 = self.res3(res2)
        res4 = self.res4(res3)
        return res2, res3, res4, self.res5(res4)

    @staticmethod
    def our_name(key: str) -> str:
        """torchvision's name of a parameter -> detectron2's, which are ours; other names stay."""
        key = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", key)
        key = re.sub(r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}.", key)
        if key.startswith(("stem.", "res")):
            key = re.sub(r"\.bn(\d)\.", r".conv\1.norm.", key)
            key = re.sub(r"\.downsample\.0\.", ".shortcut.", key)
            key = re.sub(r"\.downsample\.1\.", ".shortcut.norm.", key)
        return key


class Stem(nn.Module):
    """7x7 convolution and 3x3 max pooling, both of stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ConvNorm(3, 64, kernel_size=7, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut, which is a projection where the shape changes."""

    def __init__(self, in_dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        dim = out_dim // 4
        self.shortcut = ConvNorm(in_dim, out_dim, stride=stride) if in_dim != out_dim else None
        self.conv1 = ConvNorm(in_dim, dim)
        self.conv2 = ConvNorm(dim, dim, kernel_size=3, stride=stride)
        self.conv3 = ConvNorm(dim, out_dim)

    @recomputable
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.conv1(x))
        y = F.relu_(self.conv2(y))
        y = self.conv3(y)
        y += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(y)


class ConvNorm(nn.Conv2d):
    """Convolution without bias, then frozen batch norm, computed as one convolution.

    Gradients reach the convolution's weight; the four statistics are buffers.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int = 1, stride: int = 1) -> None:
        super().__init__(in_dim, out_dim, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.norm = FrozenBatchNorm(out_dim)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.norm.scale_and_shift()
        return F.conv2d(x, self.weight * scale[:, None, None, None], shift, self.stride, self.padding)


class FrozenBatchNorm(nn.Module):
    """The statistics and affine part of a batch norm that never changes."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(dim))
        self.register_buffer("bias", torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """[C], [C]: the norm is x * scale + shift."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale


def _stage(depth: int, in_dim: int, out_dim: int, stride: int) -> nn.Sequential:
    first = Bottleneck(in_dim, out_dim, stride)
    return nn.Sequential(first, *(Bottleneck(out_dim, out_dim, stride=1) for _ in range(depth - 1)))
