"""The cases of every operator, by the section of the GPU benchmark that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.case import Case, Scale
from bench.cases import deformable, masks, matched

SECTIONS: dict[str, Callable[[str, Scale], Iterator[Case]]] = {  # of a device and a scale
    "forward": deformable.forward,
    "backward": deformable.backward,
    "bits": masks.bits,
    "attention": masks.attention,
    "upsample": masks.upsample,
    "matching": matched.matching,
    "points": matched.points,
}
