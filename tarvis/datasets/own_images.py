"""Own images: COCO's files of instances, and of panoptic segments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pycocotools import mask as coco

from tarvis.datasets.benchmark import FrameTruth, Roots
from tarvis.datasets.own_entries import (
    IMAGE_FOLDERS,
    MAP_FOLDERS,
    folder_with,
    known_image,
    label_of,
    size_of,
)
from tarvis.datasets.panoptic_images import ImageSample, image_id, read_segments
from tarvis.files import rle
from tarvis.files.records import Entry
from tarvis.structures import RLE, InputError, Size


@dataclass(frozen=True)
class OwnImage:
    """An image with objects that may overlap; a `LabelledImage`."""

    name: str
    image: Path
    size: Size
    labels: Mapping[int, int]
    read_map: Callable[[], FrameTruth]


def read_images(root: Entry, path: Path) -> dict[int | str, tuple[Path, Size, Entry]]:
    """File, size and entry of every image, by its id."""
    found: dict[int | str, tuple[Path, Size, Entry]] = {}
    folder: Path | None = None
    for entry in root["images"].entries():
        number, name = image_id(entry["id"]), entry["file_name"].path()
        folder = folder or folder_with(name, path, IMAGE_FOLDERS)
        if number in found:
            raise entry["id"].error(f"image {number!r} comes twice")
        found[number] = (folder / name, size_of(entry), entry)
    return found


def read_instances(
    entries: Sequence[Entry],
    images: Mapping[int | str, tuple[Path, Size, Entry]],
    path: Path,
    labels: Mapping[int, int],
) -> Iterable[OwnImage]:
    """The images that show an object. Crowds are none."""
    objects: dict[int | str, list[tuple[int, Entry]]] = {}
    for entry in entries:
        number = known_image(entry["image_id"], images)
        if not entry.is_set("iscrowd"):
            label, segmentation = label_of(entry, labels), entry["segmentation"]
            _expect_mask(segmentation)
            objects.setdefault(number, []).append((label, segmentation))
    if not objects:
        raise InputError(f"{path}: no image shows an object")
    for number, listed in objects.items():
        file, size, entry = images[number]
        of_object = {k: label for k, (label, _) in enumerate(listed, 1)}
        reader = partial(_read_masks, [segmentation for _, segmentation in listed], size)
        yield OwnImage(entry["file_name"].text(), file, size, of_object, reader)


def _read_masks(segmentations: Sequence[Entry], size: Size) -> FrameTruth:
    return FrameTruth({k: _code(each, size) for k, each in enumerate(segmentations, 1)})


def _expect_mask(segmentation: Entry) -> None:
    """Refuse what is no mask, such as the empty list of an object with a box alone. Numbers are not read."""
    value = segmentation.value
    is_mask = isinstance(value, dict) or (
        isinstance(value, list)
        and value != []
        and all(isinstance(each, list) and len(each) >= 6 and len(each) % 2 == 0 for each in value)
    )
    if not is_mask:
        raise segmentation.expected(
            "a run-length code, or polygons [x, y, x, y, ...] of three points or more"
        )


def _code(segmentation: Entry, size: Size) -> RLE:
    """COCO's three ways to write a mask: polygons, runs, compressed runs."""
    if isinstance(segmentation.value, list):
        reach = 2 * max(size)  # pycocotools walks along every edge, pixel by pixel
        polygons = [
            [min(max(x.number(), -reach), reach) for x in polygon.entries()]
            for polygon in segmentation.entries()
        ]
        merged: RLE = coco.merge(coco.frPyObjects(polygons, *size))
        return merged
    if segmentation["size"].value != list(size):
        raise segmentation["size"].expected(f"{list(size)}, the size of the image")
    counts = segmentation["counts"]
    try:
        if isinstance(counts.value, str | list):
            return rle.from_file([counts.value], size)[0]
    except rle.BadCode:
        pass
    raise counts.expected(f"a run-length code of {size}")


def read_panoptic(
    entries: Sequence[Entry],
    images: Mapping[int | str, tuple[Path, Size, Entry]],
    path: Path,
    labels: Mapping[int, int],
    is_thing: tuple[bool, ...],
) -> Iterable[ImageSample]:
    """The images that show a thing."""
    maps = folder_with(entries[0]["file_name"].path(), path, MAP_FOLDERS)
    found = 0
    for entry in entries:
        file, size, image = images[known_image(entry["image_id"], images)]
        name = image["file_name"].path()
        roots = Roots(Path(str(file).removesuffix(name)), path, maps)
        segments, num_things = read_segments(entry["segments_info"], labels, is_thing)
        if num_things:
            found += 1
            yield ImageSample(roots, name, entry["file_name"].path(), size, segments, num_things)
    if not found:
        raise InputError(f"{path}: no image shows a thing")
