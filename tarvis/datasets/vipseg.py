"""VIPSeg, as its own scripts convert it: frames of 720 rows, in the format of `panoptic_format`; VPQ and STQ.

    in a workspace                                as downloaded and converted
    dataset_images/inference/vipseg/              VIPSeg_720P/images/
    dataset_images/inference/vipseg_test/         VIPSeg_720P/images/ or imgs/
    dataset_annotations/inference/vipseg/         VIPSeg_720P/, next to panomasksRGB/:
      val.json, test.json or test.txt               panoptic_gt_VIPSeg_{val,test}.json, test.txt
    dataset_images/training/vipseg/               VIPSeg_720P/images/
    dataset_annotations/training/vipseg/          VIPSeg_720P/, next to panomasksRGB/:
      panoptic_masks/, video_info.json              panoptic_gt_VIPSeg_train.json

    results: folder of pred.json and pan_pred/<video>/<frame>.png
    truth:   folder of panoptic_gt_VIPSeg_{val,test,train}.json (one of them) and of
             panomasksRGB/<video>/<frame>.png; or that JSON file

The test split has no public truth, so a list of its videos is enough; their frames are those in its folders.

Pixels of panoptic_masks are class + 1 for stuff, (class + 1) * 100 + a number for things, 0 for void; of
those, `video_info.json` lists what a video shows, and pixels of anything else are void.

Numbers: VPQ/{all,thing,stuff} in percent, the means over windows of 1, 2, 4 and 6 frames that papers quote;
VPQ_with_8/{all,thing,stuff}, the means over 1, 2, 4, 6 and 8 that the official script prints; STQ, AQ, IoU in
[0, 1]; <n>/{all,thing,stuff}/{pq,sq,rq,n} and <n>/per_class/<id>/... for each window;
per_sequence/<video>/{STQ,AQ,IoU,Length}. Classes that do not occur are left out.

For STQ an instance is the place of its id in the order of first listing in its video, from 0, as in the
official script: the segment that a video lists first counts as crowd if it is a thing.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarvis.config import InferenceConfig
from tarvis.datasets.benchmark import (
    FrameTruth,
    Roots,
    Truth,
    VideoSample,
    expect_split,
    first_that_exists,
    size_of,
)
from tarvis.datasets.classes import class_table
from tarvis.datasets.panoptic_format import (
    JSON,
    PICTURES,
    check_pictures,
    common_size,
    compare,
    in_order,
    panoptic_truth,
    things_by_id,
    vpq_numbers,
    write_annotations,
    write_pictures,
)
from tarvis.files.folders import chosen, files, read_names
from tarvis.files.pictures import read_ids
from tarvis.files.records import Entry, read_each, read_json
from tarvis.metrics.overlaps import Overlaps
from tarvis.metrics.stq import INSTANCES, STQ, encode
from tarvis.metrics.vpq import VIPSEG_WINDOWS, VPQ, Segments
from tarvis.structures import VOID, InputError, Size, VideoResult

FIRST_THING = 300
"""The least pixel of a thing: classes 0 and 1 are stuff."""
PAPER_WINDOWS = (1, 2, 4, 6)


class VIPSeg:
    """VIPSeg; a `Benchmark`."""

    name: str = "vipseg"
    tasks: tuple[str, ...] = ("vps",)
    splits: tuple[str, ...] = ("val", "test", "train")
    headline = "VPQ/all"
    inference = InferenceConfig(min_size=576, max_tracks_per_clip=1000, score_threshold=0.5)
    training: Mapping[str, Any] = {
        "tasks": ("vps",),
        "window": 5,
        "min_sizes": (512,),
        "crop": (0.75, 0.5),
        "colour": "narrow",
    }

    def __init__(self) -> None:
        self.classes = class_table("vipseg")

    def find(self, root: Path, split: str) -> Roots:
        expect_split(self.name, self.splits, split)
        annotations, images = root / "dataset_annotations", root / "dataset_images"
        bases = [root / "VIPSeg_720P", root]
        official = [base / f"panoptic_gt_VIPSeg_{split}.json" for base in bases]
        if split == "train":
            official.insert(0, annotations / "training/vipseg/video_info.json")
            folders = [images / "training/vipseg"]
        else:
            folders = [images / ("inference/vipseg_test" if split == "test" else "inference/vipseg")]
            official.insert(0, annotations / f"inference/vipseg/{split}.json")
        folders += [base / "images" for base in bases]
        if split == "test":
            official += [place / "test.txt" for place in (annotations / "inference/vipseg", *bases)]
            folders.append(root / "imgs")
        found = first_that_exists(official, f"annotations of VIPSeg {split}")
        has_truth = found.suffix == ".json" and (found.parent / "panomasksRGB").is_dir()
        return Roots(
            first_that_exists(folders, f"images of VIPSeg {split}"), found, found if has_truth else None
        )

    def read(self, roots: Roots, split: str) -> list[VideoSample]:
        if roots.annotations.suffix == ".txt":
            return [
                _video(roots.images / name, name, files(roots.images / name, ".jpg"))
                for name in read_names(roots.annotations)
            ]
        root = read_json(roots.annotations)
        if (sequences := root.get("sequences")) is not None:
            masks = roots.annotations.parent / "panoptic_masks"
            listed = sequences.by("name", Entry.path, "video").values()
            videos = read_each(listed, lambda entry: self._of_video_info(entry, roots.images, masks))
        else:
            segments = _by_video(root) if roots.truth is not None else {}
            listed = root["videos"].by("video_id", Entry.path, "video").values()
            videos = read_each(listed, lambda entry: self._of_panoptic(entry, roots, segments))
        if not videos:
            raise InputError(f"{roots.annotations}: has no videos")
        return videos

    def write(self, result: VideoResult, video: VideoSample, folder: Path) -> dict[str, Any]:
        pictures = [_picture(video, frame) for frame in video.scored]
        listed = write_pictures(result, video, folder, pictures, self.classes)
        return {
            "video_id": video.name,
            "annotations": [
                {"file_name": video.frame_names[frame], "segments_info": segments}
                for frame, segments in zip(video.scored, listed, strict=True)
            ],
        }

    def join(self, shares: Iterable[Any], videos: Sequence[VideoSample], split: str, folder: Path) -> None:
        write_annotations(folder, shares)

    def score(
        self, results: Path, truth: Path, split: str, videos: Collection[str] | None = None
    ) -> dict[str, float]:
        path = _annotations(truth, split)
        root = read_json(path)
        is_thing = things_by_id(root)
        num_classes = self.classes.num_classes
        if max(is_thing, default=0) >= num_classes:
            raise root["categories"].error(f"expected ids below {num_classes}, got {max(is_thing)}")
        annotations, listed = _by_video(root), root["videos"].by("video_id", Entry.path, "video")
        names = chosen(list(listed), videos, path)
        for name in names:
            if name not in annotations:
                raise listed[name]["video_id"].error(f"video {name!r} has no annotations")
        vpq = VPQ(is_thing, VIPSEG_WINDOWS)
        stq = STQ(num_classes, [k for k, thing in is_thing.items() if thing], VOID)
        images_of = {name: listed[name]["images"].entries() for name in names}
        stems = {name: _stems(images) for name, images in images_of.items()}
        predictions = _read_result(results, stems)
        for name in names:
            images, predicted = images_of[name], predictions[name]
            frames = in_order(annotations[name], stems[name], "annotations, one an image")
            true_instances, instances = _instances(frames), _instances(predicted)
            for entry, image, prediction in zip(frames, images, predicted, strict=True):
                true_picture = path.parent / "panomasksRGB" / name / entry["file_name"].path()
                picture = results / PICTURES / name / image["file_name"].path()
                shared, truths, found = compare(entry, true_picture, prediction, picture, is_thing)
                vpq.add_frame(shared, truths, found)
                true_codes = _encode(shared.truth, truths, true_instances)
                codes = _encode(shared.predicted, found, instances)
                stq.add_frame(Overlaps(true_codes, codes, shared.pixels))
            vpq.end_video()
            stq.end_sequence(name)

        numbers = vpq_numbers(vpq, {"VPQ": PAPER_WINDOWS, "VPQ_with_8": VIPSEG_WINDOWS})
        return numbers | stq.summary()

    def check(self, results: Path, videos: Sequence[VideoSample], split: str) -> dict[str, Path]:
        names = {
            video.name: [os.path.splitext(video.frame_names[frame])[0] for frame in video.scored]
            for video in videos
        }
        predictions = _read_result(results, names, are_all=True)

        def frames() -> Iterator[tuple[str, Size, Entry]]:
            for video in videos:
                size = size_of(video)
                for entry, frame in zip(predictions[video.name], video.scored, strict=True):
                    yield _picture(video, frame), size, entry

        return check_pictures(results, frames(), self.classes.ids)

    def _of_panoptic(self, entry: Entry, roots: Roots, segments: dict[str, Entry]) -> VideoSample:
        name, images = entry["video_id"].path(), entry["images"].entries()
        frames = [str(PurePosixPath(image["file_name"].path()).with_suffix(".jpg")) for image in images]
        if not frames or len(set(frames)) < len(frames):
            raise entry["images"].error("expected at least one image, and each image once")
        size, truth = common_size(images), None
        if roots.truth is not None:
            folder = roots.truth if roots.truth.is_dir() else roots.truth.parent
            pictures = folder / "panomasksRGB" / name
            if name not in segments:
                raise entry["video_id"].error(f"video {name!r} has no annotations")
            annotations = in_order(segments[name], _stems(images), "annotations, one an image")
            listed = [(frame, pictures / frame["file_name"].path()) for frame in annotations]
            truth = panoptic_truth(listed, size, self.classes)
        return _video(roots.images / name, name, frames, size=size, truth=truth)

    def _of_video_info(self, entry: Entry, images: Path, masks: Path) -> VideoSample:
        name, stems = entry["name"].path(), [stem.path() for stem in entry["filenames"].entries()]
        if not stems or len(set(stems)) < len(stems):
            raise entry["filenames"].error("expected at least one frame, and each frame once")
        labels: dict[int, int | None] = {}
        for listed in entry["instance_ids"].entries():
            number = listed.integer()
            label = number // 100 - 1
            if number < FIRST_THING or label not in self.classes.things or number in labels:
                raise listed.expected("(class + 1) * 100 + number of a thing, each once")
            labels[number] = label
        classes = entry["stuff_classes"].entries()
        stuff = [listed.integer(0, self.classes.num_classes - 1) for listed in classes]
        visible = []
        for frame in entry["frame_instance_occupancy"].entries(len(stems), "lists, one a frame"):
            shown = {number.integer() for number in frame.entries()}
            if not shown <= labels.keys():
                raise frame.error(f"shows instance {min(shown - labels.keys())}, which is not listed")
            visible.append(tuple(sorted(shown)))
        read = partial(_read_labels, [masks / name / f"{stem}.png" for stem in stems], labels, stuff)
        frames = [f"{stem}.jpg" for stem in stems]
        return _video(images / name, name, frames, truth=Truth(labels, tuple(visible), read))


def _video(folder: Path, name: str, frames: Sequence[str], **known: Any) -> VideoSample:
    return VideoSample(name, tuple(folder / frame for frame in frames), tuple(frames), **known)


def _picture(video: VideoSample, frame: int) -> str:
    return f"{video.name}/{PurePosixPath(video.frame_names[frame]).with_suffix('.png')}"


def _read_labels(
    paths: Sequence[Path], instances: dict[int, int | None], stuff: Sequence[int], frame: int
) -> FrameTruth:
    tracks: NDArray[np.uint16] = np.zeros(2**16, np.uint16)
    labels: NDArray[np.uint8] = np.full(2**16, VOID, np.uint8)
    for k in stuff:
        labels[k + 1] = k
    for value, label in instances.items():
        assert label is not None
        tracks[value], labels[value] = value, label
    values = read_ids(paths[frame])
    return FrameTruth(ids=tracks[values], semantic=labels[values])


def _annotations(truth: Path, split: str) -> Path:
    """The JSON file of the truth, of the split where a folder has several."""
    if truth.is_file():
        return truth
    names = [f"panoptic_gt_VIPSeg_{each}.json" for each in dict.fromkeys((split, "val", "test", "train"))]
    found = [truth / name for name in names if (truth / name).is_file()]
    if len(found) == 1 or (found and found[0].name == names[0]):
        return found[0]
    have = " and ".join(path.name for path in found) or "no panoptic_gt_VIPSeg_val.json"
    raise InputError(f"{truth}: has {have}; name the file")


def _by_video(root: Entry) -> dict[str, Entry]:
    """Lists of annotated frames by name of the video."""
    videos = root["annotations"].by("video_id", Entry.text, "video")
    return {name: entry["annotations"] for name, entry in videos.items()}


def _stems(images: Iterable[Entry]) -> list[str]:
    """The names of a video's frames, without their suffixes."""
    return [os.path.splitext(image["file_name"].path())[0] for image in images]


def _read_result(
    results: Path, frames: Mapping[str, Sequence[str]], *, are_all: bool = False
) -> dict[str, list[Entry]]:
    """The entries of the frames of videos.

    Args:
        frames: the names of each wanted video's frames, without suffixes.
        are_all: whether results of other videos are an error.
    """
    listed = read_json(results / JSON)["annotations"]
    found = listed.by("video_id", Entry.text, "video")
    if missing := [name for name in frames if name not in found]:
        raise listed.error(f"lacks video {missing[0]!r}")
    if are_all and (unknown := [name for name in found if name not in frames]):
        raise found[unknown[0]]["video_id"].error(f"video {unknown[0]!r} is unknown")
    return {name: in_order(found[name]["annotations"], names) for name, names in frames.items()}


def _instances(frames: Iterable[Entry]) -> dict[int, int]:
    """Number the segment ids of a video in the order of first listing."""
    numbers: dict[int, int] = {}
    for frame in frames:
        for segment in frame["segments_info"].entries():
            number = numbers.setdefault(segment["id"].integer(), len(numbers))
            if number >= INSTANCES:
                raise segment["id"].error(f"expected at most {INSTANCES} segments in a video")
    return numbers


def _encode(ids: NDArray[np.int64], segments: Segments, instances: dict[int, int]) -> NDArray[np.int64]:
    """`encode(class, instance)` of segment ids."""
    numbers = np.array([instances[k] for k in segments.ids.tolist()], np.int64)
    codes = dict(zip(segments.ids.tolist(), encode(segments.categories, numbers).tolist(), strict=True))
    void = VOID * INSTANCES
    return np.array([codes.get(k, void) for k in ids.tolist()], np.int64)
