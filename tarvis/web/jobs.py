"""What the server's processes do: one follows objects, others decode what people have uploaded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from tarvis.api import Model, load
from tarvis.engines import open_runner
from tarvis.files.pictures import Picture
from tarvis.structures import InputError
from tarvis.video.exports import Export, write_export
from tarvis.video.frames import FrameSource, VideoFrames, open_frames
from tarvis.video.tracker import Given, Masks, Point, Targets, Tracker

AHEAD = 24
"""Frames that are decoded together, since the next ones are soon asked for."""
KEPT = 240
"""Encoded frames that stay in memory."""
QUALITY = 85
OPEN = 4
"""Videos that stay open."""


class Give(NamedTuple):
    """What do points or a box show? `known` are the masks of the frame, object `id` as it was found there.
    Answer: a mask.
    """

    video: str
    id: int
    frame: int
    known: Masks
    points: tuple[Point, ...]
    negative: tuple[Point, ...]
    box: tuple[float, ...] | None


class Follow(NamedTuple):
    """Follow the objects of a frame to another. Answers: (frame, masks)."""

    video: str
    given: dict[int, dict[int, Given]]
    masks: Masks
    start: int
    end: int


class Find(NamedTuple):
    """Find the objects of all classes in a range. Answer: (class, score, masks by frame) of each."""

    video: str
    task: str
    start: int
    end: int


class Look(NamedTuple):
    """Open a video that was uploaded. Answer: what it is."""

    video: str


class Show(NamedTuple):
    """A frame as JPEG, its shorter side at most `side` pixels. Answer: bytes."""

    video: str
    frame: int
    side: int


class Write(NamedTuple):
    """Write a result; the frames are those of `video`. Answer: nothing."""

    video: str
    export: dict[str, Any]
    kind: str
    path: str


Answers = Callable[[Any], Iterator[Any]]


def network(weights: str | None, engine: str | None, device: str, trust: bool) -> Answers:
    """What the process answers that holds the network."""
    settings: dict[str, Any]
    if engine is None:
        model, settings = load(weights, device=device, trust=trust), {}
    else:
        runner = open_runner(Path(engine), device=device, trust=trust)
        model, settings = Model(runner, runner.config, device=runner.device), runner.manifest.settings
    trackers: OrderedDict[str, Tracker] = OrderedDict()

    def tracker(video: str, targets: Targets) -> Tracker:
        found = trackers.pop(video, None) or model.track(video, **settings)
        trackers[video] = found
        while len(trackers) > OPEN:
            trackers.popitem(last=False)
        own = replace(found)  # other jobs of this video may be paused
        own.targets = targets
        return own

    def answers(job: Any) -> Iterator[Any]:
        targets = Targets()
        if isinstance(job, Give):
            targets.masks[job.frame] = job.known
            asked = tracker(job.video, targets)
            yield asked.give(job.id, job.frame, points=job.points, negative=job.negative, box=job.box)
        elif isinstance(job, Follow):
            targets.given, targets.masks = job.given, {job.start: job.masks}
            for result in tracker(job.video, targets).follow(job.start, job.end):
                yield result.frame, result.masks
        else:
            yield from find(model, job, settings)

    return answers


def find(model: Model, job: Find, settings: dict[str, Any]) -> Iterator[Any]:
    """What a task finds by itself."""
    frames = open_frames(job.video, start=job.start, limit=job.end - job.start + 1)
    video = model.segment(frames, job.task, **settings)
    for result in video:
        yield result.frame + job.start, {}
    assert video.classes is not None
    names = video.classes.names
    for track in video.results[job.task].tracks:
        masks = {frame + job.start: mask for frame, mask in track.masks.items()}
        yield names[track.label or 0], track.score, masks


def reader(pixels: int) -> Answers:
    """What a process answers that decodes videos of at most so many pixels a frame."""
    sources: OrderedDict[str, FrameSource] = OrderedDict()
    pictures: OrderedDict[Show, bytes] = OrderedDict()

    def source(video: str) -> FrameSource:
        found = sources.pop(video, None) or open_frames(video)
        sources[video] = found
        while len(sources) > OPEN:
            sources.popitem(last=False)
        return found

    def answers(job: Any) -> Iterator[Any]:
        if isinstance(job, Look):
            frames = source(job.video)
            if frames.size[0] * frames.size[1] > pixels:
                raise InputError(
                    f"frames of {frames.size[1]}x{frames.size[0]}: at most {pixels} pixels are taken"
                )
            count = frames.count() if isinstance(frames, VideoFrames) else frames.num_frames
            yield {"size": frames.size, "fps": frames.fps, "num_frames": count}
        elif isinstance(job, Show):
            if job not in pictures:
                shown = source(job.video).read(job.frame, job.frame + AHEAD)
                for frame, picture in enumerate(shown, job.frame):
                    pictures[job._replace(frame=frame)] = jpeg(picture, job.side)
            if job not in pictures:
                raise InputError(f"the video has no frame {job.frame}")
            yield pictures[job]
            while len(pictures) > KEPT:
                pictures.popitem(last=False)
        else:
            frames = source(job.video)
            names = [frames.name(frame) for frame in range(job.export["result"].num_frames)]
            export = Export(frame_names=names, frames=lambda: frames, fps=frames.fps, **job.export)
            write_export(export, job.kind, Path(job.path))

    return answers


def jpeg(picture: Picture, side: int) -> bytes:
    """A picture as JPEG, shrunk where its shorter side is longer than `side`."""
    factor = side / min(picture.shape[:2])
    shown = picture[..., ::-1]
    if factor < 1:
        size = round(picture.shape[1] * factor), round(picture.shape[0] * factor)
        shown = np.asarray(cv2.resize(shown, size, interpolation=cv2.INTER_AREA), np.uint8)
    data = cv2.imencode(".jpg", shown, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
    return data.tobytes()
