"""How many pixels each pair of labels of two maps shares: all that panoptic metrics need of a frame."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.integer]


class Overlaps(NamedTuple):
    """Pairs of labels that meet, and in how many pixels: three arrays [M] int64. No pair appears twice."""

    truth: NDArray[np.int64]
    predicted: NDArray[np.int64]
    pixels: NDArray[np.int64]


def overlaps(truth: Ids, predicted: Ids) -> Overlaps:
    """Overlaps of two label maps of the same shape; labels lie in 0 .. 2**31 - 1.

    Labels are constant over long runs of pixels, so runs are sorted instead of pixels (1024 x 2048 pixels of
    50 segments: 6 ms instead of 140 ms of np.unique over pixels).
    """
    assert truth.shape == predicted.shape, (truth.shape, predicted.shape)
    pairs = truth.ravel().astype(np.int64)  # [H*W]
    pairs <<= 32
    pairs |= predicted.ravel()
    if not pairs.size:
        return Overlaps(*np.zeros((3, 0), np.int64))
    starts = np.concatenate([[0], np.flatnonzero(pairs[1:] != pairs[:-1]) + 1])  # [runs]
    lengths = np.diff(starts, append=pairs.size)
    labels, which = np.unique(pairs[starts], return_inverse=True)
    return Overlaps(labels >> 32, labels & 0xFFFFFFFF, _sums(which, lengths, len(labels)))


def merge(parts: list[Overlaps]) -> Overlaps:
    """The overlaps of several frames together."""
    truth, predicted, pixels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    labels, which = np.unique(truth << 32 | predicted, return_inverse=True)
    return Overlaps(labels >> 32, labels & 0xFFFFFFFF, _sums(which, pixels, len(labels)))


def _sums(which: NDArray[np.intp], values: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Sum of the values of each group; exact, since pixel counts stay below 2**53."""
    return np.bincount(which, values, count).astype(np.int64)
