"""How the forward kernel of deformable attention is launched for contiguous tensors of known shapes.

TensorRT gives a plugin pointers and shapes, no tensors. What `kernels._triton.ms_deform_attn.forward` reads
off its tensors follows from the shapes then: numbers, constants of the kernel, and the grid.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

from tarvis.operators import launcher

if TYPE_CHECKING:
    from kernels._triton.launch import Variant

forward_variant = launcher("ms_deform_attn.forward_variant")

LEVELS = 4
"""Levels the kernel has numbers for; those that are not there have size 0."""


@dataclass(frozen=True)
class Launch:
    """One launch.

    `tensors` are value [B, S, A, D], offset [B, Q, A, L, P, 2], logit [B, Q, A, L, P], ref [B or 1, Q, L or
    1, 2] and out [B, Q, A * D], in the kernel's order; `numbers` are its integers, after the tensors.
    """

    variant: Variant
    numbers: dict[str, int]
    grid: tuple[int]

    @classmethod
    def of(
        cls,
        dtype: torch.dtype,
        value: Sequence[int],
        logit: Sequence[int],
        ref: Sequence[int],
        sizes: Sequence[int],
    ) -> Self:
        """The launch for these shapes.

        Args:
            dtype: of all tensors except `ref`: float32, float16 or bfloat16; sums are float32.
            sizes: h0, w0, h1, w1, ..

        Raises:
            ValueError: shapes that do not fit together, or that the kernel does not take.
        """
        B, S, A, D = value
        _, Q, _, L, P = logit
        cells = sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))
        if len(sizes) != 2 * L or cells != S or tuple(logit[::2][:2]) != (B, A):
            raise ValueError(f"value {list(value)}, logit {list(logit)} and levels {list(sizes)} do not fit")
        if D not in (16, 32, 64) or L > LEVELS or L * P > 32:
            raise ValueError(f"the kernel takes no {D} channels a head and {L} levels of {P} points")
        sides = [*sizes, *[0, 0] * (LEVELS - L)]
        numbers = {"Q": Q} | {f"{'hw'[i % 2]}{i // 2}": side for i, side in enumerate(sides)}
        numbers |= {
            "value_b": S * A * D,
            "offset_b": Q * A * L * P * 2,
            "offset_q": A * L * P * 2,
            "logit_b": Q * A * L * P,
            "logit_q": A * L * P,
            "ref_b": Q * ref[2] * 2 if ref[0] > 1 else 0,
            "ref_q": ref[2] * 2,
            "ref_l": 2 if ref[2] > 1 else 0,
        }
        variant = forward_variant(dtype, A, D, L, P)
        return cls(variant, numbers, (B * A * -(-Q // variant.constants["BLOCK"]),))

    def __call__(self, *tensors: Any) -> None:
        """Launch on the current stream. Tensors, or what has `data_ptr()` and `dtype` like one."""
        variant = self.variant
        variant.kernel[self.grid](*tensors, **self.numbers, **variant.constants, num_warps=variant.num_warps)


launch_of = functools.cache(Launch.of)  # an engine asks for the same again and again
