"""BURST: HOTA and AP.

    results: the JSON file of a submission
    truth:   all_classes.json; or a folder with it, and with {common,uncommon}_classes.json for open_world

Modes: `exemplar_guided` (masks, boxes or points in the first frame; ids are those of the truth, which knows
the classes; ids it does not know are dropped), `class_guided` (classes are predicted), `open_world` (none).

Numbers, in percent: {HOTA,DetA,AssA,AP}/{all,common,uncommon}, means over the classes that have truth; for
open_world {OWTA,DetRe,AssA}/{all,common,uncommon}. What has no class is left out.

HOTA compares the *bounding boxes* of masks, as the official script does (it hands boxes to a function for
masks, which takes either); AP compares masks. HOTA leaves out frames without any true object.

Where we differ from the official script: an id in a result of which the truth never heard is dropped in
exemplar_guided (there a KeyError), and a track whose id is 0 is like any other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tarvis.files import rle
from tarvis.files.records import Entry, read_json
from tarvis.metrics.hota import EPSILON, HOTA, Detections, class_means, judged
from tarvis.metrics.track_ap import TrackAP, mean_of_defined
from tarvis.scoring.youtube_vis import LONGEST_SIDE, Tube, tube_iou
from tarvis.structures import RLE, InputError, Size

Mode = Literal["exemplar_guided", "class_guided", "open_world"]

# fmt: off
COMMON = frozenset((
    4, 13, 34, 35, 36, 41, 45, 58, 60, 78, 79, 81, 91, 95, 99, 118, 126, 133, 139, 154, 174, 185, 211,
    221, 229, 235, 237, 276, 299, 347, 371, 382, 392, 428, 429, 452, 475, 480, 502, 544, 579, 621, 625,
    642, 699, 714, 717, 729, 747, 779, 805, 829, 852, 896, 926, 937, 961, 979, 980, 982, 993, 1001,
    1018, 1038, 1057, 1091, 1097, 1099, 1115, 1117, 1122, 1132, 1135, 1144, 1155, 1162, 1215, 1229,
))
# fmt: on
"""Ids of the 78 classes of COCO."""
# fmt: off
DISTRACTORS = frozenset((
    20, 63, 108, 180, 188, 204, 212, 247, 303, 403, 407, 415, 490, 504, 507, 513, 529, 567, 569, 588,
    672, 691, 702, 708, 711, 720, 736, 737, 798, 813, 815, 827, 831, 851, 877, 883, 912, 971, 976, 1130,
    1133, 1134, 1169, 1184, 1220,
))
# fmt: on
"""Ids of classes that are not scored: parts and vague things."""
MERGED = {504: 347, 720: 347, 912: 529, 967: 529, 207: 554, 153: 943, 201: 1175}
"""Classes that TAO counts as another."""
MAX_DETECTIONS = 300
"""Of a frame; the ones of lower score are dropped."""
AP_THRESHOLDS = np.arange(0.5, 0.96, 0.05) - EPSILON
OBJECT = 1
"""The only class in open_world."""


@dataclass(frozen=True)
class _Track:
    category: int
    masks: dict[str, RLE]  # frame -> mask
    scores: dict[str, float]


@dataclass(frozen=True)
class _Sequence:
    """A sequence's truth, or what was predicted of it."""

    name: str
    id: int
    size: Size
    frames: list[str]
    negative: frozenset[int]
    not_exhaustive: frozenset[int]
    tracks: dict[int, _Track]


def evaluate(
    results: Path,
    truth: Path,
    mode: Mode = "exemplar_guided",
    *,
    videos: Collection[str] | None = None,
) -> dict[str, float]:
    """The numbers of a BURST task; `videos` are <dataset>/<seq_name> where not all of the truth is scored."""
    if mode not in get_args(Mode):
        raise InputError(f"unknown mode {mode!r}; known: {', '.join(get_args(Mode))}")
    predictions = read_json(results)
    if mode != "open_world":
        return _evaluate_classes(predictions, _annotations(truth, "all"), mode, videos)
    numbers: dict[str, float] = {}
    for group in ("all", "common", "uncommon"):
        values = _evaluate_objects(predictions, _annotations(truth, group), videos)
        numbers |= {f"{name}/{group}": 100 * values[name] for name in ("OWTA", "DetRe", "AssA") if values}
    return numbers


def _evaluate_classes(
    predictions: Entry, truth: Path, mode: Mode, videos: Collection[str] | None
) -> dict[str, float]:
    is_guided = mode == "exemplar_guided"
    hota, ap = _hota(), TrackAP(thresholds=AP_THRESHOLDS, max_tracks=None)
    root = read_json(truth)
    scored = sorted(_classes_with_truth(_chosen(root, videos)))
    for true, predicted in _pairs(predictions, root, videos, is_guided=is_guided):
        for category in scored:
            of_truth = {k: track for k, track in true.tracks.items() if track.category == category}
            of_result = {k: track for k, track in predicted.tracks.items() if track.category == category}
            if not of_truth and not of_result:
                continue
            is_exhaustive = category not in true.not_exhaustive
            is_negative = category in true.negative
            frames = list(_frames(true, of_truth, of_result))
            if not is_guided:
                frames = [judged(f, is_negative=is_negative, is_exhaustive=is_exhaustive) for f in frames]
            hota.add(category, true.name, frames)
            if of_truth or is_negative:
                _add_tracks(ap, category, true, of_truth, of_result, is_exhaustive)
    numbers = {k: {**values, "AP": mean_of_defined(ap.precision(k))} for k, values in hota.numbers().items()}
    means = class_means(numbers, COMMON)
    return {key: value for key, value in means.items() if key.split("/")[0] in ("HOTA", "DetA", "AssA", "AP")}


def _evaluate_objects(predictions: Entry, truth: Path, videos: Collection[str] | None) -> dict[str, float]:
    hota = _hota()
    for true, predicted in _pairs(predictions, read_json(truth), videos, is_guided=False):
        frames = _frames(true, true.tracks, predicted.tracks)
        is_negative, is_exhaustive = OBJECT in true.negative, OBJECT not in true.not_exhaustive
        hota.add(
            OBJECT,
            true.name,
            [judged(frame, is_negative=is_negative, is_exhaustive=is_exhaustive) for frame in frames],
        )
    return hota.numbers().get(OBJECT, {})


def _classes_with_truth(sequences: dict[str, Entry]) -> set[int]:
    classes: set[int] = set()
    for sequence in sequences.values():
        categories = track_categories(sequence)
        for frame in sequence["segmentations"].entries():
            classes |= {
                categories[track] for key, _ in frame.items() if (track := track_id(key, frame)) in categories
            }
    return {_merged(category) for category in classes - DISTRACTORS}


def _hota() -> HOTA:
    try:
        return HOTA()
    except ImportError as error:
        raise InputError(
            f"BURST is scored with another package: pip install --no-deps 'trackeval>=1.3' ({error})"
        ) from error


def _annotations(truth: Path, group: str) -> Path:
    if truth.is_dir():
        return truth / f"{group}_classes.json"
    return truth if group == "all" else truth.with_name(f"{group}_classes.json")


def _frames(
    truth: _Sequence, of_truth: dict[int, _Track], of_result: dict[int, _Track]
) -> Iterator[Detections]:
    """Detections frame by frame; frames without any truth, of whatever class, are not scored."""
    annotated = {frame for track in truth.tracks.values() for frame in track.masks}
    for frame in truth.frames:
        if frame in annotated:
            true = {k: track.masks[frame] for k, track in of_truth.items() if frame in track.masks}
            predicted = {k: track.masks[frame] for k, track in of_result.items() if frame in track.masks}
            yield Detections(
                _ids(true), _ids(predicted), rle.box_iou(list(true.values()), list(predicted.values()))
            )


def _add_tracks(
    ap: TrackAP,
    category: int,
    truth: _Sequence,
    of_truth: dict[int, _Track],
    of_result: dict[int, _Track],
    is_exhaustive: bool,
) -> None:
    true = [_tube(track, truth.frames) for track in of_truth.values() if track.masks]
    found = [track for track in of_result.values() if track.masks]
    scores = np.array([np.mean(list(track.scores.values())) for track in found], float)
    iou = tube_iou([_tube(track, truth.frames) for track in found], true)
    ap.add(category, iou, scores, predicted_outside=np.full((1, len(found)), not is_exhaustive))


def _tube(track: _Track, frames: list[str]) -> Tube:
    return [track.masks.get(frame) for frame in frames]


def _ids(masks: dict[int, RLE]) -> NDArray[np.int64]:
    return np.array(list(masks), np.int64)


def _pairs(
    predictions: Entry, truth: Entry, videos: Collection[str] | None, *, is_guided: bool
) -> Iterator[tuple[_Sequence, _Sequence]]:
    """Every sequence of the truth and what was predicted of it, by name, since their order decides between
    equal scores; one is in memory at a time.
    """
    split, own = truth.get("split"), predictions.get("split")
    if split is not None and own is not None and split.text() != own.text():
        raise own.expected(f"{split.value!r}, the split of the truth")
    results = by_name(predictions)
    truths = _chosen(truth, videos)
    for name, entry in results.items():
        if name not in truths and videos is None:
            raise entry.error(f"sequence {name!r} is unknown to the truth")
    for name in sorted(truths, key=lambda name: name.replace("/", "-")):
        true = _read_truth(name, truths[name])
        if name in results:
            yield true, _read_predictions(results[name], true, is_guided=is_guided)
        else:
            yield true, replace(true, tracks={})


def _chosen(truth: Entry, videos: Collection[str] | None) -> dict[str, Entry]:
    """The sequences of the truth that are scored."""
    truths = by_name(truth)
    if videos is None:
        return truths
    wanted = set(videos)
    for name in sorted(wanted - truths.keys()):
        raise truth["sequences"].error(f"has no sequence {name!r}")
    return {name: truths[name] for name in truths if name in wanted}


def by_name(root: Entry) -> dict[str, Entry]:
    """The sequences of a file, by <dataset>/<seq_name>."""
    sequences: dict[str, Entry] = {}
    for entry in root["sequences"].entries():
        name = f"{entry['dataset'].path()}/{entry['seq_name'].path()}"
        if name in sequences:
            raise entry.error(f"sequence {name!r} comes twice")
        sequences[name] = entry
    return sequences


def _read_truth(name: str, entry: Entry) -> _Sequence:
    size = entry["height"].integer(1, LONGEST_SIDE), entry["width"].integer(1, LONGEST_SIDE)
    frames = frame_names(entry["annotated_image_paths"])
    masks, _ = _read_masks(entry, frames, size)
    categories = track_categories(entry)
    tracks = {}
    for track, of_track in masks.items():
        if track not in categories:
            raise entry["track_category_ids"].error(f"has no class of track {track}")
        if categories[track] not in DISTRACTORS:
            tracks[track] = _Track(_merged(categories[track]), of_track, {})
    return _Sequence(
        name=name,
        id=entry["id"].integer(),
        size=size,
        frames=frames,
        negative=frozenset(k.integer() for k in entry["neg_category_ids"].entries()),
        not_exhaustive=frozenset(k.integer() for k in entry["not_exhaustive_category_ids"].entries()),
        tracks=tracks,
    )


def _read_predictions(entry: Entry, truth: _Sequence, *, is_guided: bool) -> _Sequence:
    if entry["id"].integer() != truth.id:
        raise entry["id"].expected(f"{truth.id}, the id of {truth.name} in the truth")
    masks, scores = _read_masks(
        entry, frame_names(entry["annotated_image_paths"]), truth.size, set(truth.frames)
    )
    categories = track_categories(entry)
    tracks = {}
    for track, of_track in masks.items():
        if is_guided:
            if track in truth.tracks:
                tracks[track] = _Track(truth.tracks[track].category, of_track, scores[track])
        elif track in categories:
            tracks[track] = _Track(_merged(categories[track]), of_track, scores[track])
        else:
            raise entry["track_category_ids"].error(f"has no class of track {track}")
    return replace(truth, tracks=tracks)


def _read_masks(
    entry: Entry, frames: list[str], size: Size, wanted: set[str] | None = None
) -> tuple[dict[int, dict[str, RLE]], dict[int, dict[str, float]]]:
    """Masks and scores, by track and frame; of a frame the best 300. Unwanted frames are left out."""
    detections: list[tuple[int, str, float, Entry]] = []
    for name, frame in zip(frames, entry["segmentations"].entries(len(frames), "segmentations"), strict=True):
        found = []
        for key, detection in frame.items():
            if wanted is None or name in wanted:
                score = detection.get("score")
                found.append((track_id(key, frame), name, score.number() if score else 1.0, detection["rle"]))
        if len({track for track, *_ in found}) < len(found):
            raise frame.error("has a track twice")
        if len(found) > MAX_DETECTIONS and wanted is not None:
            found = sorted(found, key=lambda detection: -detection[2])[:MAX_DETECTIONS]
        detections += found
    for *_, code in detections:
        code.text()
    try:
        masks = rle.from_file([code.value for *_, code in detections], size)
    except rle.BadCode as error:
        raise detections[error.index][3].expected(f"a run-length code of {size}") from None
    by_track: dict[int, dict[str, RLE]] = defaultdict(dict)
    scores: dict[int, dict[str, float]] = defaultdict(dict)
    for (track, name, score_value, _), mask in zip(detections, masks, strict=True):
        by_track[track][name] = mask
        scores[track][name] = score_value
    return by_track, scores


def frame_names(names: Entry) -> list[str]:
    """A list of files of frames, none of which comes twice."""
    frames: dict[str, None] = {}
    for name in names.entries():
        if name.path() in frames:
            raise name.error(f"frame {name.value!r} comes twice")
        frames[name.value] = None
    return list(frames)


def track_categories(entry: Entry) -> dict[int, int]:
    """Class of each track of a sequence."""
    mapping = entry["track_category_ids"]
    return {track_id(key, mapping): category.integer() for key, category in mapping.items()}


def track_id(key: str, where: Entry) -> int:
    """A key of JSON that is a track's id."""
    if not key.isascii() or not key.isdigit() or len(key) > 15:
        raise where.error(f"expected ids of tracks as keys, got {key[:60]!r}")
    return int(key)


def _merged(category: int) -> int:
    return MERGED.get(category, category)
