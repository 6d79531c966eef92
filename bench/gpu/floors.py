"""The least time that a call can take: amounts of work over the rates of an H200.

Rates of copies, products and reductions are those that ceilings.py measured in the same run, if it ran.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

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


def rates(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The rate of each amount: measured in these rows, or else assumed."""
    measured = {row["case"]: row["rate"] for row in rows if row["kind"] == "ceiling" and "rate" in row}
    return {
        amount: measured[ceiling] * unit if ceiling in measured else assumed
        for amount, (assumed, ceiling, unit) in RATES.items()
    }


def floors(amounts: Mapping[str, float], rate: Mapping[str, float]) -> dict[str, float]:
    """Microseconds by amount; the largest is the binding floor."""
    return {name: amount / rate[name] * 1e6 for name, amount in amounts.items()}


def binding(amounts: Mapping[str, float], rate: Mapping[str, float]) -> tuple[str, float] | None:
    """(amount, microseconds) of the binding floor; None if no amounts are known."""
    found = floors(amounts, rate)
    return max(found.items(), key=lambda item: item[1]) if found else None
