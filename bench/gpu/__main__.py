"""Everything that needs a GPU, in one command and ten minutes: tests, gates, times, one JSON, one table.

    python3 -m bench.gpu --out bench/results              # or `make gpu`
    python3 -m bench.gpu --only forward,backward          # some sections, for tuning
    python3 -m bench.gpu --device cpu --smoke --out out   # a rehearsal: tiny shapes, nothing worth quoting

Needs torch, Triton, NumPy, SciPy, OpenCV, PyYAML, safetensors and pytest-benchmark; what needs more is
reported as not run. The JSON is rewritten as rows arrive, so that a run that is cut short leaves what it has.
Ends with 0 if all tests and gates passed, with 1 if one failed or was cut short, with 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu import suite
from bench.gpu.measure import deadline
from bench.gpu.protocol import OUT_OF_TIME, Recorder, Row
from bench.gpu.table import table
from bench.timing import machine

BUDGET = 560.0
STARTUP = 8.0  # seconds until a section's process has imported torch, about
GRACE = 15.0  # seconds that a section has to end after it was told to

# section -> (module, function, share of the time); in the order of what is missed most if time runs out
# (what a section leaves of its share, those after it get)
SECTIONS = {
    "tests": ("", "", 165),
    "ceilings": ("bench.gpu.ceilings", "ceilings", 25),
    "forward": ("bench.gpu.deform_attn", "forward", 95),
    "backward": ("bench.gpu.deform_attn", "backward", 95),
    "bits": ("bench.gpu.masks", "bits", 45),
    "attention": ("bench.gpu.masks", "attention", 50),
    "upsample": ("bench.gpu.masks", "upsample", 35),
    "matching": ("bench.gpu.masks", "matching", 35),
    "model": ("bench.gpu.model", "model", 40),
    "runtime": ("bench.gpu.runtime", "runtime", 120),
}


class Results:
    """Rows and what they depend on, as a file that is complete at any time."""

    def __init__(self, path: Path, about: Row) -> None:
        self.path, self.about, self.rows = path, about, list[Row]()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        temporary = self.path.with_suffix(".tmp")
        lines = ",\n".join(f"  {json.dumps(row)}" for row in self.rows)
        head = json.dumps(self.about, indent=1).removesuffix("\n}")
        temporary.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
        temporary.replace(self.path)

    @property
    def passed(self) -> bool:
        """Whether no test and no gate failed or lacked time, and no section broke."""
        gates = [row for row in self.rows if row["kind"] == "gate"]
        others = [row for row in self.rows if row["kind"] in ("tests", "section")]
        good = [row.get("passed", row.get("not_run") != OUT_OF_TIME) for row in gates]
        return all(good) and all(row["ok"] for row in others)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: no GPU that torch can use on this machine", file=sys.stderr)
        return 2
    if args.section:
        run_section(args)
        return 0
    name = torch.cuda.get_device_name() if args.device == "cuda" else "rehearsal on cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu_{re.sub(r'[^a-z0-9]+', '_', name.lower())}.json"
    about = {"command": command(args), "gpu": name, "machine": machine(), "clocks": clocks()}
    results = Results(path, {**about, "started": time.strftime("%Y-%m-%d %H:%M")})
    end = time.monotonic() + args.budget
    wanted = list(args.only)
    while wanted:
        shares = [SECTIONS[section][2] for section in wanted]
        seconds = (end - time.monotonic()) * shares[0] / sum(shares)
        section = wanted.pop(0)
        print(f"{section}: up to {seconds:.0f} s", file=sys.stderr, flush=True)
        started = time.monotonic()
        if section == "tests":
            row = run_tests(results, seconds, args.tests)
        else:
            row = run_child(results, section, seconds, args)
        taken = round(time.monotonic() - started, 1)
        results.add({"kind": "section", "case": section, "impl": "", "seconds": taken, **row})
    print(table(results.about, results.rows))
    print(f"written: {path}")
    return 0 if results.passed else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(os.environ.get("OUT", "bench/results"))
    parser.add_argument("--out", type=Path, default=default, help="folder for the JSON file")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--only", type=chosen, default=chosen(""), help=f"of {','.join(SECTIONS)}")
    parser.add_argument(
        "--tests", nargs="*", default=[], help="only test files whose path contains one of these"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    # what the command calls itself with, once a section
    parser.add_argument("--section", default="", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def chosen(names: str) -> list[str]:
    """Sections by name, in their order; all of them if none is named."""
    wanted = [name for name in names.split(",") if name]
    unknown = set(wanted) - set(SECTIONS)
    if unknown:
        raise argparse.ArgumentTypeError(f"no section {', '.join(sorted(unknown))}")
    return [section for section in SECTIONS if not wanted or section in wanted]


def command(args: argparse.Namespace) -> str:
    only = "" if args.only == list(SECTIONS) else f" --only {','.join(args.only)}"
    return f"python3 -m bench.gpu{only}{' --device cpu' if args.device == 'cpu' else ''}" + (
        " --smoke" if args.smoke else ""
    )


def clocks() -> str | None:
    """Driver, clocks and power limit, as nvidia-smi tells them."""
    query = "driver_version,clocks.max.sm,clocks.sm,clocks.mem,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{query}: {done.stdout.strip()}"


def run_tests(results: Results, seconds: float, only: Sequence[str]) -> Row:
    """All files, several at a time; the CUDA extension is compiled meanwhile, if there is an nvcc."""
    files = [
        (name, options) for name, options in suite.files() if not only or any(part in name for part in only)
    ]
    extension = subprocess.Popen(
        [sys.executable, "-m", "kernels.build"],
        cwd=suite.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + seconds
    try:
        good = suite.run(seconds, results.add, files)
        extension.wait(max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass  # it goes on; what needs it waits for it
    return {"ok": good}


def run_child(results: Results, section: str, seconds: float, args: argparse.Namespace) -> Row:
    """Runs a section in a process of its own and takes over its rows as they appear."""
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder) / "rows", Path(folder) / "log"
        rows.touch()
        given = {"section": section, "rows": rows, "budget": seconds, "device": args.device}
        options = [f"--{name}={value}" for name, value in given.items()] + ["--smoke"] * args.smoke
        environment = dict(os.environ)
        if args.device == "cuda":
            environment.pop("TRITON_INTERPRET", None)
        with log.open("w") as output, rows.open() as incoming:
            process = subprocess.Popen(
                [sys.executable, "-m", "bench.gpu", *options],
                cwd=suite.ROOT, env=environment, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
            expired = deadline(seconds + GRACE)
            try:
                while process.poll() is None and not expired():
                    time.sleep(0.3)
                    take(results, incoming)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it started
                    process.wait()
            take(results, incoming)
        if process.returncode == 0:
            return {"ok": True}
        reason = "killed: out of time" if expired() else f"ended with {process.returncode}"
        return {"ok": False, "failed": reason, "log": log.read_text(errors="replace")[-2000:]}


def take(results: Results, incoming: Any) -> None:
    """Adds the rows that were written since; a line that is not finished waits."""
    while True:
        place = incoming.tell()
        line = incoming.readline()
        if not line.endswith("\n"):
            incoming.seek(place)
            return
        results.add(json.loads(line))


def run_section(args: argparse.Namespace) -> None:
    """In the child: the section's function, with rows written line by line."""
    module, function, _ = SECTIONS[args.section]
    over = deadline(args.budget - STARTUP)
    with args.rows.open("a") as file:

        def emit(row: Row) -> None:
            file.write(json.dumps({"section": args.section, **row}) + "\n")
            file.flush()

        record = Recorder(args.device, args.smoke, over, emit)
        getattr(importlib.import_module(module), function)(record)


if __name__ == "__main__":
    sys.exit(main())
