"""Which process this is under torchrun, how processes share work, and how many threads one has."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import cv2
import torch
import torch.distributed as dist

from tarvis.structures import InputError

T = TypeVar("T")

PATIENCE_S = 7 * 24 * 3600.0
"""How long a process waits for the slowest one by default; torchrun ends all of them when one fails."""


@dataclass(frozen=True)
class World:
    """This process among the `size` processes of a run: its rank, and its rank on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process has called this."""
        if self.size > 1:
            dist.barrier()

    def from_main(self, value: T | None) -> T:
        """The main process's value, on every process; the others pass None."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box)
        assert box[0] is not None
        return box[0]


@contextmanager
def world(timeout_s: float = PATIENCE_S) -> Iterator[World]:
    """Join the processes that torchrun started, if any. GPU tensors travel over NCCL, all else over gloo.

    Raises:
        InputError: the environment has a part of what torchrun sets, or the processes do not meet.
        ConnectionError: another process has ended, or has gone silent for `timeout_s`.
    """
    found = _asked_world()
    if found.size > 1:
        backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        except (ValueError, dist.DistError) as error:  # the address is missing, or does not answer
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"the processes of the run do not meet ({reason}): start with torchrun"
            ) from None
    try:
        yield found
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        raise ConnectionError(
            f"process {found.rank}: another process of the run has ended, or has not answered for "
            f"{timeout_s:.0f} s ({reason})"
        ) from None
    finally:
        if found.size > 1:
            dist.destroy_process_group()


def _asked_world() -> World:
    """What the environment says of this process; it is alone where that says nothing."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in os.environ:
        return World()
    given = {name: os.environ.get(name, "") for name in names}
    if wrong := next((name for name in names if not given[name].isdecimal()), None):
        said = f"is {given[wrong]!r}" if given[wrong] else "is not set"
        raise InputError(f"RANK is set, but {wrong} {said}: start with torchrun, or unset RANK")
    found = World(*(int(given[name]) for name in names))
    if found.rank >= found.size:
        raise InputError(f"RANK {found.rank} is beyond WORLD_SIZE {found.size}: start with torchrun")
    return found


def process_kind() -> str:
    """How processes are started: as forks, which share what is loaded, or anew where a platform has none."""
    return "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"


@contextmanager
def threads(torch_threads: int | None = None, *, opencv: int | None = None) -> Iterator[None]:
    """CPU threads of this process within the block; None leaves a number as it is."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    if torch_threads is not None:
        torch.set_num_threads(torch_threads)
    if opencv is not None:
        cv2.setNumThreads(opencv)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


def join(thread: threading.Thread) -> None:
    """Wait until a thread has ended for the system too, which is after it has for Python.

    Until then it may hold locks of OpenCV. A process that is forked meanwhile would wait for them for ever.
    """
    thread.join()
    while Path(f"/proc/self/task/{thread.native_id}").exists():
        time.sleep(1e-4)


def spread(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of pieces of work by part, rising; parts are about equally long.

    The longest goes first, to the part with the least so far.
    """
    totals = [0] * parts
    of_part: list[list[int]] = [[] for _ in range(parts)]
    for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        part = totals.index(min(totals))
        totals[part] += lengths[k]
        of_part[part].append(k)
    return [sorted(part) for part in of_part]
