"""Training clips of images: every frame is the image, turned, sheared, scaled and cut anew."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tarvis.data.batch import Sample
from tarvis.data.clips import Kind
from tarvis.data.layers import frame_layers, present, renumber, stack_layers
from tarvis.data.settings import SetSettings
from tarvis.data.transforms import (
    Colour,
    about_centre,
    affine,
    mirrored,
    resize_labels,
    resizing,
    shift,
    warp_image,
    warp_labels,
)
from tarvis.datasets.benchmark import FrameTruth
from tarvis.files.pictures import Window, read_window
from tarvis.stitch.resize import network_size, resize_frame
from tarvis.structures import VOID, InputError, Size

SCALES = (0.9, 1.1)
ROTATION = math.radians(20)
SHEAR = math.radians(10)


class LabelledImage(Protocol):
    """An image of `tarvis.datasets.image_sets`, or of `tarvis.datasets.own`."""

    @property
    def name(self) -> str: ...
    @property
    def image(self) -> Path: ...
    @property
    def size(self) -> Size: ...
    @property
    def labels(self) -> Mapping[int, int]:
        """Class of each object."""
        ...

    def read_map(self) -> FrameTruth: ...


class ImageClips:
    """A training set of images. In vos a clip begins with a frame that shows objects, and has only those."""

    def __init__(
        self,
        name: str,
        images: Sequence[LabelledImage],
        settings: SetSettings,
        *,
        clip_length: int = 3,
        max_objects: int = 8,
    ) -> None:
        if not images:
            raise InputError(f"cannot train on {name}: no image shows an object")
        self.name = name
        self._images = images
        self._settings = settings
        self._length = clip_length
        self._max_objects = max_objects

    def kinds(self) -> dict[Kind, int]:
        """As `VideoClips.kinds`; in vos a batch has as many objects as its clip with the fewest."""
        return {Kind(task): len(self._images) for task in self._settings.tasks}

    def origin(self, kind: Kind, item: int) -> str:  # noqa: ARG002
        """The name of the image."""
        return self._images[item].name

    def draw(self, kind: Kind, item: int, random: np.random.Generator) -> Sample | None:
        """A clip of an image; None where it shows no object.

        Raises:
            InputError: a file cannot be used; the message names it.
        """
        image, settings = self._images[item], self._settings
        size = image.size
        if settings.reduce_to is not None:
            size = network_size(size, settings.reduce_to, settings.max_size)
        colour = Colour.draw(random, settings.colour)
        mirror = mirrored(size) if settings.flip and random.random() < 0.5 else np.eye(3)
        views, target = self._views(size, random)
        views = [view @ mirror for view in views]

        truth, whole = image.read_map(), Window(0, 0, *image.size)
        objects = list(image.labels)
        maps = frame_layers(truth, objects, whole, size)
        layers = stack_layers([[warp_labels(each, view, target, 0) for each in maps] for view in views])
        shows = present(layers, len(objects))
        if not shows.any():
            return None
        if kind.is_given:
            frames = np.array(
                [present(layers[:, t], len(objects)) for t in range(self._length)]
            )  # [T, N + 1]
            first = int(random.choice(np.flatnonzero(frames.any(1))))
            views.insert(0, views.pop(first))
            layers = np.concatenate((layers[:, first : first + 1], np.delete(layers, first, 1)), 1)
            chosen = random.permutation(np.flatnonzero(frames[first]))[: self._max_objects]
            order = np.zeros(len(objects) + 1, layers.dtype)
            order[chosen] = np.arange(1, len(chosen) + 1)
            layers, objects = order.take(layers), [objects[k - 1] for k in chosen]
            shows = np.ones(len(objects) + 1, bool)
        pixels = resize_frame(read_window(image.image, whole, size, image.size), size)
        if colour is not None:
            pixels = colour.apply(pixels)
        classes = None
        if kind.needs_stuff:
            if truth.semantic is None:
                raise InputError(f"image {image.name!r} has no labels of stuff, which {kind.task} needs")
            semantic = resize_labels(truth.semantic, size, VOID)
            classes = np.stack([warp_labels(semantic, view, target, VOID) for view in views])
        return Sample(
            f"{self.name}: {image.name}",
            np.stack([warp_image(pixels, view, target) for view in views]),
            *renumber(layers, shows, [image.labels[id_] for id_ in objects]),
            classes,
        )

    def _views(self, size: Size, random: np.random.Generator) -> tuple[list[NDArray[np.float64]], Size]:
        """Maps [3, 3] from the image to each of the frames, and the size of the frames."""
        settings = self._settings
        draws = random.random((self._length, 6))
        if settings.same_crop:
            draws[:, 4:] = draws[0, 4:]
        sizes = [network_size(size, _one_of(settings.min_sizes, u), settings.max_size) for u in draws[:, 3]]
        target = (
            min(settings.image_size[0], *(height for height, _ in sizes)),
            min(settings.image_size[1], *(width for _, width in sizes)),
        )
        views = []
        for (scale, rotation, shear, _, y, x), resized in zip(draws, sizes, strict=True):
            matrix = affine(
                SCALES[0] + scale * (SCALES[1] - SCALES[0]),
                ROTATION * (2 * rotation - 1),
                SHEAR * (2 * shear - 1),
            )
            top, left = int(y * (resized[0] - target[0] + 1)), int(x * (resized[1] - target[1] + 1))
            views.append(shift(-left, -top) @ resizing(size, resized) @ about_centre(matrix, size))
        return views, target


def _one_of(sizes: Sequence[int] | None, uniform: float) -> int | None:
    return None if sizes is None else sizes[int(uniform * len(sizes))]
