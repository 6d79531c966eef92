"""Build TensorRT engines of one task.

    python -m export.trt --weights weights.pth --task vis --size 480x864 --precision fp16 --out engines
    python -m export.trt --onnx graphs --out engines             # from a folder made before
    python -m export.trt --onnx graphs --plugin none --dry-run   # does TensorRT parse them?

Takes `tensorrt` if it is installed, which builds for the GPU it finds, else `tensorrt_rtx`, which builds for
many and without one. Deformable attention is a plugin that launches this project's Triton kernel, so engines
run where this project is installed; with --plugin none it is standard operators (never GridSample, which
several versions of TensorRT compute wrongly for it), slower and free of dependencies. Writes encoder.engine,
decoder.engine and, for tasks whose objects are given, object_encoder.engine, with queries.safetensors,
manifest.json and build.log. What varies (--dynamic when exporting, the number of objects) varies up to the
--max options. A build that fails leaves no folder, but its log beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from export import to_onnx
from export.folder import QUERIES, command
from export.manifest import (
    FILE,
    PORTABLE,
    Manifest,
    digest_of_file,
    parse_size,
    read_manifest,
    write_manifest,
)
from export.to_onnx import require_packages
from export.trt_build import LIBRARIES, PLUGINS, Job, Range
from export.trt_library import environment, installed
from tarvis.files.atomic import whole_folder
from tarvis.structures import STRIDE, Geometry, InputError

LOG = "build.log"
ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    return command(parser(), run, argv)


def parser() -> argparse.ArgumentParser:
    """The options of `export.to_onnx`, and those of building."""
    p = to_onnx.parser()
    p.prog, p.description = "python -m export.trt", __doc__
    for action in p._actions:  # these are not needed with --onnx
        action.required = False
    p.add_argument("--onnx", type=Path, metavar="DIR", help="build from these graphs; no weights are needed")
    p.add_argument("--plugin", choices=PLUGINS, default="triton", help="(default: triton)")
    p.add_argument("--backend", choices=sorted(set(LIBRARIES.values())), help="(default: what is installed)")
    p.add_argument(
        "--arch", default="", metavar="LIST", help="TensorRT-RTX: compute capabilities, as 8.9,12.0"
    )
    p.add_argument("--max-frames", type=int, metavar="N", help="with free frames (default: --frames)")
    p.add_argument("--max-size", metavar="HxW", help="with free sizes (default: --size)")
    p.add_argument("--max-objects", type=int, default=32, metavar="N", help="vos, pet (default: 32)")
    p.add_argument("--level", type=int, metavar="0-5", help="optimisation level of the builder")
    p.add_argument("--workspace", type=float, metavar="GIB", help="most scratch memory of a layer")
    p.add_argument("--timing-cache", type=Path, metavar="FILE", help="TensorRT: read if there, and written")
    p.add_argument("--timeout", type=float, default=7200, metavar="S", help="of a graph (default: 7200)")
    p.add_argument("--dry-run", action="store_true", help="parse only; nothing is written")
    return p


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Build as told; returns the summary that goes to stdout."""
    library = installed(args.backend)
    backend = LIBRARIES[library]
    require_packages()
    architectures = parse_architectures(args.arch)
    if args.onnx is None:
        for name in ("weights", "task", "size"):
            if getattr(args, name) is None:
                raise InputError(f"give --{name}, or --onnx with a folder that export.to_onnx has made")
    if args.out is None and not args.dry_run:
        raise InputError("give --out, a folder to make, or --dry-run")
    capabilities = target(backend, architectures, dry=args.dry_run)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if args.dry_run:
            manifest, built = build(args, library, architectures, work, None)
        else:
            try:
                with whole_folder(args.out, overwrite=args.overwrite, marks=(FILE,)) as folder:
                    manifest, built = build(args, library, architectures, work, folder)
                    engines = described(manifest, folder, backend, built, args.plugin, capabilities)
                    write_manifest(folder, engines)
            except InputError:
                keep_log(work / LOG, args.out)
                raise
    return {
        "out": None if args.dry_run else str(args.out),
        "task": manifest.task,
        "backend": backend,
        "plugin": args.plugin,
        "graphs": built,
        "seconds": round(time.perf_counter() - start, 1),
    }


def target(backend: str, architectures: Sequence[str], *, dry: bool) -> str:
    """What engines will run on, in the manifest's words.

    Raises:
        InputError: TensorRT, which builds for the GPU it finds, is told another, or PyTorch finds none.
    """
    if backend != "tensorrt":
        return ",".join(architectures) or PORTABLE
    if architectures:
        raise InputError("TensorRT builds for the GPU it runs on: --arch is for TensorRT-RTX")
    if dry:
        return ""
    if not torch.cuda.is_available():
        raise InputError(
            f"TensorRT builds for the GPU it finds, and PyTorch {torch.__version__} finds none: "
            "--backend tensorrt_rtx builds without one"
        )
    return "SM{}{}".format(*torch.cuda.get_device_capability())


def build(
    args: argparse.Namespace, library: str, architectures: Sequence[str], work: Path, folder: Path | None
) -> tuple[Manifest, dict[str, Any]]:
    """Engines of all graphs in `folder` (None: parse only), with queries and log.

    Returns:
        The manifest of the graphs, and what is told of each engine.
    """
    source = args.onnx or exported(args, work / "onnx")
    manifest = read_manifest(source)
    if manifest.backend != "onnx":
        raise InputError(f"{source}: holds graphs for {manifest.backend}, not ONNX graphs to build from")
    profiles = profile(manifest, limits(manifest, args))
    built = {}
    bar = tqdm(manifest.graphs.items(), desc=f"{manifest.task} by {library}", unit="graph", file=sys.stderr)
    for name, file in bar:
        job = Job(
            library=library,
            onnx=str(source / file),
            engine=None if folder is None else str(folder / f"{name}.engine"),
            log=str(work / LOG),
            plugin=args.plugin,
            profile=profiles[name],
            capabilities=architectures,
            level=args.level,
            workspace=args.workspace,
            timing_cache=None if args.timing_cache is None else str(args.timing_cache.absolute()),
        )
        built[name] = run_job(name, job, work, args.timeout, bar.set_postfix_str)
    if folder is not None:
        if (work / LOG).is_file():
            shutil.copy(work / LOG, folder)
        shutil.copy(source / QUERIES, folder)
    return manifest, built


def exported(args: argparse.Namespace, folder: Path) -> Path:
    """ONNX graphs for the same options."""
    to_onnx.run(argparse.Namespace(**{**vars(args), "out": folder}))
    return folder


def limits(manifest: Manifest, args: argparse.Namespace) -> dict[str, Range]:
    """Least, usual and greatest number of what may vary, by name."""
    most = args.max_frames or manifest.frames
    size = manifest.size if args.max_size is None else parse_size(args.max_size)
    if (
        most < manifest.frames
        or args.max_objects < 1
        or any(a < b for a, b in zip(size, manifest.size, strict=True))
    ):
        raise InputError("--max-frames and --max-size cannot be less than --frames and --size, or no objects")
    (rows, columns), (most_rows, most_columns) = (
        tuple(side // STRIDE for side in padded) for padded in (manifest.padded, Geometry(size, size).padded)
    )
    few = min(4, args.max_objects)
    return {
        "frames": (1, manifest.frames, most),
        "rows": (1, rows, most_rows),
        "columns": (1, columns, most_columns),
        "shown": (1, 1, most),  # frames that show what is followed
        "objects": (1, few, args.max_objects),
    }


def profile(manifest: Manifest, vary: dict[str, Range]) -> dict[str, dict[str, dict[int, Range]]]:
    """Ranges of all dimensions that may be free, by graph, input and dimension (see `export.graphs`)."""

    def times(n: int, name: str) -> Range:
        least, usual, most = vary[name]
        return n * least, n * usual, n * most

    def at(stride: int, first: int) -> dict[int, Range]:
        """Rows and columns of a map."""
        return {first: times(STRIDE // stride, "rows"), first + 1: times(STRIDE // stride, "columns")}

    others = sum(count for name, count in manifest.groups.items() if name != "vos")
    parts = 2 * manifest.model.num_queries_per_object  # at inference
    least, usual, most = vary["objects"]
    # an object given by a point is one query, by a mask it is several; PET may have as many of both
    points = most if manifest.task == "pet" else 0
    queries = (others + 1, others + parts * usual, others + parts * most + points)
    decoder = {f"memory_{stride}": {1: vary["frames"]} | at(stride, 3) for stride in (32, 16, 8)}
    decoder["mask_features"] = {1: vary["frames"]} | at(4, 3)
    object_encoder = {
        "mask_features": {0: vary["shown"]} | at(4, 2),
        "masks": {0: vary["objects"], 1: vary["shown"]} | at(1, 2),
    }
    names = ("masks_exist", "point_features", "point_positions", "points_exist")
    return {
        "encoder": {"frames": {1: vary["frames"]} | at(1, 3)},
        "decoder": decoder | {name: {1: queries} for name in ("content", "position")},
        "object_encoder": object_encoder | {name: {0: vary["objects"]} for name in names},
    }


def run_job(
    name: str, job: Job, work: Path, timeout: float, show: Callable[[str], Any] = lambda _: None
) -> dict[str, Any]:
    """One graph in a process of its own; returns what it tells.

    Raises:
        InputError: it failed, was aborted, was killed, or took too long.
    """
    path = work / f"{name}.json"
    job.write(path)
    show(name)
    build = [sys.executable, "-m", "export.trt_build", str(path)]
    end, answer = time.monotonic() + timeout, dict[str, Any]()
    with (
        tempfile.TemporaryDirectory(dir=work) as folder,
        Path(job.log).open("a") as log,
        subprocess.Popen(
            build, cwd=ROOT, env=environment(Path(folder)), stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        watch = _killed_after(process, timeout)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                answer = _object(line) or answer
                if "phase" in answer:
                    show(f"{name}: {answer['phase'][:40]} {answer['done']}/{answer['of']}")
            process.wait()
        finally:
            watch.cancel()
            if process.poll() is None:
                process.kill()
    if "result" in answer and process.returncode == 0:
        result: dict[str, Any] = answer["result"]
        return result
    if "error" in answer:
        raise InputError(f"{name}: {answer['error']}")
    if time.monotonic() > end:
        raise InputError(f"{name}: not built in {timeout:.0f} s; see --timeout")
    raise InputError(f"{name}: {_death(process.returncode)}; the end of its log: {_last_line(Path(job.log))}")


def described(
    manifest: Manifest, folder: Path, backend: str, built: dict[str, Any], plugin: str, capabilities: str
) -> Manifest:
    """The manifest of engines, made of that of their graphs."""
    files = sorted(path for path in folder.iterdir() if path.name != LOG)
    return dataclasses.replace(
        manifest,
        graphs={name: f"{name}.engine" for name in manifest.graphs},
        files={path.name: digest_of_file(path) for path in files},
        versions=manifest.versions | {backend: next(iter(built.values()))["version"]},
        backend=backend,
        target={"plugin": plugin, "capabilities": capabilities},
    )


def parse_architectures(text: str) -> tuple[str, ...]:
    """ "8.9,sm_120" -> ("SM89", "SM120").

    Raises:
        InputError: anything else.
    """
    names = []
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)", part.strip().lower())
        if found is None:
            raise InputError(f"--arch {part}: expected compute capabilities, as 8.9 or sm_89")
        names.append(f"SM{found[1]}{found[2]}")
    return tuple(names)


def keep_log(log: Path, out: Path) -> None:
    """Put the log of a failed build beside the folder that was not made."""
    if log.is_file():
        kept = out.with_name(f"{out.name}.log")
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(log, kept)
        print(f"log: {kept}", file=sys.stderr)


def _killed_after(process: subprocess.Popen[str], seconds: float) -> Any:
    import threading

    watch = threading.Timer(seconds, process.kill)
    watch.daemon = True
    watch.start()
    return watch


def _object(line: str) -> dict[str, Any]:
    """A line of JSON; nothing for what libraries print."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _death(code: int) -> str:
    """Why a process ended, by its exit status."""
    if code == -signal.SIGKILL:
        return "the build was killed, most likely for want of memory: try a smaller --size or --frames"
    if code < 0:
        return f"TensorRT brought its process down ({signal.Signals(-code).name})"
    return f"the build ended with status {code}"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1][:300] if lines else "(empty)"


if __name__ == "__main__":
    sys.exit(main())
