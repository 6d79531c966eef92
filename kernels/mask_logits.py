"""Mask prediction (Cheng et al. 2022, Mask2Former): every query dotted with every pixel.

logits[b,q,t,y,x] = <query[b,q], features[b,t,:,y,x]>
"""

from __future__ import annotations

from torch import Tensor

from .dispatch import FLOATS, require, require_one_device


def mask_logits(query: Tensor, features: Tensor) -> Tensor:
    """Mask logits of queries.

    Args:
        query: [B, Q, C] float mask embeddings.
        features: [B, T, C, H, W] float mask features; channels last in memory saves a copy.

    Returns:
        [B, Q, T, H, W], in the dtype of the inputs (the autocast dtype under autocast). Differentiable.

    Raises:
        ValueError: shapes that do not fit together.
    """
    require("mask_logits", FLOATS, query=query, features=features)
    require_one_device("mask_logits", query, features)
    if query.ndim != 3 or features.ndim != 5 or query.shape[::2] != features.shape[:3:2]:
        raise ValueError(
            f"expected [B, Q, C] and [B, T, C, H, W], got {list(query.shape)} and {list(features.shape)}"
        )
    T, H, W = features.shape[1], features.shape[3], features.shape[4]
    pixels = features.permute(0, 1, 3, 4, 2).flatten(1, 3)  # [B, T*H*W, C], a view of channels last
    return (query @ pixels.transpose(1, 2)).unflatten(2, (T, H, W))
