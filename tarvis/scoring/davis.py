"""DAVIS 2017, semi-supervised: J&F.

    results: folder of <sequence>/<frame>.png, indexed: a pixel is an object's id
    truth:   DAVIS, with Annotations/480p and ImageSets/2017/val.txt; or a folder of
             <sequence>/<frame>.png, of which every sequence is scored

Numbers: J&F-Mean, {J,F}-{Mean,Recall,Decay} in [0, 1]; per_object/<sequence>_<id>/{J,F}.

The first and last frame of a sequence are not scored and need not be among the results. Objects are those
of the first true frame: 1 up to its largest id; 255 is background.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from tarvis.files.folders import chosen, files, folders
from tarvis.files.pictures import IdMap, read_ids
from tarvis.files.records import checked_path
from tarvis.metrics.jf import Floats, jf_frame, summary
from tarvis.structures import InputError

IMAGE_SET = Path("ImageSets/2017/val.txt")
ANNOTATIONS = Path("Annotations/480p")
VOID = 255


def evaluate(results: Path, truth: Path, videos: Collection[str] | None = None) -> dict[str, float]:
    """The numbers of DAVIS 2017, of all sequences of the split or of those named."""
    annotations = truth / ANNOTATIONS if (truth / ANNOTATIONS).is_dir() else truth
    names = read_names(truth / IMAGE_SET) if (truth / IMAGE_SET).is_file() else folders(annotations)
    objects: dict[str, tuple[Floats, Floats]] = {}
    for sequence in chosen(names, videos, truth):
        j, f = _score(results / sequence, annotations / sequence)
        for k in range(j.shape[1]):
            objects[f"{sequence}_{k + 1}"] = j[:, k], f[:, k]
    return summary(objects)


def _score(results: Path, truth: Path) -> tuple[Floats, Floats]:
    """J and F [F, N] of a sequence."""
    names = files(truth, ".png")
    if len(names) < 3:
        raise InputError(f"{truth}: expected at least 3 frames (the first and the last are not scored)")
    num_objects = int(without_void(read_mask(truth / names[0])).max())
    if not num_objects:
        raise InputError(f"{truth / names[0]}: shows no objects")
    scores = []
    for name in names[1:-1]:
        true_ids, ids = without_void(read_mask(truth / name)), read_mask(results / name)
        if ids.shape != true_ids.shape:
            raise InputError(f"{results / name}: expected a picture of {true_ids.shape}, got {ids.shape}")
        if ids.max() > num_objects:
            raise InputError(f"{results / name}: expected ids up to {num_objects}, got {ids.max()}")
        scores.append(jf_frame(np.where(true_ids > num_objects, 0, true_ids), ids, num_objects))
    j, f = np.array(scores).transpose(1, 0, 2)
    return j, f


def read_mask(path: Path) -> IdMap:
    """Ids [H, W] of a picture."""
    try:
        return read_ids(path)
    except ValueError as error:
        raise InputError(str(error)) from None


def without_void(ids: IdMap) -> IdMap:
    """The ids, 0 where they were void."""
    ids = ids.copy()
    ids[ids == VOID] = 0
    return ids


def read_names(path: Path) -> list[str]:
    """Names of the sequences of an image set, a text file; at least one."""
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    seen: set[str] = set()
    for name in names:
        try:
            checked_path(name)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
        if name in seen:
            raise InputError(f"{path}: {name} comes twice")
        seen.add(name)
    if not names:
        raise InputError(f"{path}: is empty")
    return names
