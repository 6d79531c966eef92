"""What every test shares: where reference tensors lie, and memory that betrays what was never written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

GOLDENS = Path(__file__).parent / "goldens"

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels are tested on a CPU too


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("parity", "replaying tensors of the original model")
    group.addoption("--goldens", type=Path, default=GOLDENS, help="folder of network cases to replay")
    group.addoption(
        "--goldens-stitch", type=Path, default=GOLDENS / "stitch", help="folder of stitching cases to replay"
    )
    group.addoption(
        "--goldens-eval", type=Path, default=GOLDENS / "eval", help="folder of scored results to score again"
    )
    group.addoption(
        "--goldens-losses", type=Path, default=GOLDENS / "losses", help="folder of losses to replay"
    )
    group.addoption(
        "--real-davis", type=Path, help="folder of real DAVIS results, truth and official_scores.json"
    )


@pytest.fixture(autouse=True)
def poison_uninitialised_memory() -> Iterator[None]:
    """torch.empty yields NaN, so an output element that no kernel wrote fails its test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
