"""What every test shares: where reference tensors lie, memory that betrays what was never written, and proof
that nothing changes the state of the process beyond its own call."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

GOLDENS = Path(__file__).parent / "goldens"

NOT_OURS = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "_TORCHINDUCTOR_")
"""Variables that pytest sets for each test, and that Inductor sets for good when it is imported."""

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
    group = parser.getgroup("fuzz", "damaging files of every kind")
    group.addoption("--fuzz-cases", type=int, default=200, help="damaged files of every target")
    group.addoption("--fuzz-seed", type=int, default=0, help="what the damage follows from")


@pytest.fixture(autouse=True, scope="session")
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the library keeps for its user it keeps in a folder of the tests."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(root / "home"))
        yield


@pytest.fixture(autouse=True)
def unchanged_process() -> Iterator[None]:
    """No test, and so no function of the library, leaves the process in another state than it found it."""
    before = process_state()
    yield
    after = process_state()
    changed = {
        name: (before[name], value)
        for name, value in after.items()
        if name in before and before[name] != value
    }
    assert not changed, f"changed, and left so (before, after): {changed}"


def process_state() -> dict[str, Any]:
    """What belongs to the whole process, by name.

    Left out: random numbers, which tests seed for themselves; warning filters, which pytest restores;
    SIGCHLD, whose handler torch's loader installs once and for all; settings of modules that are not imported
    yet.
    """
    from kernels import dispatch  # not before TRITON_INTERPRET is set

    state: dict[str, Any] = {
        "threads of torch": torch.get_num_threads(),
        "threads of OpenCV": cv2.getNumThreads(),
        "log level of OpenCV": cv2.utils.logging.getLogLevel(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "filling of empty memory": torch.utils.deterministic.fill_uninitialized_memory,
        "precision of matrix products": torch.get_float32_matmul_precision(),
        "TF32 of cuDNN": torch.backends.cudnn.allow_tf32,
        "search of cuDNN": torch.backends.cudnn.benchmark,
        "sharing of tensors": torch.multiprocessing.get_sharing_strategy(),
        "kind of processes": multiprocessing.get_start_method(),
        "preferred kernels": dispatch.preferred(),
        "NumPy errors": np.geterr(),
        "working directory": os.getcwd(),
        "module path": [path for path in sys.path if "setuptools" not in path],  # which adds its own
        "log levels": (logging.root.level, logging.getLogger("torch.onnx").level),
    }
    variables = {name: value for name, value in os.environ.items() if not name.startswith(NOT_OURS)}
    state |= {f"${name}": value for name, value in variables.items()}
    state["environment"] = set(variables)
    for number in signal.valid_signals() - {signal.SIGCHLD}:
        state[f"handler of signal {number}"] = signal.getsignal(number)
    for name in ("torch._dynamo.config", "torch._inductor.config", "torch._functorch.config"):
        if name in sys.modules:
            state |= {f"{name}.{key}": value for key, value in sys.modules[name].get_config_copy().items()}
    return state


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Without what earlier tests compiled: it counts towards torch.compile's limit of graphs."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(autouse=True)
def poison_uninitialised_memory(unchanged_process: None) -> Iterator[None]:  # noqa: ARG001, which ends last
    """torch.empty yields NaN, so an output element that no kernel wrote fails its test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
