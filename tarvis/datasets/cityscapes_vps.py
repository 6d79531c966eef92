"""Cityscapes-VPS.

    in a workspace                                      as downloaded, after its own scripts
    dataset_images/inference/cityscapes_vps_val/        val/img_all/
    dataset_annotations/inference/cityscapes_vps/       im_all_info_val_city_vps.json and
                                                        panoptic_im_val_city_vps.json (names, see below);
                                                        panpotic_gt_val_city_vps.json, val/panoptic_video/
    dataset_images/training/cityscapes_vps/             train/img/
    dataset_annotations/training/cityscapes_vps.json    panoptic_gt_train_city_vps.json,
                                                        train/panoptic_video/

(test as val, without truth.) A video has 30 frames; the fifth, tenth, ... thirtieth of them are run and
scored. `im_all_info` numbers images video * 10000 + frame, from 1, and calls them as Cityscapes does:
frankfurt_000000_001736_leftImg8bit.png. Results are called by the ids of the truth, such as
0005_0025_frankfurt_000000_001736: video, and number among the annotated frames of all 500 videos. Ids come
from the truth, panpotic_gt_val_city_vps.json, or from panoptic_im_{val,test}_city_vps.json, which has the
same; else names of `im_all_info` must begin with such numbers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tarvis.datasets.benchmark import Roots, Truth, VideoSample, expect_files, first_that_exists
from tarvis.datasets.classes import class_table
from tarvis.datasets.generic_video import coded_sequence, read_generic, write_generic
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
from tarvis.files.records import Entry, read_json
from tarvis.scoring import cityscapes_vps as scorer
from tarvis.stitch.schedule import every_fifth
from tarvis.structures import InputError, Size, VideoResult

OFFICIAL_TRAIN = ("panoptic_gt_train_city_vps.json", "panpotic_gt_train_city_vps.json")
NAMES_OF_IMAGES = "panoptic_im_{}_city_vps.json"
IMAGE_NAME = re.compile(r"(\d{4}_\d{4}_)?([^_]+_\d+_\d+)(_leftImg8bit|_newImg8bit)?\.\w+")
"""Numbers of video and annotated frame, city with sequence and frame, kind of image."""


class Known(NamedTuple):
    """An image of the truth: its id, its entry, and that of its segments if they are known."""

    id: str
    image: Entry
    segments: Entry | None


class CityscapesVPS:
    """Cityscapes-VPS; with `dense`, the network sees all 30 frames, of which those with truth are scored."""

    name: str = "cityscapes_vps"
    tasks: tuple[str, ...] = ("vps",)
    splits: tuple[str, ...] = ("val", "test", "train")
    headline = "VPQ/all"

    def __init__(self, dense: bool = False) -> None:
        self._dense = dense
        self.classes = class_table("cityscapes_vps")

    def find(self, root: Path, split: str) -> Roots:
        workspace_images, workspace = root / "dataset_images", root / "dataset_annotations"
        if split == "train":
            images = [workspace_images / "training/cityscapes_vps", root / "train/img"]
            annotations = [workspace / "training/cityscapes_vps.json"] + [
                root / name for name in OFFICIAL_TRAIN
            ]
        else:
            info = f"im_all_info_{split}_city_vps.json"
            images = [workspace_images / f"inference/cityscapes_vps_{split}", root / split / "img_all"]
            annotations = [workspace / "inference/cityscapes_vps" / info, root / info]
        found = first_that_exists(annotations, f"annotations of Cityscapes-VPS {split}")
        truth = found.parent if split == "val" and scorer.find_annotations(found.parent) else None
        if truth is not None and not scorer.find_pictures(truth).is_dir():
            truth = None
        return Roots(first_that_exists(images, f"images of Cityscapes-VPS {split}"), found, truth)

    def read(self, roots: Roots, split: str) -> list[VideoSample]:
        """As the protocol says; a training file is taken for an official one by its name."""
        if split != "train":
            return self._read_info(roots, split)
        if roots.annotations.name not in OFFICIAL_TRAIN:
            return read_generic(roots.annotations, roots.images, self.name)
        return self._read_official_train(roots.annotations, roots.images)

    def write(self, result: VideoResult, video: VideoSample, folder: Path) -> list[dict[str, Any]]:
        names = [f"{video.frame_names[frame]}.png" for frame in video.scored]
        listed = write_pictures(result, video, folder, names, self.classes)
        return [{"segments_info": segments} for segments in listed]

    def join(
        self,
        shares: Iterable[Any],
        videos: Sequence[VideoSample],
        split: str,
        folder: Path,
    ) -> None:
        write_annotations(folder, (frame for share in shares for frame in share))

    def evaluate(
        self,
        results: Path,
        truth: Path,
        split: str,
        videos: Collection[str] | None = None,
    ) -> dict[str, float]:
        return scorer.evaluate(results, truth, videos)

    def check(self, results: Path, videos: Sequence[VideoSample], split: str) -> dict[str, Path]:
        names = [f"{video.frame_names[frame]}.png" for video in videos for frame in video.scored]
        sizes = [size_of(video) for video in videos for _ in video.scored]
        entries = read_json(results / JSON)["annotations"].entries(len(names), "annotations, one a frame")
        for entry, name, size in zip(entries, names, sizes, strict=True):
            check_frame(entry, results / PICTURES / name, size, self.classes.ids)
        return submission(results, names)

    def convert(self, download: Path, workspace: Path) -> list[Path]:
        """Make the workspace's annotations of a download; returns the files made.

        Raises:
            InputError: something is missing or damaged.
        """
        annotations = first_that_exists([download / name for name in OFFICIAL_TRAIN], "training annotations")
        images = first_that_exists([download / "train/img"], "training images")
        videos = self._read_official_train(annotations, images)
        expect_files(path for video in videos for path in video.images)
        labels = {str(k): name for k, name in zip(self.classes.ids, self.classes.names, strict=True)}
        sequences = (self._coded(video, images) for video in tqdm(videos, self.name, unit="video"))
        made = [workspace / "dataset_annotations/training/cityscapes_vps.json"]
        write_generic(made[0], sequences, {"category_labels": labels})
        for name in (NAMES_OF_IMAGES.format(split) for split in ("val", "test")):
            for each in (name, name.replace("panoptic_im", "im_all_info")):
                if (download / each).is_file():
                    made.append(workspace / "dataset_annotations/inference/cityscapes_vps" / each)
                    copy_file(download / each, made[-1])
        return made

    def _coded(self, video: VideoSample, images: Path) -> dict[str, Any]:
        """The video's entry in the generic JSON."""
        truth = video.truth
        assert truth is not None

        def maps() -> Iterator[tuple[NDArray[np.uint16], NDArray[np.uint8] | None]]:
            for frame in range(len(video.images)):
                ids, semantic = truth.read(frame)[1:]
                assert ids is not None
                yield ids, semantic

        categories = {track: self.classes.ids[k] for track, k in truth.labels.items() if k is not None}
        paths = [path.relative_to(images).as_posix() for path in video.images]
        return coded_sequence(video.name, paths, maps(), categories.__getitem__)

    def _read_official_train(self, path: Path, images: Path) -> list[VideoSample]:
        """The training split as it is downloaded: annotated frames alone."""
        pictures = first_that_exists([path.parent / "train/panoptic_video"], "true pictures")
        videos: dict[str, list[Known]] = {}
        for _, known in sorted(_read_known(path).items()):
            videos.setdefault(scorer.video_name(known.id), []).append(known)
        if not videos:
            raise InputError(f"{path}: has no images")
        return [
            VideoSample(
                name=name,
                images=tuple(images / frame.image["file_name"].path() for frame in frames),
                frame_names=tuple(frame.id for frame in frames),
                size=(size := common_size([frame.image for frame in frames])),
                truth=self._truth(frames, pictures, size),
            )
            for name, frames in videos.items()
        ]

    def _read_info(self, roots: Roots, split: str) -> list[VideoSample]:
        videos: dict[int, dict[int, Entry]] = {}
        for image in read_json(roots.annotations)["images"].entries():
            video, frame = divmod(image["id"].integer(), 10_000)
            if not video or not frame:
                raise image["id"].expected("video * 10000 + frame, both counted from 1")
            if frame in videos.setdefault(video, {}):
                raise image["id"].error(f"id {image['id'].value} comes twice")
            videos[video][frame] = image
        if not videos:
            raise InputError(f"{roots.annotations}: has no images")
        ids = _Ids(roots, split)
        samples = [self._video(roots, number, frames, ids) for number, frames in videos.items()]
        samples.sort(key=lambda sample: sample.frame_names[sample.scored[0]])
        for sample, after in pairwise(samples):
            if sample.name == after.name:
                raise InputError(f"{roots.annotations}: two videos are called {sample.name!r}")
        return samples

    def _video(self, roots: Roots, number: int, frames: dict[int, Entry], ids: _Ids) -> VideoSample:
        numbers = range(1, max(frames) + 1)
        annotated = every_fifth(numbers)
        shown = list(numbers) if self._dense else annotated
        missing = [k for k in shown if k not in frames]
        if missing or not annotated:
            raise InputError(f"{roots.annotations}: video {number} lacks frame {(missing or [5])[0]}")
        names = [ids.of(frames[k]) for k in annotated]
        video_names = {scorer.video_name(name) for name in names}
        if len(set(names)) < len(names) or len(video_names) > 1:
            raise InputError(
                f"{roots.annotations}: video {number}: expected one video, got {', '.join(names)}"
            )
        called = {k: PurePosixPath(frames[k]["file_name"].path()).stem for k in shown}
        called |= dict(zip(annotated, names, strict=True))
        size = common_size([frames[k] for k in shown])
        known = [ids.known[name] for name in names if name in ids.known]
        truth = None
        if roots.truth is not None and not self._dense and any(each.segments for each in known):
            truth = self._truth(known, scorer.find_pictures(roots.truth), size)
        return VideoSample(
            name=video_names.pop(),
            images=tuple(roots.images / frames[k]["file_name"].path() for k in shown),
            frame_names=tuple(called.values()),
            scored=tuple(shown.index(k) for k in annotated),
            size=size,
            truth=truth,
        )

    def _truth(self, frames: list[Known], pictures: Path, size: Size | None) -> Truth:
        listed = []
        for frame in frames:
            if frame.segments is None:
                raise frame.image["id"].error(f"image {frame.id!r} has no annotation")
            listed.append((frame.segments, pictures / scorer.true_picture(frame.image)))
        return panoptic_truth(listed, size, self.classes)


class _Ids:
    """What results call the annotated images of a split; `known` is what a file of the truth says of each."""

    def __init__(self, roots: Roots, split: str) -> None:
        beside = roots.annotations.parent
        folders = [roots.truth, beside] if split == "val" else []
        places = [path for folder in folders if folder and (path := scorer.find_annotations(folder))]
        places.append(beside / NAMES_OF_IMAGES.format(split))
        self._places = list(map(str, places))
        self._source = next((path for path in places if path.is_file()), None)
        self.known = _read_known(self._source) if self._source else {}
        self._by_name: dict[str, list[str]] = {}  # without the numbers in front
        for each in self.known:
            self._by_name.setdefault(each.split("_", 2)[-1], []).append(each)

    def of(self, image: Entry) -> str:
        """The id of an annotated image."""
        name = image["file_name"]
        match = IMAGE_NAME.fullmatch(PurePosixPath(name.path()).name)
        if match is None:
            raise name.expected("a name such as frankfurt_000000_001736_leftImg8bit.png")
        prefix, stem = match[1] or "", match[2]
        if self._source is None and prefix:
            return prefix + stem
        if self._source is None:
            raise name.error(f"no file gives the id of {name.value!r}; looked for {', '.join(self._places)}")
        found = [prefix + stem] if prefix + stem in self.known else self._by_name.get(stem, [])
        if len(found) != 1:
            raise name.error(f"{name.value!r}: expected one such image in {self._source}, got {len(found)}")
        return found[0]


def _read_known(path: Path) -> dict[str, Known]:
    """The images of a file of the truth by their ids."""
    root = read_json(path)
    listed = root.get("annotations")
    segments: dict[str, Entry] = {}
    for entry in listed.entries() if listed else []:
        if entry["image_id"].text() in segments:
            raise entry["image_id"].error(f"image {entry['image_id'].value!r} comes twice")
        segments[entry["image_id"].value] = entry
    known: dict[str, Known] = {}
    for image in root["images"].entries():
        name = image["id"].path()
        if name in known:
            raise image["id"].error(f"id {name!r} comes twice")
        known[name] = Known(name, image, segments.get(name))
    return known
