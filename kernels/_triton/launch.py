"""What all launchers share: launching under tracing, and kernels compiled ahead of time."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from ..dispatch import INTERPRETED

__all__ = [
    "INTERPRETED",
    "MOST_PROGRAMS",
    "TRITON_TYPE",
    "Variant",
    "cdiv",
    "is_aligned",
    "programs",
    "traced",
]

MOST_PROGRAMS = 65535
"""Of a grid, along its second and its third axis."""

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


def is_aligned(x: Tensor, unit: int) -> bool:
    """Whether the first number lies at a multiple of `unit` bytes.

    By its address: memory from elsewhere (DLPack, from_blob) may begin anywhere. While a program is traced
    there is none, and what PyTorch allocates begins at a multiple of any unit.
    """
    offset = x.storage_offset() * x.element_size()
    try:
        return offset % unit == 0 and x.data_ptr() % unit == 0
    except RuntimeError:
        return offset % unit == 0


@cache
def programs(device: torch.device) -> int:
    """What cutting work into parts aims at: four programs a multiprocessor; not tuned."""
    if device.type != "cuda" or not torch.cuda.is_available():  # interpreted, or compiled for elsewhere
        return 4 * 132
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


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

    def compile(self, arch: int, **options: Any) -> Any:
        """The kernel compiled for compute capability `arch` / 10, with PTX and machine code in `.asm`.

        Raises:
            RuntimeError: Triton interprets kernels in this process.
        """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.runtime.jit import JITFunction

        if not isinstance(self.kernel, JITFunction):
            raise RuntimeError("TRITON_INTERPRET is set: nothing can be compiled")
        names = self.kernel.arg_names
        assert set(names) == {*self.types, *self.constants}, (
            f"{self.name}: {set(names) ^ {*self.types, *self.constants}} not in both"
        )
        signature = {name: self.types.get(name, "constexpr") for name in names}
        divisible = [i for i, name in enumerate(names) if signature[name][0] == "*" or name in self.aligned]
        source = ASTSource(
            fn=self.kernel,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in self.constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
        )
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, **options}
        return triton.compile(
            source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": True, **options}
        )
