"""ONNX: graphs with the node tarvis::MSDeformAttn, run by ONNX Runtime on a CPU or an NVIDIA GPU."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from tarvis.structures import InputError

from ..graphs import Graph
from ..manifest import Manifest, difference, digest_of_weights, installed_version
from . import Written, first_line, progress, quiet

if TYPE_CHECKING:
    from onnx import ModelProto

OPSETS = {"fp32": 18, "fp16": 18, "bf16": 22}
"""By precision. 18: the oldest that works; 22: the first whose Conv takes bf16."""

NEEDED = ("onnx", "onnxscript")
CPU = "CPUExecutionProvider"

ELEMENTS = {torch.float32: 1, torch.uint8: 2, torch.bool: 9, torch.float16: 10, torch.bfloat16: 16}
"""ONNX's numbers of types."""

VISIBLE = "GreaterOrEqual"
"""The node that makes attention bits in `export.forms`; a decoder has no other of its kind."""


def write(parts: Mapping[str, Graph], folder: Path, precision: str) -> Written:
    """Write NAME.onnx of every graph, its weights in a file of their own beside it."""
    require_packages()
    for name in progress(parts, "onnx"):
        write_graph(parts[name], folder / f"{name}.onnx", OPSETS[precision])
    return Written({name: f"{name}.onnx" for name in parts}, versions())


def versions() -> dict[str, str]:
    """Of the packages that a graph depends on, besides ours and torch."""
    return {name: installed_version(name) for name in NEEDED}


def open(folder: Path, manifest: Manifest, device: torch.device) -> dict[str, OrtGraph]:
    """A session for every graph of a folder.

    Raises:
        InputError: ONNX Runtime is not installed, or cannot run these graphs on that device.
    """
    if find_spec("onnxruntime") is None:
        raise InputError("onnxruntime is not installed: pip install 'tarvis[export]', or onnxruntime-gpu")
    import onnxruntime as ort

    if f"{device.type.upper()}ExecutionProvider" not in ort.get_available_providers():
        raise InputError(f"this ONNX Runtime cannot use {device}: install onnxruntime-gpu in its place")
    free = bool(manifest.dynamic)
    return {name: OrtGraph(folder / file, device, any_shape=free) for name, file in manifest.graphs.items()}


def write_graph(graph: Graph, path: Path, opset: int) -> None:
    """Trace, translate, check and write one graph, its weights in a file of their own beside it."""
    import onnx

    from .. import functions

    with quiet():
        program = torch.onnx.export(
            graph.trace(),
            dynamo=True,
            opset_version=opset,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            custom_translation_table={torch.ops.tarvis.ms_deform_attn.default: functions.translation(opset)},
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
    graph = model.graph
    named = (*graph.node, *graph.value_info, *graph.input, *graph.output)
    for entry in (model, graph, *named, *graph.initializer):
        del entry.metadata_props[:]
    for entry in named:
        entry.doc_string = ""


def require_packages() -> None:
    """Raise InputError where the extra is not installed."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise InputError(f"{' and '.join(missing)} not installed: pip install 'tarvis[export]'")


class OrtGraph:
    """One graph in a session. Tensors go in by name and come out by name, on the session's device.

    `any_shape`: shapes change from call to call, so that nothing is tried out for each.
    """

    def __init__(self, path: Path, device: torch.device, *, any_shape: bool = False) -> None:
        self.path, self.device = path, device
        # of its own: ONNX Runtime takes torch's usual one, whose number is 0, for none
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        try:
            self.session = _session(path, _providers(device, self.stream, any_shape=any_shape))
        except Exception as error:  # its own classes differ between versions
            said = first_line(error)
            raise InputError(f"{path}: ONNX Runtime cannot run it on {device}: {said}") from None
        if self.stream is not None and "CUDAExecutionProvider" not in self.session.get_providers():
            raise InputError(f"{path}: ONNX Runtime cannot load its CUDA libraries: see its warnings above")
        self.outputs = [output.name for output in self.session.get_outputs()]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = {name: value.detach().to(self.device).contiguous() for name, value in inputs.items()}
        if self.stream is None:
            arrays = {name: value.numpy() for name, value in tensors.items()}
            with _ran():
                values = self.session.run(self.outputs, arrays)
            return dict(zip(self.outputs, map(torch.from_numpy, values), strict=True))
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)  # also before it uses the memory of outputs that were dropped
        found = self.run_in_place(tensors)
        current.wait_stream(self.stream)
        for value in tensors.values():
            value.record_stream(self.stream)
        return found

    def run_in_place(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs and outputs stay where they are; on a GPU the work is queued, and nothing waits for it."""
        import onnxruntime as ort

        binding = self.session.io_binding()
        place = self.device.type, self.device.index or 0
        for name, value in tensors.items():
            binding.bind_input(name, *place, ELEMENTS[value.dtype], tuple(value.shape), value.data_ptr())
        for name in self.outputs:
            binding.bind_output(name, *place)
        options = ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        with _ran():
            self.session.run_with_iobinding(binding, options)
        # older versions have DLPack only in the object behind
        values = [v if hasattr(v, "__dlpack__") else v._ortvalue for v in binding.get_outputs()]
        return dict(zip(self.outputs, map(from_dlpack, values), strict=True))

    def differences(self, graph: Graph, manifest: Manifest) -> Iterator[tuple[str, float, str]]:
        """What is not as `graph` is written here: of which the largest difference, and which, for each kind.

        Tensors are the same bit for bit. Nodes are, too, where the same versions have written them; other
        versions may name and order them differently.
        """
        import onnx

        here = {"torch": torch.__version__} | versions()
        is_same = here.items() <= manifest.versions.items()
        with tempfile.TemporaryDirectory() as folder:
            again = Path(folder) / self.path.name
            write_graph(graph, again, OPSETS[manifest.precision])
            models = [onnx.load(path) for path in (again, self.path)]
        expected, got = (_tensors(model, by_name=is_same) for model in models)
        yield "tensors", *difference(expected, got)
        if is_same:
            for model in models:
                del model.graph.initializer[:]
            ours, theirs = (model.SerializeToString(deterministic=True) for model in models)
            yield "nodes", *((0.0, "") if ours == theirs else (math.inf, "not the network's"))

    def attention_bits(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Which keys each query sees in every layer of a decoder graph, bool [B, Q, N], for `export.check`.

        On the device that runs the graph: another one turns other bits.
        """
        import onnx

        model = onnx.load(self.path)
        names = [node.output[0] for node in model.graph.node if node.op_type == VISIBLE]
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        session = _session(model.SerializeToString(), _providers(self.device))
        arrays = {name: value.cpu().contiguous().numpy() for name, value in inputs.items()}
        with _ran():
            return [torch.from_numpy(visible) for visible in session.run(names, arrays)]


def _tensors(model: ModelProto, *, by_name: bool) -> dict[str, Tensor]:
    """The tensors that a graph holds, by name, or by content where a name does not come from the weights."""
    from onnx import numpy_helper

    found = {}
    for entry in model.graph.initializer:
        array = numpy_helper.to_array(entry).copy()
        if entry.data_type == ELEMENTS[torch.bfloat16]:  # which NumPy does not have
            value = torch.from_numpy(array.view("int16")).view(torch.bfloat16)
        else:
            value = torch.from_numpy(array)
        named = by_name or entry.name.startswith("model.")
        found[entry.name if named else digest_of_weights({"": value})] = value
    return found


@contextmanager
def _ran() -> Iterator[None]:
    """Raises RuntimeError for what a session raises while it runs: classes of its own."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"ONNX Runtime: {first_line(error)}") from error


def _session(model: Path | bytes, providers: list[Any]) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3 if providers == [CPU] else 2
    options.intra_op_num_threads = torch.get_num_threads()
    return ort.InferenceSession(model, options, providers=providers)


def _providers(
    device: torch.device, stream: torch.cuda.Stream | None = None, *, any_shape: bool = False
) -> list[Any]:
    if device.type != "cuda":
        return [CPU]
    options = {
        "device_id": device.index or 0,
        "use_tf32": "0",  # what is float32 in a graph is meant so
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles what a clip takes
        "cudnn_conv_algo_search": "HEURISTIC" if any_shape else "EXHAUSTIVE",
    }
    if stream is not None:
        options["user_compute_stream"] = str(stream.cuda_stream)
    return [("CUDAExecutionProvider", options)]
