"""COCO's panoptic format, as Cityscapes-VPS and VIPSeg use it: RGB pictures of ids, lists of segments."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tarvis.files.pictures import read_rgb
from tarvis.files.records import Entry
from tarvis.metrics.overlaps import Overlaps, overlaps
from tarvis.metrics.vpq import Segments
from tarvis.structures import InputError

LARGEST_ID = 2**24 - 1


class Frame(NamedTuple):
    """What is true and predicted of a frame. Predicted segments are the ones that have pixels."""

    shared: Overlaps
    truth: Segments
    predicted: Segments


def read_categories(root: Entry) -> dict[int, bool]:
    """Whether a class is a thing, by its id."""
    is_thing: dict[int, bool] = {}
    for entry in root["categories"].entries():
        category = entry["id"].integer(0, LARGEST_ID)
        if category in is_thing:
            raise entry["id"].error(f"id {category} comes twice")
        is_thing[category] = entry["isthing"].flag()
    return is_thing


def read_frame(
    truth: Entry, true_picture: Path, predicted: Entry, picture: Path, categories: Collection[int]
) -> Frame:
    """One frame, checked. Truth pixels whose id is not listed count as nothing, not even as void."""
    true_ids, ids = read_panoptic(true_picture), read_panoptic(picture)
    if ids.shape != true_ids.shape:
        raise InputError(f"{picture}: expected a picture of {true_ids.shape}, as the truth, got {ids.shape}")
    shared = overlaps(true_ids, ids)
    present = np.unique(shared.predicted[shared.predicted > 0])
    segments = listed_segments(predicted, present, picture, categories)
    return Frame(shared, read_segments(truth, categories, has_area=True), segments)


def listed_segments(
    predicted: Entry, present: NDArray[np.integer], picture: Path, categories: Collection[int]
) -> Segments:
    """The segments listed for a frame, which must be those `present` in its picture."""
    segments = read_segments(predicted, categories, has_area=False)
    unlisted, unseen = np.setdiff1d(present, segments.ids), np.setdiff1d(segments.ids, present)
    if unlisted.size:
        raise predicted["segments_info"].error(f"lacks id {unlisted[0]}, which has pixels in {picture}")
    if unseen.size:
        raise predicted["segments_info"].error(f"lists id {unseen[0]}, which has no pixels in {picture}")
    return segments


def read_panoptic(path: Path) -> NDArray[np.int32]:
    """Ids [H, W] of a picture: R + 256 G + 65536 B."""
    try:
        rgb = read_rgb(path)
    except ValueError as error:
        raise InputError(str(error)) from None
    padded = np.zeros((*rgb.shape[:2], 4), np.uint8)
    padded[..., :3] = rgb
    ids: NDArray[np.int32] = padded.view("<i4")[..., 0].astype(np.int32, copy=False)
    return ids


def read_segments(entry: Entry, categories: Collection[int], *, has_area: bool) -> Segments:
    """The segments listed for a frame."""
    ids, labels, crowd, areas = [], [], [], []
    for segment in entry["segments_info"].entries():
        ids.append(segment["id"].integer(1, LARGEST_ID))
        labels.append(segment["category_id"].integer())
        if labels[-1] not in categories:
            raise segment["category_id"].error(f"category {labels[-1]} is unknown")
        if ids[-1] in ids[:-1]:
            raise segment["id"].error(f"id {ids[-1]} comes twice")
        crowd.append(segment.is_set("iscrowd"))
        areas.append(segment["area"].integer() if has_area else 0)
    return Segments(
        np.array(ids, np.int64), np.array(labels, np.int64), np.array(crowd, bool), np.array(areas, np.int64)
    )
