"""Average precision and recall of tracks (tubes): YouTube-VIS, OVIS, and the AP of BURST.

A = number of ranges (of area, of occlusion) for which everything is counted apart, D = predicted tracks and
G = true tracks of one class in one video, P = IoU thresholds.

IoU of a predicted and a true track: pixels shared in all frames over pixels of either in all frames. In each
video and class predictions choose in the order of their scores; a prediction takes the free truth of highest
IoU of at least the threshold, on equal IoU the later one. Truths that are ignored (crowd, out of range) are
taken only where no other is left, and only crowd more than once; predictions that took them count neither as
right nor as wrong, nor do those that took nothing and are themselves out of range.
Precision is made monotone from the right and read at 101 recalls (COCO; Yang et al., Video Instance
Segmentation, ICCV 2019). Unlike COCO, IoU with a crowd truth is the ordinary one.

Where we differ from `ytvoseval`: a truth of id 0 is a truth like any other (there 0 means "not matched").
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MAX_TRACKS = (1, 10, 100)
"""Predictions per video and class that AR_1, AR_10, AR_100 look at; AP looks at the last of them."""

AREA_RANGES = {"small": (0, 128**2), "medium": (128**2, 256**2), "large": (256**2, 1e10)}
OCCLUSION_RANGES = {"occ_light": (0, 0.25), "occ_medium": (0.25, 0.5), "occ_heavy": (0.5, 1)}
OCCLUSION_LEVELS = {"no_occlusion": 0.0, "slight_occlusion": 0.25, "severe_occlusion": 0.75}

UNDEFINED = -1.0
"""Value of a number without any truth to count."""


class _Video(NamedTuple):
    """Predictions of a class in a video, by falling score."""

    scores: Floats  # [D]
    matched: Bools  # [A, P, D]
    ignored: Bools  # [A, P, D]
    num_truths: NDArray[np.int64]  # [A]


class TrackAP:
    """Gathers videos; `precision` and `recall` give what was found.

    Args:
        ranges: names of what is counted apart; the first is by custom "all".
        thresholds: of IoU.
        max_tracks: predictions that count per video and class; None for all of them.
    """

    def __init__(
        self,
        ranges: Sequence[str] = ("all",),
        thresholds: Floats = THRESHOLDS,
        max_tracks: Sequence[int] | None = MAX_TRACKS,
    ) -> None:
        self.ranges = tuple(ranges)
        self.max_tracks = max_tracks
        self._thresholds = np.minimum(thresholds, 1 - 1e-10)
        self._videos: dict[int, list[_Video]] = defaultdict(list)

    def add(
        self,
        category: int,
        iou: Floats,
        scores: Floats,
        *,
        crowd: Bools | None = None,
        truth_outside: Bools | None = None,
        predicted_outside: Bools | None = None,
    ) -> None:
        """One class of one video. Videos come in the order of their ids: it decides between equal scores.

        Args:
            iou: [D, G].
            scores: [D], in the order of the file.
            crowd: [G], truths that are always ignored and may be taken more than once; none by default.
            truth_outside: [A, G], truths to ignore; none by default.
            predicted_outside: [A, D], predictions to ignore if they take nothing; none by default.
        """
        D, G = iou.shape
        A = len(self.ranges)
        crowd = np.zeros(G, bool) if crowd is None else crowd
        truth_outside = np.zeros((A, G), bool) if truth_outside is None else truth_outside
        predicted_outside = np.zeros((A, D), bool) if predicted_outside is None else predicted_outside

        order = best_first(scores, self.max_tracks)
        ignored_truths = truth_outside | crowd  # [A, G]
        matched, to_ignored = _match(iou[order], crowd, ignored_truths, self._thresholds)
        ignored = np.where(matched, to_ignored, predicted_outside[:, None, order])
        self._videos[category].append(_Video(scores[order], matched, ignored, (~ignored_truths).sum(1)))

    def precision(self, category: int) -> Floats:
        """Precision at 101 recalls [A, P, 101]; -1 in ranges without truths."""
        A, P = len(self.ranges), len(self._thresholds)
        precision = np.full((A, P, len(RECALLS)), UNDEFINED)
        right, wrong, num_truths = self._counts(category, self.max_tracks[-1] if self.max_tracks else None)
        at = right / (right + wrong + np.spacing(1))  # [A, P, N]
        at = np.maximum.accumulate(at[..., ::-1], axis=-1)[..., ::-1]
        at = np.concatenate([at, np.zeros((A, P, 1))], axis=-1)  # beyond the last recall
        for a in np.flatnonzero(num_truths):
            for p in range(P):
                precision[a, p] = at[a, p, np.searchsorted(right[a, p] / num_truths[a], RECALLS)]
        return precision

    def recall(self, category: int, max_tracks: int | None = None) -> Floats:
        """Share of truths that were found [A, P] by the best `max_tracks` predictions; -1 without truths."""
        right, _, num_truths = self._counts(category, max_tracks)
        last = right[..., -1] if right.shape[-1] else np.zeros(right.shape[:-1])  # [A, P]
        return np.where(num_truths[:, None] > 0, last / np.maximum(num_truths, 1)[:, None], UNDEFINED)

    def _counts(self, category: int, max_tracks: int | None) -> tuple[Floats, Floats, NDArray[np.int64]]:
        """Right and wrong predictions so far [A, P, N], by falling score over all videos; truths [A]."""
        A, P = len(self.ranges), len(self._thresholds)
        videos = self._videos.get(category, [])
        if not videos:
            return np.zeros((A, P, 0)), np.zeros((A, P, 0)), np.zeros(A, np.int64)
        order = np.argsort(-np.concatenate([video.scores[:max_tracks] for video in videos]), kind="stable")
        matched = np.concatenate([video.matched[..., :max_tracks] for video in videos], axis=-1)[..., order]
        ignored = np.concatenate([video.ignored[..., :max_tracks] for video in videos], axis=-1)[..., order]
        right, wrong = matched & ~ignored, ~matched & ~ignored
        num_truths = np.sum([video.num_truths for video in videos], axis=0)
        return right.cumsum(-1, dtype=float), wrong.cumsum(-1, dtype=float), num_truths


def best_first(scores: Floats, max_tracks: Sequence[int] | None = MAX_TRACKS) -> NDArray[np.intp]:
    """Indices of the predictions that count, by falling score; equal ones in their order."""
    return np.argsort(-scores, kind="stable")[: max_tracks[-1] if max_tracks else None]


def summary(ap: TrackAP, categories: Iterable[int]) -> dict[str, float]:
    """The numbers by name: AP, AP50, AP75, AP_<range>, AR_1, AR_10, AR_100, AR_<range>, in [0, 1] or -1.

    Beyond them `per_category/<id>/AP` and `.../AR_100`. Ranges other than the first, which is "all", give
    their names to numbers. Means run over what is defined.
    """
    assert ap.max_tracks is not None
    categories = list(categories)
    most = ap.max_tracks[-1]
    precision = np.array([ap.precision(k) for k in categories])  # [K, A, P, 101]
    recall = {m: np.array([ap.recall(k, m) for k in categories]) for m in ap.max_tracks}  # [K, A, P]
    at50, at75 = (int(np.argmin(abs(THRESHOLDS - threshold))) for threshold in (0.5, 0.75))

    numbers = {"AP": precision[:, 0], "AP50": precision[:, 0, at50], "AP75": precision[:, 0, at75]}
    numbers |= {f"AP_{name}": precision[:, a] for a, name in enumerate(ap.ranges) if a}
    numbers |= {f"AR_{m}": recall[m][:, 0] for m in ap.max_tracks}
    numbers |= {f"AR_{name}": recall[most][:, a] for a, name in enumerate(ap.ranges) if a}
    for i, category in enumerate(categories):
        numbers[f"per_category/{category}/AP"] = precision[i, 0]
        numbers[f"per_category/{category}/AR_{most}"] = recall[most][i, 0]
    return {name: mean_of_defined(values) for name, values in numbers.items()}


def mean_of_defined(values: Floats) -> float:
    """Mean of what is not -1; -1 if all is."""
    defined = values[values > UNDEFINED]
    return float(defined.mean()) if defined.size else UNDEFINED


def outside(values: Floats, ranges: Mapping[str, tuple[float, float]]) -> Bools:
    """Which values [N] lie outside of each range -> [len(ranges), N]. Ranges include both ends."""
    return np.array([(values < low) | (values > high) for low, high in ranges.values()])


def occlusion_score(levels: Iterable[str | None]) -> float:
    """How occluded a truth of OVIS is: mean level of the most occluded half (rounded up) of its frames."""
    scores = sorted((OCCLUSION_LEVELS[level] for level in levels if level is not None), reverse=True)
    half = scores[: -(-len(scores) // 2)]
    return sum(half) / len(half) if half else 0.0


def _match(iou: Floats, crowd: Bools, ignored: Bools, thresholds: Floats) -> tuple[Bools, Bools]:
    """Which predictions take a truth [A, P, D], and whether that truth is an ignored one.

    iou [D, G] by falling score, crowd [G], ignored [A, G]. All ranges and thresholds choose at once.
    """
    (D, G), A, P = iou.shape, len(ignored), len(thresholds)
    matched, to_ignored = np.zeros((2, A, P, D), bool)
    taken = np.zeros((A, P, G), bool)
    counted = ~ignored[:, None]  # [A, 1, G]
    reaches = iou[:, None] >= thresholds[:, None]  # [D, P, G]
    for d in np.flatnonzero(reaches.any((1, 2))):
        rank = np.empty(G, np.int64)
        rank[np.argsort(iou[d], kind="stable")] = np.arange(1, G + 1)  # of equal ones the later is higher
        free = reaches[d] & (~taken | crowd)  # [A, P, G]
        preference = free * (rank + G * counted)  # 0 is no choice
        best = preference.argmax(-1)  # [A, P]
        found = np.take_along_axis(preference, best[..., None], -1)[..., 0] > 0
        matched[..., d] = found
        to_ignored[..., d] = found & np.take_along_axis(ignored, best, -1)
        a, p = np.nonzero(found)
        taken[a, p, best[a, p]] = True
    return matched, to_ignored
