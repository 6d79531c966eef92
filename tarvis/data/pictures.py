"""Parts of images, decoded no larger than they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from tarvis.data.transforms import Image
from tarvis.structures import InputError, Size

REDUCED = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}
JPEG = b"\xff\xd8"


class Window(NamedTuple):
    """A part of an image."""

    top: int
    left: int
    height: int
    width: int

    @property
    def box(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    def aligned(self, target: Size, size: Size) -> Window:
        """The window, a little larger if `read_window` can then decode the image at a part of its size."""
        factor = reduction((self.height, self.width), target)
        top, left = self.top // factor * factor, self.left // factor * factor
        bottom = min(-(-(self.top + self.height) // factor) * factor, size[0])
        right = min(-(-(self.left + self.width) // factor) * factor, size[1])
        return Window(top, left, bottom - top, right - left)


def reduction(size: Size, target: Size) -> int:
    """By how much sides may be divided (1, 2, 4 or 8) so that they stay as large as `target`."""
    return next((f for f in REDUCED if f * target[0] <= size[0] and f * target[1] <= size[1]), 1)


def read_window(path: Path, window: Window, target: Size, size: Size | None) -> Image:
    """A part of an image, RGB [H, W, 3], as large as `target` or larger, if it is so in the file.

    A JPEG of which half the pixels a side suffice is decoded at a half, or less: see `Window.aligned`.

    Args:
        size: of the whole image, where it is known.

    Raises:
        InputError: the file is missing, damaged, or of another size.
    """
    factor = 1 if size is None else reduction((window.height, window.width), target)
    if window.top % factor or window.left % factor:
        factor = 1
    bgr, factor = _decode(path, factor)
    if size is not None and bgr.shape[:2] != (-(-size[0] // factor), -(-size[1] // factor)):
        raise InputError(f"{path}: expected an image of {size}, as its annotations say, got {bgr.shape[:2]}")
    bottom, right = window.top + window.height, window.left + window.width
    part = bgr[
        window.top // factor : -(-bottom // factor),
        window.left // factor : -(-right // factor),
    ]
    return np.asarray(cv2.cvtColor(part, cv2.COLOR_BGR2RGB), np.uint8)


def _decode(path: Path, factor: int) -> tuple[Any, int]:
    """An image, BGR, its sides divided by the factor if it is a JPEG; and by what they were."""
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if data[:2].tobytes() != JPEG:
        factor = 1  # others would be decoded in full, then resized
    try:
        bgr = cv2.imdecode(data, REDUCED.get(factor, cv2.IMREAD_COLOR))
    except cv2.error:  # an empty file
        bgr = None
    if bgr is None:
        raise InputError(f"{path}: not an image that can be read (truncated, or another kind of file)")
    return bgr, factor
