"""Images with panoptic labels, for pre-training: COCO, ADE20K, Cityscapes and Mapillary Vistas.

    coco = IMAGE_SETS["coco"]
    samples = coco.read(coco.find(root, "train"))
    samples[0].read_map().semantic

All come as COCO has it: a JSON file lists every image's segments, and in an RGB picture beside it the number
red + 256 green + 65536 blue says which segment a pixel is of. Crowds, segments of several things that nobody
told apart, have a class and are no objects; the published code takes each for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from tarvis.datasets.benchmark import VOID, FrameTruth, Roots, first_that_exists
from tarvis.datasets.categories import labels_by_id
from tarvis.datasets.classes import class_table
from tarvis.files.pictures import read_rgb
from tarvis.files.records import Entry, read_json
from tarvis.structures import InputError, Size

COLOURS = 2**24
LONGEST_SIDE = 2**15
MOST_SEGMENTS = 2**16 - 1
"""Of an image, so that their numbers fit in 16 bits."""

FOLDERS = {"train": "training", "val": "validation"}


@dataclass(frozen=True, slots=True, eq=False)
class ImageSample:
    """An image and its segments. COCO has 118 000: names stay strings, segments are one small array.

    `segments` [S, 2] holds number in the picture and class, from 0; the first `num_things` are objects, what
    follows is stuff and crowds.
    """

    roots: Roots
    name: str
    map_name: str
    size: Size
    segments: NDArray[np.int32]
    num_things: int

    @property
    def image(self) -> Path:
        return self.roots.images / self.name

    @property
    def map(self) -> Path:
        """The picture of segments."""
        assert self.roots.truth is not None
        return self.roots.truth / self.map_name

    @property
    def labels(self) -> dict[int, int]:
        """Class of every object, by the id that `read_map` gives it."""
        return dict(enumerate(self.segments[: self.num_things, 1].tolist(), 1))

    def read_map(self) -> FrameTruth:
        """Objects, numbered from 1, and classes; all else is object 0. What no segment claims is `VOID`.

        Raises:
            InputError: the picture cannot be used, or is of another size than the annotations say.
        """
        try:
            rgb = read_rgb(self.map)
        except ValueError as error:
            raise InputError(str(error)) from None
        if rgb.shape[:2] != self.size:
            raise InputError(f"{self.map}: expected a picture of {self.size}, got {rgb.shape[:2]}")
        # red is the lowest byte, and an alpha of 255 the highest
        colours = cv2.cvtColor(rgb, cv2.COLOR_RGB2RGBA).view("<u4")[..., 0] & (COLOURS - 1)  # [H, W]
        # of these 32 MiB the system makes only the pages that are touched (measured on a COCO map: 0.9 ms;
        # 28 comparisons, one a segment, take 3.2 ms)
        rows = np.zeros(COLOURS, np.uint16)
        rows[self.segments[:, 0]] = np.arange(1, len(self.segments) + 1)
        numbers = rows.take(colours)  # [H, W], 0 for void
        labels = np.append(np.uint8(VOID), self.segments[:, 1].astype(np.uint8))
        return FrameTruth(ids=numbers * (numbers <= self.num_things), semantic=labels.take(numbers))


@dataclass(frozen=True)
class ImageSet:
    """An image set; its name is that of its class table, too.

    `images`, `annotations` and `maps` are places in the official download, with {0} for train and val, {1}
    for training and validation. Segments of the categories in `ignored` are void.
    """

    name: str
    images: str
    annotations: str
    maps: str
    ignored: frozenset[int] = frozenset()
    is_by_city: bool = False

    def find(self, root: Path, split: str = "train") -> Roots:
        """Where images and annotations lie below `root`; `truth` is the folder of the pictures of segments.

        Raises:
            InputError: not there; the message says what was looked for.
        """
        if split not in FOLDERS:
            raise InputError(f"{self.name} has no split {split!r}; known: {', '.join(FOLDERS)}")
        images, annotations, maps = (
            [root / place.format(split, FOLDERS[split])]
            for place in (self.images, self.annotations, self.maps)
        )
        if split == "train":  # alone in a workspace
            published = root / "dataset_annotations/training" / f"{self.name}_panoptic"
            images.insert(0, root / "dataset_images/training" / self.name)
            annotations.insert(0, published / "segments.json")
            maps.insert(0, published / "pan_maps")
        return Roots(
            first_that_exists(images, f"images of {self.name} {split}"),
            first_that_exists(annotations, f"annotations of {self.name} {split}"),
            first_that_exists(maps, f"pictures of segments of {self.name} {split}"),
        )

    def read(self, roots: Roots, *, with_things: bool = True) -> list[ImageSample]:
        """The images, in the order of their annotations. No picture is opened.

        Args:
            with_things: leave out the images without any thing, from which no object can be learned.

        Raises:
            InputError: a file is missing or damaged; the message names file and entry.
        """
        root = read_json(roots.annotations)
        table = class_table(self.name)
        labels: dict[int, int | None] = {**labels_by_id(root, table), **dict.fromkeys(self.ignored)}
        images: dict[int | str, Entry] = {}
        for entry in root["images"].entries():
            image = image_id(entry["id"])
            if image in images:
                raise entry["id"].error(f"image {image!r} comes twice")
            images[image] = entry
        samples: list[ImageSample] = []
        done: set[int | str] = set()
        for entry in root["annotations"].entries():
            image = image_id(entry["image_id"])
            if image not in images or image in done:
                reason = "comes twice" if image in done else "is unknown"
                raise entry["image_id"].error(f"image {image!r} {reason}")
            done.add(image)
            segments, num_things = read_segments(entry["segments_info"], labels, table.is_thing)
            size = tuple(images[image][side].integer(1, LONGEST_SIDE) for side in ("height", "width"))
            name, map_name = images[image]["file_name"].path(), entry["file_name"].path()
            if self.is_by_city:
                name = _in_city(name)
            if num_things or not with_things:
                samples.append(ImageSample(roots, name, map_name, (size[0], size[1]), segments, num_things))
        if not samples:
            raise root["annotations"].error(f"no image {'shows a thing' if with_things else 'is annotated'}")
        return samples


IMAGE_SETS = {
    "coco": ImageSet(
        "coco",
        images="{0}2017",
        annotations="annotations/panoptic_{0}2017.json",
        maps="annotations/panoptic_{0}2017",
    ),
    "ade20k": ImageSet(
        "ade20k",
        images="images/{1}",
        annotations="ade20k_panoptic_{0}.json",
        maps="ade20k_panoptic_{0}",
    ),
    "cityscapes": ImageSet(
        "cityscapes",
        images="leftImg8bit/{0}",
        annotations="gtFine/cityscapes_panoptic_{0}.json",
        maps="gtFine/cityscapes_panoptic_{0}",
        ignored=frozenset({-1, 0}),
        is_by_city=True,
    ),
    "mapillary": ImageSet(
        "mapillary",
        images="{1}/images",
        annotations="{1}/panoptic/panoptic_2018.json",
        maps="{1}/panoptic",
    ),
}


def image_id(entry: Entry) -> int | str:
    """What a file calls an image: a number or a string."""
    return entry.text() if isinstance(entry.value, str) else entry.integer()


def read_segments(
    listed: Entry, labels: Mapping[int, int | None], is_thing: tuple[bool, ...]
) -> tuple[NDArray[np.int32], int]:
    """Numbers and classes of an image's segments [S, 2], objects first, and how many these are.

    Args:
        labels: class of every category; segments of those that have None are left out.

    Raises:
        InputError: a number comes twice, or a category is unknown.
    """
    objects: dict[int, int] = {}
    others: dict[int, int] = {}
    entries = listed.entries()
    if len(entries) > MOST_SEGMENTS:
        raise listed.error(f"expected at most {MOST_SEGMENTS} segments, got {len(entries)}")
    seen: set[int] = set()
    for entry in entries:
        number, category = entry["id"].integer(1, COLOURS - 1), entry["category_id"].integer(-1)
        if number in seen:
            raise entry["id"].error(f"id {number} comes twice")
        seen.add(number)
        if category not in labels:
            raise entry["category_id"].error(f"category {category} is unknown")
        label = labels[category]
        if label is not None:
            is_object = is_thing[label] and not entry.is_set("iscrowd")
            (objects if is_object else others)[number] = label
    segments = np.array([*objects.items(), *others.items()], np.int32).reshape(-1, 2)
    return segments, len(objects)


def _in_city(name: str) -> str:
    """Where Cityscapes has what its panoptic files call `aachen_000000_000019_gtFine_leftImg8bit.png`.

    In the folder of the city, `aachen/aachen_000000_000019_leftImg8bit.png`.
    """
    file = name.rpartition("/")[2].replace("_gtFine_", "_")
    return f"{file.partition('_')[0]}/{file}"
