"""Training sets by name: benchmarks, image sets, generated videos, and own data by its path.

sets = open_sets(config.data)
sets[0].clips, sets[0].classes
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tarvis.data import moving
from tarvis.data.clips import VideoClips
from tarvis.data.images import ImageClips, LabelledImage
from tarvis.data.mixture import ClipSet
from tarvis.data.settings import DataSettings, SetSettings
from tarvis.data.synthetic import DEFAULTS, NAME, synthetic_clips
from tarvis.datasets.benchmark import WORKSPACE, VideoSample, find_below
from tarvis.datasets.classes import ClassTable, class_table
from tarvis.datasets.image_sets import IMAGE_SETS
from tarvis.datasets.own import read_own
from tarvis.datasets.registry import BENCHMARKS
from tarvis.structures import InputError
from tarvis.tasks import TASKS, TRAINED

KNOWN = (*BENCHMARKS, *IMAGE_SETS, NAME, moving.NAME)
"""Sets that have a name; others are own data."""


@dataclass(frozen=True)
class TrainingSet:
    """A set of a run. Its name is that of its class set.

    Args:
        clips: what training draws.
        classes: None where it trains on given objects alone.
        items: the videos or images that clips are made of, where they are in files.
        left_out: further videos or images, which show no object.
    """

    clips: ClipSet
    classes: ClassTable | None
    items: Sequence[VideoSample] | Sequence[LabelledImage] = ()
    left_out: int = 0

    @property
    def name(self) -> str:
        return self.clips.name


def open_sets(data: DataSettings) -> list[TrainingSet]:
    """The sets of a run, in the order of `data.train`.

    Raises:
        InputError: no set is named, or one is missing or damaged; the message says where.
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
    """One set, by its name or the path of own data: its annotations are read, no image is.

    Raises:
        InputError: it is unknown, missing, damaged, or has nothing to learn from.
    """
    if name == NAME:
        settings = data.of_set(name, DEFAULTS)
        clips = synthetic_clips(
            data.synthetic, settings, clip_length=data.clip_length, max_objects=data.max_objects
        )
        return TrainingSet(clips, class_table(NAME))
    if name == moving.NAME:
        return TrainingSet(_moving_clips(data), None)
    if name in IMAGE_SETS:
        images = IMAGE_SETS[name]
        settings = _settings(data, name, SetSettings(**images.training), TRAINED)
        every = images.read(find_below(images, _root(data, name), data.split), with_things=False)
        found = [image for image in every if image.num_things]
        left_out = len(every) - len(found)
        return _made(name, class_table(name), settings, data, images=found, left_out=left_out)
    if name in BENCHMARKS:
        return _of_benchmark(name, data)
    if not Path(name).exists():
        where = "" if Path(name).is_absolute() else f"; looked in {Path.cwd()}"
        raise InputError(
            f"training set {name!r} is neither a file or folder nor known; known: {', '.join(KNOWN)}{where}"
        )
    own = read_own(Path(name))
    if own.name in KNOWN:
        raise InputError(f"{name}: {own.name} is the name of a known set; call the file otherwise")
    settings = _settings(data, own.name, SetSettings(own.tasks), own.tasks)
    return _made(
        own.name,
        own.classes,
        settings,
        data,
        videos=own.videos,
        images=own.images,
        left_out=own.left_out,
    )


def _of_benchmark(name: str, data: DataSettings) -> TrainingSet:
    benchmark = BENCHMARKS[name]
    classes = benchmark.classes
    possible = tuple(
        task
        for task in TRAINED
        if not TASKS[task].finds_classes
        or (classes is not None and (classes.stuff or not TASKS[task].needs_stuff))
    )
    settings = _settings(data, name, SetSettings(**benchmark.training), possible)
    videos = benchmark.read(find_below(benchmark, _root(data, name), data.split), data.split)
    return _made(benchmark.name, classes, settings, data, videos=videos)


def _made(
    name: str,
    classes: ClassTable | None,
    settings: SetSettings,
    data: DataSettings,
    *,
    videos: Sequence[VideoSample] = (),
    images: Sequence[LabelledImage] = (),
    left_out: int = 0,
) -> TrainingSet:
    clips: ClipSet
    if images:
        most = data.max_image_objects
        clips = ImageClips(name, images, settings, clip_length=data.clip_length, max_objects=most)
    else:
        most = data.max_objects
        clips = VideoClips(name, videos, settings, clip_length=data.clip_length, max_objects=most)
    has_classes = any(TASKS[task].finds_classes for task in settings.tasks)
    return TrainingSet(clips, classes if has_classes else None, images or videos, left_out)


def _moving_clips(data: DataSettings) -> moving.MovingClips:
    """Clips of the photographs that `data.moving` names."""
    made, root = data.moving, Path(data.root or ".")

    def photographs(path: str) -> list[LabelledImage]:
        images = [*read_own(root / path).images]
        every = made.held_out
        return [image for k, image in enumerate(images) if not every or (k % every == 0) == made.validate]

    objects = [photographs(path) for path in made.objects]
    scenes = [image for path in made.scenes for image in photographs(path)]
    if not made.scenes:
        scenes = [image for images in objects for image in images]
    return moving.MovingClips(objects, scenes, made, max_objects=data.max_objects)


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
