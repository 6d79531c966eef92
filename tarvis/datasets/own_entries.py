"""What files of own data have in common: classes, sizes, and where their pictures lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tarvis.datasets.classes import ClassTable, distinct_colors
from tarvis.datasets.panoptic_images import image_id
from tarvis.files.records import Entry
from tarvis.scoring.youtube_vis import LONGEST_SIDE
from tarvis.structures import InputError, Size

_USUAL = ("", "images", "JPEGImages", "{0}", "{1}", "images/{1}", "{1}/JPEGImages")
IMAGE_FOLDERS = (*_USUAL, *(f"../{folder}" for folder in _USUAL))
MAP_FOLDERS = ("{0}", "pan_maps", "panoptic_maps", "panoptic", "../{0}", "../pan_maps", "")
"""Where pictures may lie from the folder of a JSON file; {0} is its name, {1} the part behind the last _."""
MOST_CLASSES = 254


def read_classes(listed: Entry, name: str) -> ClassTable:
    entries = listed.entries()
    if not 1 <= len(entries) <= MOST_CLASSES:
        raise listed.error(f"expected 1 to {MOST_CLASSES} categories, got {len(entries)}")
    ids = tuple(entry["id"].integer() for entry in entries)
    if len(set(ids)) < len(ids):
        raise listed.error(f"category {next(i for k, i in enumerate(ids) if i in ids[:k])} comes twice")
    flags = [entry.get("isthing") for entry in entries]
    return ClassTable(
        name=name,
        names=tuple(entry["name"].text() for entry in entries),
        is_thing=tuple(flag is None or flag.flag() for flag in flags),
        colors=tuple(distinct_colors(len(entries))),
        ids=ids,
    )


def folder_with(name: str, path: Path, folders: Sequence[str]) -> Path:
    """The folder that has a file of this name.

    Raises:
        InputError: none has; the message lists them.
    """
    names = path.stem, path.stem.rpartition("_")[2]
    places = dict.fromkeys(folder.format(*names) for folder in folders)
    for place in places:
        if (path.parent / place / name).is_file():
            return path.parent / place
    others = ", ".join(filter(None, places))
    raise InputError(f"{path}: {name} not found; looked in {path.parent} and, from there, in {others}")


def known_image(entry: Entry, images: Mapping[int | str, object]) -> int | str:
    number = image_id(entry)
    if number not in images:
        raise entry.error(f"image {number!r} is unknown")
    return number


def label_of(entry: Entry, labels: Mapping[int, int]) -> int:
    category = entry["category_id"].integer()
    if category not in labels:
        raise entry["category_id"].error(f"category {category} is unknown")
    return labels[category]


def size_of(entry: Entry) -> Size:
    return entry["height"].integer(1, LONGEST_SIDE), entry["width"].integer(1, LONGEST_SIDE)
