"""What the command lines share: options, precisions, how a user's mistake ends a program."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from tarvis import places
from tarvis.structures import DamagedError, InputError, one_line

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Choices of --amp: what autocast computes in."""

SMALLER = "out of GPU memory: try a smaller --min-size or --clip-length, or --amp"
LONGEST_LINE = 2000
"""Characters of a line that is no error."""
MISTAKE, DAMAGED, UNREAD = 2, 3, 141
"""Exit statuses; see `guarded`."""
STOPPED = 128
"""Exit statuses above it are those of runs that a signal has ended."""

STATUS = "status"
"""Key of a summary that gives the exit status, and is not printed."""

WEIGHTS = (
    ".pth (config.yaml beside it), .safetensors, or a name that `tarvis download` takes (default: the small "
    "network of the package)"
)
"""Help of --weights."""

_shown: ContextVar[str | None] = ContextVar("_shown", default=None)


def command(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m NAME`, or of what `shown_as` says, whose help is the module's docstring."""
    module = f"python -m {name}"
    program = _shown.get() or module
    return argparse.ArgumentParser(
        program,
        description=doc and doc.replace(module, program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


@contextmanager
def shown_as(program: str) -> Iterator[None]:
    """Within the block commands call themselves so in their help."""
    before = _shown.set(program)
    try:
        yield
    finally:
        _shown.reset(before)


class Terminated(KeyboardInterrupt):
    """Raised by SIGTERM, as KeyboardInterrupt is by Ctrl-C, except within `stopping`."""


def run(
    action: Callable[[], dict[str, Any]], *, compiles: bool = False, memory: str = SMALLER, stopped: str = ""
) -> int:
    """Do what a command is for, and print its summary as one line of JSON, unless it is empty.

    Args:
        compiles: whether torch.compile was asked for, whose failures are the machine's.
        memory, stopped: what to say when the GPU's memory is full, or after Ctrl-C and SIGTERM.

    Returns:
        The exit status; see `guarded`.
    """

    def inner() -> int:
        try:
            summary = action()
        except torch.OutOfMemoryError:
            return fail(memory)
        except MemoryError:
            return fail(memory.replace("GPU ", ""))
        except RuntimeError as error:
            if "DefaultCPUAllocator" in str(error):
                return fail(memory.replace("GPU ", ""))
            if not compiles:
                raise
            return fail(f"compiling needs a C++ compiler, or drop --compile: {str(error).strip()[:200]}")
        status: int = summary.pop(STATUS, 0)
        if summary:
            print(json.dumps(summary))
        return status

    return guarded(inner, stopped=stopped)


def guarded(action: Callable[[], int], *, stopped: str = "") -> int:
    """Do what a command is for, and end as a command does: in one line where the user can change something.

    Returns:
        The exit status of `action`; else 2 after a user's mistake, 3 where input gave out in the middle and
        the part before is kept, 130 after Ctrl-C, 143 after SIGTERM, 141 where the output was closed.
    """
    try:
        with _terminable():
            try:
                status = action()
            except BrokenPipeError:
                raise
            except (InputError, OSError) as error:
                status = fail(str(error), DAMAGED if isinstance(error, DamagedError) else MISTAKE)
            except KeyboardInterrupt as error:
                status = fail(stopped or "stopped", status_of(error))
            sys.stdout.flush()
            sys.stderr.flush()
            return status
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):
            _discard_if_broken(stream)
        return UNREAD


def status_of(stop: KeyboardInterrupt) -> int:
    """The exit status of a program that was stopped, as shells have it."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def fail(message: str, status: int = MISTAKE) -> int:
    """One line on stderr, and the exit status."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    return status


def say(message: str) -> None:
    """One line on stderr, whatever is in the names that it has."""
    print(one_line(message, LONGEST_LINE), file=sys.stderr)


@contextmanager
def stopping(deadline: float | None = None) -> Iterator[Stop]:
    """Tells whether SIGTERM, Ctrl-C or `deadline` (time.monotonic) have come; a second Ctrl-C is raised."""
    stop = Stop(deadline)

    def note(number: int, _: object) -> None:
        if stop.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice
        stop.signal = stop.signal or number

    with _handled({signal.SIGTERM: note, signal.SIGINT: note}):
        yield stop


@dataclass
class Stop:
    """Whether a run is to stop, and by which signal, if any."""

    deadline: float | None = None
    signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None or (self.deadline is not None and time.monotonic() >= self.deadline)

    @property
    def status(self) -> int:
        """The exit status of a run that has ended early for this: 0 at the deadline."""
        return 0 if self.signal is None else 128 + self.signal


def _terminable() -> AbstractContextManager[None]:
    """SIGTERM raises `Terminated` within the block."""

    def terminate(*_: object) -> None:
        raise Terminated

    return _handled({signal.SIGTERM: terminate})


@contextmanager
def _handled(handlers: Mapping[signal.Signals, Callable[[int, Any], None]]) -> Iterator[None]:
    """Handlers of signals within the block; elsewhere than in the main thread there are none to be had."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _discard_if_broken(stream: TextIO) -> None:
    """Let what is left go nowhere, or Python would complain of the closed pipe as it exits."""
    try:
        stream.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def add_network(group: Any) -> None:
    """The options that say which network runs."""
    group.add_argument("--weights", type=places.weights, help=WEIGHTS)
    group.add_argument("--engine", type=Path, metavar="DIR", help="exported graphs in the place of weights")


def free_folder(name: str, *, overwrite: bool) -> Path:
    """The folder of a command without --out: runs/NAME; runs/NAME-2, .. where that exists and stays."""
    path, number = Path("runs") / name, 1
    while os.path.lexists(path) and not overwrite:
        number += 1
        path = path.with_name(f"{name}-{number}")
    return path


def add_reading(group: Any, beside: str = "them") -> None:
    """The options of how a file of weights is read."""
    group.add_argument(
        "--config", type=Path, help=f"the weights' config.yaml, where it is not beside {beside}"
    )
    trust = "run code from elsewhere: pickled objects in weights, machine code in engines"
    group.add_argument("--trust", action="store_true", help=trust)


def add_running(group: Any) -> None:
    """The options of how the network runs."""
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    group.add_argument("--amp", choices=AMP, default="off", help="mixed precision (default: off)")
    group.add_argument("--compile", action="store_true", help="compile the network first")


def refuse_precision(args: argparse.Namespace) -> None:
    """Raise InputError where an engine is asked for what `add_running` offers for weights alone."""
    if args.compile or args.amp != "off":
        raise InputError("an engine is compiled, in a precision of its own: drop --compile and --amp")


def add_clips(group: Any) -> None:
    """The options of how a video is cut into clips; see `asked_settings`."""
    group.add_argument("--clip-length", type=int, metavar="N", help="frames the network sees together")
    group.add_argument("--overlap", type=int, metavar="N", help="frames that consecutive clips share")
    group.add_argument(
        "--min-size", type=int, metavar="N", help="shorter side for the network; 0: native size"
    )


def asked_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `tarvis.config.InferenceConfig` that the options of `add_clips` name."""
    asked = {name: getattr(args, name) for name in ("clip_length", "overlap", "min_size")}
    settings = {name: value for name, value in asked.items() if value is not None}
    if settings.get("min_size") == 0:
        settings["min_size"] = None
    return settings


def some(names: Iterable[str], most: int = 8) -> str:
    """The first of the names in order, and how many more there are."""
    shown = sorted(names)
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
