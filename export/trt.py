"""Build TensorRT engines of one task.

    python -m export.trt --task vis
    python -m export.trt --weights weights.pth --task vis --size 480x864 --precision fp16 --out engines
    python -m export.trt --onnx graphs --out engines             # from a folder made before
    python -m export.trt --onnx graphs --plugin none --dry-run   # does TensorRT parse them?

Takes `tensorrt` if it is installed, which builds for the GPU it finds, else `tensorrt_rtx`, which builds for
many and without one. Deformable attention is a plugin that launches this project's Triton kernel, so engines
run where this project is installed; with --plugin none it is standard operators (never GridSample, which
several versions of TensorRT compute wrongly for it), slower and free of dependencies. Writes encoder.engine,
decoder.engine and, for tasks whose objects are given, object_encoder.engine, with queries.safetensors,
manifest.json and build.log. What varies (--dynamic when exporting, the number of objects) varies up to the
--max options. A build that fails leaves no folder; its log is kept beside OUT.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from tarvis import cli
from tarvis.files.atomic import whole_file
from tarvis.files.outputs import digest_of_file, whole_folder
from tarvis.structures import InputError
from tarvis.tasks import TASKS

from . import folder as folders
from . import to_onnx
from .folder import QUERIES
from .manifest import (
    PORTABLE,
    Manifest,
    parse_size,
    read_manifest,
    write_manifest,
)
from .runtimes import onnx, tensorrt
from .runtimes.tensorrt_build import LEVELS, LIBRARIES, PLUGINS

LOG = "build.log"
MOST = 1e6
"""Of GiB and of seconds, in options."""


def main(argv: Sequence[str] | None = None) -> int:
    return folders.command(parser(), run, argv)


def parser() -> argparse.ArgumentParser:
    """The options of `export.to_onnx`, which are not needed with --onnx, and those of building."""
    p = folders.parser("export.trt", __doc__, required=False)
    p.set_defaults(**dict.fromkeys(folders.DEFAULTS))  # whether they are given matters with --onnx
    p.add_argument("--onnx", type=Path, metavar="DIR", help="build from these graphs; no weights are needed")
    p.add_argument("--plugin", choices=PLUGINS, default="triton", help="(default: triton)")
    p.add_argument("--backend", choices=sorted(set(LIBRARIES.values())), help="(default: what is installed)")
    arch = "TensorRT-RTX: compute capabilities, as 8.9,12.0"
    p.add_argument("--arch", default="", metavar="LIST", help=arch)
    p.add_argument("--max-frames", type=int, metavar="N", help="with free frames (default: --frames)")
    p.add_argument("--max-size", metavar="HxW", help="with free sizes (default: --size)")
    p.add_argument("--max-objects", type=int, metavar="N", help="vos, pet (default: 32)")
    p.add_argument("--level", type=int, choices=LEVELS, metavar="0-5", help="of the builder's optimisation")
    p.add_argument("--workspace", type=positive, metavar="GIB", help="most scratch memory of a layer")
    p.add_argument("--timing-cache", type=Path, metavar="FILE", help="TensorRT: read if there, and written")
    timeout = f"of a graph (default: {tensorrt.TIMEOUT:.0f})"
    p.add_argument("--timeout", type=positive, default=tensorrt.TIMEOUT, metavar="S", help=timeout)
    p.add_argument("--dry-run", action="store_true", help="parse only; nothing is written")
    return p


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Build as asked; returns the summary that goes to stdout."""
    start = time.perf_counter()
    library = tensorrt.installed(args.backend)
    onnx.require_packages()
    capabilities = parse_architectures(args.arch)
    if args.onnx is None:
        if args.task is None:
            raise InputError("give --task, or --onnx with a folder that export.to_onnx has made")
        for name, default in folders.DEFAULTS.items():
            setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
    if args.out is None and not args.dry_run:
        args.out = default_out(args, LIBRARIES[library])
    runs_on = target(LIBRARIES[library], capabilities, dry=args.dry_run)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        try:
            if args.dry_run:
                task, built = build(args, library, capabilities, work, None)
            else:
                with whole_folder(args.out, overwrite=args.overwrite) as folder:
                    task, built = build(args, library, capabilities, work, folder, runs_on)
        except InputError:
            if not args.dry_run and (work / LOG).is_file():
                names = (f"{args.out.name}{number}.log" for number in chain(("",), count(2)))
                kept = next(path for name in names if not os.path.lexists(path := args.out.with_name(name)))
                with whole_file(kept) as file:
                    file.write((work / LOG).read_bytes())
                cli.say(f"log: {kept}")
            raise
    return {
        "out": None if args.dry_run else str(args.out),
        "task": task,
        "backend": LIBRARIES[library],
        "plugin": args.plugin,
        "graphs": built,
        "seconds": round(time.perf_counter() - start, 1),
    }


def default_out(args: argparse.Namespace, backend: str) -> Path:
    """The folder where --out names none; see `export.folder.default_out`."""
    if args.onnx is None:
        return folders.default_out(args, backend)
    return cli.free_folder(f"{args.onnx.absolute().name}-{backend}", overwrite=args.overwrite)


def target(backend: str, capabilities: str, *, dry: bool) -> str:
    """What engines will run on, in the manifest's words.

    Raises:
        InputError: TensorRT builds for the GPU it finds: another one is asked for, or PyTorch finds none.
    """
    if backend != "tensorrt":
        return capabilities or PORTABLE
    if capabilities:
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
    args: argparse.Namespace,
    library: str,
    capabilities: str,
    work: Path,
    folder: Path | None,
    runs_on: str = "",
) -> tuple[str, dict[str, Any]]:
    """Engines of all graphs in `folder` (None: parse only), with queries, log and manifest.

    Returns:
        The task, and what is worth knowing of each engine.
    """
    if args.onnx is None:
        source = work / "onnx"
        source.mkdir()
        manifest = folders.from_weights(args, to_onnx.export, source)
    else:
        source, manifest = args.onnx, read_manifest(args.onnx)
    if manifest.backend != "onnx":
        raise InputError(f"{source}: holds graphs for {manifest.backend}, not ONNX graphs to build from")
    if args.onnx is not None:
        require_agreement(args, manifest)
    require_free(args, manifest)
    size = None if args.max_size is None else parse_size(args.max_size)
    objects = 32 if args.max_objects is None else args.max_objects
    ranges = tensorrt.profile(manifest, frames=args.max_frames, size=size, objects=objects)
    given = {
        "--library": library,
        "--plugin": args.plugin,
        "--capabilities": capabilities or None,
        "--level": args.level,
        "--workspace": args.workspace,
        "--timing-cache": args.timing_cache and args.timing_cache.absolute(),
    }
    options = [part for name, x in given.items() if x is not None for part in (name, str(x))]
    log = work / LOG
    built = tensorrt.write(source, manifest, folder, options, ranges, log, args.timeout)
    if folder is not None:
        shutil.copyfile(source / QUERIES, folder / QUERIES)
        files = {path.name: digest_of_file(path) for path in sorted(folder.iterdir())}
        shutil.copy(log, folder)
        versions = {LIBRARIES[library]: next(iter(built.values()))["version"]}
        engines = dataclasses.replace(
            manifest,
            graphs={name: f"{name}.engine" for name in manifest.graphs},
            files=files,
            versions=manifest.versions | versions,
            backend=LIBRARIES[library],
            target={"plugin": args.plugin, "capabilities": runs_on},
        )
        write_manifest(folder, engines)
    return manifest.task, built


def require_agreement(args: argparse.Namespace, manifest: Manifest) -> None:
    """Raise InputError where options of the export say something else than the graphs of --onnx are."""
    for name in ("weights", "config"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name}: with --onnx nothing is exported; drop one of the two")
    made = {
        "task": manifest.task,
        "dataset": manifest.class_set,
        "size": "{}x{}".format(*manifest.size),
        "frames": manifest.frames,
        "precision": manifest.precision,
        "dynamic": ",".join(manifest.dynamic),
    }
    size = args.size and "{}x{}".format(*parse_size(args.size))
    for name, of in made.items():
        asked = size if name == "size" else getattr(args, name)
        if asked not in (None, of):
            raise InputError(
                f"--{name} {asked}: the graphs in {args.onnx} are of {of or 'none'}; export again, or drop it"
            )


def require_free(args: argparse.Namespace, manifest: Manifest) -> None:
    """Raise InputError where a limit is given of what does not vary."""
    free = {*manifest.dynamic, *(() if TASKS[manifest.task].finds_classes else ("objects",))}
    for name in ("frames", "size", "objects"):
        if getattr(args, f"max_{name}") is not None and name not in free:
            how = "vos and pet alone have objects" if name == "objects" else f"export with --dynamic {name}"
            raise InputError(f"--max-{name}: nothing varies there in these graphs ({how})")


def positive(text: str) -> float:
    """An option's number over 0."""
    value = float(text)
    if not 0 < value <= MOST:
        raise argparse.ArgumentTypeError(f"expected a number over 0, up to {MOST:.0f}, got {text[:40]}")
    return value


def parse_architectures(text: str) -> str:
    """ "8.9,sm_120" -> "SM89,SM120".

    Raises:
        InputError: anything else.
    """
    names = []
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)", part.strip().lower())
        if found is None:
            raise InputError(f"--arch {part}: expected compute capabilities, as 8.9 or sm_89")
        names.append(f"SM{found[1]}{found[2]}")
    return ",".join(names)


if __name__ == "__main__":
    sys.exit(main())
