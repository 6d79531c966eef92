"""From weights to a folder of graphs, whatever the runtime.

A runtime's `write` turns graphs into files. The rest is the same for all: options, the parts of a task, the
queries' constants (what does not depend on the video), and the manifest.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from export.graphs import OBJECTS, Graph, graphs, in_precision
from export.manifest import (
    DTYPES,
    FORMAT,
    Free,
    Manifest,
    digest_of_weights,
    installed_version,
    parse_size,
    write_manifest,
)
from export.runtimes import Written
from tarvis import cli
from tarvis.api import Model
from tarvis.config import ModelConfig
from tarvis.files.outputs import digest_of_file, whole_folder
from tarvis.model import TarVis
from tarvis.model.weights import BUNDLED, load_weights, network_with, read_config
from tarvis.structures import Geometry, InputError, Size
from tarvis.tasks import TASKS

QUERIES = "queries.safetensors"
SMALLER = "out of memory: try a smaller --size or --frames"


@dataclass(frozen=True)
class Request:
    """What graphs are wanted.

    `size` is (H, W) of the frames before padding, `frames` the length of a clip, `dynamic` names what may
    differ from the two. `dataset` is whose classes VIS and VPS look for; None: as `tarvis.api.Model.classes`
    chooses.

    Raises:
        InputError: an unknown task or precision, or no frames.
    """

    task: str
    size: Size
    frames: int = 12
    dataset: str | None = None
    precision: str = "fp32"
    dynamic: tuple[Free, ...] = ()

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise InputError(f"unknown task {self.task!r}; known: {', '.join(TASKS)}")
        if self.precision not in DTYPES:
            raise InputError(f"unknown precision {self.precision!r}; known: {', '.join(DTYPES)}")
        if self.frames < 1:
            raise InputError(f"a clip has at least one frame, got {self.frames}")


Writer = Callable[[Mapping[str, Graph], Path], Written]
"""A runtime's `write`: the files of these graphs, in a folder."""

Maker = Callable[[TarVis, ModelConfig, Path, Request], Manifest]
"""Writes the graphs of one task into an empty folder."""


DEFAULTS = {"weights": BUNDLED, "frames": 12, "precision": "fp32", "dynamic": ""}
"""Of the options of `parser`."""


def parser(name: str, doc: str | None, *, required: bool = True) -> argparse.ArgumentParser:
    """The options of everything that starts from weights; whether the essential ones are `required`."""
    p = cli.command(name, doc)
    p.add_argument("--weights", type=Path, help=cli.WEIGHTS)
    cli.add_reading(p)
    p.add_argument("--task", required=required, help=", ".join(TASKS))
    p.add_argument("--dataset", metavar="NAME", help="vis, vps: whose classes are looked for")
    p.add_argument("--size", required=required, metavar="HxW", help="of the frames, as 480x864")
    p.add_argument("--frames", type=int, metavar="N", help="of a clip (default: 12)")
    p.add_argument("--precision", choices=DTYPES, help="(default: fp32)")
    p.add_argument("--dynamic", metavar="WHAT", help="what may vary: frames, or frames,size")
    p.add_argument("--out", required=required, type=Path, help="folder to make; refused if it is not empty")
    p.add_argument("--overwrite", action="store_true", help="replace OUT, at the end, if it is all ours")
    p.set_defaults(**DEFAULTS)
    return p


def command(
    p: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], dict[str, Any]],
    argv: Sequence[str] | None,
) -> int:
    """`tarvis.cli.run` for the commands that export."""
    args = p.parse_args(argv)
    return cli.run(lambda: run(args), memory=SMALLER)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory is used up, of a GPU or of this machine."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def run(args: argparse.Namespace, make: Maker) -> dict[str, Any]:
    """Make the folder that the options of `parser` ask for; returns the summary that goes to stdout."""
    start = time.perf_counter()
    with whole_folder(args.out, overwrite=args.overwrite) as folder:
        manifest = from_weights(args, make, folder)
    return {
        "out": str(args.out),
        "task": manifest.task,
        "class_set": manifest.class_set,
        "backend": manifest.backend,
        "graphs": list(manifest.graphs),
        "seconds": round(time.perf_counter() - start, 1),
    }


def from_weights(args: argparse.Namespace, make: Maker, folder: Path) -> Manifest:
    """Load the weights that the options of `parser` name, and fill an empty folder."""
    size, dynamic = parse_size(args.size), parse_dynamic(args.dynamic)
    request = Request(args.task, size, args.frames, args.dataset, args.precision, dynamic)
    model, config = load(args.weights, args.config, trust=args.trust)
    return make(model, config, folder, request)


def load(weights: Path, config: Path | None, *, trust: bool) -> tuple[TarVis, ModelConfig]:
    """The network of a weights file, whose configuration may lie elsewhere than beside it."""
    given = None if config is None else read_config(config)
    state, known = load_weights(weights, config=given, trust=trust)
    return network_with(state, known), known


def fill(
    model: TarVis,
    config: ModelConfig,
    folder: Path,
    request: Request,
    runtime: str,
    write: Writer,
    *,
    device: str | torch.device = "cpu",
    plain: bool = True,
) -> Manifest:
    """Write the graphs of one task, and all that belongs to them, into an empty folder.

    Args:
        runtime: the manifest's `backend`.
        write: of the runtime.
        device: where graphs are traced.
        plain: whether attention has the forms of `export.forms`, or our kernels.

    Raises:
        InputError: classes that the weights do not have, or what `write` says.
    """
    classes = Model(model, config, device="cpu").classes([request.task], request.dataset)
    class_set = None if classes is None else classes.name
    parts, constants, groups = divide(model, class_set, request, device=device, plain=plain)
    written = write(parts, folder)
    (folder / QUERIES).write_bytes(save(constants))  # `save_file` gives files to their owner alone
    manifest = Manifest(
        format=FORMAT,
        task=request.task,
        class_set=class_set,
        size=request.size,
        frames=request.frames,
        dynamic=request.dynamic,
        precision=request.precision,  # type: ignore[arg-type]  # one of DTYPES
        groups=groups,
        model=config,
        weights=digest_of_weights(model.state_dict()),
        graphs=written.graphs,
        files={path.name: digest_of_file(path) for path in sorted(folder.iterdir())},
        versions={"tarvis": installed_version("tarvis"), "torch": torch.__version__, **written.versions},
        backend=runtime,
        target=written.target,
    )
    write_manifest(folder, manifest)
    return manifest


def divide(
    model: TarVis,
    class_set: str | None,
    made: Request | Manifest,
    *,
    device: str | torch.device = "cpu",
    plain: bool = True,
) -> tuple[dict[str, Graph], dict[str, Tensor], dict[str, int]]:
    """The parts of a network that become graphs, the constants of its queries, and their groups."""
    model = in_precision(model, DTYPES[made.precision], plain=plain)
    constants, groups = query_constants(model, class_set)
    parts = graphs(
        model.to(device),
        groups=groups,
        size=Geometry(made.size, made.size).padded,
        frames=made.frames,
        dynamic=made.dynamic,
        points=TASKS[made.task].takes_points,
    )
    return parts, constants, groups


def query_constants(model: TarVis, class_set: str | None) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What of the queries does not depend on the video, and the query groups.

    For classes `content` and `position` [1, Q, C]; for given objects their `position`s alone, [1, C] each.
    """
    if class_set is not None:
        queries = model.queries.classes(class_set)
        constants, groups = {"content": queries.content, "position": queries.position}, queries.groups
    else:
        constants = {"background_vos": model.queries.background_vos[:1], "vos": model.queries.vos}
        groups = {"background_vos": math.prod(model.object_encoder.background_grid), OBJECTS: 1}
    return {name: value.detach().clone().contiguous() for name, value in constants.items()}, groups


def parse_dynamic(text: str) -> tuple[Free, ...]:
    """What may vary: nothing, "frames", or "frames,size".

    Raises:
        InputError: anything else.
    """
    free: dict[str, tuple[Free, ...]] = {"": (), "frames": ("frames",), "frames,size": ("frames", "size")}
    if text not in free:
        raise InputError(f"--dynamic {text}: expected frames, or frames,size")
    return free[text]
