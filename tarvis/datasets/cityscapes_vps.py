"""Cityscapes-VPS, in the format of `panoptic_format`: VPQ.

    in a workspace                                      as downloaded, after its own scripts
    dataset_images/inference/cityscapes_vps_val/        val/img_all/
    dataset_annotations/inference/cityscapes_vps/       im_all_info_val_city_vps.json and
                                                        panoptic_im_val_city_vps.json (names, see below);
                                                        panpotic_gt_val_city_vps.json, val/panoptic_video/
    dataset_images/training/cityscapes_vps/             train/img/
    dataset_annotations/training/cityscapes_vps.json    panoptic_gt_train_city_vps.json,
      (see `coded_videos`)                              train/panoptic_video/

(test as val, without truth.) A video has 30 frames; the fifth, tenth, ... thirtieth of them are run and
scored. `im_all_info` numbers images video * 10000 + frame, from 1, and calls them as Cityscapes does:
frankfurt_000000_001736_leftImg8bit.png. Results are called by the ids of the truth, such as
0005_0025_frankfurt_000000_001736: video, and number among the annotated frames of all 500 videos. Ids come
from the truth, panpotic_gt_val_city_vps.json, or from panoptic_im_{val,test}_city_vps.json, which has the
same; else names of `im_all_info` must begin with such numbers.

    results: folder of pred.json and pan_pred/<image id>.png
    truth:   folder of panpotic_gt_val_city_vps.json (as it is spelled; panoptic_... is found too) and of
             panoptic_video/, or of val/panoptic_video/ as it is downloaded

Entries of pred.json have no names: they are in the order of the truth's images, which come video by video,
six frames each. A video's name is what its images' ids begin with.

Numbers: VPQ/{all,thing,stuff}, the means over windows of 1 to 4 annotated frames (k = 0, 5, 10, 15 in
papers), and for each window n of them <n>/{all,thing,stuff}/{pq,sq,rq,n} and <n>/per_class/<id>/...; in
percent except for counts of classes. Classes that do not occur are left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tarvis.config import InferenceConfig
from tarvis.datasets.benchmark import Roots, Truth, VideoSample, expect_split, first_that_exists, size_of
from tarvis.datasets.classes import class_table
from tarvis.datasets.coded_videos import read_coded_videos
from tarvis.datasets.panoptic_format import (
    JSON,
    PICTURES,
    check_pictures,
    common_size,
    compare,
    frame_name,
    in_order,
    panoptic_truth,
    things_by_id,
    vpq_numbers,
    write_annotations,
    write_pictures,
)
from tarvis.files.folders import chosen
from tarvis.files.records import Entry, read_json
from tarvis.metrics.vpq import CITYSCAPES_VPS_WINDOWS, VPQ
from tarvis.structures import InputError, Size, VideoResult

ANNOTATIONS = ("panpotic_gt_val_city_vps.json", "panoptic_gt_val_city_vps.json")
OFFICIAL_TRAIN = ("panoptic_gt_train_city_vps.json", "panpotic_gt_train_city_vps.json")
NAMES_OF_IMAGES = "panoptic_im_{}_city_vps.json"
IMAGE_NAME = re.compile(r"(\d{4}_\d{4}_)?([^_]+_\d+_\d+)(_leftImg8bit|_newImg8bit)?\.\w+")
"""Numbers of video and annotated frame, city with sequence and frame, kind of image."""
TRUE_PICTURES = {"_newImg8bit.png": "_final_mask.png", "_leftImg8bit.png": "_gtFine_color.png"}
"""End of an image's name -> end of its truth's."""
FRAMES_PER_VIDEO = 6
"""With truth."""


class Known(NamedTuple):
    """An image of the truth: its id, its entry, and the entry with its segments if they are known."""

    id: str
    image: Entry
    segments: Entry | None

    def expect_segments(self) -> Entry:
        """The entry with its segments."""
        if self.segments is None:
            raise self.image["id"].error(f"image {self.id!r} has no annotation")
        return self.segments

    @property
    def picture(self) -> str:
        """Name of its picture of ids."""
        name = self.image["file_name"].path()
        end = next((end for end in TRUE_PICTURES if name.endswith(end)), None)
        if end is None:
            raise self.image["file_name"].expected(f"a name that ends with {' or '.join(TRUE_PICTURES)}")
        return name.removesuffix(end) + TRUE_PICTURES[end]


class CityscapesVPS:
    """Cityscapes-VPS; with `dense`, the network sees all 30 frames, of which those with truth are scored."""

    name: str = "cityscapes_vps"
    tasks: tuple[str, ...] = ("vps",)
    splits: tuple[str, ...] = ("val", "test", "train")
    headline = "VPQ/all"
    inference = InferenceConfig(10, 5, max_tracks_per_clip=1000, score_threshold=0.5)
    training: Mapping[str, Any] = {
        "tasks": ("vps",),
        "consecutive": True,
        "min_sizes": (448,),
        "crop": (0.5, 0.5),
        "colour": "narrow",
    }

    def __init__(self, dense: bool = False) -> None:
        self._dense = dense
        self.classes = class_table("cityscapes_vps")

    def find(self, root: Path, split: str) -> Roots:
        expect_split(self.name, self.splits, split)
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
        truth = found.parent if split == "val" and _true_annotations(found.parent) else None
        if truth is not None and not _true_pictures(truth).is_dir():
            truth = None
        return Roots(first_that_exists(images, f"images of Cityscapes-VPS {split}"), found, truth)

    def read(self, roots: Roots, split: str) -> list[VideoSample]:
        """See `Benchmark`. The name of a training file tells whether it is an official one."""
        if split != "train":
            return self._read_info(roots, split)
        if roots.annotations.name not in OFFICIAL_TRAIN:
            return read_coded_videos(roots.annotations, roots.images, self.name)
        return self._read_official_train(roots.annotations, roots.images)

    def write(self, result: VideoResult, video: VideoSample, folder: Path) -> list[dict[str, Any]]:
        names = [f"{video.frame_names[frame]}.png" for frame in video.scored]
        listed = write_pictures(result, video, folder, names, self.classes)
        return [{"segments_info": segments} for segments in listed]

    def join(self, shares: Iterable[Any], videos: Sequence[VideoSample], split: str, folder: Path) -> None:
        write_annotations(folder, (frame for share in shares for frame in share))

    def score(
        self, results: Path, truth: Path, split: str, videos: Collection[str] | None = None
    ) -> dict[str, float]:
        """See `Benchmark`. Results may be of the videos named alone, or of all videos of the truth."""
        path = _true_annotations(truth)
        if path is None:
            raise InputError(f"{truth}: has no {ANNOTATIONS[0]}")
        root = read_json(path)
        is_thing, known = things_by_id(root), list(_read_known(root).values())
        if not known or len(known) % FRAMES_PER_VIDEO:
            raise root["images"].error(f"expected {FRAMES_PER_VIDEO} for each video, got {len(known)} in all")
        of_frame = [_video_name(known[k - k % FRAMES_PER_VIDEO].id) for k in range(len(known))]
        wanted = chosen(of_frame[::FRAMES_PER_VIDEO], videos, path)
        frames = [k for k, video in enumerate(of_frame) if video in wanted]
        if strange := next((k for k in frames if _video_name(known[k].id) != of_frame[k]), None):
            raise known[strange].image["id"].error(f"is among the frames of video {of_frame[strange]!r}")
        names, listed = [each.id for each in known], read_json(results / JSON)["annotations"]
        if len(listed.entries()) == len(known):  # of all videos
            every = in_order(listed, names, name_of=_frame_name)
            predictions = [every[k] for k in frames]
        else:
            predictions = in_order(
                listed, [names[k] for k in frames], "annotations, one an image", _frame_name
            )

        vpq, pictures = VPQ(is_thing, CITYSCAPES_VPS_WINDOWS), _true_pictures(truth)
        for k, predicted in zip(frames, predictions, strict=True):
            picture = results / PICTURES / f"{known[k].id}.png"
            true = known[k].expect_segments(), pictures / known[k].picture
            vpq.add_frame(*compare(*true, predicted, picture, is_thing))
            if (k + 1) % FRAMES_PER_VIDEO == 0:
                vpq.end_video()
        return vpq_numbers(vpq, {"VPQ": CITYSCAPES_VPS_WINDOWS})

    def check(self, results: Path, videos: Sequence[VideoSample], split: str) -> dict[str, Path]:
        frames = [(f"{video.frame_names[k]}.png", size_of(video)) for video in videos for k in video.scored]
        listed, names = read_json(results / JSON)["annotations"], [name[:-4] for name, _ in frames]
        entries = in_order(listed, names, "annotations, one a frame", _frame_name)
        listed_frames = ((*frame, entry) for frame, entry in zip(frames, entries, strict=True))
        return check_pictures(results, listed_frames, self.classes.ids)

    def _read_official_train(self, path: Path, images: Path) -> list[VideoSample]:
        """The training split as it is downloaded: annotated frames alone."""
        pictures = first_that_exists([path.parent / "train/panoptic_video"], "true pictures")
        videos: dict[str, list[Known]] = {}
        for _, known in sorted(_read_known(read_json(path)).items()):
            videos.setdefault(_video_name(known.id), []).append(known)
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
                raise image["id"].error(f"id {image['id'].value} appears twice")
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
        video_names = {_video_name(name) for name in names}
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
            truth = self._truth(known, _true_pictures(roots.truth), size)
        return VideoSample(
            name=video_names.pop(),
            images=tuple(roots.images / frames[k]["file_name"].path() for k in shown),
            frame_names=tuple(called.values()),
            scored=tuple(shown.index(k) for k in annotated),
            size=size,
            truth=truth,
        )

    def _truth(self, frames: list[Known], pictures: Path, size: Size | None) -> Truth:
        listed = [(frame.expect_segments(), pictures / frame.picture) for frame in frames]
        return panoptic_truth(listed, size, self.classes)


class _Ids:
    """The names that results use for the annotated images of a split; `known` has the truth's images."""

    def __init__(self, roots: Roots, split: str) -> None:
        beside = roots.annotations.parent
        folders = [roots.truth, beside] if split == "val" else []
        places = [path for folder in folders if folder and (path := _true_annotations(folder))]
        places.append(beside / NAMES_OF_IMAGES.format(split))
        self._places = list(map(str, places))
        self._source = next((path for path in places if path.is_file()), None)
        self.known = _read_known(read_json(self._source)) if self._source else {}
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


def _frame_name(entry: Entry) -> str | None:
    """The id of the image that a result's entry names, which official results do not; None without one."""
    own = entry.get("image_id")
    name = frame_name(entry) if own is None else own.text()
    for end in (*TRUE_PICTURES, *TRUE_PICTURES.values()):
        name = name and name.removesuffix(end[:-4])
    return name


def _read_known(root: Entry) -> dict[str, Known]:
    """The images of a file of the truth by their ids, in its order."""
    listed = root.get("annotations")
    segments = listed.by("image_id", Entry.text, "image") if listed else {}
    images = root["images"].by("id", Entry.path)
    return {name: Known(name, image, segments.get(name)) for name, image in images.items()}


def _true_annotations(truth: Path) -> Path | None:
    """The JSON file of the truth, None where it is missing."""
    return next((path for name in ANNOTATIONS if (path := truth / name).is_file()), None)


def _true_pictures(truth: Path) -> Path:
    """The folder of the true pictures, if it exists."""
    places = [truth / "panoptic_video", truth / "val" / "panoptic_video"]
    return next((path for path in places if path.is_dir()), places[0])


def _video_name(image: str) -> str:
    """Name of the video of an image, by the image's id."""
    return image.split("_")[0]


def every_fifth(frames: Sequence[int]) -> list[int]:
    """The frames of a video that are annotated: numbers 5, 10, .. of `frames`, which count from 1."""
    return list(frames[4::5])
