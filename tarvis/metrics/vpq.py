"""Video panoptic quality: Cityscapes-VPS and VIPSeg.

For every window of n consecutive frames of a video, the segments with one id form a tube. A predicted and a
true tube match if they have the same class, the truth is no crowd, and their IoU exceeds 0.5, where predicted
pixels on void count in neither:

    IoU = I / (A_predicted + A_true - I - |predicted on void|)      PQ = sum of IoU / (TP + FP/2 + FN/2)

Sums and counts run over all windows of all videos, per class; VPQ^n is the mean of PQ over the classes that
occur, VPQ the mean over n. An unmatched prediction is waived if more than half of it lies on void or on crowd
of its class. (Kim et al., Video Panoptic Segmentation, CVPR 2020; `eval_vpq.py` of mcahny/vps, whose reading
of details is kept: class and crowd of a tube are those of its first frame in the window, true areas are those
listed, and of several crowd tubes of a class only the last one waives.)

Where we differ: pixels are looked at once, not once a window, and at most max(n) frames are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tarvis.metrics.overlaps import Overlaps, merge

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

CITYSCAPES_VPS_WINDOWS = (1, 2, 3, 4)
VIPSEG_WINDOWS = (1, 2, 4, 6, 8)
VOID = 0


class Segments(NamedTuple):
    """Segments listed for a frame: four arrays [S]. `areas` of predictions are not looked at."""

    ids: Ints
    categories: Ints
    crowd: NDArray[np.bool_]
    areas: Ints


class _Frame(NamedTuple):
    shared: Overlaps
    truth: Segments
    predicted: Segments


class VPQ:
    """Gathers frames, video by video.

    Args:
        is_thing: whether a class, by its id, is a thing.
        windows: lengths n, in annotated frames. A video shorter than n has no windows of n.
    """

    def __init__(self, is_thing: Mapping[int, bool], windows: Sequence[int]) -> None:
        self.windows = tuple(windows)
        self._is_thing = dict(is_thing)
        self._categories = np.array(sorted(is_thing), np.int64)
        # sum of IoU, TP, FP, FN of each class
        self._sums = {n: np.zeros((len(self._categories), 4)) for n in self.windows}
        self._recent: deque[_Frame] = deque(maxlen=max(self.windows))

    def add_frame(self, shared: Overlaps, truth: Segments, predicted: Segments) -> None:
        """The next frame of the video; id 0 is void. Listed segments without pixels are allowed."""
        self._recent.append(_Frame(shared, truth, predicted))
        for n in self.windows:
            if len(self._recent) >= n:
                window = list(islice(self._recent, len(self._recent) - n, None))
                self._sums[n] += self._count(window)

    def end_video(self) -> None:
        """The next frame begins another video."""
        self._recent.clear()

    def summary(self, window: int) -> dict[str, float]:
        """`all/pq`, `all/sq`, `all/rq` in percent, `all/n` classes that occur; likewise `thing`, `stuff`.

        Classes apart are `per_class/<id>/{pq,sq,rq}` in [0, 1] and `.../{iou,tp,fp,fn}`. What has no class
        that occurs is left out.
        """
        iou, tp, fp, fn = self._sums[window].T
        occurs = tp + fp + fn > 0
        with np.errstate(invalid="ignore"):
            each = {
                "pq": iou / (tp + fp / 2 + fn / 2),
                "sq": np.where(tp > 0, iou / tp, 0),
                "rq": tp / (tp + fp / 2 + fn / 2),
            }
        is_thing = np.array([self._is_thing[k] for k in self._categories.tolist()], bool)
        numbers: dict[str, float] = {}
        for group, members in {
            "all": occurs,
            "thing": occurs & is_thing,
            "stuff": occurs & ~is_thing,
        }.items():
            if members.any():
                numbers |= {
                    f"{group}/{name}": 100 * float(value[members].mean()) for name, value in each.items()
                }
                numbers[f"{group}/n"] = int(members.sum())
        counts = {"iou": iou, "tp": tp, "fp": fp, "fn": fn}
        for k in np.flatnonzero(occurs):
            for name, value in {**each, **counts}.items():
                numbers[f"per_class/{self._categories[k]}/{name}"] = float(value[k])
        return numbers

    def _count(self, window: list[_Frame]) -> Floats:
        """Sum of IoU, TP, FP, FN of each class [K, 4] in one window."""
        truth = _tubes([frame.truth for frame in window])
        predicted = _tubes([frame.predicted for frame in window])
        G, P = len(truth.ids), len(predicted.ids)

        shared = merge([frame.shared for frame in window])
        g, known_truth = _find(truth.ids, shared.truth)
        p, known = _find(predicted.ids, shared.predicted)
        areas = np.bincount(p[known], shared.pixels[known], P)  # [P]
        on_void = known & (shared.truth == VOID)
        void = np.bincount(p[on_void], shared.pixels[on_void], P)  # [P]
        known &= known_truth
        I = np.zeros((G, P))  # noqa: E741
        I[g[known], p[known]] = shared.pixels[known]

        may_match = (truth.categories[:, None] == predicted.categories) & ~truth.crowd[:, None] & (I > 0)
        union = areas + truth.areas[:, None] - I - void  # [G, P]
        iou = np.divide(I, union, out=np.zeros((G, P)), where=may_match & (union > 0))
        matches, match_of = np.nonzero(iou > 0.5)

        waived = void.copy()  # [P]
        crowd_of = {truth.categories[k]: k for k in np.flatnonzero(truth.crowd)}  # the last one of a class
        for k in range(P):
            if predicted.categories[k] in crowd_of:
                waived[k] += I[crowd_of[predicted.categories[k]], k]
        is_false = waived <= 0.5 * areas
        is_false[match_of] = False
        is_missed = ~truth.crowd
        is_missed[matches] = False

        sums = np.zeros((len(self._categories), 4))
        sums[:, 0] = self._by_class(truth.categories[matches], iou[matches, match_of])
        sums[:, 1] = self._by_class(truth.categories[matches])
        sums[:, 2] = self._by_class(predicted.categories[is_false])
        sums[:, 3] = self._by_class(truth.categories[is_missed])
        return sums

    def _by_class(self, categories: Ints, values: Floats | None = None) -> Floats:
        """Sum of the values, or number, of each class [K]."""
        which = np.searchsorted(self._categories, categories)
        return np.bincount(which, values, len(self._categories)).astype(float)


def mean_over_windows(numbers: Mapping[int, Mapping[str, float]], windows: Sequence[int]) -> dict[str, float]:
    """The mean of VPQ^n over `windows` for `all`, `thing` and `stuff`, where all of them are defined."""
    groups = ("all", "thing", "stuff")
    return {
        group: float(np.mean([numbers[n][f"{group}/pq"] for n in windows]))
        for group in groups
        if all(f"{group}/pq" in numbers[n] for n in windows)
    }


def _tubes(frames: list[Segments]) -> Segments:
    """Segments of several frames glued by id, in the order in which they are first listed."""
    ids, categories, crowd, areas = (np.concatenate(arrays) for arrays in zip(*frames, strict=True))
    _, first, which = np.unique(ids, return_index=True, return_inverse=True)
    total = np.bincount(which, areas, len(first)).astype(np.int64)
    order = np.argsort(first)
    first = first[order]
    return Segments(ids[first], categories[first], crowd[first], total[order])


def _find(ids: Ints, wanted: Ints) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Index in `ids` of each wanted one, and whether it is there at all (else the index means nothing)."""
    if not ids.size:
        return np.zeros(wanted.shape, np.intp), np.zeros(wanted.shape, bool)
    order = np.argsort(ids)
    index = order[np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)]
    return index, ids[index] == wanted
