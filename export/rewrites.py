"""What takes the place of some functions of the model while it is traced for ONNX.

Packed attention bits, fused attention and in-place slices are good kernels and bad graphs. The forms here are
the same mathematics as MatMul, Where, Softmax and MatMul: no NaN guards, no ScatterND, no shifts of bytes,
and the pattern that TensorRT fuses. Deformable attention stays one node: see `export.functions`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tarvis.model import decoder
from tarvis.model.neck import TemporalLayer

HIDDEN = -1e4
"""Attention logit of a key that is not seen: as good as -inf and finite in float16."""


def plain_forms() -> AbstractContextManager[None]:
    """The model with these forms while the block runs."""
    return replaced(
        (F, "scaled_dot_product_attention", attention),
        (decoder, "mask_bits", visible_keys),
        (decoder, "masked_attention", masked_attention),
        (TemporalLayer, "attend", attend_in_windows),
    )


@contextmanager
def replaced(*attributes: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes (owner, name, replacement) while the block runs; not for several threads at once."""
    with ExitStack() as stack:
        for owner, name, replacement in attributes:
            if name in vars(owner):
                stack.callback(setattr, owner, name, vars(owner)[name])
            else:  # it comes with the owner's class
                stack.callback(delattr, owner, name)
            setattr(owner, name, replacement)
        yield


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v with the softmax in float32; no row of the mask may be all hidden."""
    logits = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).float()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = torch.where(attn_mask, logits, HIDDEN)
    elif attn_mask is not None:
        logits = logits + attn_mask.float().clamp(min=HIDDEN)
    return logits.softmax(-1).to(v.dtype) @ v


def visible_keys(query: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.mask_bits` with booleans for bits: [B, Q, N] and [B, Q]. Half precision keeps the sign."""
    visible = (query @ features) >= 0
    return visible, visible.any(-1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, seen: Tensor) -> Tensor:
    """`kernels.masked_attention` of what `visible_keys` gives."""
    return attention(q, k, v, (visible | ~seen[..., None])[:, None])


def attend_in_windows(self: Any, x: Tensor, space: Tensor, time: Tensor) -> Tensor:
    """`TemporalLayer.attend` with the positions added to queries and keys out of place."""
    B, P, T, M, C = x.shape
    weight = self.attention.weight("qk")
    space, time = (F.linear(code.to(weight.dtype), weight) for code in (space, time))  # [P, M, 2C], [T, 2C]
    position = space[:, None] + time[:, None]  # [P, T, M, 2C]
    qk = (self.attention.project(x, "qk") + position).view(B * P, T * M, 2, self.attention.num_heads, -1)
    q, k = qk.permute(2, 0, 3, 1, 4)
    v = self.attention.heads(self.attention.project(x, "v").view(B * P, T * M, C))
    return self.attention.merge(attention(q, k, v)).view(B, P, T, M, C)
