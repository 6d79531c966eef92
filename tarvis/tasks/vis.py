"""VIS: every instance of the classes of interest, scored and linked through the video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from tarvis.data.targets import Batch
from tarvis.datasets.classes import ClassTable
from tarvis.files.rle import FrameLog
from tarvis.model import TarVis
from tarvis.stitch.tracking import FrameMasks, InstanceTracker, select_queries, select_results
from tarvis.structures import (
    Features,
    FrameResult,
    InputError,
    Network,
    Prediction,
    Queries,
    Reference,
    VideoResult,
)
from tarvis.tasks.losses import (
    INSTANCE_WEIGHTS,
    REGULARIZATION,
    Terms,
    instance_terms,
    semantic_labels,
    semantic_terms,
    total,
)
from tarvis.tasks.matching import match
from tarvis.tasks.task import Loss, Objective, Video


class Vis:
    """Video instance segmentation."""

    name: ClassVar[str] = "vis"
    default_dataset: ClassVar[str] = "youtube_vis_2021"
    finds_classes: ClassVar[bool] = True
    needs_stuff: ClassVar[bool] = False
    takes_points: ClassVar[bool] = False

    def targets(self, references: Sequence[Reference]) -> list[Reference]:
        del references  # by class
        return []

    def start(self, video: Video) -> VisSession:
        return VisSession(self.name, video)

    def loss(self, model: TarVis, features: Features, batch: Batch, objective: Objective) -> Loss:
        """Of the instances and, painted by their classes, of the semantic queries."""
        prediction = ask_classes(model, features, batch)
        instances = instance_loss(prediction, batch, objective)
        painted = map(semantic_labels, batch.masks(), batch.labels_by_clip())
        settings = objective.settings
        terms = semantic_terms(
            prediction,
            torch.stack(list(painted)),
            objective.points(batch),
            background=True,
            regularize=settings.regularize,
            drop_absent=settings.drop_absent,
        )
        return with_semantics(instances, terms, {"ce": settings.vis_semantic})


class VisSession:
    """One video of VIS.

    Masks stream out under the tracker's ids; the video's result holds the best (track, class) pairs, which
    are known only at its end.
    """

    first_frame = 0

    def __init__(self, task: str, video: Video) -> None:
        self._task = task
        self._video = video
        self._classes = classes_of(task, video)
        self._instances = InstanceTracker(video.geometry, video.settings)
        self._frames = FrameLog()

    def queries(self, model: Network, features: Features, frames: range) -> Queries | None:
        del features, frames  # the same questions of every clip
        return model.queries.classes(self._classes.name)

    def add(self, frames: range, prediction: Prediction | None) -> list[FrameResult]:
        assert prediction is not None
        return self._keep(add_instances(self._instances, self._video, frames, prediction))

    def finish(self, num_frames: int) -> tuple[list[FrameResult], VideoResult]:
        last = self._keep(self._instances.finish())
        ids, class_logits = self._instances.class_logits()
        top_k, things = self._video.settings.top_k, self._classes.things
        tracks = select_results(self._frames, ids, class_logits, top_k, things)
        return last, VideoResult(self._task, self._video.geometry.original, num_frames, tracks)

    def _keep(self, finished: list[FrameMasks]) -> list[FrameResult]:
        for frame, masks in finished:
            self._frames.append(frame, masks)
        return [FrameResult(self._task, frame, masks) for frame, masks in finished]


def classes_of(task: str, video: Video) -> ClassTable:
    if video.classes is None:
        raise InputError(f"{task} finds targets by class: name a class set (a dataset)")
    return video.classes


def ask_classes(model: TarVis, features: Features, batch: Batch) -> Prediction:
    queries = model.queries.classes(batch.set_name, len(batch.counts))
    return model.decode(features, queries, all_layers=True)


def instance_loss(prediction: Prediction, batch: Batch, objective: Objective) -> Loss:
    """Match instance queries to the objects of a batch; their classes and masks."""
    masks, labels, points = batch.masks(), batch.labels_by_clip(), objective.points(batch)
    clips = torch.arange(len(masks), device=batch.extent.device)
    matches = match(prediction, masks, labels, points.draw(clips, points.count))
    terms = instance_terms(
        prediction, masks, labels, matches.pairs, points, num_targets=objective.num_targets
    )
    return Loss(total(terms, INSTANCE_WEIGHTS), terms, matches.is_finite)


def with_semantics(instances: Loss, terms: Terms, weights: Mapping[str, float]) -> Loss:
    """The loss of instances and of classes together; terms of classes are called semantic_ce, ..."""
    semantic = total(terms, {"reg": REGULARIZATION, **weights})
    named = {f"semantic_{name}": values for name, values in terms.items()}
    return Loss(instances.total + semantic, instances.terms | named, instances.is_matched)


def add_instances(
    tracker: InstanceTracker, video: Video, frames: range, prediction: Prediction
) -> list[FrameMasks]:
    """Score a clip's instance queries, and make and link the masks of those that are kept."""
    assert prediction.class_logits is not None
    class_logits = prediction.class_logits[0]  # [Q, 1 + K]
    kept = select_queries(class_logits, video.settings.score_threshold, video.settings.max_tracks_per_clip)
    masks = prediction.mask_logits("instance", kept)[0].float()  # [N, T, H/4, W/4]
    return tracker.add(frames, masks, class_logits[kept])
