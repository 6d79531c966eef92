"""The transcription from pixels to features: ResNet and Swin, the temporal neck, position embeddings.

Written as in the papers, nothing folded or fused. Parameter names are those of published TarViS checkpoints:
detectron2's for ResNet, the official code's for Swin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM = 256
HEADS = 8
RESNET_DEPTHS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
SWIN = {  # width, depths, heads, window
    "swin_tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "swin_small": (96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
    "swin_base": (128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "swin_large": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
}


def build_backbone(variant: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The backbone and the channels of its maps at strides 4, 8, 16, 32."""
    if variant in RESNET_DEPTHS:
        return ResNet(RESNET_DEPTHS[variant]), (256, 512, 1024, 2048)
    dim, depths, heads, window = SWIN[variant]
    return Swin(dim, depths, heads, window), tuple(dim * 2**i for i in range(4))


class ResNet(nn.Module):
    """frames [N, 3, H, W], normalised -> four maps at strides 4, 8, 16, 32."""

    def __init__(self, depths: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Sequential()
        self.stem.add_module("conv1", NormedConv(3, 64, 7, stride=2))
        channels = 64
        for i, depth in enumerate(depths):
            width = 64 * 2**i
            first = Bottleneck(channels, width, stride=2 if i else 1)
            rest = [Bottleneck(4 * width, width, stride=1) for _ in range(depth - 1)]
            self.add_module(f"res{i + 2}", nn.Sequential(first, *rest))
            channels = 4 * width

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(self.stem(x).relu(), 3, stride=2, padding=1)
        maps = []
        for i in range(4):
            x = self.get_submodule(f"res{i + 2}")(x)
            maps.append(x)
        return maps


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1; a projected shortcut where the shape changes."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * width
        self.shortcut = (
            NormedConv(in_channels, out_channels, 1, stride) if in_channels != out_channels else None
        )
        self.conv1 = NormedConv(in_channels, width, 1)
        self.conv2 = NormedConv(width, width, 3, stride)
        self.conv3 = NormedConv(width, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(self.conv2(self.conv1(x).relu()).relu())
        return (y + (x if self.shortcut is None else self.shortcut(x))).relu()


class NormedConv(nn.Conv2d):
    """A convolution without bias and its frozen batch norm."""

    def __init__(self, in_channels: int, out_channels: int, size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
        self.norm = FrozenBatchNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class FrozenBatchNorm(nn.Module):
    """Batch norm whose statistics and affine terms are all buffers."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-5)


class Swin(nn.Module):
    """Detection-style Swin: frames [N, 3, H, W], normalised -> four normed maps at strides 4 .. 32."""

    def __init__(self, dim: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(dim)
        self.layers = nn.ModuleList(
            Stage(dim * 2**i, depths[i], heads[i], window, downsample=i < 3) for i in range(4)
        )
        for i in range(4):
            self.add_module(f"norm{i}", nn.LayerNorm(dim * 2**i))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.patch_embed(x)  # [N, H/4, W/4, C]
        maps = []
        for i, stage in enumerate(self.layers):
            x, after = stage(x)
            maps.append(self.get_submodule(f"norm{i}")(x).permute(0, 3, 1, 2).contiguous())
            x = after
        return maps


class PatchEmbed(nn.Module):
    """4x4 patches to tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 4, stride=4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[-2:]
        x = self.proj(F.pad(x, (0, -W % 4, 0, -H % 4)))
        return self.norm(x.permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Blocks of one width, then the step to the next: returns the tokens before and after that step."""

    def __init__(self, dim: int, depth: int, heads: int, window: int, downsample: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, window) for _ in range(depth))
        self.downsample = PatchMerging(dim) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for i, block in enumerate(self.blocks):
            x = block(x, shifted=i % 2 == 1)
        return x, self.downsample(x)


class PatchMerging(nn.Module):
    """Four neighbours to one token of twice the width. [N, H, W, C] -> [N, H/2, W/2, 2C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        N, H, W, C = x.shape
        x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=-1)  # rows first
        return self.reduction(self.norm(x))


class Block(nn.Module):
    """Window attention and MLP, pre-norm. [N, H, W, C] -> the same."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor, shifted: bool) -> Tensor:
        N, H, W, C = x.shape
        w = self.window
        y = F.pad(self.norm1(x), (0, 0, 0, -W % w, 0, -H % w))
        shift, mask = 0, None
        if shifted:
            shift = w // 2
            y = y.roll((-shift, -shift), dims=(1, 2))
            mask = shift_mask(y.shape[1], y.shape[2], w, shift, x.device)
        y = from_windows(self.attn(to_windows(y, w), mask), w, y.shape[1], y.shape[2])
        if shifted:
            y = y.roll((shift, shift), dims=(1, 2))
        x = x + y[:, :H, :W]
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class WindowAttention(nn.Module):
    """Attention inside windows with a relative position bias. [N * windows, w * w, C] -> the same."""

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        cells = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        delta = cells[:, None] - cells[None] + window - 1  # query - key, from 0
        self.register_buffer("relative_position_index", delta[..., 0] * (2 * window - 1) + delta[..., 1])
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        N, S, C = x.shape
        q, k, v = self.qkv(x).view(N, S, 3, self.heads, C // self.heads).permute(2, 3, 0, 1, 4)
        scores = (q * (C // self.heads) ** -0.5) @ k.transpose(-1, -2)  # [A, N, S, S]
        scores = (
            scores + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[:, None]
        )
        if mask is not None:
            windows = mask.shape[0]
            scores = (scores.view(self.heads, -1, windows, S, S) + mask).view(self.heads, N, S, S)
        out = scores.softmax(-1) @ v  # [A, N, S, D]
        return self.proj(out.permute(1, 2, 0, 3).reshape(N, S, C))


def to_windows(x: Tensor, window: int) -> Tensor:
    """[N, H, W, C] -> [N * windows, window * window, C]."""
    N, H, W, C = x.shape
    x = x.view(N, H // window, window, W // window, window, C)
    return x.transpose(2, 3).reshape(-1, window * window, C)


def from_windows(x: Tensor, window: int, H: int, W: int) -> Tensor:
    """[N * windows, window * window, C] -> [N, H, W, C]."""
    x = x.view(-1, H // window, W // window, window, window, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, H, W, x.shape[-1])


def shift_mask(H: int, W: int, window: int, shift: int, device: torch.device) -> Tensor:
    """-100 between tokens of different regions of the rolled map. [windows, window * window, same]."""
    region = torch.zeros(1, H, W, 1, device=device)
    parts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for i, rows in enumerate(parts):
        for j, columns in enumerate(parts):
            region[:, rows, columns] = 3 * i + j
    ids = to_windows(region, window).squeeze(-1)  # [windows, S]
    return torch.where(ids[:, :, None] == ids[:, None, :], 0.0, -100.0)


class TemporalNeck(nn.Module):
    """Deformable attention in space, windows in time, and one FPN step.

    maps [B, T, C_i, h, w] at strides 4 .. 32 -> maps [B, T, 256, h, w] at strides 32, 16, 8, 4.
    """

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, DIM, 1), nn.GroupNorm(32, DIM)) for c in channels[:0:-1]
        )
        self.transformer = NeckTransformer()
        self.mask_features = nn.Conv2d(DIM, DIM, 1)
        self.adapter_1 = GroupNormConv(channels[0], 1)
        self.layer_1 = GroupNormConv(DIM, 3)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        B, T = maps[0].shape[:2]
        flat = [m.flatten(0, 1) for m in maps]  # [N, C, h, w]
        levels = [proj(m) for proj, m in zip(self.input_proj, flat[:0:-1], strict=True)]
        levels = self.transformer(levels, T)
        y = self.adapter_1(flat[0])
        y = y + F.interpolate(levels[-1], size=y.shape[-2:], mode="bilinear", align_corners=False)
        mask_features = self.mask_features(self.layer_1(y).relu())
        return [m.unflatten(0, (B, T)) for m in (*levels, mask_features)]


class GroupNormConv(nn.Conv2d):
    """A convolution without bias and its group norm."""

    def __init__(self, in_channels: int, size: int) -> None:
        super().__init__(in_channels, DIM, size, padding=size // 2, bias=False)
        self.norm = nn.GroupNorm(32, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class NeckTransformer(nn.Module):
    """Six times: a deformable layer within each frame, a temporal layer within each window."""

    def __init__(self) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.randn(3, DIM))
        self.level_embed_3d = nn.Parameter(torch.randn(3, DIM))
        self.encoder = NeckLayers()

    def forward(self, levels: list[Tensor], T: int) -> list[Tensor]:
        """levels: maps [N, C, h, w] at strides 32, 16, 8, of which T consecutive ones are a clip."""
        N = levels[0].shape[0]
        shapes = [(m.shape[2], m.shape[3]) for m in levels]
        x = torch.cat([m.flatten(2).transpose(1, 2) for m in levels], 1)  # [N, S, C]
        pos_2d, pos_3d = [], []
        for (h, w), embed_2d, embed_3d in zip(shapes, self.level_embed, self.level_embed_3d, strict=True):
            plane = position_2d(h, w, x.device).flatten(0, 1)  # [h*w, C]
            volume = position_3d(T, h, w, x.device).flatten(1, 2)  # [T, h*w, C]
            pos_2d.append((plane + embed_2d).expand(N, -1, -1))
            pos_3d.append((volume + embed_3d).repeat(N // T, 1, 1))
        spatial, temporal = torch.cat(pos_2d, 1), torch.cat(pos_3d, 1)  # [N, S, C]
        reference = reference_points(shapes, x.device)
        table = patch_table(*shapes[0], x.device)
        for space_layer, time_layer in zip(self.encoder.layers, self.encoder.temporal_layers, strict=True):
            x = space_layer(x, spatial, reference, shapes)
            x = time_layer(x, temporal, table, T)
        parts = x.split([h * w for h, w in shapes], 1)
        return [p.transpose(1, 2).unflatten(2, shape) for p, shape in zip(parts, shapes, strict=True)]


class NeckLayers(nn.Module):
    """Holds the layers under their published names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DeformableLayer() for _ in range(6))
        self.temporal_layers = nn.ModuleList(TemporalLayer() for _ in range(6))


class DeformableLayer(nn.Module):
    """Multi-scale deformable self-attention and an FFN, post-norm. x, pos [N, S, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = DeformableAttention()
        self.norm1 = nn.LayerNorm(DIM)
        self.linear1 = nn.Linear(DIM, 1024)
        self.linear2 = nn.Linear(1024, DIM)
        self.norm2 = nn.LayerNorm(DIM)

    def forward(self, x: Tensor, pos: Tensor, reference: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        x = self.norm1(x + self.self_attn(x + pos, x, reference, shapes))
        return self.norm2(x + self.linear2(self.linear1(x).relu()))


class DeformableAttention(nn.Module):
    """Each query samples 4 points on each of 3 levels with each of 8 heads."""

    def __init__(self, levels: int = 3, points: int = 4) -> None:
        super().__init__()
        self.levels, self.points = levels, points
        self.sampling_offsets = nn.Linear(DIM, HEADS * levels * points * 2)
        self.attention_weights = nn.Linear(DIM, HEADS * levels * points)
        self.value_proj = nn.Linear(DIM, DIM)
        self.output_proj = nn.Linear(DIM, DIM)
        angle = torch.arange(HEADS) * (2 * math.pi / HEADS)
        direction = torch.stack([angle.cos(), angle.sin()], -1)  # [A, 2]
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = direction[:, None, None] * torch.arange(1, points + 1)[:, None]  # [A, 1, P, 2]
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(steps.expand(-1, levels, -1, -1).flatten())

    def forward(self, query: Tensor, x: Tensor, reference: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        N, S, C = query.shape
        value = self.value_proj(x).view(N, S, HEADS, C // HEADS)
        offsets = self.sampling_offsets(query).view(N, S, HEADS, self.levels, self.points, 2)
        weights = self.attention_weights(query).view(N, S, HEADS, -1).softmax(-1)
        weights = weights.view(N, S, HEADS, self.levels, self.points)
        sizes = torch.tensor([(w, h) for h, w in shapes], dtype=x.dtype, device=x.device)
        locations = reference[:, None, None, None] + offsets / sizes[:, None]  # [N, S, A, L, P, 2]
        return self.output_proj(sample_levels(value, shapes, locations, weights))


def sample_levels(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Bilinear samples of all levels, weighted and summed; zeros outside.

    value [N, S, A, D], locations [N, Q, A, L, P, 2] as (x, y) in 0..1, weights [N, Q, A, L, P]
    -> [N, Q, A * D].
    """
    N, S, A, D = value.shape
    Q = locations.shape[1]
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # [N*A, Q, L, P, 2]
    samples = []
    for level, (part, (h, w)) in enumerate(
        zip(value.split([h * w for h, w in shapes], 1), shapes, strict=True)
    ):
        image = part.flatten(2).transpose(1, 2).reshape(N * A, D, h, w)
        samples.append(F.grid_sample(image, grid[:, :, level], align_corners=False))  # [N*A, D, Q, P]
    weights = weights.transpose(1, 2).reshape(N * A, 1, Q, -1)  # [N*A, 1, Q, L*P]
    out = (torch.stack(samples, -2).flatten(-2) * weights).sum(-1)  # [N*A, D, Q]
    return out.view(N, A * D, Q).transpose(1, 2)


class TemporalLayer(nn.Module):
    """Self-attention inside each window over all its frames and an FFN, post-norm. x, pos [N, S, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.norm1 = nn.LayerNorm(DIM)
        self.linear1 = nn.Linear(DIM, 1024)
        self.linear2 = nn.Linear(1024, DIM)
        self.norm2 = nn.LayerNorm(DIM)

    def forward(self, x: Tensor, pos: Tensor, table: Tensor, T: int) -> Tensor:
        """table [P, 84]: the tokens of each window."""
        N, S, C = x.shape
        tokens = self.gather(x, table, T)  # [B*P, 84*T, C]
        query = tokens + self.gather(pos, table, T)
        # Long clips go through in eight parts, which bounds the attention weights that exist at a time.
        parts = 8 if not self.training and tokens.shape[1] > 500 else 1
        out = [
            self.self_attn(q, q, v)[0] for q, v in zip(query.chunk(parts), tokens.chunk(parts), strict=True)
        ]
        tokens = self.norm1(tokens + torch.cat(out))
        tokens = self.norm2(tokens + self.linear2(self.linear1(tokens).relu()))
        tokens = tokens.view(N // T, -1, table.shape[1], T, C).permute(0, 3, 1, 2, 4)  # [B, T, P, 84, C]
        return tokens.reshape(N, S, C)[:, table.flatten().argsort()]

    @staticmethod
    def gather(x: Tensor, table: Tensor, T: int) -> Tensor:
        """[N, S, C] -> [B * windows, 84 * T, C], ordered by token, then frame."""
        patches = x[:, table].unflatten(0, (-1, T))  # [B, T, P, 84, C]
        return patches.permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)


def patch_table(h: int, w: int, device: torch.device | None = None) -> Tensor:
    """Tokens of each 64 x 64 pixel window. h, w of the stride-32 map -> [h/2 * w/2, 84] index into S."""
    table, start = [], 0
    for scale in (1, 2, 4):
        rows, columns, side = h * scale, w * scale, 2 * scale
        index = torch.arange(start, start + rows * columns, device=device)
        index = index.view(rows // side, side, columns // side, side).transpose(1, 2)
        table.append(index.reshape(-1, side * side))
        start += rows * columns
    return torch.cat(table, 1)


def reference_points(shapes: Sequence[tuple[int, int]], device: torch.device | None = None) -> Tensor:
    """Pixel centres of all levels as (x, y) in 0..1. [S, 2]."""
    points = []
    for h, w in shapes:
        y, x = (torch.arange(n, device=device, dtype=torch.float32).add(0.5).div(n) for n in (h, w))
        y, x = torch.meshgrid(y, x, indexing="ij")
        points.append(torch.stack([x, y], -1).flatten(0, 1))
    return torch.cat(points)


def sine(position: Tensor, features: int) -> Tensor:
    """Sines and cosines of positions [n] at falling frequencies. -> [n, features]."""
    k = torch.arange(features, dtype=torch.float32, device=position.device)
    frequency = 10000 ** (2 * (k // 2) / features)
    angle = position[:, None] / frequency
    return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], -1).flatten(1)


def position_2d(h: int, w: int, device: torch.device | None = None, normalised: bool = True) -> Tensor:
    """[h, w, 256], y first."""
    y, x = axis(h, device, normalised), axis(w, device, normalised)
    rows = sine(y, DIM // 2)[:, None].expand(-1, w, -1)
    columns = sine(x, DIM // 2)[None].expand(h, -1, -1)
    return torch.cat([rows, columns], -1)


def position_3d(T: int, h: int, w: int, device: torch.device | None = None) -> Tensor:
    """[T, h, w, 256]: the plane's code plus one of the frame."""
    return position_2d(h, w, device) + sine(axis(T, device, True), DIM)[:, None, None]


def axis(n: int, device: torch.device | None, normalised: bool) -> Tensor:
    """Positions 1 .. n, or those as angles up to 2 pi."""
    position = torch.arange(1, n + 1, dtype=torch.float32, device=device)
    return position / (n + 1e-6) * (2 * math.pi) if normalised else position
