"""Instances: which queries of a clip are kept, and how the clips' instances become tracks of the video."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.special import softmax
from torch import Tensor

from tarvis.config import InferenceConfig
from tarvis.files import rle
from tarvis.operators import mask_upsample
from tarvis.structures import RLE, Geometry, Track

FrameMasks = tuple[int, dict[int, RLE]]
"""A finished frame: its number and {track id: mask at the original size}."""


def select_queries(class_logits: Tensor, threshold: float, max_tracks: int) -> Tensor:
    """The queries of a clip that become instances.

    Args:
        class_logits: [Q, 1 + K], background first.
        threshold: least probability (>=) of the best class other than background.
        max_tracks: how many may be kept.

    Returns:
        [N] int64 query indices: in their own order, or by falling score where some had to be cut.
    """
    score = class_logits.float().softmax(-1)[:, 1:].amax(-1)  # [Q]
    kept = (score >= threshold).nonzero().flatten()
    if len(kept) <= max_tracks:
        return kept
    return kept[score[kept].argsort(descending=True, stable=True)[:max_tracks]]


class InstanceTracker:
    """Joins the instances of consecutive clips into tracks.

    Instances of a clip continue those of the clip before it that they overlap most on shared frames. Ids
    count from 1 in the order of the rows given; a track that misses one clip has ended. A frame takes its
    masks from the first clip that has it, even if that clip has no instance at all.

    `add` and `finish` hand out every frame exactly once, in order, as soon as no later clip has it. What
    stays is logits of about one clip and one vector of class logits a track.

    Where the logits lie on a GPU and no later clip changes them, worker threads make run-length codes of the
    masks while the next clip runs, and what fails there is raised by the call that hands the frame out.
    """

    def __init__(self, geometry: Geometry, config: InferenceConfig) -> None:
        self._geometry = geometry
        self._config = config
        self._pending: list[_Owner] = []
        self._next_id = 1
        self._class_sums: dict[int, tuple[NDArray[np.float64], int]] = {}  # id: (sum, number of clips)
        self._workers = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "encode")  # ends with its owner

    def add(self, frames: range, mask_logits: Tensor, class_logits: Tensor) -> list[FrameMasks]:
        """Take in the next clip.

        Args:
            frames: the clip's frames; it starts after the start of the clip before it.
            mask_logits: [N, T, H/4, W/4] of the kept queries; N = 0 is fine.
            class_logits: [N, 1 + K].

        Returns:
            The frames before this clip that have not been handed out yet, with the tracks alive there (a
            mask may be empty).
        """
        finished = self._release(frames.start)
        ids = self._link(frames, mask_logits)
        if self._config.shared_masks == "mean":
            for owner in self._pending:
                owner.average(ids, frames, mask_logits)
        for track_id, logits in zip(ids, class_logits.detach().cpu().double().numpy(), strict=True):
            total, count = self._class_sums.get(track_id, (0.0, 0))
            self._class_sums[track_id] = (total + logits, count + 1)
        new = self._pending[-1].frames.stop if self._pending else frames.start
        assert frames.start <= new < frames.stop, "clips leave no frame out and each brings a new one"
        owner = _Owner(range(new, frames.stop), ids, mask_logits[:, new - frames.start :].detach().clone())
        if self._config.shared_masks == "earliest" and _leaves_cpu_idle(owner.logits):
            owner.codes = [self._encode_later(owner.logits[:, t : t + 1]) for t in range(len(owner.frames))]
        self._pending.append(owner)
        return finished

    def finish(self) -> list[FrameMasks]:
        """The frames that have not been handed out yet."""
        return self._release(self._pending[-1].frames.stop) if self._pending else []

    def class_logits(self) -> tuple[list[int], NDArray[np.float64]]:
        """All track ids so far, rising, and the mean over clips of their class logits [N, 1 + K].

        Without any track the array is [0, 0].
        """
        ids = sorted(self._class_sums)
        means = [self._class_sums[i][0] / self._class_sums[i][1] for i in ids]
        return ids, np.stack(means) if means else np.zeros((0, 0))

    def _link(self, frames: range, logits: Tensor) -> list[int]:
        """The track id of every row of `logits`: one of the clip before, or a new one."""
        ids = [0] * len(logits)
        before = self._pending[-1] if self._pending else None
        if before is not None:
            shared = range(max(frames.start, before.frames.start), min(frames.stop, before.frames.stop))
            if len(shared):
                old = before.logits[:, shared.start - before.frames.start :][:, : len(shared)]
                new = logits[:, shared.start - frames.start :][:, : len(shared)]
                iou = overlap(old > 0, new > 0, self._config.link_empty)
                for row, column in zip(*linear_sum_assignment(iou, maximize=True), strict=True):
                    if iou[row, column] > self._config.link_iou:
                        ids[column] = before.ids[row]
        for row, track_id in enumerate(ids):
            if track_id == 0:
                ids[row] = self._next_id
                self._next_id += 1
        return ids

    def _release(self, end: int) -> list[FrameMasks]:
        """Hand out pending frames before `end`; forget clips that own no other frame."""
        finished = []
        for owner in self._pending:
            while owner.released < min(end, owner.frames.stop):
                t = owner.released - owner.frames.start
                if owner.codes:
                    codes = owner.codes[t].result()
                else:
                    masks = mask_upsample(
                        owner.logits[:, t : t + 1], self._geometry.network, self._geometry.original
                    )
                    codes = rle.encode(masks[:, 0])
                finished.append((owner.released, dict(zip(owner.ids, codes, strict=True))))
                owner.released += 1
        # the newest stays: the next clip looks at where it ends
        self._pending = [o for o in self._pending[:-1] if o.released < o.frames.stop] + self._pending[-1:]
        return finished

    def _encode_later(self, logits: Tensor) -> Future[list[RLE]]:
        """Codes of the masks of a frame, from logits [N, 1, H/4, W/4]; only bits leave the GPU."""
        network, original = self._geometry.network, self._geometry.original
        bits = mask_upsample(logits, network, original, packed=True)[:, 0].cpu().numpy()
        return self._workers.submit(rle.encode_bits, bits, original[1])


def _leaves_cpu_idle(logits: Tensor) -> bool:
    """Whether encoding can hide behind the network; on a CPU that would only disturb it."""
    return logits.device.type != "cpu"


class _Owner:
    """The frames that a clip was the first to have, with its instances."""

    def __init__(self, frames: range, ids: list[int], logits: Tensor) -> None:
        self.frames = frames
        self.ids = ids
        self.logits = logits  # [N, T, H/4, W/4]
        self.codes: list[Future[list[RLE]]] = []  # of each frame, or not yet begun
        self.released = frames.start  # the first frame not handed out
        self._clips = [1] * len(frames)  # how many clips each frame's logits are the mean of

    def average(self, ids: list[int], frames: range, logits: Tensor) -> None:
        """Move the logits of known tracks on shared frames towards those of a later clip."""
        both = [(self.ids.index(track_id), row) for row, track_id in enumerate(ids) if track_id in self.ids]
        if not both:
            return
        old, new = (list(rows) for rows in zip(*both, strict=True))
        self.logits = self.logits.clone()  # it may have been made in inference mode
        for frame in range(max(frames.start, self.frames.start), min(frames.stop, self.frames.stop)):
            t, count = frame - self.frames.start, self._clips[frame - self.frames.start]
            later = logits[new, frame - frames.start]  # [N, H/4, W/4]
            self.logits[old, t] = (self.logits[old, t] * count + later) / (count + 1)
            self._clips[t] = count + 1


def overlap(a: Tensor, b: Tensor, link_empty: bool = True) -> NDArray[np.float64]:
    """IoU of masks a [N, ..] and b [M, ..], with 1 added to both areas -> [N, M].

    So the overlap of two empty masks is 1, as in the published code, unless `link_empty` is False.
    """
    rows, columns = a.flatten(1).float(), b.flatten(1).float()  # exact: sums of ones below 2 ** 24
    # only sums leave the device, which may not know float64
    areas_a, areas_b = rows.sum(1).cpu().double(), columns.sum(1).cpu().double()
    shared = (rows @ columns.T).cpu().double()  # [N, M]
    all_pixels = areas_a[:, None] + areas_b[None] - shared
    iou = (shared + 1) / (all_pixels + 1)
    if not link_empty:
        iou = iou.masked_fill(all_pixels == 0, 0.0)
    return iou.numpy()


def select_results(
    frames: Iterable[FrameMasks],
    ids: Sequence[int],
    class_logits: NDArray[np.float64],
    top_k: int,
    things: Sequence[int] | None = None,
) -> tuple[Track, ...]:
    """The `top_k` most probable (track, class) pairs of a video, by falling probability.

    A track may appear several times, as different classes. On each frame, pixels that entries of the same
    class share go to the more probable one. Of equal probabilities the earlier track, then the earlier class
    comes first. There may be fewer pairs than `top_k`, or none.

    Args:
        frames: the finished frames, {track id: mask} each.
        ids: track ids, in the order of the rows of `class_logits`.
        class_logits: [N, 1 + K] means over clips, background first.
        top_k: how many entries at most.
        things: the 0-based classes that are things; None: all are.

    Returns:
        Tracks with ids 1, 2, .. and 0-based labels; `source` is the tracker's id.
    """
    if not ids:
        return ()
    probabilities = softmax(np.asarray(class_logits, np.float64), axis=1)[:, 1:]  # [N, K]
    classes = np.arange(probabilities.shape[1]) if things is None else np.asarray(things, np.int64)
    best = np.argsort(-probabilities[:, classes], axis=None, kind="stable")[:top_k]
    rows, columns = np.unravel_index(best, (len(ids), len(classes)))
    labels = classes[columns]
    sources = [ids[row] for row in rows]
    masks: list[dict[int, RLE]] = [{} for _ in best]
    for frame, found in frames:
        for entry, mask in _without_overlap(found, sources, labels.tolist()).items():
            masks[entry][frame] = mask
    return tuple(
        Track(entry + 1, masks[entry], int(label), float(probabilities[row, label]), sources[entry])
        for entry, (row, label) in enumerate(zip(rows, labels, strict=True))
    )


def _without_overlap(
    found: Mapping[int, RLE], sources: Sequence[int], labels: Sequence[int]
) -> dict[int, RLE]:
    """Masks of a frame's entries, best first; each without what better ones of its class cover."""
    masks: dict[int, RLE] = {}
    taken: dict[int, RLE] = {}  # class: pixels of all its entries so far
    for entry, (source, label) in enumerate(zip(sources, labels, strict=True)):
        mask = found.get(source)
        if mask is None:
            continue
        covered = taken.get(label)
        masks[entry] = mask if covered is None else rle.subtract(mask, covered)
        taken[label] = mask if covered is None else rle.union([mask, covered])
    return masks
