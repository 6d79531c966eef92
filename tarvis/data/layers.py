"""Pack object masks, which may overlap, into the fewest label maps (numbers from 1)."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from tarvis.data.batch import Labels
from tarvis.data.transforms import resize_labels
from tarvis.datasets.benchmark import FrameTruth, Truth
from tarvis.files import rle
from tarvis.files.pictures import Window
from tarvis.structures import RLE, Size


def frame_layers(truth: FrameTruth, objects: Sequence[int], window: Window, target: Size) -> list[Labels]:
    """Objects, numbered from 1 as they are listed, in a part of a frame; each map is of size `target`.

    An object that shares pixels with an earlier one, anywhere in the frame, goes into a later map.
    """
    if truth.ids is not None:
        part = truth.ids[window.box]
        return [resize_labels(_lookup(part, objects).take(part), target, 0)]
    masks = truth.masks or {}
    numbers = [k for k, id_ in enumerate(objects, 1) if id_ in masks]
    codes = [masks[objects[k - 1]] for k in numbers]
    shares = rle.shared_pixels(codes, codes) > 0
    members: list[list[int]] = [[]]  # of every map
    for k in range(len(codes)):
        free = next((layer for layer in members if not shares[k, layer].any()), None)
        if free is None:
            members.append([k])
        else:
            free.append(k)
    names: Labels = np.array(numbers, _dtype(len(objects)))
    return [
        resize_labels(_paint([codes[k] for k in layer], names[layer], window), target, 0) for layer in members
    ]


def _paint(codes: Sequence[RLE], numbers: Labels, window: Window) -> Labels:
    """A part of the label map of masks that share no pixels, drawn from their runs."""
    if not codes:
        return np.zeros((window.height, window.width), numbers.dtype)
    starts, stops, mask = rle.runs(codes)
    order = np.argsort(starts)
    # codes go column by column, so the part's columns are next to each other
    height = codes[0]["size"][0]
    ends = np.zeros(2 * len(order) + 2, np.int64)
    ends[1:-1:2], ends[2:-1:2], ends[-1] = starts[order], stops[order], height * (window.left + window.width)
    lengths = np.asarray(np.diff(np.clip(ends, height * window.left, ends[-1])), np.int64)
    labels = np.zeros(len(lengths), numbers.dtype)
    labels[1::2] = numbers[mask[order]]
    columns = np.repeat(labels, lengths).reshape(window.width, height)
    return np.asarray(cv2.transpose(columns[:, window.top : window.top + window.height]), numbers.dtype)


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
    """The maps and the classes of the objects that are `present` [N + 1], which are counted anew from 1."""
    kept = np.flatnonzero(present[1:]).tolist()
    if len(kept) < len(labels):
        numbers = np.zeros(len(present), layers.dtype)
        numbers[[k + 1 for k in kept]] = np.arange(1, len(kept) + 1)
        layers = _renamed(layers, numbers)
    return layers, tuple(labels[k] for k in kept)


def _renamed(labels: Labels, names: Labels) -> Labels:
    """A map [.., H, W] with every number k replaced by `names[k]`."""
    if labels.dtype != np.uint8 or names.dtype != np.uint8:
        return names.take(labels)
    table = np.zeros(256, np.uint8)  # a tenth of the time of take
    table[: len(names)] = names
    renamed = cv2.LUT(np.ascontiguousarray(labels).reshape(-1, labels.shape[-1]), table)
    return np.asarray(renamed, np.uint8).reshape(labels.shape)


def present(layers: Labels, num_objects: int) -> NDArray[np.bool_]:
    """Which of the objects are in label maps [.., H, W]: [N + 1]; never the background."""
    shown = _numbers(layers[..., ::4, ::4], num_objects)
    for number in np.flatnonzero(~shown[1:]) + 1:  # small ones may hide between
        shown[number] = (layers == number).any()
    shown[0] = False
    return shown


def _numbers(layers: Labels, largest: int) -> NDArray[np.bool_]:
    if layers.dtype == np.uint8:  # a third of the time of bincount
        rows = np.ascontiguousarray(layers).reshape(-1, layers.shape[-1])
        return cv2.calcHist([rows], [0], None, [256], [0, 256]).ravel()[: largest + 1] > 0
    return np.bincount(layers.ravel(), minlength=largest + 1) > 0


def frame_size(truth: FrameTruth) -> Size:
    """The size of a frame, for videos that do not give it."""
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
    """A table from every possible id to its number among `objects`; 0 for other ids."""
    numbers = np.zeros(np.iinfo(ids.dtype).max + 1, _dtype(len(objects)))
    numbers[list(objects)] = np.arange(1, len(objects) + 1)
    return numbers


def _dtype(num_objects: int) -> type[np.uint8] | type[np.uint16]:
    return np.uint8 if num_objects < 256 else np.uint16


def union(
    frames: Sequence[FrameTruth], size: Size, objects: Sequence[int] | None = None
) -> NDArray[np.bool_]:
    """Pixels [H, W] that show an object in any of the frames; only those of `objects`, if given."""
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
