"""Benchmarks say on what they ran; two threads on a CPU, so that numbers of different machines compare."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.fresh import THREADS
from bench.timing import machine, missing


def pytest_report_header() -> list[str]:
    about = ", ".join(f"{name} {value}" for name, value in machine().items() if value is not None)
    skips = [
        f"not timed here: {impl} ({missing(impl)})"
        for impl in ("compiled", "cuda", "triton")
        if missing(impl)
    ]
    return [f"benchmarks on: {about}", *skips]


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Beside what pytest-benchmark knows of the machine, what our numbers depend on."""
    output_json["machine"] = {**machine(), "threads": THREADS}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)
