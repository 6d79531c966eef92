"""TensorRT and TensorRT-RTX: engines of ONNX graphs, run on torch's memory and streams.

Every engine is built in a process of its own (`export.runtimes.tensorrt_build`): TensorRT may abort it, a
build that takes too long can be ended, and TensorRT-RTX needs a path of libraries that is read at the start.

An engine runs on a stream of its own, which waits for torch's and is waited for, on the device. The first
call of a set of input shapes runs as it is (Triton compiles the kernel then), the second is recorded as a
CUDA graph, and those after replay it: no Python runs between kernels, and nothing waits for the device. What
cannot be recorded runs as it is, after a warning.

Not run yet on a GPU: see export/README.md.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tarvis.operators import dispatch
from tarvis.places import ROOT
from tarvis.structures import STRIDE, Geometry, InputError, Size
from tarvis.tasks import TASKS

from ..graphs import ENCODED, OBJECTS
from ..manifest import PORTABLE, Manifest
from . import HOME, RefusalError, first_line, progress, tensorrt_build
from .tensorrt_build import INSTALL, LIBRARIES

MOST_RECORDED = 8
"""Sets of shapes that are recorded; each keeps its inputs and outputs. What comes after runs unrecorded."""

Shape = tuple[int, ...]
TYPES = ("float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")

LINK, LINKED = "libtensorrt_rtx.so", "libtensorrt_rtx.so.1"
Range = tuple[int, int, int]
"""Least, usual and greatest size of a dimension."""

Ranges = dict[str, dict[int, Range]]
"""Of the dimensions that may vary, by input and number."""

TIMEOUT = 7200.0
"""Seconds that the build of one graph may take."""


def write(
    source: Path,
    manifest: Manifest,
    folder: Path | None,
    options: Sequence[str],
    ranges: Mapping[str, Ranges],
    log: Path,
    timeout: float,
) -> dict[str, dict[str, Any]]:
    """Build NAME.engine of the ONNX graphs in `source`, into `folder` (None: only parse them).

    `options` are those of `export.runtimes.tensorrt_build`, the same for all graphs; `ranges` are those of
    `profile`, by graph. What TensorRT says is added to `log`. One graph may take `timeout` seconds. Returns
    what is worth knowing of each engine, by graph.

    Raises:
        InputError: a build failed, was aborted or killed, or took too long.
    """
    about = {}
    with tempfile.TemporaryDirectory() as linked:
        variables = environment(Path(linked))
        for name in progress(manifest.graphs, f"{manifest.task} by TensorRT"):
            graph = str(source.absolute() / manifest.graphs[name])
            argv = [graph, *options, "--ranges", json.dumps(ranges[name])]
            if folder is not None:
                argv += ["--engine", str(folder / f"{name}.engine")]
            about[name] = run_build(name, argv, variables, log, timeout)
    return about


def run_build(
    name: str, argv: list[str], variables: Mapping[str, str], log: Path, timeout: float
) -> dict[str, Any]:
    """One graph by `export.runtimes.tensorrt_build`; returns what it says of the engine."""
    command = [sys.executable, "-m", tensorrt_build.__name__, "--tied", *argv]
    with log.open("a") as file, pipe() as tied:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=variables,
                stdin=tied,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"{name}: not built in {timeout:.0f} s; see --timeout") from None
    code = done.returncode
    if code == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])  # libraries may print before
        return found
    last = (log.read_text(errors="replace").strip().splitlines() or ["(empty)"])[-1][:600]
    if code in (1, 2):  # an exception, a refusal
        raise InputError(f"{name}: {last.removeprefix('error: ')}")
    why = f"the build ended with status {code}"
    if code == -9:
        why = "the build was killed, most likely for want of memory: try a smaller --size or --frames"
    elif code < 0:
        why = f"TensorRT brought its process down ({signal.Signals(-code).name})"
    raise InputError(f"{name}: {why}; the end of its log: {last}")


@contextmanager
def pipe() -> Iterator[int]:
    """A file that has no end before the block has, or this process."""
    read, write = os.pipe()
    try:
        yield read
    finally:
        os.close(read)
        os.close(write)


def profile(
    manifest: Manifest, *, frames: int | None = None, size: Size | None = None, objects: int = 32
) -> dict[str, Ranges]:
    """Ranges of all dimensions that may be free, by graph, input and dimension (see `export.graphs`).

    Args:
        frames, size, objects: the most there may be; None: as many as the graphs are made for.

    Raises:
        InputError: less than the graphs are made for.
    """
    frames, size = frames or manifest.frames, size or manifest.size
    if frames < manifest.frames or objects < 1 or size[0] < manifest.size[0] or size[1] < manifest.size[1]:
        raise InputError("--max-frames and --max-size cannot be less than --frames and --size, or no objects")
    most_padded = Geometry(size, size).padded
    T, shown = (1, manifest.frames, frames), (1, 1, frames)  # `shown`: frames that show what is followed
    N = (1, min(4, objects), objects)

    def at(stride: int, first: int) -> dict[int, Range]:
        """Rows and columns of a map."""
        return {
            first + i: (STRIDE // stride, usual // stride, most // stride)
            for i, (usual, most) in enumerate(zip(manifest.padded, most_padded, strict=True))
        }

    others = sum(count for name, count in manifest.groups.items() if name != OBJECTS)
    parts = 2 * manifest.model.num_queries_per_object  # at inference
    # an object given by a point is one query, by a mask it is several; there may be as many of both
    points = objects if TASKS[manifest.task].takes_points else 0
    queries = (others + 1, others + parts * N[1], others + parts * objects + points)
    maps = zip(ENCODED, (32, 16, 8, 4), strict=True)
    decoder = {name: {1: T} | at(stride, 3) for name, stride in maps}
    object_encoder = {"mask_features": {0: shown} | at(4, 2), "masks": {0: N, 1: shown} | at(1, 2)}
    names = ("masks_exist", "point_features", "point_positions", "points_exist")
    return {
        "encoder": {"frames": {1: T} | at(1, 3)},
        "decoder": decoder | {name: {1: queries} for name in ("content", "position")},
        "object_encoder": object_encoder | {name: {0: N} for name in names},
    }


def open(folder: Path, manifest: Manifest, device: torch.device) -> dict[str, TensorRTGraph]:
    """Every engine of a folder.

    Raises:
        InputError: no GPU, another TensorRT than the engines were built by, or it cannot open them.
    """
    module = installed(manifest.backend)
    if device.type != "cuda":
        raise InputError(f"{folder}: engines of {manifest.backend} run on an NVIDIA GPU, not on {device}")
    try:
        trt = tensorrt_build.load(module)
    except RefusalError as error:
        raise InputError(str(error)) from None
    require_target(folder, manifest, trt.__version__, torch.cuda.get_device_capability(device))
    if manifest.target.get("plugin") == "triton":
        from ..plugins import msda

        if missing := dispatch.triton_missing(str(device)):
            raise InputError(f"{folder}: needs Triton ({missing}); build with --plugin none to do without")
        msda.register(trt)
    with torch.cuda.device(device):
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        return {
            name: TensorRTGraph(trt, runtime, folder / file, device) for name, file in manifest.graphs.items()
        }


def installed(backend: str | None = None) -> str:
    """The module of the best TensorRT that is installed, or of one backend; it is not imported.

    Raises:
        InputError: there is none.
    """
    for module, name in LIBRARIES.items():
        if backend in (None, name) and find_spec(module) is not None:
            return module
    wanted = {None: "neither TensorRT nor TensorRT-RTX is", "tensorrt": "TensorRT is not"}
    raise InputError(f"{wanted.get(backend, 'TensorRT-RTX is not')} installed: {INSTALL}")


def environment(folder: Path) -> dict[str, str]:
    """Variables for a process that parses graphs with plugins.

    TensorRT-RTX opens libtensorrt_rtx.so when its parser meets a plugin, but its wheel (1.7.1) has that
    library as libtensorrt_rtx.so.1 alone, and the process is aborted then. A link in `folder`, on the path of
    libraries, mends it; what is installed stays as it is.

    Raises:
        InputError: the link cannot be made.
    """
    variables = dict(os.environ)
    spec = find_spec("tensorrt_rtx_libs")
    for place in map(Path, spec.submodule_search_locations or () if spec is not None else ()):
        if not (place / LINKED).is_file() or (place / LINK).exists():
            continue
        try:
            (folder / LINK).symlink_to(place / LINKED)
        except OSError as error:
            raise InputError(
                f"{folder}: a link cannot be made there ({error.strerror}), and TensorRT-RTX would abort at "
                f"the first plugin without {LINK}; make one beside {place / LINKED}"
            ) from None
        paths = (str(folder), variables.get("LD_LIBRARY_PATH", ""))
        variables["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    return variables


class TensorRTGraph:
    """One engine. Tensors go in by name and come out by name, as copies of their own."""

    def __init__(self, trt: Any, runtime: Any, path: Path, device: torch.device) -> None:
        self.name, self.device = path.stem, device
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        gpu = torch.cuda.get_device_name(device)
        if engine is None:
            raise InputError(
                f"{path}: {trt.__name__} {trt.__version__} cannot open it on {gpu}, its log says why: build "
                f"it again on this machine (python -m {HOME}.trt), where TensorRT-RTX does not run on it "
                "with --backend tensorrt"
            )
        self.engine, self.settings = engine, context_settings(trt, engine)
        size = max(engine.device_memory_size_v2, 1)
        try:
            # of all contexts, which never work at the same time
            self.scratch = torch.empty(size, dtype=torch.uint8, device=device)
            self.context = self.new_context()
        except RuntimeError as error:
            free = torch.cuda.mem_get_info(device)[0]
            raise InputError(
                f"{path}: too little memory on {gpu}, {free / 2**30:.1f} GiB are free and it computes in "
                f"{size / 2**30:.1f} GiB: free some, or build it for less ({first_line(error)})"
            ) from None
        kinds = {getattr(trt, name): getattr(torch, name) for name in TYPES}
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.types = {name: kinds[engine.get_tensor_dtype(name)] for name in names}
        self.inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in self.inputs]
        self.bounds = {name: bounds(engine, name) for name in self.inputs}
        self.stream = torch.cuda.Stream(device)
        self.seen: set[tuple[Shape, ...]] = set()
        self.recordings: dict[tuple[Shape, ...], Recording | None] = {}  # None: cannot be recorded

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = {n: inputs[n].detach().to(self.device, self.types[n]).contiguous() for n in self.inputs}
        key = tuple(tuple(value.shape) for value in tensors.values())
        for name, shape in zip(tensors, key, strict=True):
            require_within(self.name, name, shape, *self.bounds[name])
        with torch.cuda.device(self.device):
            if key in self.seen and key not in self.recordings:
                self.recordings[key] = self._record(tensors)
            self.seen.add(key)
            recording = self.recordings.get(key)
            return self._run(tensors) if recording is None else recording(tensors)

    def new_context(self) -> Any:
        """A context over the scratch memory. Every recording needs its own: a CUDA graph relies on its state.

        Raises:
            RuntimeError: TensorRT makes none, most likely for want of memory.
        """
        context = self.engine.create_execution_context(self.settings)
        if context is None:
            raise RuntimeError("TensorRT makes no execution context")
        context.set_device_memory(self.scratch.data_ptr(), self.scratch.numel())
        return context

    def bind(self, context: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tell a context where inputs are; returns the outputs, empty yet, that it will write."""
        for name, value in tensors.items():
            if not context.set_input_shape(name, tuple(value.shape)):
                raise InputError(f"{self.name}: the engine does not take {name} of {list(value.shape)}")
            context.set_tensor_address(name, value.data_ptr())
        if unknown := context.infer_shapes():
            raise RuntimeError(f"{self.name}: shapes of {unknown} are not known")
        found = {}
        for name in self.outputs:
            shape = tuple(context.get_tensor_shape(name))
            found[name] = torch.empty(shape, dtype=self.types[name], device=self.device)
            context.set_tensor_address(name, found[name].data_ptr())
        return found

    def execute(self, context: Any) -> None:
        """Queue the engine on its stream."""
        if not context.execute_async_v3(self.stream.cuda_stream):
            raise RuntimeError(f"{self.name}: TensorRT could not run the engine; its log says why")

    def _run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        current = torch.cuda.current_stream(self.device)
        found = self.bind(self.context, tensors)
        self.stream.wait_stream(current)
        self.execute(self.context)
        current.wait_stream(self.stream)
        for value in (*tensors.values(), *found.values()):
            value.record_stream(self.stream)
        return found

    def _record(self, tensors: Mapping[str, Tensor]) -> Recording | None:
        """A recording for these shapes; none, and a warning, where there cannot be one."""
        if sum(recording is not None for recording in self.recordings.values()) >= MOST_RECORDED:
            why = f"more than {MOST_RECORDED} sets of shapes"
        else:
            try:
                return Recording(self, tensors)
            except RuntimeError as error:  # of TensorRT, of CUDA, want of memory
                shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in tensors.items())
                why = f"{shapes} cannot be recorded as a CUDA graph ({first_line(error)})"
        warnings.warn(f"{self.name}: {why}: runs unrecorded, which is slower", stacklevel=2)
        return None


class Recording:
    """An engine's work for one set of shapes, as a CUDA graph over tensors that stay where they are.

    Raises:
        RuntimeError: it cannot be recorded.
    """

    def __init__(self, graph: TensorRTGraph, tensors: Mapping[str, Tensor]) -> None:
        self.device, self.stream = graph.device, graph.stream
        self.context = graph.new_context()
        with torch.inference_mode(False):  # so that they can be written to in that mode and outside
            self.inputs = {
                name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name, x in tensors.items()
            }
            self.outputs = graph.bind(self.context, self.inputs)
        capturable = getattr(self.context, "is_stream_capturable", None)  # TensorRT-RTX has it
        if capturable is not None and not capturable(self.stream.cuda_stream):
            raise RuntimeError("TensorRT-RTX does not allow it")
        for name, value in tensors.items():
            self.inputs[name].copy_(value)
        self.replay = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            graph.execute(self.context)  # what TensorRT does once for new shapes cannot be recorded
            # other threads (that decode video, say) may use the device meanwhile; a capture that fails leaves
            # its stream the current one, hence the outer `with`
            with (
                torch.cuda.stream(self.stream),
                torch.cuda.graph(self.replay, stream=self.stream, capture_error_mode="thread_local"),
            ):
                graph.execute(self.context)
        finally:
            current.wait_stream(self.stream)

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)  # scratch memory, inputs and outputs are free again
        for name, value in tensors.items():
            self.inputs[name].copy_(value)
        self.replay.replay()
        found = {name: value.clone() for name, value in self.outputs.items()}
        self.stream.wait_stream(current)
        return found


def context_settings(trt: Any, engine: Any) -> Any:
    """What contexts of an engine are made by: memory is given to them."""
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    kernels = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
    if kernels is None:
        return strategy
    # TensorRT-RTX compiles when it runs: the kernels of a shape before that is recorded (LAZY would have slow
    # ones recorded, that take any shape), and once for all contexts
    settings = engine.create_runtime_config()
    settings.set_execution_context_allocation_strategy(strategy)
    settings.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER
    settings.set_runtime_cache(settings.create_runtime_cache())
    return settings


def bounds(engine: Any, name: str) -> tuple[Shape, Shape]:
    """Least and greatest shape of an input."""
    shape = tuple(engine.get_tensor_shape(name))
    if -1 not in shape:
        return shape, shape
    least, _, most = engine.get_tensor_profile_shape(name, 0)
    return tuple(least), tuple(most)


def require_target(folder: Path, manifest: Manifest, version: str, capability: tuple[int, int]) -> None:
    """Raise InputError unless the engines were built by that TensorRT, and for that GPU."""
    made = manifest.versions.get(manifest.backend)
    if made != version:
        raise InputError(
            f"{folder}: built by {manifest.backend} {made}, here is {version}: build the engines again with "
            f"python -m {HOME}.trt"
        )
    major, minor = capability
    built_for = manifest.target.get("capabilities", PORTABLE)
    if built_for != PORTABLE and f"SM{major}{minor}" not in built_for.split(","):
        again = f"build the engines again on this machine (python -m {HOME}.trt)"
        if manifest.backend == "tensorrt_rtx":
            again = (
                f"build the engines again without --arch (python -m {HOME}.trt), and where TensorRT-RTX does "
                f"not run on such GPUs with --backend tensorrt, or packages (python -m {HOME}.aoti)"
            )
        raise InputError(f"{folder}: built for {built_for}, this GPU is SM{major}{minor}: {again}")


def require_within(graph: str, name: str, shape: Shape, least: Shape, most: Shape) -> None:
    """Raise InputError unless a shape is in the engine's profile."""
    how = "for that shape"
    if len(shape) == len(most):
        sizes = list(zip(least, shape, most, strict=True))
        if all(a <= n <= b for a, n, b in sizes):
            return
        if all(a <= n and (n <= b or a < b) for a, n, b in sizes):
            how = "with greater --max-objects, --max-frames or --max-size"
    taken = f"{list(most)}" if least == most else f"{list(least)} to {list(most)}"
    raise InputError(f"the engine's {graph} takes {name} of {taken}, not {list(shape)}: build it {how}")
