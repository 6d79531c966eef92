"""Masks as COCO run-length codes: what is kept of a mask once its frame is finished."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco
from torch import Tensor

from tarvis.structures import RLE, Size


def encode(masks: Tensor | NDArray[np.bool_]) -> list[RLE]:
    """Masks [N, H, W] (bool, or numbers where non-zero is inside; any device) -> N codes."""
    array = masks.cpu().numpy() if isinstance(masks, Tensor) else masks
    if array.ndim != 3:
        raise ValueError(f"expected masks [N, H, W], got {list(array.shape)}")
    # pycocotools reads columns first; one mask at a time keeps the transposed copy small
    return [coco.encode(np.asfortranarray(mask != 0).view(np.uint8)) for mask in array]


def decode(rle: RLE) -> NDArray[np.bool_]:
    """The mask [H, W]."""
    mask: NDArray[np.uint8] = coco.decode(rle)
    return mask.view(np.bool_)


def area(rle: RLE) -> int:
    """Number of pixels."""
    return int(coco.area(rle))


def empty(size: Size) -> RLE:
    """The mask without pixels."""
    return encode(np.zeros((1, *size), bool))[0]


def union(masks: Sequence[RLE]) -> RLE:
    """Pixels of any of the masks (at least one, all of the same size)."""
    return coco.merge(list(masks))


def subtract(mask: RLE, taken: RLE) -> RLE:
    """Pixels of `mask` outside `taken`."""
    if not area(coco.merge([mask, taken], intersect=True)):
        return mask
    return encode((decode(mask) & ~decode(taken))[None])[0]
