"""BURST: objects that a point (PET) or a mask (VOS) shows in the frame of their first appearance.

    published: dataset_images/{training/burst,inference/burst/<split>}/<dataset>/<sequence>/<frame>.jpg,
               dataset_annotations/training/burst.json, dataset_annotations/inference/burst/
               first_frame_annotations_{val,test}.json, all_classes_{val,test}.json (the truth)
    official:  frames/<split>/<dataset>/<sequence>/<frame>.jpg, as TAO has it, or images/<split>/...;
               {val,test}/{first_frame_annotations,all_classes}.json, train/all_classes.json, in the folder
               itself or in annotations/
    results:   results.json, of the truth's format
    truth:     all_classes.json, or a folder with it (and with {common,uncommon}_classes.json for open_world)

Videos are run at up to eleven frames a second and scored at the annotated ones, one a second; for training
they are the annotated frames alone. A video is called <dataset>/<sequence>.

Modes of scoring: `exemplar_guided` (masks, boxes or points in the first frame; ids are those of the truth,
which knows the classes; unknown ids are dropped), `class_guided` (classes are predicted), `open_world` (no
classes). Numbers, in percent: {HOTA,DetA,AssA,AP}/{all,common,uncommon}, means over the classes that have
truth; for open_world {OWTA,DetRe,AssA}/{all,common,uncommon}. What has no class is left out.

HOTA compares the *bounding boxes* of masks, as the official script does (it hands boxes to a function for
masks, which takes either); AP compares masks. HOTA leaves out frames without any true object.

Where we differ from the official script: an id in a result that the truth lacks is dropped in
exemplar_guided (there a KeyError), and a track whose id is 0 is like any other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from tarvis.config import InferenceConfig
from tarvis.datasets.benchmark import (
    FrameTruth,
    Roots,
    Truth,
    VideoSample,
    expect_split,
    first_that_exists,
)
from tarvis.datasets.track_format import RESULTS, Tube, coded_frame, result_file, tube_iou
from tarvis.files import rle
from tarvis.files.atomic import write_json_list
from tarvis.files.records import Entry, note, read_each, read_json, read_masks
from tarvis.metrics.hota import EPSILON, HOTA, Detections, class_means, judged
from tarvis.metrics.track_ap import TrackAP, mean_of_defined
from tarvis.structures import RLE, InputError, Reference, Size, VideoResult

SMALLEST = 100
"""Pixels of a mask; smaller ones are left out of training."""
HIGHEST_FPS = 1000
TRAIN_FILES = ("all_classes.json", "train.json")

Point = tuple[float, float]
"""x, y in pixels."""
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
"""Of a frame; those of lower scores are dropped."""
CLASS_NUMBERS = ("HOTA", "DetA", "AssA", "AP")
AP_THRESHOLDS = np.arange(0.5, 0.96, 0.05) - EPSILON
OBJECT = 1
"""The only class in open_world."""


class Burst:
    """BURST, exemplar-guided."""

    name = "burst"
    tasks: tuple[str, ...] = ("pet", "vos")
    splits: tuple[str, ...] = ("val", "test", "train")
    headline = "HOTA/all"
    classes = None
    inference = InferenceConfig(8, 4, min_size=512)
    training: Mapping[str, Any] = {"tasks": ("vos",), "window": 3, "min_sizes": (512,)}

    def find(self, root: Path, split: str) -> Roots:
        """See `Benchmark.find`; frames and annotations may be of different layouts."""
        expect_split(self.name, self.splits, split)
        use = "training/burst" if split == "train" else f"inference/burst/{split}"
        frames = [root / "dataset_images" / use, root / "frames" / split, root / "images" / split]
        images = first_that_exists(frames, f"frames of BURST {split}")
        annotations = first_that_exists(_annotations(root, split), f"annotations of BURST {split}")
        truth = annotations if split == "train" else next(filter(Path.is_file, _truth(root, split)), None)
        return Roots(images, annotations, truth)

    def read(self, roots: Roots, split: str) -> list[VideoSample]:
        """See `Benchmark.read`. Videos to train with that show no object are left out."""
        root = _of_split(roots.annotations, split)
        videos = read_each(by_name(root).items(), lambda item: _read_video(*item, roots.images, split))
        videos = [video for video in videos if video.truth is None or video.truth.labels]
        if not videos:
            raise root["sequences"].error("has no sequence that shows an object")
        return videos

    def write(self, result: VideoResult, video: VideoSample, folder: Path) -> dict[str, Any]:
        """The video's entry of the results: its metadata, with the masks that were found.

        Empty masks are left out, since they would be counted as detections.
        """
        if result.size != video.size:
            raise InputError(f"{video.name}: frames are of {result.size}, by its annotations {video.size}")
        masks: list[dict[str, Any]] = [{} for _ in video.scored]
        for track in sorted(result.tracks, key=lambda track: track.id):
            for found, frame in zip(masks, video.scored, strict=True):
                mask = track.masks.get(frame)
                if mask is not None and rle.area(mask):
                    found[str(track.id)] = {"rle": mask["counts"].decode("ascii"), "is_gt": False}
        return {**video.entry, "segmentations": masks}

    def join(self, shares: Iterable[Any], videos: Sequence[VideoSample], split: str, folder: Path) -> None:
        """Write results.json."""

        def checked() -> Iterator[Any]:
            for share, video in zip(shares, videos, strict=True):
                entry = Entry(share, folder / RESULTS)
                if f"{entry['dataset'].value}/{entry['seq_name'].value}" != video.name:
                    raise entry.expected(f"the results of {video.name}")
                yield share

        before = f'{{"split": {json.dumps(split)}, "sequences": '
        write_json_list(folder / RESULTS, checked(), before=before, after="}\n")

    def score(
        self, results: Path, truth: Path, split: str, videos: Collection[str] | None = None
    ) -> dict[str, float]:
        """HOTA and AP; `truth` is all_classes.json, a folder with it, or what `find` takes."""
        if truth.is_dir():
            places = [truth / "all_classes.json", *_truth(truth, split)]
            truth = first_that_exists(places, f"truth of BURST {split}")
        return score(result_file(results), truth, videos=videos)

    def check(self, results: Path, videos: Sequence[VideoSample], split: str) -> dict[str, Path]:
        """See `Benchmark.check`. More frames than those that are scored are allowed, empty masks are not."""
        root = _of_split(result_file(results), split)
        found = by_name(root)
        wanted = {video.name: video for video in videos}
        for name in found.keys() - wanted.keys():
            raise found[name].error(f"sequence {name!r} is not one of BURST {split}")
        for name, video in wanted.items():
            if name not in found:
                raise root["sequences"].error(f"lacks sequence {name!r}")
            _check(found[name], video)
        return {RESULTS: result_file(results)}


def _official(root: Path, split: str, *names: str) -> list[Path]:
    folders = (root / split, root / "annotations" / split)
    return [folder / name for folder in folders for name in names]


def _annotations(root: Path, split: str) -> list[Path]:
    folder = root / "dataset_annotations"
    if split == "train":
        return [
            folder / "training/burst.json",
            *_official(root, split, *TRAIN_FILES),
            root / "train.json",
        ]
    name = "first_frame_annotations"
    return [folder / f"inference/burst/{name}_{split}.json", *_official(root, split, f"{name}.json")]


def _truth(root: Path, split: str) -> list[Path]:
    published = root / f"dataset_annotations/inference/burst/all_classes_{split}.json"
    return [published, *_official(root, split, "all_classes.json")]


def _of_split(path: Path, split: str) -> Entry:
    root = read_json(path)
    own = root.get("split")
    if own is not None and own.text() != split:
        raise own.expected(repr(split))
    return root


def _read_video(name: str, entry: Entry, images: Path, split: str) -> VideoSample:
    """Read a sequence and check all of it; small masks are left out of training."""
    size, is_training = entry.size(), split == "train"
    fps, named = entry["fps"].integer(1, HIGHEST_FPS), entry["annotated_image_paths"]
    files, annotated = frame_names(entry["all_image_paths"]), frame_names(named)
    frames = annotated if is_training else [files[t] for t in interleaved_frames(len(files), fps)]
    place = {file: k for k, file in enumerate(frames)}
    for file in named.entries():
        if file.value not in place:
            raise file.error(f"{file.value!r} is not among the frames that are run, at {fps} a second")
    scored = tuple(place[file] for file in annotated)
    if not scored or scored != tuple(sorted(scored)):
        raise named.error("expected at least one frame, in the order of all_image_paths")
    masks, first_shown = _read_codes(entry, annotated, size, smallest=SMALLEST if is_training else 1)

    categories = track_categories(entry)
    metadata: dict[str, Any] = {
        "id": entry["id"].integer(),
        "dataset": entry["dataset"].value,
        "seq_name": entry["seq_name"].value,
        "height": size[0],
        "width": size[1],
        "fps": fps,
        "all_image_paths": files,
        "annotated_image_paths": annotated,
        "track_category_ids": {str(track): categories.get(track, 1) for track in sorted(first_shown)},
    }
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        if (listed := entry.get(key)) is not None:
            metadata[key] = [category.integer() for category in listed.entries()]
    read = partial(coded_frame, size, masks)
    return VideoSample(
        name=name,
        images=tuple(images / name / file for file in frames),
        frame_names=tuple(frames),
        scored=scored,
        size=size,
        references=partial(_references, first_shown, scored, read),
        truth=Truth(dict.fromkeys(first_shown), tuple(map(tuple, masks)), read) if is_training else None,
        entry=metadata,
    )


def _references(
    first_shown: dict[int, tuple[int, Point | None]], scored: Sequence[int], read: Callable[[int], FrameTruth]
) -> list[Reference]:
    """The mask of every object, and its point if the file has one."""
    found = []
    for track, (frame, point) in first_shown.items():
        mask = (read(frame).masks or {})[track]
        found.append(Reference(track, scored[frame], mask=torch.from_numpy(rle.decode(mask))))
        if point is not None:
            found.append(Reference(track, scored[frame], point=point))
    return found


def _read_codes(
    entry: Entry, frames: Sequence[str], size: Size, smallest: int
) -> tuple[list[dict[int, bytes]], dict[int, tuple[int, Point | None]]]:
    """Codes of masks by annotated frame and track; frame and point of each track's first appearance."""
    masks: list[dict[int, bytes]] = [{} for _ in frames]
    first_shown: dict[int, tuple[int, Point | None]] = {}
    for found in sorted(read_detections(entry, frames, size), key=lambda found: (found.frame, found.track)):
        if (pixels := rle.area(found.mask)) >= smallest:
            masks[found.frame][found.track] = found.mask["counts"]
            if found.track not in first_shown:
                first_shown[found.track] = found.frame, _point(found.entry, size)
        elif not pixels and found.entry.get("point") is not None:
            raise found.entry["rle"].error("expected a mask that is not empty")
    return masks, first_shown


def _point(detection: Entry, size: Size) -> Point | None:
    point = detection.get("point")
    if point is None:
        return None
    x, y = point["x"].number(), point["y"].number()
    if not (0 <= x <= size[1] - 1 and 0 <= y <= size[0] - 1):
        raise point.expected(f"a pixel of {size}")
    return x, y


def _check(entry: Entry, video: VideoSample) -> None:
    """Check the results of a video."""
    assert video.size is not None
    for key in ("id", "height", "width"):
        own = entry[key] if key == "id" else entry.get(key)
        if own is not None and own.integer() != video.entry[key]:
            raise own.expected(f"{video.entry[key]}, as in the annotations of {video.name}")
    names = frame_names(entry["annotated_image_paths"])
    for name in sorted({video.frame_names[frame] for frame in video.scored} - set(names)):
        raise entry["annotated_image_paths"].error(f"lacks {name!r}")
    categories = track_categories(entry)
    for found in read_detections(entry, names, video.size):
        if str(found.track) not in video.entry["track_category_ids"]:
            raise found.entry.error(f"track {found.track} is not among those that are given")
        if found.track not in categories:
            raise entry["track_category_ids"].error(f"has no class of track {found.track}")
        if not rle.area(found.mask):
            raise found.entry["rle"].error("is an empty mask, which would count as a detection: leave it out")


def interleaved_frames(num_frames: int, frames_per_second: int, interleaved: int = 10) -> list[int]:
    """The frames at which a video is run, one annotated frame a second and `interleaved` between two.

    At least one of the frames between is left out where the frame rate is low, as in the published code.
    """
    parts = min(interleaved, max(0, frames_per_second - 2)) + 1
    step = frames_per_second / parts
    offsets = [round(i * step) for i in range(parts)]
    seconds = range(math.ceil(num_frames / frames_per_second))
    frames = [second * frames_per_second + offset for second in seconds for offset in offsets]
    return [frame for frame in frames if frame < num_frames]


class Detection(NamedTuple):
    """An object in a frame of a sequence, as annotations and results have it."""

    frame: int  # of the annotated ones
    track: int
    score: float
    entry: Entry
    mask: RLE


def read_detections(
    sequence: Entry, frames: Sequence[str], size: Size, wanted: Collection[str] | None = None
) -> list[Detection]:
    """The detections of a sequence, in file order, checked in one go.

    Args:
        frames: names of the annotated frames.
        wanted: leave out all other frames, and keep of a frame those `MAX_DETECTIONS` of highest score.
    """
    found: list[tuple[int, int, float, Entry]] = []
    listed = sequence["segmentations"].entries(len(frames), "segmentations, one a frame")
    for t, (name, frame) in enumerate(zip(frames, listed, strict=True)):
        if wanted is not None and name not in wanted:
            continue
        of_frame = []
        for track, detection in frame.by_number().items():
            score = detection.get("score")
            of_frame.append((t, track, score.number() if score else 1.0, detection))
        if wanted is not None and len(of_frame) > MAX_DETECTIONS:
            of_frame = sorted(of_frame, key=lambda detection: -detection[2])[:MAX_DETECTIONS]
        found += of_frame
    masks = read_masks([detection["rle"] for *_, detection in found], size)
    return [Detection(*each, mask) for each, mask in zip(found, masks, strict=True)]


def by_name(root: Entry) -> dict[str, Entry]:
    """The sequences of a file, by <dataset>/<seq_name>."""
    sequences: dict[str, Entry] = {}
    for entry in root["sequences"].entries():
        try:
            name = f"{entry['dataset'].path()}/{entry['seq_name'].path()}"
            if name in sequences:
                raise entry.error(f"sequence {name!r} appears twice")
            sequences[name] = entry
        except InputError as error:
            note(error)
    return sequences


def frame_names(names: Entry) -> list[str]:
    """The names of a list of frames, which must differ."""
    frames: dict[str, None] = {}
    for name in names.entries():
        if name.path() in frames:
            raise name.error(f"frame {name.value!r} appears twice")
        frames[name.value] = None
    return list(frames)


def track_categories(entry: Entry) -> dict[int, int]:
    """Class of each track of a sequence."""
    categories = entry["track_category_ids"].by_number()
    return {track: category.integer() for track, category in categories.items()}


class _Track(NamedTuple):
    category: int
    masks: dict[str, RLE]  # frame -> mask
    scores: list[float]  # of the masks


@dataclass(frozen=True)
class _Scored:
    """A sequence to score: its truth, or the predictions for it."""

    name: str
    id: int
    size: Size
    frames: list[str]
    negative: frozenset[int]
    not_exhaustive: frozenset[int]
    tracks: dict[int, _Track]


def score(
    results: Path,
    truth: Path,
    mode: Mode = "exemplar_guided",
    *,
    videos: Collection[str] | None = None,
) -> dict[str, float]:
    """The numbers of a mode; `videos` are <dataset>/<seq_name> where not all of the truth is scored."""
    if mode not in get_args(Mode):
        raise InputError(f"unknown mode {mode!r}; known: {', '.join(get_args(Mode))}")
    predictions = read_json(results)
    if mode != "open_world":
        means = class_means(_score(predictions, _group_file(truth, "all"), mode, videos), COMMON)
        return {key: value for key, value in means.items() if key.split("/")[0] in CLASS_NUMBERS}
    numbers: dict[str, float] = {}
    for group in ("all", "common", "uncommon"):
        values = _score(predictions, _group_file(truth, group), mode, videos).get(OBJECT, {})
        numbers |= {f"{name}/{group}": 100 * values[name] for name in ("OWTA", "DetRe", "AssA") if values}
    return numbers


def _score(
    predictions: Entry, truth: Path, mode: Mode, videos: Collection[str] | None
) -> dict[int, dict[str, float]]:
    """The numbers of every class that has truth, in [0, 1]; open_world has one class and no AP."""
    try:
        hota = HOTA()
    except ImportError as error:
        raise InputError(
            f"BURST is scored with another package: pip install --no-deps 'trackeval>=1.3' ({error})"
        ) from error
    ap = TrackAP(thresholds=AP_THRESHOLDS, max_tracks=None)
    is_guided, has_classes = mode == "exemplar_guided", mode != "open_world"
    root = read_json(truth)
    scored = sorted(_classes_with_truth(_chosen(root, videos))) if has_classes else [OBJECT]
    for true, predicted in _pairs(predictions, root, videos, is_guided=is_guided):
        for category in scored:
            of_truth, of_result = (
                {
                    k: track
                    for k, track in each.tracks.items()
                    if not has_classes or track.category == category
                }
                for each in (true, predicted)
            )
            if has_classes and not of_truth and not of_result:
                continue
            is_exhaustive, is_negative = category not in true.not_exhaustive, category in true.negative
            frames = list(_frames(true, of_truth, of_result))
            if not is_guided:
                frames = [judged(f, is_negative=is_negative, is_exhaustive=is_exhaustive) for f in frames]
            hota.add(category, true.name, frames)
            if has_classes and (of_truth or is_negative):
                tracks = list(of_result.values())
                found, tubes = _tubes(tracks, true.frames), _tubes(of_truth.values(), true.frames)
                scores = np.array([np.mean(track.scores) for track in tracks], float)
                unjudged = np.full((1, len(found)), not is_exhaustive)
                ap.add(category, tube_iou(found, tubes), scores, predicted_outside=unjudged)
    numbers = hota.numbers()
    if has_classes:
        return {k: {**values, "AP": mean_of_defined(ap.precision(k))} for k, values in numbers.items()}
    return numbers


def _classes_with_truth(sequences: dict[str, Entry]) -> set[int]:
    classes: set[int] = set()
    for sequence in sequences.values():
        categories = track_categories(sequence)
        for frame in sequence["segmentations"].entries():
            classes |= {categories[track] for track in frame.by_number().keys() & categories.keys()}
    return {MERGED.get(category, category) for category in classes - DISTRACTORS}


def _group_file(truth: Path, group: str) -> Path:
    if truth.is_dir():
        return truth / f"{group}_classes.json"
    return truth if group == "all" else truth.with_name(f"{group}_classes.json")


def _frames(
    truth: _Scored, of_truth: dict[int, _Track], of_result: dict[int, _Track]
) -> Iterator[Detections]:
    """Detections frame by frame; frames without a true object of any class are not scored."""
    annotated = {frame for track in truth.tracks.values() for frame in track.masks}
    for frame in truth.frames:
        if frame in annotated:
            true, found = (
                {k: track.masks[frame] for k, track in tracks.items() if frame in track.masks}
                for tracks in (of_truth, of_result)
            )
            iou = rle.box_iou(list(true.values()), list(found.values()))
            yield Detections(np.array(list(true), np.int64), np.array(list(found), np.int64), iou)


def _tubes(tracks: Iterable[_Track], frames: list[str]) -> list[Tube]:
    return [[track.masks.get(frame) for frame in frames] for track in tracks]


def _pairs(
    predictions: Entry, truth: Entry, videos: Collection[str] | None, *, is_guided: bool
) -> Iterator[tuple[_Scored, _Scored]]:
    """Every sequence of the truth with its predictions, one in memory at a time.

    They come by name, since their order decides between equal scores.
    """
    split, own = truth.get("split"), predictions.get("split")
    if split is not None and own is not None and split.text() != own.text():
        raise own.expected(f"{split.value!r}, the split of the truth")
    results, truths = by_name(predictions), _chosen(truth, videos)
    for name, entry in results.items():
        if name not in truths and videos is None:
            raise entry.error(f"sequence {name!r} is unknown to the truth")
    for name in sorted(truths, key=lambda name: name.replace("/", "-")):
        true = _read_truth(name, truths[name])
        found = _read_predictions(results[name], true, is_guided=is_guided) if name in results else {}
        yield true, replace(true, tracks=found)


def _chosen(truth: Entry, videos: Collection[str] | None) -> dict[str, Entry]:
    """The sequences of the truth that are scored."""
    truths = by_name(truth)
    if videos is None:
        return truths
    for name in sorted(set(videos) - truths.keys()):
        raise truth["sequences"].error(f"has no sequence {name!r}")
    return {name: truths[name] for name in truths if name in videos}


def _read_truth(name: str, entry: Entry) -> _Scored:
    size, frames = entry.size(), frame_names(entry["annotated_image_paths"])
    categories = track_categories(entry)
    tracks = _read_tracks(entry, frames, read_detections(entry, frames, size), categories)
    return _Scored(
        name=name,
        id=entry["id"].integer(),
        size=size,
        frames=frames,
        negative=frozenset(k.integer() for k in entry["neg_category_ids"].entries()),
        not_exhaustive=frozenset(k.integer() for k in entry["not_exhaustive_category_ids"].entries()),
        tracks={k: track for k, track in tracks.items() if categories[k] not in DISTRACTORS},
    )


def _read_predictions(entry: Entry, truth: _Scored, *, is_guided: bool) -> dict[int, _Track]:
    if entry["id"].integer() != truth.id:
        raise entry["id"].expected(f"{truth.id}, the id of {truth.name} in the truth")
    frames = frame_names(entry["annotated_image_paths"])
    categories = track_categories(entry)
    found = read_detections(entry, frames, truth.size, set(truth.frames))
    if is_guided:  # the truth knows the classes; tracks that it lacks are dropped
        categories = {track: of_truth.category for track, of_truth in truth.tracks.items()}
        found = [each for each in found if each.track in categories]
    return _read_tracks(entry, frames, found, categories)


def _read_tracks(
    entry: Entry, frames: Sequence[str], detections: Iterable[Detection], categories: dict[int, int]
) -> dict[int, _Track]:
    tracks: dict[int, _Track] = {}
    for each in detections:
        if each.track not in categories:
            raise entry["track_category_ids"].error(f"has no class of track {each.track}")
        category = categories[each.track]
        track = tracks.setdefault(each.track, _Track(MERGED.get(category, category), {}, []))
        track.masks[frames[each.frame]] = each.mask
        track.scores.append(each.score)
    return tracks
