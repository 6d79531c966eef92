"""Tracker: objects that a person points at in a video, corrects and removes at any frame, and has followed.

tracker = model.track("video.mp4")
tracker.give(1, 0, points=[(320, 200)])  # its mask in frame 0
for result in tracker.follow(0, 99):
    ...
tracker.give(1, 60, points=[(340, 210)], negative=[(400, 90)])  # a correction
for result in tracker.follow(60, 99):  # from there on; before it nothing changes
    ...
tracks = tracker.result().tracks
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from tarvis.config import InferenceConfig
from tarvis.files import rle
from tarvis.files.pictures import Picture
from tarvis.structures import RLE, FrameResult, InputError, Network, Reference, Track, VideoResult
from tarvis.tasks import FOLLOW
from tarvis.video.frames import FrameSource, prefetch
from tarvis.video.segmenter import VideoSegmenter

BLOCK = 16
"""Frames that are decoded at a time where a video is followed backwards."""

Point = Sequence[float]
"""(x, y) in pixels of the frame: the pixel's own column and row."""
Masks = dict[int, RLE]
"""Masks of a frame by object."""


class Given(NamedTuple):
    """An object as a person gave it at a frame.

    `mask` is None where it is removed from this frame on; `before` is the mask that following had found here.
    """

    mask: RLE | None
    before: RLE | None


class Targets:
    """The objects of a video: how they were given, and what is known of them.

    Attributes:
        given: by object, then by frame.
        masks: by frame, then by object. A frame that was never followed is missing.
    """

    def __init__(self) -> None:
        self.given: dict[int, dict[int, Given]] = {}
        self.masks: dict[int, Masks] = {}

    def give(self, id: int, frame: int, mask: RLE) -> None:
        """Give an object at a frame, in place of what was given of it there before."""
        entry = Given(mask, self.found(id, frame))
        self.given[id] = {**self.given.get(id, {}), frame: entry}
        self.masks[frame] = {**self.masks.get(frame, {}), id: mask}

    def copy(self) -> Targets:
        """Another one of the same content, which then changes by itself."""
        other = Targets()
        other.given, other.masks = dict(self.given), dict(self.masks)  # what they hold is never changed
        return other

    def found(self, id: int, frame: int) -> RLE | None:
        """The mask that following has found at a frame, whatever was given there since."""
        entry = self.given.get(id, {}).get(frame)
        return self.masks.get(frame, {}).get(id) if entry is None else entry.before

    def around(self, id: int, frame: int) -> Masks:
        """The masks of a frame, that of one object as following has found it there, if it has."""
        known = {other: mask for other, mask in self.at(frame, 1).items() if other != id}
        found = self.found(id, frame)
        return known if found is None else known | {id: found}

    def remove(self, id: int, frame: int | None = None) -> None:
        """Remove an object from a frame on; without one, as if it had never been given.

        Raises:
            InputError: it is not known.
        """
        if id not in self.given:
            raise InputError(
                f"object {id} was never given; known: {', '.join(map(str, self.given)) or 'none'}"
            )
        if frame is None:
            del self.given[id]
        else:
            kept = {at: each for at, each in self.given[id].items() if at < frame}
            self.given[id] = kept | {frame: Given(None, self.masks.get(frame, {}).get(id))}
        for at, masks in self.masks.items():
            if id in masks and (frame is None or at >= frame):
                self.masks[at] = {other: mask for other, mask in masks.items() if other != id}

    def at(self, frame: int, step: int) -> Masks:
        """The objects at a frame where following, in steps of 1 or -1, comes by."""
        known = dict(self.masks.get(frame, {}))
        for id, each in self.given.items():
            if (entry := each.get(frame)) is not None and (entry.mask is not None or step > 0):
                known.pop(id, None)
                if entry.mask is not None:
                    known[id] = entry.mask
        return {id: mask for id, mask in known.items() if rle.area(mask)}

    def given_between(self, start: int, end: int) -> list[int]:
        """The frames between two others at which objects are given or removed, in the order of following."""
        low, high = min(start, end), max(start, end)
        frames = {frame for each in self.given.values() for frame in each if low < frame < high}
        return sorted(frames, reverse=end < start)

    def tracks(self) -> tuple[Track, ...]:
        """The objects through all frames."""
        masks: dict[int, Masks] = {id: {} for id in sorted(self.given)}
        for frame, found in sorted(self.masks.items()):
            for id in masks.keys() & found.keys():
                masks[id][frame] = found[id]
        return tuple(Track(id, found) for id, found in masks.items())


@dataclass
class Tracker:
    """Follows objects through ranges of a video, forwards or backwards, from where they are given.

    An object may be given at any frame, and again at others: following takes it from there as it was given.
    Several points of an object are asked together, with the negative ones and the other objects as rivals:
    each pixel goes to the strongest.

    Args:
        network: in eval mode.
        source: the video; ranges of its frames are decoded anew.
        settings: clips, sizes and thresholds.
        amp: run the network under autocast in bfloat16 or float16.
    """

    network: Network
    source: FrameSource
    settings: InferenceConfig
    amp: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.targets = Targets()

    def give(
        self,
        id: int,
        frame: int,
        *,
        mask: Any = None,
        points: Iterable[Point] = (),
        negative: Iterable[Point] = (),
        box: Sequence[float] | None = None,
    ) -> RLE:
        """Give an object at a frame, or correct it there, in place of what was given of it there before.

        Points and a box change the mask that following has found there; a mask replaces it.

        Args:
            id: of the object, from 1 on.
            frame: counts from 0.
            mask: [H, W], where its numbers are not 0; or a run-length code.
            points: (x, y) on the object.
            negative: (x, y) beside it.
            box: (left, top, right, bottom) in pixels, around the object.

        Returns:
            The object's mask at this frame.

        Raises:
            InputError: nothing is given, or it does not fit the video; or nothing is found at the points.
        """
        places = [*points, *negative]
        if sum((mask is not None, bool(places), box is not None)) != 1:
            raise InputError(f"object {id}, frame {frame}: expected a mask, points, or a box")
        if mask is not None:
            found = self._checked(id, frame, mask)
        elif box is not None:
            found = self._in_box(id, frame, box)
        else:
            found = self._at_points(id, frame, list(points), list(negative))
        if not rle.area(found):
            raise InputError(
                f"object {id}, frame {frame}: nothing was found there; add a point, or give a mask"
            )
        self.targets.give(id, frame, found)
        return found

    def remove(self, id: int, frame: int | None = None) -> None:
        """See `Targets.remove`."""
        self.targets.remove(id, frame)

    def follow(self, start: int, end: int | None = None) -> Iterator[FrameResult]:
        """Follow the objects of a frame to another, both included; backwards if `end` comes before `start`.

        Objects are taken as they are known at `start`, and as they are given on the way. What was known of
        the frames is replaced one by one, so that whoever stops early keeps what is done.

        Args:
            end: by default the last frame of the video.

        Raises:
            InputError: no object is known at `start`, or the video has no such frames.
        """
        last = self.source.num_frames
        if end is None:
            end = start + 10**9 if last is None else last - 1
        if min(start, end) < 0 or (last is not None and max(start, end) >= last):
            raise InputError(
                f"{self.source.path}: no frames {start} to {end}, it has {last}: 0 to {(last or 1) - 1}"
            )
        step = 1 if end >= start else -1
        cuts = self.targets.given_between(start, end)
        if not self.targets.at(start, step) and not cuts:
            raise InputError(
                f"frame {start}: no object is known here; give one, or follow from another frame"
            )
        followed: set[int] = set()
        for first, stop in pairwise([start, *cuts, end]):
            reached = yield from self._run(first, stop, step, followed)
            if reached != stop:  # the video has ended before
                return
        self.targets.masks[end] = self.targets.at(end, step)
        yield FrameResult(FOLLOW.name, end, self.targets.masks[end])

    def result(self) -> VideoResult:
        """All that is known, as the result of a video."""
        count = self.source.num_frames or max(self.targets.masks, default=-1) + 1
        return VideoResult(FOLLOW.name, self.source.size, count, self.targets.tracks())

    def _run(self, first: int, stop: int, step: int, followed: set[int]) -> Generator[FrameResult, None, int]:
        """Follow what is known at `first` up to `stop`, whose own result is left to the caller.

        Returns:
            The frame that was reached: `stop`, or one before it where the video ends.
        """
        if first == stop:
            return stop
        known = self.targets.masks[first] = self.targets.at(first, step)
        followed |= known.keys()
        yield FrameResult(FOLLOW.name, first, known)
        segmenter, read = self._asked(given_as(known)) if known else None, 0
        with closing(prefetch(self._frames(first, stop, step), 2 * self.settings.clip_length)) as pictures:
            for picture in pictures:
                nothing = [FrameResult(FOLLOW.name, read, {})]
                found = segmenter.step([picture]) if segmenter else nothing
                yield from self._noted(found, first, stop, step, followed)
                read += 1
        yield from self._noted(segmenter.flush() if segmenter else [], first, stop, step, followed)
        return first + step * (read - 1)

    def _noted(
        self, results: Sequence[FrameResult], first: int, stop: int, step: int, followed: set[int]
    ) -> Iterator[FrameResult]:
        """Keep what was found, except at `first`, where it was given. Hands out the frames before `stop`.

        Masks of objects that are not `followed` stay as they are.
        """
        for result in results:
            frame = first + step * result.frame
            if frame != first:
                known = self.targets.masks.get(frame, {})
                kept = {id: mask for id, mask in known.items() if id not in followed}
                self.targets.masks[frame] = kept | result.masks
                if frame != stop:
                    yield FrameResult(FOLLOW.name, frame, self.targets.masks[frame])

    def _frames(self, first: int, stop: int, step: int) -> Iterator[Picture]:
        """The frames from `first` to `stop`, both included."""
        if step > 0:
            yield from self.source.read(first, stop + 1)
            return
        for high in range(first + 1, stop, -BLOCK):
            yield from reversed(list(self.source.read(max(high - BLOCK, stop), high)))

    def _asked(self, references: Sequence[Reference]) -> VideoSegmenter:
        return VideoSegmenter(
            self.network,
            [FOLLOW],
            references=references,
            settings=self.settings,
            amp=self.amp,
            size=self.source.size,
        )

    def _found(self, id: int, frame: int, references: Sequence[Reference]) -> Masks:
        """What the network sees in one frame, asked for references at frame 0; other objects are rivals."""
        rivals = [mask for other, mask in self.targets.at(frame, 1).items() if other != id]
        first = 1 + len(references)
        segmenter = self._asked([*references, *given_as(dict(enumerate(rivals, first)))])
        picture = next(iter(self.source.read(frame, frame + 1)), None)
        if picture is None:
            raise InputError(f"{self.source.path}: has no frame {frame}")
        segmenter.step([picture])
        return {id: mask for result in segmenter.flush() for id, mask in result.masks.items()}

    def _at_points(self, id: int, frame: int, points: Sequence[Point], negative: Sequence[Point]) -> RLE:
        """The mask that points ask for; every point is a target of its own, rivals among each other."""
        asked = [Reference(1 + k, 0, point=at) for k, at in enumerate((*points, *negative))]  # type: ignore[arg-type]
        ours = [each.id for each in asked[: len(points)]]
        before = self.targets.found(id, frame)
        if before is not None and rle.area(before):
            ours.append(len(asked) + 1)
            asked.append(Reference(len(asked) + 1, 0, mask=torch.from_numpy(rle.decode(before))))
        if not ours:
            raise InputError(f"object {id}, frame {frame}: expected a point on the object, too")
        found = self._found(id, frame, asked)
        parts = [found[k] for k in ours if k in found]
        return rle.union(parts) if parts else rle.empty(self.source.size)

    def _in_box(self, id: int, frame: int, box: Sequence[float]) -> RLE:
        """The object that fills a box, as far as it lies inside."""
        height, width = self.source.size
        left, top, right, bottom = map(float, box)
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise InputError(
                f"object {id}, frame {frame}: no box (left, top, right, bottom) in {width}x{height}: {box}"
            )
        y, x = np.mgrid[:height, :width] + 0.5
        inside = (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
        radii = (right - left) / 2, (bottom - top) / 2
        filled = ((x - left) / radii[0] - 1) ** 2 + ((y - top) / radii[1] - 1) ** 2 <= 1
        found = self._found(id, frame, [Reference(1, 0, mask=torch.from_numpy(filled))])
        if 1 not in found:
            return rle.empty(self.source.size)
        return rle.encode(torch.from_numpy(rle.decode(found[1]) & inside)[None])[0]

    def _checked(self, id: int, frame: int, mask: Any) -> RLE:
        if isinstance(mask, dict):
            mask = rle.decode(mask)  # type: ignore[arg-type]
        given = Reference(id, frame, mask=mask).mask
        assert given is not None
        if tuple(given.shape) != tuple(self.source.size):
            raise InputError(
                f"object {id}, frame {frame}: expected a mask of the video's size {self.source.size}, "
                f"got {tuple(given.shape)}"
            )
        return rle.encode(given[None])[0]


def given_as(masks: Masks) -> list[Reference]:
    """Masks of objects as references at frame 0."""
    return [Reference(id, 0, mask=torch.from_numpy(rle.decode(mask))) for id, mask in masks.items()]
