"""COCO's panoptic format, in which Cityscapes-VPS and VIPSeg want results and give their truth.

pan_pred/NAME.png   RGB: R + 256 G + 65536 B is the id of a segment, kept through the video; 0 is void
pred.json           {"annotations": [...]}, where every frame has its
                    "segments_info": [{"id": 8405120, "category_id": 0, "iscrowd": 0, "area": 1200}]
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tarvis.datasets.benchmark import VOID, FrameTruth, Truth, VideoSample
from tarvis.datasets.classes import ClassTable
from tarvis.datasets.generic_video import LONGEST_SIDE
from tarvis.files.atomic import whole_file, write_json_list
from tarvis.files.pictures import image_size
from tarvis.files.records import Entry
from tarvis.scoring.panoptic_files import LARGEST_ID, listed_segments, read_panoptic, read_segments
from tarvis.stitch.panoptic import assign_colours, coco_encoding, decode_labels, fuse
from tarvis.structures import InputError, Size, VideoResult

JSON = "pred.json"
PICTURES = "pan_pred"
MOST_TRACKS = 2**16 - 1


def write_pictures(
    result: VideoResult, video: VideoSample, folder: Path, names: Sequence[str], classes: ClassTable
) -> list[list[dict[str, int]]]:
    """Write the scored frames' pictures; returns the segments of each, stuff first.

    Args:
        folder: pictures become `folder/pan_pred/NAME`.
        names: for each scored frame.
    """
    assert result.num_frames == len(video.images), (video.name, result.num_frames, len(video.images))
    colours = assign_colours(result.tracks, classes.colors)
    listed = []
    for frame, name in zip(video.scored, names, strict=True):
        semantic, instance = fuse(decode_labels(result.stuff[frame]), result.tracks, frame)
        image, segments = coco_encoding(semantic, instance, classes.colors, colours)
        path = folder / PICTURES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes())
        listed.append(
            [
                {"id": s.id, "category_id": classes.ids[s.category], "iscrowd": 0, "area": s.area}
                for s in segments
            ]
        )
    return listed


def write_annotations(folder: Path, entries: Iterable[Any]) -> None:
    """Write `pred.json`; one entry is in memory at a time."""
    write_json_list(folder / JSON, entries, before='{"annotations": ', after="}\n")


def check_frame(entry: Entry, picture: Path, size: Size, categories: Collection[int]) -> None:
    """Check that a picture and the segments listed for it fit each other, and the video's size."""
    ids = _read_picture(picture, size)
    seen = np.zeros(LARGEST_ID + 1, bool)
    seen[ids] = True
    seen[0] = False
    listed_segments(entry, np.flatnonzero(seen), picture, categories)


def submission(results: Path, expected: Collection[str]) -> dict[str, Path]:
    """The files to submit by name, after a check that `pan_pred` has no PNG files but those expected."""
    folder, names = results / PICTURES, set(expected)
    for path in sorted(folder.rglob("*.png")):
        if path.relative_to(folder).as_posix() not in names:
            raise InputError(f"{path}: belongs to no frame that is scored")
    return {name: results / name for name in (JSON, *(f"{PICTURES}/{each}" for each in expected))}


def common_size(images: Iterable[Entry]) -> Size | None:
    """Size that the images of a video say they have, None where one does not say it."""
    sizes = set()
    for image in images:
        height, width = image.get("height"), image.get("width")
        if height is None or width is None:
            return None
        sizes.add((height.integer(1, LONGEST_SIDE), width.integer(1, LONGEST_SIDE)))
        if len(sizes) > 1:
            raise image.error("is of another size than the video's images before it")
    return sizes.pop()


def size_of(video: VideoSample) -> Size:
    """Size of a video, read from its first image where the annotations do not say it."""
    return video.size or image_size(video.images[0])


def copy_file(source: Path, target: Path) -> None:
    """Copy a file; the copy is whole or not there."""
    with source.open("rb") as file, whole_file(target) as copy:
        shutil.copyfileobj(file, copy)


def panoptic_truth(frames: Sequence[tuple[Entry, Path]], size: Size | None, classes: ClassTable) -> Truth:
    """Truth of a video. Tracks are numbered from 1 as they are first listed; crowd is void.

    Args:
        frames: the entry with each frame's segments, and its picture, which is read when it is asked for.
        size: of the pictures, where it is known.

    Raises:
        InputError: a category is unknown, or an id changes its own.
    """
    indices = {category: k for k, category in enumerate(classes.ids)}
    numbers: dict[int, int] = {}  # track of each segment that is one
    labels: dict[int, int | None] = {}
    visible = []
    for entry, _ in frames:
        segments = read_segments(entry, indices, has_area=False)
        shown = []
        for k, category, crowd in zip(*(column.tolist() for column in segments[:3]), strict=True):
            label = indices[category]
            if classes.is_thing[label] and not crowd:
                number = numbers.setdefault(k, len(numbers) + 1)
                if labels.setdefault(number, label) != label or number > MOST_TRACKS:
                    raise entry["segments_info"].error(f"id {k} was of another category before")
                shown.append(number)
        visible.append(tuple(sorted(shown)))
    return Truth(labels, tuple(visible), partial(_read_frame, tuple(frames), numbers, indices, size))


def _read_picture(path: Path, size: Size | None) -> NDArray[np.int32]:
    ids = read_panoptic(path)
    if size is not None and ids.shape != size:
        raise InputError(f"{path}: expected a picture of {size}, as the video, got {ids.shape}")
    return ids


def _read_frame(
    frames: Sequence[tuple[Entry, Path]],
    numbers: dict[int, int],
    indices: dict[int, int],
    size: Size | None,
    frame: int,
) -> FrameTruth:
    entry, picture = frames[frame]
    segments, ids = read_segments(entry, indices, has_area=False), _read_picture(picture, size)
    place = np.zeros(LARGEST_ID + 1, np.uint16)  # of each id in the list; 0 for pixels of no segment
    place[segments.ids] = np.arange(1, len(segments.ids) + 1)
    tracks = np.zeros(len(segments.ids) + 1, np.uint16)
    labels: NDArray[np.uint8] = np.full(len(segments.ids) + 1, VOID, np.uint8)
    tracks[1:] = [
        0 if crowd else numbers.get(k, 0)
        for k, crowd in zip(segments.ids.tolist(), segments.crowd.tolist(), strict=True)
    ]
    labels[1:] = [
        VOID if crowd else indices[category]
        for category, crowd in zip(segments.categories.tolist(), segments.crowd.tolist(), strict=True)
    ]
    places = place[ids]
    return FrameTruth(ids=tracks[places], semantic=labels[places])
