"""Look at all files of a training set before a run needs them.

    python -m tarvis.data.check ovis --data WORKSPACE
    python -m tarvis.data.check my.json
    python -m tarvis.data.check coco --data WORKSPACE --quick

Every image must be there, be readable and have the size that its annotations say; every mask must be readable
and show the objects that are listed. What is wrong goes to stderr, a line each, with the file's name; a
summary to stdout, as JSON: `without_objects` of all images or videos are left out in training, since they
show none. Exit status 1 if something is wrong. --quick opens one image of each video, and one in fifty of an
image set, and looks whether the others are there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tarvis.data.images import LabelledImage
from tarvis.data.layers import frame_size
from tarvis.data.sets import open_set
from tarvis.data.settings import DataSettings
from tarvis.data.synthetic import NAME
from tarvis.datasets.benchmark import FrameTruth, VideoSample
from tarvis.distributed import threads
from tarvis.files import rle
from tarvis.files.pictures import Window, read_window
from tarvis.structures import InputError, Size

SOME = 50
"""One in so many images is opened by --quick."""


@dataclass
class Found:
    """What was found in a video or an image."""

    frames: int = 0
    labels: list[int | None] = field(default_factory=list)
    is_left_out: bool = False  # since no frame shows an object
    wrong: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        "python -m tarvis.data.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("set", metavar="SET", help="name of a training set, or file or folder of own data")
    p.add_argument("--data", metavar="ROOT", help="official download or workspace")
    p.add_argument("--split", default="train", help="(default: train)")
    p.add_argument("--quick", action="store_true", help="open some images only")
    p.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    p.add_argument("--show", type=int, default=20, metavar="N", help="lines of what is wrong (default: 20)")
    args = p.parse_args(argv)
    try:
        summary, wrong = check(args.set, args.data, args.split, quick=args.quick, workers=args.workers)
    except InputError as error:
        summary, wrong = {"set": args.set, "split": args.split}, [str(error)]
    for line in wrong[: args.show]:
        print(f"wrong: {line}", file=sys.stderr)
    if len(wrong) > args.show:
        print(f"and {len(wrong) - args.show} more", file=sys.stderr)
    print(json.dumps(summary | {"wrong": len(wrong), "ok": not wrong}))
    return 1 if wrong else 0


def check(
    name: str, root: str | None, split: str, *, quick: bool = False, workers: int = 1
) -> tuple[dict[str, Any], list[str]]:
    """The summary of a set, and what is wrong with it.

    Raises:
        InputError: its annotations cannot be read, or there is nothing to train on.
    """
    if name == NAME:
        raise InputError(f"{name} videos are made when they are asked for: there is no file to look at")
    source = open_set(name, DataSettings(root=root, split=split))
    items = source.items
    has_videos = isinstance(items[0], VideoSample)
    found: list[Found] = []
    # one thread of OpenCV: a forked process would wait for threads that it did not inherit
    with threads(opencv=1), get_context("fork").Pool(max(1, workers)) as pool:
        look = partial(_look, items, quick)
        done: Iterable[Found] = (
            pool.imap(look, range(len(items)), 8) if workers > 1 else map(look, range(len(items)))
        )
        found.extend(tqdm(done, source.name, len(items), disable=not sys.stderr.isatty()))
    classes = Counter(label for each in found for label in each.labels if label is not None)
    summary: dict[str, Any] = {
        "set": source.name,
        "split": split,
        "videos" if has_videos else "images": len(items) + source.left_out,
        "without_objects": source.left_out + sum(each.is_left_out for each in found),
        "frames": sum(each.frames for each in found),
        "objects": sum(len(each.labels) for each in found),
        "clips_from": {
            f"{kind.task}{f' {kind.num_objects}' if kind.num_objects else ''}": count
            for kind, count in source.clips.kinds().items()
        },
    }
    if source.classes is not None:
        summary["objects_by_class"] = {source.classes.names[k]: classes[k] for k in sorted(classes)}
    return summary, [line for each in found for line in each.wrong]


def _look(items: Sequence[VideoSample | LabelledImage], quick: bool, number: int) -> Found:
    item = items[number]
    if isinstance(item, VideoSample):
        return look_at_video(item, quick=quick)
    return look_at_image(item, quick=quick and number % SOME > 0)


def look_at_video(video: VideoSample, *, quick: bool = False) -> Found:
    """Check the frames of a video."""
    truth = video.truth
    assert truth is not None, video.name
    found = Found(len(video.images), list(truth.labels.values()), is_left_out=not any(truth.visible))
    for t, image in enumerate(video.images):
        if quick and t:
            found.wrong += _missing(image)
            continue
        try:
            shown = truth.read(t)
            size = video.size or (frame_size(shown) if shown.masks or shown.ids is not None else None)
            _open(image, size)
            absent = set(truth.visible[t]) - set(_shown(shown))
        except InputError as error:
            found.wrong.append(f"video {video.name}: {error}")
            continue
        if absent:
            found.wrong.append(
                f"video {video.name}: frame {video.frame_names[t]} has no pixel of {sorted(absent)}"
            )
    return found


def look_at_image(image: LabelledImage, *, quick: bool = False) -> Found:
    """Check an image and its labels."""
    found = Found(1, list(image.labels.values()))
    if quick:
        found.wrong += _missing(image.image)
        return found
    try:
        _open(image.image, image.size)
        truth = image.read_map()
    except InputError as error:
        found.wrong.append(f"image {image.name}: {error}")
        return found
    absent, objects = len(image.labels.keys() - set(_shown(truth))), len(image.labels)
    # a polygon may be thinner than a pixel, but what a picture shows and what is listed of it must agree
    if absent == objects or (absent and truth.ids is not None):
        found.wrong.append(
            f"image {image.name}: {absent} of its {objects} objects have no pixel in its labels"
        )
    return found


def _open(path: Path, size: Size | None) -> None:
    """Decode an image in full."""
    read_window(path, Window(0, 0, *(size or (1, 1))), size or (1, 1), size)


def _shown(truth: FrameTruth) -> Iterator[int]:
    """Ids of objects that have a pixel."""
    if truth.ids is not None:
        yield from np.flatnonzero(np.bincount(truth.ids.ravel())).tolist()
    for id_, mask in (truth.masks or {}).items():
        if rle.area(mask):
            yield id_


def _missing(path: Path) -> list[str]:
    return [] if path.is_file() else [f"{path}: not found"]


if __name__ == "__main__":
    sys.exit(main())
