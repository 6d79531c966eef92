"""Sizes a video is fed to the network at, and how frames and given masks get there."""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tarvis.structures import Size


def network_size(original: Size, min_size: int | None, max_size: int) -> Size:
    """The shorter side becomes `min_size`, or less if the longer one would exceed `max_size`.

    Sides are rounded half to even, as in the published code; no side gets smaller than one pixel. `None`
    keeps the original size, whatever `max_size` says.
    """
    if min_size is None:
        return original
    scale = min_size / min(original)
    if scale * max(original) > max_size:
        scale = max_size / max(original)
    height, width = original
    return max(1, round(scale * height)), max(1, round(scale * width))


def area_size(original: Size, pixels: int) -> Size:
    """The size of about `pixels` pixels and the original shape (the published `pixel_area` rule)."""
    height = max(1, math.floor(math.sqrt(pixels * original[0] / original[1])))
    return height, max(1, pixels // height)


def resize_frame(frame: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """A uint8 image [H, W, 3] at another size: OpenCV bilinear without antialiasing."""
    if frame.shape[:2] == size:
        return frame
    return cv2.resize(frame, size[::-1], interpolation=cv2.INTER_LINEAR)  # type: ignore[return-value]


def resize_mask(mask: Tensor, size: Size) -> Tensor:
    """A bool mask [H, W] at another size: bilinear in float32, then > 0.5."""
    if tuple(mask.shape) == size:
        return mask.bool()
    values = F.interpolate(mask.bool()[None, None].float(), size, mode="bilinear", align_corners=False)
    return values[0, 0] > 0.5
