"""How a section of the GPU benchmark records what it finds: gates first, then times, one row each.

Rows are plain dicts that go into the JSON:

    {"kind": "gate", "case", "impl", "check", "error", "limit", "passed"}
    {"kind": "time", "case", "impl", "graph_us", "bench_us", "eager_us", "amounts"}
    {"kind": "memory", "case", "impl", "bytes"}    {"kind": "ceiling", "case", "rate", "unit"}
    {"kind": "tests", "ok", "passed", "failed", "not_run"}    {"kind": "section", "case", "ok", "seconds"}

What could not be done has "not_run" with the reason, or "failed" with the error, in place of its numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.timing import CLOCKS, Call, Inputs, missing, times
from kernels import dispatch

OUT_OF_TIME = "out of time"

Row = dict[str, Any]


class Results:
    """Rows and what they depend on, as a file that is complete at any time."""

    def __init__(self, path: Path, about: Row) -> None:
        self.path, self.about, self.rows = path, about, list[Row]()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        write_rows(self.path, self.about, self.rows)

    @property
    def passed(self) -> bool:
        """Whether no test and no gate failed or lacked time, and no section broke."""
        gates = [row for row in self.rows if row["kind"] == "gate"]
        others = [row for row in self.rows if row["kind"] in ("tests", "section")]
        good = [row.get("passed", row.get("not_run") != OUT_OF_TIME) for row in gates]
        return all(good) and all(row["ok"] for row in others)


def write_rows(path: Path, about: Row, rows: Sequence[Row]) -> None:
    """JSON with a line for each row, written as a whole."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    head = json.dumps(about, indent=1).removesuffix("\n}")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
    temporary.replace(path)


@dataclass
class Recorder:
    """What a section runs on, and where its rows go.

    `small` asks for tiny shapes (a rehearsal on a CPU), `over` says that the section's time is up.
    """

    device: str
    small: bool
    over: Callable[[], bool]
    emit: Callable[[Row], None]
    failed: set[tuple[str, str]] = field(default_factory=set)  # (case, impl) whose gates failed

    def gate(self, case: str, impl: str, check: str, error: Callable[[], float], limit: float) -> bool:
        """Whether an error stays within its limit; one that is not a number does not."""
        row: Row = {"kind": "gate", "case": case, "impl": impl, "check": check, "limit": limit}
        try:
            found = float(error())
            row |= {"error": found if math.isfinite(found) else str(found), "passed": found <= limit}
        except Exception as problem:
            row |= {"failed": short(problem), "passed": False}
        self.emit(row)
        if not row["passed"]:
            self.failed.add((case, impl))
        return bool(row["passed"])

    def time(
        self,
        case: str,
        impl: str,
        call: Call,
        sets: Sequence[Inputs],
        amounts: Mapping[str, float] | None = None,
    ) -> Row:
        """Times a call, unless its gate failed; `amounts` is what `floors` turns into least times."""
        row: Row = {"kind": "time", "case": case, "impl": impl, "amounts": dict(amounts or {})}
        if self.over():
            row["not_run"] = OUT_OF_TIME
        elif (case, impl) in self.failed:
            row["not_run"] = "its gate failed"
        else:
            try:
                row |= times(call, sets)
            except Exception as problem:
                row["failed"] = short(problem)
        self.emit(row)
        return row

    def difference(self, case: str, impl: str, whole: Row, part: Row, amounts: Mapping[str, float]) -> None:
        """A time that is the difference of two measured ones."""
        row: Row = {"kind": "time", "case": case, "impl": impl, "amounts": dict(amounts), "derived": True}
        for name in CLOCKS:
            a, b = whole.get(name), part.get(name)
            row[name] = None if a is None or b is None else a - b
        row |= {key: r[key] for r in (part, whole) for key in ("not_run", "failed") if key in r}
        self.emit(row)

    def memory(self, case: str, impl: str, measure: Callable[[], int]) -> None:
        row: Row = {"kind": "memory", "case": case, "impl": impl}
        try:
            row["bytes"] = measure()
        except Exception as problem:
            row["failed"] = short(problem)
        self.emit(row)

    def not_run(self, case: str, impl: str, reason: str, kind: str = "time") -> None:
        self.emit({"kind": kind, "case": case, "impl": impl, "not_run": reason})

    def can_gate(self, case: str, impl: str) -> bool:
        """Whether a kernel runs here, if only interpreted; otherwise its gates are recorded as not run."""
        reason = dispatch.triton_missing(self.device) if impl == "triton" else missing(impl, self.device)
        if self.over():
            reason = OUT_OF_TIME
        if reason:
            self.not_run(case, impl, reason, "gate")
        return not reason

    def free(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def short(problem: Exception) -> str:
    lines = str(problem).splitlines()
    return f"{type(problem).__name__}: {lines[0] if lines else ''}"[:300]
