"""OpenVINO: graphs in its own format, run on a CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tarvis.structures import InputError

from ..graphs import Graph
from ..manifest import Manifest, difference, installed_version
from . import Written, first_line, onnx, progress

NEEDED = ("openvino", *onnx.NEEDED)


def write(parts: Mapping[str, Graph], folder: Path) -> Written:
    """Write NAME.xml of every graph, its weights in NAME.bin."""
    require_packages()
    import openvino as ov

    for name in progress(parts, "openvino"):
        ov.save_model(converted(parts[name]), folder / f"{name}.xml", compress_to_fp16=False)
    return Written({name: f"{name}.xml" for name in parts}, versions())


def versions() -> dict[str, str]:
    """Of the packages that a graph depends on, besides ours and torch."""
    return {name: installed_version(name) for name in NEEDED}


def open(folder: Path, manifest: Manifest, device: torch.device) -> dict[str, OvGraph]:
    """Every graph of a folder, compiled for this processor.

    Raises:
        InputError: OpenVINO is not installed, or cannot run these graphs on that device.
    """
    if find_spec("openvino") is None:
        raise InputError("openvino is not installed: pip install 'tarvis[openvino]'")
    if device.type != "cpu":
        raise InputError(f"graphs for OpenVINO run on a CPU, not on {device}: give --device cpu")
    return {name: OvGraph(folder / file) for name, file in manifest.graphs.items()}


def require_packages() -> None:
    """Raise InputError where the extra is not installed."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise InputError(f"{', '.join(missing)} not installed: pip install 'tarvis[openvino]'")


@cache
def _core() -> Any:
    """The only Core of this process, which stays until its end.

    A Core gives the thread a stack for signals, and puts the former one back when it goes. Of two Cores the
    second would put back the stack of the first. Where the first has gone by then, the next signal, such as
    Ctrl-C, would crash the process.
    """
    import openvino as ov

    return ov.Core()


def converted(graph: Graph) -> Any:
    """A graph as OpenVINO's model, by way of ONNX, whose functions OpenVINO does not take."""
    from onnx import inliner, load, save

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        onnx.write_graph(graph, path, onnx.OPSETS["fp32"])
        save(inliner.inline_local_functions(load(path)), path)
        return _core().read_model(path)


class OvGraph:
    """One graph, compiled. Tensors go in by name and come out by name, on the CPU, computed in float32."""

    def __init__(self, path: Path) -> None:
        self.path = path
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        try:
            self.model = _core().compile_model(path, "CPU", options)
        except RuntimeError as error:
            raise InputError(f"{path}: OpenVINO cannot run it: {first_line(error)}") from None

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        arrays = {name: value.detach().cpu().contiguous().numpy() for name, value in inputs.items()}
        found = self.model(arrays)
        return {port.get_any_name(): torch.from_numpy(found[port]) for port in self.model.outputs}

    def differences(self, graph: Graph, manifest: Manifest) -> Iterator[tuple[str, float, str]]:
        """Which tensors are not those of `graph` as it is written here, and the largest difference.

        Only where the versions that wrote the file are here: others fold and name tensors differently.
        """
        import openvino as ov

        here = {"torch": torch.__version__} | versions()
        if here.items() <= manifest.versions.items():
            with tempfile.TemporaryDirectory() as folder:
                again = Path(folder) / self.path.name
                ov.save_model(converted(graph), again, compress_to_fp16=False)
                expected, got = (_tensors(path) for path in (again, self.path))
            yield "tensors", *difference(expected, got)


def _tensors(path: Path) -> dict[str, Tensor]:
    """The constants of a model, by their place in it."""
    nodes = _core().read_model(path).get_ordered_ops()
    constants = (node for node in nodes if node.get_type_name() == "Constant")
    return {str(k): torch.from_numpy(np.array(node.data)) for k, node in enumerate(constants)}
