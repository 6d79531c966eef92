"""What the rest of the code knows of a benchmark: its videos, settings, result files and numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tarvis.config import InferenceConfig
from tarvis.datasets.classes import ClassTable
from tarvis.files.folders import files, no_other_folders, same_names
from tarvis.files.pictures import image_size
from tarvis.structures import RLE, InputError, Reference, Size, VideoResult

WORKSPACE = "TARVIS_WORKSPACE_DIR"
"""Environment variable: a folder of data and runs in the published layout."""


@dataclass(frozen=True)
class Roots:
    """Where the files of a split lie; `annotations` and `truth` are files or folders, as the benchmark wants.

    `truth` is None where the split's truth is not public, or is missing.
    """

    images: Path
    annotations: Path
    truth: Path | None = None


class FrameTruth(NamedTuple):
    """The labels of a frame.

    Objects are given as `masks` by track id where they may overlap, else as a map of `ids` [H, W] uint16, 0
    for background; the other field is None. `semantic` [H, W] uint8 holds classes from 0, and
    `VOID` for pixels without a label; it is None where only objects are labelled.
    """

    masks: dict[int, RLE] | None = None
    ids: NDArray[np.uint16] | None = None
    semantic: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Truth:
    """The labels of a video; masks are read frame by frame, on demand.

    Args:
        labels: class of every track by its id, from 0; None where objects have no class.
        visible: ids of the tracks that each frame shows.
        read: a frame's index -> its labels. Raises InputError for files that cannot be used.
    """

    labels: dict[int, int | None]
    visible: tuple[tuple[int, ...], ...]
    read: Callable[[int], FrameTruth]


@dataclass(frozen=True)
class VideoSample:
    """A video of a benchmark.

    Args:
        name: unique in its split, a relative path; used on the command line and in folders of results.
        images: files of the frames that the network sees, in order of time.
        frame_names: the name of each of these frames in result files.
        scored: indices of the frames whose results are wanted, rising; all by default.
        size: (H, W) where the annotations say it.
        references: reads the objects that are given (VOS, PET); frames are indices of `images`.
        truth: for training; None where it is not known.
        entry: what else `write` needs to know, such as the id of the video in result files.
    """

    name: str
    images: tuple[Path, ...]
    frame_names: tuple[str, ...]
    scored: tuple[int, ...] = ()
    size: Size | None = None
    references: Callable[[], list[Reference]] = list
    truth: Truth | None = None
    entry: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.images) == len(self.frame_names), (self.name, len(self.images))
        if not self.scored:
            object.__setattr__(self, "scored", tuple(range(len(self.images))))


class Finder(Protocol):
    """A benchmark or an image set."""

    @property
    def name(self) -> str: ...
    def find(self, root: Path, split: str) -> Roots:
        """Where the files lie below `root`: a workspace in the published layout, or the official download.

        Raises:
            InputError: they are missing; the message lists the places that were tried.
        """
        ...


class Benchmark(Finder, Protocol):
    """One benchmark: its files, its settings, its numbers.

    A run writes its results video by video: `write` puts a video's pictures below the folder and returns its
    share of the benchmark's JSON file; `join` makes that file of all shares. `check` and `score` read results
    from these files alone, and parse them with the same code.
    """

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks it can be run with, the usual one first."""
        ...

    @property
    def splits(self) -> tuple[str, ...]:
        """The usual one first."""
        ...

    @property
    def headline(self) -> str:
        """The number that it ranks by."""
        ...

    @property
    def classes(self) -> ClassTable | None:
        """Its classes; None where objects have none."""
        ...

    @property
    def inference(self) -> InferenceConfig:
        """Published settings."""
        ...

    @property
    def training(self) -> Mapping[str, Any]:
        """Published settings: fields of `tarvis.data.settings.SetSettings` that differ from its defaults."""
        ...

    def read(self, roots: Roots, split: str) -> list[VideoSample]:
        """The videos of a split, in the order of its annotations, with their truth for training if public.

        Raises:
            InputError: a file is missing or damaged; the message names file and entry.
        """
        ...

    def write(self, result: VideoResult, video: VideoSample, folder: Path) -> Any:
        """Write a video's pictures below `folder`; returns its share of the JSON file, None without one.

        Classes of `result` are those of the benchmark's class table; frames are indices of `video.images`.
        The same input gives the same bytes, so a video that was interrupted can be written again.
        """
        ...

    def join(self, shares: Iterable[Any], videos: Sequence[VideoSample], split: str, folder: Path) -> None:
        """Write the benchmark's JSON file of the shares of all `videos`, in their order; one is in memory."""
        ...

    def score(
        self, results: Path, truth: Path, split: str, videos: Collection[str] | None = None
    ) -> dict[str, float]:
        """The official numbers, in the official evaluator's units, of all videos of the truth or those named.

        `results` and `truth` are files or folders, as the benchmark's module says; `truth` may be the folder
        of the official download.

        Raises:
            InputError: a file is missing or damaged; the message names file and entry.
        """
        ...

    def check(self, results: Path, videos: Sequence[VideoSample], split: str) -> dict[str, Path]:
        """Check results against what the server wants: names, lengths, ids, sizes, palettes.

        Returns:
            the files to submit, by their names in the archive.

        Raises:
            InputError: the first thing that is wrong.
        """
        ...


def expect_split(benchmark: str, splits: Collection[str], split: str) -> None:
    """Check that a benchmark has a split.

    Raises:
        InputError: it does not; the message lists those it has.
    """
    if split not in splits:
        raise InputError(f"{benchmark} has no split {split!r}; known: {', '.join(splits)}")


def find_below(benchmark: Finder, root: Path, split: str) -> Roots:
    """`find` in a folder, or in the one below it that has the benchmark's name.

    So several downloads may lie side by side: ROOT/davis, ROOT/vipseg, ...
    """
    try:
        return benchmark.find(root, split)
    except InputError:
        if not (root / benchmark.name).is_dir():
            raise
    return benchmark.find(root / benchmark.name, split)


def first_that_exists(candidates: Iterable[Path], what: str) -> Path:
    """The first of the places that exists.

    Raises:
        InputError: all are missing; the message lists them.
    """
    places = list(candidates)
    for place in places:
        if place.exists():
            return place
    folder = os.path.commonpath([place.parent for place in places])
    names = ", ".join(os.path.relpath(place, folder) for place in places)
    raise InputError(f"{what} not found; looked for {names} in {folder}")


def shown_ids(ids: NDArray[np.unsignedinteger]) -> tuple[int, ...]:
    """The ids of a map that have a pixel, rising, without the background's 0."""
    return tuple(id_ for id_ in np.flatnonzero(np.bincount(ids.ravel())).tolist() if id_)


def size_of(video: VideoSample) -> Size:
    """Size of a video, read from its first image where the annotations do not say it."""
    return video.size or image_size(video.images[0])


def checked_pictures(
    results: Path, videos: Sequence[VideoSample]
) -> Iterator[tuple[VideoSample, list[Path]]]:
    """Each video with its pictures, which are <video>/<frame>.png: one a scored frame, and no others.

    Raises:
        InputError: a picture is missing, or belongs to no frame that is scored.
    """
    for video in videos:
        names, folder = [f"{video.frame_names[frame]}.png" for frame in video.scored], results / video.name
        same_names(folder, names, files(folder, ".png"))
        yield video, [folder / name for name in names]
    no_other_folders(results, [video.name for video in videos])
