"""How a call is timed: by replaying a CUDA graph, by triton.testing.do_bench, and as Python calls it.

Several sets of inputs take turns, so that what a call reads is not in the cache from the call before.
On a CPU only the last of the three exists.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.timing import gpu_clock

GRAPH_SECONDS = 0.12  # of replays, for one number
CALLS_IN_A_GRAPH = 20  # so that launching a graph of short kernels costs little of its time
EAGER_SECONDS = 0.05
CACHE_BYTES = 60e6  # L2 of an H200

Call = Callable[..., Any]
Inputs = Sequence[Any]


def times(call: Call, sets: Sequence[Inputs]) -> dict[str, Any]:
    """Microseconds a call takes: `graph_us`, `bench_us`, `eager_us`; None where there is no such number."""
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


def device_us(found: dict[str, Any]) -> float | None:
    """The number that is compared: the graph's, or else do_bench's, or else (on a CPU) the eager one."""
    for name in ("graph_us", "bench_us", "eager_us"):
        if found.get(name) is not None:
            return found[name]
    return None


def rotation(one_set: int, at_least: int = 3, at_most: int = 16) -> int:
    """How many sets of inputs, of so many bytes each, hold twice what the cache does."""
    return max(at_least, min(at_most, int(2 * CACHE_BYTES / max(one_set, 1)) + 1))


def tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


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
    """After a capture that failed the default generator believes that it goes on and would refuse to work."""
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


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most memory that a call allocates on the GPU on top of what there is."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(call: Callable[[], Any]) -> int:
    """What autograd keeps for the backward pass of a call: the memory of different tensors, once each."""
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


def deadline(seconds: float) -> Callable[[], bool]:
    """Says whether so many seconds have passed since now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end
