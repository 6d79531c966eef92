"""Say what would run on this machine and why, or what files hold.

python -m tarvis.info                        versions, devices, operators, runtimes of exported networks
python -m tarvis.info weights.pth engines    the network of weights, the graphs of a folder
python -m tarvis.info --json                 the same for scripts
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tarvis import cli, places
from tarvis.engines import FILE, read_manifest
from tarvis.files.outputs import digest_of_file
from tarvis.model.weights import load_weights
from tarvis.structures import InputError

PACKAGES = (
    "tarvis",
    "numpy",
    "opencv-python-headless",
    "av",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
)


def main(argv: Sequence[str] | None = None) -> int:
    p = cli.command("tarvis.info", __doc__)
    p.add_argument(
        "paths", nargs="*", type=places.weights, metavar="PATH", help="weights, or exported folders"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object")
    args = p.parse_args(argv)
    return cli.guarded(lambda: info(args))


def info(args: argparse.Namespace) -> int:
    """Print what was asked for; returns the exit status."""
    found = {str(path): about(path) for path in args.paths} if args.paths else machine()
    print(json.dumps(found) if args.json else "\n".join(lines(found)))
    return 0


def lines(tree: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A tree of values for people, a line each."""
    width = max(map(len, tree), default=0)
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{name}"
            yield from lines(value, indent + "  ")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, Sequence | Mapping) else value
            yield f"{indent}{name:<{width}}  {value if isinstance(value, str) else shown}".rstrip()


def machine() -> dict[str, Any]:
    """Versions; devices, and which implementation of each operator runs there; runtimes."""
    report = import_module(f"{places.package('kernels')}.__main__").report()
    versions = report["versions"]
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    devices = {
        each["device"]: {"name": each["name"]} | {name: impl for name, (impl, _) in each["runs"].items()}
        for each in report["devices"]
    }
    return {"versions": versions, "devices": devices, "runtimes": runtimes()}


def runtimes() -> dict[str, str]:
    """Whether networks can be exported for each runtime here, and why not."""
    home = f"{places.package('export')}.runtimes"
    names = ("onnx", "openvino", "aoti", "tensorrt")
    onnx, openvino, aoti, tensorrt = (import_module(f"{home}.{name}") for name in names)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checks = {
        "onnx": onnx.require_packages,
        "openvino": openvino.require_packages,
        "aoti": lambda: aoti.require_compiler(device),
        "tensorrt": lambda: tensorrt.installed("tensorrt"),
        "tensorrt_rtx": lambda: tensorrt.installed("tensorrt_rtx"),
    }
    found = {}
    for name, check in checks.items():
        try:
            check()
        except InputError as error:
            found[name] = str(error)
        else:
            needs_gpu = name.startswith("tensorrt") and device.type == "cpu"
            found[name] = "installed; engines run on a GPU, and there is none" if needs_gpu else "can run"
    return found


def about(path: Path) -> dict[str, Any]:
    """What a file of weights or an exported folder holds.

    Raises:
        InputError: it is neither, or damaged.
    """
    if (path / FILE).is_file():
        manifest = read_manifest(path)
        names = ("task", "class_set", "size", "frames", "dynamic", "precision", "backend", "versions")
        made_of = {
            "backbone": manifest.model.backbone,
            "weights": manifest.weights,
            "target": manifest.target,
        }
        return {name: getattr(manifest, name) for name in names} | made_of
    state, config = load_weights(path)
    return {
        "backbone": config.backbone,
        "parameters": sum(value.numel() for value in state.values()),
        "class_sets": config.class_sets,
        "settings": config.inference,
        "bytes": path.stat().st_size,
        "sha256": digest_of_file(path),
    }


if __name__ == "__main__":
    sys.exit(main())
