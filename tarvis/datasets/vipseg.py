"""VIPSeg, as its own scripts convert it: frames of 720 rows, COCO's panoptic format.

    in a workspace                                as downloaded and converted
    dataset_images/inference/vipseg/              VIPSeg_720P/images/
    dataset_images/inference/vipseg_test/         VIPSeg_720P/images/ or imgs/
    dataset_annotations/inference/vipseg/         VIPSeg_720P/, next to panomasksRGB/:
      val.json, test.json or test.txt               panoptic_gt_VIPSeg_{val,test}.json, test.txt
    dataset_images/training/vipseg/               VIPSeg_720P/images/
    dataset_annotations/training/vipseg/          VIPSeg_720P/panomasks/, train.txt and
      panoptic_masks/, video_info.json              panoptic_gt_VIPSeg_train.json

The test split has no public truth, so a list of its videos will do; their frames are those in its folders.

Pixels of panomasks are class + 1 for stuff, (class + 1) * 100 + a number for things, 0 for void; of those,
`video_info.json` lists what a video shows, and pixels of anything else are void. Things without a number,
which have no instances to learn from, are not listed by `convert`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tarvis.datasets.benchmark import (
    VOID,
    FrameTruth,
    Roots,
    Truth,
    VideoSample,
    expect_files,
    first_that_exists,
)
from tarvis.datasets.classes import class_table
from tarvis.datasets.panoptic_results import (
    JSON,
    PICTURES,
    check_frame,
    common_size,
    copy_file,
    panoptic_truth,
    size_of,
    submission,
    write_annotations,
    write_pictures,
)
from tarvis.files.atomic import write_json
from tarvis.files.folders import files
from tarvis.files.pictures import IdMap, read_ids
from tarvis.files.records import Entry, read_json
from tarvis.scoring import vipseg as scorer
from tarvis.scoring.davis import read_names
from tarvis.structures import InputError, VideoResult

FIRST_THING = 300
"""No pixel of a thing is less: classes 0 and 1 are stuff."""


class VIPSeg:
    """VIPSeg."""

    name: str = "vipseg"
    tasks: tuple[str, ...] = ("vps",)
    splits: tuple[str, ...] = ("val", "test", "train")
    headline = "VPQ/all"

    def __init__(self) -> None:
        self.classes = class_table("vipseg")

    def find(self, root: Path, split: str) -> Roots:
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
        videos: dict[str, VideoSample] = {}
        if (sequences := root.get("sequences")) is not None:
            masks = roots.annotations.parent / "panoptic_masks"
            found = (self._of_video_info(entry, roots.images, masks) for entry in sequences.entries())
        else:
            segments = scorer.by_video(root) if roots.truth is not None else {}
            found = (self._of_panoptic(entry, roots, segments) for entry in root["videos"].entries())
        for video in found:
            if video.name in videos:
                raise InputError(f"{roots.annotations}: video {video.name!r} comes twice")
            videos[video.name] = video
        if not videos:
            raise InputError(f"{roots.annotations}: has no videos")
        return list(videos.values())

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

    def join(
        self,
        shares: Iterable[Any],
        videos: Sequence[VideoSample],
        split: str,
        folder: Path,
    ) -> None:
        write_annotations(folder, shares)

    def evaluate(
        self, results: Path, truth: Path, split: str, videos: Collection[str] | None = None
    ) -> dict[str, float]:
        of_split = truth / f"panoptic_gt_VIPSeg_{split}.json"
        return scorer.evaluate(results, of_split if of_split.is_file() else truth, videos)

    def check(self, results: Path, videos: Sequence[VideoSample], split: str) -> dict[str, Path]:
        root, expected = read_json(results / JSON), {video.name: video for video in videos}
        entries = root["annotations"].entries(len(videos), "videos")
        found = {entry["video_id"].text(): entry for entry in entries}
        for entry in entries:
            if entry["video_id"].text() not in expected:
                raise entry["video_id"].error(f"video {entry['video_id'].value!r} is unknown")
        for name, video in expected.items():
            if name not in found:
                raise root["annotations"].error(f"lacks video {name!r}")
            frames = found[name]["annotations"].entries(len(video.scored), "frames")
            size = size_of(video)
            for entry, frame in zip(frames, video.scored, strict=True):
                called = entry.get("file_name")
                if called and called.text().rsplit(".", 1)[0] != video.frame_names[frame].rsplit(".", 1)[0]:
                    raise called.expected(video.frame_names[frame])
                picture = results / PICTURES / _picture(video, frame)
                check_frame(entry, picture, size, self.classes.ids)
        return submission(results, [_picture(video, frame) for video in videos for frame in video.scored])

    def convert(self, download: Path, workspace: Path) -> list[Path]:
        """Make the workspace's annotations of a download; masks become links, or copies where that fails.

        Returns:
            the files made, without the masks.

        Raises:
            InputError: something is missing or damaged.
        """
        masks = first_that_exists([download / "VIPSeg_720P/panomasks", download / "panomasks"], "masks")
        base = masks.parent
        images = first_that_exists([base / "images"], "frames of 720 rows, which change2_720p.py makes")
        lists = [base / "train.txt", base.parent / "train.txt"]
        names = read_names(first_that_exists(lists, "list of training videos"))
        target = workspace / "dataset_annotations/training/vipseg"
        sequences = [
            self._convert_video(name, images / name, masks / name, target / "panoptic_masks" / name)
            for name in tqdm(names, self.name, unit="video")
        ]
        categories = [{"id": k, "name": name} for k, name in enumerate(self.classes.names)]
        made = [target / "video_info.json"]
        write_json(made[0], {"categories": categories, "sequences": sequences})
        sources = [
            (base / "panoptic_gt_VIPSeg_val.json", "val.json"),
            (base / "panoptic_gt_VIPSeg_test.json", "test.json"),
            (base / "test.txt", "test.txt"),
            (base.parent / "test.txt", "test.txt"),
        ]
        for source, name in sources:
            path = workspace / "dataset_annotations/inference/vipseg" / name
            if source.is_file() and path not in made:
                copy_file(source, path)
                made.append(path)
        return made

    def _convert_video(self, name: str, images: Path, masks: Path, target: Path) -> dict[str, Any]:
        """The video's entry in `video_info.json`."""
        pictures = files(masks, ".png")
        expect_files(images / f"{PurePosixPath(picture).stem}.jpg" for picture in pictures)
        stuff: set[int] = set()
        occupancy = []
        for picture in pictures:
            values = np.flatnonzero(np.bincount(_read(masks / picture).ravel())).tolist()
            occupancy.append([value for value in values if self._is_thing(value)])
            stuff |= {value - 1 for value in values if value - 1 in self.classes.stuff}
            target.mkdir(parents=True, exist_ok=True)
            _link(masks / picture, target / picture)
        return {
            "name": name,
            "filenames": [PurePosixPath(picture).stem for picture in pictures],
            "instance_ids": sorted({value for shown in occupancy for value in shown}),
            "stuff_classes": sorted(stuff),
            "frame_instance_occupancy": occupancy,
        }

    def _is_thing(self, value: int) -> bool:
        return value >= FIRST_THING and value // 100 - 1 in self.classes.things

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
            annotations = segments[name].entries(len(frames), "annotations, one an image")
            listed = [(each, pictures / each["file_name"].path()) for each in annotations]
            truth = panoptic_truth(listed, size, self.classes)
        return _video(roots.images / name, name, frames, size=size, truth=truth)

    def _of_video_info(self, entry: Entry, images: Path, masks: Path) -> VideoSample:
        name, stems = entry["name"].path(), [stem.path() for stem in entry["filenames"].entries()]
        if not stems or len(set(stems)) < len(stems):
            raise entry["filenames"].error("expected at least one frame, and each frame once")
        labels: dict[int, int | None] = {}
        for each in entry["instance_ids"].entries():
            if not self._is_thing(each.integer()) or each.value in labels:
                raise each.expected("(class + 1) * 100 + number of a thing, each once")
            labels[each.value] = each.value // 100 - 1
        stuff = [each.integer(0, self.classes.num_classes - 1) for each in entry["stuff_classes"].entries()]
        visible = []
        for frame in entry["frame_instance_occupancy"].entries(len(stems), "lists, one a frame"):
            shown = {each.integer() for each in frame.entries()}
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


def _read(path: Path) -> IdMap:
    try:
        return read_ids(path)
    except ValueError as error:
        raise InputError(str(error)) from None


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
    values = _read(paths[frame])
    return FrameTruth(ids=tracks[values], semantic=labels[values])


def _link(source: Path, target: Path) -> None:
    """Make `target` a link to a file, or a copy where the disk does not link."""
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:
        shutil.copyfile(source, part)
    os.replace(part, target)
