"""Deformable attention of models that others wrote, over these kernels, in two lines.

    from kernels.patch import patch
    patch(model)

Tested with models of Hugging Face Transformers 5, with mmcv's module and with modules written as the original
ones are; `kernels/README.md` lists them. Others that call the same operator by a known name should fit.
Nothing of them is imported: modules are known by the names that they use.

Only instances change, so another model of the same class keeps its own code. Parameters, and so checkpoints,
stay the same. A patched model can be compiled and copied; it cannot be pickled as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn

from .ms_deform_attn_classic import ms_deform_attn_classic


class _Function:
    """Stands for the autograd function that the original modules apply."""

    apply = staticmethod(ms_deform_attn_classic)


def _core(value: Tensor, shapes: Any, locations: Tensor, weights: Tensor) -> Tensor:
    return ms_deform_attn_classic(value, shapes, None, locations, weights)


def _by_level(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Ours for an operator whose levels have numbers of points of their own."""

    def core(
        value: Tensor,
        shapes: Any,
        locations: Tensor,
        weights: Tensor,
        points: Sequence[int],
        method: str = "default",
    ) -> Tensor:
        if method != "default" or not isinstance(value, Tensor):  # samples the nearest cell; other layouts
            return original(value, shapes, locations, weights, points, method)
        return ms_deform_attn_classic(value, shapes, None, locations, weights, points=points)

    return core


# what modules call the operator, and what makes ours of it
_OPERATORS: dict[str, Callable[[Any], Any]] = {
    "MSDeformAttnFunction": lambda _: _Function,
    "MultiScaleDeformableAttentionFunction": lambda _: _Function,
    "MultiScaleDeformableAttnFunction": lambda _: _Function,
    "ms_deform_attn_core_pytorch": lambda _: _core,
    "multi_scale_deformable_attention": lambda _: _core,
    "multi_scale_deformable_attn_pytorch": lambda _: _core,
    "deformable_attention_core_func": lambda _: _core,
    "multi_scale_deformable_attention_v2": _by_level,
    "deformable_attention_core_func_v2": _by_level,
}

_KNOWN_BY_NAME = re.compile("deform(able)?_?att", re.IGNORECASE)  # what must be replaced, or be reported

_MARK = "_replaced_attributes"


class Patched(NamedTuple):
    """Names of modules, as `model.named_modules()` gives them."""

    replaced: list[str]
    unknown: list[str]
    """Deformable attention by its name or its parts, but none that is known here: left as it was."""


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


def patch(model: nn.Module, *, partly: bool = False) -> Patched:
    """Lets every deformable attention of a model run on these kernels, with equal results.

    Args:
        model: any module; changed in place. Patching it again changes nothing.
        partly: whether to patch a model of which only some deformable attention is known here.

    Returns:
        The modules that run on the kernels now, and those that look like deformable attention and do not.

    Raises:
        ValueError: no module is known here, or not all are and `partly` is False, or one already has a
            forward of its own, set by another library. Nothing is changed then.
    """
    modules = dict(model.named_modules())
    ours = {name: found for name, module in modules.items() if (found := _replacements(module))}
    unknown = [
        name
        for name, module in modules.items()
        if _looks_deformable(module) and not any(f"{x}.".startswith(f"{name}." if name else "") for x in ours)
    ]
    if not ours:
        raise ValueError(
            f"{type(model).__name__} has no deformable attention known here: none of its modules is or calls "
            f"MultiScaleDeformableAttention, {', '.join(_OPERATORS)}"
        )
    if unknown and not partly:
        raise ValueError(
            f"{type(model).__name__} has deformable attention that is not known here: {', '.join(unknown)} "
            f"(patch(model, partly=True) replaces the other {len(ours)})"
        )
    for name, found in ours.items():
        module = modules[name].__dict__
        if _MARK not in module:
            module[_MARK] = {key: module[key] for key in found if key in module}
            module.update(found)
    return Patched([*ours], unknown)


def unpatch(model: nn.Module) -> None:
    """Gives every module that `patch` replaces its own code back."""
    for module in model.modules():
        before = module.__dict__.pop(_MARK, None)
        if before is not None:
            module.__dict__.pop("forward", None)
            module.__dict__.update(before)


def _looks_deformable(module: nn.Module) -> bool:
    return hasattr(module, "sampling_offsets") or bool(_KNOWN_BY_NAME.search(type(module).__name__))


def _replacements(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module that uses the operator itself, over ours; none if it does not."""
    own = module.__dict__
    if _MARK in own:
        return {key: own[key] for key in ("forward", *own[_MARK]) if key in own}
    found = {key: ours for key, x in own.items() if (ours := _over_ours(x)) is not None}
    forward = type(module).forward
    if not isinstance(forward, FunctionType):
        return found
    parameters = forward.__code__.co_varnames[1 : forward.__code__.co_argcount]
    if parameters == _forward.__code__.co_varnames[: _forward.__code__.co_argcount]:
        found["forward"] = _forward
    elif (replaced := _rebound(forward)) is not forward:
        found["forward"] = MethodType(replaced, module)
    if "forward" in found and "forward" in own:
        raise ValueError(
            f"{type(module).__name__} has a forward of its own, which would be lost: "
            "patch the model before hooks are set"
        )
    return found


def _over_ours(attribute: Any) -> Any:
    """The operator that a module keeps as an attribute, over ours; None for any other attribute."""
    if isinstance(attribute, partial):
        function = _over_ours(attribute.func)
        return None if function is None else partial(function, *attribute.args, **attribute.keywords)
    ours = _OPERATORS.get(attribute.__name__) if isinstance(attribute, FunctionType) else None
    return None if ours is None else ours(attribute)


@cache  # one copy serves all modules of a class: what is compiled for one is found again for the next
def _rebound(function: FunctionType) -> FunctionType:
    """A copy of a function for which the operator's names mean ours; the function itself if it has none.

    The copy has its own globals, so that the module it comes from stays as it is; without their __name__, by
    which torch.compile would look for them in that module. And it has its own code, under which torch.compile
    files what it compiled, with names of globals in it. Decorators are kept: what they wrap is replaced.
    """
    code, scope = function.__code__, dict(function.__globals__)
    ours = {
        name: _OPERATORS[name](scope[name]) for name in code.co_names if name in _OPERATORS.keys() & scope
    }
    closure = tuple(_rebound_cell(cell, function) for cell in function.__closure__ or ())
    if not ours and closure == (function.__closure__ or ()):
        return function
    scope.pop("__name__", None)
    copy = FunctionType(code.replace(), scope | ours, function.__name__, function.__defaults__, closure)
    copy.__module__ = function.__module__
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
