"""Turn weights into ONNX graphs of one task.

    python -m export.to_onnx --weights weights.pth --task vis --size 480x864 --frames 12 --out graphs
    python -m export.to_onnx --weights weights.pth --task vos --size 480x864 --frames 12 --precision fp16 \\
        --dynamic frames --out graphs

Writes encoder.onnx, decoder.onnx and, for tasks whose objects are given, object_encoder.onnx, each with its
weights beside it, queries.safetensors and manifest.json. The graphs run in ONNX Runtime as they are, and in
TensorRT with a plugin for their nodes tarvis::MSDeformAttn. --size is that of the frames; the graphs take
them padded to multiples of 64.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from export.graphs import Graph, graphs, in_precision, num_background
from export.manifest import (
    DTYPES,
    FORMAT,
    Free,
    Manifest,
    digest_of_file,
    digest_of_weights,
    parse_size,
    write_manifest,
)
from tarvis.api import Model
from tarvis.config import ModelConfig
from tarvis.model import TarVis, build_model
from tarvis.model.weights import load_into, load_weights, read_config
from tarvis.results import staged
from tarvis.structures import InputError
from tarvis.tasks import TASKS

if TYPE_CHECKING:
    from onnx import ModelProto

OPSETS = {
    "fp32": 18,
    "fp16": 18,
    "bf16": 22,
}  # 18: the oldest that works; 22: the first whose Conv takes bf16
QUERIES = "queries.safetensors"
NEEDED = ("onnx", "onnxscript")


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        summary = run(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(summary))
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m export.to_onnx", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--weights", required=True, type=Path, help=".pth (config.yaml beside it) or .safetensors")
    p.add_argument("--config", type=Path, help="the weights' config.yaml, where it is not beside them")
    p.add_argument("--trust", action="store_true", help="allow pickled objects in the weights file")
    p.add_argument("--task", required=True, help=", ".join(TASKS))
    p.add_argument("--dataset", metavar="NAME", help="vis, vps: whose classes are looked for")
    p.add_argument("--size", required=True, metavar="HxW", help="of the frames, as 480x864")
    p.add_argument("--frames", type=int, default=12, metavar="N", help="of a clip (default: 12)")
    p.add_argument("--precision", choices=DTYPES, default="fp32")
    p.add_argument("--dynamic", default="", metavar="WHAT", help="what may vary: frames, or frames,size")
    p.add_argument("--out", required=True, type=Path, help="folder to make")
    return p


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Export as told; returns the summary that goes to stdout."""
    require_packages()
    size = parse_size(args.size)
    config = None if args.config is None else read_config(args.config)
    state, config = load_weights(args.weights, config=config, trust=args.trust)
    model = build_model(config)
    load_into(model, state)
    start = time.perf_counter()
    with staged(args.out) as folder:
        manifest = export(
            model,
            config,
            folder,
            task=args.task,
            dataset=args.dataset,
            size=size,
            frames=args.frames,
            precision=args.precision,
            dynamic=parse_dynamic(args.dynamic),
        )
    return {
        "out": str(args.out),
        "task": manifest.task,
        "class_set": manifest.class_set,
        "graphs": list(manifest.graphs),
        "seconds": round(time.perf_counter() - start, 1),
    }


def export(
    model: TarVis,
    config: ModelConfig,
    folder: Path,
    *,
    task: str,
    size: tuple[int, int],
    frames: int,
    dataset: str | None = None,
    precision: str = "fp32",
    dynamic: Sequence[Free] = (),
) -> Manifest:
    """Write the graphs of one task into an empty folder.

    Args:
        size: (H, W) of the frames before padding.
        frames: of a clip.
        dataset: whose classes VIS and VPS look for; None: as `tarvis.api.Model.classes` chooses.
        dynamic: what may differ from `size` and `frames`.

    Raises:
        InputError: an unknown task, or classes that the weights do not have.
    """
    require_packages()
    if task not in TASKS:
        raise InputError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    if frames < 1:
        raise InputError(f"a clip has at least one frame, got {frames}")
    classes = Model(model, config, device="cpu").classes([task], dataset)
    weights = digest_of_weights(model.state_dict())
    model = in_precision(model, DTYPES[precision])
    constants, groups = query_constants(model, None if classes is None else classes.name)
    manifest = Manifest(
        format=FORMAT,
        task=task,
        class_set=None if classes is None else classes.name,
        size=size,
        frames=frames,
        dynamic=tuple(dynamic),
        precision=precision,  # type: ignore[arg-type]  # one of DTYPES
        groups=groups,
        model=config,
        weights=weights,
        graphs={},
        files={},
        versions={name: _version(name) for name in ("tarvis", "torch", *NEEDED)},
    )
    parts = graphs(
        model,
        groups=groups,
        size=manifest.padded,
        frames=frames,
        dynamic=manifest.dynamic,
        points=task == "pet",
    )
    progress = tqdm(parts.items(), desc=f"{task} to ONNX", unit="graph", file=sys.stderr)
    for name, graph in progress:
        progress.set_postfix_str(name)
        write_graph(graph, folder / f"{name}.onnx", OPSETS[precision])
        manifest.graphs[name] = f"{name}.onnx"
    save_file(constants, folder / QUERIES)
    manifest.files.update({path.name: digest_of_file(path) for path in sorted(folder.iterdir())})
    write_manifest(folder, manifest)
    return manifest


def query_constants(model: TarVis, class_set: str | None) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What of the queries does not depend on the video, and the query groups.

    For classes `content` and `position` [1, Q, C]; for given objects their `position`s alone, [1, C] each.
    """
    if class_set is not None:
        queries = model.queries.classes(class_set)
        constants = {"content": queries.content, "position": queries.position}
        return {name: value.contiguous() for name, value in constants.items()}, queries.groups
    constants = {"background_vos": model.queries.background_vos[:1], "vos": model.queries.vos}
    return (
        {name: value.detach().clone() for name, value in constants.items()},
        {"background_vos": num_background(model), "vos": 1},
    )


def write_graph(graph: Graph, path: Path, opset: int) -> None:
    """Trace, translate, check and write one graph, its weights in a file of their own beside it."""
    import onnx

    from export import functions

    with quiet():
        program = torch.onnx.export(
            graph.trace(),
            dynamo=True,
            opset_version=opset,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            custom_translation_table={
                torch.ops.tarvis.ms_deform_attn.default: functions.translation(opset),
            },
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=True)
    model = onnx.load(path, load_external_data=False)
    forget_origin(functions.with_body(model))
    onnx.save(model, path)
    onnx.checker.check_model(path, full_check=True)  # infers all shapes, too


def forget_origin(model: ModelProto) -> None:
    """Drop what only says which line of Python a node comes from: most of the file."""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    for entry in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del entry.metadata_props[:]
        entry.doc_string = ""
    for entry in model.graph.initializer:
        del entry.metadata_props[:]


def parse_dynamic(text: str) -> tuple[Free, ...]:
    """What may vary: nothing, "frames", or "frames,size".

    Raises:
        InputError: anything else.
    """
    free: dict[str, tuple[Free, ...]] = {"": (), "frames": ("frames",), "frames,size": ("frames", "size")}
    if text not in free:
        raise InputError(f"--dynamic {text}: expected frames, or frames,size")
    return free[text]


def require_packages() -> None:
    """Raise InputError where the extra is not installed."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise InputError(f"{' and '.join(missing)} not installed: pip install 'tarvis[export]'")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a copy that is not installed
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
