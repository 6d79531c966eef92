"""Seeded clips of moving, textured shapes with masks, ids and classes: for the demo, tests and tiny training.

Discs, squares, triangles, stars and rings, told apart by shape, hue and texture, drift, bounce, turn and
breathe before a sky, a brick wall and grass whose borders move. Textures move with their objects, nearer
objects hide farther ones, and some come late or go. A frame depends on the seed and its number alone, so a
long video can be made frame by frame, and begins with the frames of the shorter one.

The same seed gives the same pixels everywhere: random numbers are raw uniforms of NumPy's counter-based
Philox, and sines, the one thing that differs between mathematics libraries, are rounded to 9 digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tarvis.data.clips import VideoClips
from tarvis.data.settings import SetSettings, SyntheticSettings
from tarvis.datasets.benchmark import FrameTruth, Truth, VideoSample
from tarvis.datasets.classes import class_table
from tarvis.files.pictures import Picture, Window
from tarvis.structures import Size
from tarvis.tasks import TRAINED

NAME = "synthetic"
DEFAULTS = SetSettings(TRAINED, window=2, min_sizes=None, crop=(1, 1), colour="narrow")

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]


class SyntheticFrame(NamedTuple):
    """One frame: RGB [H, W, 3], object ids [H, W] (0 is background), class indices [H, W]; all uint8."""

    frame: Bytes
    instance: Bytes
    semantic: Bytes


@dataclass(frozen=True)
class SyntheticClip:
    """A clip: `frames` [F, H, W, 3] RGB, `instance` and `semantic` [F, H, W] as in `SyntheticFrame`.

    `classes` gives each object's class by its id; classes are those of `class_table("synthetic")`.
    """

    frames: Bytes
    instance: Bytes
    semantic: Bytes
    classes: dict[int, int]


def synthetic_clip(
    seed: int,
    num_frames: int = 12,
    size: Size = (128, 192),
    num_objects: int = 3,
    *,
    come_and_go: bool = True,
) -> SyntheticClip:
    """The first frames of `SyntheticScene(seed, ...)`, in arrays."""
    scene = SyntheticScene(seed, size, num_objects, come_and_go=come_and_go)
    rendered = [scene.render(t) for t in range(num_frames)]
    frames, instance, semantic = (np.stack(maps) for maps in zip(*rendered, strict=True))
    return SyntheticClip(frames, instance, semantic, scene.classes)


def synthetic_frames(
    seed: int,
    num_frames: int,
    size: Size = (128, 192),
    num_objects: int = 3,
    *,
    come_and_go: bool = True,
) -> Iterator[SyntheticFrame]:
    """The frames of `synthetic_clip`, one at a time, for videos of any length."""
    scene = SyntheticScene(seed, size, num_objects, come_and_go=come_and_go)
    return (scene.render(t) for t in range(num_frames))


class SyntheticScene:
    """What a seed stands for; `render(t)` is its frame t, in any order. Objects 1 .. N, a higher one nearer.

    Args:
        come_and_go: some objects (never the first) start outside the picture, or leave it and return.

    Raises:
        ValueError: a negative seed, an empty picture, or more objects than a byte can name.
    """

    def __init__(
        self, seed: int, size: Size = (128, 192), num_objects: int = 3, *, come_and_go: bool = True
    ) -> None:
        if seed < 0 or min(size) < 1 or not 0 <= num_objects <= 254:
            raise ValueError(
                f"expected seed >= 0, a size of at least 1x1 and 0 .. 254 objects, "
                f"got {seed}, {size} and {num_objects}"
            )
        self.seed = seed
        self.size = size
        random = _generator(seed, 0)
        things = class_table("synthetic").things
        order = random.random(len(things)).argsort()
        places = random.random(num_objects).argsort()
        self._background = _Background(random, size)
        self._objects = [
            _Object.draw(
                random,
                things[order[i % len(things)]],
                (places[i] + 0.5) / num_objects,
                size,
                come_and_go and i > 0,
            )
            for i in range(num_objects)
        ]
        self.classes = {i: thing.label for i, thing in enumerate(self._objects, 1)}

    def render(self, t: int) -> SyntheticFrame:
        """Frame t >= 0 of the scene."""
        frame, semantic = self._background.render(t)
        instance = np.zeros(self.size, np.uint8)
        for i, thing in enumerate(self._objects, 1):
            thing.paint(t, i, frame, instance, semantic)
        noise = _generator(self.seed, t + 1).random(frame.shape, np.float32)
        return SyntheticFrame(np.clip(frame + (12 * noise - 6), 0, 255).astype(np.uint8), instance, semantic)


@dataclass(frozen=True)
class _Object:
    """A shape and its motion, in pixels, radians and frames."""

    label: int
    tones: Floats  # [2, 3], of the two parts of its texture
    radius: float
    start: tuple[float, float]  # x, y
    velocity: tuple[float, float]
    range: tuple[tuple[float, float], tuple[float, float]]  # where x and y turn round
    delay: int  # frames before it moves
    angle: float
    spin: float
    breath: float  # of its radius a frame

    @classmethod
    def draw(
        cls, random: np.random.Generator, label: int, place: float, size: Size, comes_and_goes: bool
    ) -> _Object:
        """A random object at `place`, 0 .. 1, of the picture's width."""
        color, r, x, y, speed, slope, side, angle, spin, breath, visit, late = (
            random.random(3), *random.random(11)
        )  # fmt: skip
        H, W = size
        radius = (0.14 + 0.1 * r) * min(H, W)
        xs, ys = (0.6 * radius, W - 0.6 * radius), (0.6 * radius, H - 0.6 * radius)
        start = (W * place + 0.3 * radius * (2 * x - 1), ys[0] + y * (ys[1] - ys[0]))
        vx = (0.012 + 0.018 * speed) * min(H, W) * (1 if side < 0.5 else -1)
        delay = 0
        if comes_and_goes and visit < 0.4:
            xs = (-1.2 * radius, W + 1.2 * radius)
            vx *= 1.5
            if visit < 0.2:  # outside at first
                start = (xs[0] if vx > 0 else xs[1], start[1])
                delay = int(6 * late)
        base = np.array(class_table("synthetic").colors[label]) + 36 * color - 18
        return cls(
            label=label,
            tones=np.clip([base, 0.55 * base], 0, 255),
            radius=radius,
            start=start,
            velocity=(vx, vx * (2 * slope - 1)),
            range=(xs, ys),
            delay=delay,
            angle=2 * math.pi * angle,
            spin=0.12 * (2 * spin - 1),
            breath=0.02 * (0.3 + 0.7 * breath),
        )

    def paint(self, t: int, id_: int, frame: Floats, instance: Bytes, semantic: Bytes) -> None:
        """Draw over the frame so far: frame [H, W, 3], instance and semantic [H, W]."""
        t = max(0, t - self.delay)
        cx, cy = (
            _bounce(at + v * t, *limits)
            for at, v, limits in zip(self.start, self.velocity, self.range, strict=True)
        )
        radius = self.radius * (1 + _bounce(self.breath * t, -0.12, 0.12))
        H, W = instance.shape
        reach = 1.5 * radius  # a square's corners stand out of the circle
        y0, y1 = max(0, int(cy - reach)), min(H, int(cy + reach) + 2)
        x0, x1 = max(0, int(cx - reach)), min(W, int(cx + reach) + 2)
        if y0 >= y1 or x0 >= x1:
            return
        y, x = np.mgrid[y0:y1, x0:x1] + 0.5 - np.array([cy, cx])[:, None, None]
        angle = self.angle + self.spin * t
        cos, sin = round(math.cos(angle), 9), round(math.sin(angle), 9)
        u, v = (cos * x + sin * y) / radius, (cos * y - sin * x) / radius  # fixed to the object
        distance, texture = _SHAPES[self.label](u, v)
        cover = np.clip(0.5 - distance * radius, 0, 1)[..., None]
        box = np.s_[y0:y1, x0:x1]
        frame[box] += cover * (self.tones[texture.astype(np.intp)] - frame[box])
        inside = distance <= 0
        instance[box][inside] = id_
        semantic[box][inside] = self.label


class _Background:
    """Sky above bricks above grass; the camera pans, the borders rise, fall and slope."""

    def __init__(self, random: np.random.Generator, size: Size) -> None:
        self.size = size
        self.pan, self.rise, self.slope, light, middle = (2 * x - 1 for x in random.random(5))
        self.light = 12 * light
        self.middle = 0.62 + 0.08 * middle
        blades = random.random(size)
        self.blades = blades + np.roll(blades, 1, 0) + np.roll(blades, 2, 0) - 1.5  # [H, W]: taller than wide

    def render(self, t: int) -> tuple[Floats, Bytes]:
        """The background of frame t, RGB [H, W, 3], and its classes [H, W]."""
        sky, grass, bricks = (np.array(class_table("synthetic").colors[k], np.float64) for k in (0, 1, 2))
        H, W = self.size
        y, x = np.mgrid[:H, :W]
        drift = _bounce(0.006 * self.rise * t, -0.06, 0.06)
        tilt = 0.3 * self.slope * (x / W - 0.5)
        above = y / H < 0.32 + drift + tilt
        below = y / H >= self.middle - drift - tilt / 2
        x = x + int(1.5 * self.pan * t)

        height, width = max(3, H // 14), max(6, H // 7)
        row = y // height
        shifted = x + row % 2 * (width // 2)
        tone = (5 * row + 3 * (shifted // width)) % 4 * 8 - 12
        tone = np.where((y % height == 0) | (shifted % width == 0), 50, tone)

        shade = np.where(below, 70 * self.blades[y, x % W], tone)
        shade = np.where(above, 90 * y / H - 15, shade) + self.light  # the sky pales towards the horizon
        semantic = np.where(above, 0, np.where(below, 1, 2)).astype(np.uint8)
        return np.stack([sky, grass, bricks])[semantic] + shade[..., None], semantic


def _disc(u: Floats, v: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    return np.sqrt(u * u + v * v) - 1, (3 * u % 1 - 0.5) ** 2 + (3 * v % 1 - 0.5) ** 2 < 0.09


def _square(u: Floats, v: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    return np.maximum(abs(u), abs(v)) - 0.9, (np.floor(2.5 * u) + np.floor(2.5 * v)) % 2 > 0


def _triangle(u: Floats, v: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    return _triangle_distance(u, v), 2.5 * v % 1 < 0.5


def _star(u: Floats, v: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    u, v = u / 1.15, v / 1.15
    distance = np.minimum(_triangle_distance(u, v), _triangle_distance(u, -v))
    return 1.15 * distance, u * u + v * v < 0.16


def _ring(u: Floats, v: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    return abs(np.sqrt(u * u + v * v) - 0.75) - 0.3, u * v > 0


def _triangle_distance(u: Floats, v: Floats) -> Floats:
    """To an upright triangle of circumradius 1.2."""
    return np.maximum(v, 0.75**0.5 * abs(u) - 0.5 * v) - 0.6


_SHAPES = dict(enumerate((_disc, _square, _triangle, _star, _ring), start=3))
"""By class: signed distance from the edge of a shape of about unit radius, and its texture's dark part."""


def _bounce(x: float, low: float, high: float) -> float:
    """x folded into low .. high, as if reflected at both ends."""
    period = 2 * (high - low)
    x = (x - low) % period
    return low + min(x, period - x)


def _generator(seed: int, stream: int) -> np.random.Generator:
    """Independent random numbers for each pair."""
    return np.random.Generator(np.random.Philox(key=(seed % 2**64) + (stream << 64)))


# A training set: videos rendered when they are asked for


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


def _read_image(video: VideoSample, frame: int, window: Window, target: Size, size: Size) -> Picture:  # noqa: ARG001
    return _render(video.entry["scene"], frame).frame[window.box].copy()


@lru_cache(maxsize=64)
def _scene(seed: int, size: Size, num_objects: int) -> SyntheticScene:
    return SyntheticScene(seed, size, num_objects)


@lru_cache(maxsize=16)
def _render(scene: tuple[int, Size, int], t: int) -> SyntheticFrame:
    return _scene(*scene).render(t)
