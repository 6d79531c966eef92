"""One graph into one engine, in a process of its own: TensorRT may abort it, or use up its memory.

    python -m export.trt_build JOB.json          # what export.trt starts

Standard output is for the caller, a JSON object a line: {"phase", "done", "of"} while it works, and at last
{"result"} or {"error"}. The log goes to the job's file. It does without torch, which takes longer to import
than a small engine to build.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from export.functions import DOMAIN, plugin_form, with_body
from tarvis.files.atomic import whole_file

if TYPE_CHECKING:
    from onnx import ModelProto

LIBRARIES = {
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt_rtx",
    "tensorrt_rtx_bindings": "tensorrt_rtx",
}
"""Module -> backend, in order of preference; the third is what the front package of the second brings."""

INSTALL = (
    "pip install 'tarvis[export-gpu]' for TensorRT (needs an NVIDIA GPU), or 'tarvis[export]' for "
    "TensorRT-RTX, which also builds without one"
)

Range = tuple[int, int, int]
"""Least, usual and greatest size of a dimension."""

TELL_EVERY = 1.0  # seconds

PLUGINS = ("triton", "aot", "none")

OLDEST = (10, 16)
"""(major, minor) of TensorRT; TensorRT-RTX counts for itself."""


class RefusalError(Exception):
    """What was asked for cannot be built; the caller makes an InputError of it."""


@dataclass(frozen=True)
class Job:
    """What to build.

    `profile` gives the dimensions that vary, by input and number. `engine` None: parse only. `capabilities`
    are TensorRT-RTX's names ("SM89"); none stands for its default.
    """

    library: str
    onnx: str
    engine: str | None
    log: str
    plugin: str
    profile: dict[str, dict[int, Range]]
    capabilities: Sequence[str] = ()
    level: int | None = None
    workspace: float | None = None
    timing_cache: str | None = None

    @classmethod
    def read(cls, path: Path) -> Job:
        tree = json.loads(path.read_text())
        profile = {
            name: {int(i): tuple(sizes) for i, sizes in dimensions.items()}
            for name, dimensions in tree.pop("profile").items()
        }
        return cls(**tree, profile=profile)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)))


def main(argv: Sequence[str]) -> int:
    (path,) = argv
    job = Job.read(Path(path))
    with Path(job.log).open("a", encoding="utf-8") as log:
        try:
            result = build(job, log)
        except RefusalError as error:
            tell(error=str(error))
            return 1
        except Exception as error:
            traceback.print_exc(file=log)
            tell(error=f"{type(error).__name__}: {error}")
            return 1
    tell(result=result)
    return 0


def tell(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def load(module: str) -> Any:
    """A TensorRT.

    Raises:
        RefusalError: it is installed and cannot be imported: libraries are missing.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # of the linker, of a package that is only a front, ..
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RefusalError(f"{module} is installed but cannot be imported ({reason}): {INSTALL}") from None


def build(job: Job, log: TextIO) -> dict[str, Any]:
    """Parse, build, write; returns what is worth knowing of it."""
    trt = load(job.library)
    backend = LIBRARIES[job.library]
    require_version(backend, trt.__version__)
    model = parser_form(Path(job.onnx), job.plugin)
    logger = make_logger(trt, log)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if job.plugin == "triton":
        from export.plugins import msda

        msda.register(trt)
    elif job.plugin == "aot":
        from export.plugins import aot

        flags |= aot.register(trt)
    builder = make_builder(trt, backend, logger)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        errors = [" ".join(parser.get_error(i).desc().split()) for i in range(parser.num_errors)]
        raise RefusalError(f"{backend} {trt.__version__} cannot parse it: {'; '.join(errors)[:600]}")
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    about = {
        "version": trt.__version__,
        "layers": len(kinds),
        "plugins": sum(kind == trt.LayerType.PLUGIN_V3 for kind in kinds),
        "grid_samples": sum(kind == trt.LayerType.GRID_SAMPLE for kind in kinds),
    }
    if job.engine is None:
        return about
    config = configured(trt, backend, builder, network, job, log)
    start = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RefusalError(f"{backend} {trt.__version__} cannot build it: {reason(logger.errors)}")
    Path(job.engine).write_bytes(engine)
    if job.timing_cache is not None:
        with whole_file(Path(job.timing_cache)) as file:
            file.write(config.get_timing_cache().serialize())
    return about | {
        "bytes": Path(job.engine).stat().st_size,
        "seconds": round(time.perf_counter() - start, 1),
    }


def require_version(backend: str, version: str) -> None:
    """Raise RefusalError for a TensorRT that is too old."""
    if backend == "tensorrt" and tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise RefusalError(f"tensorrt {version} is too old, {oldest} or later is needed: {INSTALL}")


def make_builder(trt: Any, backend: str, logger: Any) -> Any:
    """A builder.

    Raises:
        RefusalError: TensorRT makes none, most likely since there is no GPU.
    """
    try:
        return trt.Builder(logger)
    except Exception as error:  # TypeError: it is given a null pointer
        said = logger.errors[-1][:600] if logger.errors else str(error)
        advice = "; no usable GPU? --backend tensorrt_rtx builds without one" if backend == "tensorrt" else ""
        raise RefusalError(f"{backend} {trt.__version__} cannot start to build: {said}{advice}") from None


def reason(errors: Sequence[str]) -> str:
    """What was said last of a build that failed, and what to do where memory was short."""
    last = errors[-1][:600] if errors else "no reason given"
    is_short = any("memory" in error.lower() for error in errors)
    return f"{last} (a smaller --size, --frames or --workspace needs less memory)" if is_short else last


def parser_form(path: Path, plugin: str) -> ModelProto:
    """A graph of `export.to_onnx` as TensorRT's parser is to see it.

    Raises:
        RefusalError: the plugin cannot know the sizes of levels.
    """
    import onnx

    model = onnx.load(path)
    if plugin == "none":
        return with_body(model, "gather")
    for node in plugin_form(model).graph.node:
        if node.domain == DOMAIN:
            if not any(attribute.name == "sizes" for attribute in node.attribute):
                raise RefusalError(
                    "with frames of any size the plugin cannot know the levels' sizes: build an engine for "
                    "each size, or take --plugin none"
                )
            del node.input[4:]  # the sizes again
    return model


def configured(trt: Any, backend: str, builder: Any, network: Any, job: Job, log: TextIO) -> Any:
    """The builder's configuration."""
    config = builder.create_builder_config()
    config.progress_monitor = make_monitor(trt)
    config.clear_flag(trt.BuilderFlag.TF32)  # what is float32, in whatever precision, is so for a reason
    if backend == "tensorrt_rtx":
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # else its CUDA graphs may be refused
    if job.capabilities:
        known = [name for name in trt.ComputeCapability.__members__ if name not in ("NONE", "CURRENT")]
        if unknown := [name for name in job.capabilities if name not in known]:
            raise RefusalError(
                f"{backend} {trt.__version__} does not build for {', '.join(unknown)}; it does for "
                f"{', '.join(known)}, and without --arch for what its vendor calls portable"
            )
        config.num_compute_capabilities = len(job.capabilities)
        for i, name in enumerate(job.capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
    if job.level is not None:
        config.builder_optimization_level = job.level
    if job.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(job.workspace * 2**30))
    if job.timing_cache is not None:
        path = Path(job.timing_cache)
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if not config.set_timing_cache(cache, ignore_mismatch=False):
            raise RefusalError(f"{path}: a timing cache of another TensorRT or GPU; name another file")
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if any(-1 in tuple(x.shape) for x in inputs):
        profile = builder.create_optimization_profile()
        for x in inputs:
            shapes = profile_shapes(x.name, tuple(x.shape), job.profile)
            print(f"profile {x.name}: {shapes}", file=log)
            profile.set_shape(x.name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise RefusalError("TensorRT does not take the optimisation profile; the log says why")
    return config


def profile_shapes(
    name: str, shape: tuple[int, ...], profile: Mapping[str, Mapping[int, Range]]
) -> list[tuple[int, ...]]:
    """Least, usual and greatest shape of an input whose varying dimensions are -1."""
    ranges = [(n, n, n) if n >= 0 else profile[name][i] for i, n in enumerate(shape)]
    return [tuple(n[k] for n in ranges) for k in range(3)]


def make_logger(trt: Any, log: TextIO) -> Any:
    """Writes what TensorRT says to the log, and keeps the errors."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.INFO:
                print(f"{str(severity).rpartition('.')[2]}: {message}", file=log, flush=True)
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

    return Logger()


def make_monitor(trt: Any) -> Any:
    """Tells the caller how far a build is."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.told = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            del parent
            self.steps[name] = steps

        def step_complete(self, name: str, step: int) -> bool:
            if time.monotonic() - self.told > TELL_EVERY:
                self.told = time.monotonic()
                tell(phase=name, done=step + 1, of=self.steps.get(name, 0))
            return True

        def phase_finish(self, name: str) -> None:
            self.steps.pop(name, None)

    return Monitor()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
