"""What the kernels are meant to reach on an H200, whether a run did, and the least times that are possible.

A floor is an amount of work over a rate; the largest floor of a call is the binding one. Rates of copies,
products and reductions are those that ceilings.py measured in the same run, if it ran.

The classic kernel is timed with the softmax and the locations that it wants. Public Triton kernels are not
part of this repository, so that comparison has to be made by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.timing import CLOCKS

Row = Mapping[str, Any]

SM, CLOCK = 132, 1.98e9

# amount -> (rate a second, which ceiling of ceilings.py replaces it, units of that one in a second)
RATES: dict[str, tuple[float, str, float]] = {
    "dram_bytes": (4.3e12, "copy", 1e12),  # everything that must be read and written once
    "l1_bytes": (SM * 128 * CLOCK, "", 0),  # gathered
    "tensor_flop": (790e12, "matmul bf16", 1e12),
    "fp32_flop": (67e12, "", 0),
    "red_bytes": (2.5e12, "reduce fp32x4, every address 256x", 1e12),  # fp32 added in memory
    "instructions": (SM * 4 * 32 * CLOCK, "", 0),  # of single threads
}


def rates(rows: Iterable[Row]) -> dict[str, float]:
    """The rate of each amount: measured in these rows, or else assumed."""
    measured = {row["case"]: row["rate"] for row in rows if row["kind"] == "ceiling" and "rate" in row}
    return {
        amount: measured[ceiling] * unit if ceiling in measured else assumed
        for amount, (assumed, ceiling, unit) in RATES.items()
    }


def binding(amounts: Mapping[str, float], rate: Mapping[str, float]) -> tuple[str, float] | None:
    """(amount, microseconds) of the binding floor; None if no amounts are known."""
    floors = {name: amount / rate[name] * 1e6 for name, amount in amounts.items()}
    return max(floors.items(), key=lambda item: item[1]) if floors else None


def taken_us(row: Row) -> float | None:
    """The number that is compared: the graph's, or else do_bench's, or else (on a CPU) the eager one."""
    return next((row[clock] for clock in CLOCKS if row.get(clock)), None)


def ratio(baseline: Row, ours: Row) -> float | None:
    """How many times as long the baseline takes, by the first clock that both have."""
    both = (clock for clock in CLOCKS if baseline.get(clock) and ours.get(clock))
    return next((baseline[clock] / ours[clock] for clock in both), None)


def has_numbers(row: Row) -> bool:
    return "not_run" not in row and "failed" not in row


def find(rows: Sequence[Row], kind: str, case: str, impl: str) -> Row | None:
    """The last such row, if it has numbers."""
    found = [row for row in rows if (row["kind"], row["case"], row.get("impl")) == (kind, case, impl)]
    return found[-1] if found and has_numbers(found[-1]) else None


Value = Callable[[Sequence[Row], str, str], float | None]  # of rows, a case and a baseline


def times_faster(rows: Sequence[Row], case: str, baseline: str) -> float | None:
    a, b = (find(rows, "time", case, impl) for impl in (baseline, "triton"))
    return None if a is None or b is None else ratio(a, b)


def share_of_bytes(rows: Sequence[Row], case: str, baseline: str) -> float | None:
    a, b = (find(rows, "memory", case, impl) for impl in (baseline, "triton"))
    return None if a is None or b is None else b["bytes"] / a["bytes"]


def microseconds(rows: Sequence[Row], case: str, _: str) -> float | None:
    row = find(rows, "time", case, "triton")
    return None if row is None else taken_us(row)


def share_of_floor(rows: Sequence[Row], case: str, _: str) -> float | None:
    row = find(rows, "time", case, "triton")
    return None if row is None else reached(row, rates(rows))


def reached(row: Row, rate: Mapping[str, float]) -> float | None:
    """The binding floor as a share of the time taken."""
    taken, floor = taken_us(row), binding(row["amounts"], rate)
    return None if taken is None or floor is None else floor[1] / taken


UNITS: dict[Value, str] = {times_faster: "x", microseconds: "us"}
AT_MOST: tuple[Value, ...] = (share_of_bytes, microseconds)


@dataclass(frozen=True)
class Target:
    """What `value` of a case is to reach: at least, or at most for what is better the smaller it is."""

    name: str
    must: float | None
    stretch: float | None
    value: Value
    case: str = ""
    baseline: str = ""

    @property
    def unit(self) -> str:
        return UNITS.get(self.value, "")

    def verdict(self, rows: Sequence[Row]) -> tuple[float | None, str]:
        """The number, and "met", "stretch met", "missed" or "not run"."""
        found = self.value(rows, self.case, self.baseline)
        if found is None:
            return None, "not run"
        if self._reaches(found, self.stretch):
            return found, "stretch met"
        return found, "met" if self.must is None or self._reaches(found, self.must) else "missed"

    def _reaches(self, found: float, wanted: float | None) -> bool:
        if wanted is None:
            return False
        return found <= wanted if self.value in AT_MOST else found >= wanted


FORWARD, BACKWARD = "msda forward 12x480x864 {} 2px", "msda backward 3x512x896 B=1 {} 2px"
CHAIN = "attention masks of 9 layers 12x480x864 Q=150 bf16"
LAYER = "masked attention layer 12x480x864 1/8 Q=150 bf16"
ATTENTION = "masked_attention 12x480x864 1/8 Q=150 bf16"
UPSAMPLE = "mask_upsample 12x480x864 N=150 to 480x864 {}"
STEP = "matching + losses + gradients 3x512x896 B=2 10 outputs fp32"

TARGETS = [
    Target(
        "deformable attention forward, bf16, against classic fp32",
        4, 6, times_faster, FORWARD.format("bf16"), "classic",
    ),
    Target("the same in microseconds", None, 180, microseconds, FORWARD.format("bf16")),
    Target(
        "deformable attention forward, fp32, against classic fp32",
        2.5, 3.5, times_faster, FORWARD.format("fp32"), "classic",
    ),
    Target("deformable attention forward, against the best public Triton kernel", 1.5, 2, times_faster),
    Target(
        "deformable attention backward, bf16, against classic fp32",
        2.5, 4, times_faster, BACKWARD.format("bf16"), "classic",
    ),
    Target(
        "memory kept for the backward, share of the classic graph's",
        0.4, None, share_of_bytes, BACKWARD.format("bf16"), "classic",
    ),
    Target(
        "attention masks of all layers, against full logits a layer",
        8, 15, times_faster, CHAIN, "usual",
    ),
    Target(
        "masked attention layer at 1/8, against nn.MultiheadAttention",
        10, None, times_faster, LAYER, "nn.MultiheadAttention",
    ),
    Target(
        "masked attention at 1/8, against SDPA with a bool mask",
        1.5, None, times_faster, ATTENTION, "sdpa bool mask",
    ),
    Target(
        "final masks as bytes, against interpolate",
        4, None, times_faster, UPSAMPLE.format("bytes"), "interpolate",
    ),
    Target(
        "final masks as bits, against interpolate",
        8, None, times_faster, UPSAMPLE.format("bits"), "interpolate",
    ),
    Target(
        "peak memory of matching + losses + gradients, share of stored logits'",
        0.25, None, share_of_bytes, STEP, "usual",
    ),
    Target(
        "share of the binding floor, deformable attention forward bf16",
        0.6, 0.75, share_of_floor, FORWARD.format("bf16"),
    ),
    Target(
        "share of the binding floor, deformable attention backward bf16",
        0.6, 0.75, share_of_floor, BACKWARD.format("bf16"),
    ),
]  # fmt: skip
