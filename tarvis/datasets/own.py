"""Own data, to train on and to score: a JSON file of images or videos, or a folder of frames and masks.

    my.json     COCO instances: `images`, `annotations` with `segmentation`, `categories`
                COCO panoptic: `annotations` with `segments_info`, and pictures of segments
                YouTube-VIS: `videos`, `annotations` with `segmentations`, `categories`
    my_folder   JPEGImages/<video>/<frame>.jpg, Annotations/<video>/<frame>.png, as DAVIS has them, masks
                being indexed by object, 255 void; or frames/ (or images/) and masks/

Masks of images and of videos are polygons or run-length codes, compressed or not; polygons of fewer than
three points are left out, with a warning. A frame that does not show a track has null.

The set has the name of the file or folder. Its classes are the file's `categories`, in their order; the
objects of a folder have no class, and it trains vos alone.

Videos can be scored, too. A file gives AP, by classes of the same names as those of the weights. A folder
gives J&F of the objects in a video's first mask: the network sees all frames; those with a mask are scored,
except for the first and the last of them. The folder of a single video may hold its frames and masks
themselves; the video to score then has the name of the folder of its masks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from tarvis.datasets.benchmark import Benchmark, FrameTruth, Roots, Truth, VideoSample
from tarvis.datasets.classes import ClassTable, listed_classes
from tarvis.datasets.davis import Davis
from tarvis.datasets.image_sets import ImageSample, image_id, read_images
from tarvis.datasets.mask_folders import LARGEST_ID, LEAST_MASKS, read_masked, score_masks
from tarvis.datasets.points import inner_point
from tarvis.datasets.track_format import TrackBenchmark, TrackFile, has_tracks
from tarvis.files.folders import images_among
from tarvis.files.pictures import read_ids
from tarvis.files.records import Entry, drop_parts, note, read_each, read_json, read_masks
from tarvis.structures import VOID, InputError, Reference, Size

_USUAL = ("", "images", "JPEGImages", "{0}", "{1}", "images/{1}", "{1}/JPEGImages")
IMAGE_FOLDERS = (*_USUAL, *(f"../{folder}" for folder in _USUAL))
MAP_FOLDERS = ("{0}", "pan_maps", "panoptic_maps", "panoptic", "../{0}", "../pan_maps", "")
"""Where pictures may lie from the folder of a JSON file; {0} is its name, {1} the part behind the last _."""
FRAMES_AND_MASKS = (
    ("JPEGImages", "Annotations"),
    ("JPEGImages/480p", "Annotations/480p"),
    ("frames", "masks"),
    ("images", "masks"),
)
SPLIT = "all"
"""The only split of own data."""


@dataclass(frozen=True)
class OwnImage:
    """An image with objects that may overlap; a `tarvis.data.images.LabelledImage`."""

    name: str
    image: Path
    size: Size
    labels: Mapping[int, int]
    read_map: Callable[[], FrameTruth]


@dataclass(frozen=True)
class OwnData:
    """Own videos or images to train on, their classes (None where objects have none), and possible tasks.

    `left_out` counts further videos or images, which show no object.
    """

    name: str
    classes: ClassTable | None
    tasks: tuple[str, ...]
    videos: tuple[VideoSample, ...] = ()
    images: tuple[OwnImage | ImageSample, ...] = ()
    left_out: int = 0


def read_own(path: Path) -> OwnData:
    """Read a file or folder of own data. No image is opened.

    Raises:
        InputError: it is of another kind, or damaged; the message names file and entry.
    """
    name = re.sub(r"\W+", "_", path.stem if path.is_file() else path.name).strip("_") or "own"
    if path.is_dir():
        videos = tuple(read_folder(path))
        return OwnData(name, None, ("vos",), videos, left_out=_count_videos(path) - len(videos))
    if path.suffix.lower() != ".json":
        raise InputError(f"{path}: expected a .json file, or a folder of frames and masks")
    root = read_json(path)
    if root.get("categories") is None:
        raise root.error("is no training data: it has no categories")
    classes = listed_classes(root["categories"], name)
    labels = {category: label for label, category in enumerate(classes.ids)}
    tasks: tuple[str, ...] = ("vis", "vos")
    if root.get("videos") is not None:
        every = TrackFile(root, _frame_folder(root, path)).labelled(labels)
        videos = tuple(video for video in every if video.truth and video.truth.labels)
        return OwnData(name, classes, tasks, videos, left_out=len(every) - len(videos))
    entries = root["annotations"].entries()
    images: tuple[OwnImage | ImageSample, ...]
    if entries and entries[0].get("segments_info") is not None:
        tasks, what = ("vis", "vps", "vos"), "a thing"
        maps = _folder_with(entries[0]["file_name"].path(), path, MAP_FOLDERS)
        roots = Roots(_image_folder(root, path), path, maps)
        found = read_images(root, roots, {**labels}, classes.is_thing)
        images = tuple(image for image in found if image.num_things)
    else:
        what = "an object"
        images = tuple(_read_instances(root, _image_folder(root, path), labels))
    if not images:
        raise InputError(f"{path}: no image shows {what}")
    return OwnData(name, classes, tasks, images=images, left_out=len(root["images"].entries()) - len(images))


def own_benchmark(path: Path, images: Path | None = None) -> Benchmark:
    """Own data as a benchmark.

    Args:
        images: the folder of a file's frames, where it is not one of `IMAGE_FOLDERS`.

    Raises:
        InputError: the file has no videos, or is damaged.
    """
    if path.is_dir():
        if images is not None:
            raise InputError(f"{path}: has its own frames; drop --images")
        return OwnFolder(path)
    return OwnTracks(path, images)


class OwnTracks(TrackBenchmark):
    """A file like those of YouTube-VIS; its classes are its `categories`, of which all are things."""

    splits: tuple[str, ...] = (SPLIT,)

    def __init__(self, path: Path, images: Path | None = None) -> None:
        self.name = path.stem
        self._path, self._images = path, images
        root = read_json(path)
        if root.get("videos") is None and root.get("images") is not None:
            raise root.error("lists images; only videos are scored: `videos`, as YouTube-VIS has them")
        listed = listed_classes(root["categories"], self.name)
        if twice := [name for k, name in enumerate(listed.names) if name in listed.names[:k]]:
            raise root["categories"].error(f"two are called {twice[0]!r}; classes are matched by name")
        self.classes = replace(listed, is_thing=(True,) * listed.num_classes)

    def find(self, root: Path, split: str) -> Roots:
        """See `Benchmark`; `root` is the file. Images lie where training finds them."""
        tree = read_json(root)
        return Roots(self._images or _frame_folder(tree, root), root, root if has_tracks(tree) else None)

    def annotation_file(self, root: Path, split: str) -> Path:
        raise InputError(f"{root}: expected a file such as {self._path.name}, not a folder")


class OwnFolder(Davis):
    """A folder of frames and masks, which is read once, on first use."""

    tasks: tuple[str, ...] = ("vos", "pet")
    splits: tuple[str, ...] = (SPLIT,)

    def __init__(self, path: Path) -> None:
        self.name = path.resolve().name
        self._path = path

    def find(self, root: Path, split: str) -> Roots:
        """See `Benchmark`. If only the given masks exist, there is no truth."""
        return Roots(root, root, self._masks(self._labelled[0]).parent if self._has_truth else None)

    def read(self, roots: Roots, split: str) -> list[VideoSample]:
        """See `Benchmark`. References are the objects of a video's first mask, each as mask and as point."""
        return [self._whole(video) for video in self._labelled]

    def score(
        self, results: Path, truth: Path, split: str, videos: Collection[str] | None = None
    ) -> dict[str, float]:
        """See `Benchmark` and `mask_folders`."""
        names = [self._masks(video).name for video in self._labelled]
        return score_masks(results, truth, names if videos is None else videos)

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
    """The objects of the first mask, each as mask and as point; `frame` is its place in the whole video."""
    ids = truth.read(0).ids
    assert ids is not None
    references = []
    for id_ in truth.visible[0]:
        mask = ids == id_
        row, column = inner_point(mask)
        references.append(Reference(id_, frame, torch.from_numpy(mask)))
        references.append(Reference(id_, frame, point=(float(column), float(row))))
    return references


def read_folder(root: Path) -> Iterable[VideoSample]:
    """Videos of the frames that have a mask. All masks are read, to know what they show."""
    frames, masks = _frames_and_masks(root)
    is_one = bool(_masks_in(masks))
    videos = []
    for folder in [masks] if is_one else sorted(p for p in masks.iterdir() if p.is_dir()):
        if files := _masks_in(folder):
            name, images = (root.name, frames) if is_one else (folder.name, frames / folder.name)
            videos.append(read_masked(name, images, files))
    if not any(video.truth and video.truth.labels for video in videos):
        is_void = any((read_ids(mask) == VOID).any() for mask in images_among(masks.rglob("*"), (".png",)))
        hint = f", only {VOID}, which is void: number objects from 1" if is_void else ""
        raise InputError(f"{masks}: no mask shows an object{hint}")
    return videos


def _count_videos(root: Path) -> int:
    """The number of videos, including those without masks."""
    frames, masks = _frames_and_masks(root)
    return 1 if _masks_in(masks) else sum(p.is_dir() for p in frames.iterdir())


def _frames_and_masks(root: Path) -> tuple[Path, Path]:
    """The folders of frames and of masks."""
    pairs = [(root / frames, root / masks) for frames, masks in FRAMES_AND_MASKS]
    for frames, masks in pairs:
        has_masks = frames.is_dir() and any(p.suffix.lower() == ".png" for p in masks.rglob("*"))
        # JPEGImages of the official download holds folders of resolutions, not of videos
        if has_masks and not (masks / "480p").is_dir():
            return frames, masks
    looked = ", ".join(f"{frames} with {masks}" for frames, masks in FRAMES_AND_MASKS)
    raise InputError(f"{root}: no frames and masks (.png files); looked for {looked}")


def _masks_in(folder: Path) -> list[Path]:
    return images_among(folder.iterdir(), (".png",))


def _frame_folder(root: Entry, path: Path) -> Path:
    """The folder that the file names of a file's videos start from."""
    for video in root["videos"].entries()[:1]:
        for file in video["file_names"].entries()[:1]:
            return _folder_with(file.path(), path, IMAGE_FOLDERS)
    return path.parent


def _image_folder(root: Entry, path: Path) -> Path:
    """The folder that the file names of a file's images start from."""
    for image in root["images"].entries()[:1]:
        return _folder_with(image["file_name"].path(), path, IMAGE_FOLDERS)
    return path.parent


def _folder_with(name: str, path: Path, folders: Sequence[str]) -> Path:
    """The folder that has a file of this name.

    Raises:
        InputError: no folder has it; the message lists them.
    """
    names = path.stem, path.stem.rpartition("_")[2]
    places = dict.fromkeys(folder.format(*names) for folder in folders)
    for place in places:
        if (path.parent / place / name).is_file():
            return path.parent / place
    others = ", ".join(filter(None, places))
    raise InputError(f"{path}: {name} not found; looked in {path.parent} and, from there, in {others}")


def _read_instances(root: Entry, folder: Path, labels: Mapping[int, int]) -> Iterable[OwnImage]:
    """The images that show an object, of COCO's file of instances. Crowds are no objects."""
    images = root["images"].by("id", image_id, "image")
    objects: dict[int | str, list[tuple[int, Entry]]] = {}
    for entry in root["annotations"].entries():
        try:
            number = image_id(entry["image_id"])
            if number not in images:
                raise entry["image_id"].error(f"image {number!r} is unknown")
            if entry.is_set("iscrowd"):
                continue
            category = entry["category_id"].integer()
            if category not in labels:
                raise entry["category_id"].error(f"category {category} is unknown")
            objects.setdefault(number, []).append((labels[category], entry["segmentation"]))
        except InputError as error:
            note(error)
    is_left = iter(drop_parts([mask for listed in objects.values() for _, mask in listed]))
    shown = {number: [pair for pair in listed if next(is_left)] for number, listed in objects.items()}

    def read(number: int | str) -> OwnImage:
        image = images[number]
        size, name = image.size(), image["file_name"].path()
        labels_of, masks = zip(*shown[number], strict=True)
        return OwnImage(
            name, folder / name, size, dict(enumerate(labels_of, 1)), partial(_read_objects, masks, size)
        )

    return read_each((number for number, listed in shown.items() if listed), read)


def _read_objects(masks: Sequence[Entry], size: Size) -> FrameTruth:
    return FrameTruth(dict(enumerate(read_masks(masks, size), 1)))
