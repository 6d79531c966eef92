"""Own data to train on: a JSON file of images or videos, or a folder of frames and masks.

    my.json     COCO instances: `images`, `annotations` with polygons or run-length codes, `categories`
                COCO panoptic: `annotations` with `segments_info`, and pictures of segments
                YouTube-VIS: `videos`, `annotations` with `segmentations`, `categories`
    my_folder   JPEGImages/<video>/<frame>.jpg, Annotations/<video>/<frame>.png, as DAVIS has them, masks
                being indexed by object, 255 void; or frames/ (or images/) and masks/

The set is called like the file or folder. Its classes are the file's `categories`, in their order; a folder
has none, and trains vos alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tarvis.datasets.benchmark import VideoSample
from tarvis.datasets.classes import ClassTable
from tarvis.datasets.own_entries import read_classes
from tarvis.datasets.own_images import OwnImage, read_images, read_instances, read_panoptic
from tarvis.datasets.own_videos import count_videos, read_folder, read_videos
from tarvis.datasets.panoptic_images import ImageSample
from tarvis.files.records import read_json
from tarvis.structures import InputError


@dataclass(frozen=True)
class OwnData:
    """What was read: videos or images, their classes (None where objects have none), and possible tasks.

    `left_out` counts further videos or images, which show no object.
    """

    name: str
    classes: ClassTable | None
    tasks: tuple[str, ...]
    videos: tuple[VideoSample, ...] = ()
    images: tuple[OwnImage | ImageSample, ...] = ()
    left_out: int = 0


def read_own(path: Path) -> OwnData:
    """Read a file or folder of own data. No image is opened.

    Raises:
        InputError: it is of another kind, or damaged; the message names file and entry.
    """
    name = re.sub(r"\W+", "_", path.stem if path.is_file() else path.name).strip("_") or "own"
    if path.is_dir():
        videos = tuple(read_folder(path))
        return OwnData(name, None, ("vos",), videos, left_out=count_videos(path) - len(videos))
    if path.suffix.lower() != ".json":
        raise InputError(f"{path}: expected a .json file, or a folder of frames and masks")
    root = read_json(path)
    if root.get("categories") is None:
        raise root.error("is no training data: it has no categories")
    classes = read_classes(root["categories"], name)
    labels = {category: label for label, category in enumerate(classes.ids)}
    if root.get("videos") is not None:
        videos = tuple(read_videos(root, path, labels))
        num_videos = len(root["videos"].entries())
        return OwnData(name, classes, ("vis", "vos"), videos, left_out=num_videos - len(videos))
    images = read_images(root, path)
    entries = root["annotations"].entries()
    tasks: tuple[str, ...] = ("vis", "vos")
    found: tuple[OwnImage | ImageSample, ...]
    if entries and entries[0].get("segments_info") is not None:
        tasks = ("vis", "vps", "vos")
        found = tuple(read_panoptic(entries, images, path, labels, classes.is_thing))
    else:
        found = tuple(read_instances(entries, images, path, labels))
    return OwnData(name, classes, tasks, images=found, left_out=len(images) - len(found))
