"""What the command lines share: options, precisions, how a user's mistake ends a program."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from tarvis.structures import InputError, one_line

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Choices of --amp: what autocast computes in."""

SMALLER = "out of GPU memory: try a smaller --min-size or --clip-length, or --amp"
STOPPED = 130
"""Exit status after Ctrl-C, as shells have it."""


def command(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m NAME`, whose help is the module's docstring."""
    return argparse.ArgumentParser(
        f"python -m {name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run(
    action: Callable[[], dict[str, Any]], *, compiles: bool = False, memory: str = SMALLER, stopped: str = ""
) -> int:
    """Do what a command is for, and print its summary as one line of JSON, unless it is empty.

    Args:
        compiles: whether torch.compile was asked for, whose failures are the machine's.
        memory, stopped: what to say when the GPU's memory is full, or after Ctrl-C.

    Returns:
        The exit status: 0, or 2 after a line on stderr that says what the user can change.
    """
    try:
        summary = action()
    except (InputError, OSError) as error:
        return fail(str(error))
    except torch.OutOfMemoryError:
        return fail(memory)
    except MemoryError:
        return fail(memory.replace("GPU ", ""))
    except KeyboardInterrupt:
        if not stopped:
            raise
        return fail(stopped)
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):
            return fail(memory.replace("GPU ", ""))
        if not compiles:
            raise
        return fail(f"compiling needs a C++ compiler, or drop --compile: {str(error).strip()[:200]}")
    if summary:
        print(json.dumps(summary))
    return 0


def fail(message: str) -> int:
    """One line on stderr, and the exit status of a user's mistake."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    return 2


def add_network(group: Any) -> None:
    """The options that say which network runs."""
    group.add_argument("--weights", type=Path, help=".pth (config.yaml beside it) or .safetensors")
    group.add_argument("--engine", type=Path, metavar="DIR", help="exported graphs in the place of weights")


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
