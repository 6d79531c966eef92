"""What all launchers share: launching under tracing, and variants compiled ahead of time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.library import wrap_triton

from kernels.dispatch import INTERPRETED

__all__ = ["INTERPRETED", "TRITON_TYPE", "Variant", "cdiv", "traced"]

TRITON_TYPE = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.uint8: "u8",
}


def traced(kernel: Any) -> Any:
    """The kernel in a form that torch.compile can look into; interpreted kernels as they are."""
    return kernel if INTERPRETED else wrap_triton(kernel)


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b; for sizes that are symbols, too."""
    return (a + b - 1) // b


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel, for checking its machine code without a GPU.

    `types` gives every runtime argument its Triton type ("*bf16", "i32", "fp32"); pointers and the names in
    `aligned` are multiples of 16. `expect` holds what the machine code must satisfy on sm_90: least counts of
    instructions by prefix ("LDG.E.128": 48), checked beside spills and the registers in the committed table.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = ()
    expect: dict[str, int] = field(default_factory=dict)
