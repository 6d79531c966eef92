"""Values that the parts of TarViS exchange, from frames to tracks.

Letters used in shapes throughout the repository:

    B clips   T frames of a clip   F frames of a video   C channels   H W height, width of the map at hand
    Q queries   K classes (class logits have K + 1, background is index 0)   N targets of a clip   L levels
    A attention heads   D channels a head   S = sum of H*W over levels   P sampling points or windows
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from tarvis.operators import mask_logits

Size = tuple[int, int]
"""(height, width)."""

VOID = 255
"""Label of pixels that have no class, and in DAVIS belong to no object."""
LONGEST_SIDE = 2**15
"""Of pictures that files may describe."""
MOST_PIXELS = 2**27
"""Of a picture that is decoded: 400 MB of RGB."""
LONGEST_MESSAGE = 300
"""Characters of an error."""
STRIDE = 64
"""The network's input is padded to multiples of this: the side of a window of the temporal neck."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message, one line, names it and says what was expected."""

    longest = LONGEST_MESSAGE

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message), self.longest))


def one_line(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """A message as one line of printable characters; of a long one, its begin and its end."""
    if len(text) > longest:
        text = f"{text[: longest - 101]} ... {text[-96:]}"
    line = " ".join(part.strip() for part in text.splitlines())
    if not line.isprintable():
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return line if len(line) <= longest else f"{line[: longest - 101]} ... {line[-96:]}"


class DamagedError(InputError):
    """Input gave out in the middle of a run, which keeps what it made of the part before."""


class RLE(TypedDict):
    """A binary mask in COCO's compressed run-length code."""

    size: list[int]  # [H, W]
    counts: bytes


@dataclass(frozen=True)
class Geometry:
    """The three sizes of a video: as decoded, as resized for the network, as padded by it."""

    original: Size
    network: Size

    @property
    def padded(self) -> Size:
        """`network` with both sides rounded up to multiples of 64 (right and bottom padding)."""
        h, w = self.network
        return -(-h // STRIDE) * STRIDE, -(-w // STRIDE) * STRIDE

    @property
    def logits(self) -> Size:
        """Size of mask logits: a quarter of `padded`."""
        h, w = self.padded
        return h // 4, w // 4


@dataclass(frozen=True)
class Features:
    """An encoded clip.

    `memory` holds the neck's maps [B, T, C, H/s, W/s] at strides s = 32, 16, 8 (coarse to fine);
    `mask_features` [B, T, C, H/4, W/4] is what queries are dotted with.
    """

    memory: tuple[Tensor, Tensor, Tensor]
    mask_features: Tensor


@dataclass(frozen=True)
class Queries:
    """What is asked of the decoder, as one token sequence.

    `content` and `position` are [B, Q, C]; `groups` gives the number of queries of each group, in order.
    """

    content: Tensor
    position: Tensor
    groups: dict[str, int]


@dataclass(frozen=True)
class Prediction:
    """The decoder's answer: everything needed to make masks, but no mask yet.

    `mask_embedding` [B, Q, C] dotted with `mask_features` [B, T, C, H/4, W/4] gives mask logits, so that
    masks are made once and only for the queries somebody wants. `class_logits` [B, Q_instance, 1 + K],
    background first, is None for queries that have no class (VOS, PET). `layers` holds the predictions
    after 0 .. 8 of the 9 decoder layers where they were asked for (training), else it is empty.
    """

    queries: Tensor
    mask_embedding: Tensor
    mask_features: Tensor
    class_logits: Tensor | None
    groups: dict[str, int]
    layers: tuple[Prediction, ...] = ()

    def rows(self, group: str) -> slice:
        """Where the queries of `group` stand in Q."""
        start = 0
        for name, count in self.groups.items():
            if name == group:
                return slice(start, start + count)
            start += count
        raise KeyError(f"no query group {group!r} among {list(self.groups)}")

    def mask_logits(self, group: str, index: Tensor | None = None) -> Tensor:
        """Mask logits [B, N, T, H/4, W/4] of a group's queries, or of those at `index` [N] within it."""
        embedding = self.mask_embedding[:, self.rows(group)]
        return mask_logits(embedding if index is None else embedding[:, index], self.mask_features)


@dataclass(frozen=True)
class Reference:
    """An object given by the user at one frame of the video: a mask (VOS) or a point (PET).

    Exactly one of `mask` (bool [H, W] at the original size) and `point` ((x, y) in pixels of the original
    size, the pixel's own column and row) is set. Both may be given as arrays of NumPy, as tensors or as
    lists; a mask is where its numbers are not 0.

    Raises:
        InputError: the mask is no [H, W], or the point no (x, y).
    """

    id: int
    frame: int
    mask: Tensor | None = None
    point: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        name = f"object {self.id}, frame {self.frame}"
        try:
            object.__setattr__(self, "id", operator.index(self.id))
            object.__setattr__(self, "frame", operator.index(self.frame))
        except TypeError:
            raise InputError(f"{name}: expected integers") from None
        if self.mask is not None:
            mask = self.mask
            if not isinstance(mask, Tensor):
                mask = torch.from_numpy(np.asarray(_array(mask) != 0))
            if mask.ndim != 2:
                raise InputError(f"{name}: expected a mask [H, W], got {list(mask.shape)}")
            object.__setattr__(self, "mask", mask if mask.dtype == torch.bool else mask != 0)
        if self.point is not None:
            point = self.point.tolist() if isinstance(self.point, Tensor) else _array(self.point).tolist()
            if not isinstance(point, list) or len(point) != 2 or not all(_is_number(x) for x in point):
                raise InputError(f"{name}: expected a point (x, y), got {point}")
            object.__setattr__(self, "point", tuple(map(float, point)))


def _array(values: Any) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except ValueError:  # rows of different lengths
        return np.zeros(())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class PointFeatures(NamedTuple):
    """What the network sees at N points: `features` [N, 4, C] at strides 32, 16, 8, 4; `position` [N, C]."""

    features: Tensor
    position: Tensor


class QuerySource(Protocol):
    """Where a network's queries come from: see `tarvis.model.queries`."""

    def classes(self, class_set: str, batch_size: int = 1) -> Queries: ...
    def objects(self, background: Tensor, objects: Tensor) -> Queries: ...


class ObjectSource(Protocol):
    """Makes contents of object queries: see `tarvis.model.object_encoder`."""

    def __call__(
        self, mask_features: Tensor, masks: Tensor, points: PointFeatures | None = None
    ) -> tuple[Tensor, Tensor]: ...
    def look_up(self, features: Features, frame: Tensor, yx: Tensor, batch: int = 0) -> PointFeatures: ...


class Network(Protocol):
    """What segments videos: `tarvis.model.TarVis`, its compiled form, or exported graphs.

    The methods are documented there; `device` is where frames belong.
    """

    training: bool

    @property
    def device(self) -> torch.device: ...
    @property
    def queries(self) -> QuerySource: ...
    @property
    def object_encoder(self) -> ObjectSource: ...
    def encode(self, frames: Tensor) -> Features: ...
    def extract(self, frames: Tensor) -> tuple[Tensor, ...]: ...
    def fuse(self, pyramid: tuple[Tensor, ...]) -> Features: ...
    def decode(self, features: Features, queries: Queries) -> Prediction: ...
    def eval(self) -> Self: ...
    def requires_grad_(self, requires_grad: bool = True) -> Self: ...
    def to(self, device: torch.device) -> Self: ...


@dataclass(frozen=True)
class FrameResult:
    """One finished frame of one task, streamed while the video is still running.

    `masks` maps track id -> mask at the original size, in painting order (later on top). VIS masks may be
    empty and may overlap. `stuff` is the PNG-compressed uint8 label map [H, W] of stuff classes (VPS only).
    """

    task: str
    frame: int
    masks: dict[int, RLE]
    stuff: bytes | None = None


@dataclass(frozen=True)
class Track:
    """One object through the video. `label` is a 0-based class index; None, as the score, for VOS and PET."""

    id: int
    masks: dict[int, RLE]  # frame -> mask
    label: int | None = None
    score: float | None = None
    source: int | None = None  # the id it had in streamed frames, where that is another


@dataclass(frozen=True)
class VideoResult:
    """All that a task found in a video. `stuff` maps frame -> PNG-compressed uint8 label map (VPS only)."""

    task: str
    size: Size
    num_frames: int
    tracks: tuple[Track, ...]
    stuff: dict[int, bytes] = field(default_factory=dict)


for _structure in (Features, Queries, Prediction):
    pytree.register_dataclass(_structure)  # so that they pass through torch.export
