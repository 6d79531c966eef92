"""Masks as COCO run-length codes: what is kept of a mask once its frame is finished."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterator, Sequence

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


class FrameLog:
    """Finished frames of a video, packed, until its end decides what becomes of them.

    A frame costs the bytes of its codes and no objects: 5 000 frames of ten masks at 480p are a few
    megabytes. Iterating gives back (frame, {track id: code}) in the order of `append`.
    """

    def __init__(self) -> None:
        self._frames: list[bytes] = []
        self._size: list[int] = []

    def append(self, frame: int, masks: dict[int, RLE]) -> None:
        for mask in masks.values():
            self._size = mask["size"]  # the same for all
        packed = pickle.dumps((frame, {track: mask["counts"] for track, mask in masks.items()}))
        self._frames.append(zlib.compress(packed))

    def __iter__(self) -> Iterator[tuple[int, dict[int, RLE]]]:
        for packed in self._frames:
            frame, counts = pickle.loads(zlib.decompress(packed))
            yield frame, {track: RLE(size=self._size, counts=c) for track, c in counts.items()}
