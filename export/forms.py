"""Forms of attention that make good graphs; an exported copy of a network takes them in place of its own.

Packed attention bits, fused attention and in-place slices are good kernels and bad graphs. The forms here are
the same mathematics as MatMul, Where, Softmax and MatMul: no NaN guards, no ScatterND, no shifts of bytes,
and the pattern that TensorRT fuses. Deformable attention stays one node: see `export.functions`.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarvis.model.decoder import DecoderLayer
from tarvis.model.layers import Attention
from tarvis.model.neck import TemporalLayer
from tarvis.model.swin import WindowAttention

HIDDEN = -1e4
"""Attention logit of a key that is not seen: as good as -inf and finite in float16."""


def take_plain_forms(network: nn.Module) -> None:
    """Let a network compute attention by the forms of this module."""
    for module in network.modules():
        if isinstance(module, Attention | WindowAttention):
            module.sdpa = attention  # type: ignore[assignment]
        elif isinstance(module, DecoderLayer):
            module.attend = attend_to_visible  # type: ignore[method-assign]
        elif isinstance(module, TemporalLayer):
            module.attend = partial(attend_in_windows, module)  # type: ignore[method-assign]


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v with the softmax in float32; no row of the mask may be all hidden."""
    logits = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).float()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = torch.where(attn_mask, logits, HIDDEN)
    elif attn_mask is not None:
        logits = logits + attn_mask.float().clamp(min=HIDDEN)
    return logits.softmax(-1).to(v.dtype) @ v


def attend_to_visible(
    q: Tensor, keys: Tensor, values: Tensor, embedding: Tensor, mask_features: Tensor
) -> Tensor:
    """`DecoderLayer.attend` with booleans [B, Q, N] for bits. Half precision keeps a product's sign."""
    visible = (embedding @ mask_features) >= 0
    seen = visible.any(-1)
    return attention(q, keys, values, (visible | ~seen[..., None])[:, None])


def attend_in_windows(layer: TemporalLayer, x: Tensor, space: Tensor, time: Tensor) -> Tensor:
    """`TemporalLayer.attend` with the positions added to queries and keys out of place."""
    B, P, T, M, C = x.shape
    weight = layer.attention.weight("qk")
    space, time = (F.linear(code.to(weight.dtype), weight) for code in (space, time))  # [P, M, 2C], [T, 2C]
    position = space[:, None] + time[:, None]  # [P, T, M, 2C]
    qk = (layer.attention.project(x, "qk") + position).view(B * P, T * M, 2, layer.attention.num_heads, -1)
    q, k = qk.permute(2, 0, 3, 1, 4)
    v = layer.attention.heads(layer.attention.project(x, "v").view(B * P, T * M, C))
    return layer.attention.merge(attention(q, k, v)).view(B, P, T, M, C)
