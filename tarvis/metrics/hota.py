"""HOTA of tracks, and its mean over classes: BURST. The numbers of a class are the `trackeval` package's.

For 19 thresholds of IoU, 0.05 .. 0.95: detections of a frame are matched by IoU and by how well their tracks
agree over the whole sequence, DetA = TP / (TP + FN + FP), AssA is the mean over TP of the Jaccard index of
the two tracks, HOTA = sqrt(DetA * AssA), OWTA = sqrt(TP / (TP + FN) * AssA); counts are summed over sequences
first, and the number is the mean over thresholds. (Luiten et al., HOTA, IJCV 2021; Athar et al., BURST,
WACV 2023.)

Install with `pip install --no-deps 'trackeval>=1.3'`; it is imported when a number is asked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

NUMBERS = ("HOTA", "DetA", "AssA", "DetRe", "OWTA")
EPSILON = float(np.finfo(float).eps)


class Detections(NamedTuple):
    """Objects of one class in one frame: G true ones, P predicted ones. Ids are unique within a frame."""

    truth: NDArray[np.int64]  # [G] track ids
    predicted: NDArray[np.int64]  # [P] track ids
    iou: NDArray[np.float64]  # [G, P]


class HOTA:
    """Gathers classes of sequences; `numbers` gives the means of each class over thresholds."""

    def __init__(self) -> None:
        with redirect_stdout(StringIO()):  # it prints about what it could do with other packages
            from trackeval.metrics import HOTA as Implementation

        self._implementation = Implementation()
        self._sequences: dict[int, dict[str, Any]] = defaultdict(dict)

    def add(self, category: int, sequence: str, frames: Sequence[Detections]) -> None:
        """One class of one sequence."""
        assert sequence not in self._sequences[category], (category, sequence)
        true_ids, truth = _renumber([frame.truth for frame in frames])
        predicted_ids, predicted = _renumber([frame.predicted for frame in frames])
        self._sequences[category][sequence] = self._implementation.eval_sequence(
            {
                "num_timesteps": len(frames),
                "gt_ids": truth,
                "tracker_ids": predicted,
                "similarity_scores": [frame.iou for frame in frames],
                "num_gt_ids": true_ids,
                "num_tracker_ids": predicted_ids,
                "num_gt_dets": sum(map(len, truth)),
                "num_tracker_dets": sum(map(len, predicted)),
            }
        )

    def numbers(self) -> dict[int, dict[str, float]]:
        """HOTA, DetA, AssA, DetRe and OWTA in [0, 1] of each class."""
        combined = {k: self._implementation.combine_sequences(each) for k, each in self._sequences.items()}
        return {k: {name: float(each[name].mean()) for name in NUMBERS} for k, each in combined.items()}


def judged(frame: Detections, *, is_negative: bool, is_exhaustive: bool) -> Detections:
    """Without the predictions that cannot be judged (class-guided and open-world BURST).

    A prediction that no truth overlaps by half is kept only where all objects of the class were annotated:
    the frame has some, or the class is known to be absent from the video (`is_negative`), and annotators did
    not give up counting (`is_exhaustive`).
    """
    G, P = frame.iou.shape
    if is_exhaustive and (G or is_negative):
        return frame
    iou = np.where(frame.iou < 0.5 - EPSILON, 0, frame.iou)
    rows, columns = linear_sum_assignment(-iou)
    kept = np.zeros(P, bool)
    kept[columns[iou[rows, columns] > EPSILON]] = True
    return Detections(frame.truth, frame.predicted[kept], frame.iou[:, kept])


def class_means(numbers: Mapping[int, Mapping[str, float]], common: Collection[int]) -> dict[str, float]:
    """Means over classes in percent: `HOTA/all`, `HOTA/common`, `HOTA/uncommon` and so on, where defined."""
    groups = {
        "all": list(numbers),
        "common": [k for k in numbers if k in common],
        "uncommon": [k for k in numbers if k not in common],
    }
    names = list(next(iter(numbers.values()), {}))
    return {
        f"{name}/{group}": 100 * float(np.mean([numbers[k][name] for k in members]))
        for name in names
        for group, members in groups.items()
        if members
    }


def _renumber(ids: list[NDArray[np.int64]]) -> tuple[int, list[NDArray[np.int64]]]:
    """How many different ids there are, and the ids renumbered from 0."""
    known = np.unique(np.concatenate(ids)) if ids else np.zeros(0, np.int64)
    return len(known), [np.searchsorted(known, of_frame) for of_frame in ids]
