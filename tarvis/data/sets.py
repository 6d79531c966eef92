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
from tarvis.data.mixture import ClipSet
from tarvis.data.pseudo_clips import LabelledImage, PseudoClips
from tarvis.data.settings import PUBLISHED, TASKS, WANTS, DataSettings, SetSettings
from tarvis.data.synthetic_set import DEFAULTS, NAME, synthetic_clips
from tarvis.datasets.benchmark import WORKSPACE, VideoSample
from tarvis.datasets.benchmarks import BENCHMARKS, CONVERTERS
from tarvis.datasets.classes import TABLES, ClassTable, class_table
from tarvis.datasets.own import read_own
from tarvis.datasets.panoptic_images import IMAGE_SETS
from tarvis.structures import InputError

KNOWN = (*BENCHMARKS, *IMAGE_SETS, NAME, moving.NAME)
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
    if name == moving.NAME:
        return TrainingSet(_moving_clips(data), None)
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


def open_source(name: str, data: DataSettings) -> Source:
    """Find and read the annotations of a set.

    Raises:
        InputError: it is unknown, not there, or damaged.
    """
    if name in IMAGE_SETS:
        images = IMAGE_SETS[name]
        settings = _settings(data, name, PUBLISHED[name], TASKS)
        every = images.read(images.find(_root(data, name), data.split), with_things=False)
        found = [image for image in every if image.num_things]
        return Source(name, class_table(name), settings, images=found, left_out=len(every) - len(found))
    if name in BENCHMARKS:
        benchmark = BENCHMARKS[name]
        classes = class_table(benchmark.name) if benchmark.name in TABLES else None
        possible = tuple(
            task
            for task, wants in WANTS.items()
            if wants.given or (classes is not None and (classes.stuff or not wants.stuff))
        )
        settings = _settings(data, name, PUBLISHED[benchmark.name], possible)
        root = _root(data, name)
        if data.split == "train":
            _refuse_pack(root, benchmark.name)
        videos = benchmark.read(benchmark.find(root, data.split), data.split)
        if name in CONVERTERS and any(video.truth is None for video in videos):
            raise InputError(
                f"{name} {data.split} comes without masks to train with; "
                f"python -m tarvis.datasets.convert {name} makes them of the official download"
            )
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


def _refuse_pack(root: Path, name: str) -> None:
    """Packed folders of images, which the published code also reads, have to be unpacked."""
    folder = root / "dataset_images/training" / name
    pack = folder.with_name(f"{name}.fpack")
    if pack.is_file() and not folder.exists():
        raise InputError(f"{pack} is not read as it is: python -m tarvis.data.unpack {pack}")


def _root(data: DataSettings, name: str) -> Path:
    root = data.root or os.environ.get(WORKSPACE)
    if root is None:
        raise InputError(f"where is {name}? Set data.root, or {WORKSPACE}")
    if not Path(root).is_dir():
        raise InputError(f"{root}: no such folder")
    return Path(root)
