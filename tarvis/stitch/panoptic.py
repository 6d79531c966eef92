"""Panoptic video: stuff labels from semantic logits, and tracks of things painted on top."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from torch import Tensor

from tarvis.files import rle
from tarvis.operators import label_upsample
from tarvis.stitch.tracking import FrameMasks
from tarvis.structures import RLE, VOID, Geometry, Size, Track, VideoResult

Labels = NDArray[np.uint8]

MAX_TRACKS = 999
"""Tracks a video may have: the STEP evaluation packs class * 1000 + id, and id 0 is stuff."""


class SemanticMaps:
    """Joins the stuff logits of consecutive clips into one label map a frame.

    Logits of frames that several clips share are averaged. Every pixel gets a stuff class: there is no void,
    and thing classes do not compete.

    `add` and `finish` hand out every frame exactly once, in order, as soon as no later clip has it. What
    stays is logits of about one clip.
    """

    def __init__(self, geometry: Geometry, stuff: Sequence[int]) -> None:
        """`stuff` holds the 0-based classes that are stuff, rising."""
        if not stuff:
            raise ValueError("panoptic segmentation needs at least one stuff class")
        self._geometry = geometry
        self._classes = np.zeros(256, np.uint8)  # of each row
        self._classes[: len(stuff)] = stuff
        self._frames = range(0)
        self._mean = torch.empty(0, 0, 0, 0)  # [K, T, H/4, W/4] of the frames not handed out yet
        self._clips: list[int] = []  # how many clips each frame's logits are the mean of

    def add(self, frames: range, logits: Tensor) -> list[tuple[int, bytes]]:
        """Take in the next clip.

        Args:
            frames: the clip's frames; it starts after the start of the clip before it.
            logits: [K, T, H/4, W/4], a row for each stuff class in the order given.

        Returns:
            The frames before this clip that have not been handed out yet: (frame, PNG of uint8 labels).
        """
        finished = self._release(frames.start)
        shared = len(self._frames)
        assert self._frames == frames[:shared], "clips leave no frame out"
        assert shared < len(frames), "each clip brings a new frame"
        logits = logits.detach()
        if shared:
            count = torch.tensor(self._clips, device=logits.device)[:, None, None]
            mean = (self._mean * count + logits[:, :shared]) / (count + 1)
            logits = torch.cat([mean, logits[:, shared:]], 1)
        self._mean = logits
        self._clips = [n + 1 for n in self._clips] + [1] * (len(frames) - shared)
        self._frames = frames
        return finished

    def finish(self) -> list[tuple[int, bytes]]:
        """The frames that have not been handed out yet."""
        return self._release(self._frames.stop)

    def _release(self, end: int) -> list[tuple[int, bytes]]:
        """Hand out pending frames before `end`."""
        done = max(0, min(end, self._frames.stop) - self._frames.start)
        rows = [
            label_upsample(self._mean[:, t : t + 1], self._geometry.network, self._geometry.original)[0].cpu()
            for t in range(done)
        ]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as workers:  # cv2 lets them run side by side
            finished = list(zip(self._frames[:done], workers.map(self._encode, rows), strict=True))
        self._frames, self._clips = self._frames[done:], self._clips[done:]
        self._mean = self._mean[:, done:]
        return finished

    def _encode(self, rows: Tensor) -> bytes:
        """A map of classes as PNG, from which rows of the logits they are, uint8 [H, W]."""
        labels: Labels = cv2.LUT(rows.numpy(), self._classes)  # type: ignore[assignment]
        return encode_labels(labels)


def encode_labels(labels: Labels) -> bytes:
    """A uint8 label map [H, W] as PNG."""
    return cv2.imencode(".png", labels)[1].tobytes()


def decode_labels(png: bytes) -> Labels:
    """The inverse of `encode_labels`."""
    labels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    if labels is None or labels.ndim != 2 or labels.dtype != np.uint8:
        raise ValueError("expected a single-channel 8-bit PNG of labels")
    return labels  # type: ignore[return-value]


def select_things(
    frames: Iterable[FrameMasks],
    ids: Sequence[int],
    class_logits: NDArray[np.float64],
    things: Iterable[int],
    threshold: float,
) -> tuple[Track, ...]:
    """The tracks of a video that are shown: most likely a thing, with a probability above `threshold`.

    Args:
        frames: the finished frames, {track id: mask} each.
        ids: track ids, in the order of the rows of `class_logits`.
        class_logits: [N, 1 + K] means over clips, background first.
        things: the 0-based classes that are things.
        threshold: compared strictly with the probability of the best class, background included.

    Returns:
        Tracks by rising id with label and score; of more than 999 the most probable ones. Ids are kept where
        none exceeds 999, else they are counted from 1.
    """
    things = frozenset(things)
    kept: dict[int, tuple[int, float]] = {}
    probabilities = softmax(np.asarray(class_logits, np.float64), axis=1) if ids else np.zeros((0, 1))
    for track_id, p in zip(ids, probabilities, strict=True):
        best = int(p.argmax())
        if best - 1 in things and p[best] > threshold:
            kept[track_id] = best - 1, float(p[best])
    shown = sorted(sorted(kept, key=lambda i: -kept[i][1])[:MAX_TRACKS])
    masks: dict[int, dict[int, RLE]] = {track_id: {} for track_id in shown}
    for frame, found in frames:
        for track_id in found.keys() & masks.keys():
            masks[track_id][frame] = found[track_id]
    return compact_ids(tuple(Track(i, masks[i], *kept[i]) for i in shown))


def compact_ids(tracks: tuple[Track, ...]) -> tuple[Track, ...]:
    """The same tracks, numbered from 1 if any id exceeds 999."""
    if all(track.id <= MAX_TRACKS for track in tracks):
        return tracks
    return tuple(replace(track, id=i, source=track.id) for i, track in enumerate(tracks, 1))


def painting_order(tracks: Iterable[Track]) -> list[Track]:
    """Tracks by rising score, the best on top; in their own order where there are no scores."""
    return sorted(tracks, key=lambda track: track.score or 0.0)


def only_classes(result: VideoResult, labels: Container[int]) -> VideoResult:
    """The result without tracks of other classes; other stuff becomes void."""
    tracks = tuple(track for track in result.tracks if track.label is None or track.label in labels)
    kept = np.array([k if k in labels else VOID for k in range(VOID + 1)], np.uint8)
    stuff = {frame: encode_labels(kept[decode_labels(png)]) for frame, png in result.stuff.items()}
    return replace(result, tracks=tracks, stuff=stuff)


def paint_over(stuff: Labels, tracks: Iterable[Track], frame: int) -> tuple[Labels, NDArray[np.uint16]]:
    """Paint the tracks of a frame over its stuff labels, later ones on top.

    Args:
        stuff: [H, W] uint8 labels.
        tracks: with label, in `painting_order`.
        frame: which of their masks to paint.

    Returns:
        semantic labels [H, W] uint8 and track ids [H, W] uint16, 0 for stuff.
    """
    semantic, instance = stuff.T.copy(), np.zeros(stuff.T.shape, np.uint16)  # codes go down the columns
    for track in tracks:
        if frame in track.masks and track.label is not None:
            mask = rle.decode(track.masks[frame]).T
            np.copyto(semantic, np.uint8(track.label), where=mask)
            np.copyto(instance, np.uint16(track.id), where=mask)
    return np.ascontiguousarray(semantic.T), np.ascontiguousarray(instance.T)


def paint(size: Size, tracks: Iterable[Track], frame: int) -> NDArray[np.uint16]:
    """Ids [H, W] of the tracks at a frame, later ones on top, 0 elsewhere."""
    ids = np.zeros(size[::-1], np.uint16)
    for track in tracks:
        if frame in track.masks:
            np.copyto(ids, np.uint16(track.id), where=rle.decode(track.masks[frame]).T)
    return np.ascontiguousarray(ids.T)
