"""The runtimes of exported graphs: a module each, with two functions.

    write(parts, folder, ..)         the files of a task's graphs
    open(folder, manifest, device)   these files, each ready to run

Adding a runtime is a module beside these, a line below and a command that calls `write`.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from tqdm import tqdm

if TYPE_CHECKING:
    from torch import Tensor  # builds of TensorRT do without torch

HOME = __name__.rpartition(".")[0]
"""The import name of this package, `export` in a checkout; `python -m HOME.trt` is a command."""

RUNTIMES = {
    "onnx": f"{__name__}.onnx",
    "openvino": f"{__name__}.openvino",
    "aoti": f"{__name__}.aoti",
    "tensorrt": f"{__name__}.tensorrt",
    "tensorrt_rtx": f"{__name__}.tensorrt",
}
"""A manifest's `backend` -> the module that runs its files; imported when it is needed."""

DATA = ("onnx", "openvino")
"""Backends whose files are data; the files of the others are code of this machine."""


class RefusalError(Exception):
    """What was asked for cannot be built: `InputError` of code that runs without torch."""


class RunnableGraph(Protocol):
    """One graph of a folder: tensors go in by name and come out by name.

    A runtime that knows its decoder's attention bits has `attention_bits` besides, and one whose tensors can
    be read has `differences`, as `export.runtimes.onnx.OrtGraph`.
    """

    def __call__(self, inputs: Mapping[str, Tensor], /) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Written:
    """What a runtime's `write` has made, for the manifest: its files by graph, versions, and the target."""

    graphs: dict[str, str]
    versions: dict[str, str] = field(default_factory=dict)
    target: dict[str, str] = field(default_factory=dict)


def progress(names: Iterable[str], runtime: str) -> Iterable[str]:
    """The names of graphs, with a bar on stderr while they are made."""
    bar = tqdm(list(names), desc=runtime, unit="graph", file=sys.stderr)
    for name in bar:
        bar.set_postfix_str(name)
        yield name


def first_line(error: Exception) -> str:
    """What an error of a library says first, or its name where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)
