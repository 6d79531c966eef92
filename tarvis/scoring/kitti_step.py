"""KITTI-STEP: STQ.

    results: folder of <sequence>/<frame>.png
    truth:   panoptic_maps/<split>: folder of <sequence>/<frame>.png; every sequence in it is scored

Pictures are RGB: R is the class, or 255 for void, the instance is 256 G + B.

Numbers: STQ, AQ, IoU (which papers call SQ) in [0, 1]; per_sequence/<sequence>/{STQ,AQ,IoU,Length}.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tarvis.files.folders import chosen, files, folders, same_names
from tarvis.files.pictures import read_rgb
from tarvis.metrics.overlaps import overlaps
from tarvis.metrics.stq import INSTANCES, STQ
from tarvis.structures import InputError

NUM_CLASSES = 19
THINGS = (11, 13)  # person, car
VOID = 255


def evaluate(results: Path, truth: Path, videos: Collection[str] | None = None) -> dict[str, float]:
    """The numbers of KITTI-STEP, of all sequences or of those named."""
    stq = STQ(NUM_CLASSES, THINGS, VOID)
    for sequence in chosen(folders(truth), videos, truth):
        names = files(truth / sequence, ".png")
        same_names(results / sequence, names, files(results / sequence, ".png"))
        for name in names:
            true_labels = read_labels(truth / sequence / name)
            labels = read_labels(results / sequence / name)
            if labels.shape != true_labels.shape:
                path = results / sequence / name
                raise InputError(
                    f"{path}: expected a picture of {true_labels.shape}, as the truth, got {labels.shape}"
                )
            stq.add_frame(overlaps(true_labels, labels))
        stq.end_sequence(sequence)
    return stq.summary()


def read_labels(path: Path) -> NDArray[np.int32]:
    """Class * 65536 + instance [H, W] of a picture, checked for classes that there are not."""
    try:
        rgb = read_rgb(path)
    except ValueError as error:
        raise InputError(str(error)) from None
    classes = rgb[..., 0]
    unknown = (classes >= NUM_CLASSES) & (classes != VOID)
    if unknown.any():
        raise InputError(
            f"{path}: expected classes below {NUM_CLASSES} or {VOID} in red, got {classes[unknown][0]}"
        )
    red, green, blue = (rgb[..., k].astype(np.int32) for k in range(3))
    return red * INSTANCES + green * 256 + blue
