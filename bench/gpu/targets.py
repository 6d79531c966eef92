"""What the kernels are meant to reach on an H200, and whether a run did.

The classic kernel is timed with the softmax and the locations that it wants. Public Triton kernels are not
part of this repository, so that comparison has to be made by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.gpu.floors import binding, rates

Row = Mapping[str, Any]
CLOCKS = ("graph_us", "bench_us", "eager_us")


@dataclass(frozen=True)
class Target:
    """`value` gives the number reached, or None if it was not measured."""

    name: str
    must: float
    stretch: float | None
    value: Callable[[Sequence[Row]], float | None]
    unit: str = "x"
    at_most: bool = False

    def verdict(self, rows: Sequence[Row]) -> tuple[float | None, str]:
        """The number, and "met", "stretch met", "missed" or "not run"."""
        found = self.value(rows)
        if found is None:
            return None, "not run"
        if self.stretch is not None and self._reaches(found, self.stretch):
            return found, "stretch met"
        return found, "met" if self._reaches(found, self.must) else "missed"

    def _reaches(self, found: float, wanted: float) -> bool:
        return found <= wanted if self.at_most else found >= wanted


def find(rows: Sequence[Row], kind: str, case: str, impl: str) -> Row | None:
    """The last such row, if it has numbers."""
    for row in reversed(rows):
        if (row["kind"], row["case"], row.get("impl")) == (kind, case, impl):
            return None if "not_run" in row or "failed" in row else row
    return None


def ratio(baseline: Row, ours: Row) -> float | None:
    """How many times as long the baseline takes, by the first clock that both have."""
    for clock in CLOCKS:
        if baseline.get(clock) and ours.get(clock):
            return baseline[clock] / ours[clock]
    return None


def times_faster(case: str, baseline: str, ours: str = "triton") -> Callable[[Sequence[Row]], float | None]:
    def value(rows: Sequence[Row]) -> float | None:
        a, b = find(rows, "time", case, baseline), find(rows, "time", case, ours)
        return None if a is None or b is None else ratio(a, b)

    return value


def share_of_bytes(case: str, baseline: str, ours: str = "triton") -> Callable[[Sequence[Row]], float | None]:
    def value(rows: Sequence[Row]) -> float | None:
        a, b = find(rows, "memory", case, baseline), find(rows, "memory", case, ours)
        return None if a is None or b is None else b["bytes"] / a["bytes"]

    return value


def share_of_floor(case: str, impl: str = "triton") -> Callable[[Sequence[Row]], float | None]:
    def value(rows: Sequence[Row]) -> float | None:
        row = find(rows, "time", case, impl)
        taken = None if row is None else taken_us(row)
        floor = None if row is None else binding(row["amounts"], rates(rows))
        return None if taken is None or floor is None else floor[1] / taken

    return value


def taken_us(row: Row) -> float | None:
    return next((row[clock] for clock in CLOCKS if row.get(clock)), None)


def microseconds(case: str, impl: str = "triton") -> Callable[[Sequence[Row]], float | None]:
    def value(rows: Sequence[Row]) -> float | None:
        row = find(rows, "time", case, impl)
        return None if row is None else taken_us(row)

    return value


FORWARD, BACKWARD = "msda forward 12x480x864 {} 2px", "msda backward 3x512x896 B=1 {} 2px"
KEPT = "msda kept for backward 3x512x896 B=1 bf16 2px"
CHAIN = "attention masks of 9 layers 12x480x864 Q=150 bf16"
LAYER = "masked attention layer 12x480x864 1/8 Q=150 bf16"
ATTENTION = "masked_attention 12x480x864 1/8 Q=150 bf16"
UPSAMPLE = "mask_upsample 12x480x864 N=150 to 480x864 {}"
STEP = "matching + losses + gradients 3x512x896 B=2 10 outputs fp32"

TARGETS = [
    Target(
        "deformable attention forward, bf16, against classic fp32",
        4, 6, times_faster(FORWARD.format("bf16"), "classic"),
    ),
    Target(
        "the same in microseconds",
        float("inf"), 180, microseconds(FORWARD.format("bf16")), "us", at_most=True,
    ),
    Target(
        "deformable attention forward, fp32, against classic fp32",
        2.5, 3.5, times_faster(FORWARD.format("fp32"), "classic"),
    ),
    Target("deformable attention forward, against the best public Triton kernel", 1.5, 2, lambda _: None),
    Target(
        "deformable attention backward, bf16, against classic fp32",
        2.5, 4, times_faster(BACKWARD.format("bf16"), "classic"),
    ),
    Target(
        "memory kept for the backward, share of the classic graph's",
        0.4, None, share_of_bytes(KEPT, "classic"), "", at_most=True,
    ),
    Target("attention masks of all layers, against full logits a layer", 8, 15, times_faster(CHAIN, "usual")),
    Target(
        "masked attention layer at 1/8, against nn.MultiheadAttention",
        10, None, times_faster(LAYER, "nn.MultiheadAttention"),
    ),
    Target(
        "masked attention at 1/8, against SDPA with a bool mask",
        1.5, None, times_faster(ATTENTION, "sdpa bool mask"),
    ),
    Target(
        "final masks as bytes, against interpolate",
        4, None, times_faster(UPSAMPLE.format("bytes"), "interpolate"),
    ),
    Target(
        "final masks as bits, against interpolate",
        8, None, times_faster(UPSAMPLE.format("bits"), "interpolate"),
    ),
    Target(
        "peak memory of matching + losses + gradients, share of stored logits'",
        0.25, None, share_of_bytes(STEP, "usual"), "", at_most=True,
    ),
    Target(
        "share of the binding floor, deformable attention forward bf16",
        0.6, 0.75, share_of_floor(FORWARD.format("bf16")), "",
    ),
    Target(
        "share of the binding floor, deformable attention backward bf16",
        0.6, 0.75, share_of_floor(BACKWARD.format("bf16")), "",
    ),
]  # fmt: skip
