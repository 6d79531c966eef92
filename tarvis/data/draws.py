"""Random numbers that depend on what they are for, not on who draws them.

Every draw of training data comes from a counter-based generator (Salmon et al. 2011, Philox) whose key is the
seed and the purpose, and whose counter is the place: the step, the sample, the attempt. So neither rank,
worker nor world size changes a sample, and a run goes on at any step without having drawn what came before.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What numbers are drawn for; each has a stream of its own."""

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
