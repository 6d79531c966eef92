"""Segment a video.

    python -m tarvis.infer video.mp4 --task vis --weights weights.pth --out out
    python -m tarvis.infer frames/ --task vos --masks first_frame.png --weights weights.pth --out out
    python -m tarvis.infer 'frames/*.jpg' --task pet --points points.json --weights weights.pth --out out
    python -m tarvis.infer video.mp4 --task vis,vos --masks first_frame.png --weights weights.pth --out out
    python -m tarvis.infer video.mp4 --task vis --engine engine --out out

Writes, per task, a picture of ids for every frame, tracks.json, overlay.mp4 and contact_sheet.png; with
several tasks each has its own folder below OUT. One JSON line on stdout sums up. Tasks of one pass share the
settings of --dataset, else those of the first task. An engine is a folder that export.to_onnx, export.aoti or
export.trt has made; its clips and sizes are those it was made for, where nothing else is said.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from tarvis.api import Model, Segmentation, load
from tarvis.datasets.benchmarks import INFERENCE
from tarvis.datasets.classes import TABLES
from tarvis.model.weights import read_config
from tarvis.resize import network_size
from tarvis.stitch.schedule import clip_frames
from tarvis.structures import InputError, VideoResult
from tarvis.tasks import TASKS
from tarvis.video.frames import open_frames, prefetch
from tarvis.video.overlays import write_overlays
from tarvis.video.results import staged, write_results

if TYPE_CHECKING:
    from export.manifest import Manifest

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        summary = infer(args)
    except (InputError, OSError) as error:
        return fail(str(error))
    except torch.OutOfMemoryError:
        return fail("out of GPU memory: try a smaller --min-size or --clip-length, or --amp")
    except RuntimeError as error:
        if not args.compile:
            raise
        return fail(f"compiling needs a C++ compiler, or drop --compile: {str(error).strip()[:200]}")
    print(json.dumps(summary))
    return 0


def fail(message: str) -> int:
    """One line on stderr, and the exit code of a user mistake."""
    print(f"error: {' '.join(line.strip() for line in message.splitlines())}", file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m tarvis.infer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("input", metavar="INPUT", help="a video file, a folder of images, or a quoted glob")
    p.add_argument("--task", required=True, help=f"{', '.join(TASKS)}, or several with commas between")
    add_network(p.add_mutually_exclusive_group(required=True))
    p.add_argument("--config", type=Path, help="the weights' config.yaml, where it is not beside them")
    p.add_argument("--out", required=True, type=Path, help="folder to make")
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
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    p.add_argument("--amp", choices=AMP, default="off", help="mixed precision (default: off)")
    p.add_argument("--compile", action="store_true", help="compile the network first")
    p.add_argument("--clip-length", type=int, metavar="N", help="frames the network sees together")
    p.add_argument("--overlap", type=int, metavar="N", help="frames that consecutive clips share")
    p.add_argument("--min-size", type=int, metavar="N", help="shorter side for the network; 0: native size")
    p.add_argument("--min-score", type=float, default=0.3, help="vis, vps: least score in pictures (0.3)")
    p.add_argument("--start", type=int, default=0, metavar="N", help="leave out the first N frames")
    p.add_argument("--limit", type=int, metavar="N", help="read at most N frames")
    p.add_argument("--overwrite", action="store_true", help="replace the results in OUT")
    p.add_argument("--trust", action="store_true", help="allow pickled objects in the weights file")
    return p


def add_network(group: Any) -> None:
    """The options that say which network runs, to a group of which one is given."""
    group.add_argument("--weights", type=Path, help=".pth (config.yaml beside it) or .safetensors")
    group.add_argument("--engine", type=Path, metavar="DIR", help="exported graphs in the place of weights")


def infer(args: argparse.Namespace) -> dict[str, Any]:
    """Run as told; returns the summary that goes to stdout."""
    tasks = [name.strip() for name in args.task.split(",")]
    with staged(args.out, overwrite=args.overwrite) as folder:
        source = open_frames(args.input, limit=args.limit, start=args.start)
        model = load_network(args, args.device)
        video = model.segment(
            source,
            tasks,
            dataset=args.dataset,
            masks=args.masks,
            points=args.points,
            amp=AMP[args.amp],
            **asked_settings(args),
        )
        if args.engine is not None:
            require_clips(args.engine, video)
        seconds = run(video, model, "+".join(tasks))
        for task, result in video.results.items():
            target = folder / task if len(tasks) > 1 else folder
            target.mkdir(exist_ok=True)
            write(result, video, target, args.min_score)
    return {
        "out": str(args.out),
        "frames": video.num_read,
        "frames_per_second": round(video.num_read / seconds, 2),
        "tracks": {task: len(result.tracks) for task, result in video.results.items()},
    }


def load_network(args: argparse.Namespace, device: str | torch.device) -> Model:
    """The network that --weights or --engine names, on a device."""
    if args.engine is None:
        config = None if args.config is None else read_config(args.config)
        return load(args.weights, device=device, config=config, trust=args.trust, compile=args.compile)
    if args.compile or args.amp != "off":
        raise InputError("an engine is compiled, in a precision of its own: drop --compile and --amp")
    from export.runner import open_runner

    network = open_runner(args.engine, device=device)
    return Model(network, network.config, device=network.pixel_mean.device)


def asked_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Clips and sizes as the options say, else as an engine was made for; no others."""
    settings: dict[str, Any] = {}
    if args.engine is not None:
        settings |= manifest_of(args.engine).settings
    for name in ("clip_length", "overlap", "min_size"):
        if (value := getattr(args, name)) is not None:
            settings[name] = None if name == "min_size" and value == 0 else value
    return settings


def require_clips(engine: Path, video: Segmentation) -> None:
    """Raise InputError at once, and not at the last clip, where an engine does not take all of a video's."""
    if (num_frames := video.source.num_frames) is None:
        return
    first = min((r.frame for r in video.references), default=0)
    settings, manifest = video.settings, manifest_of(engine)
    size = network_size(video.source.size, settings.min_size, settings.max_size)
    for clip in clip_frames(num_frames, settings.clip_length, settings.overlap, first):
        manifest.require_clip(len(clip), size)


def manifest_of(engine: Path) -> Manifest:
    from export.manifest import read_manifest

    return read_manifest(engine, check_files=False)


def run(video: Segmentation, model: Model, title: str) -> float:
    """Segment the whole video behind a progress bar; returns the seconds it took."""
    device = model.network.pixel_mean.device
    start = time.perf_counter()
    with tqdm(
        total=video.source.num_frames, unit="frame", desc=f"{title} on {device}", file=sys.stderr
    ) as bar:
        for _ in video:
            bar.update(video.num_read - bar.n)
        bar.update(video.num_read - bar.n)
    return time.perf_counter() - start


def write(result: VideoResult, video: Segmentation, folder: Path, min_score: float) -> None:
    """Result files and pictures of one task; the frames are read once more for the overlay."""
    task = TASKS[result.task]
    classes = video.classes if task.finds_classes else None
    names = [video.source.name(frame) for frame in range(result.num_frames)]
    write_results(result, folder, names=names, classes=classes, min_score=min_score)
    write_overlays(
        result,
        prefetch(video.source),
        folder,
        fps=video.source.fps or 10.0,
        classes=classes,
        min_score=min_score,
        references=task.targets(video.references),
    )


if __name__ == "__main__":
    sys.exit(main())
