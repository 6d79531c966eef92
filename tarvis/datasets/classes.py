"""Class tables: names, things and stuff, colours, in the order of the networks' outputs."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from tarvis.files.records import Entry
from tarvis.structures import InputError

RGB = tuple[int, int, int]

TABLES = {
    "youtube_vis_2021": "youtube_vis_2021.json",
    "youtube_vis_2019": "youtube_vis_2019.json",
    "ovis": "ovis.json",
    "kitti_step": "kitti_step.json",
    "cityscapes_vps": "cityscapes_vps.json",
    "vipseg": "vipseg.json",
    "coco": "coco_panoptic.json",
    "ade20k": "ade20k_panoptic.json",
    "cityscapes": "cityscapes_panoptic.json",
    "mapillary": "mapillary_panoptic.json",
    "synthetic": "synthetic.json",
}
"""File of each table in `tarvis/assets/categories`."""
MOST_CLASSES = 254
"""Of own data: classes fit in a byte beside void and background."""


@dataclass(frozen=True)
class ClassTable:
    """Classes of one benchmark; index k is the network's class k, counted from 0 without background."""

    name: str
    names: tuple[str, ...]
    is_thing: tuple[bool, ...]
    colors: tuple[RGB, ...]
    ids: tuple[int, ...]
    """The classes' ids in the benchmark's own files."""

    @property
    def num_classes(self) -> int:
        return len(self.names)

    def named(self, text: str) -> set[int]:
        """Indices of the classes that a text names, with commas between; names may have commas themselves.

        Raises:
            InputError: a name that no class has.
        """
        pieces, found = [piece.strip() for piece in text.split(",")], set[int]()
        while pieces:
            fits = [n for n in range(1, len(pieces) + 1) if ", ".join(pieces[:n]) in self.names]
            if not fits:
                raise InputError(f"unknown class {pieces[0]!r}; {self.name} has: {'; '.join(self.names)}")
            name = ", ".join(pieces[: fits[-1]])
            found |= {k for k, known in enumerate(self.names) if known == name}
            pieces = pieces[fits[-1] :]
        return found

    @property
    def things(self) -> tuple[int, ...]:
        """Indices of the classes with instances."""
        return tuple(k for k, thing in enumerate(self.is_thing) if thing)

    @property
    def stuff(self) -> tuple[int, ...]:
        """Indices of the classes without instances."""
        return tuple(k for k, thing in enumerate(self.is_thing) if not thing)


@cache
def class_table(name: str) -> ClassTable:
    """The class table of a benchmark; colours are made up, all different, if it publishes none.

    Raises:
        InputError: no such table; the message lists the known ones.
    """
    if name not in TABLES:
        raise InputError(f"unknown class set {name!r}; known: {', '.join(TABLES)}")
    file = resources.files("tarvis") / "assets" / "categories" / TABLES[name]
    categories = json.loads(file.read_text(encoding="utf-8"))["categories"]
    categories.sort(key=lambda category: category["contiguous_id"])
    made_up = distinct_colors(len(categories))
    return ClassTable(
        name=name,
        names=tuple(category["name"] for category in categories),
        is_thing=tuple(bool(category["isthing"]) for category in categories),
        colors=tuple(
            tuple(category.get("color", color)) for category, color in zip(categories, made_up, strict=True)
        ),
        ids=tuple(category["id"] for category in categories),
    )


def named_classes(name: str, names: Sequence[str], is_thing: Sequence[bool]) -> ClassTable:
    """A class table from outside the package."""
    colors = tuple(distinct_colors(len(names)))
    return ClassTable(name, tuple(names), tuple(is_thing), colors, tuple(range(1, len(names) + 1)))


def listed_classes(listed: Entry, name: str) -> ClassTable:
    """The table of the `categories` of a file of own data, in their order."""
    entries = listed.entries()
    if not 1 <= len(entries) <= MOST_CLASSES:
        raise listed.error(f"expected 1 to {MOST_CLASSES} categories, got {len(entries)}")
    by_id = listed.by("id", Entry.integer, "category")
    flags = [entry.get("isthing") for entry in by_id.values()]
    return ClassTable(
        name=name,
        names=tuple(entry["name"].text() for entry in by_id.values()),
        is_thing=tuple(flag is None or flag.flag() for flag in flags),
        colors=tuple(distinct_colors(len(by_id))),
        ids=tuple(by_id),
    )


def labels_by_id(root: Entry, table: ClassTable) -> dict[int, int]:
    """The label, counted from 0, of every category id of `table`.

    Editions of a benchmark give the same ids to different classes, which only the names reveal: where the
    file lists its `categories`, no class may have another id than in the table. Unknown names are ignored.

    Raises:
        InputError: a class has another id.
    """
    ids: dict[str, set[int]] = {}
    for name, category in zip(table.names, table.ids, strict=True):
        ids.setdefault(_plain(name), set()).add(category)
    listed = root.get("categories")
    for entry in listed.entries() if listed else ():
        name, category = entry["name"].text(), entry["id"].integer(-1)
        expected = ids.get(_plain(name), {category})
        if category not in expected:
            raise entry["id"].error(
                f"{name!r} is category {category}, but {min(expected)} in {table.name}: another edition?"
            )
    return {category: label for label, category in enumerate(table.ids)}


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").replace("-", " ")


def distinct_colors(count: int) -> list[RGB]:
    """`count` colours; neighbours are far apart in hue, since hues advance by the golden ratio."""
    golden = (5**0.5 - 1) / 2
    colors = []
    for k in range(count):
        saturation, value = (0.6, 0.85, 0.95)[k % 3], (0.95, 0.9, 0.65)[k // 3 % 3]
        r, g, b = (round(255 * x) for x in colorsys.hsv_to_rgb(k * golden % 1, saturation, value))
        colors.append((r, g, b))
    return colors
