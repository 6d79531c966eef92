"""VPS: every pixel gets a class, every pixel of a thing its track; nothing overlaps."""

from __future__ import annotations

import torch

from tarvis.data.batch import Batch
from tarvis.model import TarVis
from tarvis.stitch.panoptic import SemanticMaps, select_things
from tarvis.structures import Features, FrameResult, InputError, Prediction, Track
from tarvis.tasks.losses import semantic_terms
from tarvis.tasks.task import Loss, Objective, Task, Video
from tarvis.tasks.vis import ClassSession, ask_classes, instance_loss, with_semantics


class Vps(Task):
    """Video panoptic segmentation."""

    name = "vps"
    default_dataset = "vipseg"
    finds_classes = True
    needs_stuff = True

    def start(self, video: Video) -> VpsSession:
        return VpsSession(self.name, video)

    def loss(self, model: TarVis, features: Features, batch: Batch, objective: Objective) -> Loss:
        """Loss of the things as instances, and of all classes, things and stuff."""
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


class VpsSession(ClassSession):
    """One video of VPS: instances as in VIS, and stuff labels from the semantic queries.

    Tracks and stuff stream out side by side; which tracks are shown is known at the video's end, and
    `tarvis.stitch.panoptic.paint_over` then paints them over the stuff.
    """

    def __init__(self, task: str, video: Video) -> None:
        super().__init__(task, video)
        if not self._classes.stuff:
            raise InputError(f"{task} needs a class set with stuff, and {self._classes.name} has things only")
        self._semantic = SemanticMaps(video.geometry, self._classes.stuff)

    def add(self, frames: range, prediction: Prediction | None) -> list[FrameResult]:
        assert prediction is not None
        tracks = self._add_instances(frames, prediction)
        rows = torch.tensor(self._classes.stuff, device=prediction.mask_embedding.device)
        logits = prediction.mask_logits("semantic", rows)[0].float()
        return self._keep(tracks, self._semantic.add(frames, logits))

    def _flush(self, num_frames: int) -> list[FrameResult]:
        del num_frames
        return self._keep(self._instances.finish(), self._semantic.finish())

    def _tracks(self) -> tuple[Track, ...]:
        ids, class_logits = self._instances.class_logits()
        threshold = self._video.settings.track_score_threshold
        return select_things(self._frames, ids, class_logits, self._classes.things, threshold)
