"""YouTube-VIS 2019, YouTube-VIS 2021 and OVIS: instances, with a class and a score each.

    annotations: instances.json (2019: train.json, OVIS: annotations_train.json, ...): videos and, where they
                 are public, tracks; masks are run-length codes, compressed or not
    results:     results.json, a list of {video_id, category_id, score, segmentations: [code or null]}

A video is called like the folder of its frames.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from tarvis.datasets.benchmark import FrameTruth, Roots, Truth, VideoSample, first_that_exists
from tarvis.datasets.categories import labels_by_id
from tarvis.datasets.classes import ClassTable, class_table
from tarvis.files import rle
from tarvis.files.atomic import write_json_list
from tarvis.files.records import Entry, read_json
from tarvis.scoring.youtube_vis import LONGEST_SIDE, evaluate, evaluate_ovis, read_tubes, video_name
from tarvis.structures import RLE, InputError, Size, VideoResult

SPELLINGS = {"train": ("train",), "val": ("valid", "val"), "test": ("test",)}
"""What folders and files call the splits, the official way first."""
RESULTS = "results.json"

Share = list[dict[str, Any]]
"""A video's part of results.json."""


class YouTubeVIS:
    """An edition of the benchmark; a `Benchmark`."""

    tasks: tuple[str, ...] = ("vis",)
    splits: tuple[str, ...] = ("val", "test", "train")
    headline: str = "AP"

    def __init__(
        self,
        name: str,
        annotations: str,
        *,
        years: tuple[int, ...] = (),
        score: Callable[[Path, Path, Collection[str] | None], dict[str, float]] = evaluate,
    ) -> None:
        """
        Args:
            name: also of the class table.
            annotations: file of val and test in a workspace, with {} where the split stands.
            years: those the edition's files may say they are of; any without.
        """
        self.name = name
        self._annotations = annotations
        self._years = years
        self._score = score

    @property
    def classes(self) -> ClassTable:
        return class_table(self.name)

    def find(self, root: Path, split: str) -> Roots:
        """See `Benchmark`. The truth is the annotation file itself, where it has tracks."""
        if split not in self.splits:
            raise InputError(f"{self.name} has no split {split!r}; known: {', '.join(self.splits)}")
        stage = "training" if split == "train" else "inference"
        pictures = root / "dataset_images" / stage
        folders = [pictures / f"{self.name}_test"] * (split == "test") + [pictures / self.name]
        for spelling in SPELLINGS[split]:
            folders += [root / spelling / "JPEGImages", root / spelling]
        images = first_that_exists(folders, f"images of {self.name} {split}")
        annotations = self._find_annotations(root, split)
        is_public = split == "train" or has_tracks(read_json(annotations))
        return Roots(images, annotations, annotations if is_public else None)

    def read(self, roots: Roots, split: str) -> list[VideoSample]:
        """See `Benchmark`. Masks are checked but not decoded; tracks are numbered from 1, in file order."""
        root = read_json(roots.annotations)
        self._check_year(root)
        labels = labels_by_id(root, self.classes)
        videos: dict[int, VideoSample] = {}
        names: set[str] = set()
        for entry in root["videos"].entries():
            video = _read_video(entry, roots.images)
            number = video.entry["video_id"]
            if number in videos:
                raise entry["id"].error(f"id {number} comes twice")
            if video.name in names:
                raise entry["file_names"].error(f"frames of {video.name!r} are those of another video, too")
            videos[number] = video
            names.add(video.name)
        if not videos:
            raise root["videos"].error("expected videos, got none")
        if not has_tracks(root):
            return list(videos.values())

        tracks: dict[int, list[Entry]] = {number: [] for number in videos}
        seen: set[int] = set()
        for entry in root["annotations"].entries():
            number = entry["id"].integer()
            if number in seen:
                raise entry["id"].error(f"id {number} comes twice")
            seen.add(number)
            number = _video_of(entry, tracks)
            if not entry.is_set("iscrowd"):  # several things that nobody told apart
                tracks[number].append(entry)
        return [
            replace(video, truth=_read_truth(tracks[number], video, labels))
            for number, video in videos.items()
        ]

    def write(self, result: VideoResult, video: VideoSample, folder: Path) -> Share:
        """See `Benchmark`. There are no pictures; a frame without pixels of a track is null."""
        assert result.num_frames == len(video.images), (video.name, result.num_frames)
        if result.size != video.size:
            raise InputError(f"{video.name}: frames are of {result.size}, its annotations say {video.size}")
        ids = self.classes.ids
        share = []
        for track in result.tracks:
            assert track.label is not None, track.id
            assert track.score is not None, track.id
            masks = [_segmentation(track.masks.get(frame)) for frame in video.scored]
            share.append(
                {
                    "video_id": video.entry["video_id"],
                    "category_id": ids[track.label],
                    "score": float(track.score),
                    "segmentations": masks,
                }
            )
        return share

    def join(
        self,
        shares: Iterable[Share],
        videos: Sequence[VideoSample],
        split: str,
        folder: Path,
    ) -> None:
        """See `Benchmark`: writes `RESULTS`, a result a line.

        Raises:
            InputError: a share was written when the annotations said something else.
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

    def evaluate(
        self,
        results: Path,
        truth: Path,
        split: str,
        videos: Collection[str] | None = None,
    ) -> dict[str, float]:
        """See `Benchmark` and `tarvis.scoring.youtube_vis`."""
        return self._score(results, self._find_annotations(truth, split) if truth.is_dir() else truth, videos)

    def check(self, results: Path, videos: Sequence[VideoSample], split: str) -> dict[str, Path]:
        """See `Benchmark`. `results` is results.json, or a folder with it."""
        path = results / RESULTS if results.is_dir() else results
        categories = set(self.classes.ids)
        by_id = {video.entry["video_id"]: video for video in videos}
        tracks: dict[int, list[Entry]] = {number: [] for number in by_id}
        for entry in read_json(path).entries():
            category = entry["category_id"].integer()
            if category not in categories:
                raise entry["category_id"].error(f"category {category} is none of {self.name}")
            entry["score"].number()
            number = _video_of(entry, tracks)
            if not entry.is_set("iscrowd"):  # several things that nobody told apart
                tracks[number].append(entry)
        for number, entries in tracks.items():
            video = by_id[number]
            assert video.size is not None, video.name
            read_tubes(entries, video.size, len(video.scored))
        return {RESULTS: path}

    def _find_annotations(self, root: Path, split: str) -> Path:
        texts = root / "dataset_annotations"
        if split == "train":
            files = [texts / "training" / f"{self.name}.json"]
        else:
            files = [texts / "inference" / self._annotations.format(each) for each in SPELLINGS[split]]
        for spelling in SPELLINGS[split]:
            files += [
                root / spelling / "instances.json",
                root / f"{spelling}.json",
                root / f"annotations_{spelling}.json",
                root / f"annotations/instances_{spelling}_sub.json",
            ]
        return first_that_exists(files, f"annotations of {self.name} {split}")

    def _check_year(self, root: Entry) -> None:
        info = root.get("info")
        year = info.get("year") if info else None
        if year is not None and self._years and str(year.value) not in map(str, self._years):
            years = " or ".join(map(str, self._years))
            raise year.expected(f"{years}, the years of {self.name}")


YOUTUBE_VIS_2019 = YouTubeVIS(
    "youtube_vis_2019",
    "youtube_vis/{}_2019.json",
    years=(2018, 2019),  # its files were made of YouTube-VOS 2018
)
YOUTUBE_VIS_2021 = YouTubeVIS("youtube_vis_2021", "youtube_vis/{}_2021.json", years=(2021, 2022))
OVIS = YouTubeVIS("ovis", "ovis/{}.json", score=evaluate_ovis)


def has_tracks(root: Entry) -> bool:
    """Whether the tracks are public; some files that have none say `null` or give an empty list."""
    annotations = root.get("annotations")
    return annotations is not None and annotations.value not in (None, [])


def _read_video(entry: Entry, images: Path) -> VideoSample:
    name = video_name(entry)
    files: list[str] = entry["file_names"].value
    frame_names = tuple(os.path.splitext(os.path.basename(file))[0] for file in files)
    if len(set(frame_names)) != len(files):
        raise entry["file_names"].error("a frame comes twice")
    length = entry.get("length")
    if length is not None and length.integer() != len(files):
        raise length.expected(f"{len(files)}, the number of file names")
    return VideoSample(
        name=name,
        images=tuple(images / file for file in files),
        frame_names=frame_names,
        size=(entry["height"].integer(1, LONGEST_SIDE), entry["width"].integer(1, LONGEST_SIDE)),
        entry={"video_id": entry["id"].integer()},
    )


def _video_of(entry: Entry, videos: Collection[int]) -> int:
    number = entry["video_id"].integer()
    if number not in videos:
        raise entry["video_id"].error(f"video {number} is unknown")
    return number


def _read_truth(entries: list[Entry], video: VideoSample, labels: dict[int, int]) -> Truth:
    of_track: dict[int, int | None] = {}
    for track, entry in enumerate(entries, 1):
        category = entry["category_id"].integer()
        if category not in labels:
            raise entry["category_id"].error(f"category {category} is unknown")
        of_track[track] = labels[category]
    assert video.size is not None
    tubes = read_tubes(entries, video.size, len(video.images))
    # codes alone: a list of sizes and a dict for each of the masks of a split would be most of its memory
    frames = tuple(dict(_visible(masks)) for masks in zip(*tubes, strict=True)) or ({},) * len(video.images)
    return Truth(of_track, tuple(map(tuple, frames)), partial(_read_frame, video.size, frames))


def _visible(masks: Iterable[RLE | None]) -> Iterator[tuple[int, bytes]]:
    for track, mask in enumerate(masks, 1):
        if mask is not None and rle.area(mask):
            yield track, mask["counts"]


def _read_frame(size: Size, frames: Sequence[dict[int, bytes]], t: int) -> FrameTruth:
    return FrameTruth({track: RLE(size=list(size), counts=code) for track, code in frames[t].items()})


def _segmentation(mask: RLE | None) -> dict[str, Any] | None:
    if mask is None or not rle.area(mask):
        return None
    return {"size": list(mask["size"]), "counts": mask["counts"].decode("ascii")}
