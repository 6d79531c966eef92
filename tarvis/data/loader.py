"""Batches of training clips, made ahead by worker processes.

    sets = [each.clips for each in open_sets(data)]
    loader = TrainingLoader(sets, data, seed=0, batch_size=32, micro_batch=1, world=world)
    for batches in loader.steps(start, stop):  # a list for every optimiser step: this rank's micro-batches

A step has `batch_size` clips in micro-batches that are the same however many ranks share them: rank r of G
takes micro-batches r, r + G, ... A step depends on nothing but its number, so a run can be resumed anywhere.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import multiprocessing.queues
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from tarvis.data.batch import Batch, Sample
from tarvis.data.mixture import Cell, ClipSet, Mixture, Purpose, generator, num_points
from tarvis.data.settings import DataSettings
from tarvis.datasets.points import inner_point
from tarvis.distributed import World, join, process_kind, threads
from tarvis.structures import VOID, DamagedError, InputError
from tarvis.tasks import TASKS

ATTEMPTS, SAME_ITEM = 10, 3
"""Clips drawn before a sample is given up; the first `SAME_ITEM` are of the item whose turn it is."""
READS = 3
"""Times a file is read before it counts as unusable: network file systems hiccup."""
PAUSE_S = 1.0
PAD_GREY = 128
"""Grey of the padding; the network pads with the same."""
OUTLIVE_S = 20.0
"""Time that a worker outlives SIGTERM, which all processes receive: the trainer may finish its step."""
GRACE_S = 5.0
"""How long a run that is to stop waits for clips of the next step, so that its processes stop together."""
GLANCE_S = 0.1
HINT = "try data.num_workers=0, or a smaller one; in a container, more shared memory (docker --shm-size=8g)"


class TrainingLoader:
    """The batches of one rank.

    Args:
        data: its `weights` are those of `sets`.
        batch_size: clips of an optimiser step, over all ranks.
        micro_batch: clips that a rank trains on at once.

    Raises:
        InputError: the batch does not divide into equally many micro-batches for every rank.
    """

    def __init__(
        self,
        sets: Sequence[ClipSet],
        data: DataSettings,
        *,
        seed: int,
        batch_size: int,
        micro_batch: int = 1,
        world: World | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        world = world or World()
        if batch_size % (micro_batch * world.size):
            raise InputError(
                f"optim.batch_size, optim.micro_batch: a batch of {batch_size} clips cannot be shared by "
                f"{world.size} processes that take {micro_batch} at once"
            )
        mixture = Mixture(sets, data.weights or [1.0] * len(sets), data.task_weights, seed=seed)
        self.batches = Batches(sets, mixture, data, batch_size, micro_batch)
        self.waited_s = 0.0
        """How long training has waited for batches, in all."""
        self._mine = range(world.rank, batch_size // micro_batch, world.size)
        self._num_workers = min(data.num_workers, _cores())
        self._pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory

    def steps(
        self, start: int, stop: int, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[list[Batch]]:
        """This rank's micro-batches of steps start .. stop - 1.

        Raises:
            DamagedError: a clip cannot be made; the message names the set and the file.
            InputError: a process that makes clips has ended, or none came for `data.timeout_s`.
            WaitEndedError: none came, and `should_stop` is true.
        """
        places = ((step, part) for step in range(start, stop) for part in self._mine)
        options: dict[str, Any] = {}
        if self._num_workers:
            # forked where they can be, so that all share the annotations; workers never touch a GPU
            options = {
                "multiprocessing_context": process_kind(),
                "worker_init_fn": _start_worker,
                "prefetch_factor": 2,
            }
        loader: DataLoader[Batch | str] = DataLoader(
            self.batches,
            batch_size=None,
            sampler=places,
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            generator=torch.Generator(),  # it would seed its workers, which do not draw, by a global number
            **options,
        )
        others = multiprocessing.active_children()
        with threads(opencv=1):  # a worker would wait for threads that it did not inherit
            try:
                _require_queues(self._num_workers)
                ready = iter(loader)  # forks
            except OSError as error:
                raise InputError(f"processes that load clips cannot start ({error}): {HINT}") from None
        waiter = Waiter(ready, self.batches.data.timeout_s, should_stop)
        workers = [each for each in multiprocessing.active_children() if each not in others]
        try:
            for _ in range(start, stop):
                began = time.perf_counter()
                batches = [waiter.next() for _ in self._mine]
                self.waited_s += time.perf_counter() - began
                yield batches
        finally:
            waiter.close()
            if waiter.is_waiting:  # in vain: workers that hang would hold up the end of this process, too
                for worker in workers:
                    if worker.is_alive() and worker.pid:
                        os.kill(worker.pid, signal.SIGUSR1)


def _require_queues(workers: int) -> None:
    """Raise OSError where there cannot be as many queues as PyTorch's loader makes, which fails noisily."""
    kind = multiprocessing.get_context(process_kind())
    for made in [kind.Queue() for _ in range(workers and workers + 3)]:
        made.close()


class Batches(Dataset[Batch | str]):
    """Micro-batches by (step, number); the message of what went wrong where one cannot be made.

    A message is a value, since exceptions of worker processes lose their type and text.
    """

    def __init__(
        self, sets: Sequence[ClipSet], mixture: Mixture, data: DataSettings, batch_size: int, micro_batch: int
    ) -> None:
        self.sets, self.mixture, self.data = sets, mixture, data
        self.batch_size, self.micro_batch = batch_size, micro_batch

    def __getitem__(self, place: tuple[int, int]) -> Batch | str:
        try:
            return _shared(self.batch(*place))
        except InputError as error:
            return str(error)

    def batch(self, step: int, part: int) -> Batch:
        """A micro-batch of a step.

        Raises:
            InputError: a clip cannot be made.
        """
        chunk, within = divmod(step, self.data.chunk)
        cell, visit = self.mixture.chunk(chunk)
        samples = []
        for number in range(part * self.micro_batch, (part + 1) * self.micro_batch):
            earlier = (visit * self.data.chunk + within) * self.batch_size + number
            samples.append(self.sample(cell, earlier, step, number))
        by_point = generator(self.mixture.seed, Purpose.POINTS, step).random(64).tolist()
        return collate(
            self.sets[cell.set_index].name,
            cell.kind.task,
            samples,
            num_points=partial(num_points, by_point, share=self.data.point_share),
            pad_to=self.data.pad_to,
        )

    def sample(self, cell: Cell, earlier: int, step: int, number: int) -> Sample:
        """Clip `number` of a step; `earlier` counts those of the same cell before it."""
        clips = self.sets[cell.set_index]
        item = self.mixture.item(cell, earlier)
        for attempt in range(ATTEMPTS):
            place = (step, number, attempt)
            if attempt >= SAME_ITEM:
                item = int(generator(self.mixture.seed, Purpose.OTHER, *place).integers(cell.items))
            for read in range(1, READS + 1):
                random = generator(self.mixture.seed, Purpose.SAMPLE, *place)
                try:
                    found = clips.draw(cell.kind, item, random)
                except InputError as error:
                    if read == READS:
                        name = clips.origin(cell.kind, item)
                        raise InputError(f"{clips.name}, {name!r}, step {step + 1}: {error}") from None
                    time.sleep(PAUSE_S)
                else:
                    break
            if found is not None:
                return found
        raise InputError(
            f"{clips.name}: no object is left in any of {ATTEMPTS} clips for {cell.kind.task}, "
            f"the last of {clips.origin(cell.kind, item)!r}"
        )


def collate(
    set_name: str,
    task: str,
    samples: Sequence[Sample],
    *,
    num_points: Callable[[int], int] = lambda _: 0,
    pad_to: int = 64,
) -> Batch:
    """Clips of one set and task as a batch. Where objects are given, all keep as many as the poorest clip.

    Args:
        num_points: how many of N objects are given by a point.
        pad_to: sides become the next multiples of this.
    """
    is_given, needs_stuff = not TASKS[task].finds_classes, TASKS[task].needs_stuff
    if is_given:
        fewest = min(len(sample.labels) for sample in samples)
        samples = [sample.first_objects(fewest) for sample in samples]
    size = tuple(-(-max(sample.size[side] for sample in samples) // pad_to) * pad_to for side in (0, 1))
    T = len(samples[0].frames)
    depth = max(len(sample.layers) for sample in samples)
    is_wide = any(sample.layers.dtype != np.uint8 for sample in samples)
    frames = torch.full((len(samples), T, 3, *size), PAD_GREY, dtype=torch.uint8)
    layers = torch.zeros(len(samples), depth, T, *size, dtype=torch.int16 if is_wide else torch.uint8)
    semantic = torch.full((len(samples), T, *size), VOID, dtype=torch.uint8) if needs_stuff else None
    points = []
    for b, sample in enumerate(samples):
        H, W = sample.size
        for frame, planes in zip(sample.frames, frames[b].numpy()[..., :H, :W], strict=True):
            cv2.split(frame, list(planes))  # in place; four times as fast as to permute and copy
        own = sample.layers.astype(np.int16) if is_wide else sample.layers
        layers[b, : len(own), :, :H, :W] = torch.from_numpy(own)
        if semantic is not None:
            assert sample.semantic is not None, sample.name
            semantic[b, :, :H, :W] = torch.from_numpy(sample.semantic)
        count = len(sample.labels)
        given = range(count + 1 - num_points(count), count + 1) if is_given else ()
        points.append([inner_point(sample.mask(number)) for number in given])
    at = (torch.tensor(points, dtype=torch.float32).view(len(samples), -1, 2) + 0.5) / torch.tensor(size)
    return Batch(
        set_name=set_name,
        task=task,
        names=tuple(sample.name for sample in samples),
        frames=frames,
        layers=layers,
        counts=tuple(len(sample.labels) for sample in samples),
        labels=torch.tensor([label for sample in samples for label in sample.labels], dtype=torch.int64),
        semantic=semantic,
        extent=torch.tensor([[s.size[1] / size[1], s.size[0] / size[0]] for s in samples]),
        points=at,
    )


def _cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WaitEndedError(Exception):
    """The run was asked to stop as it waited for clips."""


class Waiter:
    """Takes batches from a loader in a thread, so that waiting for one ends where the run is to stop."""

    def __init__(
        self, ready: Iterator[Batch | str], timeout_s: float, should_stop: Callable[[], bool]
    ) -> None:
        self.is_waiting = False
        """Whether a batch was asked for that has not come."""
        self._timeout_s, self._should_stop = timeout_s, should_stop
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Batch | str | BaseException] = queue.SimpleQueue()
        work = [ready], self._asked, self._answers  # the thread alone holds the loader, and lets it go
        self._thread = threading.Thread(target=_answer, args=work, name="loader", daemon=True)
        self._thread.start()

    def next(self) -> Batch:
        """The next batch; raises as `TrainingLoader.steps`."""
        self._asked.put(True)
        self.is_waiting = True
        with worker_errors():
            answer = self._wait()
            self.is_waiting = False
            if isinstance(answer, BaseException):
                raise answer
        if isinstance(answer, str):
            raise DamagedError(answer)
        return answer

    def close(self) -> None:
        """Let the loader go, and its processes with it."""
        self._asked.put(False)
        if not self.is_waiting:
            join(self._thread)

    def _wait(self) -> Batch | str | BaseException:
        began, asked = time.monotonic(), None
        while True:
            try:
                return self._answers.get(timeout=GLANCE_S)
            except queue.Empty:
                now = time.monotonic()
            if self._should_stop():
                asked = asked or now
                if now - asked >= GRACE_S:
                    raise WaitEndedError
            if now - began >= self._timeout_s:
                raise InputError(
                    f"no clip came for {self._timeout_s:g} s (data.timeout_s): look at its files, or {HINT}"
                )


def _answer(
    loader: list[Iterator[Batch | str]],
    asked: queue.SimpleQueue[bool],
    answers: queue.SimpleQueue[Batch | str | BaseException],
) -> None:
    ready = loader.pop()
    while asked.get():
        try:
            answers.put(next(ready))
        except BaseException as error:
            answers.put(error)


@contextmanager
def worker_errors() -> Iterator[None]:
    """Say what can be done where a process that loads clips ends: PyTorch raises that wherever we are."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if not _is_of_processes(error):
            raise
        raise InputError(f"a process that loads clips has gone ({_reason(error)}): {HINT}") from None


def _reason(error: BaseException) -> str:
    """The first sentence of an error."""
    return str(error).partition("\n")[0].partition(". ")[0][:150]


def _is_of_processes(error: BaseException) -> bool:
    """Whether an error is of PyTorch's loader: of its processes, of what they send."""
    signs = ("DataLoader worker (pid", "Pin memory thread", "shared memory", "Too many open files", "mmap")
    text = str(error)
    return (
        isinstance(error, RuntimeError | OSError)
        and not text.startswith("Caught ")
        and any(sign in text for sign in signs)
    )


def _shared(batch: Batch) -> Batch:
    """A worker's batch in shared memory, where it is sent from.

    PyTorch would do the same in a thread of the queue, which forgets a batch that it cannot send.

    Raises:
        InputError: there is not enough of it.
    """
    if get_worker_info() is None:
        return batch
    try:
        for field in dataclasses.fields(batch):
            if isinstance(value := getattr(batch, field.name), Tensor):
                value.share_memory_()
    except (RuntimeError, OSError) as error:
        raise InputError(f"a clip does not fit into shared memory ({_reason(error)}): {HINT}") from None
    return batch


def _start_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_soon)
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(0))
    # what the queue cannot send it would forget, and the trainer would wait for ever
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_fail)  # type: ignore[attr-defined]


def _fail(error: BaseException, _: object) -> None:
    print(f"a process that loads clips cannot send one: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _end_soon(*_: object) -> None:
    timer = threading.Timer(OUTLIVE_S, os._exit, (0,))
    timer.daemon = True
    timer.start()
