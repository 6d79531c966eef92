"""Which frames make a clip of a video, and which part of them it shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tarvis.datasets.benchmark import Truth, VideoSample
from tarvis.files.pictures import Window
from tarvis.structures import Size

CROP_TRIES = 10
LEAST_SHOWN = 0.25
"""Share of the objects' pixels that a part of a frame must show."""


def frames_around(
    visible: Sequence[Sequence[int]], length: int, window: float, random: np.random.Generator
) -> list[int]:
    """A frame that shows an object, and others within round(window * length) frames of it; in order.

    A video with fewer frames than the clip has repeats some of them (the original fails).
    """
    reference = int(random.choice([t for t, ids in enumerate(visible) if ids]))
    reach = round(window * length)
    near = [t for t in range(reference - reach, reference + reach + 1) if 0 <= t < len(visible)]
    near.remove(reference)
    return sorted([reference, *_some(near, length - 1, reference, random)])


def consecutive_frames(num_frames: int, length: int, random: np.random.Generator) -> list[int]:
    """Frames one after the other; a video that is too short repeats its last one."""
    start = int(random.integers(max(1, num_frames - length + 1)))
    return [min(start + k, num_frames - 1) for k in range(length)]


def frames_after(
    first: int, num_frames: int, length: int, window: float, random: np.random.Generator
) -> list[int]:
    """`first`, and others from the round(window * length) - 1 frames after it; in order."""
    later = list(range(first + 1, min(first + round(window * length), num_frames)))
    return [first, *sorted(_some(later, length - 1, first, random))]


def first_frames(
    videos: Sequence[VideoSample], length: int, max_objects: int
) -> dict[int, NDArray[np.int32]]:
    """The frames [M, 2] (video, frame) that show n objects or more, for each n that can be given.

    A whole clip fits after each frame, except in videos shorter than a clip. The original leaves out the last
    frame that a clip fits after, and short videos; and it takes frames in the order of the file.
    """
    places, counts = [], []
    for k, video in enumerate(videos):
        visible = truth_of(video).visible
        for t in range(max(0, len(visible) - length) + 1):
            places.append((k, t))
            counts.append(len(visible[t]))
    at, shown = np.array(places, np.int32).reshape(-1, 2), np.array(counts)
    starts = {n: at[shown >= n] for n in range(1, max_objects + 1)}
    return {n: found for n, found in starts.items() if len(found)}


def _some(frames: list[int], count: int, otherwise: int, random: np.random.Generator) -> list[int]:
    """`count` of the frames; one is repeated only after all were chosen equally often."""
    chosen: list[int] = []
    while len(chosen) < count:
        chosen += random.permutation(frames or [otherwise])[: count - len(chosen)].tolist()
    return chosen


# Which part of them


def window_showing(covered: NDArray[np.bool_], part: Size, random: np.random.Generator) -> Window | None:
    """A part that shows a quarter of the covered pixels; None if ten random ones show less."""
    box = _box(covered)
    if box is None:
        return None
    top, bottom, left, right = box
    needed = max(1, LEAST_SHOWN * np.count_nonzero(covered))
    for _ in range(CROP_TRIES):
        window = Window(
            _between(max(0, top - part[0] + 1), min(bottom, covered.shape[0] - part[0]), random),
            _between(max(0, left - part[1] + 1), min(right, covered.shape[1] - part[1]), random),
            *part,
        )
        if np.count_nonzero(covered[window.box]) >= needed:
            return window
    return None


def window_with(covered: NDArray[np.bool_], part: Size, random: np.random.Generator) -> Window | None:
    """A part that shows all covered pixels; None if they do not fit into it."""
    box = _box(covered)
    if box is None:
        return None
    top, bottom, left, right = box
    if bottom - top + 1 >= part[0] or right - left + 1 >= part[1]:
        return None
    return Window(
        _between(max(0, bottom + 1 - part[0]), min(top, covered.shape[0] - part[0]), random),
        _between(max(0, right + 1 - part[1]), min(left, covered.shape[1] - part[1]), random),
        *part,
    )


def _box(covered: NDArray[np.bool_]) -> tuple[int, int, int, int] | None:
    """First and last row, first and last column."""
    rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
    return (int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])) if rows.size else None


def _between(low: int, high: int, random: np.random.Generator) -> int:
    return int(random.integers(low, high + 1))


def truth_of(video: VideoSample) -> Truth:
    assert video.truth is not None, video.name
    return video.truth
