"""Training clips of videos: which frames, which part of them, and the labels of that part.

Frames and label maps are cut out first, and only the part is resized and coloured. The original decodes,
colours and resizes whole frames, and a mask for every object and class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from tarvis.data.batch import Sample
from tarvis.data.layers import frame_layers, frame_size, objects_in, present, renumber, stack_layers, union
from tarvis.data.sampling import (
    consecutive_frames,
    first_frames,
    frames_after,
    frames_around,
    truth_of,
    window_showing,
    window_with,
)
from tarvis.data.settings import SetSettings
from tarvis.data.transforms import Colour, mirror, resize_labels
from tarvis.datasets.benchmark import FrameTruth, Truth, VideoSample
from tarvis.files.pictures import Picture, Window, read_window
from tarvis.stitch.resize import network_size
from tarvis.structures import VOID, InputError, Size
from tarvis.tasks import TASKS


class Kind(NamedTuple):
    """What the clips of a chunk have in common: their task and, where a set offers a choice, more.

    `num_objects` are given in the first frame (of videos), `length` is the number of frames; None where the
    set decides.
    """

    task: str
    num_objects: int | None = None
    length: int | None = None

    @property
    def is_given(self) -> bool:
        """Whether the objects of the first frame are given."""
        return not TASKS[self.task].finds_classes

    @property
    def needs_stuff(self) -> bool:
        """Whether all pixels are labelled."""
        return TASKS[self.task].needs_stuff


ReadImage = Callable[[VideoSample, int, Window, Size, Size], Picture]
"""(video, frame, part, target size of the part, size of the whole) -> the part at `target` size or above."""


def read_frame(video: VideoSample, frame: int, window: Window, target: Size, size: Size) -> Picture:
    """A part of a frame, from its file."""
    return read_window(video.images[frame], window, target, size)


class VideoClips:
    """A training set of videos, cut as its `SetSettings` say.

    In vis and vps a clip has the objects that any of its frames shows; in vos those of its first frame, in
    random order, as many as its kind says, or fewer where some are too small to be seen.

    Raises:
        InputError: nothing to learn from; the message names the set.
    """

    def __init__(
        self,
        name: str,
        videos: Sequence[VideoSample],
        settings: SetSettings,
        *,
        clip_length: int = 3,
        max_objects: int = 4,
        read_image: ReadImage = read_frame,
    ) -> None:
        self.name = name
        self._settings = settings
        self._length = clip_length
        self._read_image = read_image
        without = [video.name for video in videos if video.truth is None]
        if without or not videos:
            reason = f"video {without[0]!r} comes without masks" if without else "it has no videos"
            raise InputError(f"cannot train on {name}: {reason}")
        self._videos = [video for video in videos if any(truth_of(video).visible)]
        self._starts: dict[int, NDArray[np.int32]] = {}
        if any(Kind(task).is_given for task in settings.tasks):
            self._starts = first_frames(self._videos, clip_length, max_objects)
        if not self._videos:
            raise InputError(f"cannot train on {name}: no video shows an object")
        if not self.kinds():
            raise InputError(f"cannot train on {name}: no clip of {clip_length} frames begins with an object")

    def kinds(self) -> dict[Kind, int]:
        """Kinds of clips, each with the number of videos, or first frames, that its clips are made from."""
        found: dict[Kind, int] = {}
        for task in self._settings.tasks:
            if Kind(task).is_given:
                found |= {Kind(task, n): len(starts) for n, starts in self._starts.items()}
            else:
                found[Kind(task)] = len(self._videos)
        return found

    def origin(self, kind: Kind, item: int) -> str:
        """The name of the video that a clip is made of."""
        video = self._starts[kind.num_objects][item, 0] if kind.num_objects else item
        return self._videos[video].name

    def draw(self, kind: Kind, item: int, random: np.random.Generator) -> Sample | None:
        """A clip of a video, or of a first frame; None where the part that was cut out shows no object.

        Raises:
            InputError: a file cannot be used; the message names it.
        """
        if kind.num_objects is None:
            video = self._videos[item]
            visible = truth_of(video).visible
            if self._settings.consecutive:
                frames = consecutive_frames(len(visible), self._length, random)
            else:
                frames = frames_around(visible, self._length, self._settings.window, random)
        else:
            number, first = self._starts[kind.num_objects][item].tolist()
            video = self._videos[number]
            frames = frames_after(first, len(video.images), self._length, self._settings.window, random)
        return self._cut(video, frames, kind, random)

    def _cut(
        self, video: VideoSample, frames: list[int], kind: Kind, random: np.random.Generator
    ) -> Sample | None:
        settings, truth = self._settings, truth_of(video)
        shown = {t: truth.read(t) for t in dict.fromkeys(frames)}
        if kind.num_objects:
            objects = objects_in(shown[frames[0]], truth)
            objects = [objects[k] for k in random.permutation(len(objects))[: kind.num_objects]]
        else:
            objects = list(dict.fromkeys(id_ for t in frames for id_ in truth.visible[t]))
        if not objects:
            return None
        size = video.size or frame_size(shown[frames[0]])
        for t, each in shown.items():
            if each.ids is not None and each.ids.shape != size:
                raise InputError(
                    f"video {video.name!r}: labels of frame {video.frame_names[t]} are of {each.ids.shape}, "
                    f"expected {size}, as those of other frames"
                )
        window = self._window(kind, size, [shown[t] for t in frames], objects, random)
        target = self._target(kind, size, window, random)
        window = window.aligned(target, size)
        colour = Colour.draw(random, settings.colour)
        flip = settings.flip and random.random() < 0.5

        labels = {t: frame_layers(shown[t], objects, window, target) for t in shown}
        layers = stack_layers([labels[t] for t in frames])  # [S, T, H, W]
        shows = present(layers[:, 0] if kind.num_objects else layers, len(objects))
        if not shows.any():
            return None
        pixels = np.empty((len(frames), *target, 3), np.uint8)
        for k, t in enumerate(frames):
            if t in frames[:k]:
                pixels[k] = pixels[frames.index(t)]
            else:
                part = self._read_image(video, t, window, target, size)
                cv2.resize(part, target[::-1], pixels[k])
        rows: Picture = pixels.reshape(-1, target[1], 3)  # [T*H, W, 3]
        if colour is not None:
            rows = colour.apply(rows)
        classes = None
        if kind.needs_stuff:
            classes = np.stack([_classes(shown[t], window, target, video) for t in frames])
        if flip:
            rows, layers = np.asarray(cv2.flip(rows, 1), np.uint8), mirror(layers)
            classes = None if classes is None else mirror(classes)
        return Sample(
            f"{self.name}: {video.name}, frames {', '.join(video.frame_names[t] for t in frames)}",
            rows.reshape(pixels.shape),
            *renumber(layers, shows, [_label(truth, id_) for id_ in objects]),
            classes,
        )

    def _window(
        self,
        kind: Kind,
        size: Size,
        frames: list[FrameTruth],
        objects: list[int],
        random: np.random.Generator,
    ) -> Window:
        """The part of the frames that the clip shows."""
        whole = Window(0, 0, *size)
        part = round(self._settings.crop[0] * size[0]), round(self._settings.crop[1] * size[1])
        if part == size or not min(part):
            return whole
        if kind.num_objects:
            return window_with(union(frames[:1], size, objects), part, random) or whole
        return window_showing(union(frames, size), part, random) or whole

    def _target(self, kind: Kind, size: Size, window: Window, random: np.random.Generator) -> Size:
        """The size of the frames of the clip. In vos the settings give the size of whole frames."""
        settings, part = self._settings, (window.height, window.width)
        shorter = None
        if settings.min_sizes is not None:
            shorter = settings.min_sizes[int(random.integers(len(settings.min_sizes)))]
        if kind.num_objects is None:
            return network_size(part, shorter, settings.max_size)
        full = network_size(size, shorter, settings.max_size)
        if part == size:
            return full
        return max(1, round(settings.crop[0] * full[0])), max(1, round(settings.crop[1] * full[1]))


def _classes(frame: FrameTruth, window: Window, target: Size, video: VideoSample) -> NDArray[np.uint8]:
    if frame.semantic is None:
        raise InputError(f"video {video.name!r} has no labels of stuff, which vps needs")
    return resize_labels(np.ascontiguousarray(frame.semantic[window.box]), target, VOID)


def _label(truth: Truth, id_: int) -> int:
    label = truth.labels[id_]
    return -1 if label is None else label
