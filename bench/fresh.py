"""Measuring side by side: implementations in turn, each in a fresh process; medians; resident memory.

In turn, because whatever else runs on the machine then weighs on all of them alike. In fresh processes,
because a process does not give back all the memory that it used before.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

THREADS = 2  # of PyTorch in a measured process, so that numbers of different machines compare

Numbers = dict[str, float]
Key = tuple[str, str]  # what is measured (a task, a kind of files), and the implementation


def parse(
    doc: str | None, argv: Sequence[str] | None, repeats: int, out: Path | None = None, **more: Any
) -> argparse.Namespace:
    """The options of a benchmark's command: --out (required, if it has no default), --repeats, and `more`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=out is None, default=out, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=repeats)
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return args


def write(path: Path, results: dict[str, Any]) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")


def in_turn(
    cases: Iterable[Key], repeats: int, measure: Callable[[str, str], Numbers]
) -> dict[Key, list[Numbers]]:
    """Measures every case, then every case again, `repeats` times; prints the numbers as they come."""
    runs: dict[Key, list[Numbers]] = {case: [] for case in cases}
    for repeat in range(repeats):
        for case, found in runs.items():
            found.append(measure(*case))
            numbers = ", ".join(f"{name} {value:.2f}" for name, value in found[-1].items())
            print(f"{repeat + 1}/{repeats} {' '.join(case)}: {numbers}", file=sys.stderr)
    return runs


def in_fresh_process(measure: Callable[..., Numbers], *arguments: Any) -> Numbers:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def medians(runs: Sequence[Numbers]) -> Numbers:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def rows(runs: dict[Key, list[Numbers]], what: str, who: str) -> list[dict[str, Any]]:
    """A row for each case, with its medians and all its runs; `what` and `who` name the parts of a key."""
    return [{what: a, who: b, **medians(found), "runs": found} for (a, b), found in runs.items()]


def second_run(run: Callable[[], Any]) -> Numbers:
    """Seconds of a second run: in the first, threads start and kernels are chosen."""
    run()
    start = time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - start}


def resident(field: str) -> float:
    """Resident memory of this process in MB: now (VmRSS) or at its peak (VmHWM). Linux."""
    # not ru_maxrss: that one survives exec, so that a child starts from its parent's peak
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def forget_peak() -> float:
    """Gives free memory back and forgets the peak so far; resident memory now, in MB. Linux."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")
