"""What every benchmark shares: the device, a clock that waits for it, and skips that say why."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from kernels import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ("reference", "compiled", "cuda", "triton")

T = TypeVar("T")


def gpu_clock() -> float:
    """Seconds, read when the GPU is idle. A timer for pytest-benchmark."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def missing(impl: str, device: str = DEVICE) -> str:
    """Why an implementation cannot be timed on a device; empty where it can."""
    if impl == "triton":
        if dispatch.INTERPRETED:
            return "interpreted Triton is not timed"
        return dispatch.triton_missing(device)
    if impl == "cuda":
        return dispatch.cuda_missing(device)
    if impl == "compiled":
        if device.startswith("cuda"):
            return "" if dispatch.HAS_TRITON else "torch.compile needs Triton on a GPU"
        has_compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
        return "" if has_compiler else "torch.compile needs a C++ compiler on a CPU"
    return ""


def require(impl: str) -> None:
    """Skips the test, with the reason, where an implementation cannot be timed."""
    reason = missing(impl)
    if reason:
        pytest.skip(f"{impl}: {reason}")


def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """Under torch.compile, for fixed shapes and without graph breaks.

    Forgets what was compiled before, since one function may be compiled for a few shapes only.
    """
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def timed(benchmark: Any, run: Callable[[], T]) -> T:
    """Times a call with pytest-benchmark and gives its result.

    On a GPU 50 launches lie between two readings of the clock, so that waiting for it costs little; on a CPU
    there are as many rounds as fit into a second, 3 to 50.
    """
    run()  # kernels are compiled, threads start
    start = gpu_clock()
    run()
    once = gpu_clock() - start
    iterations = 50 if DEVICE == "cuda" else 1
    rounds = max(3, min(50, int(1 / max(once * iterations, 1e-3))))
    return benchmark.pedantic(run, iterations=iterations, rounds=rounds)


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    about: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
        about["capability"] = list(torch.cuda.get_device_capability())
        about["cuda"] = torch.version.cuda
    return about


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
