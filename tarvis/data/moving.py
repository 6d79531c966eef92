"""Training clips from photographs: objects cut out of some are moved over others, as a camera would see them.

The paper pre-trains on images that are turned and cut anew for every frame (`tarvis.data.images`), so that
all pixels move as one. Here each object has a motion of its own, and so has the camera: objects cross, hide
one another, enter and leave, deform and blur, and some have a twin that looks the same (compare Oh et al.
2019, STM, and Ghiasi et al. 2021, Copy-Paste). Every draw comes from the generator that is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tarvis.data.batch import Sample
from tarvis.data.clips import Kind
from tarvis.data.images import LabelledImage
from tarvis.data.layers import frame_layers
from tarvis.data.settings import MovingSettings
from tarvis.data.transforms import shift
from tarvis.files.pictures import Picture, Window, read_window
from tarvis.structures import InputError, Size

NAME = "moving"
Matrix = NDArray[np.float64]
Floats = NDArray[np.float32]

LEAST_SHARE = 0.004
"""Share of a photograph that an object must cover to be cut out."""
LEAST_PIXELS = 24
"""Fewest pixels that the first frame must show of an object for it to be given."""
LOG_SIDES = (math.log(0.18), math.log(0.95))
"""Longer side of a cut-out object as a share of the frame's shorter side, as logarithms."""
ZOOM = (1.0, 1.8)
"""How much larger than the frame the photograph behind is, so that the camera can move before it mirrors."""


class MovingClips:
    """A training set for VOS and PET: clip k has photograph k of the scenes behind its objects.

    Args:
        objects: photographs whose objects are cut out, one list a file; files are drawn equally often.
        scenes: photographs that lie behind. Their own objects are followed too.

    Raises:
        InputError: no photograph shows an object that is large enough.
    """

    def __init__(
        self,
        objects: Sequence[Sequence[LabelledImage]],
        scenes: Sequence[LabelledImage],
        settings: MovingSettings,
        *,
        max_objects: int = 4,
    ) -> None:
        if not scenes or not objects or not all(objects):
            raise InputError(
                f"cannot train on {NAME}: data.moving.objects names no photograph with an object"
            )
        self.name = NAME
        self._objects = objects
        self._scenes = scenes
        self._settings = settings
        self._max_objects = max_objects

    def kinds(self) -> dict[Kind, int]:
        """One kind for each clip length."""
        least, most = self._settings.clip_lengths
        return {Kind("vos", length=length): len(self._scenes) for length in range(least, most + 1)}

    def origin(self, kind: Kind, item: int) -> str:  # noqa: ARG002
        """The name of the photograph behind."""
        return self._scenes[item].name

    def draw(self, kind: Kind, item: int, random: np.random.Generator) -> Sample | None:
        """A clip; None where its first frame shows no object.

        Raises:
            InputError: a file cannot be used; the message names it.
        """
        assert kind.length is not None
        scene, length = self._scenes[item], kind.length
        size = self._settings.sizes[int(random.integers(len(self._settings.sizes)))]
        picture, ids = _read(scene)
        cutouts = self._cutouts(picture, ids, random)
        in_place = _movable(ids) if random.random() < self._settings.in_place else []
        if in_place:  # an object of the scene itself moves, before what was behind it
            number = int(random.choice(in_place))
            mask = ids == number
            cutouts.insert(0, Cutout.of(picture, mask))
            picture, ids = _filled(picture, mask), np.where(mask, 0, ids)
        camera = _camera(picture.shape[:2], size, length, random)
        frames = [_warp(picture, view, size) for view in camera]
        layers = [_warp_ids(ids, view, size) for view in camera]
        first_id = int(ids.max()) + 1
        targets = random.uniform(0.15, 0.85, (len(cutouts), 2))
        for k, cutout in enumerate(cutouts):
            cutout = cutout.scaled(math.exp(random.uniform(*LOG_SIDES)) * min(size))
            motion = Motion.draw(size, targets, k, random)
            motion.paint(cutout, frames, layers, first_id + k, random)
        chosen = self._given(layers[0], first_id, random)
        if not chosen:
            return None
        numbers = np.zeros(first_id + len(cutouts), np.uint8)
        numbers[chosen] = np.arange(1, len(chosen) + 1)
        objects = numbers.take(np.stack(layers)[None])  # [1, T, H, W]
        film = Film.draw(random)
        return Sample(
            f"{NAME}: {scene.name}",
            np.stack([film.expose(frame, t, random) for t, frame in enumerate(frames)]),
            objects,
            (-1,) * len(chosen),
        )

    def _cutouts(
        self, picture: Picture, ids: NDArray[np.uint16], random: np.random.Generator
    ) -> list[Cutout]:
        """Objects of other photographs, now and then one of them twice."""
        wanted = int(random.integers(0 if _movable(ids) else 1, self._settings.most_objects + 1))
        cutouts: list[Cutout] = []
        for _ in range(wanted):
            if cutouts and random.random() < self._settings.twins:
                cutouts.append(cutouts[-1].mirrored() if random.random() < 0.5 else cutouts[-1])
                continue
            images = self._objects[int(random.integers(len(self._objects)))]
            source, source_ids = _read(images[int(random.integers(len(images)))])
            if movable := _movable(source_ids):
                number = int(random.choice(movable))
                cutouts.append(Cutout.of(source, source_ids == number).lit_as(picture, random))
        return cutouts

    def _given(self, first: NDArray[np.uint16], first_id: int, random: np.random.Generator) -> list[int]:
        """Ids of the objects to follow: those that move before those of the scene, at random among each."""
        counts = np.bincount(first.ravel())
        visible = [int(k) for k in np.flatnonzero(counts >= LEAST_PIXELS) if k]
        order = random.permutation(len(visible)).tolist()
        visible = [visible[k] for k in order]
        visible.sort(key=lambda number: number < first_id)
        return visible[: int(random.integers(1, self._max_objects + 1))]


@dataclass(frozen=True)
class Cutout:
    """An object cut out of a photograph: [H, W, 4] float32, colours 0..255 and opacity 0..1."""

    pixels: Floats

    @classmethod
    def of(cls, picture: Picture, mask: NDArray[np.bool_]) -> Cutout:
        """The box around a mask [H, W] of a picture, with a rim of two pixels."""
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        top, left = max(int(rows[0]) - 2, 0), max(int(columns[0]) - 2, 0)
        box = slice(top, int(rows[-1]) + 3), slice(left, int(columns[-1]) + 3)
        opacity = cv2.GaussianBlur(mask[box].astype(np.float32), (3, 3), 0.8)
        return cls(np.dstack((picture[box].astype(np.float32), opacity)))

    @property
    def size(self) -> Size:
        return self.pixels.shape[0], self.pixels.shape[1]

    def scaled(self, side: float) -> Cutout:
        """The object with a longer side of about so many pixels."""
        factor = side / max(self.size)
        target = max(round(self.size[1] * factor), 3), max(round(self.size[0] * factor), 3)
        method = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
        return Cutout(np.asarray(cv2.resize(self.pixels, target, interpolation=method), np.float32))

    def mirrored(self) -> Cutout:
        return Cutout(np.ascontiguousarray(self.pixels[:, ::-1]))

    def lit_as(self, picture: Picture, random: np.random.Generator) -> Cutout:
        """The object with its mean colour part of the way towards that of a picture."""
        weight = self.pixels[..., 3:]
        mean = (self.pixels[..., :3] * weight).sum((0, 1)) / max(float(weight.sum()), 1.0)
        wanted = picture[::4, ::4].reshape(-1, 3).mean(0)
        gain = np.clip((wanted + 20) / (mean + 20), 0.6, 1.6) ** random.uniform(0, 0.7)
        colours = np.clip(self.pixels[..., :3] * gain, 0, 255)
        return Cutout(np.dstack((colours, weight)).astype(np.float32))


@dataclass(frozen=True)
class Motion:
    """How an object moves. Positions are of its centre, in pixels (x, y) of the frame; times in frames.

    `speed` [2] and `bend` [2] are pixels a frame and their change; `growth` is the factor of the size a
    frame; `angle` and `turn` are radians and radians a frame; `tilt` [2] is the perspective; `wobble`
    [2, 4, 4, 2] are two coarse fields of displacements, as shares of the cutout, which swing with `rhythm`,
    radians a frame.
    """

    start: Matrix
    speed: Matrix
    bend: Matrix
    growth: float
    angle: float
    turn: float
    tilt: Matrix
    wobble: Matrix
    rhythm: float

    @classmethod
    def draw(cls, size: Size, targets: Matrix, index: int, random: np.random.Generator) -> Motion:
        """A random motion; `targets` [N, 2]: shares of the frame where the objects are half-way through."""
        extent = np.array(size[::-1], float)
        pace = math.exp(random.uniform(math.log(0.004), math.log(0.10))) * min(size)
        heading = random.uniform(0, 2 * math.pi)
        speed = pace * np.array([math.cos(heading), math.sin(heading)])
        towards = targets[int(random.integers(len(targets)))] if random.random() < 0.4 else targets[index]
        start = towards * extent - speed * random.uniform(0, 4)
        start = np.clip(start, 0.02 * extent, 0.98 * extent)  # seen in the first frame, most of them
        if random.random() < 0.12:  # enters later
            start = start - np.sign(speed) * extent * random.uniform(0.3, 0.6)
            speed = speed * 2
        return cls(
            start,
            speed,
            random.normal(0, 0.15, 2) * pace,
            math.exp(random.normal(0, 0.03)),
            random.normal(0, 0.15),
            random.normal(0, 0.05),
            random.normal(0, 0.03, 2),
            random.normal(0, random.uniform(0, 0.05), (2, 4, 4, 2)),
            random.uniform(0.3, 1.2),
        )

    def view(self, cutout: Cutout, t: int) -> Matrix:
        """[3, 3] from pixels of the cutout to those of frame t."""
        height, width = cutout.size
        x, y = self.start + self.speed * t + self.bend * t * t / 2
        angle, scale = self.angle + self.turn * t, self.growth**t
        turned = np.array([
            [scale * math.cos(angle), -scale * math.sin(angle), 0],
            [scale * math.sin(angle), scale * math.cos(angle), 0],
            [self.tilt[0] * t / width, self.tilt[1] * t / height, 1],
        ])  # fmt: skip
        return shift(x, y) @ turned @ shift(-width / 2, -height / 2)

    def paint(
        self,
        cutout: Cutout,
        frames: list[Picture],
        layers: list[NDArray[np.uint16]],
        number: int,
        random: np.random.Generator,
    ) -> None:
        """Put the object on all frames, and `number` on their label maps, in place."""
        size = layers[0].shape[0], layers[0].shape[1]
        streak = _streak(self.speed) if random.random() < 0.3 else None
        for t, (frame, ids) in enumerate(zip(frames, layers, strict=True)):
            pixels = _deformed(cutout.pixels, self._field(t))
            warped: Any = cv2.warpPerspective(
                pixels, self.view(cutout, t), size[::-1], flags=cv2.INTER_LINEAR
            )
            if streak is not None:
                premultiplied = warped.copy()
                premultiplied[..., :3] *= warped[..., 3:]
                warped = cv2.filter2D(premultiplied, -1, streak)
                warped[..., :3] /= np.maximum(warped[..., 3:], 1e-3)
            opacity = warped[..., 3:]
            blended = frame + opacity * (warped[..., :3] - frame)
            frames[t] = np.clip(blended, 0, 255).astype(np.uint8)
            ids[opacity[..., 0] > 0.5] = number

    def _field(self, t: int) -> Floats:
        """Displacements [4, 4, 2] at time t, as shares of the cutout."""
        phase = self.rhythm * t
        return np.asarray(
            self.wobble[0] * math.sin(phase) + self.wobble[1] * (math.cos(phase) - 1), np.float32
        )


@dataclass(frozen=True)
class Film:
    """What camera and file do to the pictures of a clip.

    `gain` [3] and `drift` [3] are factors of the colours and their change a frame; `gamma` is a power; `blur`
    the sigma of defocus in pixels; `shake` [2] a streak in pixels (x, y); `noise` is in grey levels;
    `quality` is that of JPEG, 0 for none; `coarse` the factor by which the picture is shrunk and enlarged
    again.
    """

    gain: Matrix
    drift: Matrix
    gamma: float
    blur: float
    shake: Matrix
    noise: float
    quality: int
    coarse: float

    @classmethod
    def draw(cls, random: np.random.Generator) -> Film:
        def sometimes(chance: float, value: float) -> float:
            return value if random.random() < chance else 0.0

        return cls(
            np.exp(random.normal(0, 0.10, 3) + random.normal(0, 0.15)),
            np.exp(random.normal(0, 0.01, 3) + random.normal(0, 0.02)),
            math.exp(random.normal(0, 0.15)),
            sometimes(0.25, random.uniform(0.4, 1.6)),
            random.normal(0, sometimes(0.25, 3.0), 2),
            sometimes(0.3, random.uniform(1, 8)),
            int(sometimes(0.5, float(random.integers(25, 95)))),
            1 + sometimes(0.2, random.uniform(0.2, 1.0)),
        )

    def expose(self, picture: Picture, t: int, random: np.random.Generator) -> Picture:
        """Frame t as the file would hold it."""
        size = picture.shape[:2]
        levels = np.linspace(0, 1, 256)[:, None] ** self.gamma * 255 * self.gain * self.drift**t
        table = np.clip(np.rint(levels), 0, 255).astype(np.uint8)[:, None]  # [256, 1, 3]
        out: Any = cv2.LUT(picture, table.reshape(1, 256, 3))
        if self.coarse > 1:
            small = round(size[1] / self.coarse), round(size[0] / self.coarse)
            out = cv2.resize(cv2.resize(out, small, interpolation=cv2.INTER_AREA), size[::-1])
        if self.blur:
            out = cv2.GaussianBlur(out, (0, 0), self.blur)
        if (streak := _streak(self.shake * random.uniform(0, 1))) is not None:
            out = cv2.filter2D(out, -1, streak)
        if self.noise:
            out = np.clip(out + random.normal(0, self.noise, out.shape), 0, 255).astype(np.uint8)
        if self.quality:
            _, code = cv2.imencode(".jpg", out, [cv2.IMWRITE_JPEG_QUALITY, self.quality])
            out = cv2.imdecode(code, cv2.IMREAD_COLOR)
        return np.asarray(out, np.uint8)


def _read(image: LabelledImage) -> tuple[Picture, NDArray[np.uint16]]:
    """A photograph and its objects' ids [H, W]; of objects that share pixels the smaller one lies on top."""
    whole = Window(0, 0, *image.size)
    picture = read_window(image.image, whole, image.size, image.size)
    maps = frame_layers(image.read_map(), list(image.labels), whole, image.size)
    ids = np.zeros(image.size, np.uint16)
    areas = {k: n for each in maps for k, n in enumerate(np.bincount(each.ravel())) if k and n}
    for number in sorted(areas, key=lambda k: -areas[k]):
        for each in maps:
            ids[each == number] = number
    return picture, ids


def _movable(ids: NDArray[np.uint16]) -> list[int]:
    """Ids of the objects that are large enough to be cut out, and not nearly all of the photograph."""
    shares = np.bincount(ids.ravel()) / ids.size
    return [int(k) for k in np.flatnonzero((shares > LEAST_SHARE) & (shares < 0.6)) if k]


def _filled(picture: Picture, hole: NDArray[np.bool_]) -> Picture:
    """A picture with a hole [H, W] filled from around it, ever more coarsely towards its middle."""
    wide = cv2.dilate(hole.astype(np.uint8), np.ones((5, 5), np.uint8))
    known = (wide == 0).astype(np.float32)
    filled = picture * known[..., None]
    weight = known.copy()
    for sigma in (4, 8, 16, 32, 64):
        spread = cv2.GaussianBlur(weight, (0, 0), sigma)
        colours = cv2.GaussianBlur(filled, (0, 0), sigma) / np.maximum(spread, 1e-6)[..., None]
        fresh = (weight == 0) & (spread > 0.02)
        filled[fresh] = colours[fresh]
        weight[fresh] = 1
    return np.clip(filled, 0, 255).astype(np.uint8)


def _camera(source: Size, size: Size, length: int, random: np.random.Generator) -> list[Matrix]:
    """Maps [3, 3] from the photograph to each frame: a smooth path of position, zoom, roll and tilt."""
    cover = max(size[0] / source[0], size[1] / source[1])
    zoom = cover * random.uniform(*ZOOM)
    slack = np.array(source[::-1]) * zoom - np.array(size[::-1])
    middle = np.array(source[::-1]) / 2 + random.uniform(-0.5, 0.5, 2) * np.maximum(slack, 0) / zoom
    calm = random.random() < 0.25
    pace = 0.0 if calm else math.exp(random.uniform(math.log(0.002), math.log(0.06))) * min(size)
    speed, bend = random.normal(0, pace, 2), random.normal(0, pace * 0.2, 2)
    growth = 1.0 if calm else math.exp(random.normal(0, 0.02))
    roll, turn = random.normal(0, 0.08), 0.0 if calm else random.normal(0, 0.02)
    tilt = np.zeros(2) if calm else random.normal(0, 0.02, 2)
    flip = np.diag([-1.0, 1, 1]) if random.random() < 0.5 else np.eye(3)
    views = []
    for t in range(length):
        angle, scale = roll + turn * t, zoom * growth**t
        turned = np.array([
            [scale * math.cos(angle), -scale * math.sin(angle), 0],
            [scale * math.sin(angle), scale * math.cos(angle), 0],
            [tilt[0] * t / source[1], tilt[1] * t / source[0], 1],
        ])  # fmt: skip
        x, y = np.array(size[::-1]) / 2 + speed * t + bend * t * t / 2
        views.append(shift(x, y) @ turned @ flip @ shift(-middle[0], -middle[1]))
    return views


def _warp(picture: Picture, view: Matrix, size: Size) -> Picture:
    flags, border = cv2.INTER_LINEAR, cv2.BORDER_REFLECT_101
    return np.asarray(
        cv2.warpPerspective(picture, view, size[::-1], flags=flags, borderMode=border), np.uint8
    )


def _warp_ids(ids: NDArray[np.uint16], view: Matrix, size: Size) -> NDArray[np.uint16]:
    return np.asarray(cv2.warpPerspective(ids, view, size[::-1], flags=cv2.INTER_NEAREST), np.uint16)


def _deformed(pixels: Floats, field: Floats) -> Floats:
    """Pixels [H, W, 4] displaced by a coarse field [h, w, 2] of shares of their size."""
    height, width = pixels.shape[:2]
    if max(height, width) < 4 or not field.any():
        return pixels
    smooth: Any = cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC)
    x = np.arange(width, dtype=np.float32)[None] + smooth[..., 0] * width
    y = np.arange(height, dtype=np.float32)[:, None] + smooth[..., 1] * height
    return np.asarray(cv2.remap(pixels, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT), np.float32)


def _streak(motion: Matrix) -> Floats | None:
    """Kernel of the blur of a motion (x, y) in pixels while the shutter is open; None below two pixels."""
    length = min(float(np.hypot(*motion)) * 0.5, 15.0)
    if length < 2:
        return None
    side = 2 * math.ceil(length / 2) + 1
    kernel = np.zeros((side, side), np.float32)
    half = np.asarray(motion) / np.hypot(*motion) * length / 2
    middle = side // 2
    ends = [tuple(round(float(middle + sign * c)) for c in half) for sign in (-1, 1)]
    cv2.line(kernel, ends[0], ends[1], 1.0)
    return kernel / kernel.sum()
