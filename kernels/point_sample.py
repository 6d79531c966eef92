"""Maps read at points between their cells (Kirillov et al. 2020, PointRend, section 3.1).

    out[n,r,c] = bilinear(maps[n,c], x),  x = points[n,r] * (W, H) - 0.5

Losses look at masks in a few thousand points. The same points address maps of any size, logits at a quarter
of the image and targets at all of it. Channels come last in the result, because what follows is a product
with embeddings, and because points of several frames then join without a copy: with features [T, C, H, W]
`embedding @ point_sample(features, points).flatten(0, 1).T` are logits [Q, T*R] never stored as maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import FLOATS, Impl, require, require_one_device, unfit_dtype
from .operator import Operator, launcher

_MANY_CHANNELS = 32  # from here on a gather of rows is the faster reference


def point_sample(
    maps: Tensor, points: Tensor, *, deterministic: bool | None = None, impl: Impl = "auto"
) -> Tensor:
    """Bilinear samples; what lies outside a map counts as zero.

    Args:
        maps: [N, C, H, W] or [N, H, W]; float, bool or uint8, any strides. Channels that are contiguous in
            memory (torch.channels_last) are read 16 bytes at a time.
        points: [N or 1, R, 2] float32 (x, y) in 0..1, finite; one row serves all maps. Half precision is
            refused: near 1 it would cost half a cell. float64 counts only for float64 maps.
        deterministic: whether gradients are bit-equal from run to run. False: the kernel adds them up
            with float32 atomics. None: as `torch.use_deterministic_algorithms` says. Plain PyTorch is
            deterministic on a CPU and follows that switch elsewhere.
        impl: see `kernels.dispatch`.

    Returns:
        [N, R, C] or [N, R] in the dtype of `maps`, float32 for bool and uint8; accumulated in float32
        (float64 stays float64). Gradients reach `maps`, none reach `points`. Autocast changes nothing.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: the implementation asked for cannot run.
    """
    require("point_sample", (*FLOATS, torch.bool, torch.uint8), maps=maps)
    if maps.ndim == 3:
        return point_sample(maps[:, None], points, deterministic=deterministic, impl=impl).squeeze(2)
    if maps.ndim != 4 or maps.shape[2] == 0 or maps.shape[3] == 0:
        raise ValueError(f"expected maps [N, C, H, W] or [N, H, W] with cells, got {list(maps.shape)}")
    _check_points("point_sample", maps, points)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    points = points.detach().to(_exact(maps))
    chosen = _operator.choose(impl, maps, points, deterministic)
    if chosen == "reference":
        return point_sample_reference(maps, points)
    return _operator.run(maps, points, deterministic, chosen)


def nearest_sample(maps: Tensor, points: Tensor) -> Tensor:
    """The cells that points fall into; a single gather, so plain PyTorch serves every device.

    maps [N, H, W] of any dtype, points [N or 1, R, 2] as above -> [N, R] in the dtype of `maps`. Halfway
    between two cells the even one counts, as in grid_sample; a point outside counts as the cell nearest to
    it, and not as label 0; points must be finite. No gradient.
    """
    require("nearest_sample", (), maps=maps)
    if maps.ndim != 3 or maps.shape[1] == 0 or maps.shape[2] == 0:
        raise ValueError(f"expected maps [N, H, W] with cells, got {list(maps.shape)}")
    _check_points("nearest_sample", maps, points)
    require_one_device("nearest_sample", maps, points)
    N, H, W = maps.shape
    x = (points[..., 0] * W - 0.5).round().clamp(0, W - 1).long()  # [N or 1, R]
    y = (points[..., 1] * H - 0.5).round().clamp(0, H - 1).long()
    return maps.detach().flatten(1).gather(1, (y * W + x).expand(N, -1))


def point_sample_reference(maps: Tensor, points: Tensor) -> Tensor:
    """Defines the operator: maps [N, C, H, W], points [N or 1, R, 2] -> [N, R, C].

    Few channels take grid_sample, many a gather of rows by embedding_bag, which does without its
    channels-first result.
    """
    N, C, H, W = maps.shape
    R = points.shape[1]
    values = maps.to(points.dtype)
    if N * R * C == 0:
        return values.sum((2, 3))[:, None].expand(N, R, C).to(_out_dtype(maps))  # keeps the graph
    if C < _MANY_CHANNELS:
        grid = (2 * points - 1).expand(N, R, 2)[:, None]  # [N, 1, R, 2]
        out = F.grid_sample(values, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return out[:, :, 0].transpose(1, 2).to(_out_dtype(maps))
    cells, weights = _corners(points, N, H, W)  # [N*R, 4]
    table = values.permute(0, 2, 3, 1).reshape(N * H * W, C)
    out = F.embedding_bag(cells, table, per_sample_weights=weights, mode="sum")
    return out.view(N, R, C).to(_out_dtype(maps))


def _corners(points: Tensor, N: int, H: int, W: int) -> tuple[Tensor, Tensor]:
    """The four cells around each point, as rows of all cells [N*H*W], and their weights; both [N*R, 4]."""
    first = torch.arange(N, device=points.device)[:, None] * (H * W)
    columns = _neighbours(points[..., 0] * W - 0.5, W)
    rows = _neighbours(points[..., 1] * H - 0.5, H)
    cells = torch.stack([first + row * W + column for row, _ in rows for column, _ in columns], -1)
    weights = torch.stack([y * x for _, y in rows for _, x in columns], -1)  # [N or 1, R, 4]
    return cells.flatten(0, 1), weights.expand(N, -1, 4).flatten(0, 1)


def _neighbours(x: Tensor, size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The cells left and right of pixel coordinate x, each with its weight; outside cells weigh 0."""
    low = x.floor()
    fraction = x - low
    at_low, at_high = (low >= 0) & (low < size), (low >= -1) & (low < size - 1)
    return (
        (torch.where(at_low, low, 0).long(), torch.where(at_low, 1 - fraction, 0)),
        (torch.where(at_high, low + 1, 0).long(), torch.where(at_high, fraction, 0)),
    )


def _check_points(operator: str, maps: Tensor, points: Tensor) -> None:
    require(operator, (torch.float32, torch.float64), points=points)
    if points.ndim != 3 or points.shape[2] != 2 or points.shape[0] not in (1, maps.shape[0]):
        raise ValueError(f"expected points [{maps.shape[0]} or 1, R, 2], got {list(points.shape)}")


def _exact(maps: Tensor) -> torch.dtype:
    return torch.float64 if maps.dtype == torch.float64 else torch.float32


def _out_dtype(maps: Tensor) -> torch.dtype:
    return maps.dtype if maps.is_floating_point() else torch.float32


def _unfit(maps: Tensor, points: Tensor, deterministic: bool) -> str:
    reach = sum((size - 1) * stride for size, stride in zip(maps.shape[1:], maps.stride()[1:], strict=True))
    too_large = max(reach, maps.shape[1:].numel(), maps.shape[1] * points.shape[1]) >= 2**31
    return unfit_dtype(maps if maps.is_floating_point() else points) or (
        "its kernels take fewer than 2^31 values a map and its samples" if too_large else ""
    )


def _plain(maps: Tensor, points: Tensor, deterministic: bool) -> Tensor:
    return point_sample_reference(maps, points).contiguous()


def _fake(maps: Tensor, points: Tensor, deterministic: bool) -> Tensor:
    return maps.new_empty(maps.shape[0], points.shape[1], maps.shape[1], dtype=_out_dtype(maps))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, points, ctx.deterministic, ctx.impl = inputs
    ctx.shape, ctx.channels_last = maps.shape, maps.shape[1] > 1 and maps.stride(1) == 1
    ctx.save_for_backward(points)  # the maps themselves are not needed


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (points,) = ctx.saved_tensors
    options = (list(ctx.shape), ctx.channels_last, ctx.deterministic, ctx.impl)
    return _scatter.run(grad, points, *options), None, None, None


_operator = Operator(
    "point_sample",
    _plain,
    _fake,
    triton=launcher("point_sample.forward"),
    unfit=_unfit,
    save=_save,
    backward=_backward,
)


def _unfit_backward(grad: Tensor, points: Tensor, shape: Sequence[int], *_: bool) -> str:
    like = grad.new_empty(()).expand(shape)  # as large as the result, without its memory
    return _unfit(like, points, False)


def _plain_backward(
    grad: Tensor, points: Tensor, shape: Sequence[int], channels_last: bool, deterministic: bool
) -> Tensor:
    N, C, H, W = shape
    cells, weights = _corners(points, N, H, W)
    out = grad.new_zeros(N * H * W, C, dtype=points.dtype)
    for cell, weight in zip(cells.unbind(1), weights.unbind(1), strict=True):
        out.index_add_(0, cell, weight[:, None] * grad.reshape(-1, C))
    return _like(grad, shape, channels_last, grad.dtype).copy_(out.view(N, H, W, C).permute(0, 3, 1, 2))


def _fake_backward(
    grad: Tensor, points: Tensor, shape: Sequence[int], channels_last: bool, deterministic: bool
) -> Tensor:
    return _like(grad, shape, channels_last, grad.dtype)


_launch_backward = launcher("point_sample.backward")


def _triton_backward(
    grad: Tensor, points: Tensor, shape: Sequence[int], channels_last: bool, deterministic: bool
) -> Tensor:
    dtype = grad.dtype if deterministic else torch.float32  # in which gradients are added up
    maps = _like(grad, shape, channels_last, dtype)
    return _launch_backward(grad, points, maps, deterministic).to(grad.dtype)


def _like(grad: Tensor, shape: Sequence[int], channels_last: bool, dtype: torch.dtype) -> Tensor:
    """Uninitialised maps of this shape."""
    N, C, H, W = shape
    if channels_last:
        return grad.new_empty(N, H, W, C, dtype=dtype).permute(0, 3, 1, 2)
    return grad.new_empty(N, C, H, W, dtype=dtype)


_scatter = Operator(
    "point_sample_backward",
    _plain_backward,
    _fake_backward,
    triton=_triton_backward,
    unfit=_unfit_backward,
    opaque=True,
)
