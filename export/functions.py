"""Deformable attention in ONNX: one node `tarvis::MSDeformAttn`, and its definition by standard operators.

The node has the inputs of `kernels.ms_deform_attn`:

    value  [B, S, A, D]           offset [B, Q, A, L, P, 2]     logit [B, Q, A, L, P]   of one float type
    ref    [B or 1, Q, L or 1, 2] float, in 0..1                shapes [2 L] int64: h0, w0, h1, w1, ..
    out    [B, Q, A * D]          in the type of value; positions, softmax and sums are in float32

A file carries the definition as a model-local function, so ONNX Runtime runs it as it is. TensorRT takes a
plugin instead (`plugin_form`), or the definition without GridSample (`with_body(model, "gather")`), since its
GridSample gives wrong results for deformable attention in several versions.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import onnxscript
from onnx import FunctionProto, ModelProto, TensorProto, defs, helper, inliner, numpy_helper
from onnxscript import values

from .plugins import DOMAIN, NAME

LEVELS = 3
Body = Literal["grid", "gather"]

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_INPUTS = {"value": "T", "offset": "T", "logit": "T", "ref": "tensor(float)", "shapes": "tensor(int64)"}
_SCHEMA = defs.OpSchema(
    NAME,
    DOMAIN,
    1,
    "Multi-scale deformable attention from raw offsets and logits.",
    inputs=[defs.OpSchema.FormalParameter(*parameter) for parameter in _INPUTS.items()],
    outputs=[defs.OpSchema.FormalParameter("out", "T")],
    type_constraints=[("T", _FLOATS, "")],
)
_NODE = values.Op(values.Opset(DOMAIN, 1), NAME, _SCHEMA)


def translation(opset: int) -> Any:
    """How torch.onnx writes `tarvis::ms_deform_attn`."""
    std = getattr(onnxscript, f"opset{opset}")

    def ms_deform_attn(
        value: Any,
        offset: Any,
        logit: Any,
        ref: Any,
        shapes: Sequence[Any],
        classic: bool,
        deterministic: bool,
        impl: str,
    ) -> Any:
        del deterministic, impl
        assert ref is not None, "the network gives every query its place"
        assert not classic
        assert len(shapes) == 2 * LEVELS
        if all(isinstance(side, int) for side in shapes):
            sizes = std.Constant(value_ints=list(shapes))
        else:
            sides = [
                std.Constant(value_ints=[side])
                if isinstance(side, int)
                else std.Reshape(side, std.Constant(value_ints=[1]))
                for side in shapes
            ]
            sizes = std.Concat(*sides, axis=0)
        return _NODE(value, offset, logit, ref, sizes)

    return ms_deform_attn


def with_body(model: ModelProto, body: Body = "grid") -> ModelProto:
    """The model, in place, with its nodes defined by GridSample (fast in ONNX Runtime) or by Gather."""
    del model.functions[:]
    if any(node.domain == DOMAIN for node in model.graph.node):
        opset = next(entry.version for entry in model.opset_import if entry.domain == "")
        model.functions.append(definition(opset, body))
    return model


def plugin_form(model: ModelProto) -> ModelProto:
    """The model, in place, for a parser that has a plugin for the node, so without functions.

    Where the levels' sizes are constants, nodes get them as attribute `sizes` too: a plugin cannot read the
    input without waiting for the device.
    """
    del model.functions[:]
    known = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == t.INT64}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value_ints":
            known[node.output[0]] = node.attribute[0].ints
        elif node.op_type == "Constant" and node.attribute[0].name == "value":
            known[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        elif node.domain == DOMAIN and node.input[4] in known:
            sizes = [int(side) for side in known[node.input[4]]]
            node.attribute.append(helper.make_attribute("sizes", sizes))
    return model


def definition(opset: int, body: Body) -> FunctionProto:
    """The node's meaning in standard operators of one opset."""
    script = onnxscript.script(values.Opset(DOMAIN, 1), default_opset=getattr(onnxscript, f"opset{opset}"))
    main, *parts = (_grid if body == "grid" else _gather)(getattr(onnxscript, f"opset{opset}"), script)
    protos = [function.to_function_proto() for function in (main, *parts)]
    protos[0].name = NAME
    inputs, outputs = protos[0].input, protos[0].output
    taken, given = (
        [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in names]
        for names in (inputs, outputs)
    )
    node = helper.make_node(NAME, inputs, outputs, domain=DOMAIN)
    graph = helper.make_graph([node], NAME, taken, given)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, functions=protos, opset_imports=opsets)
    # not every parser takes functions that call functions
    model = inliner.inline_selected_functions(model, [(DOMAIN, part.name) for part in parts])
    (function,) = model.functions
    return function


def _common(op: Any, script: Any) -> tuple[Any, Any]:
    """What both definitions begin with."""

    @script
    def attention(logit):
        """Softmax over all levels and points: float [L, B, A, Q, P]."""
        softmax = op.Softmax(op.Cast(op.Flatten(logit, axis=3), to=1), axis=-1)
        return op.Transpose(op.Reshape(softmax, op.Shape(logit)), perm=[3, 0, 2, 1, 4])

    @script
    def levels(shapes):
        """Sizes (h, w) int64 [L, 2], numbers of cells int64 [L], and sizes (w, h) float [L, 1, 2]."""
        sizes = op.Reshape(shapes, op.Constant(value_ints=[-1, 2]))
        areas = op.ReduceProd(sizes, op.Constant(value_ints=[1]), keepdims=0)
        h, w = op.Split(op.Cast(sizes, to=1), axis=1, num_outputs=2)
        return sizes, areas, op.Unsqueeze(op.Concat(w, h, axis=1), op.Constant(value_ints=[1]))

    return attention, levels


def _grid(op: Any, script: Any) -> tuple[Any, ...]:
    """The definition by one GridSample a level, and the functions that it calls."""
    attention, levels = _common(op, script)
    mode = "bilinear" if op.version < 20 else "linear"

    @script
    def at_level(image, grid, weight, size, BA, D, Q, P):
        """Cells [B, A, D, h * w] at places [B, Q, A, P, 2], weighted and summed: [B * A, D, Q]."""
        cells = op.Reshape(image, op.Concat(BA, D, size, axis=0))
        places = op.Reshape(grid, op.Concat(BA, Q, P, op.Constant(value_ints=[2]), axis=0))
        sample = op.GridSample(cells, places, mode=mode, padding_mode="zeros", align_corners=0)
        share = op.Reshape(weight, op.Concat(BA, op.Constant(value_ints=[1]), Q, P, axis=0))
        return op.ReduceSum(sample * share, op.Constant(value_ints=[3]), keepdims=0)

    @script
    def grid_form(value, offset, logit, ref, shapes):
        value_shape, logit_shape = op.Shape(value), op.Shape(logit)
        B, A, D = value_shape[0:1], value_shape[2:3], value_shape[3:4]
        Q, P = logit_shape[1:2], logit_shape[4:5]
        BA = B * A
        weight = attention(logit)
        sizes, areas, level_size = levels(shapes)
        centre = op.Unsqueeze(ref, op.Constant(value_ints=[2, 4]))  # [B or 1, Q, 1, L or 1, 1, 2]
        place = centre + op.Cast(offset, to=1) / level_size  # [B, Q, A, L, P, 2] in 0..1
        signed = place * op.Constant(value_float=2.0) - op.Constant(value_float=1.0)
        grid = op.Transpose(signed, perm=[3, 0, 2, 1, 4, 5])
        maps = op.Transpose(op.Cast(value, to=1), perm=[0, 2, 3, 1])  # [B, A, D, S]
        a, b, c = op.Split(maps, areas, axis=3)
        i, j, k = op.Constant(value_int=0), op.Constant(value_int=1), op.Constant(value_int=2)
        size = op.Gather(sizes, i)
        total = at_level(a, op.Gather(grid, i), op.Gather(weight, i), size, BA, D, Q, P)
        size = op.Gather(sizes, j)
        total = total + at_level(b, op.Gather(grid, j), op.Gather(weight, j), size, BA, D, Q, P)
        size = op.Gather(sizes, k)
        total = total + at_level(c, op.Gather(grid, k), op.Gather(weight, k), size, BA, D, Q, P)
        channels_first = op.Reshape(total, op.Concat(B, A * D, Q, axis=0))
        out = op.CastLike(op.Transpose(channels_first, perm=[0, 2, 1]), value)
        return out

    return grid_form, attention, levels, at_level


def _gather(op: Any, script: Any) -> tuple[Any, ...]:
    """The definition by four Gathers a level, of rows [B * A * S, D], and the functions that it calls."""
    attention, levels = _common(op, script)

    @script
    def beside(x, side):
        """The cells below and above places along an axis of `side` cells, each with its weight; 0 outside."""
        one, zero = op.Constant(value_float=1.0), op.Constant(value_float=0.0)
        last = op.Cast(side, to=1) - one
        low = op.Floor(x)
        high = low + one
        high_weight = x - low
        low_weight = one - high_weight
        low_cell = op.Min(op.Max(low, zero), last)
        high_cell = op.Min(op.Max(high, zero), last)
        low_weight = low_weight * op.Cast(op.Equal(low_cell, low), to=1)
        high_weight = high_weight * op.Cast(op.Equal(high_cell, high), to=1)
        return op.Cast(low_cell, to=7), low_weight, op.Cast(high_cell, to=7), high_weight

    @script
    def summed(rows, cell, share):
        """Rows [B, A, Q, P, D] at cells [B, A, Q, P], weighted and summed: [B, A, Q, D]."""
        column = op.Unsqueeze(share, op.Constant(value_ints=[-1]))
        return op.ReduceSum(op.Gather(rows, cell) * column, op.Constant(value_ints=[3]), keepdims=0)

    @script
    def with_level(total, rows, x_y, weight, size, start):
        """`total` and what one level adds to it, at places x_y [B, A, Q, P, 2] in pixels."""
        h, w = op.Split(size, num_outputs=2)
        x, y = op.Split(x_y, axis=4, num_outputs=2)
        last = op.Constant(value_ints=[4])
        left, left_weight, right, right_weight = beside(op.Squeeze(x, last), w)
        top, top_weight, bottom, bottom_weight = beside(op.Squeeze(y, last), h)
        total = total + summed(rows, top * w + left + start, top_weight * left_weight * weight)
        total = total + summed(rows, top * w + right + start, top_weight * right_weight * weight)
        total = total + summed(rows, bottom * w + left + start, bottom_weight * left_weight * weight)
        total = total + summed(rows, bottom * w + right + start, bottom_weight * right_weight * weight)
        return total

    @script
    def gather_form(value, offset, logit, ref, shapes):
        value_shape, logit_shape = op.Shape(value), op.Shape(logit)
        B, S, A, D = value_shape[0:1], value_shape[1:2], value_shape[2:3], value_shape[3:4]
        weight = attention(logit)
        sizes, areas, level_size = levels(shapes)
        by_head = op.Transpose(op.Cast(value, to=1), perm=[0, 2, 1, 3])  # [B, A, S, D]
        rows = op.Reshape(by_head, op.Concat(op.Constant(value_ints=[-1]), D, axis=0))
        centre = op.Unsqueeze(ref, op.Constant(value_ints=[2, 4]))  # [B or 1, Q, 1, L or 1, 1, 2]
        pixels = centre * level_size + op.Cast(offset, to=1) - op.Constant(value_float=0.5)
        x_y = op.Transpose(pixels, perm=[3, 0, 2, 1, 4, 5])  # [L, B, A, Q, P, 2]
        i, j, k = op.Constant(value_int=0), op.Constant(value_int=1), op.Constant(value_int=2)
        tables = op.Range(i, op.Squeeze(B * A, op.Constant(value_ints=[0])), j)
        one = op.Constant(value_ints=[1])
        start = op.Reshape(tables * S, op.Concat(B, A, one, one, axis=0))  # row of the first cell
        total = op.Constant(value_float=0.0)
        total = with_level(total, rows, op.Gather(x_y, i), op.Gather(weight, i), op.Gather(sizes, i), start)
        start = start + op.Gather(areas, i)
        total = with_level(total, rows, op.Gather(x_y, j), op.Gather(weight, j), op.Gather(sizes, j), start)
        start = start + op.Gather(areas, j)
        total = with_level(total, rows, op.Gather(x_y, k), op.Gather(weight, k), op.Gather(sizes, k), start)
        queries_first = op.Transpose(total, perm=[0, 2, 1, 3])
        out = op.CastLike(op.Reshape(queries_first, op.Concat(B, logit_shape[1:2], A * D, axis=0)), value)
        return out

    return gather_form, attention, levels, beside, summed, with_level
