"""Swin transformer for dense prediction (Liu et al., 2021), under the parameter names of the official code.

Differs from the classification network: windows are shifted even where the map is smaller than one, maps are
zero-padded to whole windows, and each of the four stages has an output with its own norm. Frames must be
multiples of 32 pixels high and wide; maps are [N, H, W, C] throughout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarvis.model.layers import Backbone, DropPath, Pyramid, drop_path_rates, recomputable

MASKED = -100.0
"""Added to the attention logit of two tokens that only share a window because the map was rolled."""


class Swin(Backbone):
    """`dim` is the width of the first stage and doubles with each; `depths` and `num_heads` are per stage."""

    def __init__(
        self,
        dim: int,
        depths: tuple[int, int, int, int],
        num_heads: tuple[int, int, int, int],
        window: int,
        drop_path: float = 0.3,
    ) -> None:
        super().__init__()
        self.channels = (dim, 2 * dim, 4 * dim, 8 * dim)
        self.patch_embed = PatchEmbed(dim)
        self.layers = nn.ModuleList(
            Stage(width, heads, window, rates, has_downsample=i < 3)
            for i, (width, heads, rates) in enumerate(
                zip(self.channels, num_heads, drop_path_rates(drop_path, depths), strict=True)
            )
        )
        self.norm0, self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for width in self.channels)
        self.apply(_init)

    def forward(self, x: Tensor) -> Pyramid:
        """Normalised frames [N, 3, H, W] -> maps at strides 4, 8, 16, 32."""
        x = self.patch_embed(x)  # [N, H/4, W/4, C]
        outputs = []
        for layer, norm in zip(self.layers, (self.norm0, self.norm1, self.norm2, self.norm3), strict=True):
            x, merged = layer(x)
            outputs.append(norm(x).permute(0, 3, 1, 2))  # [N, C, H/s, W/s], channels last in memory
            x = merged
        return outputs[0], outputs[1], outputs[2], outputs[3]


class PatchEmbed(nn.Module):
    """Each patch of 4x4 pixels becomes a token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=4, stride=4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, H/4, W/4, C]."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Blocks at one resolution, every second one with shifted windows; then half the resolution."""

    def __init__(
        self, dim: int, num_heads: int, window: int, drop_path: list[float], has_downsample: bool
    ) -> None:
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, window, window // 2 if i % 2 else 0, rate)
            for i, rate in enumerate(drop_path)
        )
        self.downsample = PatchMerging(dim) if has_downsample else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, H, W, C] -> the stage's own map [N, H, W, C] and the next stage's [N, H/2, W/2, 2C]."""
        mask = shift_mask(x.shape[1], x.shape[2], self.window, x)  # one for all shifted blocks
        for block in self.blocks:
            x = block(x, mask)
        return x, x if self.downsample is None else self.downsample(x)


class Block(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, dim: int, num_heads: int, window: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window, shift)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    @recomputable
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [N, H, W, C] -> [N, H, W, C]; mask [P, w*w, w*w] of `shift_mask`."""
        x = x + self.drop_path(self.attn(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class WindowAttention(nn.Module):
    """Attention within windows of w x w tokens, with a learned bias for every relative position.

    The map is rolled up and left by `shift` before it is cut into windows, and back afterwards.
    """

    relative_position_index: Tensor
    sdpa = staticmethod(F.scaled_dot_product_attention)  # exported copies have another form: `export.forms`

    def __init__(self, dim: int, num_heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.num_heads, self.window, self.shift = num_heads, window, shift
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(window))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [N, H, W, C] -> [N, H, W, C]; mask [P, w*w, w*w], used where the windows are shifted."""
        N, H, W, C = x.shape
        w, A = self.window, self.num_heads
        # zeros come in after the block's norm and are keys like all other tokens: only the qkv bias is left
        rows, columns = _windows(H, w), _windows(W, w)
        x = F.pad(x, (0, 0, 0, columns * w - W, 0, rows * w - H))
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))

        qkv = self.qkv(x).view(N, rows, w, columns, w, 3, A, C // A)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7)  # [3, N, rows, columns, A, w, w, D]
        bias = self.position_bias()  # [A, w*w, w*w]
        if self.shift:
            # windows beside heads, so that one mask serves all frames
            bias = (mask[:, None] + bias).flatten(0, 1)  # [P*A, w*w, w*w]
            q, k, v = qkv.reshape(3, N, rows * columns * A, w * w, C // A)
        else:
            q, k, v = qkv.reshape(3, N * rows * columns, A, w * w, C // A)
        # expanded for nothing but torch.export, which else takes an export for N > 1 as none for N = 1
        y = self.sdpa(q, k, v, attn_mask=bias.expand(q.shape[0], -1, -1, -1))

        y = y.reshape(N, rows, columns, A, w, w, C // A).permute(0, 1, 4, 2, 5, 3, 6)
        y = y.reshape(N, rows * w, columns * w, C)
        if self.shift:
            y = y.roll((self.shift, self.shift), (1, 2))
        # cropped by negative padding, not by a slice, whose strides would be a special case for torch.export
        # where W is a multiple of w
        return self.proj(F.pad(y, (0, 0, 0, W - columns * w, 0, H - rows * w)))

    def position_bias(self) -> Tensor:
        """[A, w*w, w*w]: what is added to the logit of (query, key)."""
        bias = self.relative_position_bias_table[self.relative_position_index]  # [w*w, w*w, A]
        return bias.permute(2, 0, 1)


class PatchMerging(nn.Module):
    """2x2 neighbours become one token of twice the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, H, W, C] -> [N, H/2, W/2, 2C]."""
        # (row, column) offsets in the order (0, 0), (1, 0), (0, 1), (1, 1)
        x = torch.cat([x[:, r::2, c::2] for c in (0, 1) for r in (0, 1)], dim=-1)
        return self.reduction(self.norm(x))


class MLP(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def relative_position_index(window: int) -> Tensor:
    """int64 [w*w, w*w]: row of the bias table for (query, key), (dy + w - 1) * (2w - 1) + (dx + w - 1)."""
    i = torch.arange(window * window)
    row, column = i // window, i % window
    dy, dx = row[:, None] - row, column[:, None] - column  # query - key
    return (dy + window - 1) * (2 * window - 1) + dx + window - 1


def shift_mask(height: int, width: int, window: int, like: Tensor) -> Tensor:
    """[P, w*w, w*w] of `like`'s dtype: 0 between tokens that are neighbours in the map, else `MASKED`.

    Rolling brings the map's first rows and columns to its far end. Along each axis the last window holds two
    regions that do not belong together; the mask is indexed in the order of the rolled map.
    """

    def regions(size: int) -> Tensor:
        """[windows, w]: 0, or where the last window begins 1, or where what was rolled in begins 2."""
        end = _windows(size, window) * window
        i = torch.arange(end, device=like.device)
        region = (i >= end - window).long() + (i >= end - window // 2).long()
        return region.view(-1, window)

    rows, columns = regions(height), regions(width)
    region = 3 * rows[:, None, :, None] + columns[None, :, None, :]  # [rows, columns, w, w]
    region = region.reshape(-1, window * window)  # [P, w*w]
    return (region[:, :, None] != region[:, None, :]).to(like.dtype) * MASKED


def _windows(size: int, window: int) -> int:
    """Number of windows that cover `size` tokens."""
    # a quotient, and no remainder: with a symbolic size torch.export then sees at once that windows * window
    # tokens make whole windows, where it thinks for minutes about size + (-size % window)
    return (size + window - 1) // window


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
