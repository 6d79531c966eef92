"""Generated videos to train on, for every task: rendered when they are asked for, nothing is on a disk."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path

from tarvis.data.clips import VideoClips
from tarvis.data.settings import TASKS, SetSettings, SyntheticSettings
from tarvis.data.synthetic import SyntheticFrame, SyntheticScene
from tarvis.data.transforms import Image
from tarvis.datasets.benchmark import FrameTruth, Truth, VideoSample
from tarvis.files.pictures import Window
from tarvis.structures import Size

NAME = "synthetic"
DEFAULTS = SetSettings(TASKS, window=2, min_sizes=None, crop=(1, 1), colour="narrow")


def synthetic_clips(
    made: SyntheticSettings, settings: SetSettings, *, clip_length: int, max_objects: int
) -> VideoClips:
    """A training set of scenes."""
    videos = [_video(made, k) for k in range(made.num_videos)]
    return VideoClips(
        NAME,
        videos,
        settings,
        clip_length=clip_length,
        max_objects=max_objects,
        read_image=_read_image,
    )


def _video(made: SyntheticSettings, number: int) -> VideoSample:
    span = made.most_objects - made.least_objects + 1
    scene = (made.first_seed + number, made.size, made.least_objects + number % span)
    ids = tuple(range(1, scene[2] + 1))
    names = tuple(f"{t:05d}" for t in range(made.num_frames))
    labels: dict[int, int | None] = {**_scene(*scene).classes}
    return VideoSample(
        name=f"scene {scene[0]}",
        images=tuple(Path(name) for name in names),  # of no file
        frame_names=names,
        size=made.size,
        # which of them a frame shows is seen when it is drawn
        truth=Truth(labels, (ids,) * made.num_frames, partial(_read_truth, scene)),
        entry={"scene": scene},
    )


def _read_truth(scene: tuple[int, Size, int], t: int) -> FrameTruth:
    frame = _render(scene, t)
    return FrameTruth(ids=frame.instance.astype("uint16"), semantic=frame.semantic)


def _read_image(video: VideoSample, frame: int, window: Window, target: Size, size: Size) -> Image:  # noqa: ARG001
    return _render(video.entry["scene"], frame).frame[window.box].copy()


@lru_cache(maxsize=64)
def _scene(seed: int, size: Size, num_objects: int) -> SyntheticScene:
    return SyntheticScene(seed, size, num_objects)


@lru_cache(maxsize=16)
def _render(scene: tuple[int, Size, int], t: int) -> SyntheticFrame:
    return _scene(*scene).render(t)
