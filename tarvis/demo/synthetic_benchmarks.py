"""Tiny benchmarks of moving shapes, each in the folders and files of its own official download.

    make_benchmark("kitti_step", Path("data"))
    roots = BENCHMARKS["kitti_step"].find(Path("data"), "val")

They exercise what stands between a benchmark's files and its number, with weights that know the shapes
(`class_map` says what a benchmark calls them) or with `perfect_result`, which is the truth itself. The same
arguments give the same files.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tarvis.datasets.benchmark import VideoSample
from tarvis.datasets.classes import ClassTable
from tarvis.datasets.kitti_step import SEQUENCES as KITTI_SEQUENCES
from tarvis.demo import layouts
from tarvis.demo.layouts import SMALLEST_GIVEN, Layout, SyntheticSet
from tarvis.files.atomic import write_json
from tarvis.files.records import read_json
from tarvis.stitch.panoptic import encode_labels
from tarvis.structures import RLE, InputError, Size, Track, VideoResult

RECORD = "synthetic.json"
"""File beside the data with the arguments that made it."""


def make_benchmark(
    name: str,
    root: Path,
    *,
    seed: int = 0,
    num_videos: int = 2,
    num_frames: int | None = None,
    size: Size = (64, 96),
    num_objects: int = 3,
    split: str | None = None,
) -> None:
    """Write a split of a benchmark or an image set, with its truth.

    Args:
        num_videos: of an image set, the images.
        num_frames: of every video, the images that are given to the network or lie between those; chosen by
            default. Cityscapes-VPS always has 30.
        split: "val" or "train"; by default the validation split of benchmarks, the training split of images.

    Raises:
        InputError: no such benchmark, or numbers that it does not take.
    """
    layout = _layout(name)
    split = split or layout.splits[0]
    if split not in layout.splits:
        raise InputError(f"no synthetic split {split!r} of {name}; known: {', '.join(sorted(layout.splits))}")
    if num_frames is None or name == "cityscapes_vps":
        num_frames = layout.num_frames
    if not 1 <= num_videos <= layout.most_videos or num_frames < layout.least_frames or num_objects < 1:
        raise InputError(
            f"{name}: expected 1 to {layout.most_videos} videos of at least {layout.least_frames} frames and "
            f"an object, got {num_videos}, {num_frames} and {num_objects}"
        )
    numbers = {"seed": seed, "num_videos": num_videos, "num_frames": num_frames, "num_objects": num_objects}
    layout.write(SyntheticSet(name, layout, size=size, split=split, **numbers), root)
    write_json(root / RECORD, {"name": name, "split": split, "size": size, **numbers})


def class_map(name: str) -> dict[str, str]:
    """What a benchmark calls the synthetic classes, by name; none where objects have no class."""
    return dict(_layout(name).names)


def perfect_result(name: str, root: Path, video: VideoSample) -> VideoResult:
    """The truth of a video of the validation split that `make_benchmark` wrote at `root`, as a result.

    Raises:
        InputError: `root` holds no synthetic data of this benchmark, or the video is not of it.
    """
    record = read_json(root / RECORD)
    if record["name"].text() != name:
        raise record["name"].expected(repr(name))
    H, W = (side.integer(1) for side in record["size"].entries(2, "sides"))
    numbers = {key: record[key].integer() for key in ("seed", "num_videos", "num_frames", "num_objects")}
    made = SyntheticSet(name, _layout(name), size=(H, W), split="val", **numbers)
    number, places = made.locate(video)
    shown = dict(zip(places, range(len(places)), strict=True))  # number of the frame -> index in the video
    masks: dict[int, dict[int, RLE]] = {k: {} for k in made.scene(number).classes}
    stuff: dict[int, bytes] = {}
    for t, frame in enumerate(made.frames(number)):
        if t in shown:
            for k, mask in made.masks(frame).items():
                masks[k][shown[t]] = mask
            if made.has_classes and made.table.stuff:
                stuff[shown[t]] = encode_labels(_without_things(frame.semantic, made.table))
    tracks = []
    for k, of_track in masks.items():
        label = made.labels(number)[k] if made.has_classes else None
        if of_track:
            tracks.append(Track(k, of_track, label, None if label is None else 1.0))
    return VideoResult(made.layout.task, made.size, len(video.images), tuple(tracks), stuff)


def _layout(name: str) -> Layout:
    if name not in LAYOUTS:
        raise InputError(f"no synthetic {name!r}; known: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _without_things(semantic: NDArray[np.uint8], table: ClassTable) -> NDArray[np.uint8]:
    """Things replaced by the stuff that covers most of the frame."""
    is_stuff = np.isin(semantic, table.stuff)
    most = np.bincount(semantic[is_stuff]).argmax() if is_stuff.any() else table.stuff[0]
    return np.where(is_stuff, semantic, np.uint8(most))


MOST_KITTI = len(KITTI_SEQUENCES["val"])
STREET = {"sky": "sky", "grass": "terrain", "bricks": "wall"}
VEHICLES = {"disc": "car", "square": "truck", "triangle": "person", "star": "bicycle", "ring": "motorcycle"}
TRAFFIC = STREET | VEHICLES
CARS = {"disc": "car", "square": "car", "triangle": "person", "star": "person", "ring": "car"}
ANIMALS = {"disc": "turtle", "square": "train", "triangle": "shark", "ring": "snake"}
SEA = {"disc": "Turtle", "square": "Boat", "triangle": "Fish", "star": "Bird", "ring": "Lizard"}
PLACE = {"sky": "sky", "grass": "grass", "bricks": "wall", "star": "flag", "ring": "clock"}
YARD = PLACE | {"disc": "ball", "square": "box", "triangle": "tent"}
HOME = PLACE | {"disc": "plate", "square": "door", "triangle": "lamp"}
PICNIC = {"disc": "frisbee", "square": "suitcase", "triangle": "pizza", "star": "kite", "ring": "donut"}
LAND = {"sky": "sky-other-merged", "grass": "grass-merged", "bricks": "wall-brick"}
IMAGES = {
    "coco": (LAND | PICNIC, "{v:012d}.jpg"),
    "ade20k": (HOME, "ADE_train_{v:08d}.jpg"),
    "cityscapes": (TRAFFIC, "synth/synth_{v:06d}_{t:06d}_leftImg8bit.png"),
    "mapillary": ({own: name.capitalize() for own, name in TRAFFIC.items()}, "{v:022d}.jpg"),
}

write_youtube_vis = partial(
    layouts.write_tracks, folder="{}/JPEGImages", annotations_file="{}/instances.json"
)
write_ovis = partial(layouts.write_tracks, folder="{}", annotations_file="annotations_{}.json")

LAYOUTS = {
    "youtube_vis_2019": Layout(
        "vis", 8, ANIMALS | {"star": "eagle"}, "{v:010x}/{t:05d}.jpg", write_youtube_vis
    ),
    "youtube_vis_2021": Layout(
        "vis", 8, ANIMALS | {"star": "bird"}, "{v:010x}/{t:05d}.jpg", write_youtube_vis
    ),
    "ovis": Layout("vis", 8, SEA, "{v:08x}/img_{n:07d}.jpg", write_ovis),
    "cityscapes_vps": Layout(
        "vps", 30, TRAFFIC, "synth_{v:06d}_{t:06d}_newImg8bit.png", layouts.write_cityscapes_vps
    ),
    "kitti_step": Layout(
        "vps", 8, STREET | CARS, "{kitti:04d}/{t:06d}.png", layouts.write_kitti_step, most_videos=MOST_KITTI
    ),
    "vipseg": Layout("vps", 8, YARD, "{v}_synthetic/{n:08d}.jpg", layouts.write_vipseg),
    "davis": Layout(
        "vos", 8, {}, "shapes-{v}/{t:05d}.jpg", layouts.write_davis, shows_all_at_first=True, least_frames=3
    ),
    "burst": Layout(
        "pet", 13, {}, "Synthetic/shapes_{v}/frame{n:04d}.jpg", layouts.write_burst, smallest=SMALLEST_GIVEN
    ),
    **{
        name: Layout("vps", 1, names, file, layouts.write_image_set, splits=("train", "val"))
        for name, (names, file) in IMAGES.items()
    },
}
