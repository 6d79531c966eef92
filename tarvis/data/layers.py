"""Objects in label maps: numbers from 1, in as few maps as objects share pixels."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from tarvis import rle
from tarvis.data.pictures import Window
from tarvis.data.targets import Labels
from tarvis.data.transforms import resize_labels
from tarvis.datasets.benchmark import FrameTruth, Truth
from tarvis.structures import Size


def frame_layers(truth: FrameTruth, objects: Sequence[int], window: Window, target: Size) -> list[Labels]:
    """Objects, numbered from 1 as they are listed, in a part of a frame; each map is of size `target`.

    An object that shares pixels with an earlier one goes to a map behind.
    """
    if truth.ids is not None:
        part = truth.ids[window.box]
        return [resize_labels(_lookup(part, objects).take(part), target, 0)]
    masks = truth.masks or {}
    numbers = {id_: k for k, id_ in enumerate(objects, 1) if id_ in masks}
    # columns first, as the codes are, so that each mask is painted along the memory
    layers = [np.zeros((window.width, window.height), _dtype(len(objects)))]
    boxes = coco.toBbox([masks[id_] for id_ in numbers]).astype(int) if numbers else ()
    for (id_, number), (x, y, w, h) in zip(numbers.items(), boxes, strict=True):
        x0, x1 = max(x, window.left), min(x + w, window.left + window.width)
        y0, y1 = max(y, window.top), min(y + h, window.top + window.height)
        if x0 >= x1 or y0 >= y1:
            continue
        mask = rle.decode(masks[id_]).T[x0:x1, y0:y1]
        place = slice(x0 - window.left, x1 - window.left), slice(y0 - window.top, y1 - window.top)
        layer = next((layer for layer in layers if not layer[place][mask].any()), None)
        if layer is None:
            layer = np.zeros_like(layers[0])
            layers.append(layer)
        layer[place][mask] = number
    return [resize_labels(np.ascontiguousarray(layer.T), target, 0) for layer in layers]


def stack_layers(frames: Sequence[list[Labels]]) -> Labels:
    """The maps of all frames [S, T, H, W]."""
    depth = max(map(len, frames))
    empty = np.zeros_like(frames[0][0])
    return np.stack([
        np.stack([maps[s] if s < len(maps) else empty for maps in frames]) for s in range(depth)
    ])  # fmt: skip


def renumber(
    layers: Labels, present: NDArray[np.bool_], labels: Sequence[int]
) -> tuple[Labels, tuple[int, ...]]:
    """The maps, and the classes of objects, without those objects 1 .. N that are not present [N + 1]."""
    kept = np.flatnonzero(present[1:]).tolist()
    if len(kept) < len(labels):
        numbers = np.zeros(len(present), layers.dtype)
        numbers[[k + 1 for k in kept]] = np.arange(1, len(kept) + 1)
        layers = numbers.take(layers)
    return layers, tuple(labels[k] for k in kept)


def present(layers: Labels, num_objects: int) -> NDArray[np.bool_]:
    """Which of the objects are in label maps [.., H, W]: [N + 1]; never the background."""
    shown = _numbers(layers[..., ::4, ::4], num_objects)
    if not shown[1:].all():  # small ones may hide between
        shown = _numbers(layers, num_objects)
    shown[0] = False
    return shown


def _numbers(layers: Labels, largest: int) -> NDArray[np.bool_]:
    if layers.dtype == np.uint8:  # a third of the time of bincount
        rows = np.ascontiguousarray(layers).reshape(-1, layers.shape[-1])
        return cv2.calcHist([rows], [0], None, [256], [0, 256]).ravel()[: largest + 1] > 0
    return np.bincount(layers.ravel(), minlength=largest + 1) > 0


def frame_size(truth: FrameTruth) -> Size:
    """Of a frame whose video does not say it."""
    if truth.ids is not None:
        return truth.ids.shape[0], truth.ids.shape[1]
    size = next(iter((truth.masks or {}).values()))["size"]
    return size[0], size[1]


def objects_in(frame: FrameTruth, truth: Truth) -> list[int]:
    """Ids of the objects that a frame shows."""
    if frame.ids is not None:
        ids = np.flatnonzero(np.bincount(frame.ids.ravel())).tolist()
        return [id_ for id_ in ids if id_ in truth.labels]
    return [id_ for id_, mask in (frame.masks or {}).items() if id_ in truth.labels and rle.area(mask)]


def _lookup(ids: Labels, objects: Sequence[int]) -> Labels:
    """The number of every id that may be in a map; 0 for those that are not listed."""
    numbers = np.zeros(np.iinfo(ids.dtype).max + 1, _dtype(len(objects)))
    numbers[list(objects)] = np.arange(1, len(objects) + 1)
    return numbers


def _dtype(num_objects: int) -> type[np.uint8] | type[np.uint16]:
    return np.uint8 if num_objects < 256 else np.uint16


def union(
    frames: Sequence[FrameTruth], size: Size, objects: Sequence[int] | None = None
) -> NDArray[np.bool_]:
    """Pixels [H, W] of any object in any frame; of those that are listed, if some are."""
    codes = [
        mask
        for frame in frames
        for id_, mask in (frame.masks or {}).items()
        if objects is None or id_ in objects
    ]
    covered = rle.decode(rle.union(codes)) if codes else np.zeros(size, bool)
    for frame in frames:
        if frame.ids is not None:
            shown = frame.ids if objects is None else _lookup(frame.ids, objects).take(frame.ids)
            covered = covered | (shown != 0)
    return covered
