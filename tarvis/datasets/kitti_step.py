"""KITTI-STEP: panoptic segmentation of street videos, STQ.

    official:  training/image_02/<seq>/<frame>.png (testing for the split test), of KITTI tracking,
               panoptic_maps/{train,val}/<seq>/<frame>.png
    workspace: dataset_images/inference/kitti_step_{val,test}/<seq>/<frame>.png,
               dataset_images/training/kitti_step/<seq>/<frame>.png,
               dataset_annotations/training/kitti_step.json (see `coded_videos`),
               dataset_annotations/inference/kitti_step/panoptic_maps/val/<seq>/<frame>.png, for scoring
    plain:     <seq>/<frame>.png
    results:   <seq>/<frame>.png
    truth:     panoptic_maps/<split>, or the folder that has it; every sequence in it is scored

Pictures of labels are RGB: the class, or 255 for void; id div 256; id mod 256 (0 for stuff, and for crowds).
Results have ids up to 999.

KITTI's training folder has the sequences of train and val. If a folder has sequences that the lists below
name, those of the split are read; else (the test split, own videos) all are, so do not name own videos by
KITTI's numbers. Videos of the training split have a `truth`; to know what the official maps show, all maps
are read.

Numbers: STQ, AQ, IoU (which papers call SQ) in [0, 1]; per_sequence/<sequence>/{STQ,AQ,IoU,Length}.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tarvis.config import InferenceConfig
from tarvis.datasets.benchmark import (
    FrameTruth,
    Roots,
    Truth,
    VideoSample,
    checked_pictures,
    expect_split,
    first_that_exists,
    shown_ids,
    size_of,
)
from tarvis.datasets.classes import class_table
from tarvis.datasets.coded_videos import read_coded_videos
from tarvis.files.folders import chosen, files, folders, same_names
from tarvis.files.pictures import encode_rgb, read_rgb
from tarvis.files.records import read_each
from tarvis.metrics.overlaps import overlaps
from tarvis.metrics.stq import INSTANCES, STQ
from tarvis.stitch.panoptic import MAX_TRACKS, Labels, decode_labels, paint_over, painting_order
from tarvis.structures import VOID, InputError, Size, VideoResult

SEQUENCES = {
    "val": [2, 6, 7, 8, 10, 13, 14, 16, 18],
    "train": [0, 1, 3, 4, 5, 9, 11, 12, 15, 17, 19, 20],
}
"""Numbers of the official sequences, which are called 0000, 0001, ..."""
OFFICIAL_IMAGES = {"val": "training/image_02", "train": "training/image_02", "test": "testing/image_02"}
WORKSPACE_IMAGES = {
    "val": "dataset_images/inference/kitti_step_val",
    "train": "dataset_images/training/kitti_step",
    "test": "dataset_images/inference/kitti_step_test",
}
NUM_CLASSES = 19
THINGS = (11, 13)  # person, car
TRAINING = "dataset_annotations/training/kitti_step.json"


class KittiStep:
    """KITTI-STEP; a `Benchmark`."""

    name = "kitti_step"
    tasks: tuple[str, ...] = ("vps",)
    splits: tuple[str, ...] = ("val", "train", "test")
    headline = "STQ"
    inference = InferenceConfig(6, 3, max_tracks_per_clip=1000, score_threshold=0.5)
    training: Mapping[str, Any] = {
        "tasks": ("vps",),
        "window": 2,
        "min_sizes": (320,),
        "crop": (0.75, 0.5),
        "colour": "narrow",
    }

    def __init__(self) -> None:
        self.classes = class_table("kitti_step")

    def find(self, root: Path, split: str) -> Roots:
        """The files of a split; where there is no JSON file, `annotations` is the folder of images."""
        expect_split(self.name, self.splits, split)
        plain = next(root.glob("*/*.png"), root / "<sequence>/<frame>.png")
        official, workspace = root / OFFICIAL_IMAGES[split], root / WORKSPACE_IMAGES[split]
        images = first_that_exists([official, workspace, plain], f"images of KITTI-STEP {split}")
        if images == plain:
            images = root
        annotations = images
        if split == "train" and (images == workspace or (root / TRAINING).exists()):
            annotations = first_that_exists([root / TRAINING], "annotations of KITTI-STEP train")
        maps = [root / "panoptic_maps", root / "dataset_annotations/inference/kitti_step/panoptic_maps"]
        return Roots(images, annotations, next((p / split for p in maps if (p / split).is_dir()), None))

    def read(self, roots: Roots, split: str) -> list[VideoSample]:
        """The videos of a split, by name; in the order of the JSON file where `roots.annotations` is one."""
        if roots.annotations.is_file():
            return read_coded_videos(roots.annotations, roots.images, self.name)
        names = folders(roots.images)
        if split in SEQUENCES:
            split_of = {f"{number:04d}": each for each, numbers in SEQUENCES.items() for number in numbers}
            if split_of.keys() & set(names):
                names = [name for name in names if split_of.get(name) == split]
        if not names:
            raise InputError(f"{roots.images}: has no sequence of KITTI-STEP {split}")
        maps = roots.truth if split == "train" else None
        return read_each(names, lambda name: _read_video(name, roots.images / name, maps and maps / name))

    def write(self, result: VideoResult, video: VideoSample, folder: Path) -> None:
        """Write <seq>/<frame>.png, tracks over stuff, the best score on top."""
        assert all(0 < track.id <= MAX_TRACKS for track in result.tracks), [t.id for t in result.tracks]
        tracks = painting_order(result.tracks)
        (folder / video.name).mkdir(parents=True, exist_ok=True)
        for frame in video.scored:
            rgb = step_encoding(*paint_over(decode_labels(result.stuff[frame]), tracks, frame))
            (folder / video.name / f"{video.frame_names[frame]}.png").write_bytes(encode_rgb(rgb))

    def join(self, shares: Iterable[Any], videos: Sequence[VideoSample], split: str, folder: Path) -> None:
        """See `Benchmark`. Does nothing: results are pictures alone."""

    def score(
        self, results: Path, truth: Path, split: str, videos: Collection[str] | None = None
    ) -> dict[str, float]:
        truth = truth / "panoptic_maps" / split if (truth / "panoptic_maps" / split).is_dir() else truth
        stq = STQ(NUM_CLASSES, THINGS, VOID)
        for sequence in chosen(folders(truth), videos, truth):
            names = files(truth / sequence, ".png")
            same_names(results / sequence, names, files(results / sequence, ".png"))
            for name in names:
                true_labels = read_labels(truth / sequence / name)
                size = true_labels.shape[0], true_labels.shape[1]
                stq.add_frame(overlaps(true_labels, read_labels(results / sequence / name, size)))
            stq.end_sequence(sequence)
        return stq.summary()

    def check(self, results: Path, videos: Sequence[VideoSample], split: str) -> dict[str, Path]:
        """Check that every frame has a picture, and its mode, size, classes and ids."""
        found: dict[str, Path] = {}
        for video, paths in checked_pictures(results, videos):
            size = size_of(video)
            for path in paths:
                found[f"{video.name}/{path.name}"] = path
                labels = read_labels(path, size)
                classes, ids = labels // INSTANCES, labels % INSTANCES
                if ids.max() > MAX_TRACKS:
                    raise InputError(f"{path}: expected ids up to {MAX_TRACKS}, got {ids.max()}")
                is_stuff = ~np.isin(classes, THINGS)
                if (wrong := np.flatnonzero(is_stuff & (ids > 0))).size:
                    class_, id_ = classes.flat[wrong[0]], ids.flat[wrong[0]]
                    raise InputError(f"{path}: shows id {id_} of class {class_}, which has no instances")
        return found


def step_encoding(semantic: Labels, instance: NDArray[np.uint16]) -> Labels:
    """The RGB picture [H, W, 3] of labels: class, id div 256, id mod 256."""
    return np.stack([semantic, instance >> 8, instance & 255], axis=-1).astype(np.uint8)


def read_labels(path: Path, size: Size | None = None) -> NDArray[np.int32]:
    """Class * 65536 + instance [H, W] of a picture, checked for unknown classes."""
    rgb = read_rgb(path, size)
    classes = rgb[..., 0]
    unknown = (classes >= NUM_CLASSES) & (classes != VOID)
    if unknown.any():
        raise InputError(
            f"{path}: expected classes below {NUM_CLASSES} or {VOID} in red, got {classes[unknown][0]}"
        )
    # blue is the lowest byte, and an alpha of 255 the highest
    labels: NDArray[np.int32] = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGRA).view("<i4")[..., 0] & 0xFFFFFF
    return labels


def _read_video(name: str, folder: Path, maps: Path | None) -> VideoSample:
    images = tuple(folder / file for file in files(folder, ".png"))
    video = VideoSample(name, images, tuple(image.stem for image in images))
    if maps is None:
        return video
    names = files(maps, ".png")
    same_names(maps, [image.name for image in images], names)
    pictures = [maps / name for name in names]
    size = read_labels(pictures[0]).shape
    with ThreadPoolExecutor() as pool:
        looks = [pool.submit(_visible, picture, (size[0], size[1])) for picture in pictures]
    visible = tuple(read_each(looks, Future.result))
    if len(visible) < len(pictures):
        return video
    labels: dict[int, int | None] = {
        id_: id_ // (MAX_TRACKS + 1) for id_ in sorted({id_ for ids in visible for id_ in ids})
    }
    truth = Truth(labels, visible, partial(_read_frame, pictures))
    return replace(video, size=(size[0], size[1]), truth=truth)


def _visible(picture: Path, size: Size) -> tuple[int, ...]:
    """Ids of the objects of a map, which must be of the size of its video."""
    ids = _objects(picture, size).ids
    assert ids is not None
    return shown_ids(ids)


def _read_frame(pictures: Sequence[Path], frame: int) -> FrameTruth:
    return _objects(pictures[frame])


def _objects(picture: Path, size: Size | None = None) -> FrameTruth:
    """The truth of a map. Objects are numbered class * 1000 + id, since an id may be of two classes."""
    labels = read_labels(picture, size)
    classes, ids = labels // INSTANCES, labels % INSTANCES
    is_object = np.isin(classes, THINGS) & (ids > 0)  # things without id are crowds
    if (largest := ids[is_object].max(initial=0)) > MAX_TRACKS:
        raise InputError(f"{picture}: expected ids up to {MAX_TRACKS}, got {largest}")
    objects = np.where(is_object, classes * (MAX_TRACKS + 1) + ids, 0)
    return FrameTruth(ids=objects.astype(np.uint16), semantic=classes.astype(np.uint8))
