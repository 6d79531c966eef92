"""Own videos as a benchmark: the files that `tarvis.datasets.own` trains on, scored.

    my_val.json   as YouTube-VIS has it: AP, by classes that are called as those of the weights
    my_val        a folder of frames and indexed masks, as DAVIS has it: J&F of the objects in a video's first
                  mask. The network sees all frames; those with a mask are scored, but for the first and the
                  last of them.

The folder of a single video may hold its frames and masks themselves; the video is then called as the folder
of its masks.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property, partial
from pathlib import Path

import torch

from tarvis.datasets.benchmark import Benchmark, Roots, Truth, VideoSample
from tarvis.datasets.classes import ClassTable
from tarvis.datasets.davis import LARGEST_ID, Davis
from tarvis.datasets.own import read_own
from tarvis.datasets.own_entries import IMAGE_FOLDERS, folder_with, read_classes
from tarvis.datasets.own_videos import FRAMES_AND_MASKS
from tarvis.datasets.points import inner_point
from tarvis.datasets.youtube_vis import YouTubeVIS, has_tracks
from tarvis.files.folders import images_among
from tarvis.files.records import read_json
from tarvis.scoring import davis as scoring
from tarvis.structures import InputError, Reference

SPLIT = "all"
LEAST_MASKS = 3
"""Of a video that is scored: two are not."""


def own_benchmark(path: Path, images: Path | None = None) -> Benchmark:
    """The benchmark that a file or folder is. `images` is where frames are that a file does not find.

    Raises:
        InputError: it is neither, or a file without videos.
    """
    if path.is_dir():
        if images is not None:
            raise InputError(f"{path}: has its own frames; drop --images")
        return OwnFolder(path)
    return OwnTracks(path, images)


class OwnTracks(YouTubeVIS):
    """A file like those of YouTube-VIS; its classes are its `categories`, of which all are things."""

    splits: tuple[str, ...] = (SPLIT,)

    def __init__(self, path: Path, images: Path | None = None) -> None:
        super().__init__(path.stem, path.name)
        self._path, self._images = path, images
        root = read_json(path)
        if root.get("videos") is None and root.get("images") is not None:
            raise root.error("lists images; only videos are scored: `videos`, as YouTube-VIS has them")
        read = read_classes(root["categories"], self.name)
        if twice := [name for k, name in enumerate(read.names) if name in read.names[:k]]:
            raise root["categories"].error(f"two are called {twice[0]!r}; classes are matched by name")
        things = (True,) * read.num_classes
        self._classes = ClassTable(read.name, read.names, things, read.colors, read.ids)

    @property
    def classes(self) -> ClassTable:
        return self._classes

    def find(self, root: Path, split: str) -> Roots:
        """See `Benchmark`; `root` is the file. Images lie where training finds them."""
        del split
        tree = read_json(root)
        images = self._images
        if images is None:
            for video in tree["videos"].entries()[:1]:
                for file in video["file_names"].entries()[:1]:
                    images = folder_with(file.path(), root, IMAGE_FOLDERS)
        return Roots(images or root.parent, root, root if has_tracks(tree) else None)

    def _find_annotations(self, root: Path, split: str) -> Path:
        del split
        raise InputError(f"{root}: expected a file such as {self._path.name}, not a folder")


class OwnFolder(Davis):
    """A folder of frames and masks. What it shows is read once, when it is first asked for."""

    tasks: tuple[str, ...] = ("vos", "pet")
    splits: tuple[str, ...] = (SPLIT,)

    def __init__(self, path: Path) -> None:
        self.name = path.resolve().name
        self._path = path

    def find(self, root: Path, split: str) -> Roots:
        """See `Benchmark`. Where every video has but the mask that is given, there is no truth."""
        del split
        return Roots(root, root, self._masks(self._labelled[0]).parent if self._has_truth else None)

    def read(self, roots: Roots, split: str) -> list[VideoSample]:
        """See `Benchmark`. References are the objects of a video's first mask, each as mask and as point."""
        del roots, split
        return [self._whole(video) for video in self._labelled]

    def evaluate(
        self, results: Path, truth: Path, split: str, videos: Collection[str] | None = None
    ) -> dict[str, float]:
        """See `Benchmark` and `tarvis.scoring.davis`."""
        del split
        names = [self._masks(video).name for video in self._labelled]
        return scoring.evaluate(results, truth, names if videos is None else videos)

    @cached_property
    def _labelled(self) -> tuple[VideoSample, ...]:
        """The videos, of the frames with a mask."""
        return read_own(self._path).videos

    @property
    def _has_truth(self) -> bool:
        return any(len(video.frame_names) > 1 for video in self._labelled)

    def _masks(self, video: VideoSample) -> Path:
        """Folder of a video's masks."""
        frames = video.images[0].parent
        places = (
            self._path / masks / frames.relative_to(self._path / images)
            for images, masks in FRAMES_AND_MASKS
            if frames.is_relative_to(self._path / images)
        )
        return next(filter(Path.is_dir, places))

    def _whole(self, labelled: VideoSample) -> VideoSample:
        """A video of all frames, checked so that it can be scored once it is inferred."""
        folder, truth = self._masks(labelled), labelled.truth
        assert truth is not None
        masks, shown, is_scored = labelled.frame_names, truth.visible[0], self._has_truth
        if not shown or shown[-1] > LARGEST_ID or (is_scored and shown[-1] > len(shown)):
            what = ", ".join(map(str, shown)) or "none"
            raise InputError(
                f"{folder / masks[0]}.png: gives the objects to follow: expected them numbered 1, 2, ... to "
                f"{LARGEST_ID} at most, without a gap, got {what}"
            )
        if is_scored and len(masks) < LEAST_MASKS:
            raise InputError(
                f"{folder}: expected at least {LEAST_MASKS} masks, of which the first and the last are not "
                f"scored, got {len(masks)}"
            )
        if is_scored and list(masks) != sorted(masks):
            raise InputError(f"{folder}: expected numbers of frames with leading zeros, got {masks[0]}")
        images = tuple(images_among(labelled.images[0].parent.iterdir()))
        return VideoSample(
            name=folder.name,
            images=images,
            frame_names=tuple(image.stem for image in images),
            size=labelled.size,
            references=partial(_given, truth, images.index(labelled.images[0])),
        )


def _given(truth: Truth, frame: int) -> list[Reference]:
    """The objects of the first mask, which is that of a frame of the whole video."""
    ids = truth.read(0).ids
    assert ids is not None
    references = []
    for id_ in truth.visible[0]:
        mask = ids == id_
        row, column = inner_point(mask)
        references.append(Reference(id_, frame, torch.from_numpy(mask)))
        references.append(Reference(id_, frame, point=(float(column), float(row))))
    return references
