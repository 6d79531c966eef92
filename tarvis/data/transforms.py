"""Changes of frames and label maps: size, colour, and the motion that an image is given.

Masks travel in label maps. A map of numbers is resized as if each number's mask were, bilinearly with a
threshold of 0.5, but without making one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from tarvis.files.pictures import Picture
from tarvis.structures import Size

Map = TypeVar("Map", bound=NDArray[Any])

HUES = 180  # in OpenCV's HSV
SPREAD = {"wide": (12, 25), "narrow": (10, 20)}
"""Largest change of hue and saturation, and of brightness."""
CONTRAST = 0.05
MIDDLE = 127
BRIGHTNESS = (
    (cv2.COLOR_RGB2YCrCb, cv2.COLOR_YCrCb2RGB, 0),
    (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB, 2),
    (cv2.COLOR_RGB2HLS, cv2.COLOR_HLS2RGB, 1),
    (cv2.COLOR_RGB2Lab, cv2.COLOR_Lab2RGB, 0),
    (cv2.COLOR_RGB2Luv, cv2.COLOR_Luv2RGB, 0),
    (cv2.COLOR_RGB2YUV, cv2.COLOR_YUV2RGB, 0),
)
"""Spaces in which brightness may change: conversion to it, conversion back, and the channel."""
CURVED = (3, 4)
"""Indices of the spaces that need powers, whose conversion takes five times as long: see `_lightening`."""
ZERO = 128


def resize_labels(labels: Map, size: Size, nothing: int) -> Map:
    """A label map [H, W] at another size: a pixel gets the label whose mask, resized bilinearly, is over 0.5.

    Where no label has the majority, `nothing` is written. Only pixels between different labels are computed;
    all others have four equal neighbours.
    """
    h, w = labels.shape
    if (h, w) == size:
        return labels
    # where all four neighbours are equal, the nearest is one of them
    resized: Any = cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    (y, y1, fy), (x, x1, fx) = _taps(h, size[0]), _taps(w, size[1])
    is_mixed = np.zeros((h, w), bool)  # whether a pixel differs from the next ones, right and below
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    is_mixed[:, :-1] |= across
    is_mixed[:-1] |= down
    is_mixed[:-1, :-1] |= across[1:]
    rows, columns = _of_taps(*np.divmod(np.flatnonzero(is_mixed), w), y, x)
    upper, lower, before, behind = y[rows], y1[rows], x[columns], x1[columns]
    taps = [labels[upper, before], labels[upper, behind], labels[lower, before], labels[lower, behind]]
    v, u = fy[rows], fx[columns]
    weights = [(1 - v) * (1 - u), (1 - v) * u, v * (1 - u), v * u]
    voted = np.full(len(rows), nothing, labels.dtype)
    for label in taps:
        share = sum(weight * (tap == label) for tap, weight in zip(taps, weights, strict=True))
        voted = np.where(share > 0.5, label, voted)
    resized[rows, columns] = voted
    return resized


def _taps(source: int, target: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """Of each target pixel the two source pixels next to its centre, and the weight of the second."""
    at = np.maximum((np.arange(target, dtype=np.float32) + 0.5) * np.float32(source / target) - 0.5, 0)
    first = np.minimum(np.floor(at).astype(np.intp), source - 1)
    return first, np.minimum(first + 1, source - 1), (at - first).astype(np.float32)


def _of_taps(
    rows: NDArray[np.intp], columns: NDArray[np.intp], y: NDArray[np.intp], x: NDArray[np.intp]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Target pixels (rows, columns) whose first taps, `y` and `x`, are among these source pixels."""
    top, left = np.searchsorted(y, rows), np.searchsorted(x, columns)
    height, width = np.searchsorted(y, rows, "right") - top, np.searchsorted(x, columns, "right") - left
    count = height * width
    of = np.repeat(np.arange(len(count)), count)
    down, right = np.divmod(np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count), width[of])
    return top[of] + down, left[of] + right


def mirror(maps: Map) -> Map:
    """Label maps [.., H, W] from left to right."""
    flipped: Any = cv2.flip(maps.reshape(-1, maps.shape[-1]), 1)
    return flipped.reshape(maps.shape)


@dataclass(frozen=True)
class Colour:
    """A change of colours, the same for all frames of a clip.

    `hue` in OpenCV's half degrees, `saturation` of 255, `contrast` a factor around 127, `brightness` added to
    the bright channel of one of six colour spaces.
    """

    hue: int
    saturation: int
    contrast: float
    brightness: int
    space: int

    @classmethod
    def draw(cls, random: np.random.Generator, spread: str) -> Colour | None:
        """A random change; `spread` is "wide", "narrow", or "none" for no change."""
        if spread == "none":
            return None
        tint, light = SPREAD[spread]
        hue, saturation = random.integers(-tint, tint + 1, 2)
        return cls(
            hue=int(hue / 255 * HUES),
            saturation=int(saturation),
            contrast=float(random.uniform(1 - CONTRAST, 1 + CONTRAST)),
            brightness=round(random.uniform(-light, light)),
            space=int(random.integers(len(BRIGHTNESS))),
        )

    def apply(self, image: Picture) -> Picture:
        """[H, W, 3] RGB; the original took BGR for RGB."""
        # two buffers for all steps: in fresh memory some take longer (measured: 0.3 -> 1.5 ms an add)
        x, y = np.empty_like(image), np.empty_like(image)
        cv2.cvtColor(image, cv2.COLOR_RGB2HSV, x)
        if self.hue:
            turned = ((np.arange(256) + self.hue) % HUES).astype(np.uint8)
            cv2.insertChannel(cv2.LUT(cv2.extractChannel(x, 0), turned), x, 0)
        cv2.add(x, np.array([0.0, self.saturation, 0, 0]), x)
        cv2.cvtColor(x, cv2.COLOR_HSV2RGB, y)
        level = MIDDLE + self.contrast * (np.arange(256) - MIDDLE)
        cv2.LUT(y, np.clip(np.rint(level), 0, 255).astype(np.uint8), y)
        return brighter(y, self.space, self.brightness, x)


def brighter(image: Picture, space: int, brightness: int, spare: Picture | None = None) -> Picture:
    """Brightness added to an image in one of the spaces, in place; `spare` is memory of the same size."""
    x = np.empty_like(image) if spare is None else spare
    if space in CURVED:
        code = cv2.cvtColor(image, cv2.COLOR_RGB2BGR565).view(np.uint16)[..., 0]
        change = _lightening(space, brightness).take(code).view(np.uint8).reshape(*code.shape, 4)
        cv2.cvtColor(change, cv2.COLOR_RGBA2RGB, x)
        cv2.addWeighted(image, 1, x, 1, -ZERO, image)
        return image
    there, back, channel = BRIGHTNESS[space]
    added = np.zeros(4)
    added[channel] = brightness
    cv2.cvtColor(image, there, x)
    cv2.add(x, added, x)
    cv2.cvtColor(x, back, image)
    return image


@cache
def _lightening(space: int, brightness: int) -> NDArray[np.uint32]:
    """What a change of brightness adds to R, G and B: a byte each, `ZERO` for nothing, by 565 code [65536].

    It hardly differs between the colours of a code. Computed in float32 for their middle, it is closer to
    what is meant than there and back in bytes (mean error over all colours 0.3 to 0.8 against 0.6 to 1.5), in
    a quarter of the time. There are 102 such tables of 256 KB.
    """
    there, back, _ = BRIGHTNESS[space]
    codes = np.arange(2**16, dtype=np.uint16).view(np.uint8).reshape(256, 256, 2)
    colours = cv2.cvtColor(codes, cv2.COLOR_BGR5652RGB) & np.array([0xF8, 0xFC, 0xF8], np.uint8)
    middle = (colours + np.array([3.5, 1.5, 3.5])).astype(np.float32)
    light: Any = cv2.cvtColor(middle / 255, there)
    # of 100; at 0 colours have no end
    light[..., 0] = np.clip(light[..., 0] + brightness * 100 / 255, np.minimum(light[..., 0], 1), 100)
    added = np.rint(255 * cv2.cvtColor(light, back) - middle)
    packed = np.full((256, 256, 4), ZERO, np.uint8)
    packed[..., :3] = np.clip(added + ZERO, 0, 255)
    return packed.view(np.uint32).ravel()


def affine(scale: float, rotation: float, shear: float) -> NDArray[np.float64]:
    """[2, 2], from source to target: shear along y, then rotation with shear along x, then scale; radians."""
    along_y = np.array([[math.cos(shear), 0], [math.sin(shear), 1]])
    turn = [
        [math.cos(rotation), -math.sin(rotation + shear)],
        [math.sin(rotation), math.cos(rotation + shear)],
    ]
    return scale * np.array(turn) @ along_y


def about_centre(matrix: NDArray[np.float64], size: Size) -> NDArray[np.float64]:
    """A map [2, 2] of pixels (x, y) as one [3, 3] that leaves the centre of the picture where it is."""
    centre = np.array([size[1] / 2 - 0.5, size[0] / 2 - 0.5])
    full = np.eye(3)
    full[:2, :2] = matrix
    full[:2, 2] = centre - matrix @ centre
    return full


def resizing(source: Size, target: Size) -> NDArray[np.float64]:
    """[3, 3] that takes pixels (x, y) of one size to another; pixels have their centres at whole numbers."""
    x, y = target[1] / source[1], target[0] / source[0]
    return np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])


def mirrored(size: Size) -> NDArray[np.float64]:
    """[3, 3] that flips a picture from left to right."""
    return np.array([[-1.0, 0, size[1] - 1], [0, 1, 0], [0, 0, 1]])


def shift(x: float, y: float) -> NDArray[np.float64]:
    """[3, 3]."""
    return np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]])


def warp_image(image: Picture, matrix: NDArray[np.float64], size: Size) -> Picture:
    """An image through a map [3, 3] from source to target: bilinear, black outside."""
    return np.asarray(cv2.warpAffine(image, matrix[:2], size[::-1], flags=cv2.INTER_LINEAR), np.uint8)


def warp_labels(labels: Map, matrix: NDArray[np.float64], size: Size, nothing: int) -> Map:
    """A label map [H, W] through the same map: the nearest pixel, `nothing` outside."""
    warped: Any = cv2.warpAffine(
        labels, matrix[:2], size[::-1], flags=cv2.INTER_NEAREST, borderValue=(nothing,) * 4
    )
    return warped
