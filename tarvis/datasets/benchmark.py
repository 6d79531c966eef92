"""What the rest of the code knows of a benchmark: its videos, its result files, its numbers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tarvis.datasets.classes import ClassTable
from tarvis.structures import RLE, InputError, Reference, Size, VideoResult

VOID = 255
"""Label of pixels that nobody labelled."""
WORKSPACE = "TARVIS_WORKSPACE_DIR"
"""Environment variable: a folder of data and runs in the published layout."""


@dataclass(frozen=True)
class Roots:
    """Where the files of a split lie. `annotations` and `truth` are files or folders, as the benchmark wants.

    `truth` is None where the split's truth is not public, or not there.
    """

    images: Path
    annotations: Path
    truth: Path | None = None


class FrameTruth(NamedTuple):
    """What is true of a frame.

    Objects are `masks` by track id where they may overlap, else a map of `ids` [H, W] uint16, 0 elsewhere;
    the other one is None. `semantic` [H, W] uint8 holds classes from 0, `VOID` where nothing is labelled;
    None where only objects are.
    """

    masks: dict[int, RLE] | None = None
    ids: NDArray[np.uint16] | None = None
    semantic: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Truth:
    """What is true of a video; masks are read frame by frame, when asked for.

    Args:
        labels: class of every track by its id, from 0; None where objects have no class.
        visible: ids of the tracks that each frame shows.
        read: a frame's index -> its labels. Raises InputError for files that cannot be used.
    """

    labels: dict[int, int | None]
    visible: tuple[tuple[int, ...], ...]
    read: Callable[[int], FrameTruth]


def no_references() -> list[Reference]:
    return []


@dataclass(frozen=True)
class VideoSample:
    """A video of a benchmark.

    Args:
        name: unique in its split, a relative path: on the command line and in folders of results.
        images: files of the frames that the network sees, in order of time.
        frame_names: for each of them, what result files call it.
        scored: indices of the frames that results are wanted of, rising; all by default.
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
    references: Callable[[], list[Reference]] = no_references
    truth: Truth | None = None
    entry: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.images) == len(self.frame_names), (self.name, len(self.images))
        if not self.scored:
            object.__setattr__(self, "scored", tuple(range(len(self.images))))


class Benchmark(Protocol):
    """One benchmark's files.

    A run writes its results video by video: `write` puts a video's pictures below the folder and returns its
    share of the benchmark's JSON file; `join` makes that file of all shares.
    """

    name: str
    """Also of its published settings, where it has them."""
    tasks: tuple[str, ...]
    """Tasks it can be run with, the usual one first."""
    splits: tuple[str, ...]
    """The usual one first."""
    headline: str
    """The number that it ranks by."""

    @property
    def classes(self) -> ClassTable | None:
        """Its classes; None where objects have none."""
        ...

    def find(self, root: Path, split: str) -> Roots:
        """Where the files lie below `root`: a workspace in the published layout, or the official download.

        Raises:
            InputError: not there; the message says what was looked for.
        """
        ...

    def read(self, roots: Roots, split: str) -> list[VideoSample]:
        """The videos of a split, in the order of its annotations.

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

    def evaluate(
        self, results: Path, truth: Path, split: str, videos: Collection[str] | None = None
    ) -> dict[str, float]:
        """The official numbers, of all videos of the truth or of those named.

        `results` and `truth` are files or folders, as the benchmark's scorer says; `truth` may be the folder
        of the official download.
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


@runtime_checkable
class Converter(Protocol):
    """A benchmark whose official download can be put into the files that training reads."""

    name: str

    def convert(self, download: Path, workspace: Path) -> list[Path]:
        """Write below `workspace`, in the published layout; returns the files made, each whole or not at all.

        Raises:
            InputError: something is missing or damaged.
        """
        ...


def first_that_exists(candidates: Iterable[Path], what: str) -> Path:
    """The first of the places that is there.

    Raises:
        InputError: none is; the message lists them.
    """
    places = list(candidates)
    for place in places:
        if place.exists():
            return place
    raise InputError(f"{what} not found; looked for {', '.join(map(str, places))}")


def expect_files(paths: Iterable[Path]) -> None:
    """Check that files are there.

    Raises:
        InputError: one is not.
    """
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: not found")
