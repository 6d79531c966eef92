"""The operators of `kernels` that this package and `export` use, wherever that package lies."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from tarvis.places import package

__all__ = [
    "cell_centres",
    "dispatch",
    "label_upsample",
    "launcher",
    "make_private",
    "mask_bits",
    "mask_cost",
    "mask_logits",
    "mask_upsample",
    "masked_attention",
    "ms_deform_attn",
    "nearest_sample",
    "pack_bits",
    "point_sample",
    "require_private",
]

if TYPE_CHECKING:
    from kernels import (
        dispatch,
        label_upsample,
        mask_bits,
        mask_cost,
        mask_logits,
        mask_upsample,
        masked_attention,
        ms_deform_attn,
        nearest_sample,
        point_sample,
    )
    from kernels.build import make_private, require_private
    from kernels.mask_bits import pack_bits
    from kernels.ms_deform_attn import cell_centres
    from kernels.operator import launcher
else:
    _found = [
        vars(import_module(package("kernels") + module))
        for module in ("", ".mask_bits", ".ms_deform_attn", ".operator", ".build")
    ]
    globals().update({name: next(each[name] for each in _found if name in each) for name in __all__})
