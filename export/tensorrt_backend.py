"""TensorRT and TensorRT-RTX: the engines of `export.trt`, on torch's memory and streams.

An engine runs on a stream of its own, which waits for torch's and is waited for, on the device. The first
call of a set of input shapes runs as it is (Triton compiles the kernel then), the second is recorded as a
CUDA graph, and those after replay it: no Python runs between kernels, and nothing waits for the device.

Not run yet on a GPU: see export/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.manifest import PORTABLE, Manifest
from export.trt_library import installed, load
from tarvis.structures import InputError

MOST_RECORDED = 8
"""Sets of shapes that are recorded; each keeps its inputs and outputs. What comes after runs unrecorded."""

Shape = tuple[int, ...]


class TensorRTGraph:
    """One engine. Tensors go in by name and come out by name, as copies of their own."""

    def __init__(self, trt: Any, runtime: Any, path: Path, device: torch.device) -> None:
        self.name, self.device = path.stem, device
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        context = None if engine is None else engine.create_execution_context()
        if context is None:
            gpu = torch.cuda.get_device_name(device)
            raise InputError(
                f"{path}: {trt.__name__} {trt.__version__} cannot open it on {gpu}: build it again on this "
                "machine (python -m export.trt), or for its GPU (--arch)"
            )
        self.engine, self.context = engine, context
        kinds = torch_types(trt)
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.types = {name: kinds[engine.get_tensor_dtype(name)] for name in names}
        self.inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in self.inputs]
        self.bounds = {name: engine.get_tensor_profile_shape(name, 0) for name in self.inputs}
        self.stream = torch.cuda.Stream(device)
        self.seen: set[tuple[Shape, ...]] = set()
        self.recorded: dict[tuple[Shape, ...], Recording] = {}

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = {n: inputs[n].detach().to(self.device, self.types[n]).contiguous() for n in self.inputs}
        key = tuple(tuple(value.shape) for value in tensors.values())
        for name, shape in zip(tensors, key, strict=True):
            require_within(self.name, name, shape, *self.bounds[name][::2])
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.device(self.device):
            if key not in self.recorded and self._may_record(key):
                self.recorded[key] = Recording(self, tensors)
            if key in self.recorded:
                return self.recorded[key](tensors)
            self.seen.add(key)
            found = self.bind(tensors)
            self.stream.wait_stream(current)
            self.execute()
            current.wait_stream(self.stream)
        for value in (*tensors.values(), *found.values()):
            value.record_stream(self.stream)
        return found

    def bind(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tell the context where inputs are; returns the outputs, empty yet, that it will write."""
        for name, value in tensors.items():
            if not self.context.set_input_shape(name, tuple(value.shape)):
                raise InputError(f"{self.name}: the engine does not take {name} of {list(value.shape)}")
            self.context.set_tensor_address(name, value.data_ptr())
        if unknown := self.context.infer_shapes():
            raise RuntimeError(f"{self.name}: shapes of {unknown} are not known")
        shapes = {name: tuple(self.context.get_tensor_shape(name)) for name in self.outputs}
        found = {
            name: torch.empty(shape, dtype=self.types[name], device=self.device)
            for name, shape in shapes.items()
        }
        for name, value in found.items():
            self.context.set_tensor_address(name, value.data_ptr())
        return found

    def execute(self) -> None:
        """Queue the engine on its stream."""
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise RuntimeError(f"{self.name}: TensorRT could not run the engine; its log says why")

    def _may_record(self, key: tuple[Shape, ...]) -> bool:
        if key not in self.seen or len(self.recorded) >= MOST_RECORDED:
            return False
        capturable = getattr(self.context, "is_stream_capturable", None)  # TensorRT-RTX has it
        return capturable is None or bool(capturable(self.stream.cuda_stream))


class Recording:
    """An engine's work for one set of shapes, as a CUDA graph over tensors that stay where they are."""

    def __init__(self, graph: TensorRTGraph, tensors: Mapping[str, Tensor]) -> None:
        with torch.inference_mode(False):  # so that they can be written to in that mode and outside
            self.inputs = {
                name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name, x in tensors.items()
            }
            self.outputs = graph.bind(self.inputs)
        for name, value in tensors.items():
            self.inputs[name].copy_(value)
        self.replay = torch.cuda.CUDAGraph()
        graph.stream.wait_stream(torch.cuda.current_stream(graph.device))
        graph.execute()  # what TensorRT does once for new shapes cannot be recorded
        # other threads (that decode video, say) may use the device meanwhile
        with torch.cuda.graph(self.replay, stream=graph.stream, capture_error_mode="thread_local"):
            graph.execute()

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, value in tensors.items():
            self.inputs[name].copy_(value)
        self.replay.replay()
        return {name: value.clone() for name, value in self.outputs.items()}


def open_graphs(folder: Path, manifest: Manifest, device: torch.device) -> dict[str, TensorRTGraph]:
    """Every engine of a folder.

    Raises:
        InputError: no GPU, another TensorRT than the engines were built by, or it cannot open them.
    """
    module = installed(manifest.backend)
    if device.type != "cuda":
        raise InputError(f"{folder}: engines of {manifest.backend} run on an NVIDIA GPU, not on {device}")
    trt = load(module)
    require_target(folder, manifest, trt.__version__, torch.cuda.get_device_capability(device))
    if manifest.target.get("plugin") == "triton":
        from export.plugins import msda
        from kernels.dispatch import triton_missing

        if missing := triton_missing(str(device)):
            raise InputError(f"{folder}: needs Triton ({missing}); build with --plugin none to do without")
        msda.register(trt)
    with torch.cuda.device(device):
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        return {
            name: TensorRTGraph(trt, runtime, folder / file, device) for name, file in manifest.graphs.items()
        }


def require_target(folder: Path, manifest: Manifest, version: str, capability: tuple[int, int]) -> None:
    """Raise InputError unless the engines were built by that TensorRT, and for that GPU."""
    made = manifest.versions.get(manifest.backend)
    if made != version:
        raise InputError(
            f"{folder}: built by {manifest.backend} {made}, here is {version}: build the engines again with "
            "python -m export.trt"
        )
    major, minor = capability
    built_for = manifest.target.get("capabilities", PORTABLE)
    if built_for != PORTABLE and f"SM{major}{minor}" not in built_for.split(","):
        how = "on this machine" if manifest.backend == "tensorrt" else f"with --arch {major}.{minor}"
        raise InputError(
            f"{folder}: built for {built_for}, this GPU is SM{major}{minor}: build the engines again {how} "
            "(python -m export.trt)"
        )


def require_within(graph: str, name: str, shape: Shape, least: Shape, most: Shape) -> None:
    """Raise InputError unless a shape is in the engine's profile."""
    if len(shape) != len(most) or not all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True)):
        raise InputError(
            f"the engine's {graph} takes {name} of {list(least)} to {list(most)}, not {list(shape)}: build "
            "it with greater --max-objects, --max-frames or --max-size"
        )


def torch_types(trt: Any) -> dict[Any, torch.dtype]:
    """TensorRT's types in torch's words."""
    names = {
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "int64": torch.int64,
        "int32": torch.int32,
        "uint8": torch.uint8,
        "bool": torch.bool,
    }
    return {getattr(trt, name): dtype for name, dtype in names.items()}
