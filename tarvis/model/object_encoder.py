"""Object encoder: first-frame masks and points become object queries (paper, section 3.1: VOS and PET).

Every query looks at "its" pixels of the reference frames. Their features are read from the stride-4 map, so a
cell is read once per mask pixel in it, up to 16 times. Here a cell is a key once, and its number of pixels n
enters the softmax as + log n: the same result without repeated keys, without padding all queries to the
longest list, and exact where the original keeps a random subset of 16 384 pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarvis.model.layers import MLP, Attention, encode_grid, feed_forward
from tarvis.structures import Features, PointFeatures


class ObjectEncoder(nn.Module):
    """Masks and points of one clip -> contents of background and object queries."""

    def __init__(
        self,
        dim: int = 256,
        num_heads: int = 8,
        num_layers: int = 4,
        ffn_dim: int = 2048,
        num_queries_per_object: int = 4,
        background_grid: tuple[int, int] = (4, 4),
    ) -> None:
        super().__init__()
        self.num_queries_per_object = num_queries_per_object
        self.background_grid = background_grid
        self.background_embed = nn.Parameter(torch.randn(dim))
        self.mask_embed = nn.Parameter(torch.randn(dim))
        self.point_embed = nn.Parameter(torch.randn(dim))
        self.layers = nn.ModuleList(ObjectLayer(dim, num_heads, ffn_dim) for _ in range(num_layers))
        self.point_proj = nn.ModuleList(nn.Linear(dim, dim) for _ in range(4))
        self.point_mlp = MLP(4 * dim, dim, dim, 3)

    @property
    def num_parts(self) -> int:
        """Queries of a mask object: twice as many at inference as in training, as published."""
        return self.num_queries_per_object * (1 if self.training else 2)

    def forward(
        self,
        mask_features: Tensor,
        masks: Tensor,
        points: PointFeatures | None = None,
        exist: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Contents of the background queries [G, C] and of the object queries [N * parts + N_points, C].

        Args:
            mask_features: [T, C, H/4, W/4] of the reference frames.
            masks: [N, T, H, W] bool at the padded size; N may be 0, masks may overlap or be empty.
            points: objects given by a point; their queries follow those of the mask objects.
            exist: [N + N_points] bool, False for rows that only fill up a fixed number: nothing looks at
                their queries. A mask that fills up must be empty.
        """
        T, C, h, w = mask_features.shape
        # no gradient flows from masks into the feature map, as published; from points it does
        pixels = mask_features.detach().permute(0, 2, 3, 1).flatten(0, 2)  # [T*h*w, C]
        code = encode_grid((h, w), C, pixels.device, normalized=False).to(pixels.dtype)  # [h, w, C]
        position = code.flatten(0, 1).repeat(T, 1)
        # one more cell, all zero: what a query looks at that has no pixel
        pixels, position = F.pad(pixels, (0, 0, 0, 1)), F.pad(position, (0, 0, 0, 1))
        counts = torch.cat(
            (background_counts(masks, self.background_grid), part_counts(masks, self.num_parts))
        )
        counts = torch.cat(
            (counts, (counts.sum(1, keepdim=True) == 0).to(counts.dtype)), 1
        )  # [G + N*parts, cells]
        share = counts / counts.sum(1, keepdim=True)  # before the product: a sum would overflow float16
        x = share.to(pixels.dtype) @ pixels
        num_background = self.background_grid[0] * self.background_grid[1]
        embed = torch.cat(
            (
                self.background_embed.expand(num_background, C),
                self.mask_embed.expand(x.shape[0] - num_background, C),
            )
        )
        weight = counts.log()  # -inf where a query has no pixel
        if points is not None:
            x = torch.cat((x, self.point_mlp(points.features.flatten(1))))
            embed = torch.cat((embed, self.point_embed.expand_as(points.position)))
            projected = [proj(points.features[:, level]) for level, proj in enumerate(self.point_proj)]
            pixels = torch.cat((pixels, torch.stack(projected, 1).flatten(0, 1)))  # [cells + 4*N_points, C]
            position = torch.cat((position, points.position.repeat_interleave(4, 0)))
            own = torch.eye(points.position.shape[0], device=x.device).repeat_interleave(4, 1).log()
            weight = torch.cat((
                F.pad(weight, (0, own.shape[1]), value=float("-inf")),
                F.pad(own, (weight.shape[1], 0), value=float("-inf")),
            ))  # fmt: skip
        shown = None if exist is None else self._shown(exist, masks.shape[0])
        x, embed, pixels, position = x[None], embed[None], pixels[None], position[None]
        for layer in self.layers:
            x = layer(x, embed, pixels, position, weight, shown)
        return x[0, :num_background], x[0, num_background:]

    def _shown(self, exist: Tensor, num_masks: int) -> Tensor:
        """Which queries others may look at [1, Q], from which objects exist."""
        background = exist.new_ones(self.background_grid[0] * self.background_grid[1])
        of_masks = exist[:num_masks, None].expand(-1, self.num_parts).flatten()
        return torch.cat((background, of_masks, exist[num_masks:]))[None]

    @staticmethod
    def look_up(features: Features, frame: Tensor, yx: Tensor, batch: int = 0) -> PointFeatures:
        """Features at points: frame [N] int64 of the clip, yx [N, 2] (y, x) in 0..1 of the padded image.

        Nearest cell of every level, half to even; a point on the far border reads the last cell.
        """

        def cell(size: int, coordinate: Tensor) -> Tensor:
            return (coordinate * size - 0.5).round().clamp(0, size - 1).long()

        maps = (*features.memory, features.mask_features)
        values = []
        for level in maps:
            row, column = cell(level.shape[-2], yx[:, 0]), cell(level.shape[-1], yx[:, 1])
            values.append(level[batch, frame, :, row, column])  # [N, C]
        h, w = features.mask_features.shape[-2:]
        code = encode_grid((h, w), values[0].shape[-1], yx.device, normalized=False).to(values[0].dtype)
        return PointFeatures(torch.stack(values, 1), code[row, column])


class ObjectLayer(nn.Module):
    """Self-attention among all objects, cross-attention to an object's own pixels, FFN; post-norm."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.self_attention = Attention(dim, num_heads)
        self.self_norm = nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, num_heads)
        self.cross_norm = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        embed: Tensor,
        pixels: Tensor,
        position: Tensor,
        weight: Tensor,
        shown: Tensor | None = None,
    ) -> Tensor:
        """x, embed [1, Q, C]; pixels, position [1, K, C]; weight [Q, K] is added to the attention logits.

        shown: [1, Q] bool, the queries that queries may look at; None: all.
        """
        x = self.self_norm(x + self.self_attention.self_attend(x, embed, shown))
        attention = self.cross_attention
        q = attention.heads(attention.project(x + embed, "q"))  # [1, A, Q, D]
        k = attention.heads(attention.project(pixels + position, "k"))  # [1, A, K, D]
        v = attention.heads(attention.project(pixels, "v"))
        out = attention.sdpa(q, k, v, attn_mask=weight.to(q.dtype))
        x = self.cross_norm(x + attention.merge(out))
        return self.ffn_norm(x + feed_forward(x, self.linear1, self.linear2))


def part_counts(masks: Tensor, num_parts: int) -> Tensor:
    """How many pixels of each stride-4 cell belong to each part of each mask: float32 [N * parts, T*H/4*W/4].

    A mask's pixels in raster order over (t, y, x) are cut into `num_parts` runs, as equal as can be, the
    longer ones first. A mask with fewer pixels than parts has its whole list repeated, a b c a b c .., until
    it is long enough; an empty one counts nothing.
    """
    N = masks.shape[0]
    flat = masks.flatten(1)  # [N, T*H*W]
    rank = flat.cumsum(1, dtype=torch.int32) - 1  # place of a pixel in its mask's list
    rank = torch.where(flat, rank, -2 * num_parts)  # far below every run
    pixels = (rank.amax(1, keepdim=True) + 1).clamp(min=1) if flat.shape[1] else rank.new_ones(N, 1)  # [N, 1]
    length = pixels * -(-num_parts // pixels)  # of the repeated list
    short, longer = length // num_parts, length % num_parts
    counts = []
    for part in range(num_parts):
        start = part * short + longer.clamp(max=part)
        run = short + (longer > part)
        start = start % pixels  # a run is never longer than the mask, so it wraps at most once
        end = start + run
        inside = ((rank >= start) & (rank < end)) | ((rank >= 0) & (rank < end - pixels))
        counts.append(_cells(inside.view(masks.shape)))
    return torch.stack(counts, 1).flatten(0, 1).flatten(1)


def background_counts(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pixels of each stride-4 cell that no mask covers, per cell of a grid over the image: [G, T*H/4*W/4].

    A pixel's grid row is floor(g * y / H). H and W are multiples of 64, so the borders of the published 4 x 4
    grid never cut a stride-4 cell.
    """
    T, H, W = masks.shape[1:]
    free = _cells(~masks.any(0))  # [T, H/4, W/4]
    row = torch.arange(H // 4, device=masks.device) * grid[0] // (H // 4)  # [H/4] row of the grid
    column = torch.arange(W // 4, device=masks.device) * grid[1] // (W // 4)
    place = row[:, None] * grid[1] + column  # [H/4, W/4]
    here = place == torch.arange(grid[0] * grid[1], device=masks.device)[:, None, None]  # [G, H/4, W/4]
    return (free * here[:, None]).flatten(1)


def _cells(masks: Tensor) -> Tensor:
    """Number of set pixels in each 4 x 4 block: [.., H, W] bool -> [.., H/4, W/4] float32."""
    blocks = masks.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 4))  # [.., H/4, 4, W/4, 4]
    return blocks.sum((-3, -1), dtype=torch.int32).float()
