"""Clocks: a call's time by CUDA graph, by do_bench and as Python calls it; its memory; what can run here.

Several sets of inputs take turns, so that what a call reads is not in the cache from the call before.
On a CPU only the last of the three clocks exists.
"""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from kernels import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOCKS = ("graph_us", "bench_us", "eager_us")  # the first that was read is the one that is compared
GRAPH_SECONDS = 0.12  # of replays, for one number
CALLS_IN_A_GRAPH = 20  # so that launching a graph of short kernels costs little of its time
EAGER_SECONDS = 0.05
CACHE_BYTES = 60e6  # L2 of an H200

Call = Callable[..., Any]
Inputs = Sequence[Any]
T = TypeVar("T")


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


def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """Under torch.compile, for fixed shapes and without graph breaks.

    Forgets what was compiled before, since one function may be compiled for a few shapes only.
    """
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def gpu_clock() -> float:
    """Seconds, read when the GPU is idle. A timer for pytest-benchmark."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


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


def best_in_turn(
    runs: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """The least seconds of each run, and its last result: in turn, so that other load weighs on all alike."""
    best, results = dict.fromkeys(runs, float("inf")), {}
    for _ in range(rounds):
        for name, run in runs.items():
            start = gpu_clock()
            results[name] = run()
            best[name] = min(best[name], gpu_clock() - start)
    return best, results


def times(call: Call, sets: Sequence[Inputs]) -> dict[str, Any]:
    """Microseconds a call takes, by each of `CLOCKS`; None where there is no such number."""
    on_gpu = any(tensor.is_cuda for tensor in tensors(sets[0]))
    for inputs in sets[: 2 if on_gpu else 1]:
        call(*inputs)  # kernels are compiled, workspaces allocated
    if not on_gpu:
        return {"graph_us": None, "bench_us": None, "eager_us": _eager_us(call, sets)}
    torch.cuda.synchronize()
    bench_us = _bench_us(call, sets)
    found: dict[str, Any] = {"bench_us": bench_us, "eager_us": _eager_us(call, sets), "graph_us": None}
    problem = _synchronises(call, sets[0])
    if not problem:
        stream = torch.cuda.current_stream()
        try:
            found["graph_us"] = _graph_us(call, sets, bench_us)
        except Exception as error:  # the other two numbers stand
            problem = str(error) or repr(error)
            torch.cuda.set_stream(stream)  # torch.cuda.graph leaves its own behind if it cannot end a capture
            _renew_generator()
    if problem:
        found["graph_error"] = problem.splitlines()[0][:200]
    return found


def rotation(one_set: int, at_least: int = 3, at_most: int = 16) -> int:
    """How many sets of inputs, of so many bytes each, hold twice what the cache does."""
    return max(at_least, min(at_most, int(2 * CACHE_BYTES / max(one_set, 1)) + 1))


def tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most memory that a call allocates on the GPU on top of what is allocated already."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(call: Callable[[], Any]) -> int:
    """What autograd keeps for the backward pass of a call; a storage that tensors share counts once."""
    storages: dict[int, int] = {}
    held = []  # so that no memory is given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(storages.values())


def _graph_us(call: Call, sets: Sequence[Inputs], estimate_us: float) -> float:
    rounds = max(1, min(-(-CALLS_IN_A_GRAPH // len(sets)), int(2e4 / (estimate_us * len(sets))) + 1))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for inputs in sets:
            call(*inputs)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            kept = [call(*inputs) for inputs in sets]  # held, so that outputs, too, lie in different places
    calls = rounds * len(sets)
    graph.replay()
    torch.cuda.synchronize()
    readings = []
    for _ in range(max(5, min(100, int(GRAPH_SECONDS * 1e6 / (estimate_us * calls))))):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        readings.append(start.elapsed_time(end) * 1e3 / calls)
    del kept
    graph.reset()
    return statistics.median(readings)


def _synchronises(call: Call, inputs: Inputs) -> str:
    """What in a call waits for the device, which no graph can hold; empty if PyTorch knows of nothing."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*inputs)
    except RuntimeError as error:
        return str(error) or repr(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def _renew_generator() -> None:
    """After a capture that failed, the default generator still believes in it and would refuse to work."""
    fresh = torch.Generator(device="cuda")
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(fresh.graphsafe_get_state())


def _bench_us(call: Call, sets: Sequence[Inputs]) -> float:
    from triton.testing import do_bench

    turns = itertools.cycle(sets)
    return do_bench(lambda: call(*next(turns)), warmup=10, rep=60, return_mode="median") * 1e3


def _eager_us(call: Call, sets: Sequence[Inputs]) -> float:
    """Wall time of a call in a row of calls, with all that Python does for it."""
    turns = itertools.cycle(sets)
    start = gpu_clock()
    call(*next(turns))
    count = max(3, min(200, int(EAGER_SECONDS / max(gpu_clock() - start, 1e-6))))
    start = gpu_clock()
    for _ in range(count):
        call(*next(turns))
    return (gpu_clock() - start) / count * 1e6


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
