"""Everything that needs a GPU, in one command: the GPU tests, then the benchmarks, as one JSON file.

    python3 -m bench.gpu --out bench/results

Needs torch with CUDA and the packages of `pip install -e ".[dev]"`. Ends with 1 if a test fails, with 2 where
there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.bench_model import FRAMES, HEIGHT, IMPLEMENTATIONS, TASKS, WIDTH, machine, prepare

ROUNDS = 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the JSON file")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: no GPU that torch can use on this machine", file=sys.stderr)
        return 2
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"], check=False)
    name = torch.cuda.get_device_name()
    rows = [
        {"task": task, "implementation": implementation, **measure(implementation, task)}
        for task in TASKS
        for implementation in IMPLEMENTATIONS
    ]
    about = {
        "command": "python3 -m bench.gpu",
        "gpu": name,
        "machine": machine(),
        "clip": [FRAMES, HEIGHT, WIDTH],
        "dtype": "float32",
        "tests_passed": tests.returncode == 0,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"model_{re.sub(r'[^a-z0-9]+', '_', name.lower())}.json"
    path.write_text(json.dumps({**about, "results": rows}, indent=1) + "\n")
    for row in rows:
        print(f"{row['task']:4} {row['implementation']:14} {row['ms']:9.1f} ms {row['peak_mb']:9.0f} MB")
    print(f"written: {path}")
    return 0 if tests.returncode == 0 else 1


def measure(implementation: str, task: str) -> dict[str, Any]:
    """Median time of encode + decode, and the peak of allocated memory above the model and its inputs."""
    run = prepare(implementation, task, "resnet50", device="cuda")
    times = []
    with torch.inference_mode():
        for _ in range(3):  # kernels are chosen and loaded
            run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"ms": statistics.median(times), "ms_all": times, "peak_mb": peak}


if __name__ == "__main__":
    sys.exit(main())
