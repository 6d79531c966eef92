"""VPS: every pixel gets a class, every pixel of a thing its track; nothing overlaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from tarvis.data.targets import Batch
from tarvis.files.rle import FrameLog
from tarvis.model import TarVis
from tarvis.stitch.panoptic import SemanticMaps, select_things
from tarvis.stitch.tracking import FrameMasks, InstanceTracker
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
from tarvis.tasks.losses import semantic_terms
from tarvis.tasks.task import Loss, Objective, Video
from tarvis.tasks.vis import add_instances, ask_classes, classes_of, instance_loss, with_semantics


class Vps:
    """Video panoptic segmentation."""

    name: ClassVar[str] = "vps"
    default_dataset: ClassVar[str] = "vipseg"
    finds_classes: ClassVar[bool] = True
    needs_stuff: ClassVar[bool] = True
    takes_points: ClassVar[bool] = False

    def targets(self, references: Sequence[Reference]) -> list[Reference]:
        del references  # by class
        return []

    def start(self, video: Video) -> VpsSession:
        return VpsSession(self.name, video)

    def loss(self, model: TarVis, features: Features, batch: Batch, objective: Objective) -> Loss:
        """Of the things as instances, and of all classes, things and stuff."""
        assert batch.semantic is not None, batch.set_name
        prediction = ask_classes(model, features, batch)
        instances = instance_loss(prediction, batch, objective)
        settings = objective.settings
        terms = semantic_terms(
            prediction,
            batch.semantic,
            objective.points(batch, settings.semantic_points),
            background=False,
            dice=settings.vps_dice > 0,
            regularize=settings.regularize,
            drop_absent=settings.drop_absent,
        )
        return with_semantics(instances, terms, {"ce": settings.vps_semantic, "dice": settings.vps_dice})


class VpsSession:
    """One video of VPS: instances as in VIS, and stuff labels from the semantic queries.

    Tracks and stuff stream out side by side; which tracks are shown is known at the video's end, and
    `tarvis.stitch.panoptic.fuse` then paints them over the stuff.
    """

    first_frame = 0

    def __init__(self, task: str, video: Video) -> None:
        self._task = task
        self._video = video
        self._classes = classes_of(task, video)
        if not self._classes.stuff:
            raise InputError(f"{task} needs a class set with stuff, and {self._classes.name} has things only")
        self._instances = InstanceTracker(video.geometry, video.settings)
        self._stuff = SemanticMaps(video.geometry, self._classes.stuff)
        self._frames = FrameLog()
        self._labels: dict[int, bytes] = {}

    def queries(self, model: Network, features: Features, frames: range) -> Queries | None:
        del features, frames
        return model.queries.classes(self._classes.name)

    def add(self, frames: range, prediction: Prediction | None) -> list[FrameResult]:
        assert prediction is not None
        tracks = add_instances(self._instances, self._video, frames, prediction)
        rows = torch.tensor(self._classes.stuff, device=prediction.mask_embedding.device)
        return self._keep(
            tracks, self._stuff.add(frames, prediction.mask_logits("semantic", rows)[0].float())
        )

    def finish(self, num_frames: int) -> tuple[list[FrameResult], VideoResult]:
        last = self._keep(self._instances.finish(), self._stuff.finish())
        ids, class_logits = self._instances.class_logits()
        threshold = self._video.settings.track_score_threshold
        tracks = select_things(self._frames, ids, class_logits, self._classes.things, threshold)
        return last, VideoResult(self._task, self._video.geometry.original, num_frames, tracks, self._labels)

    def _keep(self, tracks: list[FrameMasks], stuff: list[tuple[int, bytes]]) -> list[FrameResult]:
        for frame, masks in tracks:
            self._frames.append(frame, masks)
        self._labels.update(stuff)
        return [
            FrameResult(self._task, frame, masks, labels)
            for (frame, masks), (_, labels) in zip(tracks, stuff, strict=True)
        ]
