"""Cross-attention that reads a bit per (query, key) (Cheng et al. 2022, Mask2Former, eq. 1).

    out = softmax(q k^T / sqrt(D) + m) v,  m = 0 where visible or where the query sees nothing, else -inf

The mask is shared by all heads. A query that sees no key at all attends to every key.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.mask_bits import unpack_bits


def masked_attention(q: Tensor, k: Tensor, v: Tensor, bits: Tensor, seen: Tensor) -> Tensor:
    """Masked multi-head cross-attention.

    Args:
        q: [B, A, Q, D] float, any strides.
        k: [B, A, N, D].
        v: [B, A, N, D].
        bits: [B, Q, 4 * ceil(N / 32)] uint8, as `mask_bits` gives them.
        seen: [B, Q] bool, False for queries without a visible key.

    Returns:
        [B, A, Q, D] in the dtype of `q` (the autocast dtype under autocast). The mask has no gradient.

    Raises:
        ValueError: bits of another length than the keys need.
    """
    words = -(-k.shape[2] // 32)
    if bits.shape[-1] != 4 * words:
        raise ValueError(f"expected {4 * words} bytes a query for {k.shape[2]} keys, got {bits.shape[-1]}")
    return masked_attention_reference(q, k, v, bits, seen)


def masked_attention_reference(q: Tensor, k: Tensor, v: Tensor, bits: Tensor, seen: Tensor) -> Tensor:
    """Defines the operator."""
    visible = unpack_bits(bits, k.shape[2]) | ~seen[..., None]  # [B, Q, N]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None])
