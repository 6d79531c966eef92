"""Segmentation and tracking quality: KITTI-STEP and VIPSeg.

    STQ = sqrt(AQ * SQ)
    SQ  = mean IoU of classes, from one confusion matrix over all frames of all sequences
    AQ  = mean over true tubes g of (1/|g|) sum_p TPA(p, g) * TPA(p, g) / (|p| + |g| - TPA(p, g))

A tube is all pixels of a sequence with the same class (a thing) and instance; TPA counts pixels that p and g
share. Classes of p and g need not agree. Thing truth of instance 0 is crowd: it is no tube, and predicted
pixels on it are not counted in |p|; those on void are. Predicted thing pixels of instance 0 are a tube.
(Weber et al., STEP: Segmenting and Tracking Every Pixel, NeurIPS 2021; deeplab2's
`segmentation_and_tracking_quality.py`, also where void is predicted on labelled pixels: there it is one
class more in the mean, of IoU 0.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarvis.metrics.overlaps import Ids, Overlaps, merge

INSTANCES = 2**16
"""Instances of a class; `encode` makes one label of both."""


class STQ:
    """Gathers frames, sequence by sequence.

    Args:
        num_classes: K; classes are 0 .. K - 1.
        things: the classes with instances.
        void: label of pixels without truth, outside of 0 .. K - 1.
    """

    def __init__(self, num_classes: int, things: Iterable[int], void: int = 255) -> None:
        assert void >= num_classes, (void, num_classes)
        self._num_classes = num_classes
        self._void = void
        self._is_thing = np.zeros(num_classes + 1, bool)  # void is the last
        self._is_thing[list(things)] = True
        self._frames: list[Overlaps] = []
        self._confusion: dict[str, NDArray[Any]] = {}  # [K + 1, K + 1], truth x predicted
        self._association: dict[str, tuple[float, int]] = {}  # sum over true tubes, their number
        self._lengths: dict[str, int] = {}

    def add_frame(self, shared: Overlaps) -> None:
        """The next frame of the sequence; its labels are `encode(class, instance)`."""
        self._frames.append(shared)

    def end_sequence(self, name: str) -> None:
        """The frames since the last call were those of a sequence."""
        assert name not in self._lengths, name
        K = self._num_classes
        self._lengths[name] = len(self._frames)
        truth, predicted, pixels = merge(self._frames or [Overlaps(*np.zeros((3, 0), np.int64))])
        self._frames = []
        true_class, predicted_class = self._classes(truth), self._classes(predicted)
        confusion = np.bincount(true_class * (K + 1) + predicted_class, pixels, (K + 1) ** 2)
        self._confusion[name] = confusion.reshape(K + 1, K + 1)

        is_true_thing = self._is_thing[true_class]
        is_crowd = is_true_thing & (truth % INSTANCES == 0)
        in_true = is_true_thing & ~is_crowd
        in_predicted = self._is_thing[predicted_class] & ~is_crowd
        tubes, which_true = np.unique(truth, return_inverse=True)
        true_sizes = np.bincount(which_true[in_true], pixels[in_true], len(tubes))
        predicted_tubes, which = np.unique(predicted, return_inverse=True)
        predicted_sizes = np.bincount(which[in_predicted], pixels[in_predicted], len(predicted_tubes))

        both = in_true & in_predicted
        tpa, g, p = pixels[both].astype(float), true_sizes[which_true[both]], predicted_sizes[which[both]]
        self._association[name] = float((tpa * tpa / (g + p - tpa) / g).sum()), int((true_sizes > 0).sum())

    def summary(self) -> dict[str, float]:
        """STQ, AQ, IoU (which is SQ) in [0, 1], and the same and `Length` as `per_sequence/<name>/...`."""
        numbers = self._numbers(list(self._lengths))
        for name, length in self._lengths.items():
            for key, value in {**self._numbers([name]), "Length": length}.items():
                numbers[f"per_sequence/{name}/{key}"] = value
        return numbers

    def _numbers(self, names: list[str]) -> dict[str, float]:
        K = self._num_classes
        association, tubes = np.sum([self._association[name] for name in names] or [(0.0, 0)], axis=0)
        aq = float(association / max(tubes, 1))
        confusion = np.sum([self._confusion[name] for name in names] or [np.zeros((K + 1, K + 1))], axis=0)
        confusion[K] = 0
        intersections = confusion.diagonal()
        unions = confusion.sum(0) + confusion.sum(1) - intersections
        iou = float((intersections / np.maximum(unions, 1)).sum() / max(np.count_nonzero(unions), 1))
        return {"STQ": (aq * iou) ** 0.5, "AQ": aq, "IoU": iou}

    def _classes(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        classes = labels // INSTANCES
        assert ((classes < self._num_classes) | (classes == self._void)).all(), classes.max()
        return np.where(classes == self._void, self._num_classes, classes)


def encode(classes: Ids, instances: Ids) -> NDArray[np.int64]:
    """One label of a class and an instance in 0 .. 65535."""
    return classes.astype(np.int64) * INSTANCES + instances
