"""DAVIS 2017, semi-supervised: a mask of every object at the first frame, J&F; see `mask_folders`.

    official:  JPEGImages/480p/<seq>/<frame>.jpg, Annotations/480p/<seq>/<frame>.png,
               ImageSets/2017/{val,test-dev,train}.txt
    workspace: dataset_images/{inference,training}/davis/<seq>/<frame>.jpg,
               dataset_annotations/inference/davis/{Annotations/<seq>/<frame>.png,
                                                    ImageSet_val.txt, ImageSet_testdev.txt},
               dataset_annotations/training/davis_semisupervised.json (see `coded_videos`)
    results:   folder of <seq>/<frame>.png, one an image, indexed by object ids
    truth:     a folder with masks and list, as above; or of <seq>/<frame>.png, of which all are scored

Videos of the training split have a `truth`; to know what the official masks show, all are read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tarvis.config import InferenceConfig
from tarvis.datasets.benchmark import Roots, VideoSample, expect_split, first_that_exists
from tarvis.datasets.coded_videos import read_coded_videos
from tarvis.datasets.mask_folders import check_masks, first_mask, read_masked, score_masks, write_masks
from tarvis.files import rle
from tarvis.files.folders import chosen, files, folders, read_names
from tarvis.structures import InputError, Reference, VideoResult

IMAGES, ANNOTATIONS = "JPEGImages/480p", "Annotations/480p"
IMAGE_SETS = {
    "val": ("ImageSets/2017/val.txt", "ImageSet_val.txt"),
    "test-dev": ("ImageSets/2017/test-dev.txt", "ImageSet_testdev.txt"),
    "train": ("ImageSets/2017/train.txt", "ImageSet_train.txt"),
}
"""Lists of sequences: in the official download, in the folder of the workspace."""
TRAINING = "dataset_annotations/training/davis_semisupervised.json"


class Davis:
    """DAVIS 2017; a `Benchmark`."""

    name = "davis"
    tasks: tuple[str, ...] = ("vos",)
    splits: tuple[str, ...] = ("val", "test-dev", "train")
    headline = "J&F-Mean"
    classes = None
    inference = InferenceConfig()
    training: Mapping[str, Any] = {"tasks": ("vos",), "min_sizes": (512,)}

    def find(self, root: Path, split: str) -> Roots:
        """The files of a split; there is a truth if its first sequence has more than one mask."""
        expect_split(self.name, self.splits, split)
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
        the first mask by name; later masks are read for training only.
        """
        if roots.annotations.is_file():
            videos = read_coded_videos(roots.annotations, roots.images, None)
            return [replace(video, references=partial(_first_truth, video)) for video in videos]
        masks, names = _layout(roots.annotations, split)
        return [
            _read_video(name, roots.images / name, masks / name, has_truth=split == "train") for name in names
        ]

    def write(self, result: VideoResult, video: VideoSample, folder: Path) -> None:
        """Write <seq>/<frame>.png."""
        write_masks(result, video, folder)

    def join(self, shares: Iterable[Any], videos: Sequence[VideoSample], split: str, folder: Path) -> None:
        """See `Benchmark`. Does nothing: results are pictures alone."""

    def score(
        self, results: Path, truth: Path, split: str, videos: Collection[str] | None = None
    ) -> dict[str, float]:
        """See `Benchmark`."""
        if any((truth / listed).is_file() for listed in IMAGE_SETS[split]):
            masks, names = _layout(truth, split)
        else:
            masks = truth / ANNOTATIONS if (truth / ANNOTATIONS).is_dir() else truth
            names = folders(masks)
        return score_masks(results, masks, chosen(names, videos, truth))

    def check(self, results: Path, videos: Sequence[VideoSample], split: str) -> dict[str, Path]:
        """See `Benchmark` and `check_masks`."""
        return check_masks(results, videos)


def _layout(annotations: Path, split: str) -> tuple[Path, list[str]]:
    """Folder of the masks and names of the split's sequences."""
    lists = [annotations / listed for listed in IMAGE_SETS[split]]
    masks = [annotations / ANNOTATIONS, annotations / "Annotations"]
    listed = first_that_exists(lists, f"list of the sequences of DAVIS {split}")
    return first_that_exists(masks, "masks of DAVIS"), read_names(listed)


def _read_video(name: str, images: Path, masks: Path, *, has_truth: bool) -> VideoSample:
    if has_truth:
        video = read_masked(name, images, [masks / file for file in files(masks, ".png")])
    else:
        paths = tuple(images / file for file in files(images, ".jpg"))
        video = VideoSample(name, paths, tuple(path.stem for path in paths))
    return replace(video, references=partial(first_mask, masks, video.images))


def _first_truth(video: VideoSample) -> list[Reference]:
    """The objects of a video's first frame, by rising id."""
    masks = video.truth.read(0).masks if video.truth else None
    if not masks:
        raise InputError(f"sequence {video.name}: its first frame shows no object")
    return [Reference(id_, 0, torch.from_numpy(rle.decode(masks[id_]))) for id_ in sorted(masks)]
