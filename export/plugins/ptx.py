"""The Triton kernel of deformable attention as PTX that TensorRT can launch, made without a GPU.

TensorRT passes a kernel pointers of inputs, 32-bit integers, pointers of outputs, in that order and nothing
else. Triton writes parameters in the order of its source and adds two pointers to scratch memory at the end,
so the list is put in order here, and what Triton added is taken out where nothing reads it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels._triton.launch import Variant

ARCHITECTURES = (80, 89, 90, 120)
VERSION = 87
"""PTX 8.7: the oldest that knows sm_120; drivers from R570 take it (newer Triton writes newer PTX)."""

_ENTRY = re.compile(r"(\.entry\s+(\w+)\()(.*?)(\n\))", re.DOTALL)


@dataclass(frozen=True)
class Kernel:
    """PTX of one kernel: `parameters` names what it takes, in order; a block has `threads` threads."""

    name: str
    text: str
    parameters: tuple[str, ...]
    threads: int
    shared: int


def compile_ptx(variant: Variant, architecture: int, version: int = VERSION) -> Kernel:
    """A kernel for compute capability `architecture` / 10 with TensorRT's parameter list.

    Raises:
        RuntimeError: Triton interprets kernels in this process, or the kernel needs scratch memory.
    """
    compiled = variant.compile(architecture, ptx_version=version)
    about = compiled.metadata
    scratch = [getattr(about, f"{kind}_scratch_size", 0) for kind in ("global", "profile")]
    if any(scratch):
        raise RuntimeError(f"{variant.name} needs {scratch} bytes of scratch memory, which TensorRT has not")
    declared = [name for name in variant.kernel.arg_names if name in variant.types]
    # pointers of inputs, numbers, pointers of outputs
    order = sorted(declared, key=lambda name: (name == "out_ptr", not variant.types[name].startswith("*")))
    text = with_parameters(compiled.asm["ptx"], [declared.index(name) for name in order])
    entry = _ENTRY.search(text)
    assert entry is not None
    return Kernel(entry[2], text, tuple(order), 32 * about.num_warps, about.shared)


def with_parameters(ptx: str, order: list[int]) -> str:
    """The PTX with the parameters of its entry in `order`, by number, and without the others.

    Raises:
        RuntimeError: one that is left out is read.
    """
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise RuntimeError("no .entry in this PTX")
    rows = [row.strip().rstrip(",") for row in entry[3].strip().splitlines()]
    body = ptx[entry.end() :]
    for i in set(range(len(rows))) - set(order):
        name = rows[i].split()[-1]
        if re.search(rf"\b{name}\b", body):
            raise RuntimeError(f"the hidden parameter {name} is read")
    kept = ",\n\t".join(rows[i] for i in order)
    return f"{ptx[: entry.start()]}{entry[1]}\n\t{kept}{entry[4]}{body}"
