"""Evaluate weights on a benchmark, or on your own data: its official score, and the file for its server.

    python -m tarvis.evaluate davis --weights weights.pth --data DAVIS
    python -m tarvis.evaluate ovis --weights weights.pth --data OVIS --submission
    python -m tarvis.evaluate ovis --engine engine --data OVIS
    python -m tarvis.evaluate vipseg --results results --truth VIPSeg_720P
    torchrun --nproc_per_node 8 -m tarvis.evaluate burst --weights weights.pth --data BURST
    python -m tarvis.evaluate my_val.json --weights runs/mine/005000.pth
    python -m tarvis.evaluate my_val/ --weights runs/mine/005000.pth --task vos

Infers every video, writes result files, scores them. What a run has finished is kept: started again, it goes
on where it was. Below OUT there are then

    run.json       what was run: weights, settings; whether all videos are finished
    videos/        a file for each finished video
    results/       what the benchmark's server and scorer want
    scores.json    every number
    viz/           overlay.mp4 and contact_sheet.png of every video (--viz)

A table goes to stderr, one JSON line to stdout. With --results, other people's results are scored as well.
Own data is a file of videos and tracks as YouTube-VIS has it (AP), or a folder of frames and indexed masks as
DAVIS has it (J&F). An engine (a folder that export.to_onnx, export.aoti or export.trt has made) runs with the
clip length and the sizes that it was made for, unless options name others.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tarvis import cli, places
from tarvis.api import Model, load, settings_name
from tarvis.benchmark_run import BenchmarkRun
from tarvis.config import InferenceConfig, ModelConfig
from tarvis.datasets.benchmark import WORKSPACE, Benchmark, Roots, VideoSample, find_below
from tarvis.datasets.classmap import ClassMap, known_classes
from tarvis.datasets.own import own_benchmark
from tarvis.datasets.registry import BENCHMARKS, INFERENCE
from tarvis.distributed import World, spread, threads, world
from tarvis.engines import FILE, Manifest, open_runner, read_manifest
from tarvis.files.atomic import fresh, write_json, zip_files
from tarvis.files.outputs import GrowingFolder, digest_of_file
from tarvis.model.weights import BUNDLED, read_config
from tarvis.structures import InputError
from tarvis.tasks import TASKS


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    def action() -> dict[str, Any]:
        with world() as process:
            summary = evaluate(args, process)
        scores: dict[str, float] = summary.get("scores", {})
        for name, value in scores.items():
            print(f"{name:<{max(map(len, scores))}}  {value:.4f}", file=sys.stderr)
        return summary

    stopped = "stopped; the same command goes on where this one was"
    return cli.run(action, compiles=args.compile, stopped=stopped)


def parser() -> argparse.ArgumentParser:
    p = cli.command("tarvis.evaluate", __doc__)
    p.add_argument(
        "benchmark",
        metavar="BENCHMARK",
        help=f"{', '.join(BENCHMARKS)}; or own data, a .json file or a folder",
    )
    what = p.add_argument_group("what to score")
    cli.add_network(what)
    cli.add_reading(what)
    what.add_argument("--results", type=Path, metavar="DIR", help="score these results; nothing is inferred")
    what.add_argument("--split", help="val, test, ... (default: the benchmark's usual one)")
    what.add_argument(
        "--task",
        choices=TASKS,
        help="burst: pet (points, default) or vos (masks); own folder: vos (default) or pet",
    )
    what.add_argument("--videos", nargs="+", metavar="NAME", help="only these videos")
    what.add_argument(
        "--shard", metavar="I/N", help="infer the I-th of N parts (from 1); score in a last run"
    )

    where = p.add_argument_group("where files are")
    where.add_argument(
        "--data", type=Path, metavar="ROOT", help=f"official download or workspace (default: ${WORKSPACE})"
    )
    where.add_argument("--images", type=Path, metavar="DIR", help="the frames, where they are not below ROOT")
    where.add_argument(
        "--annotations", type=Path, metavar="PATH", help="what lists the videos, where it is not below ROOT"
    )
    where.add_argument("--truth", type=Path, metavar="PATH", help="the truth, where it is not below ROOT")
    where.add_argument(
        "--out", type=Path, metavar="DIR", help="(default: BENCHMARK_SPLIT_WEIGHTS beside them)"
    )
    where.add_argument(
        "--classes",
        type=Path,
        metavar="JSON",
        help="use another class set of the weights: see tarvis/datasets/README.md",
    )
    what.add_argument(
        "--dataset",
        metavar="NAME",
        help="own data: class set of the weights (default: their only own one) and settings",
    )

    how = p.add_argument_group("how")
    how.add_argument(
        "--submission", action="store_true", help="check the results and zip them for the server"
    )
    how.add_argument("--viz", action="store_true", help="also write an overlay of every video")
    how.add_argument("--overwrite", action="store_true", help="infer finished videos again")
    how.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="CPU threads of a process; last digits of results depend on it. To use more cores and get the "
        "same files, start more processes with torchrun (default: 1)",
    )
    cli.add_running(how)
    cli.add_clips(how)
    return p


class Network:
    """The network that --weights or --engine names, opened on this process's device when first needed."""

    def __init__(self, args: argparse.Namespace, process: World) -> None:
        self._args = args
        self._device = args.device
        if args.device == "auto" and torch.cuda.is_available():
            self._device = f"cuda:{process.local_rank}"
        if args.engine is not None:
            cli.refuse_precision(args)

    @cached_property
    def model(self) -> Model:
        args = self._args
        if args.engine is not None:
            engine = open_runner(args.engine, device=self._device, trust=args.trust)
            return Model(engine, engine.config, device=engine.device)
        config = None if args.config is None else read_config(args.config)
        return load(args.weights, device=self._device, config=config, trust=args.trust, compile=args.compile)

    @cached_property
    def manifest(self) -> Manifest | None:
        """Of an engine: what it was made for. None for weights."""
        return None if self._args.engine is None else read_manifest(self._args.engine, check_files=False)

    @property
    def config(self) -> ModelConfig:
        return self.model.config if self.manifest is None else self.manifest.model

    @property
    def file(self) -> Path:
        """The weights, or the engine's manifest, which has digests of all its files."""
        path: Path = self._args.weights or self._args.engine / FILE
        return path


def evaluate(args: argparse.Namespace, process: World) -> dict[str, Any]:
    """Infer, score and pack; returns the summary for stdout, which is empty except on the main process."""
    benchmark = named(args)
    split = args.split or benchmark.splits[0]
    if split not in benchmark.splits:
        raise InputError(f"{benchmark.name} has no split {split!r}; it has: {', '.join(benchmark.splits)}")
    if args.submission and is_own(args):
        raise InputError("--submission: no server waits for own data")
    if args.submission and (args.videos is not None or args.shard is not None):
        raise InputError("--submission: a server wants all videos; drop --videos and --shard")
    if sum(path is not None for path in (args.weights, args.engine, args.results)) > 1:
        raise InputError("give either --weights or --engine, to infer and score, or --results, to score")
    if args.engine is None and args.results is None and args.weights is None:
        args.weights = BUNDLED
    summary: dict[str, Any] = {"benchmark": benchmark.name, "split": split}
    if args.results is not None and not process.is_main:
        return {}
    if args.results is not None and args.truth is not None and not args.submission:
        numbers = benchmark.score(args.results, args.truth, split, args.videos)
        return summary | {"scores": overall(numbers, benchmark.headline)}

    roots = find(args, benchmark, split)
    samples = benchmark.read(roots, split)
    videos = choose(samples, args.videos)
    if args.results is not None:
        return summary | published(args, benchmark, split, roots, videos, args.results)
    made_by = args.weights or args.engine
    is_by_name = made_by == BUNDLED or made_by.is_relative_to(places.kept())
    beside = Path() if is_by_name else made_by.parent
    out = args.out or beside / f"{benchmark.name}_{split}_{made_by.stem}"
    summary["out"] = str(out)
    if args.threads < 1:
        raise InputError(f"--threads: expected at least 1, got {args.threads}")
    folder = GrowingFolder(out)
    part = "" if args.shard is None else args.shard.replace("/", "-")
    with folder.lock(part) if process.is_main else nullcontext():
        with threads(args.threads):
            run = infer(args, benchmark, split, out, roots, samples, videos, process)
        process.wait()
        if not process.is_main:
            return {}
        if args.shard is not None:  # another one may be writing
            missing = sum(not run.is_finished(video) for video in videos)
            before = "the other shards, then " if missing else ""
            print(
                f"{len(videos) - missing} of {len(videos)} videos are finished; "
                f"run {before}this command without --shard",
                file=sys.stderr,
            )
            return summary | {"missing": missing}
        run.note(samples)
        with folder.piece("joined") as piece:
            benchmark.join(map(run.share, videos), videos, split, piece / "results")
        return summary | published(args, benchmark, split, roots, videos, out / "results", folder)


def published(
    args: argparse.Namespace,
    benchmark: Benchmark,
    split: str,
    roots: Roots,
    videos: Sequence[VideoSample],
    results: Path,
    folder: GrowingFolder | None = None,
) -> dict[str, Any]:
    """Pack and score results, which are of others where there is no `folder`; what is to be told of that."""
    told: dict[str, Any] = {}
    if args.submission:
        archive = results.parent / f"{benchmark.name}_{split}.zip"
        pack(benchmark.check(results, videos, split), archive, folder)
        cli.say(f"to submit: {archive}")
        told["submission"] = str(archive)
    if roots.truth is None:
        cli.say(
            f"{benchmark.name} {split}: found no truth, so there is no score; say where it is with --truth"
        )
        return told
    numbers = benchmark.score(results, roots.truth, split, args.videos)
    if folder is not None and args.videos is None:
        with folder.piece("scores") as piece:
            write_json(piece / "scores.json", numbers)
    return told | {"scores": overall(numbers, benchmark.headline)}


def pack(files: Mapping[str, Path], archive: Path, folder: GrowingFolder | None) -> None:
    """Zip the files to submit. An archive that is not of the `folder` is never replaced by another one."""
    if folder is not None:
        with folder.piece("submission") as piece:
            zip_files(files, piece / archive.name)
        return
    made = fresh(archive)
    try:
        zip_files(files, made)
        if os.path.lexists(archive) and digest_of_file(archive) != digest_of_file(made):
            raise InputError(f"{archive}: already exists, with other content; move it away")
        made.replace(archive)
    finally:
        made.unlink(missing_ok=True)


def is_own(args: argparse.Namespace) -> bool:
    return args.benchmark not in BENCHMARKS


def named(args: argparse.Namespace) -> Benchmark:
    """The benchmark that is named, or the one that own data is."""
    if not is_own(args):
        if args.dataset is not None:
            raise InputError(f"--dataset: {args.benchmark} has classes and settings of its own")
        return BENCHMARKS[args.benchmark]
    path = Path(args.benchmark)
    if not (path.is_dir() or (path.suffix == ".json" and path.is_file())):
        raise InputError(
            f"{path}: expected a benchmark ({', '.join(BENCHMARKS)}) or own data: a .json file as "
            "YouTube-VIS has it, or a folder of frames and masks as DAVIS has it"
        )
    for name in ("data", "annotations"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name}: own data is where {path} is; drop it")
    return own_benchmark(path, args.images)


def find(args: argparse.Namespace, benchmark: Benchmark, split: str) -> Roots:
    """Where the files are: below --data, except those that have a flag of their own."""
    given = {name: getattr(args, name) for name in ("images", "annotations", "truth")}
    given = {name: path for name, path in given.items() if path is not None}
    for path in given.values():
        if not path.exists():
            raise InputError(f"{path}: not found")
    if is_own(args):
        return dataclasses.replace(benchmark.find(Path(args.benchmark), split), **given)
    if {"images", "annotations"} <= given.keys():
        return Roots(**given)
    root = args.data or os.environ.get(WORKSPACE)
    if not root:
        raise InputError(f"where is {benchmark.name}? Give --data ROOT, or set {WORKSPACE}")
    if not Path(root).is_dir():
        raise InputError(f"{root}: no such folder")
    return dataclasses.replace(find_below(benchmark, Path(root), split), **given)


def choose(samples: Sequence[VideoSample], names: Collection[str] | None) -> list[VideoSample]:
    """The named videos, or all, in the order of the annotations."""
    if names is None:
        return list(samples)
    known = {video.name for video in samples}
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"no video {unknown[0]!r} in this split, which has: {cli.some(known)}")
    return [video for video in samples if video.name in names]


def infer(
    args: argparse.Namespace,
    benchmark: Benchmark,
    split: str,
    out: Path,
    roots: Roots,
    samples: Sequence[VideoSample],
    videos: Sequence[VideoSample],
    process: World,
) -> BenchmarkRun:
    """Infer this process's share of the `videos` that are not finished; `samples` are all of the split."""
    task = args.task or benchmark.tasks[0]
    if task not in benchmark.tasks:
        raise InputError(f"{benchmark.name} is run with {', '.join(benchmark.tasks)}, not {task}")
    network = Network(args, process)
    classes = class_map(args, benchmark, task, network)
    suited = network.config.suited(settings_of(args, benchmark, task, classes))
    made_for = {} if network.manifest is None else network.manifest.settings
    settings = dataclasses.asdict(suited) | made_for | cli.asked_settings(args)
    run = BenchmarkRun(
        benchmark=benchmark,
        split=split,
        task=task,
        out=out,
        settings=settings,
        classes=classes,
        amp=args.amp,
    )
    todo: list[int] | None = None
    if process.is_main:
        if classes is not None and is_own(args):
            say_unknown(classes, benchmark)
        run.claim(network.file, roots, overwrite=args.overwrite, is_alone=args.shard is None)
        todo = [
            k
            for k in shard(videos, args.shard)
            if args.overwrite or not run.is_finished(videos[k], viz=args.viz)
        ]
        images = (image for k in todo for image in videos[k].images)
        if missing := next((image for image in images if not image.is_file()), None):
            raise InputError(f"{missing}: not found")  # now, not hours later
    todo = process.from_main(todo)
    mine = [todo[k] for k in spread([len(videos[k].images) for k in todo], process.size)[process.rank]]
    try:
        if mine:
            run.infer(network.model, [videos[k] for k in mine], viz=args.viz, is_shown=process.is_main)
    except BaseException:
        if process.is_main and args.shard is None:
            run.note(samples)
        raise
    return run


def class_map(args: argparse.Namespace, benchmark: Benchmark, task: str, network: Network) -> ClassMap | None:
    """How the classes of the weights map to the benchmark's; None where they are equal, or not used."""
    if benchmark.classes is None or not TASKS[task].finds_classes:
        if args.classes is not None:
            raise InputError(f"--classes: {benchmark.name} has objects without a class; drop it")
        return None
    if args.classes is None and not is_own(args):
        return None
    if args.classes is not None and args.dataset is not None:
        raise InputError("--classes names a class set: drop --dataset")
    config = network.config
    made_for = None if network.manifest is None else network.manifest.class_set
    if args.classes is not None:
        return ClassMap.read(args.classes, benchmark.classes, config.own_classes)
    names = [args.dataset or made_for] if args.dataset or made_for else list(config.own_classes)
    names = names or list(config.class_sets)
    have = ", ".join(config.class_sets) or "none"
    if len(names) != 1:
        raise InputError(f"name the class set of the weights with --dataset; they have: {have}")
    if names[0] not in config.class_sets:
        raise InputError(f"--dataset: these weights have no classes of {names[0]!r}; they have: {have}")
    return ClassMap.by_name(known_classes(names[0], config.own_classes), benchmark.classes)


def settings_of(
    args: argparse.Namespace, benchmark: Benchmark, task: str, classes: ClassMap | None
) -> InferenceConfig:
    """The published settings of the benchmark; for own data, those that `tarvis.infer` takes."""
    if not is_own(args):
        return benchmark.inference
    if classes is None:
        return INFERENCE[settings_name((task,), args.dataset, None)]
    return INFERENCE.get(classes.class_set, INFERENCE[TASKS[task].default_dataset])


def say_unknown(classes: ClassMap, benchmark: Benchmark) -> None:
    """Print the classes of the benchmark that the weights cannot find."""
    assert benchmark.classes is not None
    names = [name for k, name in enumerate(benchmark.classes.names) if k not in classes.labels]
    if names:
        cli.say(
            f"the weights' {classes.class_set!r} has no {', '.join(names)}, so these classes are not found"
        )


def shard(videos: Sequence[VideoSample], part: str | None) -> list[int]:
    """Indices of the videos of part "I/N"; of all without one."""
    if part is None:
        return list(range(len(videos)))
    number, _, count = part.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise InputError(f"--shard: expected I/N with 1 <= I <= N, got {part!r}")
    return spread([len(video.images) for video in videos], int(count))[int(number) - 1]


def overall(numbers: dict[str, float], headline: str) -> dict[str, float]:
    """The numbers that are not of one class, video, object or window of frames alone, the headline first."""
    shown = {name: value for name, value in numbers.items() if not name.startswith(("per_", *"123456789"))}
    return {headline: numbers[headline], **shown} if headline in numbers else shown


if __name__ == "__main__":
    sys.exit(main())
