"""Parts that boxes of the network share: attention, MLP, position encodings, the base of backbones."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, wraps
from itertools import pairwise
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) with the parameters of nn.MultiheadAttention.

    It never materialises attention weights. The projections are exposed (`weight`, `bias`, `heads`, `merge`)
    for layers that project positions, or keys and values, in their own way.
    """

    sdpa = staticmethod(F.scaled_dot_product_attention)  # exported copies have another form: `export.forms`

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def weight(self, parts: str) -> Tensor:
        """Rows of the input projection for "q", "k", "v" or a run of them, such as "qk"."""
        return self.in_proj_weight[self._rows(parts)]

    def bias(self, parts: str) -> Tensor:
        return self.in_proj_bias[self._rows(parts)]

    def project(self, x: Tensor, parts: str) -> Tensor:
        """x [.., C] -> [.., len(parts) * C]."""
        return F.linear(x, self.weight(parts), self.bias(parts))

    def heads(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, A, N, D] (a view)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        """Output projection of the heads' results: [B, A, N, D] -> [B, N, C]."""
        out: Tensor = self.out_proj(x.transpose(1, 2).flatten(2))
        return out

    def self_attend(self, x: Tensor, position: Tensor, mask: Tensor | None = None) -> Tensor:
        """q = k = x + position, v = x; x [B, N, C], position [B or 1, N or 1, C] -> [B, N, C].

        mask: [N or 1, N] bool, True where a key is seen.
        """
        q, k = (self.heads(part) for part in self.project(x + position, "qk").chunk(2, -1))
        v = self.heads(self.project(x, "v"))
        return self.merge(self.sdpa(q, k, v, attn_mask=mask))

    def _rows(self, parts: str) -> slice:
        dim = self.in_proj_weight.shape[1]
        first = "qkv".index(parts)
        return slice(first * dim, (first + len(parts)) * dim)


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        dims = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x), inplace=True)
        x = self.layers[-1](x)
        return x


def feed_forward(x: Tensor, linear1: nn.Linear, linear2: nn.Linear) -> Tensor:
    """linear2(relu(linear1(x))), the FFN of every transformer block here."""
    out: Tensor = linear2(F.relu(linear1(x), inplace=True))
    return out


class GroupNorm(nn.GroupNorm):
    """GroupNorm(32) in float32 whatever the autocast dtype (float64 stays float64)."""

    def __init__(self, dim: int) -> None:
        super().__init__(32, dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def sine(position: Tensor, dim: int) -> Tensor:
    """Sine code of positions [N], float32 [N, dim]: channel k has frequency 10000 ** (-2 * (k // 2) / dim).

    Even channels hold sines, odd ones cosines (Vaswani et al. 2017, section 3.5).
    """
    k = torch.arange(dim, device=position.device)
    angle = position[:, None] / 10000 ** (2 * (k // 2) / dim)
    return torch.where(k % 2 == 0, angle.sin(), angle.cos())


def axis_position(size: int, device: torch.device, *, normalized: bool = True) -> Tensor:
    """Positions 1 .. size of one axis, [size]; normalised: 2 pi (i + 1) / (size + 1e-6)."""
    position = torch.arange(1, size + 1, device=device, dtype=torch.float32)
    return position * (2 * math.pi / (size + 1e-6)) if normalized else position


def encode_grid(size: tuple[int, int], dim: int, device: torch.device, *, normalized: bool = True) -> Tensor:
    """2D encoding [h, w, dim]: the row's code in the first half of the channels, then the column's."""
    h, w = size
    y = sine(axis_position(h, device, normalized=normalized), dim // 2)  # [h, dim / 2]
    x = sine(axis_position(w, device, normalized=normalized), dim // 2)
    return torch.cat((y[:, None].expand(h, w, -1), x.expand(h, w, -1)), -1)


def encode_time(num_frames: int, dim: int, device: torch.device) -> Tensor:
    """Time code [T, dim] that the 3D encoding adds to the 2D one."""
    return sine(axis_position(num_frames, device), dim)


# Backbones

Pyramid = tuple[Tensor, Tensor, Tensor, Tensor]
"""Maps of one backbone at strides 4, 8, 16, 32 (fine to coarse), each [N, C, H/s, W/s]."""


class Backbone(nn.Module):
    """Frames [N, 3, H, W] -> `Pyramid`.

    `channels` are the widths of the four maps. Frames are RGB in 0..255, normalised by
    (x - `pixel_mean`) / `pixel_std`.
    """

    channels: tuple[int, int, int, int]
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    published_scale: float = 1.0
    """What published TarViS checkpoints divide frames in 0..255 by before they normalise them."""

    @staticmethod
    def our_name(key: str) -> str:
        """The name of a parameter in published files of the backbone -> its name here."""
        return key


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


# Memory in training

Forward = TypeVar("Forward", bound=Callable[..., Tensor])


def recomputable(forward: Forward) -> Forward:
    """A module's `forward` whose activations can be computed again in the backward pass, instead of kept.

    This happens where the module's attribute `recompute` is true; `recompute_activations` sets it.
    """

    @wraps(forward)
    def run(self: nn.Module, *args: Tensor) -> Tensor:
        if not getattr(self, "recompute", False):
            return forward(self, *args)
        result: Tensor = checkpoint(partial(forward, self), *args, use_reentrant=False)
        return result

    return cast(Forward, run)


def recompute_activations(network: nn.Module) -> None:
    """Recompute the activations of all modules of a network whose `forward` is `recomputable`."""
    for module in network.modules():
        module.__dict__["recompute"] = True
