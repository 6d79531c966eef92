"""The official folders and files of every benchmark, written from synthetic videos, a frame in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from tarvis.data.synthetic import SyntheticScene
from tarvis.datasets.benchmark import VideoSample
from tarvis.datasets.classes import RGB, ClassTable, class_table
from tarvis.datasets.image_sets import FOLDERS, IMAGE_SETS
from tarvis.datasets.kitti_step import SEQUENCES as KITTI_SEQUENCES
from tarvis.datasets.kitti_step import step_encoding
from tarvis.datasets.panoptic_format import assign_colours, coco_encoding, list_segments
from tarvis.files import rle
from tarvis.files.atomic import write_json
from tarvis.files.pictures import encode_ids, voc_palette
from tarvis.structures import RLE, InputError, Size, Track

JPEG = [cv2.IMWRITE_JPEG_QUALITY, 95]
SMALLEST_GIVEN = 30
"""Least pixels of an object that is given by a mask or a point."""
TRIES = 1000
BURST_FPS = 4
BURST_CLASSES = (12, 805, 58, 26)
"""LVIS's ids, of which 805 (people) and 58 are common in BURST's sense."""
SPELLINGS = {"val": "valid", "train": "train"}
"""Names of the splits in YouTube-VIS and OVIS."""


class Layout(NamedTuple):
    """The layout of a benchmark."""

    task: str
    num_frames: int
    names: dict[str, str]  # synthetic class -> the benchmark's
    file: str  # path of an image in the folder of images: video v, frame t, which is the n-th
    write: Callable[[SyntheticSet, Path], None]
    shows_all_at_first: bool = False
    smallest: int = 1  # pixels of a mask; smaller ones are left out
    least_frames: int = 1
    most_videos: int = 999
    splits: tuple[str, ...] = ("val", "train")  # the default first


class Frame(NamedTuple):
    """A frame: RGB [H, W, 3]; ids of objects, 0 elsewhere, and the benchmark's classes from 0 [H, W]."""

    image: NDArray[np.uint8]
    ids: NDArray[np.uint8]
    semantic: NDArray[np.uint8]


@dataclass(frozen=True)
class SyntheticSet:
    """The videos of a synthetic benchmark, a scene each, in the benchmark's classes."""

    name: str
    layout: Layout
    seed: int
    num_videos: int
    num_frames: int
    size: Size
    num_objects: int
    split: str

    @property
    def has_classes(self) -> bool:
        return bool(self.layout.names)

    @property
    def table(self) -> ClassTable:
        return class_table(self.name)

    def file(self, video: int, t: int) -> str:
        """Path of an image in the folder of images."""
        kitti = KITTI_SEQUENCES[self.split]
        return self.layout.file.format(v=video, t=t, n=t + 1, kitti=kitti[video % len(kitti)])

    def scene(self, video: int) -> SyntheticScene:
        """The scene of a video; where objects are given at the first frame, one that shows them all there."""
        seed = (1000 * self.seed + video) * TRIES
        if not self.layout.shows_all_at_first:
            return SyntheticScene(seed, self.size, self.num_objects)
        for k in range(TRIES):
            scene = SyntheticScene(seed + k, self.size, self.num_objects, come_and_go=False)
            shown, pixels = np.unique(scene.render(0).instance, return_counts=True)
            if len(shown) == self.num_objects + 1 and pixels.min() >= SMALLEST_GIVEN:
                return scene
        raise InputError(f"no scene shows {self.num_objects} objects at once in a picture of {self.size}")

    def frames(self, video: int) -> Iterator[Frame]:
        scene = self.scene(video)
        labels = np.zeros(class_table("synthetic").num_classes, np.uint8)
        if self.has_classes:
            for own, name in self.layout.names.items():
                labels[class_table("synthetic").names.index(own)] = self.table.names.index(name)
        for t in range(self.num_frames):
            frame, ids, semantic = scene.render(t)
            yield Frame(frame, ids, labels[semantic])

    def labels(self, video: int) -> dict[int, int]:
        """Class of each object, from 0."""
        own = class_table("synthetic").names
        return {
            k: self.table.names.index(self.layout.names[own[label]])
            for k, label in self.scene(video).classes.items()
        }

    def masks(self, frame: Frame) -> dict[int, RLE]:
        """Masks of the objects that a frame shows."""
        ids, pixels = np.unique(frame.ids, return_counts=True)
        smallest = self.layout.smallest
        shown = [k for k, n in zip(ids.tolist(), pixels.tolist(), strict=True) if k and n >= smallest]
        return dict(zip(shown, rle.encode(np.array(shown)[:, None, None] == frame.ids), strict=True))

    def colours(self, video: int) -> dict[int, RGB]:
        """A colour of each object, as results have them."""
        tracks = [Track(k, {}, label, 1.0) for k, label in self.labels(video).items()]
        return assign_colours(tracks, self.table.colors)

    def locate(self, video: VideoSample) -> tuple[int, list[int]]:
        """The number of a video, and those of its frames."""
        files = [path.as_posix() for path in video.images]
        for number in range(self.num_videos):
            names = [self.file(number, t) for t in range(self.num_frames)]
            if files[0].endswith(tuple(f"/{name}" for name in names)):
                places = {name.rpartition("/")[2]: t for t, name in enumerate(names)}
                return number, [places[file.rpartition("/")[2]] for file in files]
        raise InputError(f"{video.name}: is no video of synthetic {self.name}")


def _write_image(path: Path, rgb: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    bgr = np.ascontiguousarray(rgb[..., ::-1])
    path.write_bytes(cv2.imencode(path.suffix, bgr, JPEG if path.suffix == ".jpg" else [])[1].tobytes())


def write_tracks(made: SyntheticSet, root: Path, *, folder: str, annotations_file: str) -> None:
    """Write frames and tracks in the format of YouTube-VIS; {} in both paths stands for the split."""
    H, W = made.size
    images = root / folder.format(SPELLINGS[made.split])
    videos: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for v in range(made.num_videos):
        names = [made.file(v, t) for t in range(made.num_frames)]
        tracks: dict[int, list[RLE | None]] = {}
        for t, frame in enumerate(made.frames(v)):
            _write_image(images / names[t], frame.image)
            for k, mask in made.masks(frame).items():
                tracks.setdefault(k, [None] * made.num_frames)[t] = mask
        videos.append({"id": v + 1, "width": W, "height": H, "length": made.num_frames, "file_names": names})
        for k, masks in sorted(tracks.items()):
            areas = [mask and rle.area(mask) for mask in masks]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "video_id": v + 1,
                    "category_id": made.table.ids[made.labels(v)[k]],
                    "iscrowd": 0,
                    "width": W,
                    "height": H,
                    "segmentations": [
                        mask and {"size": [H, W], "counts": mask["counts"].decode()} for mask in masks
                    ],
                    "areas": areas,
                    "bboxes": [mask and _box(mask) for mask in masks],
                    "occlusion": _occlusion(areas),
                }
            )
    tree = {
        "info": {"year": 2019 if made.name.endswith("2019") else 2021},
        "videos": videos,
        "annotations": annotations,
        "categories": _categories(made.table),
    }
    write_json(root / annotations_file.format(SPELLINGS[made.split]), tree)


def _occlusion(areas: list[int | None]) -> list[str | None]:
    """OVIS's levels, by the share of its largest area that an object shows; shapes hardly change in size."""
    largest = max(filter(None, areas))
    shares = (area and area / largest for area in areas)
    levels = (share and ("no" if share > 0.85 else "slight" if share > 0.5 else "severe") for share in shares)
    return [f"{level}_occlusion" if level else None for level in levels]


def _categories(table: ClassTable) -> list[dict[str, Any]]:
    rows = zip(table.ids, table.names, table.is_thing, table.colors, strict=True)
    return [
        {"id": k, "name": name, "supercategory": name, "isthing": int(thing), "color": list(color)}
        for k, name, thing, color in rows
    ]


def _write_segments(
    path: Path, made: SyntheticSet, frame: Frame, colours: dict[int, RGB]
) -> list[dict[str, int]]:
    """Write the picture of a frame's segments in COCO's format; returns their list."""
    ids = frame.ids.astype(np.uint16)
    picture, segments = coco_encoding(frame.semantic, ids, made.table.colors, colours)
    _write_image(path, picture)
    return list_segments(segments, made.table)


def write_cityscapes_vps(made: SyntheticSet, root: Path) -> None:
    """Every fifth frame has a truth, whose name has the frame's number among these.

    The training split consists of these frames alone, and its images have the same names.
    """
    H, W = made.size
    images, truths, annotations = [], [], []
    for v in range(made.num_videos):
        colours = made.colours(v)
        for t, frame in enumerate(made.frames(v)):
            name = made.file(v, t)
            shape = {"width": W, "height": H}
            if made.split == "val":
                _write_image(root / "val/img_all" / name, frame.image)
                images.append({"id": 10_000 * (v + 1) + t + 1, "file_name": name, **shape})
            if (t + 1) % 5 == 0:
                numbers = f"{v + 1:04d}_{6 * v + (t + 1) // 5:04d}_"
                id_ = numbers + name.removesuffix("_newImg8bit.png")
                file = f"{id_}_final_mask.png"
                place = root / made.split / "panoptic_video" / file
                segments = _write_segments(place, made, frame, colours)
                if made.split == "train":
                    _write_image(root / "train/img" / (numbers + name), frame.image)
                truths.append({"id": id_, "file_name": numbers + name, **shape})
                annotations.append({"image_id": id_, "file_name": file, "segments_info": segments})
    categories = _categories(made.table)
    if made.split == "val":
        write_json(root / "im_all_info_val_city_vps.json", {"images": images, "categories": categories})
    tree = {"images": truths, "annotations": annotations, "categories": categories}
    write_json(root / f"panoptic_gt_{made.split}_city_vps.json", tree)


def write_kitti_step(made: SyntheticSet, root: Path) -> None:
    for v in range(made.num_videos):
        for t, frame in enumerate(made.frames(v)):
            name = made.file(v, t)
            _write_image(root / "training/image_02" / name, frame.image)
            step = step_encoding(frame.semantic, frame.ids.astype(np.uint16))
            _write_image(root / "panoptic_maps" / made.split / name, step)


def write_vipseg(made: SyntheticSet, root: Path) -> None:
    H, W = made.size
    videos, annotations = [], []
    for v in range(made.num_videos):
        colours, images, truths = made.colours(v), [], []
        for t, frame in enumerate(made.frames(v)):
            file = Path(made.file(v, t))
            name, mask = file.stem, file.with_suffix(".png")
            _write_image(root / "images" / file, frame.image)
            segments = _write_segments(root / "panomasksRGB" / mask, made, frame, colours)
            images.append({"id": name, "width": W, "height": H, "file_name": mask.name})
            truths.append({"image_id": name, "file_name": mask.name, "segments_info": segments})
        videos.append({"video_id": file.parent.name, "images": images})
        annotations.append({"video_id": file.parent.name, "annotations": truths})
    tree = {"videos": videos, "annotations": annotations, "categories": _categories(made.table)}
    write_json(root / f"panoptic_gt_VIPSeg_{made.split}.json", tree)


def write_davis(made: SyntheticSet, root: Path) -> None:
    names = []
    for v in range(made.num_videos):
        for t, frame in enumerate(made.frames(v)):
            file = Path(made.file(v, t))
            _write_image(root / "JPEGImages/480p" / file, frame.image)
            mask = root / "Annotations/480p" / file.with_suffix(".png")
            mask.parent.mkdir(parents=True, exist_ok=True)
            mask.write_bytes(encode_ids(frame.ids, voc_palette()))
        names.append(f"{file.parent}\n")
    listed = root / f"ImageSets/2017/{made.split}.txt"
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text("".join(names))


def write_burst(made: SyntheticSet, root: Path) -> None:
    H, W = made.size
    truths, given = [], []
    for v in range(made.num_videos):
        files = [Path(made.file(v, t)) for t in range(made.num_frames)]
        of_truth: list[dict[str, Any]] = []
        of_given: list[dict[str, Any]] = []
        seen: set[int] = set()
        for t, frame in enumerate(made.frames(v)):
            _write_image(root / "frames" / made.split / files[t], frame.image)
            if t % BURST_FPS == 0:
                masks = made.masks(frame)
                coded = {k: {"rle": mask["counts"].decode(), "is_gt": True} for k, mask in masks.items()}
                new = sorted(masks.keys() - seen)
                of_truth.append({str(k): each for k, each in coded.items()})
                of_given.append({str(k): coded[k] | _exemplar(masks[k]) for k in new})
                seen.update(new)
        names = [file.name for file in files]
        sequence = {
            "width": W,
            "height": H,
            "id": v,
            "seq_name": files[0].parent.name,
            "dataset": files[0].parts[0],
            "fps": BURST_FPS,
            "all_image_paths": names,
            "annotated_image_paths": names[::BURST_FPS],
            "neg_category_ids": [],
            "not_exhaustive_category_ids": [],
            "track_category_ids": {str(k): BURST_CLASSES[k % len(BURST_CLASSES)] for k in sorted(seen)},
        }
        truths.append({**sequence, "segmentations": of_truth})
        given.append({**sequence, "segmentations": of_given})
    rest = {"split": made.split, "categories": [{"id": k, "name": str(k)} for k in sorted(BURST_CLASSES)]}
    if made.split == "train":
        write_json(root / "train/train.json", {"sequences": truths, **rest})
        return
    write_json(root / "val/all_classes.json", {"sequences": truths, **rest})
    write_json(root / "val/first_frame_annotations.json", {"sequences": given, **rest})


def _exemplar(mask: RLE) -> dict[str, Any]:
    """Box of a mask, and the point of it that is farthest from its edge."""
    inside = np.pad(rle.decode(mask), 1).astype(np.uint8)
    distance = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    y, x = divmod(int(distance.argmax()), distance.shape[1])
    return {"bbox": _box(mask), "point": {"x": x - 1, "y": y - 1}}


def _box(mask: RLE) -> list[int]:
    """x, y, width, height."""
    y, x = np.nonzero(rle.decode(mask))
    return [int(x.min()), int(y.min()), int(np.ptp(x)) + 1, int(np.ptp(y)) + 1]


def write_image_set(made: SyntheticSet, root: Path) -> None:
    H, W = made.size
    places = IMAGE_SETS[made.name]
    folder, texts, maps = (
        root / place.format(made.split, FOLDERS[made.split])
        for place in (places.images, places.annotations, places.maps)
    )
    images, annotations = [], []
    for v in range(made.num_videos):
        file = Path(made.file(v, 0))
        number: int | str = v + 1 if made.name == "coco" else file.stem
        name, map_name = file.name, f"{file.stem}.png"
        if made.name == "cityscapes":
            number = file.stem.removesuffix("_leftImg8bit")
            name, map_name = f"{number}_gtFine_leftImg8bit.png", f"{number}_gtFine_panoptic.png"
        frame = next(made.frames(v))
        _write_image(folder / file, frame.image)
        segments = _write_segments(maps / map_name, made, frame, made.colours(v))
        images.append({"id": number, "file_name": name, "width": W, "height": H})
        annotations.append({"image_id": number, "file_name": map_name, "segments_info": segments})
    tree = {"images": images, "annotations": annotations, "categories": _categories(made.table)}
    write_json(texts, tree)
