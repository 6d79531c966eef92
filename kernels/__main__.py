"""What would run here, and why.

python -m kernels            # the implementation of each operator on every device of this machine
python -m kernels --json     # the same for scripts
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import __all__, dispatch
from . import operator as operators

# those of ms_deform_attn serve both of its forms
_SAME = {"ms_deform_attn_classic": "ms_deform_attn"}
# every operator of the package that has kernels
OPERATORS = {
    name: operator for name in __all__ if (operator := operators.OPERATORS.get(_SAME.get(name, name)))
}


def main(argv: Sequence[str] | None = None) -> int:
    program, raw = f"python -m {__package__}", argparse.RawDescriptionHelpFormatter
    said = (__doc__ or "").replace("python -m kernels", program)
    parser = argparse.ArgumentParser(program, description=said, formatter_class=raw)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    found = report()
    if args.json:
        print(json.dumps(found))
        return 0
    print("  ".join(f"{name} {value}" for name, value in found["versions"].items()))
    print(f"{dispatch.ENVIRONMENT}={found['preferred']}")
    for device in found["devices"]:
        print(f"\n{device['device']}: {device['name']}")
        for impl in ("triton", "cuda"):
            print(f"  {impl:9} {device[impl] or 'can run'}")
        for name, (impl, why) in device["runs"].items():
            print(f"    {name:24} {impl:10} {why}".rstrip())
    return 0


def report() -> dict[str, Any]:
    """Versions, and for each device what can run, why not, and what each operator takes."""
    devices = {"cpu": platform.processor() or platform.machine()}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": "not installed"}
    with suppress(PackageNotFoundError):
        versions["triton"] = version("triton")
    return {
        "versions": versions,
        "preferred": dispatch.preferred(),
        "devices": [
            {
                "device": device,
                "name": name,
                "triton": dispatch.triton_missing(device),
                "cuda": dispatch.cuda_missing(device),
                "runs": {name: _runs(device, operator.no_cuda) for name, operator in OPERATORS.items()},
            }
            for device, name in devices.items()
        ],
    }


def _runs(device: str, no_cuda: str) -> tuple[str, str]:
    """What "auto" runs, or "error", and why nothing better does."""
    preferred = dispatch.preferred()
    if preferred == "auto":
        return dispatch.automatic(device, no_cuda=no_cuda)
    why = "" if preferred == "reference" else dispatch.why_not(preferred, device, no_cuda=no_cuda)
    return ("error", f"{preferred}: {why}") if why else (preferred, f"{dispatch.ENVIRONMENT} says so")


if __name__ == "__main__":
    sys.exit(main())
