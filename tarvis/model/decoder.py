"""Masked transformer decoder with its mask and class heads (paper, section 3.3; Cheng et al. 2022).

What a straightforward decoder does in every layer is done once a clip here: mask features are pooled to the
three key scales, so that attention masks need no full-resolution logits (resizing and the dot product
commute); keys and values of the layers that share a scale come from one product; position terms are
projected per place, not per key.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarvis.model.layers import MLP, Attention, encode_grid, encode_time, feed_forward, recomputable
from tarvis.operators import mask_bits, masked_attention
from tarvis.structures import Features, Prediction, Queries

SCALES = 3
"""Layers take their keys from strides 32, 16, 8, 32, ... in turn."""

GROUPS = ("background", "semantic", "background_vos", "vos", "instance", "free")
"""Query groups with a mask head; "free" exists in the published weights but is unused."""


class Scale(NamedTuple):
    """What the decoder layers of one scale look at; N = T*h*w keys in (t, y, x) order."""

    keys: Tensor  # [layers, B, A, N, D]
    values: Tensor  # [layers, B, A, N, D]
    mask_features: Tensor  # [B, C, N]


class MaskedDecoder(nn.Module):
    """Queries ask the memory; heads turn them into mask embeddings and class logits."""

    def __init__(
        self,
        dim: int = 256,
        num_heads: int = 8,
        num_layers: int = 9,
        ffn_dim: int = 2048,
        *,
        soft: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, num_heads, ffn_dim, soft) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.scale_embed = nn.Parameter(torch.randn(SCALES, dim))
        self.mask_embeds = nn.ModuleDict({group: MLP(dim, dim, dim, 3) for group in GROUPS})
        self.proj_layers = nn.ModuleDict({group: nn.Linear(dim, dim) for group in GROUPS if group != "free"})

    def forward(self, features: Features, queries: Queries, *, all_layers: bool = False) -> Prediction:
        """Prediction after the last layer; with `all_layers` the earlier ones stand in its `layers`."""
        scales = [self.project(features, index) for index in range(SCALES)]
        x, position, groups = queries.content, queries.position, queries.groups
        earlier = []
        for i, layer in enumerate(self.layers):
            scale, turn = scales[i % SCALES], i // SCALES
            embedding = self.mask_embedding(self.norm(x), groups)  # [B, Q, C]
            if all_layers:
                earlier.append(self.predict(x, embedding, features, groups))
            x = layer(x, position, scale.keys[turn], scale.values[turn], embedding, scale.mask_features)
        embedding = self.mask_embedding(self.norm(x), groups)
        return self.predict(x, embedding, features, groups, tuple(earlier))

    def project(self, features: Features, index: int) -> Scale:
        """Keys, values and mask features of one scale, for all layers that use it."""
        memory = features.memory[index]
        B, T, C, h, w = memory.shape
        attentions = [cast(DecoderLayer, layer).cross_attention for layer in self.layers[index::SCALES]]
        key_weight = torch.cat([a.weight("k") for a in attentions])  # [layers * C, C]
        value_weight = torch.cat([a.weight("v") for a in attentions])
        # the scale embedding is part of keys and values, the position of keys only
        embed = self.scale_embed[index]
        grid = encode_grid((h, w), C, memory.device).to(memory.dtype) + embed  # [h, w, C]
        time = encode_time(T, C, memory.device).to(memory.dtype)
        key_bias = torch.cat([a.bias("k") for a in attentions])
        value_bias = torch.cat([a.bias("v") for a in attentions]) + F.linear(embed, value_weight)
        tokens = memory.permute(0, 1, 3, 4, 2)  # [B, T, h, w, C]
        keys = F.linear(tokens, key_weight)
        keys += F.linear(grid, key_weight, key_bias)
        keys += F.linear(time, key_weight)[:, None, None]
        values = F.linear(tokens, value_weight, value_bias)
        heads = (len(attentions), attentions[0].num_heads, -1)
        return Scale(
            keys.flatten(1, 3).unflatten(-1, heads).permute(2, 0, 3, 1, 4),
            values.flatten(1, 3).unflatten(-1, heads).permute(2, 0, 3, 1, 4),
            pool_mask_features(features.mask_features, (h, w)),
        )

    def mask_embedding(self, x: Tensor, groups: dict[str, int]) -> Tensor:
        """Normalised queries [B, Q, C] -> what is dotted with mask features; every group has its own MLP."""
        parts = x.split(list(groups.values()), 1)
        return torch.cat([self.mask_embeds[g](part) for g, part in zip(groups, parts, strict=True)], 1)

    def predict(
        self,
        x: Tensor,
        embedding: Tensor,
        features: Features,
        groups: dict[str, int],
        earlier: tuple[Prediction, ...] = (),
    ) -> Prediction:
        """Mask embedding and, where the groups have classes, class logits of queries x [B, Q, C]."""
        class_logits = self.class_logits(self.norm(x), groups)
        return Prediction(x, embedding, features.mask_features, class_logits, groups, earlier)

    def class_logits(self, x: Tensor, groups: dict[str, int]) -> Tensor | None:
        """Instance queries dotted with background (best of them) and classes, [B, Q_instance, 1 + K]."""
        if "semantic" not in groups:
            return None
        parts = dict(zip(groups, x.split(list(groups.values()), 1), strict=True))
        instance, background, semantic = (
            self.proj_layers[group](parts[group]) for group in ("instance", "background", "semantic")
        )
        nothing = (instance @ background.transpose(1, 2)).amax(-1, keepdim=True)  # [B, Q, 1]
        return torch.cat((nothing, instance @ semantic.transpose(1, 2)), -1)


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention over the queries of all groups, FFN; post-norm."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, soft: bool) -> None:
        super().__init__()
        self.soft = soft
        self.cross_attention = Attention(dim, num_heads)
        self.cross_norm = nn.LayerNorm(dim)
        self.self_attention = Attention(dim, num_heads)
        self.self_norm = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)

    @recomputable
    def forward(
        self,
        x: Tensor,
        position: Tensor,
        keys: Tensor,
        values: Tensor,
        embedding: Tensor,
        mask_features: Tensor,
    ) -> Tensor:
        """x, position, embedding [B, Q, C]; keys, values [B, A, N, D]; mask_features [B, C, N]."""
        attention = self.cross_attention
        q = attention.heads(attention.project(x + position, "q"))  # [B, A, Q, D]
        if self.soft:
            mask = soft_mask(embedding, mask_features, attention.num_heads)
            out = attention.sdpa(q, keys, values, attn_mask=mask.to(q.dtype))
        else:
            out = self.attend(q, keys, values, embedding, mask_features)
        x = self.cross_norm(x + attention.merge(out))
        x = self.self_norm(x + self.self_attention.self_attend(x, position))
        out = self.ffn_norm(x + feed_forward(x, self.linear1, self.linear2))
        return out

    @staticmethod  # exported copies have another form: `export.forms`
    def attend(q: Tensor, keys: Tensor, values: Tensor, embedding: Tensor, mask_features: Tensor) -> Tensor:
        """Attention to the keys that a query's own mask shows, [B, A, Q, D]."""
        return masked_attention(q, keys, values, *mask_bits(embedding, mask_features))


def soft_mask(embedding: Tensor, mask_features: Tensor, num_heads: int) -> Tensor:
    """What soft attention adds to attention logits, [B, A, Q, N]: the mask, scaled per head. No gradient."""
    mask = (embedding.detach() @ mask_features.detach()).float().sigmoid()  # [B, Q, N]
    return mask[:, None] * soft_factors(num_heads, mask.device)[:, None, None]


def soft_factors(num_heads: int, device: torch.device | None = None) -> Tensor:
    """How strongly each head follows the predicted mask: 32, 32, 16, 16, 8, 8, 4, 4 for the published 8."""
    return 2.0 ** (5 - 4 * torch.arange(num_heads, device=device) // num_heads)


def pool_mask_features(mask_features: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask features [B, T, C, H, W] at the coarser size (h, w), [B, C, T*h*w]; H/h = W/w is even.

    Bilinear down-sampling without antialiasing by an even factor is the mean of the 2 x 2 central pixels of
    every factor x factor block.
    """
    h, w = size
    low = mask_features.shape[-1] // w // 2 - 1
    pixels = mask_features.permute(0, 1, 3, 4, 2)  # [B, T, H, W, C]: channels last, as they lie in memory
    blocks = pixels.unflatten(3, (w, -1)).unflatten(2, (h, -1))  # [B, T, h, factor, w, factor, C]
    rows = blocks[:, :, :, low] + blocks[:, :, :, low + 1]  # [B, T, h, w, factor, C]
    pooled = (rows[..., low, :] + rows[..., low + 1, :]) * 0.25  # [B, T, h, w, C]
    return pooled.flatten(1, 3).transpose(1, 2)
