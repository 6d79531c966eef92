"""VOS and PET: objects given by a mask or a point are followed, each by the queries that ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tarvis.data.batch import Batch
from tarvis.model import TarVis
from tarvis.stitch.propagation import ClipReferences, ObjectPropagation, check_reference, hide_before_given
from tarvis.structures import (
    RLE,
    Features,
    FrameResult,
    Geometry,
    InputError,
    Network,
    Prediction,
    Queries,
    Reference,
    Track,
)
from tarvis.tasks.losses import OBJECT_WEIGHTS, object_terms, total
from tarvis.tasks.task import Loss, Objective, Session, Task, Video


class ObjectTask(Task):
    """Video object segmentation from first-frame masks (VOS), or point exemplar-guided tracking (PET).

    Args:
        given_by: the attribute of a `Reference` that gives the objects of this task; None for either.
        trained_by: the task whose clips train this one, if not its own: a clip of VOS gives each object by
            its mask or by a point.
    """

    finds_classes = False

    def __init__(
        self,
        name: str,
        default_dataset: str,
        given_by: Literal["mask", "point"] | None,
        trained_by: str | None = None,
    ) -> None:
        self.name = name
        self.default_dataset = default_dataset
        self.takes_points = given_by != "mask"
        self._given_by = given_by
        self.trained_by = trained_by

    def targets(self, references: Sequence[Reference]) -> list[Reference]:
        if self._given_by is None:
            return list(references)
        return [r for r in references if getattr(r, self._given_by) is not None]

    def start(self, video: Video) -> ObjectSession:
        given = self.targets(video.references)
        if not given:
            by = self._given_by or "mask"
            raise InputError(f"{self.name} follows objects given by {by}s: no {by} was given")
        return ObjectSession(self.name, video, given)

    def loss(self, model: TarVis, features: Features, batch: Batch, objective: Objective) -> Loss:
        """Loss of the objects given in frame 0, the last ones of a clip by a point, and of the background."""
        masks = batch.masks()
        encoder, num_points = model.object_encoder, batch.num_points
        by_mask = batch.counts[0] - num_points
        queries = []
        for b, of_clip in enumerate(masks):
            at = None
            if num_points:
                first = torch.zeros(num_points, dtype=torch.int64, device=of_clip.device)
                at = encoder.look_up(features, first, batch.points[b], b)
            queries.append(encoder(features.mask_features[b, :1], of_clip[:by_mask, :1], at))
        background, objects = (torch.stack(parts) for parts in zip(*queries, strict=True))
        prediction = model.decode(features, model.queries.objects(background, objects), all_layers=True)
        counts = [encoder.num_parts] * by_mask + [1] * num_points
        terms = object_terms(prediction, torch.stack(masks), counts, objective.points(batch))
        return Loss(total(terms, OBJECT_WEIGHTS), terms)


class ObjectSession(Session):
    """One video of given objects (VOS and PET: only what the references hold differs)."""

    def __init__(self, task: str, video: Video, references: list[Reference]) -> None:
        super().__init__(task, video)
        for reference in references:
            check_reference(reference, video.geometry.original)
        self._given = references
        self.first_frame = min(reference.frame for reference in references)
        self._objects = ObjectPropagation(video.geometry, video.settings)
        self._now: ClipReferences | None = None

    def queries(self, model: Network, features: Features, frames: range) -> Queries | None:
        self._now = self._objects.references(frames, self._given)
        if not self._now.ids:
            return None
        return object_queries(model, features, self._now, frames, self._video.geometry)

    def add(self, frames: range, prediction: Prediction | None) -> list[FrameResult]:
        assert self._now is not None
        if prediction is None:
            return self._keep(self._objects.skip(frames))
        logits = best_of_object(prediction.mask_logits("vos")[0].float(), self._now)
        logits = hide_before_given(logits, self._now.ids, self._now.first_frame)
        return self._keep(self._objects.add(frames, self._now.ids, logits))

    def _flush(self, num_frames: int) -> list[FrameResult]:
        late = [r for r in self._given if r.frame >= num_frames]
        if late and not self.is_cut:
            raise InputError(
                f"object {late[0].id} is given at frame {late[0].frame}, "
                f"but the video has {num_frames} frames (0 to {num_frames - 1})"
            )
        return self._keep(self._objects.finish(num_frames))

    def _tracks(self) -> tuple[Track, ...]:
        masks: dict[int, dict[int, RLE]] = {r.id: {} for r in self._given}
        for frame, found in self._frames:
            for i, mask in found.items():
                masks[i][frame] = mask
        return tuple(Track(i, found) for i, found in masks.items())


def object_queries(
    model: Network, features: Features, references: ClipReferences, frames: range, geometry: Geometry
) -> Queries:
    """Queries of a clip's objects, encoded from what the clip shows of them."""
    mask_features = features.mask_features[0]  # [T, C, H/4, W/4]
    device = mask_features.device
    shown = torch.tensor([frame - frames.start for frame in references.init_frames], device=device)
    points = None
    if references.point_ids:
        at = torch.tensor([frame - frames.start for frame in references.point_frames], device=device)
        # relative to the frame without padding -> relative to the padded one
        scale = torch.tensor(geometry.network) / torch.tensor(geometry.padded)
        points = model.object_encoder.look_up(features, at, (references.points * scale).to(device))
    masks = references.masks.to(device)
    background, objects = model.object_encoder(mask_features[shown], masks, points)
    return model.queries.objects(background[None], objects[None])


def best_of_object(logits: Tensor, references: ClipReferences) -> Tensor:
    """Maximum over each object's queries: [Q, T, H/4, W/4] -> [N, T, H/4, W/4], in the order of `ids`."""
    num_masks, num_points = len(references.mask_ids), len(references.point_ids)
    from_masks = logits[: len(logits) - num_points]
    if num_masks:
        from_masks = from_masks.unflatten(0, (num_masks, -1)).amax(1)
    return torch.cat((from_masks, logits[len(logits) - num_points :]))
