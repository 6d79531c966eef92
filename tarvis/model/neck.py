"""Temporal neck (paper, section 3.2): deformable attention in space, window attention in time, one FPN step.

Tokens are kept in *window order*, [B, T, P, M, C]: the padded image is cut into P = (H/64) * (W/64) windows
of 64 x 64 pixels, row-major, and a window holds M = 84 tokens of a frame: 2 x 2 of stride 32, 4 x 4 of stride
16, 8 x 8 of stride 8. Temporal attention is then plain attention over T * M contiguous tokens, no index
is ever gathered, and neighbours in the token order are neighbours in the image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarvis.model.layers import Attention, GroupNorm, encode_grid, encode_time, feed_forward, recomputable
from tarvis.operators import cell_centres, ms_deform_attn
from tarvis.structures import Features

SIDES = (2, 4, 8)
"""Side of a window in tokens, at strides 32, 16, 8."""


class TemporalNeck(nn.Module):
    """Backbone maps -> memory at strides 32, 16, 8 and mask features at stride 4."""

    def __init__(
        self,
        in_channels: tuple[int, int, int, int],
        dim: int = 256,
        num_heads: int = 8,
        num_points: int = 4,
        num_layers: int = 6,
        ffn_dim: int = 1024,
    ) -> None:
        super().__init__()
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, dim, 1), GroupNorm(dim)) for channels in in_channels[:0:-1]
        )
        self.level_embed = nn.Parameter(torch.randn(3, dim))
        self.level_embed_3d = nn.Parameter(torch.randn(3, dim))
        self.spatial = nn.ModuleList(
            SpatialLayer(dim, num_heads, num_points, ffn_dim) for _ in range(num_layers)
        )
        self.temporal = nn.ModuleList(TemporalLayer(dim, num_heads, ffn_dim) for _ in range(num_layers))
        self.adapter_1 = ConvNorm(in_channels[0], dim, 1)
        self.layer_1 = ConvNorm(dim, dim, 3)
        self.mask_features = nn.Conv2d(dim, dim, 1)

    def forward(self, pyramid: tuple[Tensor, ...]) -> Features:
        """Four maps [B, T, C_i, H/s, W/s] at strides 4, 8, 16, 32 (fine to coarse) -> `Features`."""
        B, T, _, h, w = pyramid[3].shape
        grid = (h // SIDES[0], w // SIDES[0])
        x = to_windows(
            [
                proj(level.flatten(0, 1)).unflatten(0, (B, T))  # [B, T, C, H/s, W/s]
                for proj, level in zip(self.input_proj, pyramid[:0:-1], strict=True)
            ]
        )  # [B, T, P, M, C]
        where = WindowPositions(grid, self.level_embed, self.level_embed_3d)
        time = encode_time(T, x.shape[-1], x.device)  # [T, C]
        for spatial, temporal in zip(self.spatial, self.temporal, strict=True):
            x = spatial(x, where)
            x = temporal(x, where.space_time, time)
        coarse, middle, fine = from_windows(x, grid)
        # channels last throughout, as `fine` and the backbone's maps are: no layout is ever converted
        y = self.adapter_1(pyramid[0].flatten(0, 1))  # [B*T, C, H/4, W/4]
        y += F.interpolate(fine.flatten(0, 1), scale_factor=2.0, mode="bilinear")
        y = self.mask_features(F.relu(self.layer_1(y), inplace=True))
        return Features((coarse, middle, fine), y.unflatten(0, (B, T)))


class WindowPositions:
    """What the layers of the neck know of places: the same for all frames and layers, built once a clip.

    `space` and `space_time` are [P, M, C], 2D encodings plus the level embedding of the spatial and of the
    temporal layers; `centres` [1, P*M, 1, 2] are the tokens' places (x, y) in 0..1, `shapes` the
    sizes of the levels.
    """

    def __init__(self, grid: tuple[int, int], level_embed: Tensor, level_embed_3d: Tensor) -> None:
        device, dim = level_embed.device, level_embed.shape[1]
        self.grid = grid
        self.shapes = [(grid[0] * side, grid[1] * side) for side in SIDES]
        codes = [encode_grid(shape, dim, device).to(level_embed.dtype) for shape in self.shapes]
        self.space = to_windows([_as_clip(c + e) for c, e in zip(codes, level_embed, strict=True)])[0, 0]
        self.space_time = to_windows([_as_clip(c + e) for c, e in zip(codes, level_embed_3d, strict=True)])[
            0, 0
        ]
        centres = [cell_centres([shape], device)[0, :, 0].unflatten(0, shape) for shape in self.shapes]
        self.centres = to_windows([_as_clip(c) for c in centres])[0, 0].flatten(0, 1)[None, :, None]


class SpatialLayer(nn.Module):
    """Deformable attention over the three levels of one frame, then an FFN; post-norm."""

    def __init__(self, dim: int, num_heads: int, num_points: int, ffn_dim: int) -> None:
        super().__init__()
        self.num_heads, self.num_points = num_heads, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * len(SIDES) * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * len(SIDES) * num_points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.reset_sampling()

    def reset_sampling(self) -> None:
        """Head i looks along direction 2 pi i / A, one pixel further with each point (Deformable DETR)."""
        angle = torch.arange(self.num_heads) * (2 * torch.pi / self.num_heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # [A, 2]
        steps = torch.arange(1, self.num_points + 1)[:, None]
        bias = (direction[:, None, None] * steps).expand(-1, len(SIDES), -1, -1)  # [A, L, P, 2]
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.reshape(-1))

    @recomputable
    def forward(self, x: Tensor, where: WindowPositions) -> Tensor:
        """x [B, T, P, M, C] -> the same."""
        x = x.contiguous()  # once, for the two products and the sum
        x = self.norm1(x + self.attend(x, where))
        return self.norm2(x + feed_forward(x, self.linear1, self.linear2))

    def attend(self, x: Tensor, where: WindowPositions) -> Tensor:
        """Deformable attention of every token: x [B, T, P, M, C] -> the same."""
        B, T, P, M, C = x.shape
        A, L, N = self.num_heads, len(SIDES), self.num_points
        levels = to_rows(self.value_proj(x), where.grid)
        value = torch.cat([rows.flatten(2, 3) for rows in levels], 2)  # [B, T, S, C]
        # W (x + position) = W x + W position: the second term is the same for all frames
        weight = torch.cat((self.sampling_offsets.weight, self.attention_weights.weight))
        bias = torch.cat((self.sampling_offsets.bias, self.attention_weights.bias))
        at = F.linear(x, weight) + F.linear(where.space, weight, bias)  # [B, T, P, M, A*L*N*3]
        offset, logit = at.view(B * T, P * M, -1).split((A * L * N * 2, A * L * N), -1)
        out = ms_deform_attn(
            value.view(B * T, P * M, A, C // A),
            offset.unflatten(-1, (A, L, N, 2)),
            logit.unflatten(-1, (A, L, N)),
            where.shapes,
            where.centres,
        )  # [B*T, P*M, C]
        return self.output_proj(out).view(B, T, P, M, C)


class TemporalLayer(nn.Module):
    """Attention among a window's tokens of all frames (global in time, local in space), then an FFN."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.attention = Attention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm2 = nn.LayerNorm(dim)

    @recomputable
    def forward(self, x: Tensor, space: Tensor, time: Tensor) -> Tensor:
        """x [B, T, P, M, C]; space [P, M, C] and time [T, C] make the position of queries and keys."""
        x = x.transpose(1, 2)  # [B, P, T, M, C]
        x = self.norm1(x + self.attend(x, space, time))
        x = self.norm2(x + feed_forward(x, self.linear1, self.linear2))
        return x.transpose(1, 2)

    def attend(self, x: Tensor, space: Tensor, time: Tensor) -> Tensor:
        """Attention within windows: x [B, P, T, M, C] -> the same."""
        B, P, T, M, C = x.shape
        qkv = self.attention.project(x, "qkv")  # [B, P, T, M, 3C]
        weight = self.attention.weight("qk")
        qkv[..., : 2 * C] += F.linear(space, weight)[:, None]  # [P, 1, M, 2C]
        qkv[..., : 2 * C] += F.linear(time, weight)[:, None]  # [T, 1, 2C]
        q, k, v = qkv.reshape(B * P, T * M, 3, self.attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = self.attention.merge(self.attention.sdpa(q, k, v))  # [B*P, T*M, C]
        return out.view(B, P, T, M, C)


class ConvNorm(nn.Conv2d):
    """Convolution without bias, then GroupNorm(32)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = GroupNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(super().forward(x))
        return out


def to_windows(levels: list[Tensor]) -> Tensor:
    """Maps [B, T, C, H/s, W/s] at strides 32, 16, 8 -> tokens in window order [B, T, P, M, C]."""
    tokens = []
    for level, side in zip(levels, SIDES, strict=True):
        tiles = level.unflatten(4, (-1, side)).unflatten(3, (-1, side))  # [B, T, C, gh, side, gw, side]
        tokens.append(tiles.permute(0, 1, 3, 5, 4, 6, 2).flatten(4, 5).flatten(2, 3))  # [B, T, P, side^2, C]
    return torch.cat(tokens, 3)


def to_rows(tokens: Tensor, grid: tuple[int, int]) -> list[Tensor]:
    """Tokens in window order [B, T, P, M, C] -> levels [B, T, H/s, W/s, C] at strides 32, 16, 8."""
    levels = []
    for part, side in zip(tokens.split([side * side for side in SIDES], 3), SIDES, strict=True):
        tiles = part.unflatten(3, (side, side)).unflatten(2, grid)  # [B, T, gh, gw, side, side, C]
        levels.append(tiles.transpose(3, 4).flatten(4, 5).flatten(2, 3))  # [B, T, h, w, C]
    return levels


def from_windows(tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens in window order [B, T, P, M, C] -> maps [B, T, C, H/s, W/s], channels last in memory.

    grid = (H/64, W/64); strides 32, 16, 8. The inverse of `to_windows`.
    """
    coarse, middle, fine = (rows.permute(0, 1, 4, 2, 3) for rows in to_rows(tokens, grid))
    return coarse, middle, fine


def _as_clip(grid: Tensor) -> Tensor:
    """[h, w, C] -> [1, 1, C, h, w]."""
    return grid.permute(2, 0, 1)[None, None]
