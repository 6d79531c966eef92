"""VIS: every instance of the classes of interest, scored and linked through the video."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tarvis.data.batch import Batch
from tarvis.model import TarVis
from tarvis.stitch.tracking import FrameMasks, InstanceTracker, select_queries, select_results
from tarvis.structures import Features, FrameResult, InputError, Network, Prediction, Queries, Track
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
from tarvis.tasks.task import Loss, Objective, Session, Task, Video


class Vis(Task):
    """Video instance segmentation."""

    name = "vis"
    default_dataset = "youtube_vis_2021"
    finds_classes = True

    def start(self, video: Video) -> VisSession:
        return VisSession(self.name, video)

    def loss(self, model: TarVis, features: Features, batch: Batch, objective: Objective) -> Loss:
        """Loss of the instances and of the semantic queries, whose labels are the instances' classes."""
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


class ClassSession(Session):
    """One video of instances that are found by class; the parts that VIS and VPS share."""

    def __init__(self, task: str, video: Video) -> None:
        super().__init__(task, video)
        if video.classes is None:
            raise InputError(f"{task} finds targets by class: name a class set (a dataset)")
        self._classes = video.classes
        self._instances = InstanceTracker(video.geometry, video.settings)

    def queries(self, model: Network, features: Features, frames: range) -> Queries | None:
        del features, frames  # the same questions of every clip
        return model.queries.classes(self._classes.name)

    def _add_instances(self, frames: range, prediction: Prediction) -> list[FrameMasks]:
        """Score a clip's instance queries, and make and link the masks of those that are kept."""
        assert prediction.class_logits is not None
        settings, class_logits = self._video.settings, prediction.class_logits[0]  # [Q, 1 + K]
        kept = select_queries(class_logits, settings.score_threshold, settings.max_tracks_per_clip)
        masks = prediction.mask_logits("instance", kept)[0].float()  # [N, T, H/4, W/4]
        return self._instances.add(frames, masks, class_logits[kept])


class VisSession(ClassSession):
    """One video of VIS.

    Masks stream out under the tracker's ids; the video's result holds the best (track, class) pairs, which
    are known only at its end.
    """

    def add(self, frames: range, prediction: Prediction | None) -> list[FrameResult]:
        assert prediction is not None
        return self._keep(self._add_instances(frames, prediction))

    def _flush(self, num_frames: int) -> list[FrameResult]:
        del num_frames
        return self._keep(self._instances.finish())

    def _tracks(self) -> tuple[Track, ...]:
        ids, class_logits = self._instances.class_logits()
        return select_results(
            self._frames, ids, class_logits, self._video.settings.top_k, self._classes.things
        )


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
