"""What makes a task a task. Everything else asks these objects and never the task's name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from tarvis.config import InferenceConfig, LossConfig
from tarvis.data.targets import Batch
from tarvis.datasets.classes import ClassTable
from tarvis.model import TarVis
from tarvis.structures import (
    Features,
    FrameResult,
    Geometry,
    Network,
    Prediction,
    Queries,
    Reference,
    VideoResult,
)
from tarvis.tasks.losses import PointSampler, Terms, Uniform


@dataclass(frozen=True)
class Video:
    """What a task is told of the video it starts on.

    `classes` names the targets of tasks that find them, `references` are the targets of tasks that are given
    them; a task takes what it needs and says what is missing.
    """

    geometry: Geometry
    settings: InferenceConfig
    classes: ClassTable | None = None
    references: Sequence[Reference] = ()


class Session(Protocol):
    """One task on one video: makes the queries of each clip, joins the clips' predictions.

    Every frame comes out exactly once, in order, from `add` or `finish`.
    """

    first_frame: int
    """Where the clips begin: nothing is asked before the first reference."""

    def queries(self, model: Network, features: Features, frames: range) -> Queries | None:
        """What to ask of the next clip, B = 1; None if there is nothing to look for."""

    def add(self, frames: range, prediction: Prediction | None) -> list[FrameResult]:
        """Take in the answer (None if nothing was asked); returns the frames no later clip can change."""

    def finish(self, num_frames: int) -> tuple[list[FrameResult], VideoResult]:
        """The remaining frames and the whole video, which had `num_frames` frames."""


@dataclass(frozen=True)
class Objective:
    """How losses are computed: what is set, where points come from, and the number of targets of a batch as
    the mean over all batches of the optimiser step.
    """

    settings: LossConfig
    uniform: Uniform
    num_targets: Tensor

    def points(self, batch: Batch, count: int | None = None) -> PointSampler:
        """Points inside the frames of a batch, not in their padding."""
        return PointSampler(count or self.settings.points, self.uniform, batch.extent)


class Loss(NamedTuple):
    """What is minimised; its `terms` [outputs], not weighted; False in `is_matched` where a matching failed
    because a value was not finite.
    """

    total: Tensor
    terms: Terms
    is_matched: bool = True


class Task(Protocol):
    """A kind of target."""

    name: ClassVar[str]
    default_dataset: ClassVar[str]
    """Whose published settings and classes are used where the user names none."""
    finds_classes: ClassVar[bool]
    """Whether targets are found by class (else they are given by references)."""
    needs_stuff: ClassVar[bool]
    """Whether the classes must include stuff."""
    takes_points: ClassVar[bool]
    """Whether objects may be given by points."""

    def targets(self, references: Sequence[Reference]) -> list[Reference]:
        """Those of a video's references that this task follows; none if it finds targets by class."""

    def start(self, video: Video) -> Session:
        """Begin a video.

        Raises:
            InputError: classes or references that the task needs are missing or do not fit.
        """

    def loss(self, model: TarVis, features: Features, batch: Batch, objective: Objective) -> Loss:
        """Ask the clips of a batch of this task, in training, and compare with what is true."""
