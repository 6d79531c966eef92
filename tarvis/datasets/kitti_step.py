"""KITTI-STEP: panoptic segmentation of street videos, STQ.

    official:  training/image_02/<seq>/<frame>.png (testing for the split test), of KITTI tracking,
               panoptic_maps/{train,val}/<seq>/<frame>.png
    workspace: dataset_images/inference/kitti_step_{val,test}/<seq>/<frame>.png,
               dataset_images/training/kitti_step/<seq>/<frame>.png,
               dataset_annotations/training/kitti_step.json (see `generic_video`),
               dataset_annotations/inference/kitti_step/panoptic_maps/val/<seq>/<frame>.png, for scoring
    plain:     <seq>/<frame>.png
    results:   <seq>/<frame>.png, RGB: the class, id div 256, id mod 256 (0 for stuff); ids up to 999

KITTI's training folder has the sequences of train and val. Of a folder with sequences that the lists below
name, the split's are taken, of any other (the test split, own videos) all; so own ones should not be called
by KITTI's numbers. Videos have a `truth` where the JSON file is there, which `convert` makes of the official
download.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tarvis.datasets.benchmark import Roots, VideoSample, first_that_exists
from tarvis.datasets.classes import class_table
from tarvis.datasets.generic_video import coded_sequence, read_generic, write_generic
from tarvis.files.folders import files, folders, no_other_folders, same_names
from tarvis.files.pictures import image_size
from tarvis.metrics.stq import INSTANCES
from tarvis.scoring import kitti_step as scoring
from tarvis.stitch.panoptic import MAX_TRACKS, decode_labels, fuse, step_encoding
from tarvis.structures import InputError, VideoResult

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
TRAINING = "dataset_annotations/training/kitti_step.json"


class KittiStep:
    name = "kitti_step"
    tasks: tuple[str, ...] = ("vps",)
    splits: tuple[str, ...] = ("val", "train", "test")
    headline = "STQ"

    def __init__(self) -> None:
        self.classes = class_table("kitti_step")

    def find(self, root: Path, split: str) -> Roots:
        """The files of a split; where there is no JSON file, `annotations` is the folder of images."""
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
            return read_generic(roots.annotations, roots.images, self.name)
        names = folders(roots.images)
        if split in SEQUENCES:
            split_of = {f"{number:04d}": each for each, numbers in SEQUENCES.items() for number in numbers}
            if split_of.keys() & set(names):
                names = [name for name in names if split_of.get(name) == split]
        if not names:
            raise InputError(f"{roots.images}: has no sequence of KITTI-STEP {split}")
        return [_read_video(name, roots.images / name) for name in names]

    def write(self, result: VideoResult, video: VideoSample, folder: Path) -> None:
        """Write <seq>/<frame>.png, tracks over stuff, the best score on top."""
        assert all(0 < track.id <= MAX_TRACKS for track in result.tracks), [t.id for t in result.tracks]
        (folder / video.name).mkdir(parents=True, exist_ok=True)
        for frame in video.scored:
            rgb = step_encoding(*fuse(decode_labels(result.stuff[frame]), result.tracks, frame))
            coded = cv2.imencode(".png", np.ascontiguousarray(rgb[..., ::-1]))[1]
            (folder / video.name / f"{video.frame_names[frame]}.png").write_bytes(coded.tobytes())

    def join(self, shares: Iterable[Any], videos: Sequence[VideoSample], split: str, folder: Path) -> None:
        """Nothing: the pictures are all."""

    def evaluate(
        self, results: Path, truth: Path, split: str, videos: Collection[str] | None = None
    ) -> dict[str, float]:
        """The official numbers. `truth` is a folder of sequences, or the download that has it."""
        maps = truth / "panoptic_maps" / split
        return scoring.evaluate(results, maps if maps.is_dir() else truth, videos)

    def check(self, results: Path, videos: Sequence[VideoSample], split: str) -> dict[str, Path]:
        """Check that every frame has a picture, and its mode, size, classes and ids."""
        found: dict[str, Path] = {}
        for video in videos:
            names = [f"{video.frame_names[frame]}.png" for frame in video.scored]
            folder = results / video.name
            same_names(folder, names, files(folder, ".png"))
            size = video.size or image_size(video.images[0])
            found |= {f"{video.name}/{name}": folder / name for name in names}
            for path in (folder / name for name in names):
                labels = scoring.read_labels(path)
                if labels.shape != size:
                    raise InputError(
                        f"{path}: expected a picture of {size}, as the video, got {labels.shape}"
                    )
                classes, ids = labels // INSTANCES, labels % INSTANCES
                if ids.max() > MAX_TRACKS:
                    raise InputError(f"{path}: expected ids up to {MAX_TRACKS}, got {ids.max()}")
                is_stuff = ~np.isin(classes, scoring.THINGS)
                if (wrong := np.flatnonzero(is_stuff & (ids > 0))).size:
                    class_, id_ = classes.flat[wrong[0]], ids.flat[wrong[0]]
                    raise InputError(f"{path}: shows id {id_} of class {class_}, which has no instances")
        no_other_folders(results, [video.name for video in videos])
        return found

    def convert(self, download: Path, workspace: Path) -> list[Path]:
        """Make the JSON file of panoptic_maps/train; images go, or are linked, to
        dataset_images/training/kitti_step. Where they lie in the download, they are compared by name.

        Raises:
            InputError: a frame without labels, labels without frame, or damaged ones.
        """
        path = workspace / TRAINING
        maps = first_that_exists([download / "panoptic_maps/train"], "panoptic maps of KITTI-STEP")
        images = download / OFFICIAL_IMAGES["train"]
        sequences = (_coded(name, maps / name, images) for name in tqdm(folders(maps), "KITTI-STEP train"))
        table = self.classes
        labels = {str(table.ids[k]): table.names[k] for k in table.things}
        write_generic(path, sequences, {"category_labels": labels})
        return [path]


def _read_video(name: str, folder: Path) -> VideoSample:
    images = tuple(folder / file for file in files(folder, ".png"))
    return VideoSample(name, images, tuple(image.stem for image in images))


def _coded(name: str, maps: Path, images: Path) -> dict[str, Any]:
    """The entry of a sequence; objects are numbered class * 1000 + id, since an id may be of two classes."""
    frames = files(maps, ".png")
    if images.is_dir():
        same_names(maps, files(images / name, ".png"), frames)
    return coded_sequence(name, [f"{name}/{frame}" for frame in frames], _maps(maps, frames), _class_of)


def _class_of(object_id: int) -> int:
    return object_id // (MAX_TRACKS + 1)


def _maps(folder: Path, frames: list[str]) -> Iterator[tuple[NDArray[np.uint16], NDArray[np.uint8]]]:
    """Object ids and classes [H, W] of each picture; things without id are no objects (crowds)."""
    for frame in frames:
        labels = scoring.read_labels(folder / frame)
        classes, ids = labels // INSTANCES, labels % INSTANCES
        is_object = np.isin(classes, scoring.THINGS) & (ids > 0)
        if (largest := ids[is_object].max(initial=0)) > MAX_TRACKS:
            raise InputError(f"{folder / frame}: expected ids up to {MAX_TRACKS}, got {largest}")
        objects = np.where(is_object, classes * (MAX_TRACKS + 1) + ids, 0)
        yield objects.astype(np.uint16), classes.astype(np.uint8)
