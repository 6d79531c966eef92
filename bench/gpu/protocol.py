"""How a section of the GPU benchmark records what it finds: gates first, then times, one row each.

A section is a function of a `Recorder`. It runs in a process of its own (see gpu.py), so that what goes wrong
in one section, a memory fault included, leaves the others alone. Rows are plain dicts that go into the JSON:

    {"kind": "gate", "case", "impl", "check", "error", "limit", "passed"}
    {"kind": "time", "case", "impl", "graph_us", "bench_us", "eager_us", "amounts"}
    {"kind": "memory", "case", "impl", "bytes"}    {"kind": "ceiling", "case", "rate", "unit"}

What could not be done has "not_run" with the reason, or "failed" with the error, in place of its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.gpu.measure import Call, Inputs, times
from bench.timing import missing
from kernels import dispatch

OURS = ("triton", "cuda")  # implementations with gates
OUT_OF_TIME = "out of time"

Row = dict[str, Any]


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
        sets: Sequence[Inputs] | Callable[[], Sequence[Inputs]],
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
                row |= times(call, sets() if callable(sets) else sets)
            except Exception as problem:
                row["failed"] = short(problem)
        self.emit(row)
        return row

    def difference(self, case: str, impl: str, whole: Row, part: Row, amounts: Mapping[str, float]) -> Row:
        """A time that is the difference of two measured ones."""
        row: Row = {"kind": "time", "case": case, "impl": impl, "amounts": dict(amounts), "derived": True}
        for name in ("graph_us", "bench_us", "eager_us"):
            a, b = whole.get(name), part.get(name)
            row[name] = None if a is None or b is None else a - b
        row |= {key: r[key] for r in (part, whole) for key in ("not_run", "failed") if key in r}
        self.emit(row)
        return row

    def memory(self, case: str, impl: str, measure: Callable[[], int]) -> None:
        row: Row = {"kind": "memory", "case": case, "impl": impl}
        try:
            row["bytes"] = measure()
        except Exception as problem:
            row["failed"] = short(problem)
        self.emit(row)

    def not_run(self, case: str, impl: str, reason: str) -> None:
        self.emit({"kind": "time", "case": case, "impl": impl, "not_run": reason})

    def gated(self, case: str, impls: Sequence[str] = OURS) -> list[str]:
        """The kernels that run here, interpreted ones included; the others' gates are recorded as not run."""
        able = []
        for impl in impls:
            reason = dispatch.triton_missing(self.device) if impl == "triton" else missing(impl, self.device)
            if self.over():
                reason = OUT_OF_TIME
            if reason:
                self.emit({"kind": "gate", "case": case, "impl": impl, "not_run": reason})
            else:
                able.append(impl)
        return able

    def timed(self, case: str, impls: Sequence[str]) -> list[str]:
        """Those that can be timed here; the others are recorded as not run."""
        able = []
        for impl in impls:
            reason = missing(impl, self.device)
            if self.small and impl == "compiled":
                reason = "not compiled in a rehearsal"
            if reason:
                self.not_run(case, impl, reason)
            else:
                able.append(impl)
        return able

    def free(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def relative(got: Tensor, expected: Tensor, where: Tensor | None = None) -> float:
    """Frobenius norm of the difference over that of `expected`; `where` leaves elements out."""
    got, expected = got.double(), expected.double()
    if where is not None:
        got, expected = got[where], expected[where]
    return ((got - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def short(problem: Exception) -> str:
    lines = str(problem).splitlines()
    return f"{type(problem).__name__}: {lines[0] if lines else ''}"[:300]


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
