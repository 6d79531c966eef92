"""The attention mask of masked attention (Cheng et al. 2022, Mask2Former, eq. 2), one bit a key.

    visible[b,q,n] = <query[b,q], features[b,:,n]>  >= 0

Thresholding a sigmoid at 0.5 is the sign of its argument, and resizing a mask commutes with the product
that makes it, so `features` are mask features already resized to the layer's scale, once per clip.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cuda
from .dispatch import FLOATS, Impl, require, unfit_dtype
from .operator import Operator, launcher


def mask_bits(query: Tensor, features: Tensor, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """Which keys each query may attend to.

    Args:
        query: [B, Q, C] float mask embeddings.
        features: [B, C, N] float mask features at the scale of the keys; any strides.
        impl: see `kernels.dispatch`. The kernels take the sign of a float32 sum, whatever the dtypes, so
            that implementations differ only where rounding turns a sum near zero.

    Returns:
        bits: [B, Q, 4 * ceil(N / 32)] uint8; key n is bit n % 8 of byte n // 8, 1 = visible. The length is
            padded with zeros so that the rows can be read as int32 words. A NaN is not visible.
        seen: [B, Q] bool; False where nothing is visible (such a query attends to everything).

        No gradient flows through either. Autocast leaves the kernels' inputs as they are.

    Raises:
        ValueError: shapes that do not fit together.
        RuntimeError: the implementation asked for cannot run.
    """
    require("mask_bits", FLOATS, query=query, features=features)
    if query.ndim != 3 or features.ndim != 3 or query.shape[::2] != features.shape[:2]:
        raise ValueError(
            f"expected [B, Q, C] and [B, C, N], got {list(query.shape)} and {list(features.shape)}"
        )
    query, features = query.detach(), features.detach()
    chosen = _operator.choose(impl, query, features)
    if chosen == "reference":
        return mask_bits_reference(query, features)
    return torch.ops.tarvis.mask_bits(query, features, chosen)


def mask_bits_reference(query: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Defines the operator. The product may run in half precision: rounding it keeps its sign."""
    dtype = torch.promote_types(query.dtype, features.dtype)
    visible = (query.to(dtype) @ features.to(dtype)) >= 0  # [B, Q, N]
    return pack_bits(visible), visible.any(-1)


def pack_bits(mask: Tensor) -> Tensor:
    """Booleans [.., N] as bytes [.., 4 * ceil(N / 32)], first key in the lowest bit."""
    missing = (mask.shape[-1] + 31) // 32 * 32 - mask.shape[-1]
    padded = F.pad(mask.to(torch.uint8), (0, missing)).unflatten(-1, (-1, 8))
    place = torch.arange(8, dtype=torch.uint8, device=mask.device)  # made there: a copy would synchronise
    return (padded << place).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, num_keys: int) -> Tensor:
    """Bytes [.., M] as booleans [.., num_keys]: the inverse of `pack_bits`."""
    key = torch.arange(num_keys, device=bits.device)  # a gather, since cutting off the padding would trace
    return (bits.index_select(-1, key // 8) >> (key % 8).to(torch.uint8) & 1).bool()  # only for fixed sizes


def _unfit(query: Tensor, features: Tensor) -> str:
    too_large = query.shape[1:].numel() >= 2**31
    return unfit_dtype(query, features) or (
        "its kernels take fewer than 2^31 values of queries a batch entry" if too_large else ""
    )


_operator = Operator(
    "mask_bits",
    mask_bits_reference,
    _cuda.empty_bits,
    triton=launcher("mask_bits.forward"),
    cuda=_cuda.mask_bits,
    unfit=_unfit,
)
