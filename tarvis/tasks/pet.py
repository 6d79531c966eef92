"""PET: objects given by a point are followed, as VOS follows masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from tarvis.data.targets import Batch
from tarvis.model import TarVis
from tarvis.structures import Features, InputError, Reference
from tarvis.tasks.task import Loss, Objective, Video
from tarvis.tasks.vos import ObjectSession, object_loss


class Pet:
    """Point exemplar-guided tracking."""

    name: ClassVar[str] = "pet"
    default_dataset: ClassVar[str] = "burst"
    finds_classes: ClassVar[bool] = False
    needs_stuff: ClassVar[bool] = False
    takes_points: ClassVar[bool] = True

    def targets(self, references: Sequence[Reference]) -> list[Reference]:
        return [r for r in references if r.point is not None]

    def start(self, video: Video) -> ObjectSession:
        given = self.targets(video.references)
        if not given:
            raise InputError("pet follows objects given by points: no point was given")
        return ObjectSession(self.name, video, given)

    def loss(self, model: TarVis, features: Features, batch: Batch, objective: Objective) -> Loss:
        return object_loss(model, features, batch, objective)
