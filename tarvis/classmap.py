"""Another class set than the benchmark's own: which of its classes is which of the benchmark's, by name.

A file such as

    {"class_set": "cityscapes_vps", "names": {"car": "car", "person": "person", "rider": "person"}}

lets weights that know one set of classes be evaluated on a benchmark with another. Things of the first that
no name is given for are left out; every stuff class needs one where the benchmark has stuff.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tarvis.datasets.classes import TABLES, class_table
from tarvis.datasets.records import read_json
from tarvis.files import write_json
from tarvis.panoptic import decode_labels, encode_labels
from tarvis.structures import VideoResult


@dataclass(frozen=True)
class ClassMap:
    """`labels[k]` is the benchmark's class (from 0) of the class set's class k, None where it has none."""

    class_set: str
    labels: tuple[int | None, ...]

    @staticmethod
    def read(path: Path, benchmark: str) -> ClassMap:
        """Read the file.

        Raises:
            InputError: a class set or class that does not exist, a thing that would become stuff or stuff a
                thing, or stuff without a name.
        """
        root = read_json(path)
        name = root["class_set"].text()
        if name not in TABLES:
            raise root["class_set"].expected(f"one of {', '.join(TABLES)}")
        own, other = class_table(name), class_table(benchmark)
        labels: list[int | None] = [None] * own.num_classes
        for key, entry in root["names"].items():
            if key not in own.names:
                raise root["names"].error(f"{name} has no class {key!r}")
            if entry.text() not in other.names:
                raise entry.expected(f"a class of {benchmark}")
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

    def apply(self, result: VideoResult) -> VideoResult:
        """The same result in the benchmark's classes."""
        tracks = []
        for track in result.tracks:
            if track.label is None:
                tracks.append(track)
            elif (label := self.labels[track.label]) is not None:
                tracks.append(replace(track, label=label))
        table = np.array([label or 0 for label in self.labels], np.uint8)
        stuff = {frame: encode_labels(table[decode_labels(png)]) for frame, png in result.stuff.items()}
        return replace(result, tracks=tuple(tracks), stuff=stuff)


def write_class_map(path: Path, class_set: str, names: Mapping[str, str]) -> None:
    """Write what `ClassMap.read` reads."""
    write_json(path, {"class_set": class_set, "names": dict(names)})
