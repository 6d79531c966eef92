"""One network for every task that segments targets in video.

    tarvis infer video.mp4
    tarvis VERB --help       what a verb does, and its options
    tarvis --version

`python -m tarvis.VERB` is the same.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from tarvis import places


class Verb(NamedTuple):
    """A command: the module whose `main` it is, in the package of that name, and what it does."""

    package: str
    module: str
    does: str


VERBS = {
    "infer": Verb("tarvis", "infer", "segment a video"),
    "evaluate": Verb("tarvis", "evaluate", "segment a benchmark's videos or own ones, and score them"),
    "train": Verb("tarvis", "train", "train on benchmarks or own data"),
    "web": Verb("tarvis", "web.__main__", "point at things in a page, see them followed, correct and save"),
    "convert": Verb("tarvis", "convert", "turn a checkpoint into a safe file"),
    "export onnx": Verb("export", "to_onnx", "make ONNX graphs of weights"),
    "export openvino": Verb("export", "to_openvino", "make graphs for OpenVINO, the fastest on a CPU"),
    "export aoti": Verb("export", "aoti", "compile weights into AOTInductor packages"),
    "export trt": Verb("export", "trt", "build TensorRT engines"),
    "check graphs": Verb("export", "check", "compare exported folders with their weights"),
    "check data": Verb("tarvis", "data.check", "look at all files of a training set"),
    "info": Verb("tarvis", "info", "say what would run here, or what a file holds"),
    "download": Verb("tarvis", "download", "fetch published weights"),
    "demo": Verb("tarvis", "demo.__main__", "run everything on clips that come with the package"),
    "kernels": Verb("kernels", "__main__", "say which implementation of each operator would run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    name, options = divide(given)
    if name is None:
        p = parser()
        p.parse_known_args(given)
        if given:
            p.error(f"no verb {given[0]!r}; verbs: {', '.join(VERBS)}")
        p.print_help()
        return 0
    package, module, _ = VERBS[name]
    home = package if package == "tarvis" else places.package(package)
    try:
        command = import_module(f"{home}.{module}").main
        from tarvis.cli import shown_as  # not before: it takes a second
    except KeyboardInterrupt:
        print("error: stopped", file=sys.stderr)
        return 128 + signal.SIGINT

    with shown_as(f"tarvis {name}"):
        status: int = command(options)
    return status


def divide(given: Sequence[str]) -> tuple[str | None, list[str]]:
    """The verb of a command line, None where there is none, and what follows it.

    Of two words the first does: `export` makes ONNX graphs, `check` looks at graphs where it is given some.
    """
    for words in (2, 1):
        if (name := " ".join(given[:words])) in VERBS:
            return name, [*given[words:]]
    if given[:1] == ["export"]:
        return "export onnx", [*given[1:]]
    if given[:1] == ["check"]:
        has_graphs = any((Path(each) / "manifest.json").is_file() for each in given[1:])
        return "check graphs" if has_graphs else "check data", [*given[1:]]
    return None, []


def parser() -> argparse.ArgumentParser:
    """Of a command line that names no verb."""
    width = max(map(len, VERBS))
    table = "\n".join(f"    {name:<{width}}  {each.does}" for name, each in VERBS.items())
    p = argparse.ArgumentParser(
        "tarvis",
        usage="tarvis VERB ...",
        description=__doc__,
        epilog=f"verbs:\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--version", action="version", version=f"tarvis {places.own_version()}")
    return p


if __name__ == "__main__":
    sys.exit(main())
