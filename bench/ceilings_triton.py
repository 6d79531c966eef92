# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The kernels of ceilings.py: additions in memory, and reads of 64 bytes from anywhere."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._triton.launch import Variant

WARPS = 4
ADD_STEPS = 16  # of a program, so that starting programs is not what is measured
GATHER_ROWS, GATHER_STEPS = 64, 32  # rows of 64 bytes read by a program at a time, and how many times


@triton.jit
def reduce_blocks(
    out_ptr,  # [num_blocks * BLOCK] float32
    num_blocks,  # a power of two
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    # programs that run together add to different blocks; a block comes round again num_blocks steps later
    for step in tl.static_range(STEPS):
        block = (tl.program_id(0) + step * tl.num_programs(0)) & (num_blocks - 1)
        place = block * BLOCK + tl.arange(0, BLOCK)
        tl.atomic_add(out_ptr + place, tl.full([BLOCK], 1.0, tl.float32), sem="relaxed")


@triton.jit
def gather_rows(
    table_ptr,  # [num_rows, 16] int32
    out_ptr,  # [programs, ROWS, 16] int32
    num_rows,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    program = tl.program_id(0)
    row, word = tl.arange(0, ROWS), tl.arange(0, 16)
    total = tl.zeros([ROWS, 16], tl.int32)
    state = (program * ROWS + row).to(tl.uint32) * 2654435761 + 12345
    for _ in tl.static_range(STEPS):
        state = state * 1664525 + 1013904223  # a step of a linear congruential generator: its high bits serve
        place = tl.umulhi(state, num_rows.to(tl.uint32)).to(tl.int32)
        total += tl.load(table_ptr + place[:, None] * 16 + word[None, :])
    tl.store(out_ptr + (program * ROWS + row)[:, None] * 16 + word[None, :], total)


def variants() -> list[Variant]:
    """For reading their machine code: one wide reduction a thread must be RED.ADD.F32x4, a gather LDG.128."""
    return [
        *(
            Variant(
                name=f"reduce fp32 {lanes} a thread",
                kernel=reduce_blocks,
                types={"out_ptr": "*fp32", "num_blocks": "i32"},
                constants={"BLOCK": 32 * WARPS * lanes, "STEPS": ADD_STEPS},
                num_warps=WARPS,
            )
            for lanes in (1, 4)
        ),
        Variant(
            name="gather 64 bytes",
            kernel=gather_rows,
            types={"table_ptr": "*i32", "out_ptr": "*i32", "num_rows": "i32"},
            constants={"ROWS": GATHER_ROWS, "STEPS": GATHER_STEPS},
            num_warps=WARPS,
        ),
    ]
