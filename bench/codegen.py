"""Machine code of every Triton kernel, compiled without a GPU: registers, spills, kinds of instructions.

    python -m bench.codegen --out bench/results/codegen.json

Compiles every variant for sm_90 and one of each operator and dtype for the other architectures (all of them
with --every), and writes one table for the installed Triton version beside those of other versions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from kernels._triton.launch import Variant

MAIN, OTHERS = 90, (80, 86, 89, 100, 120)
KINDS = ("LDG", "STG", "RED", "ATOM", "LDS", "STS", "LDL", "STL", "BAR", "SHFL", "HMMA", "HGMMA", "UTCHMMA")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/codegen.json"))
    parser.add_argument("--only", default="", help="variants whose name contains this; printed, not written")
    parser.add_argument("--every", action="store_true", help="every variant for every architecture")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="variants compiled at once")
    args = parser.parse_args(argv)
    import triton

    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing can be compiled")
    names = [name for name in targets(args.every or bool(args.only)) if args.only in name]
    rows = {}
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for name, row in zip(names, pool.map(_measure_target, names), strict=True):
            rows[name] = row
            print(name, json.dumps(row), flush=True)
    if not args.only:
        table = json.loads(args.out.read_text()) if args.out.exists() else {}
        table[triton.__version__] = rows
        temporary = args.out.with_suffix(".tmp")
        temporary.write_text(_dump(dict(sorted(table.items()))))
        temporary.replace(args.out)
    return 0


def targets(every: bool = False) -> dict[str, tuple[Variant, int]]:
    """Every variant with sm_90, one of each operator and dtype (or `every` one) with the others, by name."""
    from bench.variants import variants  # imports Triton

    out = {}
    seen = set()
    for variant in variants():
        out[f"{variant.name} sm_{MAIN}"] = variant, MAIN
        operator = variant.kernel.fn.__module__, kernel_and_dtype(variant.name)[1]
        if every or operator not in seen:
            seen.add(operator)
            out |= {f"{variant.name} sm_{arch}": (variant, arch) for arch in OTHERS}
    return out


def kernel_and_dtype(name: str) -> tuple[str, str]:
    """("masked_attention forward", "bf16") of "masked_attention forward bf16 D=32"."""
    words = name.split()
    dtype = next((word for word in words if word in ("bf16", "fp16", "fp32")), words[1])
    return " ".join(words[: words.index(dtype)]), dtype


def _dump(table: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for each variant."""
    versions = []
    for version, rows in table.items():
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        versions.append(f" {json.dumps(version)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(versions) + "\n}\n"


def _measure_target(name: str) -> dict[str, Any]:
    return measure(*targets(every=True)[name])


def measure(variant: Variant, arch: int) -> dict[str, Any]:
    """Registers, bytes of stack, shared and local memory, and instruction counts of one variant."""
    from triton import knobs

    cubin = variant.compile(arch).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        listing = _run(knobs.nvidia.nvdisasm.path, "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, shared, local = map(int, found.groups())
    kinds: Counter[str] = Counter()
    total = 0
    for line in listing.splitlines():
        op = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Za-z0-9_.]+)", line)
        if op:
            total += 1
            name = op.group(1)
            if name.startswith(KINDS):
                kinds[re.sub(r"\.(E|CONSTANT|STRONG|GPU|SYS|WEAK|RN|DESC)(?=\.|$)", "", name)] += 1
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "instructions": total,
        "kinds": dict(sorted(kinds.items())),
    }


def count(found: dict[str, Any], kind: str) -> int:
    """How many instructions there are of a kind ("LDG.128") or of its further kinds ("LDG.128.CTA")."""
    return sum(n for name, n in found["kinds"].items() if name == kind or name.startswith(f"{kind}."))


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
