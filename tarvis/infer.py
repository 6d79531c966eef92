"""Segment a video.

    python -m tarvis.infer video.mp4
    python -m tarvis.infer video.mp4 --points points.json
    python -m tarvis.infer video.mp4 --task vis --weights weights.pth --out out
    python -m tarvis.infer frames/ --task vos --masks first_frame.png --weights weights.pth --out out
    python -m tarvis.infer 'frames/*.jpg' --task pet --points points.json --weights weights.pth --out out
    python -m tarvis.infer video.mp4 --task vis,vos --masks first_frame.png --weights weights.pth --out out
    python -m tarvis.infer video.mp4 --task vis --engine engine --out out
    python -m tarvis.infer videos/ more.mp4 --json --out out

Writes, per task, tracks.json and what --save names: by default a picture of ids for every frame (masks), and
overlay.mp4 with contact_sheet.png (overlay). With several tasks each has its own folder below OUT. One JSON
line on stdout sums up.

Of several videos each has its folder OUT/NAME. One that fails costs a line, and exit status 3 at the end.
With --start, --end and --stride frames keep their numbers and names, in results as in --points and --masks.
Tasks of one pass share the settings of --dataset, else those of the first task. Without --weights the small
network of the package runs. Without --task objects that are given are followed; where none are, the classes
of the weights are found. An engine is a folder that export.to_onnx, export.aoti or export.trt has made; it
runs with the clip length and sizes that it was made for, unless options name others.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tarvis import cli
from tarvis.api import Model, Segmentation, load
from tarvis.datasets.classes import TABLES, ClassTable
from tarvis.datasets.registry import INFERENCE
from tarvis.engines import Manifest, open_runner
from tarvis.files.folders import IMAGE_SUFFIXES, VIDEO_SUFFIXES, images_among, output_name
from tarvis.files.outputs import digest_of_file, whole_folder
from tarvis.model.weights import read_config
from tarvis.places import BUNDLED, own_version
from tarvis.stitch.panoptic import only_classes
from tarvis.stitch.resize import network_size
from tarvis.stitch.schedule import clip_frames
from tarvis.structures import InputError, VideoResult, one_line
from tarvis.tasks import TASKS
from tarvis.video.exports import FORMATS, Export, write_export
from tarvis.video.frames import VideoFrames, number_of, open_frames, prefetch
from tarvis.video.overlays import shown_tracks
from tarvis.video.results import ResultFiles

KINDS = ("overlay", "masks", *(kind for kind in FORMATS if kind != "overlay"))
"""What --save takes; `overlay` has the contact sheet beside it."""

SHAPES_ALONE = (
    "the small network of the package finds the classes of generated clips alone ({}); "
    "in real footage it follows what it is given: --task pet --points, or --task vos --masks"
)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: infer(args), compiles=args.compile)


def parser() -> argparse.ArgumentParser:
    p = cli.command("tarvis.infer", __doc__)
    p.add_argument(
        "input",
        metavar="INPUT",
        nargs="+",
        help="a video file, a folder of images or of videos, or a quoted glob; several are taken in turn",
    )
    task = f"{', '.join(TASKS)}, or several with commas between (default: what is given says)"
    p.add_argument("--task", help=task)
    cli.add_network(p.add_mutually_exclusive_group())
    cli.add_reading(p)
    p.add_argument("--out", type=Path, help="folder to make (default: runs/NAME, of INPUT's name)")
    p.add_argument(
        "--dataset", help=f"classes (vis, vps) and settings: {', '.join(INFERENCE | TABLES)}", metavar="NAME"
    )
    p.add_argument(
        "--masks",
        nargs="+",
        default=(),
        metavar="PNG",
        help="vos: indexed PNGs named after their frames, a folder of them, or ID@FRAME=PNG for one object",
    )
    p.add_argument("--points", type=Path, metavar="JSON", help="pet: a list of {id, frame, x, y} in pixels")
    cli.add_running(p)
    cli.add_clips(p)
    p.add_argument(
        "--save",
        default="overlay,masks",
        metavar="KINDS",
        help=f"what to write beside tracks.json, with commas between: {', '.join(KINDS)} "
        "(default: overlay,masks)",
    )
    score = "vis, vps: least score in all files except tracks.json (0.3)"
    p.add_argument("--min-score", type=float, default=0.3, help=score)
    p.add_argument("--classes", metavar="NAMES", help="vis, vps: keep these alone, with commas between")
    p.add_argument("--start", type=int, default=0, metavar="N", help="first frame to read; they count from 0")
    p.add_argument("--end", type=int, metavar="N", help="last frame to read")
    p.add_argument("--stride", type=int, default=1, metavar="N", help="read every Nth frame")
    p.add_argument("--limit", type=int, metavar="N", help="read at most N frames")
    p.add_argument("--overwrite", action="store_true", help="replace the results in OUT")
    p.add_argument("--quiet", action="store_true", help="no progress on stderr, errors alone")
    p.add_argument("--json", action="store_true", help="of several videos, one JSON line each on stdout")
    return p


@dataclasses.dataclass(frozen=True)
class Opened:
    """The network of a command, its settings, the manifest of an engine, or the SHA-256 of a weights file."""

    model: Model
    settings: Mapping[str, Any]
    manifest: Manifest | None = None
    digest: str | None = None


def infer(args: argparse.Namespace) -> dict[str, Any]:
    """Segment the videos; returns the summary that goes to stdout."""
    if not 0 <= args.min_score <= 1:
        raise InputError(f"--min-score: expected a number from 0 to 1, got {args.min_score}")
    kinds = asked_kinds(args.save)
    sources = [video for source in args.input for video in videos_of(source)]
    network = cache(lambda: opened(args))
    if sources == args.input and len(sources) == 1:
        [source] = sources
        out = args.out or cli.free_folder(short_name(source), overwrite=args.overwrite)
        return segment(one_of(args, source, out), network, kinds)
    if all(Path(source).suffix.lower() in IMAGE_SUFFIXES for source in sources):
        raise InputError(
            f"{sources[0]} and {len(sources) - 1} more are images: name their folder, or quote the pattern"
        )
    network()  # what is wrong with it is no video's fault
    return segment_each(args, sources, network, kinds)


def segment_each(
    args: argparse.Namespace, sources: Sequence[str], network: Callable[[], Opened], kinds: Sequence[str]
) -> dict[str, Any]:
    """Segment one video after the other, each into a folder of its own; one that fails costs a line."""
    failed, taken = 0, set[Path]()
    for number, source in enumerate(sources, 1):
        out = free_out(args, source, taken)
        try:
            summary = segment(
                one_of(args, source, out), network, kinds, label=f"{number}/{len(sources)} {out.name}: "
            )
            status = summary.pop(cli.STATUS)
        except (InputError, OSError) as error:
            status = cli.fail(str(error), cli.DAMAGED)
            summary = {"input": source, "error": one_line(str(error))}
        failed += status != 0
        if args.json:
            print(json.dumps(summary), flush=True)
        if status > cli.STOPPED:
            return {cli.STATUS: status}
    end = {cli.STATUS: cli.DAMAGED if failed else 0}
    return end if args.json else end | {"videos": len(sources), "failed": failed}


def segment(
    args: argparse.Namespace, network: Callable[[], Opened], kinds: Sequence[str], label: str = ""
) -> dict[str, Any]:
    """Segment one video, `args.input`, into `args.out`; returns its summary."""
    is_complete = True
    with whole_folder(
        args.out, overwrite=args.overwrite, inputs=inputs(args), is_complete=lambda: is_complete
    ) as folder:
        source = open_frames(args.input, start=args.start, end=args.end, stride=args.stride, limit=args.limit)
        found = network()
        tasks = asked_tasks(args, found.manifest.task if found.manifest else None)
        video = found.model.segment(
            source,
            tasks,
            dataset=args.dataset,
            masks=args.masks,
            points=args.points,
            amp=cli.AMP[args.amp],
            **found.settings,
        )
        if found.manifest is not None:
            require_clips(found.manifest, video)
        chosen = asked_classes(args.classes, tasks, video.classes)
        if args.weights is None and found.manifest is None and video.classes is not None and not args.quiet:
            cli.say(SHAPES_ALONE.format(", ".join(video.classes.names)))
        title, start = f"{label}{'+'.join(tasks)} on {found.model.device}", time.perf_counter()
        about = {
            "input": args.input,
            "fps": source.fps,
            "weights_sha256": found.digest,
            "version": own_version(),
        }
        with cli.stopping() as stop:
            with tqdm(
                total=source.num_frames, unit="frame", desc=title, file=sys.stderr, disable=args.quiet
            ) as bar:
                is_complete = video.run(bar, stop)
            seconds = time.perf_counter() - start
            results = video.results
            if chosen is not None:
                results = {name: only_classes(result, chosen) for name, result in results.items()}
            written = write(video, results, args, folder, kinds, stop, about)
            is_complete &= written == video.num_read
            unsaved = export(video, results, args, folder, kinds, written)
    status = report(args, video, stop, written, is_complete=is_complete)
    return {
        "input": args.input,
        "out": str(args.out),
        "frames": written,
        "complete": is_complete,
        cli.STATUS: status or (cli.DAMAGED if unsaved else 0),
        "frames_per_second": round(video.num_read / seconds, 2),
        "tracks": {task: len(result.tracks) for task, result in results.items()},
    }


def opened(args: argparse.Namespace) -> Opened:
    """The network that the options name."""
    settings = cli.asked_settings(args)
    if args.engine is None:
        config = None if args.config is None else read_config(args.config)
        model = load(args.weights, device=args.device, config=config, trust=args.trust, compile=args.compile)
        return Opened(model, settings, digest=digest_of_file(args.weights or BUNDLED))
    cli.refuse_precision(args)
    engine = open_runner(args.engine, device=args.device, trust=args.trust)
    model = Model(engine, engine.config, device=engine.device)
    return Opened(model, engine.manifest.settings | settings, engine.manifest)


def asked_classes(names: str | None, tasks: Sequence[str], table: ClassTable | None) -> set[int] | None:
    """The classes of --classes; None where all stay."""
    if names is None:
        return None
    if table is None:
        raise InputError(f"--classes: {', '.join(tasks)} finds no classes")
    return table.named(names)


def videos_of(source: str) -> list[str]:
    """The videos of a folder, or of a pattern, that has videos and no images; else the source itself."""
    path = Path(source)
    if os.path.lexists(path) and not path.is_dir():
        return [source]
    found = list(path.iterdir()) if path.is_dir() else [Path(each) for each in glob.glob(source)]
    if images_among(found):
        return [source]
    return [str(each) for each in images_among(found, VIDEO_SUFFIXES)] or [source]


def one_of(args: argparse.Namespace, source: str, out: Path) -> argparse.Namespace:
    """The options for one video; `given` are the inputs of the whole command."""
    return argparse.Namespace(**(vars(args) | {"input": source, "out": out, "given": args.input}))


def free_out(args: argparse.Namespace, source: str, taken: set[Path]) -> Path:
    """OUT/NAME for one of several videos, NAME-2, .. where another one is called so; notes it in `taken`."""
    name, number = output_name(short_name(source)), 1
    while True:
        called = name if number == 1 else f"{name}-{number}"
        path: Path = args.out / called if args.out else cli.free_folder(called, overwrite=args.overwrite)
        if path not in taken:
            taken.add(path)
            return path
        number += 1


def asked_tasks(args: argparse.Namespace, made_for: str | None) -> list[str]:
    """The tasks of --task; else those that follow what is given, else the engine's, else the first of all."""
    if args.task is not None:
        return [name.strip() for name in args.task.split(",")]
    is_given = {False: bool(args.masks), True: args.points is not None}
    following = {name: task for name, task in TASKS.items() if not task.finds_classes}
    given = [name for name, task in following.items() if is_given[task.takes_points]]
    return given or [made_for or next(iter(TASKS))]


def asked_kinds(save: str) -> list[str]:
    """The kinds of file that --save names."""
    kinds = [kind.strip() for kind in save.split(",")]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise InputError(f"--save: unknown {unknown[0]!r}; known: {', '.join(KINDS)}")
    return kinds


def short_name(source: str) -> str:
    """The name of a video file without its ending, of a folder, or of that which a pattern looks into."""
    path = Path(source)
    if not os.path.lexists(path):
        path = Path(*(part for part in path.absolute().parts if not glob.has_magic(part)))
    path = path.absolute()
    return (path.name if path.is_dir() else path.stem) or "video"


def inputs(args: argparse.Namespace) -> list[str | Path]:
    """Files and folders that are read, and so must not be replaced by the results."""
    patterns = [each for each in args.given if not os.path.lexists(each)]
    matches = [name for pattern in patterns for name in glob.glob(pattern, recursive=True)]
    masks = [name for mask in args.masks for name in (mask, str(mask).partition("=")[2] or mask)]
    named = (args.weights, args.engine, args.config, args.points)
    return [*args.given, *matches, *masks, *(path for path in named if path is not None)]


def report(
    args: argparse.Namespace, video: Segmentation, stop: cli.Stop, written: int, *, is_complete: bool
) -> int:
    """Say why a result is not of all the video; returns the exit status."""
    if is_complete:
        return 0
    kept = f"the result in {args.out} is of the first {written} frames"
    if video.damage is not None:
        return cli.fail(f"{video.damage}; {kept}", cli.DAMAGED)
    return cli.fail(f"stopped; {kept}", stop.status)


def require_clips(manifest: Manifest, video: Segmentation) -> None:
    """Raise InputError before the first clip if an engine cannot run every clip of a video."""
    if (num_frames := video.source.num_frames) is None:
        return
    first = min((r.frame for r in video.references), default=0)
    settings = video.settings
    size = network_size(video.source.size, settings.min_size, settings.max_size)
    for clip in clip_frames(num_frames, settings.clip_length, settings.overlap, first):
        manifest.require_clip(len(clip), size)


def write(
    video: Segmentation,
    results: Mapping[str, VideoResult],
    args: argparse.Namespace,
    folder: Path,
    kinds: Sequence[str],
    should_stop: Callable[[], bool],
    about: Mapping[str, Any],
) -> int:
    """tracks.json and pictures of all tasks, in one more pass over the frames; returns of how many.

    A second pass, because the scores that decide what is shown are known at the end of the video.
    """
    written = 0
    is_stopped = should_stop()  # as segmenting ended: these frames are written
    source = video.source
    with ExitStack() as stack:
        files = [
            stack.enter_context(
                ResultFiles(
                    result,
                    below(folder, name, results),
                    names=[source.name(frame) for frame in range(result.num_frames)],
                    classes=video.classes if TASKS[name].finds_classes else None,
                    min_score=args.min_score,
                    is_complete=not video.segmenter.is_cut,
                    masks="masks" in kinds,
                    about=about,
                    overlay={
                        "fps": source.fps,
                        "starts": number_of(source, 0) / (source.fps * args.stride) if source.fps else 0.0,
                        "sound": Path(source.path) if isinstance(source, VideoFrames) else None,
                        "references": TASKS[name].targets(video.references),
                    }
                    if "overlay" in kinds
                    else None,
                )
            )
            for name, result in results.items()
        ]
        frames = stack.enter_context(closing(prefetch(source)))
        while (
            written < video.num_read and (image := video.next_frame(frames, is_kept=written > 0)) is not None
        ):
            for each in files:
                each.add(written, image)
            written += 1
            if should_stop() and not is_stopped:
                break
    return written


def export(
    video: Segmentation,
    results: Mapping[str, VideoResult],
    args: argparse.Namespace,
    folder: Path,
    kinds: Sequence[str],
    count: int,
) -> list[str]:
    """Write the files for other tools, of the first `count` frames; returns the kinds that were not written.

    Each failure costs a line: what was found stays.
    """
    unsaved, source = [], video.source
    for name, result in results.items():
        tracks = tuple(shown_tracks(result, args.min_score))
        shown = Export(
            dataclasses.replace(result, num_frames=count, tracks=tracks),
            [source.name(frame) for frame in range(count)],
            lambda: source,
            fps=source.fps,
            numbers=[number_of(source, frame) for frame in range(count)],
            classes=video.classes if TASKS[name].finds_classes else None,
        )
        for kind in kinds:
            if kind not in ("overlay", "masks"):
                path = below(folder, name, results) / f"{kind}{FORMATS[kind].suffix}"
                try:
                    write_export(shown, kind, path)
                except InputError as error:
                    cli.fail(f"{kind} was not written: {error}")
                    unsaved.append(kind)
    return unsaved


def below(folder: Path, task: str, results: Mapping[str, VideoResult]) -> Path:
    """The folder of a task's results."""
    return folder / task if len(results) > 1 else folder


if __name__ == "__main__":
    sys.exit(main())
