"""Score weights that know other classes than the benchmark: which of theirs is which of its, by name.

A file such as

    {"class_set": "cityscapes_vps", "names": {"car": "car", "person": "person", "rider": "person"}}

maps the classes of the weights (keys) to those of the benchmark (values). Things without an entry are left
out; every stuff class needs an entry if the benchmark has stuff. Either side may be the classes of own data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tarvis.config import OwnClasses
from tarvis.datasets.classes import TABLES, ClassTable, class_table, named_classes
from tarvis.files.atomic import write_json
from tarvis.files.records import read_json
from tarvis.stitch.panoptic import decode_labels, encode_labels
from tarvis.structures import InputError, VideoResult


@dataclass(frozen=True)
class ClassMap:
    """`labels[k]` is the benchmark's class (from 0) for class k of the class set, or None."""

    class_set: str
    labels: tuple[int | None, ...]

    @staticmethod
    def read(
        path: Path, benchmark: ClassTable | str, own_classes: Mapping[str, OwnClasses] | None = None
    ) -> ClassMap:
        """Read the file.

        Args:
            benchmark: its classes, or the name of their table.
            own_classes: class sets that come with the weights.

        Raises:
            InputError: a class set or class is unknown, a thing would become stuff or the reverse, or a stuff
                class has no entry.
        """
        root = read_json(path)
        name = root["class_set"].text()
        if name not in TABLES and name not in (own_classes or {}):
            raise root["class_set"].expected(f"one of {', '.join({**(own_classes or {}), **TABLES})}")
        own = known_classes(name, own_classes or {})
        other = class_table(benchmark) if isinstance(benchmark, str) else benchmark
        labels: list[int | None] = [None] * own.num_classes
        for key, entry in root["names"].items():
            if key not in own.names:
                raise root["names"].error(f"{name} has no class {key!r}")
            if entry.text() not in other.names:
                raise entry.expected(f"a class of {other.name}")
            k, label = own.names.index(key), other.names.index(entry.text())
            if own.is_thing[k] != other.is_thing[label]:
                kinds = ["stuff", "a thing"]
                raise entry.error(
                    f"{key} is {kinds[own.is_thing[k]]}, {entry.value} is {kinds[other.is_thing[label]]}"
                )
            labels[k] = label
        if other.stuff and (missing := [own.names[k] for k in own.stuff if labels[k] is None]):
            raise root["names"].error(f"has no name for {missing[0]}, which is stuff")
        return ClassMap(name, tuple(labels))

    @staticmethod
    def by_name(own: ClassTable, other: ClassTable) -> ClassMap:
        """The map of things to those of the same name; all other classes are left out.

        Raises:
            InputError: they have no name in common.
        """
        labels = {other.names[k]: k for k in other.things}
        found = tuple(labels.get(name) if own.is_thing[k] else None for k, name in enumerate(own.names))
        if all(label is None for label in found):
            raise InputError(
                f"{other.name} and the class set {own.name!r} of the weights have no class in common: "
                f"{_some(other.names)}, and {_some(own.names)}"
            )
        return ClassMap(own.name, found)

    def apply(self, result: VideoResult) -> VideoResult:
        """Translate a result to the benchmark's classes."""
        tracks = []
        for track in result.tracks:
            if track.label is None:
                tracks.append(track)
            elif (label := self.labels[track.label]) is not None:
                tracks.append(replace(track, label=label))
        table = np.array([label or 0 for label in self.labels], np.uint8)
        stuff = {frame: encode_labels(table[decode_labels(png)]) for frame, png in result.stuff.items()}
        return replace(result, tracks=tuple(tracks), stuff=stuff)


def known_classes(name: str, own_classes: Mapping[str, OwnClasses]) -> ClassTable:
    """The table of a class set of weights: one of its own, or the package's."""
    own = own_classes.get(name)
    return class_table(name) if own is None else named_classes(name, own.names, own.is_thing)


def write_class_map(path: Path, class_set: str, names: Mapping[str, str]) -> None:
    """Write what `ClassMap.read` reads."""
    write_json(path, {"class_set": class_set, "names": dict(names)})


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
