"""A case of an operator: how inputs are made, the ways to compute it, and what must hold before it is timed.

`pytest bench --benchmark-only` and `python -m bench.gpu` time the same cases; `bench.cases` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from bench.record import OUT_OF_TIME, Recorder
from bench.timing import Call, Inputs, compiled, missing, peak_bytes, rotation, saved_bytes, tensors

KERNELS = ("triton", "cuda")  # implementations with gates
OURS = (*KERNELS, "reference")

Scale = Literal["gpu", "cpu", "tiny"]
"""Published sizes; sizes for a CPU; those of a rehearsal, where nothing is worth quoting."""


@dataclass(frozen=True)
class Way:
    """One way to compute a case.

    `call` takes the inputs that `prepare` makes of the case's (untimed; None leaves them as they are).
    `not_here` says why it cannot run here, where that does not follow from its label.
    """

    call: Call
    prepare: Callable[[Inputs], Inputs] | None = None
    compile: bool = False
    not_here: str = ""

    def missing(self, label: str, device: str) -> str:
        """Why it cannot be timed on a device; empty where it can."""
        return self.not_here or missing("compiled" if self.compile else label.split()[0], device)

    def ready(self) -> Call:
        return compiled(self.call) if self.compile else self.call


@dataclass(frozen=True)
class Gate:
    """`error` of an implementation is to stay within `limit`, or the implementation is not timed."""

    check: str
    limit: float
    error: Callable[[str], float]


@dataclass(frozen=True)
class Case:
    """Ways by label; a label's first word is the implementation ("triton deterministic").

    `make` gives the inputs of a seed. With `backward`, inputs that require gradients get them, the last input
    is the gradient of the output, and the case's own time is that of forward + backward less the forward's.
    `amounts` is the work that `bench.targets` turns into least times, of our own ways. `memory` asks for the
    peak of a call, or for what autograd keeps for the backward pass.
    """

    name: str
    make: Callable[[int], Inputs]
    ways: Mapping[str, Way]
    gates: Sequence[Gate] = ()
    amounts: Mapping[str, float] = field(default_factory=dict)
    backward: bool = False
    memory: Literal["", "peak", "kept"] = ""


def ways(
    ours: Callable[..., Any],
    others: Mapping[str, Call],
    impls: Sequence[str] = OURS,
    compiles: bool = False,
) -> dict[str, Way]:
    """`ours` takes an implementation and the inputs; with `compiles` plain PyTorch is timed compiled, too."""
    found = {impl: Way(partial(ours, impl)) for impl in impls}
    if compiles:
        found["compiled"] = Way(partial(ours, "reference"), compile=True)
    for label, call in others.items():
        found[label] = Way(call)
        if compiles:
            found[f"{label} compiled"] = Way(call, compile=True)
    return found


def with_gradients(call: Call) -> Callable[..., tuple[Tensor, ...]]:
    """Forward and backward; the last input is the gradient of the output, the results those of the others."""

    def run(*inputs: Any) -> tuple[Tensor, ...]:
        *values, grad = inputs
        out = call(*values)
        leaves = [value for value in tensors(values) if value.requires_grad]
        return torch.autograd.grad(out, leaves, grad.to(out.dtype))

    return run


def record_cases(record: Recorder, cases: Iterator[Case]) -> None:
    """A section of the GPU benchmark: each case's gates, then its times."""
    for case in cases:
        for impl in KERNELS:
            if impl in case.ways and case.gates and record.can_gate(case.name, impl):
                for gate in case.gates:
                    record.gate(case.name, impl, gate.check, partial(gate.error, impl), gate.limit)
        _record_times(record, case)
        record.free()


def _record_times(record: Recorder, case: Case) -> None:
    sets = [case.make(1)]
    if not record.small and not record.over():
        size = sum(x.numel() * x.element_size() for x in tensors(sets[0]))
        sets += [case.make(seed) for seed in range(2, 1 + rotation(size))]
    for label, way in case.ways.items():
        reason = way.missing(label, record.device)
        if record.small and way.compile:
            reason = "not compiled in a rehearsal"
        if (case.name, label.split()[0]) in record.failed:
            reason = "its gate failed"
        if record.over():
            reason = OUT_OF_TIME
        if reason:
            record.not_run(case.name, label, reason)
            continue
        amounts = case.amounts if label.split()[0] in OURS else {}
        _record_way(
            record, case, label, way, amounts, sets if way.prepare is None else [*map(way.prepare, sets)]
        )


def _record_way(
    record: Recorder, case: Case, label: str, way: Way, amounts: Mapping[str, float], sets: Sequence[Inputs]
) -> None:
    call = way.ready()
    forward = [inputs[:-1] for inputs in sets] if case.backward else sets
    if case.backward:
        whole = record.time(f"{case.name} (with forward)", label, with_gradients(call), sets)
    with torch.no_grad():
        part = record.time(
            f"{case.name} (forward alone)" if case.backward else case.name, label, call, forward,
            {} if case.backward else amounts,
        )  # fmt: skip
    if case.backward:
        record.difference(case.name, label, whole, part, amounts)
    if case.memory == "kept" and not way.compile:
        record.memory(case.name, label, partial(saved_bytes, partial(call, *forward[0])))
    elif case.memory == "peak" and record.device != "cpu":
        record.memory(case.name, label, partial(peak_bytes, partial(call, *forward[0])))


def relative(got: Tensor, expected: Tensor, where: Tensor | None = None) -> float:
    """Frobenius norm of the difference over that of `expected`; `where` leaves elements out."""
    got, expected = got.double(), expected.double()
    if where is not None:
        got, expected = got[where], expected[where]
    return ((got - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def unequal(run: Callable[..., Sequence[Tensor]], inputs: Inputs) -> float:
    """1 if two runs differ in any bit."""
    return float(not all(torch.equal(a, b) for a, b in zip(run(*inputs), run(*inputs), strict=True)))


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
