"""Multi-scale deformable attention (Zhu et al. 2021, Deformable DETR, eq. 3) from raw offsets and logits.

    out[b,q,a] = sum over l,p of softmax(logit[b,q,a])[l,p] * bilinear(value_l[b,:,a], x[b,q,a,l,p])
    x = ref[b,q,l] * size_l - 0.5 + offset[b,q,a,l,p]

Letters: B batch, S = sum of H*W over levels, Q queries, A heads, D channels a head, L levels, P points.

The usual operator takes normalised locations and finished weights. This one takes what the linear layers
give: offsets in pixels of the level they address, and logits. The reference point is added inside in
float32, so that half precision costs 1/64 of a pixel and not the half pixel it costs on a location near 1;
and neither locations nor weights are written to memory by a fused implementation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn(
    value: Tensor,
    offset: Tensor,
    logit: Tensor,
    shapes: Sequence[tuple[int, int]],
    ref: Tensor | None = None,
) -> Tensor:
    """Weighted sum of bilinear samples from every level.

    Args:
        value: [B, S, A, D] float; the levels' maps, each row-major, one after the other.
        offset: [B, Q, A, L, P, 2] float, (x, y) in pixels of level l.
        logit: [B, Q, A, L, P] float; softmax is taken over all L*P.
        shapes: (height, width) of each level.
        ref: [B or 1, Q, L or 1, 2] float32, (x, y) in 0..1. None: query q sits at the centre of cell q
            (encoder self-attention; needs Q == S).

    Returns:
        [B, Q, A*D] in the dtype of `value`, accumulated in float32 (float64 stays float64). Samples outside
        a level count as zero; cell centres are at (i + 0.5) / size.

    Raises:
        ValueError: shapes that do not fit together.
    """
    B, S, A, D = value.shape
    L, P = logit.shape[-2:]
    cells = sum(h * w for h, w in shapes)
    if cells != S:
        raise ValueError(f"value has {S} cells, but levels {list(shapes)} have {cells}")
    if len(shapes) != L or offset.shape != (*logit.shape, 2) or logit.shape[0] != B or logit.shape[2] != A:
        raise ValueError(
            f"expected offset [{B}, Q, {A}, {len(shapes)}, P, 2] and logit [{B}, Q, {A}, {len(shapes)}, P], "
            f"got {list(offset.shape)} and {list(logit.shape)}"
        )
    if ref is None:
        if logit.shape[1] != S:
            raise ValueError(f"without ref every cell is a query: expected {S} queries, got {logit.shape[1]}")
        ref = cell_centres(shapes, value.device)
    if value.device.type == "cpu" and B > 1 and not torch.compiler.is_compiling():
        # entry by entry the working set stays in the cache: 80 -> 70 ms for 6 frames of 256x448, less memory
        entries = zip(
            value.split(1), offset.split(1), logit.split(1), ref.expand(B, -1, -1, -1).split(1), strict=True
        )
        return torch.cat([ms_deform_attn_reference(v, o, w, shapes, r) for v, o, w, r in entries])
    return ms_deform_attn_reference(value, offset, logit, shapes, ref)


def cell_centres(shapes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Centres (x, y) in 0..1 of all cells of all levels, [1, S, 1, 2]."""
    levels = []
    for h, w in shapes:
        y = (torch.arange(h, device=device, dtype=torch.float32) + 0.5) / h
        x = (torch.arange(w, device=device, dtype=torch.float32) + 0.5) / w
        levels.append(torch.stack((x.expand(h, w), y[:, None].expand(h, w)), -1).flatten(0, 1))  # [h*w, 2]
    return torch.cat(levels)[None, :, None]


def ms_deform_attn_reference(
    value: Tensor, offset: Tensor, logit: Tensor, shapes: Sequence[tuple[int, int]], ref: Tensor
) -> Tensor:
    """Defines the operator: a gather of rows with weights, 4 per sample, summed per (query, head).

    `embedding_bag` is exactly that sum, without samples [.., P, D] in memory and without the channels-first
    copies that grid_sample wants. Samples lead and (batch, query, head) is the long last dimension, R, so
    that the elementwise work runs over contiguous rows; levels go one by one to keep memory low.
    """
    B, S, A, D = value.shape
    Q, L, P = logit.shape[1], logit.shape[3], logit.shape[4]
    R = B * Q * A
    exact = torch.float64 if value.dtype == torch.float64 else torch.float32
    table = value.to(exact).reshape(B * S * A, D)
    attention = logit.to(exact).flatten(3).softmax(-1).view(R, L, P)
    batch = torch.arange(B, device=value.device, dtype=torch.int32)[:, None, None] * (S * A)
    head = torch.arange(A, device=value.device, dtype=torch.int32)
    first = (batch + head).expand(B, Q, A).reshape(R)  # row of the first cell in the table
    out = None
    for level, (h, w) in enumerate(shapes):
        centre = ref[:, :, min(level, ref.shape[2] - 1), None].to(exact)  # [B or 1, Q, 1, 2]
        shift = offset[:, :, :, level].to(exact).reshape(R, P * 2).t().reshape(P, 2, R)
        x = shift[:, 0] + (centre[..., 0] * w - 0.5).expand(B, Q, A).reshape(R)  # [P, R]
        y = shift[:, 1] + (centre[..., 1] * h - 0.5).expand(B, Q, A).reshape(R)
        by_sample = attention[:, level].t().contiguous()  # [P, R]
        columns = _neighbours(x, w)
        rows, weights = [], []
        for row, weight_y in _neighbours(y, h):
            weight_y = weight_y * by_sample
            for column, weight_x in columns:
                rows.append((row * w + column).to(torch.int32) * A + first)
                weights.append(weight_y * weight_x)
        first = first + h * w * A
        part = F.embedding_bag(
            torch.cat(rows).t().contiguous(),  # [R, 4*P]
            table,
            per_sample_weights=torch.cat(weights).t().contiguous(),
            mode="sum",
        )  # [R, D]
        out = part if out is None else out + part
    assert out is not None
    return out.view(B, Q, A * D).to(value.dtype)


def _neighbours(x: Tensor, size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The cells left and right of pixel coordinate x [..], each with its weight; outside cells weigh 0."""
    low = x.floor()
    fraction = x - low
    # comparisons are false for NaN too, so that an index is always valid
    at_low, at_high = (low >= 0) & (low < size), (low >= -1) & (low < size - 1)
    return (
        (torch.where(at_low, low, 0), torch.where(at_low, 1 - fraction, 0)),
        (torch.where(at_high, low + 1, 0), torch.where(at_high, fraction, 0)),
    )
