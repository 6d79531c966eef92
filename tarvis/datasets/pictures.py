"""Pictures of benchmarks: their size, and the palette of those that hold ids."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from tarvis.structures import InputError, Size


def voc_palette() -> NDArray[np.uint8]:
    """Colours [256, 3] of DAVIS and Pascal VOC. Bits 3k, 3k + 1, 3k + 2 of i are bits 7 - k of R, G, B."""
    index = np.arange(256)
    bits = index[:, None] >> np.arange(8) & 1  # [256, 8]
    high = np.array([128, 64, 32])
    return np.stack([bits[:, c::3] @ high[: len(range(c, 8, 3))] for c in range(3)], 1).astype(np.uint8)


def image_size(path: Path) -> Size:
    """Size of an image as it is shown to the network.

    Raises:
        InputError: it is not there, or is no image.
    """
    try:
        image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except cv2.error:  # an empty file
        image = None
    if image is None:
        raise InputError(f"{path}: is no image")
    return image.shape[0], image.shape[1]
