"""BURST: objects that a point (PET) or a mask (VOS) shows in the frame of their first appearance.

    published: dataset_images/{training/burst,inference/burst/<split>}/<dataset>/<sequence>/<frame>.jpg,
               dataset_annotations/training/burst.json, dataset_annotations/inference/burst/
               first_frame_annotations_{val,test}.json, all_classes_{val,test}.json (the truth)
    official:  frames/<split>/<dataset>/<sequence>/<frame>.jpg, as TAO has it, or images/<split>/...;
               {val,test}/{first_frame_annotations,all_classes}.json, train/all_classes.json, in the folder
               itself or in annotations/
    results:   results.json, of the truth's format

Videos are run at up to eleven frames a second and scored at the annotated ones, one a second; for training
they are the annotated frames alone. A video is called <dataset>/<sequence>.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tarvis.datasets.benchmark import FrameTruth, Roots, Truth, VideoSample, first_that_exists
from tarvis.files import rle
from tarvis.files.atomic import whole_file, write_json_list
from tarvis.files.records import Entry, read_json
from tarvis.scoring import burst as scoring
from tarvis.scoring.burst import by_name, frame_names, track_categories, track_id
from tarvis.scoring.youtube_vis import LONGEST_SIDE
from tarvis.stitch.schedule import interleaved_frames
from tarvis.structures import RLE, InputError, Reference, Size, VideoResult

RESULTS = "results.json"
SMALLEST = 100
"""Pixels; smaller masks are not trained with."""
HIGHEST_FPS = 1000


class Burst:
    """BURST, exemplar-guided."""

    name = "burst"
    tasks: tuple[str, ...] = ("pet", "vos")
    splits: tuple[str, ...] = ("val", "test", "train")
    headline = "HOTA/all"
    classes = None

    def find(self, root: Path, split: str) -> Roots:
        """See `Benchmark.find`; frames and annotations may be of different layouts."""
        self._known(split)
        use = "training/burst" if split == "train" else f"inference/burst/{split}"
        frames = [root / "dataset_images" / use, root / "frames" / split, root / "images" / split]
        images = first_that_exists(frames, f"frames of BURST {split}")
        annotations = first_that_exists(_annotations(root, split), f"annotations of BURST {split}")
        truth = annotations if split == "train" else next(filter(Path.is_file, _truth(root, split)), None)
        return Roots(images, annotations, truth)

    def read(self, roots: Roots, split: str) -> list[VideoSample]:
        """See `Benchmark.read`. Videos to train with that show no object are left out."""
        self._known(split)
        root = _of_split(roots.annotations, split)
        sequences = [_read(name, entry, split) for name, entry in by_name(root).items()]
        videos = [each.sample(roots.images, split) for each in sequences if split != "train" or each.firsts]
        if not videos:
            raise root["sequences"].error("has no sequence that shows an object")
        return videos

    def write(self, result: VideoResult, video: VideoSample, folder: Path) -> dict[str, Any]:
        """The video's entry of the results: what its annotations say, with masks that were found.

        Empty masks are left out, since they would be counted as detections.
        """
        del folder  # masks are in the JSON file
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

    def evaluate(
        self, results: Path, truth: Path, split: str, videos: Collection[str] | None = None
    ) -> dict[str, float]:
        """HOTA and AP; `truth` is all_classes.json, a folder with it, or what `find` takes."""
        self._known(split)
        if truth.is_dir():
            places = [truth / "all_classes.json", *_truth(truth, split)]
            truth = first_that_exists(places, f"truth of BURST {split}")
        return scoring.evaluate(_file(results), truth, videos=videos)

    def check(self, results: Path, videos: Sequence[VideoSample], split: str) -> dict[str, Path]:
        """See `Benchmark.check`. More frames than those that are scored are allowed, empty masks are not."""
        self._known(split)
        root = _of_split(_file(results), split)
        found = by_name(root)
        wanted = {video.name: video for video in videos}
        for name in found.keys() - wanted.keys():
            raise found[name].error(f"sequence {name!r} is not one of BURST {split}")
        for name, video in wanted.items():
            if name not in found:
                raise root["sequences"].error(f"lacks sequence {name!r}")
            _check(found[name], video)
        return {RESULTS: _file(results)}

    def convert(self, download: Path, workspace: Path) -> list[Path]:
        """Copy the annotations of the official download, each checked first, to where the workspace has them.

        Frames stay where they are: make dataset_images/inference/burst/<split> and
        dataset_images/training/burst links to the download's frames/<split>.

        Raises:
            InputError: a file is damaged, or there is none.
        """
        folder = workspace / "dataset_annotations"
        files = {folder / "training/burst.json": ("train", _official(download, "train", *TRAIN_FILES))}
        for split in ("val", "test"):
            for what in ("first_frame_annotations", "all_classes"):
                path = folder / f"inference/burst/{what}_{split}.json"
                files[path] = (split, _official(download, split, f"{what}.json"))
        copies = []
        for path, (split, candidates) in files.items():
            source = next(filter(Path.is_file, candidates), None)
            if source is not None:
                for name, entry in by_name(_of_split(source, split)).items():
                    _read(name, entry, split)
                with source.open("rb") as original, whole_file(path) as copy:
                    shutil.copyfileobj(original, copy)
                copies.append(path)
        if not copies:
            raise InputError(f"{download}: has no annotations of BURST, such as val/all_classes.json")
        return copies

    def _known(self, split: str) -> None:
        if split not in self.splits:
            raise InputError(f"BURST has no split {split!r}; known: {', '.join(self.splits)}")


TRAIN_FILES = ("all_classes.json", "train.json")


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


def _file(results: Path) -> Path:
    return results / RESULTS if results.is_dir() else results


def _of_split(path: Path, split: str) -> Entry:
    root = read_json(path)
    own = root.get("split")
    if own is not None and own.text() != split:
        raise own.expected(repr(split))
    return root


class _First(NamedTuple):
    """An object where it appears first."""

    frame: int  # of those with masks
    track: int
    point: tuple[float, float] | None


@dataclass(frozen=True)
class _Sequence:
    """An entry of a file of annotations; masks are codes by track, frame by annotated frame."""

    name: str
    size: Size
    frames: list[str]
    scored: list[int]  # which of `frames` are annotated
    masks: list[dict[int, bytes]]
    firsts: list[_First]
    metadata: dict[str, Any]

    def mask(self, frame: int, track: int) -> RLE:
        return RLE(size=list(self.size), counts=self.masks[frame][track])

    def references(self) -> list[Reference]:
        """Of every object its mask and, where there is one, its point."""
        found = []
        for at, track, point in self.firsts:
            frame, mask = self.scored[at], torch.from_numpy(rle.decode(self.mask(at, track)))
            found.append(Reference(track, frame, mask=mask))
            if point is not None:
                found.append(Reference(track, frame, point=point))
        return found

    def truth(self) -> Truth:
        """Where all frames are annotated."""
        return Truth(
            labels={first.track: None for first in self.firsts},
            visible=tuple(tuple(masks) for masks in self.masks),
            read=lambda t: FrameTruth({track: self.mask(t, track) for track in self.masks[t]}),
        )

    def sample(self, images: Path, split: str) -> VideoSample:
        return VideoSample(
            name=self.name,
            images=tuple(images / self.name / file for file in self.frames),
            frame_names=tuple(self.frames),
            scored=tuple(self.scored),
            size=self.size,
            references=self.references,
            truth=self.truth() if split == "train" else None,
            entry=self.metadata,
        )


def _read(name: str, entry: Entry, split: str) -> _Sequence:
    """A sequence, all of it checked; of masks to train with those that are large enough."""
    size = entry["height"].integer(1, LONGEST_SIDE), entry["width"].integer(1, LONGEST_SIDE)
    fps, named = entry["fps"].integer(1, HIGHEST_FPS), entry["annotated_image_paths"]
    files, annotated = frame_names(entry["all_image_paths"]), frame_names(named)
    if split == "train":
        frames = annotated
    else:
        frames = [files[frame] for frame in interleaved_frames(len(files), fps)]
    place = {file: k for k, file in enumerate(frames)}
    for file in named.entries():
        if file.value not in place:
            raise file.error(f"{file.value!r} is not among the frames that are run, at {fps} a second")
    scored = [place[file] for file in annotated]
    if not scored or scored != sorted(scored):
        raise named.error("expected at least one frame, in the order of all_image_paths")
    masks, firsts = _read_masks(entry, len(scored), size, smallest=SMALLEST if split == "train" else 1)

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
        "track_category_ids": {str(k): categories.get(k, 1) for k in sorted(first.track for first in firsts)},
    }
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        if (listed := entry.get(key)) is not None:
            metadata[key] = [category.integer() for category in listed.entries()]
    return _Sequence(name, size, frames, scored, masks, firsts, metadata)


def _read_masks(
    entry: Entry, num_frames: int, size: Size, smallest: int
) -> tuple[list[dict[int, bytes]], list[_First]]:
    """Codes of masks, and where each object appears first."""
    found = list(_detections(entry, num_frames))
    masks: list[dict[int, bytes]] = [{} for _ in range(num_frames)]
    firsts: dict[int, _First] = {}
    for (t, track, detection), code in zip(found, _codes(found, size), strict=True):
        if (pixels := rle.area(code)) >= smallest:
            masks[t][track] = code["counts"]
            if track not in firsts:
                firsts[track] = _First(t, track, _point(detection, size))
        elif not pixels and detection.get("point") is not None:
            raise detection["rle"].error("expected a mask that is not empty")
    return masks, list(firsts.values())


def _detections(entry: Entry, num_frames: int) -> Iterator[tuple[int, int, Entry]]:
    """Frame, track and entry of each mask, by frame, then track."""
    for t, frame in enumerate(entry["segmentations"].entries(num_frames, "segmentations, one a frame")):
        of_frame = [(track_id(key, frame), detection) for key, detection in frame.items()]
        if len(dict(of_frame)) < len(of_frame):
            raise frame.error("has a track twice")
        yield from ((t, track, detection) for track, detection in sorted(of_frame, key=lambda of: of[0]))


def _codes(found: list[tuple[int, int, Entry]], size: Size) -> list[RLE]:
    try:
        return rle.from_file([detection["rle"].text() for _, _, detection in found], size)
    except rle.BadCode as error:
        raise found[error.index][2]["rle"].expected(f"a run-length code of {size}") from None


def _point(detection: Entry, size: Size) -> tuple[float, float] | None:
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
    found = list(_detections(entry, len(names)))
    for _, track, detection in found:
        if str(track) not in video.entry["track_category_ids"]:
            raise detection.error(f"track {track} is not among those that are given")
        if track not in categories:
            raise entry["track_category_ids"].error(f"has no class of track {track}")
        if (score := detection.get("score")) is not None:
            score.number()
    for (_, _, detection), code in zip(found, _codes(found, video.size), strict=True):
        if not rle.area(code):
            raise detection["rle"].error("is an empty mask, which would count as a detection: leave it out")
