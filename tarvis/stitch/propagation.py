"""Objects that the user gives (VOS by mask, PET by point): carried from clip to clip, joined to a video."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tarvis.config import InferenceConfig
from tarvis.files import rle
from tarvis.operators import label_upsample, mask_upsample
from tarvis.stitch.resize import resize_mask
from tarvis.stitch.tracking import FrameMasks
from tarvis.structures import RLE, Geometry, InputError, Reference

ABSENT = -1000.0
"""Mask logit of an object on frames before it is given."""


@dataclass(frozen=True)
class ClipReferences:
    """What the queries of a clip are made from. Query order: background, mask objects, point objects.

    An object that was already tracked is shown by the masks predicted for it on the frames shared with the
    clip before, a new one by its given mask or point.
    """

    mask_ids: tuple[int, ...]
    masks: Tensor  # bool [N, T', Hp, Wp] at the padded size, T' = len(init_frames)
    point_ids: tuple[int, ...]
    points: Tensor  # float32 [M, 2]: (y, x) of pixel centres, divided by the original size
    point_frames: tuple[int, ...]  # frame of each point
    init_frames: tuple[int, ...]  # frames whose features are used, rising
    lost: tuple[int, ...]  # tracked so far, gone for good
    first_frame: dict[int, int]  # id -> index of the first frame of the clip in which it is given

    @property
    def ids(self) -> tuple[int, ...]:
        """The objects in query order; a clip without objects is skipped."""
        return self.mask_ids + self.point_ids


@dataclass(frozen=True)
class _Clip:
    """Objects as predicted in a clip."""

    frames: range
    ids: tuple[int, ...]
    logits: Tensor  # [N, T, H/4, W/4]


class ObjectPropagation:
    """Carries given objects through a video, clip by clip.

    For each clip: `references` says what the queries are made from; then `add` takes the prediction in, or
    `skip` if there is nothing to track. An object whose predicted masks are empty on all frames shared with
    the next clip, and which is not given there, is lost; so is every object if clips share no frame.

    On frames of several clips a later clip's masks replace earlier ones object by object, so an object that
    a later clip sees nowhere keeps its earlier mask there, below or above others; the last clip of a video
    only fills frames that are new. So it was published; `shared_objects="mean"` averages logits instead, and
    each pixel then belongs to one object.

    `add`, `skip` and `finish` hand out every frame from 0 on exactly once, in order, as soon as no later
    clip can change it. What stays is logits of about one clip.
    """

    def __init__(self, geometry: Geometry, config: InferenceConfig) -> None:
        self._geometry = geometry
        self._average = config.shared_objects == "mean"
        self._previous: _Clip | None = None
        self._pending: dict[int, dict[int, RLE]] = {}  # masks of frames not handed out yet
        self._next_frame = 0  # the first frame not handed out
        self._means: dict[int, dict[int, tuple[Tensor, int]]] = {}  # frame: id: (mean logits, of how many)

    def references(self, frames: range, given: Iterable[Reference]) -> ClipReferences:
        """What a clip's queries are made from, given the clip before it and all references of the video.

        References outside the clip are ignored. A point for an object that is tracked by mask is dropped, so
        that each object has one set of queries; its frame still counts as given.

        Raises:
            InputError: a reference that does not fit the video, see `check_reference`.
        """
        size = self._geometry.padded
        inside = sorted((r for r in given if r.frame in frames), key=lambda r: r.frame)
        for reference in inside:
            check_reference(reference, self._geometry.original)
        first_frame: dict[int, int] = {}
        for reference in inside:
            first_frame.setdefault(reference.id, reference.frame - frames.start)

        shared, predicted = self._predicted(frames)
        seen = predicted.flatten(1).any(1)  # [N]
        previous = () if self._previous is None else self._previous.ids
        alive = [i for i, is_seen in zip(previous, seen.tolist(), strict=True) if is_seen]
        lost = tuple(i for i in previous if i not in alive and i not in first_frame)
        new = [r.id for r in inside if r.mask is not None and r.id not in alive]
        mask_ids = tuple(dict.fromkeys(alive + new))

        init_frames = tuple(sorted({*shared, *(r.frame for r in inside)}))
        masks = predicted.new_zeros(len(mask_ids), len(init_frames), *size)
        masks[: len(alive), [init_frames.index(f) for f in shared]] = predicted[seen]
        for reference in inside:
            if reference.mask is not None:
                row, t = mask_ids.index(reference.id), init_frames.index(reference.frame)
                mask = reference_mask(reference.mask, self._geometry).to(masks.device)
                masks[row, t] = mask

        points: dict[int, Reference] = {}
        for reference in inside:
            if reference.point is not None and reference.id not in mask_ids:
                points.setdefault(reference.id, reference)
        return ClipReferences(
            mask_ids=mask_ids,
            masks=masks,
            point_ids=tuple(points),
            points=torch.tensor([self._normalise(r) for r in points.values()]).reshape(-1, 2),
            point_frames=tuple(r.frame for r in points.values()),
            init_frames=init_frames,
            lost=lost,
            first_frame=first_frame,
        )

    def add(self, frames: range, ids: Sequence[int], logits: Tensor) -> list[FrameMasks]:
        """Take in the next clip.

        Args:
            frames: the clip's frames; it starts after the start of the clip before it.
            ids: the objects, as `references` ordered them.
            logits: [N, T, H/4, W/4] after the maximum over an object's queries and `hide_before_given`.

        Returns:
            The frames before this clip that have not been handed out yet, with the objects seen there in
            painting order (later ones on top).
        """
        if len(ids) != len(logits) or len(frames) != logits.shape[1]:
            raise ValueError(
                f"expected logits of {len(ids)} objects on {len(frames)} frames, got {list(logits.shape)}"
            )
        self._write(self._previous, is_last=False)
        self._previous = _Clip(frames, tuple(ids), logits.detach())
        if self._average:
            self._add_to_means(self._previous)
        return self._release(frames.start)

    def skip(self, frames: range) -> list[FrameMasks]:
        """Pass over a clip without objects; everything tracked before is lost."""
        self._write(self._previous, is_last=False)
        self._previous = None
        return self._release(frames.start)

    def finish(self, num_frames: int) -> list[FrameMasks]:
        """The frames of a video of `num_frames` frames that have not been handed out yet."""
        self._write(self._previous, is_last=True)
        self._previous = None
        return self._release(num_frames)

    def _predicted(self, frames: range) -> tuple[range, Tensor]:
        """Frames shared with the clip before, and its objects' masks there: bool [N, T', Hp, Wp]."""
        size = self._geometry.padded
        if self._previous is None:
            return range(0), torch.zeros(0, 0, *size, dtype=torch.bool)
        shared = range(max(frames.start, self._previous.frames.start), self._previous.frames.stop)
        logits = self._previous.logits[:, shared.start - self._previous.frames.start :]
        return shared, mask_upsample(logits, size, size)

    def _normalise(self, reference: Reference) -> tuple[float, float]:
        """(y, x) of the pixel's centre, in units of the original size."""
        assert reference.point is not None
        (x, y), (height, width) = reference.point, self._geometry.original
        return (y + 0.5) / height, (x + 0.5) / width

    def _write(self, clip: _Clip | None, is_last: bool) -> None:
        """Make a clip's masks, replacing those of earlier clips; the last clip replaces nothing."""
        if clip is None or self._average:
            return
        for t, frame in enumerate(clip.frames):
            if is_last and frame in self._pending:
                continue
            found = self._separate(clip.ids, clip.logits[:, t])
            self._pending.setdefault(frame, {}).update(found)

    def _separate(self, ids: Sequence[int], logits: Tensor) -> dict[int, RLE]:
        """Masks of a frame's objects [N, H/4, W/4]: each pixel to the strongest, if positive; none empty."""
        if not ids:
            return {}
        labels = label_upsample(
            logits[:, None], self._geometry.network, self._geometry.original, background=True
        )[0]
        masks = rle.encode(torch.stack([labels == i for i in range(1, len(ids) + 1)]))
        return {i: mask for i, mask in zip(ids, masks, strict=True) if rle.area(mask)}

    def _add_to_means(self, clip: _Clip) -> None:
        for t, frame in enumerate(clip.frames):
            means = self._means.setdefault(frame, {})
            for track_id, logits in zip(clip.ids, clip.logits[:, t], strict=True):
                if (logits != ABSENT).any():
                    mean, count = means.get(track_id, (torch.zeros_like(logits), 0))
                    means[track_id] = (mean * count + logits) / (count + 1), count + 1

    def _release(self, end: int) -> list[FrameMasks]:
        """Hand out frames before `end`."""
        finished = []
        for frame in range(self._next_frame, end):
            if frame in self._means:
                means = self._means.pop(frame)
                logits = [mean for mean, _ in means.values()]
                self._pending[frame] = self._separate(list(means), torch.stack(logits)) if logits else {}
            finished.append((frame, self._pending.pop(frame, {})))
        self._next_frame = max(self._next_frame, end)
        return finished


def hide_before_given(logits: Tensor, ids: Sequence[int], first_frame: dict[int, int]) -> Tensor:
    """Object logits [N, T, H/4, W/4] with -1000 on the frames of the clip before an object is first given."""
    first = torch.tensor([first_frame.get(i, 0) for i in ids], device=logits.device)
    t = torch.arange(logits.shape[1], device=logits.device)
    return logits.masked_fill((t < first[:, None])[..., None, None], ABSENT)


def reference_mask(mask: Tensor, geometry: Geometry) -> Tensor:
    """A given mask, bool [H, W] at the original size, at the padded network size.

    A mask too small to survive the resize keeps the pixel at its centre, so that the object does not vanish.
    """
    resized = resize_mask(mask, geometry.network)
    if mask.any() and not resized.any():
        centre = (mask.nonzero().double().mean(0) + 0.5).tolist()
        y, x = (int(c / old * new) for c, old, new in zip(centre, mask.shape, geometry.network, strict=True))
        resized[y, x] = True
    bottom, right = (p - n for p, n in zip(geometry.padded, geometry.network, strict=True))
    return F.pad(resized, (0, right, 0, bottom))


def check_reference(reference: Reference, size: tuple[int, int]) -> None:
    """Raise InputError, saying what is wrong, unless the reference fits a video of this (height, width)."""
    name = f"object {reference.id}, frame {reference.frame}"
    if reference.id < 1 or reference.frame < 0:
        raise InputError(f"{name}: ids count from 1 and frames from 0")
    if (reference.mask is None) == (reference.point is None):
        raise InputError(f"{name}: expected either a mask or a point")
    if reference.mask is not None:
        if tuple(reference.mask.shape) != size:
            raise InputError(
                f"{name}: expected a mask of the video's size {size}, got {tuple(reference.mask.shape)}"
            )
        if not reference.mask.any():
            raise InputError(f"{name}: the mask is empty")
    if reference.point is not None:
        (x, y), (height, width) = reference.point, size
        if not (0 <= x < width and 0 <= y < height):
            raise InputError(
                f"{name}: point ({x}, {y}) is outside the frame of width {width}, height {height}"
            )
