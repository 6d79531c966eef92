"""The forms of every Triton kernel whose machine code is checked: see `bench.codegen`."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch

from kernels._triton import (
    mask_bits,
    mask_cost,
    mask_upsample,
    masked_attention,
    ms_deform_attn,
    point_sample,
)
from kernels._triton.launch import TRITON_TYPE, Variant

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def variants() -> list[Variant]:
    """Those of every operator."""
    return [
        *mask_bits_variants(),
        *mask_cost_variants(),
        *mask_upsample_variants(),
        *masked_attention_variants(),
        *ms_deform_attn_variants(),
        *point_sample_variants(),
    ]


def mask_bits_variants() -> list[Variant]:
    """Features with contiguous channels (as the model gives them) and with contiguous keys, per dtype."""
    out = []
    kernel = mask_bits._mask_bits
    for dtype in DTYPES:
        kind = f"*{TRITON_TYPE[dtype]}"
        config = mask_bits.FULL if dtype == torch.float32 else mask_bits.HALF
        for contiguous in ("features_c", "features_n"):
            constants = {
                "query_c": 1, contiguous: 1, "UPCAST": False, "PRECISION": config.precision,
                "BLOCK_Q": config.block_q, "BLOCK_N": config.block_n, "BLOCK_C": config.block_c,
            }  # fmt: skip
            pointers = {"query_ptr": kind, "features_ptr": kind, "words_ptr": "*i32", "seen_ptr": "*u8"}
            sizes = [x for x in kernel.arg_names if x not in constants and x not in pointers]
            out.append(
                Variant(
                    name=f"mask_bits {kind[1:]} {contiguous}",
                    kernel=kernel,
                    types=pointers | dict.fromkeys(sizes, "i32"),
                    constants=constants,
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                    aligned=tuple(x for x in sizes if x != "Q"),  # vectors of keys need an aligned N
                    expect={"HGMMA": 4, "LDGSTS.BYPASS.128": 24},
                )
            )
    return out


def mask_cost_variants() -> list[Variant]:
    """Contiguous inputs, per dtype; and sizes and strides of 1, which the compiler takes as constants."""
    out = []
    runtime = ("M", "C", "R", "G", "span", "embedding_m", "features_r", "targets_g")
    ones = {"embedding_c": 1, "features_c": 1, "targets_r": 1}
    for dtype in DTYPES:
        kind = f"*{TRITON_TYPE[dtype]}"
        half = dtype != torch.float32
        config = mask_cost.HALF if half else mask_cost.FULL
        blocks = {"BLOCK_M": config.block_m, "BLOCK_R": config.block_r, "BLOCK_G": mask_cost.BLOCK_G}
        types = {"embedding_ptr": kind, "features_ptr": kind, "targets_ptr": "*fp32", "out_ptr": "*fp32"}
        out.append(
            Variant(
                name=f"mask_cost {TRITON_TYPE[dtype]}",
                kernel=mask_cost._sums,
                types={**types, **dict.fromkeys(runtime, "i32")},
                constants={**ones, "HALF": half, "UPCAST": not half, **blocks, "BLOCK_C": config.block_c},
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                aligned=("C", "R", "span", "embedding_m", "features_r", "targets_g"),
                expect={"LDGSTS.BYPASS.128": 4, "HGMMA": 8},
            )
        )
    unit = {**dict.fromkeys(runtime, 1), **out[0].constants}
    del unit["span"]
    types = {name: kind for name, kind in out[0].types.items() if name not in unit}
    name = "mask_cost bf16 ones"
    return [*out, replace(out[0], name=name, types=types, constants=unit, aligned=("span",), expect={})]


def mask_upsample_variants() -> list[Variant]:
    """Bytes and bits, labels of one and two bytes; few rows for enlarging, many for shrinking."""
    tables = {"first_ptr": "*i32", "y_weight_ptr": "*fp32", "x_start_ptr": "*i32", "x_weight_ptr": "*fp32"}
    masks, labels = mask_upsample._mask_upsample, mask_upsample._label_upsample
    mask_x, label_x = mask_upsample.MASK_BLOCK_X, mask_upsample.LABEL_BLOCK_X
    of_masks, of_labels = ("h", "w", "H", "W", "logits_m"), ("K", "h", "w", "H", "W", "logits_k", "logits_t")
    kernels: dict[str, tuple[Any, dict[str, str], tuple[str, ...], dict[str, Any], dict[str, int]]] = {
        "mask_upsample bytes": (
            masks, {"masks_ptr": "*u8"}, of_masks, {"PACKED": False, "BLOCK_X": mask_x}, {"STG.128": 4},
        ),
        "mask_upsample bits": (
            masks, {"masks_ptr": "*i32"}, of_masks, {"PACKED": True, "BLOCK_X": mask_x}, {"STG": 2},
        ),
        "label_upsample u8": (
            labels, {"labels_ptr": "*u8"}, of_labels, {"BACKGROUND": False, "BLOCK_X": label_x},
            {"STG.128": 1},
        ),
        "label_upsample i16": (
            labels, {"labels_ptr": "*i16"}, of_labels, {"BACKGROUND": True, "BLOCK_X": label_x},
            {"STG.128": 2},
        ),
    }  # fmt: skip
    return [
        Variant(
            name=f"{name} {TRITON_TYPE[dtype]} {rows} rows",
            kernel=kernel,
            types={
                "logits_ptr": f"*{TRITON_TYPE[dtype]}", **result, **tables, **dict.fromkeys(integers, "i32")
            },
            constants={"ROWS": rows, "BLOCK_Y": mask_upsample.BLOCK_Y, **constants},
            num_warps=1,
            aligned=("W",),
            expect=expect,
        )
        for name, (kernel, result, integers, constants, expect) in kernels.items()
        for dtype, rows in ((torch.bfloat16, 5), (torch.float16, 5), (torch.float32, 5), (torch.float32, 31))
    ]  # fmt: skip


def masked_attention_variants() -> list[Variant]:
    """Every kernel for every dtype and head size; parts of several spans, which are float32."""
    out = []
    for dtype in DTYPES:
        for D in (32, 16, 64):
            for kernel in (masked_attention._forward, masked_attention._grad_q, masked_attention._grad_kv):
                config = masked_attention._blocks(kernel.__name__.removeprefix("_"), dtype, D)
                constants = {"D": D, "UPCAST": False, **config.arguments()}
                out.append(_masked_attention(kernel, dtype, "*fp32", constants))
            constants = {"D": D, "BLOCK_R": masked_attention.BLOCK_R}
            kind = f"*{TRITON_TYPE[dtype]}"
            out.append(_masked_attention(masked_attention._merge, dtype, kind, constants))
    return out


def _masked_attention(kernel: Any, dtype: torch.dtype, out_type: str, constants: dict[str, Any]) -> Variant:
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    known = {"words_ptr": "*i32", "seen_ptr": "*u8", "out_ptr": out_type}
    known |= dict.fromkeys(("part_ptr", "part_lse_ptr", "lse_ptr", "delta_ptr"), "*fp32")
    inputs = dict.fromkeys((x for x in kernel.arg_names if x.endswith("_ptr")), f"*{TRITON_TYPE[dtype]}")
    types = dict.fromkeys((x for x in kernel.arg_names if x not in constants), "i32") | inputs | known
    tensor_cores = constants.get("PRECISION") == ("tf32x3" if dtype == torch.float32 else "ieee")
    return Variant(
        name=f"masked_attention {kernel.__name__[1:]} {TRITON_TYPE[dtype]} D={constants['D']}",
        kernel=kernel,
        types={x: kind for x, kind in types.items() if x in kernel.arg_names},
        constants=constants,
        aligned=tuple(x for x in types if re.search("_[baqns]$", x)),  # strides
        expect={"HGMMA": 4} if tensor_cores else {},
        **options,
    )


def ms_deform_attn_variants() -> list[Variant]:
    """The neck's form for every dtype and width; other places, numbers of points and modes for some."""
    forward = ms_deform_attn.forward_variant
    out = []
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        shapes = [{"D": 32}, {"D": 16}, {"D": 64}, {"L": 4, "P": 4, "place": "classic"}]
        for shape in shapes:
            base = forward(dtype, **shape)  # type: ignore[arg-type]
            out += [base, _backward(base, dtype)]
        out += [_backward(forward(dtype), dtype, atomic=False), _gather(dtype)]
    cell = forward(torch.bfloat16, L=3, P=3, place="cell")
    return [*out, cell, _backward(cell, torch.bfloat16)]


def _backward(base: Variant, dtype: torch.dtype, atomic: bool = True) -> Variant:
    """The backward of the shapes of a forward."""
    kind, samples, D = TRITON_TYPE[dtype], base.constants["L"] * base.constants["P"], base.constants["D"]
    types = {name: type for name, type in base.types.items() if name != "out_ptr"}
    types |= dict.fromkeys(("grad_ptr", "grad_offset_ptr", "grad_logit_ptr"), f"*{kind}")
    types |= {"grad_value_ptr": "*fp32", "fraction_ptr": "*fp32", "attention_ptr": "*fp32"}
    types |= {"key_ptr": "*i32", "nowhere": "i32", "S": "i32"}
    threads = ms_deform_attn.BACKWARD_THREADS
    expect = {"LDG.128" if kind == "fp32" else "LDG.64": 4 * samples}
    return replace(
        base,
        name=base.name.replace("attn", "attn_backward") + " deterministic" * (not atomic),
        kernel=ms_deform_attn._backward,
        types=types,
        constants=base.constants
        | {"BLOCK": threads * 4 // D, "PADDED": 1 << (samples - 1).bit_length(), "ATOMIC": atomic},
        num_warps=threads // 32,
        expect=expect | {"REDG.ADD.F32x4": 4 * samples} if atomic else expect,
    )


def _gather(dtype: torch.dtype, D: int = 32, L: int = 3, P: int = 4) -> Variant:
    kind = TRITON_TYPE[dtype]
    types = dict.fromkeys(("grad_ptr", "grad_value_ptr"), f"*{kind}")
    types |= {"order_ptr": "*i64", "bound_ptr": "*i64", "fraction_ptr": "*fp32", "attention_ptr": "*fp32"}
    types |= dict.fromkeys(("S", *ms_deform_attn._SIZES), "i32")
    constants = {"A": 8, "D": D, "L": L, "P": P, "BLOCK": ms_deform_attn.GATHER_BLOCK}
    name = f"ms_deform_attn_gather {kind} D={D} {L}x{P}"
    return Variant(name, ms_deform_attn._gather, types, constants, num_warps=1)


def point_sample_variants() -> list[Variant]:
    """Each kernel and dtype with 256 contiguous channels and with one channel."""
    sample, scatter, collect = point_sample._sample, point_sample._scatter, point_sample._collect
    threads = point_sample.THREADS
    out = []
    for dtype in DTYPES:
        kind = TRITON_TYPE[dtype]
        wide = threads * 16 // dtype.itemsize
        maps, grad = {"maps_ptr": f"*{kind}"}, {"grad_ptr": f"*{kind}"}
        points, order = {"points_ptr": "*fp32"}, {"order_ptr": "*i32", "first_ptr": "*i32"}
        rounded, exact = {"out_ptr": f"*{kind}"}, {"out_ptr": "*fp32"}
        kernels = (
            (sample, maps | points | rounded, wide, {"LDG.128": 4, "STG.128": 1}),
            (scatter, grad | points | exact, threads * 4, {"REDG.ADD.F32x4": 4}),
            (collect, grad | points | order | rounded, wide, {"LDG.128": 1, "STG.128": 1}),
        )
        out += [_point(kernel, kind, 256, *rest) for kernel, *rest in kernels]  # type: ignore[arg-type]
        out += [_point(kernel, kind, 1, pointers, values) for kernel, pointers, values, _ in kernels]
    masks = {"maps_ptr": "*u8", "points_ptr": "*fp32", "out_ptr": "*fp32"}
    return [*out, _point(sample, "u8", 1, masks, threads * 4)]


def _point(
    kernel: Any,
    kind: str,
    channels: int,
    pointers: dict[str, str],
    values: int,
    expect: dict[str, int] | None = None,
) -> Variant:
    collects = kernel is point_sample._collect
    block, block_c = point_sample._tile(channels, values)
    maps = "maps" if kernel is point_sample._sample else "out"
    constants = {f"{maps}_c" if channels > 1 else f"{maps}_w": 1}
    constants |= {"BLOCK_M" if collects else "BLOCK_R": block, "BLOCK_C": block_c}
    if channels == 1:
        constants["C"] = 1
    strides = [f"{maps}_{axis}" for axis in "nchw"] + ["points_n"]
    strides += ["order_n", "first_n"] if collects else []
    runtime = [name for name in ("R", "C", "H", "W", *strides) if name not in constants]
    return Variant(
        name=f"point{kernel.__name__} {kind} {channels}",
        kernel=kernel,
        types={**pointers, **dict.fromkeys(runtime, "i32")},
        constants=constants,
        num_warps=point_sample.NUM_WARPS,
        aligned=tuple(name for name in ("C", "H", "W", *strides[:4]) if name not in constants),
        expect=expect or {},
    )
