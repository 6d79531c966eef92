"""PET: objects given by a point are followed, as VOS follows masks."""

from __future__ import annotations

from typing import ClassVar

from tarvis.tasks.task import Video
from tarvis.tasks.vos import ObjectSession


class Pet:
    """Point exemplar-guided tracking."""

    name: ClassVar[str] = "pet"
    default_dataset: ClassVar[str] = "burst"
    finds_classes: ClassVar[bool] = False

    def start(self, video: Video) -> ObjectSession:
        given = [r for r in video.references if r.point is not None]
        if not given:
            raise ValueError("pet follows objects given by points: no point was given")
        return ObjectSession(self.name, video, given)
