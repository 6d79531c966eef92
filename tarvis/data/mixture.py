"""Which kind of clips every step trains on: a set, a task and, in vos, a number of objects.

The same kind serves a chunk of steps, on every rank. Chunks are dealt in rounds: within a round each kind's
count is its weighted share rounded by at most one, and the remainder carries over to the next; their order is
random. The kind of a chunk follows from its number alone, so a checkpoint need not hold any of this.

Every draw of training data comes from a counter-based generator (Salmon et al. 2011, Philox) whose key is the
seed and the purpose, and whose counter is the place: the step, the sample, the attempt. So neither rank,
worker nor world size changes a sample, and a run resumes at any step without repeating earlier draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tarvis.data.batch import Sample
from tarvis.data.clips import Kind
from tarvis.structures import InputError

ROUND = 64
"""Chunks of a round."""


class ClipSet(Protocol):
    """A training set: `VideoClips`, `ImageClips`, `MovingClips`."""

    name: str

    def kinds(self) -> Mapping[Kind, int]:
        """Kinds of its clips, each with the number of items that clips can be made of."""
        ...

    def origin(self, kind: Kind, item: int) -> str:
        """What an item is called, for messages."""
        ...

    def draw(self, kind: Kind, item: int, random: np.random.Generator) -> Sample | None:
        """A random clip of an item; None where it shows no object."""
        ...


class Cell(NamedTuple):
    """What the steps of a chunk have in common; `items` is the number of items of this kind in the set."""

    number: int
    set_index: int
    kind: Kind
    items: int


class Mixture:
    """The schedule of a run.

    Args:
        weights: of the sets.
        task_weights: of the tasks of a set that serves several. Numbers of objects are equally likely.

    Raises:
        InputError: a set has no clips of any task that has a weight.
    """

    def __init__(
        self,
        sets: Sequence[ClipSet],
        weights: Sequence[float],
        task_weights: Mapping[str, float],
        *,
        seed: int,
    ) -> None:
        self.seed = seed
        self.cells: list[Cell] = []
        shares: list[float] = []
        for index, (clips, weight) in enumerate(zip(sets, weights, strict=True)):
            kinds = clips.kinds()
            of_task = {kind.task: 0 for kind in kinds}
            for kind in kinds:
                of_task[kind.task] += 1
            # a set of one task trains it, whatever the task's weight
            likely = {task: task_weights.get(task, 0.0) if len(of_task) > 1 else 1.0 for task in of_task}
            if weight and not sum(likely.values()):
                raise InputError(f"{clips.name}: none of its tasks has a weight: {', '.join(of_task)}")
            for kind, items in kinds.items():
                share = weight * likely[kind.task] / max(sum(likely.values()), 1e-12) / of_task[kind.task]
                if share:
                    self.cells.append(Cell(len(self.cells), index, kind, items))
                    shares.append(share)
        if not self.cells:
            raise InputError("nothing to train on: no set has a weight")
        self.shares = np.array(shares) / sum(shares)
        self._dealt: list[NDArray[np.int64]] = [np.zeros(len(shares), np.int64)]  # before each round

    def chunk(self, number: int) -> tuple[Cell, int]:
        """The cell of the chunk of this number, and how many earlier chunks have the same cell."""
        round_, place = divmod(number, ROUND)
        dealt = self._dealt_before(round_)
        order = deal(
            self._dealt_before(round_ + 1) - dealt,
            generator(self.seed, Purpose.SCHEDULE, round_).permutation(ROUND),
        )
        cell = order[place]
        return self.cells[cell], int(dealt[cell]) + order[:place].count(cell)

    def item(self, cell: Cell, visit: int) -> int:
        """The item of the visit-th clip of a cell; every epoch takes each item once, in random order."""
        epoch, place = divmod(visit, cell.items)
        return int(_order(self.seed, cell.number, epoch, cell.items)[place])

    def _dealt_before(self, round_: int) -> NDArray[np.int64]:
        """How many chunks of each cell there are before a round."""
        while len(self._dealt) <= round_:
            dealt = self._dealt[-1].copy()
            for place in range(ROUND * (len(self._dealt) - 1), ROUND * len(self._dealt)):
                dealt[np.argmax(self.shares * (place + 1) - dealt)] += 1  # the cell that lacks most
            self._dealt.append(dealt)
        return self._dealt[round_]


def deal(counts: Sequence[int] | NDArray[np.int64], order: Sequence[int] | NDArray[np.int64]) -> list[int]:
    """Each k occurs `counts[k]` times, permuted by `order`."""
    return np.repeat(np.arange(len(counts)), counts)[np.asarray(order)].tolist()


@lru_cache(maxsize=64)
def _order(seed: int, cell: int, epoch: int, items: int) -> NDArray[np.int32]:
    return generator(seed, Purpose.ORDER, cell, epoch).permutation(items).astype(np.int32)


# Random numbers


class Purpose(IntEnum):
    """The purposes of random numbers, each with its own stream."""

    SAMPLE = 0  # step, sample, attempt
    SCHEDULE = 1  # round
    ORDER = 2  # cell, epoch
    POINTS = 3  # step
    OTHER = 4  # step, sample, attempt


def generator(seed: int, purpose: Purpose, *place: int) -> np.random.Generator:
    """Independent random numbers for each seed, purpose and place (up to three numbers)."""
    assert len(place) <= 3, place
    counter = [0, *place, *(0,) * (3 - len(place))]  # the first word counts the numbers drawn here
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, purpose], counter=counter))


def num_points(uniforms: Sequence[float], num_objects: int, share: float) -> int:
    """How many of N objects are given by a point instead of a mask: those whose number lies below `share`."""
    return sum(u < share for u in uniforms[:num_objects])
