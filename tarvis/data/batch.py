"""Training clips in their compact form for transfer: label maps in bytes, made into masks on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarvis.structures import Size

Labels = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Sample:
    """One clip.

    Args:
        name: of the set, the video and its frames, for messages.
        frames: [T, H, W, 3] RGB.
        layers: [S, T, H, W] numbers of objects, 1 .. N, 0 where there is none. Objects that share pixels are
            in different layers; nearly always S is 1.
        labels: class of each object, from 0; -1 where objects have none.
        semantic: [T, H, W] classes from 0, `VOID` where there is none; None where only objects are labelled.
    """

    name: str
    frames: NDArray[np.uint8]
    layers: Labels
    labels: tuple[int, ...]
    semantic: NDArray[np.uint8] | None = None

    @property
    def size(self) -> Size:
        return self.frames.shape[1], self.frames.shape[2]

    def mask(self, number: int, t: int = 0) -> NDArray[np.bool_]:
        """The mask [H, W] of an object in frame t."""
        return np.any(self.layers[:, t] == number, 0)

    def first_objects(self, count: int) -> Sample:
        """The same clip with no more than the first `count` objects."""
        if count >= len(self.labels):
            return self
        layers = np.where(self.layers <= count, self.layers, 0)
        return dataclasses.replace(self, layers=layers, labels=self.labels[:count])


@dataclass(frozen=True)
class Batch:
    """Clips of one set and task, padded right and bottom to one size.

    Args:
        set_name: the training set, which is also the class set of its labels; `task`: vis, vps or vos.
        names: of the clips.
        frames: [B, T, 3, H, W] uint8 RGB; 128 in the padding.
        layers: [B, S, T, H, W] uint8 or int16, as `Sample.layers`.
        counts: objects of each clip; the same for all in vos, whose objects are seen in frame 0.
        labels: [sum of counts] int64 classes of all objects, from 0; -1 where they have none.
        semantic: [B, T, H, W] uint8, 255 in the padding and where there is no label; vps only.
        extent: [B, 2] float32, the share (x, y) of the padded frame that shows the clip.
        points: [B, P, 2] float32 (y, x), shares of the padded frame: where the last P objects of each clip
            are given in frame 0. The others are given by their masks there.
    """

    set_name: str
    task: str
    names: tuple[str, ...]
    frames: Tensor
    layers: Tensor
    counts: tuple[int, ...]
    labels: Tensor
    semantic: Tensor | None
    extent: Tensor
    points: Tensor

    @property
    def num_targets(self) -> int:
        """Objects of all clips."""
        return sum(self.counts)

    @property
    def num_points(self) -> int:
        return self.points.shape[1]

    def masks(self) -> list[Tensor]:
        """Of every clip the masks of its objects [N, T, H, W] bool, made where the layers are."""
        return [
            (layers == torch.arange(1, count + 1, device=layers.device).view(-1, 1, 1, 1, 1)).any(1)
            if layers.shape[0] > 1
            else layers == torch.arange(1, count + 1, device=layers.device).view(-1, 1, 1, 1)
            for layers, count in zip(self.layers, self.counts, strict=True)
        ]

    def labels_by_clip(self) -> list[Tensor]:
        """[N] of every clip."""
        return list(self.labels.split(list(self.counts)))

    def to(self, device: torch.device | str) -> Batch:
        """On a device; without waiting where the memory is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """DataLoader calls this."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed: dict[str, Any] = {k: change(x) for k, x in fields.items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, **changed)
