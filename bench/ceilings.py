"""What this GPU can do at most: copies, matrix products, float32 reductions in memory, gathers of 64 bytes.

The kernels' floors are computed from the rates found here. Reductions (atomic additions whose result is
not read, RED) decide how deformable attention's backward pass should be written: see NOTES.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.record import OUT_OF_TIME, Recorder, short
from bench.targets import taken_us
from bench.timing import times

ADDED = 1 << 28  # float32 reductions of one measurement, 1 GiB


def ceilings(record: Recorder) -> None:
    """Section: one row for each."""
    for name, unit, measure in measurements(record.device, record.small):
        row: dict[str, Any] = {"kind": "ceiling", "case": name, "impl": "", "unit": unit}
        try:
            row |= {"not_run": OUT_OF_TIME} if record.over() else measure()
        except Exception as problem:
            row["failed"] = short(problem)
        record.emit(row)
        record.free()


def measurements(device: str, small: bool = False) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """(name, unit, measurement): each gives times and the `rate` in that unit."""
    yield "copy", "TB/s", partial(copy, device, 1 << (16 if small else 30))
    yield "matmul bf16", "TFLOP/s", partial(matmul, device, 64 if small else 8192)
    if device == "cpu":
        return
    for lanes in (1, 4):
        for reuse in (1, 16, 256):
            name = f"reduce fp32{'x4' if lanes == 4 else ''}, every address {reuse}x"
            yield name, "TB/s", partial(reductions, device, lanes, reuse)
    for megabytes in (4, 50):
        yield f"gather 64 bytes of {megabytes} MB", "TB/s", partial(gather, device, megabytes << 20)


def copy(device: str, size: int) -> dict[str, Any]:
    """Reads and writes `size` bytes."""
    source = torch.ones(2, size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return rate(lambda out, x: out.copy_(x), list(zip(target, source, strict=True)), 2 * size / 1e12)


def matmul(device: str, size: int) -> dict[str, Any]:
    factors = torch.randn(2, 2, size, size, device=device, dtype=torch.bfloat16)
    return rate(torch.matmul, [tuple(pair) for pair in factors], 2 * size**3 / 1e12)


def reductions(device: str, lanes: int, reuse: int) -> dict[str, Any]:
    """Adds ADDED float32 numbers to ADDED / reuse addresses; threads hold `lanes` adjacent ones each.

    `reuse` is a power of two.
    """
    from bench.ceilings_triton import ADD_STEPS, WARPS, reduce_blocks

    block = 32 * WARPS * lanes
    programs = ADDED // (block * ADD_STEPS)
    target = torch.zeros(ADDED // reuse, device=device)

    def call(out: torch.Tensor) -> None:
        reduce_blocks[(programs,)](out, out.numel() // block, BLOCK=block, STEPS=ADD_STEPS, num_warps=WARPS)

    return rate(call, [(target,)], 4 * ADDED / 1e12)


def gather(device: str, size: int) -> dict[str, Any]:
    """Reads rows of 64 bytes from pseudo-random places of a buffer."""
    from bench.ceilings_triton import GATHER_ROWS, GATHER_STEPS, WARPS, gather_rows

    programs = 132 * 64
    table = torch.ones(size // 64, 16, dtype=torch.int32, device=device)
    out = torch.empty(programs, GATHER_ROWS, 16, dtype=torch.int32, device=device)

    def call(table: torch.Tensor, out: torch.Tensor) -> None:
        gather_rows[(programs,)](
            table, out, table.shape[0], ROWS=GATHER_ROWS, STEPS=GATHER_STEPS, num_warps=WARPS
        )

    return rate(call, [(table, out)], programs * GATHER_STEPS * GATHER_ROWS * 64 / 1e12)


def rate(call: Callable[..., Any], sets: Any, amount: float) -> dict[str, Any]:
    """Times of a call, and `amount` a second."""
    found = times(call, sets)
    taken = taken_us(found)
    assert taken is not None
    return {**found, "rate": amount / (taken * 1e-6)}
