"""The track format of YouTube-VIS: videos, and tracks with a class and a run-length code a frame.

    annotations: a JSON file of `videos`, `categories` and, where they are public, `annotations`, the tracks;
                 masks are run-length codes, compressed or not
    results:     results.json, a list of {video_id, category_id, score, segmentations: [code or null]}

A video has the name of the folder of its frames.

Numbers: AP, AP50, AP75, AP_{small,medium,large}, AR_{1,10,100}, AR_{small,medium,large}, for OVIS also
{AP,AR}_occ_{light,medium,heavy}, and per_category/<id>/{AP,AR_100}; in [0, 1], -1 where there is no truth.

The files are held in memory; for scoring, masks are checked and compared video by video.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarvis.config import InferenceConfig
from tarvis.datasets.benchmark import FrameTruth, Roots, Truth, VideoSample
from tarvis.datasets.classes import ClassTable, labels_by_id
from tarvis.files import rle
from tarvis.files.atomic import write_json_list
from tarvis.files.records import Entry, note, read_each, read_json, read_masks
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
from tarvis.structures import RLE, InputError, Size, VideoResult

RESULTS = "results.json"
EVERYTHING = {"all": (0.0, 1e10)}

Tube = list[RLE | None]
"""The masks of a track, one a frame."""
Share = list[dict[str, Any]]
"""A video's part of results.json."""


class TrackFile:
    """A file of annotations. `videos` holds its videos by id, without their truth."""

    def __init__(self, root: Entry, images: Path = Path()) -> None:
        """
        Args:
            images: the folder that `file_names` start from.

        Raises:
            InputError: a video is damaged; the message names file and entry.
        """
        self.root = root
        self.entries = root["videos"].by("id", Entry.integer)
        read = read_each(self.entries.items(), lambda item: (item[0], _read_video(item[1], images)))
        self.videos = dict(read)

    def tracks(self, categories: Collection[int]) -> dict[int, list[Entry]]:
        """The entries of the tracks by video, crowds included."""
        return _by_video(self.root["annotations"].entries(), self.videos, categories)

    def labelled(self, labels: Mapping[int, int]) -> list[VideoSample]:
        """The videos with their truth: tracks are numbered from 1 in file order, crowds are left out.

        Masks are checked but not decoded. `labels` gives the class of each category id.
        """
        tracks = self.tracks(labels)
        return [
            replace(video, truth=_read_truth(tracks[number], video, labels))
            for number, video in self.videos.items()
        ]


class TrackBenchmark(ABC):
    """A benchmark in this format; subclasses say where its files lie."""

    name: str
    tasks: tuple[str, ...] = ("vis",)
    splits: tuple[str, ...] = ("val", "test", "train")
    headline: str = "AP"
    has_occlusion = False
    classes: ClassTable
    inference = InferenceConfig()
    training: Mapping[str, Any] = {}

    @abstractmethod
    def annotation_file(self, root: Path, split: str) -> Path:
        """The file of annotations of a split, in a download or workspace."""

    def expect_edition(self, root: Entry) -> None:  # noqa: B027
        """Raise InputError for a file of another edition. Accepts any file here."""

    def read(self, roots: Roots, split: str) -> list[VideoSample]:
        """See `Benchmark` and `TrackFile.labelled`."""
        file = TrackFile(read_json(roots.annotations), roots.images)
        self.expect_edition(file.root)
        labels = labels_by_id(file.root, self.classes)
        names: set[str] = set()
        for number, video in file.videos.items():
            if video.name in names:
                entry = file.entries[number]["file_names"]
                raise entry.error(f"frames of {video.name!r} also belong to another video")
            names.add(video.name)
        if not names:
            raise file.root["videos"].error("expected videos, got none")
        if not has_tracks(file.root):
            return list(file.videos.values())
        file.root["annotations"].by("id", Entry.integer)
        return file.labelled(labels)

    def write(self, result: VideoResult, video: VideoSample, folder: Path) -> Share:
        """See `Benchmark`. There are no pictures; a frame without pixels of a track is null."""
        assert result.num_frames == len(video.images), (video.name, result.num_frames)
        if result.size != video.size:
            raise InputError(f"{video.name}: frames are of {result.size}, its annotations say {video.size}")
        share = []
        for track in result.tracks:
            assert track.label is not None, track.id
            assert track.score is not None, track.id
            masks = [rle.to_json(track.masks.get(frame)) for frame in video.scored]
            share.append(
                {
                    "video_id": video.entry["video_id"],
                    "category_id": self.classes.ids[track.label],
                    "score": float(track.score),
                    "segmentations": masks,
                }
            )
        return share

    def join(self, shares: Iterable[Share], videos: Sequence[VideoSample], split: str, folder: Path) -> None:
        """See `Benchmark`: writes `RESULTS`, a result a line.

        Raises:
            InputError: the annotations have changed since a share was written.
        """

        def checked() -> Iterator[Share]:
            for share, video in zip(shares, videos, strict=True):
                expected = video.entry["video_id"], len(video.scored)
                if any((each["video_id"], len(each["segmentations"])) != expected for each in share):
                    raise InputError(
                        f"{folder / RESULTS}: the annotations of {video.name} have changed since it was "
                        "inferred: infer it again, with --overwrite"
                    )
                yield share

        write_json_list(folder / RESULTS, chain.from_iterable(checked()))

    def score(
        self, results: Path, truth: Path, split: str, videos: Collection[str] | None = None
    ) -> dict[str, float]:
        """See `Benchmark`. `results` is results.json, or a folder with it."""
        path = self.annotation_file(truth, split) if truth.is_dir() else truth
        return _score(results, path, videos, has_occlusion=self.has_occlusion)

    def check(self, results: Path, videos: Sequence[VideoSample], split: str) -> dict[str, Path]:
        """See `Benchmark`. `results` is results.json, or a folder with it."""
        by_id = {video.entry["video_id"]: video for video in videos}
        for number, entries in parse_result(results, by_id, self.classes.ids).items():
            read_tubes(entries, by_id[number])
        return {RESULTS: result_file(results)}


def has_tracks(root: Entry) -> bool:
    """Whether a file of annotations has tracks; some files without have `null` or an empty list for them."""
    annotations = root.get("annotations")
    return annotations is not None and annotations.value not in (None, [])


def result_file(results: Path) -> Path:
    """The result file, given itself or its folder."""
    return results / RESULTS if results.is_dir() else results


def parse_result(
    results: Path, videos: Mapping[int, VideoSample], categories: Collection[int]
) -> dict[int, list[Entry]]:
    """The entries of a result file by id of the video, checked except for their masks (see `read_tubes`)."""
    entries = read_json(result_file(results)).entries()
    for entry in entries:
        entry["score"].number()
    return _by_video(entries, videos, categories)


def read_tubes(entries: Sequence[Entry], video: VideoSample) -> list[Tube]:
    """The masks of all tracks of a video, checked in one go."""
    assert video.size is not None, video.name
    tubes: list[Tube] = [[None] * len(video.images) for _ in entries]
    places: list[tuple[int, int]] = []
    masks: list[Entry] = []
    for k, entry in enumerate(entries):
        for t, mask in enumerate(_segmentations(entry, video)):
            if mask.value is None:
                continue
            places.append((k, t))
            masks.append(mask)
    for (k, t), code in zip(places, read_masks(masks, video.size), strict=True):
        tubes[k][t] = code
    return tubes


def _segmentations(entry: Entry, video: VideoSample) -> list[Entry]:
    return entry["segmentations"].entries(len(video.images), "segmentations, one a frame")


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


def _read_video(entry: Entry, images: Path) -> VideoSample:
    files = [file.path() for file in entry["file_names"].entries()]
    folders = {file.rpartition("/")[0] for file in files}
    if len(folders) != 1 or "" in folders:
        raise entry["file_names"].error("expected frames of one folder, each as FOLDER/FRAME.jpg")
    frame_names = tuple(os.path.splitext(os.path.basename(file))[0] for file in files)
    if len(set(frame_names)) != len(files):
        raise entry["file_names"].error("a frame appears twice")
    length = entry.get("length")
    if length is not None and length.integer() != len(files):
        raise length.expected(f"{len(files)}, the number of file names")
    return VideoSample(
        name=folders.pop(),
        images=tuple(images / file for file in files),
        frame_names=frame_names,
        size=entry.size(),
        entry={"video_id": entry["id"].integer()},
    )


def _by_video(
    entries: Iterable[Entry], videos: Collection[int], categories: Collection[int]
) -> dict[int, list[Entry]]:
    found: dict[int, list[Entry]] = {number: [] for number in videos}
    for entry in entries:
        try:
            video, category = entry["video_id"].integer(), entry["category_id"].integer()
            if video not in found:
                raise entry["video_id"].error(f"video {video} is unknown")
            if category not in categories:
                raise entry["category_id"].error(f"category {category} is unknown")
            found[video].append(entry)
        except InputError as error:
            note(error)
    return found


def _read_truth(entries: Iterable[Entry], video: VideoSample, labels: Mapping[int, int]) -> Truth:
    tracks = read_each(entries, lambda entry: (entry, entry.is_set("iscrowd"), _segmentations(entry, video)))
    entries = [entry for entry, is_crowd, _ in tracks if not is_crowd]  # crowds: several objects as one mask
    of_track = dict(enumerate((labels[entry["category_id"].value] for entry in entries), 1))
    tubes = read_tubes(entries, video)
    # codes alone: a list of sizes and a dict for each of the masks of a split would be most of its memory
    frames: list[dict[int, bytes]] = [{} for _ in video.images]
    for track, tube in enumerate(tubes, 1):
        for frame, mask in zip(frames, tube, strict=True):
            if mask is not None and rle.area(mask):
                frame[track] = mask["counts"]
    assert video.size is not None
    return Truth({**of_track}, tuple(map(tuple, frames)), partial(coded_frame, video.size, frames))


def coded_frame(size: Size, frames: Sequence[dict[int, bytes]], t: int) -> FrameTruth:
    """The truth of frame `t`; `frames` holds codes of masks by track."""
    return FrameTruth({track: RLE(size=list(size), counts=code) for track, code in frames[t].items()})


def _score(
    results: Path, truth: Path, names: Collection[str] | None, *, has_occlusion: bool
) -> dict[str, float]:
    root = read_json(truth)
    if root.get("annotations") is None:
        raise root.error("has no 'annotations': the truth of this split is not public")
    file, categories = TrackFile(root), root["categories"].by("id", Entry.integer)
    root["annotations"].by("id", Entry.integer)
    truths, predictions = file.tracks(categories), parse_result(results, file.videos, categories)
    chosen = set(file.videos)
    if names is not None:
        by_name = {video.name: number for number, video in file.videos.items()}
        if unknown := set(names) - by_name.keys():
            raise root["videos"].error(f"has no video {min(unknown)!r}")
        chosen = {by_name[name] for name in names}

    of_area = EVERYTHING | AREA_RANGES
    ap = TrackAP([*of_area, *(OCCLUSION_RANGES if has_occlusion else ())])
    for number in sorted(chosen):
        video, of_truth, of_result = file.videos[number], truths[number], predictions[number]
        true_tubes, tubes = read_tubes(of_truth, video), read_tubes(of_result, video)
        true_categories, found_categories = _categories(of_truth), _categories(of_result)
        scores = np.array([entry["score"].number() for entry in of_result])
        crowd = np.array([entry.is_set("iscrowd") for entry in of_truth], bool)
        true_areas = [
            _mean_area(tube, entry.get("areas")) for entry, tube in zip(of_truth, true_tubes, strict=True)
        ]
        true_outside = outside(np.array(true_areas, float), of_area)
        predicted_outside = outside(np.array([_mean_area(tube) for tube in tubes], float), of_area)
        if has_occlusion:
            levels = np.array([_occlusion(entry, len(video.images)) for entry in of_truth], float)
            true_outside = np.concatenate([true_outside, outside(levels, OCCLUSION_RANGES)])
            nowhere = np.zeros((len(OCCLUSION_RANGES), len(scores)), bool)  # predictions have no level
            predicted_outside = np.concatenate([predicted_outside, nowhere])
        for category in np.union1d(true_categories, found_categories).tolist():
            g = np.flatnonzero(true_categories == category)
            d = np.flatnonzero(found_categories == category)
            d = d[best_first(scores[d])]
            ap.add(
                category,
                tube_iou([tubes[k] for k in d], [true_tubes[k] for k in g]),
                scores[d],
                crowd=crowd[g],
                truth_outside=true_outside[:, g],
                predicted_outside=predicted_outside[:, d],
            )
    return summary(ap, sorted(categories))


def _categories(entries: Sequence[Entry]) -> NDArray[np.int64]:
    return np.array([entry["category_id"].value for entry in entries], np.int64)


def _mean_area(tube: Tube, listed: Entry | None = None) -> float:
    """Mean area of a track where it has pixels; of `listed` areas if the file has them, as official."""
    if listed is None:
        areas = [float(rle.area(mask)) for mask in tube if mask is not None]
    else:
        entries = listed.entries(len(tube), "areas, one a frame")
        areas = [area.number() for area in entries if area.value is not None]
    visible = [area for area in areas if area]
    return sum(visible) / len(visible) if visible else 0.0


def _occlusion(entry: Entry, length: int) -> float:
    levels = entry["occlusion"].entries(length, "levels of occlusion, one a frame")
    for level in levels:
        if level.value is not None and level.text() not in OCCLUSION_LEVELS:
            raise level.expected(" or ".join(OCCLUSION_LEVELS))
    return occlusion_score(level.value for level in levels)


def _pixels(tubes: Sequence[Tube]) -> Floats:
    return np.array([sum(rle.area(mask) for mask in tube if mask is not None) for tube in tubes], float)
