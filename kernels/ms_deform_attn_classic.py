"""Multi-scale deformable attention with the signature of Deformable DETR, Mask2Former, DINO, mmcv and HF.

    out[b,q,a] = sum over l,p of weights[b,q,a,l,p] * bilinear(value_l[b,:,a], x[b,q,a,l,p])
    x = locations[b,q,a,l,p] * size_l - 0.5

The kernels are those of `ms_deform_attn`, to which new code should go: it takes what the linear layers give,
so that locations and weights are never written to memory and half precision keeps its place in the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import FLOATS, Impl, require
from .ms_deform_attn import by_level, check_levels, deformable

Shapes = Sequence[tuple[int, int]]

_INTEGERS = (torch.int64, torch.int32)


def ms_deform_attn_classic(
    value: Tensor,
    spatial_shapes: Tensor | Shapes,
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int = 64,
    *,
    points: Sequence[int] | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Weighted sum of bilinear samples from every level.

    Args:
        value: [B, S, A, D] float; the levels' maps, each row-major, one after the other.
        spatial_shapes: (height, width) of each level, as pairs or an integer tensor [L, 2]. A tensor on a GPU
            costs a synchronisation in every call, pairs cost none.
        level_start_index: first cell of each level. The levels must follow each other as in `value`; checked
            where it is a list or lies on the CPU, otherwise taken for granted, as None is.
        sampling_locations: [B, Q, A, L, P, 2] float, (x, y) in 0..1 of the level. Coordinates are computed in
            float32, but what is given is what is sampled: next to 1 a bfloat16 location has a step of 1/256,
            which is half a pixel of a map 128 wide, and a float16 location one of 1/2048.
        attention_weights: [B, Q, A, L, P] float.
        im2col_step: for compatibility; nothing depends on it.
        points: numbers of points of the levels, where they differ (RT-DETR v2, D-FINE); then
            `sampling_locations` is [B, Q, A, N, 2] and `attention_weights` [B, Q, A, N], level after level,
            with N = sum of `points`.
        impl: see `kernels.dispatch`; what the kernels take is said at `ms_deform_attn`.

    Returns:
        [B, Q, A*D] in the dtype of `value`, accumulated in float32. Samples outside a level count as zero.
        Differentiable once, in `value`, locations and weights. Autocast leaves dtypes as they are.

    Raises:
        ValueError: shapes that do not fit together; `spatial_shapes` is a tensor under torch.export.
        RuntimeError: the implementation asked for cannot run.

    For torch.compile, too, `spatial_shapes` should be pairs: reading a tensor breaks the graph, which with
    fullgraph=True is an error.
    """
    floats = {"sampling_locations": sampling_locations, "attention_weights": attention_weights}
    require("ms_deform_attn_classic", FLOATS, value=value, **floats)
    if points is not None:
        sampling_locations, attention_weights = by_level(
            sampling_locations, attention_weights, points, classic=True
        )
    shapes = _pairs(spatial_shapes) if isinstance(spatial_shapes, Tensor) else [*spatial_shapes]
    if value.ndim != 4 or sampling_locations.ndim != 6 or attention_weights.ndim != 5:
        raise ValueError(
            "expected value [B, S, A, D], sampling_locations [B, Q, A, L, P, 2] and attention_weights "
            f"[B, Q, A, L, P], got {list(value.shape)}, {list(sampling_locations.shape)} and "
            f"{list(attention_weights.shape)}"
        )
    B, S, A, _ = value.shape
    _, Q, _, _, P, _ = sampling_locations.shape
    L = len(shapes)
    check_levels(value, attention_weights, shapes)
    if sampling_locations.shape != (B, Q, A, L, P, 2) or attention_weights.shape != (B, Q, A, L, P):
        raise ValueError(
            f"expected sampling_locations [{B}, Q, {A}, {L}, P, 2] and "
            f"attention_weights [{B}, Q, {A}, {L}, P], "
            f"got {list(sampling_locations.shape)} and {list(attention_weights.shape)}"
        )
    _check_starts(level_start_index, shapes)
    return deformable(
        value,
        sampling_locations,
        attention_weights,
        shapes,
        None,
        classic=True,
        deterministic=None,
        impl=impl,
    )


def _pairs(shapes: Tensor) -> list[tuple[int, int]]:
    """An integer tensor [L, 2] as pairs."""
    require("ms_deform_attn_classic", _INTEGERS, spatial_shapes=shapes)
    if shapes.ndim != 2 or shapes.shape[1] != 2:
        raise ValueError(f"expected spatial_shapes [L, 2], got {list(shapes.shape)}")
    if torch.compiler.is_exporting():
        raise ValueError("torch.export needs spatial_shapes as a list of (height, width), not as a tensor")
    return _read(shapes)


def _read(shapes: Tensor) -> list[tuple[int, int]]:
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break("spatial_shapes is a tensor: give a list of (height, width) to compile")
    return [(h, w) for h, w in shapes.tolist()]


def _check_starts(starts: Tensor | Sequence[int] | None, shapes: Shapes) -> None:
    """Raises unless the levels lie one after the other, where that can be seen without waiting for a GPU."""
    if isinstance(starts, Tensor):
        require("ms_deform_attn_classic", _INTEGERS, level_start_index=starts)
        if starts.shape != (len(shapes),):
            raise ValueError(f"expected level_start_index [{len(shapes)}], got {list(starts.shape)}")
        if starts.device.type != "cpu" or torch.compiler.is_compiling():
            return
        starts = starts.tolist()
    if starts is None:
        return
    expected = [0]
    for h, w in shapes[:-1]:
        expected.append(expected[-1] + h * w)
    if list(starts) != expected:
        raise ValueError(f"levels must follow each other: expected starts {expected}, got {list(starts)}")
