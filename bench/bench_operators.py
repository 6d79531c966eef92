"""Every operator by itself: the cases of `bench.cases`, each computed in several ways.

    pytest bench/bench_operators.py --benchmark-only

On a GPU the published sizes, on a CPU small ones. What the kernels (and, on a CPU, the reference) compute is
checked before it is timed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.case import KERNELS, OURS, with_gradients
from bench.cases import SECTIONS
from bench.timing import DEVICE, gpu_clock, timed

CASES = {
    case.name: case
    for section in SECTIONS.values()
    for case in section(DEVICE, "gpu" if DEVICE == "cuda" else "cpu")
}


@pytest.mark.benchmark(timer=gpu_clock)
@pytest.mark.parametrize(
    ("case", "impl"), [(name, impl) for name, case in CASES.items() for impl in case.ways]
)
def test_operator(benchmark: Any, case: str, impl: str) -> None:
    chosen = CASES[case]
    way = chosen.ways[impl]
    if reason := way.missing(impl, DEVICE):
        pytest.skip(f"{impl}: {reason}")
    for gate in chosen.gates if impl in (KERNELS if DEVICE == "cuda" else OURS) else ():
        assert gate.error(impl) <= gate.limit, gate.check
    inputs = chosen.make(1) if way.prepare is None else way.prepare(chosen.make(1))
    call = with_gradients(way.ready()) if chosen.backward else way.ready()
    benchmark.group = case
    with torch.set_grad_enabled(chosen.backward):
        timed(benchmark, lambda: call(*inputs))
