"""Videos of run-length codes: the published training files of DAVIS, KITTI-STEP and Cityscapes-VPS.

    {"meta": {"category_labels": {"11": "person", "13": "car"}},
     "sequences": [{"id": "0001", "height": 375, "width": 1242,
                    "image_paths": ["0001/000000.png", "0001/000001.png"],
                    "categories": {"7": 13},
                    "segmentations": [{"7": code}, {}],
                    "semantic_segmentations": [{"0": code, "13": code, "255": code}, {"0": code}]}]}

A frame's masks are COCO codes by object, and, where stuff has classes too, by class; class 255 is void. The
published code takes pixels without a class for road (the class 0); here they are void.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from tarvis.datasets.benchmark import FrameTruth, Truth, VideoSample
from tarvis.datasets.classes import class_table
from tarvis.files import rle
from tarvis.files.records import Entry, read_each, read_json, read_masks
from tarvis.structures import RLE, VOID, InputError, Size


def read_coded_videos(path: Path, images: Path, class_set: str | None) -> list[VideoSample]:
    """The videos of a file, with their truth. Masks are checked and decoded when a frame's truth is read.

    Args:
        images: folder that `image_paths` start from.
        class_set: class table of the categories, which must be things, and of the semantic masks, which must
            be there. None where objects have no class.

    Raises:
        InputError: something is wrong with the file; the message names it and the entry.
    """
    sequences = read_json(path)["sequences"].by("id", Entry.path, "sequence")
    if not sequences:
        raise InputError(f"{path}: has no sequences")
    return read_each(sequences.values(), lambda entry: _read_video(entry, images, class_set))


def _read_video(entry: Entry, images: Path, class_set: str | None) -> VideoSample:
    size = entry.size()
    paths = [path.path() for path in entry["image_paths"].entries()]
    names = [PurePosixPath(path).stem for path in paths]
    if not paths:
        raise entry["image_paths"].expected("at least one image")
    if len(set(names)) != len(names):
        twice = next(name for k, name in enumerate(names) if name in names[:k])
        raise entry["image_paths"].error(f"a frame {twice!r} appears twice")

    masks = entry["segmentations"].entries(len(paths), "segmentations, one an image")
    labels = _read_labels(entry["categories"], class_set)
    visible = tuple(tuple(frame.by_number()) for frame in masks)
    shown = {id_ for ids in visible for id_ in ids}
    if shown != labels.keys():
        id_ = min(shown ^ labels.keys())
        raise entry["categories"].error(
            f"has object {id_}, which no frame shows"
            if id_ in labels
            else f"lacks object {id_}, which is shown"
        )
    classes: list[Entry | None] = [None] * len(paths)
    indices: dict[int, int] = {}
    if class_set is not None:
        classes = [*entry["semantic_segmentations"].entries(len(paths), "segmentations, one an image")]
        indices = {id_: k for k, id_ in enumerate(class_table(class_set).ids)}
    return VideoSample(
        name=entry["id"].path(),
        images=tuple(images / path for path in paths),
        frame_names=tuple(names),
        size=size,
        truth=Truth(labels, visible, partial(_read_frame, masks, classes, indices, size)),
    )


def _read_labels(categories: Entry, class_set: str | None) -> dict[int, int | None]:
    """Class of each object by its id."""
    if class_set is None:
        return dict.fromkeys(categories.by_number())
    table = class_table(class_set)
    things = {table.ids[k]: k for k in table.things}
    labels: dict[int, int | None] = {}
    for id_, category in categories.by_number().items():
        if category.integer() not in things:
            raise category.expected(f"a class of things of {class_set}: {', '.join(map(str, things))}")
        labels[id_] = things[category.value]
    return labels


def _read_frame(
    masks: Sequence[Entry],
    classes: Sequence[Entry | None],
    indices: dict[int, int],
    size: Size,
    frame: int,
) -> FrameTruth:
    """The truth of a frame; `indices` gives the class (from 0) of every class id."""
    objects, of_class = _read_codes(masks[frame], size), classes[frame]
    if of_class is None:
        return FrameTruth(objects)
    semantic = np.full(size, VOID, np.uint8)
    for id_, mask in sorted(_read_codes(of_class, size).items()):
        if id_ not in indices and id_ != VOID:
            raise of_class.error(f"class {id_} is unknown")
        semantic[rle.decode(mask)] = indices.get(id_, VOID)  # void comes last, and wins
    return FrameTruth(objects, semantic=semantic)


def _read_codes(frame: Entry, size: Size) -> dict[int, RLE]:
    entries = frame.by_number()
    return dict(zip(entries, read_masks(list(entries.values()), size), strict=True))
