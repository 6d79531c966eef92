"""One ONNX graph into one engine, in a process of its own: TensorRT may abort it, or use up its memory.

    python -m export.runtimes.tensorrt_build GRAPH.onnx --library tensorrt --engine GRAPH.engine

`export.runtimes.tensorrt` starts it. What is worth knowing of the engine goes to stdout as one JSON line, the
log to stderr; its last line is the reason where the exit status is not 0. It does without torch, which takes
longer to import than a small engine to build.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..functions import plugin_form, with_body
from ..plugins import DOMAIN
from . import RefusalError, first_line

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
    "TensorRT-RTX, which also builds without one; without either, export.aoti and export.to_onnx work"
)

PLUGIN_MODULES = {"triton": "..plugins.msda", "aot": "..plugins.aot"}
PLUGINS = (*PLUGIN_MODULES, "none")

LEVELS = range(6)

OLDEST = (10, 16)
"""(major, minor) of TensorRT; TensorRT-RTX counts for itself."""


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser("python -m export.runtimes.tensorrt_build", description=__doc__)
    p.add_argument("onnx", type=Path)
    p.add_argument("--engine", type=Path, help="file to write; without it the graph is only parsed")
    p.add_argument("--library", required=True, choices=LIBRARIES)
    p.add_argument("--plugin", choices=PLUGINS, default="triton")
    p.add_argument("--capabilities", default="", help="TensorRT-RTX: as SM89,SM120 (default: portable)")
    p.add_argument("--level", type=int, choices=LEVELS, help="optimisation level of the builder")
    p.add_argument("--workspace", type=float, help="most scratch memory of a layer in GiB")
    p.add_argument("--timing-cache", type=Path, help="file that is read if it exists, and written")
    ranges = "what may vary: {input: {dimension: [least, usual, most]}}"
    p.add_argument("--tied", action="store_true", help="end when standard input does")
    p.add_argument("--ranges", type=json.loads, default={}, metavar="JSON", help=ranges)
    args = p.parse_args(argv)
    if args.tied:
        threading.Thread(target=end_with_input, daemon=True).start()
    try:
        print(json.dumps(build(args)))
    except RefusalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def end_with_input() -> None:
    """End this process when the one that started it has ended, however that was."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def load(module: str) -> Any:
    """A TensorRT.

    Raises:
        RefusalError: it is installed and cannot be imported: libraries are missing.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # of the linker, of a package that is only a front, ..
        why = first_line(error)
        raise RefusalError(f"{module} is installed but cannot be imported ({why}): {INSTALL}") from None


def build(args: argparse.Namespace) -> dict[str, Any]:
    """Parse, build, write; returns what is worth knowing of the engine.

    Raises:
        RefusalError: this TensorRT cannot do it.
    """
    trt, backend = load(args.library), LIBRARIES[args.library]
    library = f"{backend} {trt.__version__}"
    if backend == "tensorrt" and tuple(map(int, trt.__version__.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise RefusalError(f"{library} is too old, {oldest} or later is needed: {INSTALL}")
    model = parser_form(args.onnx, args.plugin)
    logger = make_logger(trt)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if args.plugin != "none":
        flags |= importlib.import_module(PLUGIN_MODULES[args.plugin], __package__).register(trt)
    builder = make_builder(trt, backend, logger)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        errors = [" ".join(parser.get_error(i).desc().split()) for i in range(parser.num_errors)]
        raise RefusalError(f"{library} cannot parse it: {'; '.join(errors)[:600]}")
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    about = {
        "version": trt.__version__,
        "layers": len(kinds),
        "plugins": kinds.count(trt.LayerType.PLUGIN_V3),
        "grid_samples": kinds.count(trt.LayerType.GRID_SAMPLE),
    }
    if args.engine is None:
        return about
    config = configured(trt, builder, network, args)
    start = time.perf_counter()
    made = builder.build_serialized_network(network, config)
    if made is None:
        raise RefusalError(f"{library} cannot build it: {reason(logger.errors, args.workspace)}")
    args.engine.write_bytes(made)
    if args.timing_cache is not None:
        from tarvis.files.atomic import whole_file  # imports torch

        with whole_file(args.timing_cache) as file:
            file.write(config.get_timing_cache().serialize())
    return about | {"bytes": args.engine.stat().st_size, "seconds": round(time.perf_counter() - start, 1)}


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


def reason(errors: Sequence[str], workspace: float | None = None) -> str:
    """What was said last of a build that failed, and what to do where memory was short."""
    last = errors[-1][:600] if errors else "no reason given"
    said = " ".join(errors).lower()
    if "workspace" in said or (workspace is not None and ("memory" in said or "implementation" in said)):
        return f"{last} (a larger --workspace may do, or a smaller --size or --frames)"
    return f"{last} (a smaller --size or --frames needs less memory)" if "memory" in said else last


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


def configured(trt: Any, builder: Any, network: Any, args: argparse.Namespace) -> Any:
    backend = LIBRARIES[args.library]
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # what is float32, in whatever precision, is so for a reason
    if backend == "tensorrt_rtx":
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # else its CUDA graphs may be refused
    if args.capabilities:
        names = args.capabilities.split(",")
        known = [name for name in trt.ComputeCapability.__members__ if name not in ("NONE", "CURRENT")]
        if unknown := [name for name in names if name not in known]:
            raise RefusalError(
                f"{backend} {trt.__version__} does not build for {', '.join(unknown)}; it does for "
                f"{', '.join(known)}, and without --arch for what its vendor calls portable"
            )
        config.num_compute_capabilities = len(names)
        for i, name in enumerate(names):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
    if args.level is not None:
        config.builder_optimization_level = args.level
    if args.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(args.workspace * 2**30))
    if (path := args.timing_cache) is not None:
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if not config.set_timing_cache(cache, ignore_mismatch=False):
            raise RefusalError(f"{path}: a timing cache of another TensorRT or GPU; name another file")
    add_profile(builder, config, network, args.ranges)
    return config


def add_profile(builder: Any, config: Any, network: Any, ranges: Any) -> None:
    """Let the free dimensions (-1) of a network's inputs vary as --ranges says."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if not any(-1 in tuple(x.shape) for x in inputs):
        return
    profile = builder.create_optimization_profile()
    for x in inputs:
        sizes_of = [[n] * 3 if n >= 0 else ranges[x.name][str(i)] for i, n in enumerate(x.shape)]
        shapes = [tuple(sizes[k] for sizes in sizes_of) for k in range(3)]  # least, usual, greatest
        print(f"profile {x.name}: {shapes}", file=sys.stderr)
        profile.set_shape(x.name, *shapes)
    if config.add_optimization_profile(profile) < 0:
        raise RefusalError("TensorRT does not take the optimisation profile; the log says why")


def make_logger(trt: Any) -> Any:
    """Writes what TensorRT says to stderr, and keeps the errors."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.INFO:
                print(f"{str(severity).rpartition('.')[2]}: {message}", file=sys.stderr, flush=True)
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

    return Logger()


if __name__ == "__main__":
    sys.exit(main())
