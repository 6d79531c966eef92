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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _cuda
from .dispatch import FLOATS, Impl, require, unfit_dtype
from .operator import Operator, differentiate, launcher

Shapes = Sequence[tuple[int, int]]

_PIECE = 1 << 14  # (query, head) pairs that a CPU takes at once


def ms_deform_attn(
    value: Tensor,
    offset: Tensor,
    logit: Tensor,
    shapes: Shapes,
    ref: Tensor | None = None,
    *,
    points: Sequence[int] | None = None,
    impl: Impl = "auto",
    deterministic: bool | None = None,
) -> Tensor:
    """Weighted sum of bilinear samples from every level.

    Args:
        value: [B, S, A, D] float; the levels' maps, each row-major, one after the other.
        offset: [B, Q, A, L, P, 2] float, (x, y) in pixels of level l.
        logit: [B, Q, A, L, P] float; softmax is taken over all L*P.
        shapes: (height, width) of each level.
        ref: [B or 1, Q, L or 1, 2] float32, (x, y) in 0..1. None: query q sits at the centre of cell q
            (encoder self-attention; needs Q == S).
        points: numbers of points of the levels, where they differ; then `offset` is [B, Q, A, N, 2] and
            `logit` [B, Q, A, N], level after level, with N = sum of `points`. All levels cost as much as
            the one with the most.
        impl: see `kernels.dispatch`. The kernels take D = 16, 32 or 64, up to four levels, L*P <= 32,
            float32, float16 and bfloat16 in any mixture, and rows of `value`, `offset` and `logit` (their
            first two dimensions) at any stride, so that these may be slices of one product. (Rows of
            `value` that do not start at multiples of 16 numbers are copied.)
        deterministic: whether gradients are equal bit by bit from run to run; otherwise the kernels sum
            the gradient of `value` by atomics. None: as torch.use_deterministic_algorithms says.

    Returns:
        [B, Q, A*D] in the dtype of `value`, accumulated in float32 (float64 stays float64). Samples outside
        a level and those whose place is not finite count as zero; cell centres are at (i + 0.5) / size.
        Differentiable once, in all four tensors (in `ref` from the gradient of `offset`, in its dtype). At
        a cell's centre, where interpolation has a kink, the derivative is that towards the next cell: at
        x = -1 it is what the first cell holds, at x = size - 1 minus what the last holds, at x = size zero.
        Autocast leaves dtypes as they are.

    Raises:
        ValueError: shapes or dtypes that do not fit together, tensors on different devices.
        RuntimeError: the implementation asked for cannot run.
    """
    require("ms_deform_attn", FLOATS, value=value, offset=offset, logit=logit, ref=ref)
    if points is not None:
        offset, logit = by_level(offset, logit, points, classic=False)
    if value.ndim != 4 or logit.ndim != 5:
        raise ValueError(
            f"expected value [B, S, A, D] and logit [B, Q, A, L, P], "
            f"got {list(value.shape)} and {list(logit.shape)}"
        )
    B, S, A, D = value.shape
    L, P = logit.shape[-2:]
    check_levels(value, logit, shapes)
    if len(shapes) != L or offset.shape != (*logit.shape, 2) or logit.shape[0] != B or logit.shape[2] != A:
        raise ValueError(
            f"expected offset [{B}, Q, {A}, {len(shapes)}, P, 2] and logit [{B}, Q, {A}, {len(shapes)}, P], "
            f"got {list(offset.shape)} and {list(logit.shape)}"
        )
    Q = logit.shape[1]
    if ref is None:
        if Q != S:
            raise ValueError(f"without ref every cell is a query: expected {S} queries, got {Q}")
    elif ref.ndim != 4 or any(
        n != size and n != wide  # not `in`: torch.compile answers wrongly for sizes that are symbols
        for n, size, wide in zip(ref.shape, (B, Q, L, 2), (1, Q, 1, 2), strict=True)
    ):
        raise ValueError(f"expected ref [{B} or 1, {Q}, {L} or 1, 2], got {list(ref.shape)}")
    return deformable(
        value, offset, logit, shapes, ref, classic=False, deterministic=deterministic, impl=impl
    )


def by_level(offset: Tensor, logit: Tensor, points: Sequence[int], *, classic: bool) -> tuple[Tensor, Tensor]:
    """[B, Q, A, N, 2] and [B, Q, A, N] as [B, Q, A, L, P, 2] and [B, Q, A, L, P], P the most of a level.

    What is added lies outside of the level and has no weight.
    """
    N = sum(points)
    if (
        min(points, default=0) < 1
        or logit.ndim != 4
        or logit.shape[3] != N
        or offset.shape != (*logit.shape, 2)
    ):
        names = ("sampling_locations", "attention_weights") if classic else ("offset", "logit")
        raise ValueError(
            f"for points {list(points)} expected {names[0]} [B, Q, A, {N}, 2] and {names[1]} [B, Q, A, {N}], "
            f"got {list(offset.shape)} and {list(logit.shape)}"
        )
    most = max(points)
    if most * len(points) == N:
        return offset.unflatten(3, (-1, most)), logit.unflatten(3, (-1, most))
    outside, nothing = -1e4, 0.0 if classic else float("-inf")  # both finite in half precision, or exact
    offsets = [F.pad(x, (0, 0, 0, most - x.shape[3]), value=outside) for x in offset.split([*points], 3)]
    logits = [F.pad(x, (0, most - x.shape[3]), value=nothing) for x in logit.split([*points], 3)]
    return torch.stack(offsets, 3), torch.stack(logits, 3)


def check_levels(value: Tensor, logit: Tensor, shapes: Shapes) -> None:
    """What both forms of the operator ask of levels."""
    if not shapes or any(h < 1 or w < 1 for h, w in shapes) or logit.shape[-1] == 0:
        raise ValueError(
            f"expected levels and points, got levels {list(shapes)} and {logit.shape[-1]} points in each"
        )
    cells = sum(h * w for h, w in shapes)
    if cells != value.shape[1]:
        raise ValueError(f"value has {value.shape[1]} cells, but levels {list(shapes)} have {cells}")


def deformable(
    value: Tensor,
    offset: Tensor,
    logit: Tensor,
    shapes: Shapes,
    ref: Tensor | None,
    *,
    classic: bool,
    deterministic: bool | None,
    impl: Impl,
) -> Tensor:
    """Chooses and runs, for inputs that are already checked.

    In `classic` form `offset` holds locations in 0..1 of the level (x = offset * size - 0.5), `logit`
    finished weights (no softmax), and there is no `ref`.
    """
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    sizes = [side for shape in shapes for side in shape]
    inputs = (value, offset, logit, ref, sizes, classic, deterministic)
    chosen = _forward.choose(impl, *inputs)
    return _plain(*inputs) if chosen == "reference" else _forward.run(*inputs, chosen)


def _unfit(value: Tensor, offset: Tensor, logit: Tensor, ref: Tensor | None, *_: Any) -> str:
    S, A, D = value.shape[1:]
    L, P = logit.shape[-2:]
    if D not in (16, 32, 64):
        return f"its kernels take 16, 32 or 64 channels a head, not {D}"
    if not (1 <= L <= 4 and 1 <= L * P <= 32):
        return f"its kernels take 1 to 4 levels and up to 32 points in all, not {L} levels of {P}"
    if S * A * D >= 2**31:
        return f"its kernels take fewer than 2^31 values a batch entry, not {S * A * D}"
    return unfit_dtype(value, offset, logit, ref)


def cell_centres(shapes: Shapes, device: torch.device) -> Tensor:
    """Centres (x, y) in 0..1 of all cells of all levels, [1, S, 1, 2]."""
    levels = []
    for h, w in shapes:
        y = (torch.arange(h, device=device, dtype=torch.float32) + 0.5) / h
        x = (torch.arange(w, device=device, dtype=torch.float32) + 0.5) / w
        levels.append(torch.stack((x.expand(h, w), y[:, None].expand(h, w)), -1).flatten(0, 1))  # [h*w, 2]
    return torch.cat(levels)[None, :, None]


def ms_deform_attn_reference(
    value: Tensor,
    offset: Tensor,
    logit: Tensor,
    shapes: Shapes,
    ref: Tensor | None,
    classic: bool = False,
) -> Tensor:
    """Defines the operator: a gather of rows with weights, 4 per sample, summed per (query, head).

    `embedding_bag` is exactly that sum, without samples [.., P, D] in memory and without the channels-first
    copies that grid_sample wants. What is left is to make indices and weights, in passes over [B, Q, A, P]
    that all vectorise; levels go one by one to keep memory low.
    """
    B, S, A, D = value.shape
    Q, L, P = logit.shape[1], logit.shape[3], logit.shape[4]
    R = B * Q * A
    exact = torch.float64 if value.dtype == torch.float64 else torch.float32
    attention = logit.to(exact)
    if not classic:
        # the last dimension is too short for softmax to vectorise: 13 -> 2 ms for 68040 rows of 12, with copy
        attention = attention.reshape(R, L * P).t().contiguous().softmax(0).t().view(B, Q, A, L, P)
    batch = torch.arange(B, device=value.device, dtype=torch.int32)[:, None]
    head = torch.arange(A, device=value.device, dtype=torch.int32)
    out = None
    # split and unbind, since the gradient of each slice would be as large as what it is cut from
    levels = zip(
        shapes, value.split([h * w for h, w in shapes], 1), offset.unbind(3), attention.unbind(3), strict=True
    )
    for level, ((h, w), cells, moved, share) in enumerate(levels):
        x, y = moved.to(exact).unbind(-1)  # [B, Q, A, P]
        if ref is None:
            x, y = x * w - 0.5, y * h - 0.5
        else:
            centre = ref[:, :, min(level, ref.shape[2] - 1), None, None].to(exact)  # [B or 1, Q, 1, 1, 2]
            x, y = x + (centre[..., 0] * w - 0.5), y + (centre[..., 1] * h - 0.5)
        # row of the first cell in the table; repeated, so that adding it runs over A*P values at once
        first = (batch * (h * w * A) + head)[:, None, :, None].expand(B, 1, A, P).contiguous()
        columns = [(column * A + first, weight) for column, weight in _neighbours(x, w)]
        rows = [(row * (w * A), weight * share) for row, weight in _neighbours(y, h)]
        index = torch.cat([row + column for row, _ in rows for column, _ in columns], -1).view(R, 4 * P)
        weight = torch.cat([a * b for _, a in rows for _, b in columns], -1).view(R, 4 * P)
        table = cells.to(exact).reshape(B * h * w * A, D)
        if _backward_is_ours(table):
            low_x, low_y = (_low(side, size) for side, size in ((x, w), (y, h)))
            patch = ((batch[..., None, None] * (h + 1) + low_y) * (w + 1) + low_x) * A + head[:, None]
            part = _Bags.apply(table.view(B, h, w, A, D), weight, index, patch.view(R, P))
        else:
            part = F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")  # [R, D]
        out = part if out is None else out + part
    assert out is not None
    return out.view(B, Q, A * D).to(value.dtype)


def _neighbours(x: Tensor, size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The cells left and right of pixel coordinate x [..] as int32, each with its weight; outside weighs 0.

    Masks are arithmetic here: torch.where does not vectorise on a CPU and takes seven times an addition. They
    are zero at both bounds, so that no gradient depends on what clamp's is there.
    """
    x = x.nan_to_num(-2).clamp(-2, size)  # beyond that nothing changes, but an index must stay valid
    low = x.detach().floor()  # in -2..size
    high = low + 1
    fraction = x - low
    low_inside, high_inside = low.clamp(0, size - 1), high.clamp(0, size - 1)  # the same, or up to 2 off
    return (
        (low_inside.to(torch.int32), (1 - fraction) * (1 - (low - low_inside).abs()).clamp(min=0)),
        (high_inside.to(torch.int32), fraction * (1 - (high - high_inside).abs()).clamp(min=0)),
    )


def _low(x: Tensor, size: int) -> Tensor:
    """The cell left of pixel coordinate x, counted from 1, as int32; 0 is what lies outside."""
    return (x.detach().nan_to_num(-1).clamp(-1, size - 1).floor() + 1).to(torch.int32)


def _backward_is_ours(table: Tensor) -> bool:
    wanted = torch.is_grad_enabled() and table.requires_grad and table.device.type == "cpu"
    # AOTAutograd and torch.func take no function of ours; Dynamo does
    traced = torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
    return wanted and not traced and not torch._C._are_functorch_transforms_active()


class _Bags(torch.autograd.Function):
    """`embedding_bag` of weighted rows, with a backward pass made for four neighbouring cells a sample.

    That of embedding_bag sorts all indices. Here samples are sorted by their patch of 2 x 2 cells, a quarter
    as many, and each corner of a patch is then a bag of gradients: 300 -> 140 ms of CPU time for 3x256x448.

    table [B, h, w, A, D]; weight, index [R, 4 * P], corners (top, left), (top, right), .. one after the
    other; patch [R, P]: which of B * (h + 1) * (w + 1) * A patches, of which those at the border lie half
    outside.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, weight: Tensor, index: Tensor, patch: Tensor) -> Tensor:
        ctx.save_for_backward(table, weight, index, patch)
        return F.embedding_bag(index, table.flatten(0, -2), per_sample_weights=weight, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, weight, index, patch = ctx.saved_tensors
        grad = grad.contiguous()
        grad_table = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_table = _scatter(grad, weight, patch, table.shape)
        if ctx.needs_input_grad[1]:
            R, N = weight.shape
            starts = torch.arange(0, R * N, N, dtype=index.dtype, device=index.device)
            run = torch.ops.aten._embedding_bag_per_sample_weights_backward
            grad_weight = run(
                grad, table.flatten(0, -2), index.flatten(), starts, index.new_empty(0), 0
            ).view(R, N)
        return grad_table, grad_weight, None, None


def _scatter(grad: Tensor, weight: Tensor, patch: Tensor, shape: Sequence[int]) -> Tensor:
    """The gradient of the table, in its shape, from that of the sums, [R, D]."""
    B, h, w, A, D = shape
    P = patch.shape[1]
    ordered, order = patch.flatten().sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(B * (h + 1) * (w + 1) * A, dtype=ordered.dtype))
    rows = order.div(P, rounding_mode="floor")
    out = grad.new_zeros(B, h, w, A, D)
    corners = [(top, left) for top in (slice(1, None), slice(h)) for left in (slice(1, None), slice(w))]
    for (top, left), share in zip(corners, weight.split(P, 1), strict=True):
        share = share.flatten()[order]
        bags = F.embedding_bag(rows, grad, starts, per_sample_weights=share, mode="sum")
        out += bags.view(B, h + 1, w + 1, A, D)[:, top, left]
    return out


def _plain(
    value: Tensor,
    offset: Tensor,
    logit: Tensor,
    ref: Tensor | None,
    shapes: Sequence[int],
    classic: bool,
    deterministic: bool,
) -> Tensor:
    """The reference, as it is fastest."""
    levels = _levels(shapes)
    if ref is None and not classic:
        ref = cell_centres(levels, value.device)
    if value.device.type == "cpu" and logit.numel() and not torch.compiler.is_compiling():
        return _in_pieces(value, offset, logit, levels, ref, classic)
    return ms_deform_attn_reference(value, offset, logit, levels, ref, classic)


def _in_pieces(
    value: Tensor, offset: Tensor, logit: Tensor, shapes: Shapes, ref: Tensor | None, classic: bool
) -> Tensor:
    """The reference by pieces that stay in a CPU's cache: 59 -> 48 ms of CPU time for 480x864, less memory.

    Where gradients flow, a piece is a whole batch entry: each brings a gradient as large as its values.
    """
    B, Q, A = logit.shape[:3]
    tensors = (value, offset, logit) if ref is None else (value, offset, logit, ref)
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    step = Q if tracked else max(1, _PIECE // A)
    centres = [None] * B if ref is None else ref.expand(B, -1, -1, -1).split(1)
    out = []
    for cells, *entry, centre in zip(value.split(1), offset.split(1), logit.split(1), centres, strict=True):
        around = [None] * -(-Q // step) if centre is None else centre.split(step, 1)
        for moved, attention, place in zip(*(x.split(step, 1) for x in entry), around, strict=True):
            out.append(ms_deform_attn_reference(cells, moved, attention, shapes, place, classic))
    return torch.cat(out, 1).view(B, Q, -1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs, (*options, impl) = ctx.saved_tensors, ctx.options
    chosen = _forward.chosen(impl, *inputs, *options)
    if chosen == "reference":

        def function(*tensors: Any) -> Tensor:
            return _plain(*tensors, *options)

        return *differentiate(function, inputs, ctx.needs_input_grad[:4], grad), None, None, None, None
    grads: list[Any] = [*_backward.run(grad, *inputs, *options, chosen), None]
    ref = inputs[3]
    if ref is not None and ctx.needs_input_grad[3]:  # moving ref by 1 moves samples by the size of the level
        by_level = grads[1].float().sum((2, 4)).unbind(2)  # L times [B, Q, 2]
        by_ref = [
            torch.stack((moved[..., 0] * w, moved[..., 1] * h), -1)
            for moved, (h, w) in zip(by_level, _levels(options[0]), strict=True)
        ]
        grads[3] = torch.stack(by_ref, 2).sum_to_size(ref.shape).to(ref.dtype)
    return *grads, None, None, None, None


_forward = Operator(
    "ms_deform_attn",
    _plain,
    _cuda.empty_output,
    triton=launcher("ms_deform_attn.forward"),
    cuda=lambda *args: _cuda.ms_deform_attn(*args[:-1]),  # all except `deterministic`
    unfit=_unfit,
    save=_save,
    backward=_differentiate,
)


def _plain_backward(
    grad: Tensor,
    value: Tensor,
    offset: Tensor,
    logit: Tensor,
    ref: Tensor | None,
    shapes: Sequence[int],
    classic: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    raise RuntimeError(
        "tarvis::ms_deform_attn_backward is for kernels; autograd differentiates the reference"
    )


_backward = Operator(
    "ms_deform_attn_backward",
    _plain_backward,
    _cuda.empty_gradients,
    triton=launcher("ms_deform_attn.backward"),
    cuda=_cuda.ms_deform_attn_backward,
    unfit=lambda _, *inputs: _unfit(*inputs),
    opaque=True,
)


def _levels(shapes: Sequence[int]) -> Shapes:
    """h0, w0, h1, w1, .. as pairs."""
    return list(zip(shapes[::2], shapes[1::2], strict=True))
