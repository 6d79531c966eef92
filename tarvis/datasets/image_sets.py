"""Images with panoptic labels, for pre-training: COCO, ADE20K, Cityscapes and Mapillary Vistas.

    coco = IMAGE_SETS["coco"]
    samples = coco.read(coco.find(root, "train"))
    samples[0].read_map().semantic

All have COCO's panoptic format (see `panoptic_format`). Crowds, segments of several things that were not
labelled one by one, have a class and are no objects; the published code takes each for one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarvis.datasets.benchmark import FrameTruth, Roots, expect_split, first_that_exists
from tarvis.datasets.classes import class_table, labels_by_id
from tarvis.datasets.panoptic_format import places_of, read_panoptic, read_segments
from tarvis.files.records import Entry, read_each, read_json
from tarvis.structures import VOID, Size

FOLDERS = {"train": "training", "val": "validation"}


@dataclass(frozen=True, slots=True, eq=False)
class ImageSample:
    """An image and its segments. COCO has 118 000: names stay strings, segments are one small array.

    `segments` [S, 2] holds ids in the picture and classes, from 0; the first `num_things` rows are objects,
    the others stuff and crowds.
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
        """Objects, numbered from 1, and classes. Pixels of no segment are object 0 and class `VOID`.

        Raises:
            InputError: the picture cannot be used, or is of another size than the annotations say.
        """
        numbers = places_of(read_panoptic(self.map, self.size), self.segments[:, 0])  # [H, W], 0 for void
        labels = np.append(np.uint8(VOID), self.segments[:, 1].astype(np.uint8))
        return FrameTruth(ids=numbers * (numbers <= self.num_things), semantic=labels.take(numbers))


@dataclass(frozen=True)
class ImageSet:
    """An image set, which has the name of its class table.

    `images`, `annotations` and `maps` are places in the official download, with {0} for train and val, {1}
    for training and validation. Segments of the categories in `ignored` are void. `training` holds published
    settings: fields of `tarvis.data.settings.SetSettings` that differ from its defaults.
    """

    name: str
    images: str
    annotations: str
    maps: str
    ignored: frozenset[int] = frozenset()
    is_by_city: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)

    def find(self, root: Path, split: str = "train") -> Roots:
        """Where images and annotations lie below `root`; `truth` is the folder of the pictures of segments.

        Raises:
            InputError: they are missing; the message lists the places that were tried.
        """
        expect_split(self.name, tuple(FOLDERS), split)
        images, annotations, maps = (
            [root / place.format(split, FOLDERS[split])]
            for place in (self.images, self.annotations, self.maps)
        )
        if split == "train":  # the only split in a workspace
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
        name_of = _in_city if self.is_by_city else str
        samples = read_images(root, roots, labels, table.is_thing, name_of)
        found = [sample for sample in samples if sample.num_things or not with_things]
        if not found:
            raise root["annotations"].error(f"no image {'shows a thing' if with_things else 'is annotated'}")
        return found


PRETRAINING: dict[str, Any] = {"tasks": ("vis", "vps", "vos"), "min_sizes": (512, 544, 576)}

IMAGE_SETS = {
    "coco": ImageSet(
        "coco",
        images="{0}2017",
        annotations="annotations/panoptic_{0}2017.json",
        maps="annotations/panoptic_{0}2017",
        training=PRETRAINING,
    ),
    "ade20k": ImageSet(
        "ade20k",
        images="images/{1}",
        annotations="ade20k_panoptic_{0}.json",
        maps="ade20k_panoptic_{0}",
        training=PRETRAINING,
    ),
    "cityscapes": ImageSet(
        "cityscapes",
        images="leftImg8bit/{0}",
        annotations="gtFine/cityscapes_panoptic_{0}.json",
        maps="gtFine/cityscapes_panoptic_{0}",
        ignored=frozenset({-1, 0}),
        is_by_city=True,
        training={**PRETRAINING, "same_crop": True},
    ),
    "mapillary": ImageSet(
        "mapillary",
        images="{1}/images",
        annotations="{1}/panoptic/panoptic_2018.json",
        maps="{1}/panoptic",
        training={**PRETRAINING, "same_crop": True, "reduce_to": 800},
    ),
}


def image_id(entry: Entry) -> int | str:
    """The id of an image: a number or a string."""
    return entry.text() if isinstance(entry.value, str) else entry.integer()


def read_images(
    root: Entry,
    roots: Roots,
    labels: Mapping[int, int | None],
    is_thing: tuple[bool, ...],
    name_of: Callable[[str], str] = str,
) -> list[ImageSample]:
    """The annotated images of a file. No picture is opened.

    Args:
        labels: class of every category; segments of those that have None are left out.
        name_of: where an image lies, from the name that the file gives.
    """
    images = root["images"].by("id", image_id, "image")

    def read(item: tuple[int | str, Entry]) -> ImageSample:
        image, entry = item
        if image not in images:
            raise entry["image_id"].error(f"image {image!r} is unknown")
        objects: list[tuple[int, int]] = []
        others: list[tuple[int, int]] = []
        for number, category, is_crowd in read_segments(entry["segments_info"], labels):
            label = labels[category]
            if label is not None:
                (objects if is_thing[label] and not is_crowd else others).append((number, label))
        return ImageSample(
            roots,
            name_of(images[image]["file_name"].path()),
            entry["file_name"].path(),
            images[image].size(),
            np.array(objects + others, np.int32).reshape(-1, 2),
            len(objects),
        )

    return read_each(root["annotations"].by("image_id", image_id, "image").items(), read)


def _in_city(name: str) -> str:
    """The file of an image of Cityscapes, whose panoptic files give another name.

    aachen_000000_000019_gtFine_leftImg8bit.png is aachen/aachen_000000_000019_leftImg8bit.png.
    """
    file = name.rpartition("/")[2].replace("_gtFine_", "_")
    return f"{file.partition('_')[0]}/{file}"
