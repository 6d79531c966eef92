"""YouTube-VIS 2019, 2021 and OVIS: AP and AR of tracks.

    results: results.json, or a folder with it
    truth:   instances.json, with annotations

A result is a list of {video_id, category_id, score, segmentations: [code or null, one a frame]}.

Numbers: AP, AP50, AP75, AP_{small,medium,large}, AR_{1,10,100}, AR_{small,medium,large}, for OVIS also
{AP,AR}_occ_{light,medium,heavy}, and per_category/<id>/{AP,AR_100}; in [0, 1], -1 where there is no truth.

The files are held in memory, as JSON wants it; masks are looked at video by video.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tarvis.files import rle
from tarvis.files.records import Entry, read_json
from tarvis.metrics.track_ap import (
    AREA_RANGES,
    OCCLUSION_LEVELS,
    OCCLUSION_RANGES,
    Floats,
    TrackAP,
    best_first,
    occlusion_score,
    outside,
    summary,
)
from tarvis.structures import RLE, Size

LONGEST_SIDE = 2**14
EVERYTHING = {"all": (0.0, 1e10)}

Tube = list[RLE | None]


@dataclass(frozen=True)
class _Video:
    size: Size
    length: int
    truths: list[Entry]
    predictions: list[Entry]


@dataclass(frozen=True)
class _Tracks:
    """Tracks of a video; arrays [N]."""

    tubes: list[Tube]
    categories: NDArray[np.int64]
    areas: Floats  # mean over frames with any pixel


def evaluate(results: Path, truth: Path, videos: Collection[str] | None = None) -> dict[str, float]:
    """The numbers of YouTube-VIS, of all videos of the truth or of those named (see `video_name`)."""
    return _evaluate(results, truth, videos, has_occlusion=False)


def evaluate_ovis(results: Path, truth: Path, videos: Collection[str] | None = None) -> dict[str, float]:
    """The numbers of OVIS: those of YouTube-VIS and of levels of occlusion."""
    return _evaluate(results, truth, videos, has_occlusion=True)


def _evaluate(
    results: Path, truth: Path, names: Collection[str] | None, *, has_occlusion: bool
) -> dict[str, float]:
    categories, videos = _read(results / "results.json" if results.is_dir() else results, truth, names)
    of_area = EVERYTHING | AREA_RANGES
    ap = TrackAP([*of_area, *(OCCLUSION_RANGES if has_occlusion else ())])
    for key in sorted(videos):
        video = videos[key]
        true = _read_tracks(video.truths, video, has_areas=True)
        predicted = _read_tracks(video.predictions, video, has_areas=False)
        scores = np.array([entry["score"].number() for entry in video.predictions])
        crowd = np.array([entry.is_set("iscrowd") for entry in video.truths], bool)
        true_outside, predicted_outside = outside(true.areas, of_area), outside(predicted.areas, of_area)
        if has_occlusion:
            levels = np.array([_occlusion(entry, video.length) for entry in video.truths], float)
            true_outside = np.concatenate([true_outside, outside(levels, OCCLUSION_RANGES)])
            nowhere = np.zeros((len(OCCLUSION_RANGES), len(scores)), bool)  # predictions have no level
            predicted_outside = np.concatenate([predicted_outside, nowhere])
        for category in np.union1d(true.categories, predicted.categories).tolist():
            g = np.flatnonzero(true.categories == category)
            d = np.flatnonzero(predicted.categories == category)
            d = d[best_first(scores[d])]
            ap.add(
                category,
                tube_iou([predicted.tubes[k] for k in d], [true.tubes[k] for k in g]),
                scores[d],
                crowd=crowd[g],
                truth_outside=true_outside[:, g],
                predicted_outside=predicted_outside[:, d],
            )
    return summary(ap, categories)


def tube_iou(tubes: Sequence[Tube], others: Sequence[Tube]) -> Floats:
    """IoU of tracks [D, G]: pixels shared in all frames over pixels of either; masks may be None."""
    shared = np.zeros((len(tubes), len(others)))
    if not tubes or not others:
        return shared
    for t in range(len(tubes[0])):
        rows = [(k, mask) for k, tube in enumerate(tubes) if (mask := tube[t]) is not None]
        columns = [(k, mask) for k, tube in enumerate(others) if (mask := tube[t]) is not None]
        if rows and columns:
            index = np.ix_([k for k, _ in rows], [k for k, _ in columns])
            shared[index] += rle.shared_pixels([mask for _, mask in rows], [mask for _, mask in columns])
    union = _pixels(tubes)[:, None] + _pixels(others) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def video_name(entry: Entry) -> str:
    """What a video is called: the folder of its frames, which are all in one."""
    folders = {file.path().rpartition("/")[0] for file in entry["file_names"].entries()}
    if len(folders) != 1 or "" in folders:
        raise entry["file_names"].error("expected frames of one folder, each as FOLDER/FRAME.jpg")
    return folders.pop()


def _read(results: Path, truth: Path, names: Collection[str] | None) -> tuple[list[int], dict[int, _Video]]:
    """Category ids, and videos by id (all, or those named) with what is true and predicted of them."""
    root = read_json(truth)
    if root.get("annotations") is None:
        raise root.error("has no 'annotations': the truth of this split is not public")
    categories: set[int] = set()
    for entry in root["categories"].entries():
        categories.add(_new_id(entry, categories))
    videos: dict[int, _Video] = {}
    for entry in root["videos"].entries():
        size = entry["height"].integer(1, LONGEST_SIDE), entry["width"].integer(1, LONGEST_SIDE)
        length = len(entry["file_names"].entries())
        videos[_new_id(entry, videos)] = _Video(size, length, [], [])
    seen: set[int] = set()
    for entry in root["annotations"].entries():
        seen.add(_new_id(entry, seen))
        _video_of(entry, videos, categories).truths.append(entry)
    for entry in read_json(results).entries():
        _video_of(entry, videos, categories).predictions.append(entry)
    if names is not None:
        by_name = {video_name(entry): entry["id"].integer() for entry in root["videos"].entries()}
        if unknown := set(names) - by_name.keys():
            raise root["videos"].error(f"has no video {min(unknown)!r}")
        videos = {by_name[name]: videos[by_name[name]] for name in names}
    return sorted(categories), videos


def _video_of(entry: Entry, videos: dict[int, _Video], categories: set[int]) -> _Video:
    video, category = entry["video_id"].integer(), entry["category_id"].integer()
    if video not in videos:
        raise entry["video_id"].error(f"video {video} is unknown to the truth")
    if category not in categories:
        raise entry["category_id"].error(f"category {category} is unknown to the truth")
    return videos[video]


def _new_id(entry: Entry, seen: set[int] | dict[int, _Video]) -> int:
    number = entry["id"].integer()
    if number in seen:
        raise entry["id"].error(f"id {number} comes twice")
    return number


def _read_tracks(entries: list[Entry], video: _Video, *, has_areas: bool) -> _Tracks:
    """Tracks of a video; with `has_areas`, areas are those listed, if there are any, as evaluators do it."""
    tubes = read_tubes(entries, video.size, video.length)
    areas = []
    for entry, tube in zip(entries, tubes, strict=True):
        listed = entry.get("areas") if has_areas else None
        if listed is not None:
            frames = listed.entries(video.length, "areas, one a frame")
            values = [0.0 if area.value is None else area.number() for area in frames]
        else:
            values = [float(rle.area(mask)) for mask in tube if mask is not None]
        visible = [area for area in values if area]
        areas.append(sum(visible) / len(visible) if visible else 0.0)
    categories = [entry["category_id"].integer() for entry in entries]
    return _Tracks(tubes, np.array(categories, np.int64), np.array(areas, float))


def read_tubes(entries: Sequence[Entry], size: Size, length: int) -> list[Tube]:
    """The masks of all tracks of a video of `length` frames, checked in one go."""
    tubes: list[Tube] = [[None] * length for _ in entries]
    places: list[tuple[int, int, Entry]] = []
    codes: list[str | list[int]] = []
    for k, entry in enumerate(entries):
        for t, mask in enumerate(entry["segmentations"].entries(length, "segmentations, one a frame")):
            if mask.value is None:
                continue
            if mask["size"].value != list(size):
                raise mask["size"].expected(f"{list(size)}, the size of the video")
            counts = mask["counts"].value
            if not isinstance(counts, str | list):
                raise mask["counts"].expected("a string or a list")
            places.append((k, t, mask))
            codes.append(counts)
    try:
        masks = rle.from_file(codes, size)
    except rle.BadCode as error:
        raise places[error.index][2]["counts"].expected(f"a run-length code of {size}") from None
    for (k, t, _), mask_code in zip(places, masks, strict=True):
        tubes[k][t] = mask_code
    return tubes


def _occlusion(entry: Entry, length: int) -> float:
    levels = entry["occlusion"].entries(length, "levels of occlusion, one a frame")
    for level in levels:
        if level.value is not None and level.text() not in OCCLUSION_LEVELS:
            raise level.expected(" or ".join(OCCLUSION_LEVELS))
    return occlusion_score(level.value for level in levels)


def _pixels(tubes: Sequence[Tube]) -> Floats:
    return np.array([sum(rle.area(mask) for mask in tube if mask is not None) for tube in tubes], float)
