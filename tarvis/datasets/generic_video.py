"""The generic video JSON: what the training splits of DAVIS, KITTI-STEP and Cityscapes-VPS are kept in.

    {"meta": {"category_labels": {"11": "person", "13": "car"}},
     "sequences": [{"id": "0001", "height": 375, "width": 1242,
                    "image_paths": ["0001/000000.png", "0001/000001.png"],
                    "categories": {"7": 13},
                    "segmentations": [{"7": code}, {}],
                    "semantic_segmentations": [{"0": code, "13": code, "255": code}, {"0": code}]}]}

A frame's masks are COCO codes by object, and, where stuff has classes too, by class; class 255 is void. The
published code takes pixels in no class for road (the class 0); here they are void.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarvis.datasets.benchmark import VOID, FrameTruth, Truth, VideoSample
from tarvis.datasets.classes import class_table
from tarvis.files import rle
from tarvis.files.atomic import write_json_list
from tarvis.files.records import Entry, read_json
from tarvis.structures import RLE, InputError, Size

LONGEST_SIDE = 2**15


def read_generic(path: Path, images: Path, class_set: str | None) -> list[VideoSample]:
    """The videos of a file, with their truth. Masks are checked and decoded when a frame's truth is read.

    Args:
        images: folder that `image_paths` start from.
        class_set: class table of the categories, which must be things, and of the semantic masks, which must
            be there. None where objects have no class.

    Raises:
        InputError: something is wrong with the file; the message names it and the entry.
    """
    videos: dict[str, VideoSample] = {}
    for entry in read_json(path)["sequences"].entries():
        video = _read_video(entry, images, class_set)
        if video.name in videos:
            raise entry["id"].error(f"sequence {video.name!r} comes twice")
        videos[video.name] = video
    if not videos:
        raise InputError(f"{path}: has no sequences")
    return list(videos.values())


def write_generic(path: Path, sequences: Iterable[dict[str, Any]], meta: dict[str, Any]) -> None:
    """Write a file sequence by sequence; it appears under its name once it is whole."""
    write_json_list(path, sequences, before=f'{{"meta": {json.dumps(meta)}, "sequences": ', after="}\n")


def coded_sequence(
    name: str,
    image_paths: Sequence[str],
    frames: Iterable[tuple[NDArray[np.unsignedinteger], NDArray[np.uint8] | None]],
    category_of: Callable[[int], int],
) -> dict[str, Any]:
    """The entry of a sequence, for `write_generic`, of its maps.

    Args:
        frames: for each image a map [H, W] of object ids, 0 elsewhere, and one of classes, or None.
        category_of: the class of an object by its id.

    Raises:
        InputError: labels differ in size.
    """
    objects: list[dict[str, str]] = []
    classes: list[dict[str, str]] = []
    size: tuple[int, ...] | None = None
    for image, (ids, semantic) in zip(image_paths, frames, strict=True):
        size = size or ids.shape
        if ids.shape != size:
            raise InputError(f"labels of {image}: expected a size of {size}, as before, got {ids.shape}")
        objects.append(_coded_map(ids, without=0))
        if semantic is not None:
            assert semantic.shape == size, (semantic.shape, size)
            classes.append(_coded_map(semantic))
    assert size is not None, name
    shown = sorted({int(id_) for frame in objects for id_ in frame})
    return {
        "id": name,
        "height": size[0],
        "width": size[1],
        "image_paths": list(image_paths),
        "categories": {str(id_): category_of(id_) for id_ in shown},
        "segmentations": objects,
        **({"semantic_segmentations": classes} if classes else {}),
    }


def _coded_map(numbers: NDArray[np.unsignedinteger], without: int | None = None) -> dict[str, str]:
    """Codes of the pixels [H, W] of each number, by the number."""
    shown = [k for k in np.flatnonzero(np.bincount(numbers.ravel())).tolist() if k != without]
    return {str(k): rle.encode((numbers == k)[None])[0]["counts"].decode("ascii") for k in shown}


def _read_video(entry: Entry, images: Path, class_set: str | None) -> VideoSample:
    size = entry["height"].integer(1, LONGEST_SIDE), entry["width"].integer(1, LONGEST_SIDE)
    paths = [path.path() for path in entry["image_paths"].entries()]
    names = [PurePosixPath(path).stem for path in paths]
    if not paths:
        raise entry["image_paths"].expected("at least one image")
    if len(set(names)) != len(names):
        twice = next(k for k, name in enumerate(names) if name in names[:k])
        raise entry["image_paths"].error(f"a frame {names[twice]!r} comes twice")

    masks = entry["segmentations"].entries(len(paths), "segmentations, one an image")
    labels = _read_labels(entry["categories"], class_set)
    visible = tuple(tuple(_by_number(frame)) for frame in masks)
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
        return dict.fromkeys(_by_number(categories))
    table = class_table(class_set)
    things = {table.ids[k]: k for k in table.things}
    labels: dict[int, int | None] = {}
    for id_, category in _by_number(categories).items():
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
    """Truth of a frame; `indices` gives the class index of every class id."""
    objects, of_class = _read_codes(masks[frame], size), classes[frame]
    if of_class is None:
        return FrameTruth(objects)
    semantic = np.full(size, VOID, np.uint8)
    for id_, mask in sorted(_read_codes(of_class, size).items()):
        if id_ not in indices and id_ != VOID:
            raise of_class.error(f"class {id_} is unknown")
        semantic[rle.decode(mask)] = indices.get(id_, VOID)  # what is void as well comes last, and stays void
    return FrameTruth(objects, semantic=semantic)


def _read_codes(frame: Entry, size: Size) -> dict[int, RLE]:
    entries = _by_number(frame)
    for entry in entries.values():
        if not isinstance(entry.value, str | list):
            raise entry.expected("a run-length code")
    try:
        codes = rle.from_file([entry.value for entry in entries.values()], size)
    except rle.BadCode as error:
        raise list(entries.values())[error.index].expected(f"a run-length code of {size}") from None
    return dict(zip(entries, codes, strict=True))


def _by_number(entry: Entry) -> dict[int, Entry]:
    """The entries of an object whose keys are numbers."""
    found: dict[int, Entry] = {}
    for key, value in entry.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 9 and str(int(key)) == key):
            raise entry.error(f"expected keys to be numbers, got {key[:60]!r}")
        found[int(key)] = value
    return found
