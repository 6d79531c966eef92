"""DAVIS 2017, semi-supervised: a mask of every object at the first frame, J&F.

    official:  JPEGImages/480p/<seq>/<frame>.jpg, Annotations/480p/<seq>/<frame>.png,
               ImageSets/2017/{val,test-dev,train}.txt
    workspace: dataset_images/{inference,training}/davis/<seq>/<frame>.jpg,
               dataset_annotations/inference/davis/{Annotations/<seq>/<frame>.png,
                                                    ImageSet_val.txt, ImageSet_testdev.txt},
               dataset_annotations/training/davis_semisupervised.json (see `generic_video`)
    results:   <seq>/<frame>.png, one an image, indexed by object ids

To know what frames show, all masks have to be read: videos have a `truth` where the JSON file is there, which
`convert` makes of the official download, and none otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tarvis.datasets.benchmark import Roots, Truth, VideoSample, first_that_exists
from tarvis.datasets.generic_video import coded_sequence, read_generic, write_generic
from tarvis.files import rle
from tarvis.files.folders import chosen, files, no_other_folders, same_names
from tarvis.files.pictures import encode_ids, image_size, voc_palette
from tarvis.scoring import davis as scoring
from tarvis.stitch.panoptic import paint
from tarvis.structures import InputError, Reference, VideoResult

IMAGES = "JPEGImages/480p"
IMAGE_SETS = {
    "val": ("ImageSets/2017/val.txt", "ImageSet_val.txt"),
    "test-dev": ("ImageSets/2017/test-dev.txt", "ImageSet_testdev.txt"),
    "train": ("ImageSets/2017/train.txt", "ImageSet_train.txt"),
}
"""Lists of sequences: in the official download, in the folder of the workspace."""
TRAINING = "dataset_annotations/training/davis_semisupervised.json"
LARGEST_ID = 254
INDEXED_8_BIT = b"\x08\x03"
"""Depth and colour type in the header of a PNG, its bytes 24 and 25."""


class Davis:
    name = "davis"
    tasks: tuple[str, ...] = ("vos",)
    splits: tuple[str, ...] = ("val", "test-dev", "train")
    headline = "J&F-Mean"
    classes = None

    def find(self, root: Path, split: str) -> Roots:
        """The files of a split; there is a truth if its first sequence has more than one mask."""
        kind = "training" if split == "train" else "inference"
        images = first_that_exists([root / IMAGES, root / f"dataset_images/{kind}/davis"], "images of DAVIS")
        workspace = root / "dataset_annotations/inference/davis"
        official, own = IMAGE_SETS[split]
        places = {root / official: root, workspace / own: workspace}
        if split == "train":
            places = {root / TRAINING: root / TRAINING, root / official: root}
        annotations = places[first_that_exists(places, f"annotations of DAVIS {split}")]
        if annotations.is_file():
            return Roots(images, annotations)
        masks, names = _layout(annotations, split)
        is_public = len(files(masks / names[0], ".png")) > 1
        return Roots(images, annotations, annotations if is_public else None)

    def read(self, roots: Roots, split: str) -> list[VideoSample]:
        """The videos of a split, in the order of its list.

        `roots.annotations` is the JSON file, or a folder with masks and lists. References are the objects of
        the first mask by name; later masks are not looked at, so that they may be there.
        """
        if roots.annotations.is_file():
            videos = read_generic(roots.annotations, roots.images, None)
            return [replace(video, references=partial(_first_truth, video)) for video in videos]
        masks, names = _layout(roots.annotations, split)
        return [_read_video(name, roots.images / name, masks / name) for name in names]

    def write(self, result: VideoResult, video: VideoSample, folder: Path) -> None:
        """Write <seq>/<frame>.png; where objects overlap, the later one is on top."""
        assert all(0 < track.id <= LARGEST_ID for track in result.tracks), [t.id for t in result.tracks]
        out, palette = folder / video.name, voc_palette()
        out.mkdir(parents=True, exist_ok=True)
        for frame in video.scored:
            ids = paint(result.size, result.tracks, frame).astype(np.uint8)
            (out / f"{video.frame_names[frame]}.png").write_bytes(encode_ids(ids, palette))

    def join(self, shares: Iterable[Any], videos: Sequence[VideoSample], split: str, folder: Path) -> None:
        """Nothing: the pictures are all."""

    def evaluate(
        self, results: Path, truth: Path, split: str, videos: Collection[str] | None = None
    ) -> dict[str, float]:
        """The official numbers. `truth` has the split's list and masks, or is a folder of sequences."""
        if not any((truth / listed).is_file() for listed in IMAGE_SETS[split]):
            return scoring.evaluate(results, truth, videos)
        masks, names = _layout(truth, split)
        return scoring.evaluate(results, masks, chosen(names, videos, truth))

    def check(self, results: Path, videos: Sequence[VideoSample], split: str) -> dict[str, Path]:
        """Check that every frame has a picture, and its mode, size and ids."""
        found: dict[str, Path] = {}
        for video in videos:
            names = [f"{video.frame_names[frame]}.png" for frame in video.scored]
            folder = results / video.name
            same_names(folder, names, files(folder, ".png"))
            references = video.references()
            known = {0, *(reference.id for reference in references)}
            size = video.size or image_size(video.images[0])
            found |= {f"{video.name}/{name}": folder / name for name in names}
            for path in (folder / name for name in names):
                ids = scoring.read_mask(path)
                if path.read_bytes()[24:26] != INDEXED_8_BIT:
                    raise InputError(f"{path}: expected a picture of 8 bits with a palette (mode P)")
                if ids.shape != size:
                    raise InputError(f"{path}: expected a picture of {size}, as the video, got {ids.shape}")
                if unknown := sorted(set(np.flatnonzero(np.bincount(ids.ravel())).tolist()) - known):
                    raise InputError(f"{path}: shows id {unknown[0]}, which the first mask does not")
        no_other_folders(results, [video.name for video in videos])
        return found

    def convert(self, download: Path, workspace: Path) -> list[Path]:
        """Make the JSON file of the training split of the official download; its images go, or are linked, to
        dataset_images/training/davis.

        Raises:
            InputError: a frame without mask, a mask without frame, or damaged ones.
        """
        path = workspace / TRAINING
        images = first_that_exists([download / IMAGES], "images of DAVIS")
        masks, names = _layout(download, "train")
        sequences = (_coded(name, images / name, masks / name) for name in tqdm(names, "DAVIS train"))
        write_generic(path, sequences, {"category_labels": {"1": "object"}})
        return [path]


def _layout(annotations: Path, split: str) -> tuple[Path, list[str]]:
    """Folder of the masks and names of the split's sequences."""
    lists = [annotations / listed for listed in IMAGE_SETS[split]]
    masks = [annotations / "Annotations/480p", annotations / "Annotations"]
    listed = first_that_exists(lists, f"list of the sequences of DAVIS {split}")
    return first_that_exists(masks, "masks of DAVIS"), scoring.read_names(listed)


def _read_video(name: str, images: Path, masks: Path) -> VideoSample:
    paths = tuple(images / file for file in files(images, ".jpg"))
    names = tuple(path.stem for path in paths)
    return VideoSample(name, paths, names, references=partial(_first_mask, masks, paths, names))


def _first_mask(masks: Path, images: Sequence[Path], names: Sequence[str]) -> list[Reference]:
    """The objects of the first mask by name, by rising id."""
    path = masks / files(masks, ".png")[0]
    if path.stem not in names:
        raise InputError(f"{path}: {images[0].parent} has no frame {path.stem!r}")
    frame = names.index(path.stem)
    ids = scoring.without_void(scoring.read_mask(path))
    size = image_size(images[frame])
    if ids.shape != size:
        raise InputError(f"{path}: expected a picture of {size}, as {images[frame]}, got {ids.shape}")
    shown = [id_ for id_ in np.flatnonzero(np.bincount(ids.ravel())).tolist() if id_]
    if not shown or shown[-1] > LARGEST_ID:
        what = f"id {shown[-1]}" if shown else "no object"
        raise InputError(f"{path}: expected ids from 1 to {LARGEST_ID}, got {what}")
    return [Reference(id_, frame, torch.from_numpy(ids == id_)) for id_ in shown]


def _first_truth(video: VideoSample) -> list[Reference]:
    """The objects of a video's first frame, by rising id."""
    truth: Truth | None = video.truth
    masks = truth.read(0).masks if truth else None
    if not masks:
        raise InputError(f"sequence {video.name}: its first frame shows no object")
    return [Reference(id_, 0, torch.from_numpy(rle.decode(masks[id_]))) for id_ in sorted(masks)]


def _coded(name: str, images: Path, masks: Path) -> dict[str, Any]:
    frames = files(images, ".jpg")
    labels = [f"{Path(frame).stem}.png" for frame in frames]
    same_names(masks, labels, files(masks, ".png"))
    maps: Iterator[Any] = ((scoring.without_void(scoring.read_mask(masks / label)), None) for label in labels)
    return coded_sequence(name, [f"{name}/{frame}" for frame in frames], maps, lambda _: 1)
