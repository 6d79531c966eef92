"""Training sets by name: benchmarks, image sets, generated videos, and own data by its path.

sets = open_sets(config.data)
sets[0].clips, sets[0].classes
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tarvis.data.clips import VideoClips
from tarvis.data.mixture import ClipSet
from tarvis.data.pseudo_clips import LabelledImage, PseudoClips
from tarvis.data.settings import TASKS, WANTS, DataSettings, SetSettings
from tarvis.data.synthetic_set import DEFAULTS, NAME, synthetic_clips
from tarvis.datasets.benchmark import WORKSPACE, VideoSample, find_below
from tarvis.datasets.benchmarks import BENCHMARKS
from tarvis.datasets.classes import ClassTable, class_table
from tarvis.datasets.image_sets import IMAGE_SETS
from tarvis.datasets.own import read_own
from tarvis.structures import InputError

KNOWN = (*BENCHMARKS, *IMAGE_SETS, NAME)
"""Sets that have a name; others are own data."""


@dataclass(frozen=True)
class Source:
    """What a set is made of: videos or images, and its classes where its objects have some."""

    name: str
    classes: ClassTable | None
    settings: SetSettings
    videos: Sequence[VideoSample] = ()
    images: Sequence[LabelledImage] = ()
    left_out: int = 0  # more videos or images, which show no object


@dataclass(frozen=True)
class TrainingSet:
    """A set and its classes; None where it trains vos alone. Its name is that of its class set."""

    clips: ClipSet
    classes: ClassTable | None

    @property
    def name(self) -> str:
        return self.clips.name


def open_sets(data: DataSettings) -> list[TrainingSet]:
    """The sets of a run, in the order of `data.train`.

    Raises:
        InputError: none is named, one is not there, or is damaged; the message says where.
    """
    if not data.train:
        raise InputError("nothing to train on: set data.train to names of sets, or to files of own data")
    sets = [open_set(name, data) for name in data.train]
    names = [each.name for each in sets]
    if twice := next((name for k, name in enumerate(names) if name in names[:k]), None):
        raise InputError(f"data.train has two sets that are called {twice}, as their files: rename one")
    if unused := sorted(data.sets.keys() - set(names)):
        raise InputError(f"data.sets changes {unused[0]}, which is not trained on: {', '.join(names)}")
    return sets


def open_set(name: str, data: DataSettings) -> TrainingSet:
    """One set, by its name or the path of own data."""
    length = data.clip_length
    if name == NAME:
        settings = data.of_set(name, DEFAULTS)
        clips = synthetic_clips(data.synthetic, settings, clip_length=length, max_objects=data.max_objects)
        return TrainingSet(clips, class_table(NAME))
    source = open_source(name, data)
    has_classes = not all(WANTS[task].given for task in source.settings.tasks)
    if source.images:
        made: ClipSet = PseudoClips(
            source.name,
            source.images,
            source.settings,
            clip_length=length,
            max_objects=data.max_image_objects,
        )
    else:
        made = VideoClips(
            source.name, source.videos, source.settings, clip_length=length, max_objects=data.max_objects
        )
    return TrainingSet(made, source.classes if has_classes else None)


def open_source(name: str, data: DataSettings) -> Source:
    """Find and read the annotations of a set.

    Raises:
        InputError: it is unknown, not there, or damaged.
    """
    if name in IMAGE_SETS:
        images = IMAGE_SETS[name]
        settings = _settings(data, name, SetSettings(**images.training), TASKS)
        every = images.read(find_below(images, _root(data, name), data.split), with_things=False)
        found = [image for image in every if image.num_things]
        return Source(name, class_table(name), settings, images=found, left_out=len(every) - len(found))
    if name in BENCHMARKS:
        benchmark = BENCHMARKS[name]
        classes = benchmark.classes
        possible = tuple(
            task
            for task, wants in WANTS.items()
            if wants.given or (classes is not None and (classes.stuff or not wants.stuff))
        )
        settings = _settings(data, name, SetSettings(**benchmark.training), possible)
        videos = benchmark.read(find_below(benchmark, _root(data, name), data.split), data.split)
        return Source(benchmark.name, classes, settings, videos=videos)
    if Path(name).exists():
        own = read_own(Path(name))
        if own.name in KNOWN:
            raise InputError(f"{name}: {own.name} is the name of a known set; call the file otherwise")
        settings = _settings(data, own.name, SetSettings(own.tasks), own.tasks)
        return Source(own.name, own.classes, settings, own.videos, own.images, own.left_out)
    known = ", ".join(KNOWN)
    where = "" if Path(name).is_absolute() else f"; looked in {Path.cwd()}"
    raise InputError(f"training set {name!r} is neither a file or folder nor known; known: {known}{where}")


def _settings(data: DataSettings, name: str, default: SetSettings, possible: tuple[str, ...]) -> SetSettings:
    settings = data.of_set(name, default)
    if unable := [task for task in settings.tasks if task not in possible]:
        raise InputError(f"{name} cannot train {unable[0]}; it can: {', '.join(possible)}")
    return settings


def _root(data: DataSettings, name: str) -> Path:
    root = data.root or os.environ.get(WORKSPACE)
    if root is None:
        raise InputError(f"where is {name}? Set data.root, or {WORKSPACE}")
    if not Path(root).is_dir():
        raise InputError(f"{root}: no such folder")
    return Path(root)
