"""Look at all files of a training set before a run needs them.

    python -m tarvis.data.check ovis --data WORKSPACE
    python -m tarvis.data.check my.json
    python -m tarvis.data.check coco --data WORKSPACE --quick

Every image must exist, be readable and have the size that its annotations say; every mask must be readable
and show the objects that are listed. What is wrong goes to stderr, a line each, with the file's name; a
summary to stdout, as JSON: `without_objects` of all images or videos are left out in training, since they
show none. Exit status 1 if something is wrong. --quick opens one image of each video, and one in fifty of an
image set, and looks whether the others exist.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import sys
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from tarvis import cli
from tarvis.data.images import LabelledImage
from tarvis.data.layers import frame_size
from tarvis.data.sets import open_set
from tarvis.data.settings import DataSettings
from tarvis.data.synthetic import NAME
from tarvis.datasets.benchmark import FrameTruth, VideoSample, shown_ids
from tarvis.distributed import process_kind, threads
from tarvis.files import rle
from tarvis.files.pictures import Window, read_window
from tarvis.files.records import noted_faults
from tarvis.structures import InputError, Size

SOME = 50
"""One in so many images is opened by --quick."""
FEWER = "try fewer --workers, or 1"


class Found(NamedTuple):
    """What was found in a video or an image."""

    labels: list[int | None]  # of its objects
    num_frames: int
    is_left_out: bool  # since no frame shows an object
    wrong: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    p = cli.command("tarvis.data.check", __doc__)
    p.add_argument("set", metavar="SET", help="name of a training set, or file or folder of own data")
    p.add_argument("--data", metavar="ROOT", help="official download or workspace")
    p.add_argument("--split", default="train", help="(default: train)")
    p.add_argument("--quick", action="store_true", help="open some images only")
    p.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    p.add_argument("--show", type=int, default=20, metavar="N", help="lines of what is wrong (default: 20)")
    args = p.parse_args(argv)
    return cli.guarded(lambda: report(args))


def report(args: argparse.Namespace) -> int:
    """Print what is wrong with the set, and a summary; returns the exit status."""
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
        InputError: there is no file to look at.
    """
    if name == NAME:
        raise InputError(f"{name} videos are made when they are asked for: there is no file to look at")
    with noted_faults() as wrong:
        try:
            source = open_set(name, DataSettings(root=root, split=split))
        except InputError as error:
            return {"set": name, "split": split}, [*dict.fromkeys([*wrong, str(error)])]
    items = source.items
    has_videos = isinstance(items[0], VideoSample)
    with closing(_each(partial(_look, items, quick), len(items), workers)) as done:
        found = list(tqdm(done, source.name, len(items), disable=not sys.stderr.isatty()))
    classes = Counter(label for each in found for label in each.labels if label is not None)
    summary: dict[str, Any] = {
        "set": source.name,
        "split": split,
        "videos" if has_videos else "images": len(items) + source.left_out,
        "without_objects": source.left_out + sum(each.is_left_out for each in found),
        "frames": sum(each.num_frames for each in found),
        "objects": sum(len(each.labels) for each in found),
        "clips_from": {
            f"{kind.task}{f' {kind.num_objects}' if kind.num_objects else ''}": count
            for kind, count in source.clips.kinds().items()
        },
    }
    if source.classes is not None:
        summary["objects_by_class"] = {source.classes.names[k]: classes[k] for k in sorted(classes)}
    return summary, [*dict.fromkeys([*wrong, *(line for each in found for line in each.wrong)])]


def _each(look: Callable[[int], Found], count: int, workers: int) -> Generator[Found, None, None]:
    """What is found in every item, in order, by so many processes.

    Raises:
        InputError: a process cannot start, or has gone.
    """
    if workers <= 1:
        yield from map(look, range(count))
        return
    with ExitStack() as stack:
        stack.enter_context(threads(opencv=1))  # a fork would wait for threads that it did not inherit
        others = multiprocessing.active_children()
        try:
            kind = multiprocessing.get_context(process_kind())
            pool = stack.enter_context(ProcessPoolExecutor(workers, kind, _start_worker))
            done = pool.map(look, range(count), chunksize=8)
        except OSError as error:  # of semaphores, of forks
            raise InputError(f"{workers} processes cannot start ({error}): {FEWER}") from None
        try:
            yield from done
        except BrokenProcessPool:
            raise InputError(f"a process has gone, most likely for want of memory: {FEWER}") from None
        except BaseException:  # the command is stopped: its processes must not outlive it
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()
            raise


def _start_worker() -> None:
    """What stops the command stops this process: the pool lets it go."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _look(items: Sequence[VideoSample | LabelledImage], quick: bool, number: int) -> Found:
    item = items[number]
    if not isinstance(item, VideoSample):
        return Found([*item.labels.values()], 1, False, _image_faults(item, quick and number % SOME > 0))
    truth = item.truth
    assert truth is not None, item.name
    wrong = []
    for t, image in enumerate(item.images):
        shown, faults = _look_at(image, item.size, partial(truth.read, t), quick=quick and t > 0)
        wrong += [f"video {item.name}: {fault}" for fault in faults]
        if shown is not None and (absent := set(truth.visible[t]) - shown):
            frame = item.frame_names[t]
            wrong.append(f"video {item.name}: frame {frame} has no pixel of {sorted(absent)}")
    return Found([*truth.labels.values()], len(item.images), not any(truth.visible), wrong)


def _image_faults(image: LabelledImage, quick: bool) -> list[str]:
    shown, faults = _look_at(image.image, image.size, image.read_map, quick=quick)
    objects = len(image.labels)
    absent = 0 if shown is None else len(image.labels.keys() - shown)
    # a polygon may be thinner than a pixel, but what a picture shows and what is listed of it must agree
    if absent and (absent == objects or image.read_map().ids is not None):
        faults.append(f"{absent} of its {objects} objects have no pixel in its labels")
    return [f"image {image.name}: {fault}" for fault in faults]


def _look_at(
    image: Path, size: Size | None, read: Callable[[], FrameTruth], *, quick: bool
) -> tuple[set[int] | None, list[str]]:
    """The objects that labels show, and what is wrong; None for a fault, and where labels are not read."""
    if quick:
        return None, [] if image.is_file() else [f"{image}: not found"]
    with noted_faults() as wrong:
        try:
            truth = read()
            if size is None and (truth.masks or truth.ids is not None):
                size = frame_size(truth)
            read_window(image, Window(0, 0, *(size or (1, 1))), size or (1, 1), size)  # decodes all of it
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        return None, wrong
    shown = {id_ for id_, mask in (truth.masks or {}).items() if rle.area(mask)}
    return shown if truth.ids is None else {*shown, *shown_ids(truth.ids)}, []


if __name__ == "__main__":
    sys.exit(main())
