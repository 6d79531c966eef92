"""Deformable attention of models that others wrote, over these kernels, in two lines.

    from kernels.patch import patch
    patch(model)

Tested with Deformable DETR, RT-DETR and Mask2Former of Hugging Face Transformers 5, and a module written as
the original ones are. Others that call the same operator by a known name should fit: Grounding DINO, OmDet,
OneFormer, DINO, mmcv. Nothing of them is imported: modules are known by the names that they use. RT-DETR v2
and D-FINE, whose levels may differ in their number of points, have an operator of their own: not covered.

Only instances change, so another model of the same class keeps its own code. Parameters, and so checkpoints,
stay the same. A patched model can be compiled and copied; it cannot be pickled as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from .ms_deform_attn_classic import ms_deform_attn_classic


class _Function:
    """Stands for the autograd function that the original modules apply."""

    apply = staticmethod(ms_deform_attn_classic)


def _core(value: Tensor, shapes: Any, locations: Tensor, weights: Tensor) -> Tensor:
    return ms_deform_attn_classic(value, shapes, None, locations, weights)


# what modules call the operator, and ours in its place
_OPERATORS = {
    "MSDeformAttnFunction": _Function,
    "MultiScaleDeformableAttentionFunction": _Function,
    "MultiScaleDeformableAttnFunction": _Function,
    "ms_deform_attn_core_pytorch": _core,
    "multi_scale_deformable_attention": _core,
    "multi_scale_deformable_attn_pytorch": _core,
}

_MARK = "_has_patched_forward"


def _forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: Sequence[tuple[int, int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Forward of `MultiScaleDeformableAttention` in Transformers, a module that only applies the operator."""
    shapes = value_spatial_shapes_list
    return ms_deform_attn_classic(value, shapes, level_start_index, sampling_locations, attention_weights)


def patch(model: nn.Module) -> int:
    """Lets every deformable attention of a model run on these kernels, with equal results.

    Args:
        model: any module; changed in place. Patching it again changes nothing.

    Returns:
        How many modules were replaced.

    Raises:
        ValueError: there are none, or one already has a forward of its own, set by another library.
    """
    count = 0
    for module in model.modules():
        forward = _replacement(module)
        if forward is not None:
            if "forward" in module.__dict__ and not module.__dict__.get(_MARK):
                raise ValueError(
                    f"{type(module).__name__} has a forward of its own, which would be lost: "
                    "patch the model before hooks are set"
                )
            module.forward, module.__dict__[_MARK] = forward, True
            count += 1
    if not count:
        raise ValueError(
            f"{type(model).__name__} has no deformable attention known here: none of its modules is or calls "
            f"MultiScaleDeformableAttention, {', '.join(_OPERATORS)}"
        )
    return count


def unpatch(model: nn.Module) -> None:
    """Gives every module that `patch` replaces its own code back."""
    for module in model.modules():
        if module.__dict__.pop(_MARK, False):
            module.__dict__.pop("forward", None)


def _replacement(module: nn.Module) -> Callable[..., Any] | None:
    """A forward over our operator; None if this module does not use the operator itself."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType):
        return None
    parameters = forward.__code__.co_varnames[1 : forward.__code__.co_argcount]
    if parameters == _forward.__code__.co_varnames[: _forward.__code__.co_argcount]:
        return _forward
    replaced = _rebound(forward)
    return None if replaced is forward else MethodType(replaced, module)


def _rebound(function: FunctionType) -> FunctionType:
    """A copy of a function for which the operator's names mean ours; the function itself if it has none.

    The copy has its own globals, so that the module it comes from stays as it is. Decorators are kept: what
    they wrap is replaced inside them.
    """
    code, scope = function.__code__, dict(function.__globals__)
    ours = {name: _OPERATORS[name] for name in code.co_names if name in _OPERATORS and name in scope}
    closure = tuple(_rebound_cell(cell, function) for cell in function.__closure__ or ())
    if not ours and closure == (function.__closure__ or ()):
        return function
    copy = FunctionType(code, scope | ours, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__ = function.__qualname__
    copy.__dict__.update(function.__dict__)
    return copy


def _rebound_cell(cell: CellType, decorator: FunctionType) -> CellType:
    """The cell in which a decorator keeps what it wraps, with that replaced; any other cell as it is."""
    wrapped = getattr(decorator, "__wrapped__", None)
    try:
        content = cell.cell_contents
    except ValueError:  # empty
        return cell
    if content is not wrapped or not isinstance(wrapped, FunctionType):
        return cell
    replaced = _rebound(wrapped)
    return cell if replaced is wrapped else CellType(replaced)
