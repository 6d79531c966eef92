"""Which process this is under torchrun, how processes share work, and how many threads one has."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import cv2
import torch
import torch.distributed as dist

T = TypeVar("T")

PATIENCE_S = 7 * 24 * 3600.0
"""How long a process waits for the slowest, by default; torchrun ends all of them when one fails."""


@dataclass(frozen=True)
class World:
    """The processes of a run: `rank` 0 .. `size` - 1, `local_rank` on this machine. Without torchrun one."""

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
    """Join the processes that torchrun started, if it did: over NCCL what is on GPUs, over gloo the rest.

    Raises:
        ConnectionError: another process has ended, or has gone silent for `timeout_s`.
    """
    if "RANK" not in os.environ:
        yield World()
        return
    found = World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if found.size > 1:
        backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
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
