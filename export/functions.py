"""Deformable attention in ONNX: one node `tarvis::MSDeformAttn`, and its definition by standard operators.

The node has the inputs of `kernels.ms_deform_attn`:

    value  [B, S, A, D]           offset [B, Q, A, L, P, 2]     logit [B, Q, A, L, P]   of one float type
    ref    [B or 1, Q, L or 1, 2] float, in 0..1                shapes [2 L] int64: h0, w0, h1, w1, ..
    out    [B, Q, A * D]          in the type of value; positions, softmax and sums are in float32

A file carries the definition as a model-local function, so ONNX Runtime runs it as it is. TensorRT takes a
plugin instead (`plugin_form`), or the definition without GridSample (`with_body(model, "gather")`), since its
GridSample gives wrong results for deformable attention in several versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import onnx
import onnxscript
from onnx import FunctionProto, ModelProto, defs, numpy_helper, parser
from onnxscript import values

DOMAIN, NAME = "tarvis", "MSDeformAttn"
LEVELS = 3
Body = Literal["grid", "gather"]

_Parameter = defs.OpSchema.FormalParameter
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_SCHEMA = defs.OpSchema(
    NAME,
    DOMAIN,
    1,
    "Multi-scale deformable attention from raw offsets and logits.",
    inputs=[
        _Parameter("value", "T"),
        _Parameter("offset", "T"),
        _Parameter("logit", "T"),
        _Parameter("ref", "tensor(float)"),
        _Parameter("shapes", "tensor(int64)"),
    ],
    outputs=[_Parameter("out", "T")],
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
            node.attribute.append(onnx.helper.make_attribute("sizes", sizes))
    return model


def definition(opset: int, body: Body) -> FunctionProto:
    """The node's meaning in standard operators of one opset."""
    lines = [*_COMMON, *(_grid(opset) if body == "grid" else _gather()), "out = CastLike(sum, value)"]
    header = f'<opset_import: ["": {opset}], domain: "{DOMAIN}">'
    text = "\n".join(f"    {line}" for line in lines)
    return parser.parse_function(
        f"{header}\n{NAME} (value, offset, logit, ref, shapes) => (out) {{\n{text}\n}}"
    )


# x, weight: sampling places in pixels [B, Q, A, L, P] and attention over all L * P, both float
_COMMON = """
value_shape = Shape(value)
B = Slice(value_shape, zero, one)
S = Slice(value_shape, one, two)
A = Slice(value_shape, two, three)
D = Slice(value_shape, three, four)
logit_shape = Shape(logit)
Q = Slice(logit_shape, one, two)
P = Slice(logit_shape, four, five)
BA = Mul(B, A)
AD = Mul(A, D)
table = Cast <to = 1> (value)
flat = Flatten <axis = 3> (logit)
logits = Cast <to = 1> (flat)
softmax = Softmax <axis = -1> (logits)
weight_q = Reshape(softmax, logit_shape)
weight = Transpose <perm = [3, 0, 2, 1, 4]> (weight_q)
pixels = Cast <to = 1> (offset)
sizes = Reshape(shapes, pairs)
areas = ReduceProd <keepdims = 0> (sizes, one)
""".strip().splitlines()
_COMMON = [
    *(f"{name} = Constant <value_ints = [{i}]> ()" for i, name in enumerate(("zero", "one", "two", "three"))),
    "four = Constant <value_ints = [4]> ()",
    "five = Constant <value_ints = [5]> ()",
    "last = Constant <value_ints = [-1]> ()",
    "pairs = Constant <value_ints = [-1, 2]> ()",
    "ref_axes = Constant <value_ints = [2, 4]> ()",
    "half = Constant <value_float = 0.5> ()",
    "unit = Constant <value_float = 1.0> ()",
    "double = Constant <value_float = 2.0> ()",
    *_COMMON,
    "h_w = Cast <to = 1> (sizes)",  # [L, 2]
    "h_by_level, w_by_level = Split <axis = 1, num_outputs = 2> (h_w)",
    "w_h = Concat <axis = 1> (w_by_level, h_by_level)",
    "level_size = Unsqueeze(w_h, one)",  # [L, 1, 2]
    "centre = Unsqueeze(ref, ref_axes)",  # [B or 1, Q, 1, L or 1, 1, 2]
]


def _levels(name: str, source: str, axis: int) -> list[str]:
    """NAME_0, NAME_1, .. = `source` [.., L, ..] at each level."""
    return [
        line
        for level in range(LEVELS)
        for line in (
            f"{name}_i{level} = Constant <value_int = {level}> ()",
            f"{name}_{level} = Gather <axis = {axis}> ({source}, {name}_i{level})",
        )
    ]


def _grid(opset: int) -> list[str]:
    """`sum` [B, Q, A * D] by one GridSample a level."""
    mode = "bilinear" if opset < 20 else "linear"
    names = ", ".join(f"map_{level}" for level in range(LEVELS))
    lines = [
        "step = Div(pixels, level_size)",
        "place = Add(centre, step)",  # [B, Q, A, L, P, 2] in 0..1
        "twice = Mul(place, double)",
        "signed = Sub(twice, unit)",
        "grid = Transpose <perm = [3, 0, 2, 1, 4, 5]> (signed)",
        "maps = Transpose <perm = [0, 2, 3, 1]> (table)",  # [B, A, D, S]
        f"{names} = Split <axis = 3> (maps, areas)",
        "grid_shape = Concat <axis = 0> (BA, Q, P, two)",
        "weight_shape = Concat <axis = 0> (BA, one, Q, P)",
        *_levels("grid", "grid", 0),
        *_levels("weight", "weight", 0),
        *_levels("size", "sizes", 0),
    ]
    for i in range(LEVELS):
        lines += [
            f"map_shape_{i} = Concat <axis = 0> (BA, D, size_{i})",
            f"image_{i} = Reshape(map_{i}, map_shape_{i})",
            f"at_{i} = Reshape(grid_{i}, grid_shape)",
            f'sample_{i} = GridSample <mode = "{mode}", padding_mode = "zeros", align_corners = 0>'
            f" (image_{i}, at_{i})",  # [B * A, D, Q, P]
            f"share_{i} = Reshape(weight_{i}, weight_shape)",
            f"weighted_{i} = Mul(sample_{i}, share_{i})",
            f"level_{i} = ReduceSum <keepdims = 0> (weighted_{i}, three)",
        ]
    return [
        *lines,
        *_total("level", LEVELS),  # [B * A, D, Q]
        "sum_shape = Concat <axis = 0> (B, AD, Q)",
        "channels_first = Reshape(total, sum_shape)",
        "sum = Transpose <perm = [0, 2, 1]> (channels_first)",
    ]


def _gather() -> list[str]:
    """`sum` [B, Q, A * D] by four Gathers a level, of rows of the table [B * A * S, D]."""
    lines = [
        "by_head = Transpose <perm = [0, 2, 1, 3]> (table)",
        "rows_shape = Concat <axis = 0> (last, D)",
        "rows = Reshape(by_head, rows_shape)",
        "scaled = Mul(centre, level_size)",
        "moved = Add(scaled, pixels)",
        "shifted = Sub(moved, half)",  # [B, Q, A, L, P, 2] in pixels of the level
        "xy = Transpose <perm = [3, 0, 2, 1, 4, 5]> (shifted)",
        "x_y = Cast <to = 1> (xy)",
        "x_last, y_last = Split <axis = 5, num_outputs = 2> (x_y)",
        "xs = Squeeze(x_last, last)",  # [L, B, A, Q, P]
        "ys = Squeeze(y_last, last)",
        "table_range_0 = Constant <value_int = 0> ()",
        "table_range_1 = Constant <value_int = 1> ()",
        "tables = Squeeze(BA, zero)",
        "counted = Range(table_range_0, tables, table_range_1)",
        "firsts = Mul(counted, S)",
        "first_shape = Concat <axis = 0> (B, A, one, one)",
        "first = Reshape(firsts, first_shape)",
        "sample_shape = Concat <axis = 0> (B, A, Q, P, D)",
        "start_0 = Identity(first)",
        *_levels("x", "xs", 0),
        *_levels("y", "ys", 0),
        *_levels("weight", "weight", 0),
        *_levels("size", "sizes", 0),
    ]
    for i in range(LEVELS):
        lines += [
            f"h_{i}, w_{i} = Split <num_outputs = 2> (size_{i})",
            f"area_{i} = Mul(h_{i}, w_{i})",
            f"start_{i + 1} = Add(start_{i}, area_{i})",
        ]
        for axis, side in (("x", "w"), ("y", "h")):
            lines += [
                f"{axis}_floor_{i} = Floor({axis}_{i})",
                f"{axis}_high_{i} = Sub({axis}_{i}, {axis}_floor_{i})",  # weight of the cell after
                f"{axis}_low_{i} = Sub(unit, {axis}_high_{i})",
                f"{axis}_next_{i} = Add({axis}_floor_{i}, unit)",
                f"{side}_float_{i} = Cast <to = 1> ({side}_{i})",
                f"{axis}_end_{i} = Sub({side}_float_{i}, unit)",
            ]
            for corner, cell in (("low", "floor"), ("high", "next")):
                name = f"{axis}_{corner}_{i}"
                lines += [
                    f"{name}_some = Max({axis}_{cell}_{i}, nothing)",
                    f"{name}_clip = Min({name}_some, {axis}_end_{i})",
                    f"{name}_inside = Equal({name}_clip, {axis}_{cell}_{i})",
                    f"{name}_factor = Cast <to = 1> ({name}_inside)",
                    f"{name}_weight = Mul({name}, {name}_factor)",  # zero outside
                    f"{name}_cell = Cast <to = 7> ({name}_clip)",
                ]
        for v in ("low", "high"):
            for u in ("low", "high"):
                name = f"c{i}_{v}_{u}"
                lines += [
                    f"{name}_row = Mul(y_{v}_{i}_cell, w_{i})",
                    f"{name}_cell = Add({name}_row, x_{u}_{i}_cell)",
                    f"{name}_index = Add({name}_cell, start_{i})",  # [B, A, Q, P]
                    f"{name}_area = Mul(y_{v}_{i}_weight, x_{u}_{i}_weight)",
                    f"{name}_share = Mul({name}_area, weight_{i})",
                    f"{name}_column = Unsqueeze({name}_share, last)",
                    f"{name}_value = Gather <axis = 0> (rows, {name}_index)",  # [B, A, Q, P, D]
                    f"{name}_weighted = Mul({name}_value, {name}_column)",
                    f"sample_{4 * i + 2 * (v == 'high') + (u == 'high')} = ReduceSum <keepdims = 0>"
                    f" ({name}_weighted, three)",  # [B, A, Q, D]
                ]
    return [
        "nothing = Constant <value_float = 0.0> ()",
        *lines,
        *_total("sample", 4 * LEVELS),
        "queries_first = Transpose <perm = [0, 2, 1, 3]> (total)",
        "sum_shape = Concat <axis = 0> (B, Q, AD)",
        "sum = Reshape(queries_first, sum_shape)",
    ]


def _total(name: str, count: int) -> list[str]:
    """total = NAME_0 + NAME_1 + .."""
    lines = [f"{name}_sum_1 = Add({name}_0, {name}_1)"]
    lines += [f"{name}_sum_{i} = Add({name}_sum_{i - 1}, {name}_{i})" for i in range(2, count)]
    return [*lines, f"total = Identity({name}_sum_{count - 1})"]
