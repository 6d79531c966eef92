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
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from export import folder
from export.folder import Format, Request, installed_version
from export.graphs import Graph
from export.manifest import Manifest
from tarvis.config import ModelConfig
from tarvis.model import TarVis
from tarvis.structures import InputError

if TYPE_CHECKING:
    from onnx import ModelProto

OPSETS = {
    "fp32": 18,
    "fp16": 18,
    "bf16": 22,
}  # 18: the oldest that works; 22: the first whose Conv takes bf16
NEEDED = ("onnx", "onnxscript")


def main(argv: Sequence[str] | None = None) -> int:
    return folder.command(parser(), run, argv)


def parser() -> argparse.ArgumentParser:
    return folder.parser("python -m export.to_onnx", __doc__)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Export as told; returns the summary that goes to stdout."""
    require_packages()
    return folder.run(args, export)


def export(model: TarVis, config: ModelConfig, out: Path, request: Request) -> Manifest:
    """Write the graphs of one task into an empty folder.

    Raises:
        InputError: onnx is not installed, or classes that the weights do not have.
    """
    require_packages()
    opset = OPSETS[request.precision]
    versions = {name: installed_version(name) for name in NEEDED}
    form = Format("onnx", ".onnx", lambda graph, path: write_graph(graph, path, opset), versions)
    return folder.fill(model, config, out, request, form)


def write_graph(graph: Graph, path: Path, opset: int) -> None:
    """Trace, translate, check and write one graph, its weights in a file of their own beside it."""
    import onnx

    from export import functions

    with folder.quiet():
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


def require_packages() -> None:
    """Raise InputError where the extra is not installed."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise InputError(f"{' and '.join(missing)} not installed: pip install 'tarvis[export]'")


if __name__ == "__main__":
    sys.exit(main())
