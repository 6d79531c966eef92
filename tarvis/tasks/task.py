"""What a task is: other code asks these objects and never branches on a task's name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from tarvis.config import InferenceConfig, LossConfig
from tarvis.data.batch import Batch
from tarvis.datasets.classes import ClassTable
from tarvis.files.rle import FrameLog
from tarvis.model import TarVis
from tarvis.stitch.tracking import FrameMasks
from tarvis.structures import (
    Features,
    FrameResult,
    Geometry,
    Network,
    Prediction,
    Queries,
    Reference,
    Track,
    VideoResult,
)
from tarvis.tasks.losses import PointSampler, Terms, Uniform


@dataclass(frozen=True)
class Video:
    """The video that a task starts on.

    `classes` names the targets of tasks that find them, `references` are the targets of tasks that are given
    them; a task takes what it needs and says what is missing.
    """

    geometry: Geometry
    settings: InferenceConfig
    classes: ClassTable | None = None
    references: Sequence[Reference] = ()


class Session(ABC):
    """One task on one video: makes the queries of each clip, joins the clips' predictions.

    Every frame comes out exactly once, in order, from `add` or `finish`.
    """

    first_frame = 0
    """Where the clips begin: nothing is asked before the first reference."""
    is_cut = False
    """Whether the video was cut before its end: an object that is given later is then missing, not wrong."""

    def __init__(self, task: str, video: Video) -> None:
        self._task = task
        self._video = video
        self._frames = FrameLog()
        self._stuff: dict[int, bytes] = {}

    @abstractmethod
    def queries(self, model: Network, features: Features, frames: range) -> Queries | None:
        """What to ask of the next clip, B = 1; None if there is nothing to look for."""

    @abstractmethod
    def add(self, frames: range, prediction: Prediction | None) -> list[FrameResult]:
        """Take in the answer (None if nothing was asked); returns the frames no later clip can change."""

    def finish(self, num_frames: int) -> tuple[list[FrameResult], VideoResult]:
        """The remaining frames and the whole video, which had `num_frames` frames."""
        last = self._flush(num_frames)
        size = self._video.geometry.original
        return last, VideoResult(self._task, size, num_frames, self._tracks(), self._stuff)

    @abstractmethod
    def _flush(self, num_frames: int) -> list[FrameResult]:
        """The frames that `add` has held back."""

    @abstractmethod
    def _tracks(self) -> tuple[Track, ...]:
        """The objects of the video, whose frames are all in `_frames`."""

    def _keep(
        self, finished: Sequence[FrameMasks], stuff: Sequence[tuple[int, bytes]] = ()
    ) -> list[FrameResult]:
        """Remember finished frames for the end of the video, and pass them on."""
        for frame, masks in finished:
            self._frames.append(frame, masks)
        self._stuff.update(stuff)
        return [FrameResult(self._task, frame, masks, self._stuff.get(frame)) for frame, masks in finished]


@dataclass(frozen=True)
class Objective:
    """Inputs shared by all losses: settings, the source of points, and the mean number of targets of a batch,
    over all batches of the optimiser step.
    """

    settings: LossConfig
    uniform: Uniform
    num_targets: Tensor

    def points(self, batch: Batch, count: int | None = None) -> PointSampler:
        """Points inside the frames of a batch, not in their padding."""
        return PointSampler(count or self.settings.points, self.uniform, batch.extent)


class Loss(NamedTuple):
    """The total loss, its unweighted `terms` [outputs], and `is_matched`: False where matching met a value
    that is not finite.
    """

    total: Tensor
    terms: Terms
    is_matched: bool = True


class Task(ABC):
    """A kind of target."""

    name: str
    default_dataset: str
    """The dataset whose settings and classes are used where the user names none."""
    finds_classes: bool
    """Whether targets are found by class, in all frames; else references give them. A training clip then
    has objects of its first frame, and all clips of a batch have equally many.
    """
    needs_stuff: bool = False
    """Whether the classes must include stuff, and training clips label all pixels."""
    takes_points: bool = False
    """Whether objects may be given by points."""
    trained_by: str | None = None
    """The task whose clips train this one; None for its own."""

    def targets(self, references: Sequence[Reference]) -> list[Reference]:
        """Those of a video's references that this task follows; none if it finds targets by class."""
        del references
        return []

    @abstractmethod
    def start(self, video: Video) -> Session:
        """Begin a video.

        Raises:
            InputError: classes or references that the task needs are missing or do not fit.
        """

    @abstractmethod
    def loss(self, model: TarVis, features: Features, batch: Batch, objective: Objective) -> Loss:
        """Query the clips of a batch of this task, in training, and compare the answer with the truth."""
