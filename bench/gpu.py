"""Everything that needs a GPU, in one command and ten minutes: tests, gates, times, one JSON, one table.

    python3 -m bench.gpu --out bench/results              # or `make gpu`
    python3 -m bench.gpu --only forward,backward          # some sections, for tuning
    python3 -m bench.gpu --device cpu --smoke --out out   # a rehearsal: tiny shapes, nothing worth quoting

Needs torch, Triton, NumPy, SciPy, OpenCV, PyYAML, safetensors and pytest-benchmark; what needs more is
reported as not run. Every section runs in a process of its own with a time limit, so that what goes wrong in
one, a memory fault included, leaves the others alone. The JSON is rewritten as rows arrive, so that a run
that is cut short leaves what it has.
Ends with 0 if all tests and gates passed, with 1 if one failed or was cut short, with 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.case import record_cases
from bench.cases import SECTIONS as CASES
from bench.record import Recorder, Results, Row
from bench.report import on_gpu, problems
from bench.timing import machine

ROOT = Path(__file__).parents[1]
BUDGET = 560.0
STARTUP = 8.0  # seconds until a section's process has imported torch, about
GRACE = 15.0  # seconds that a section has to end after its time is up
WITHOUT_GPU = ("test_codegen.py", "test_build.py")  # compile ahead of time, which needs no GPU and takes long

# section -> share of the time; in the order of what is missed most if time runs out
# (what a section leaves of its share, those after it get)
SHARES = {
    "tests": 165, "ceilings": 25, "forward": 95, "backward": 95, "bits": 45, "attention": 50, "upsample": 35,
    "matching": 35, "points": 20, "model": 40, "runtime": 120,
}  # fmt: skip


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
    for place, section in enumerate(args.only):
        shares = [SHARES[later] for later in args.only[place:]]
        seconds = (end - time.monotonic()) * shares[0] / sum(shares)
        print(f"{section}: up to {seconds:.0f} s", file=sys.stderr, flush=True)
        started = time.monotonic()
        if section == "tests":
            row = run_tests(results, seconds, args.tests)
        else:
            row = run_child(results, section, seconds, args)
        taken = round(time.monotonic() - started, 1)
        results.add({"kind": "section", "case": section, "impl": "", "seconds": taken, **row})
    print("\n".join([on_gpu({**results.about, "rows": results.rows}), "", *problems(results.rows)]))
    print(f"written: {path}")
    return 0 if results.passed else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(os.environ.get("OUT", "bench/results"))
    parser.add_argument("--out", type=Path, default=default, help="folder for the JSON file")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--only", type=chosen, default=chosen(""), help=f"of {','.join(SHARES)}")
    parser.add_argument(
        "--tests", nargs="*", default=[], help="only test files whose path contains one of these"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    # with which the command calls itself, once a section
    parser.add_argument("--section", default="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def chosen(names: str) -> list[str]:
    """Sections by name, in their order; all of them if none is named."""
    wanted = [name for name in names.split(",") if name]
    unknown = set(wanted) - set(SHARES)
    if unknown:
        raise argparse.ArgumentTypeError(f"no section {', '.join(sorted(unknown))}")
    return [section for section in SHARES if not wanted or section in wanted]


def command(args: argparse.Namespace) -> str:
    only = "" if args.only == list(SHARES) else f" --only {','.join(args.only)}"
    return f"python3 -m bench.gpu{only}{' --device cpu' if args.device == 'cpu' else ''}" + (
        " --smoke" if args.smoke else ""
    )


def clocks() -> str | None:
    """Driver, clocks and power limit, as nvidia-smi reports them."""
    query = "driver_version,clocks.max.sm,clocks.sm,clocks.mem,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{query}: {done.stdout.strip()}"


# Tests


def run_tests(results: Results, seconds: float, only: Sequence[str]) -> Row:
    """pytest in a process of its own; the CUDA extension is compiled meanwhile, if there is an nvcc."""
    end = time.monotonic() + seconds
    extension = subprocess.Popen(
        [sys.executable, "-m", "kernels.build"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    row = tested([name for name in test_files() if not only or any(part in name for part in only)], seconds)
    results.add(row)
    with suppress(subprocess.TimeoutExpired):  # it goes on; what needs it waits for it
        extension.wait(timeout=max(1.0, end - time.monotonic()))
    return {"ok": row["ok"]}


def test_files() -> list[str]:
    """All tests of the kernels and of parity, and files with tests marked `gpu`."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        name = path.relative_to(ROOT).as_posix()
        whole = name.startswith(("tests/kernels/", "tests/parity/"))
        if path.name not in WITHOUT_GPU and (whole or "mark.gpu" in path.read_text()):
            found.append(name)
    return found


def tested(files: Sequence[str], seconds: float) -> Row:
    """Runs test files natively. A test that needs a package which is not installed counts as not run."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "2", "COLUMNS": "400"}
    options = ["-v", "-rfEs", "--tb=line", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    workers = ["-n", str(min(12, os.cpu_count() or 1))] if find_spec("xdist") else []
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *workers, *files],
            cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        late = not wait(process, seconds)
        log.seek(0)
        row = sort_outcomes(log.read())
    if late:
        row["failed"].append(f"not finished in {seconds:.0f} s")
    elif process.returncode not in (0, 1, 5) and not row["failed"] and not row["not_run"]:
        row["failed"].append(f"pytest ended with {process.returncode}")
    return {"kind": "tests", "case": "tests", "impl": "", "ok": not row["failed"], **row}


def sort_outcomes(log: str) -> Row:
    """Passed tests, failed ones with their messages, and how many were not run for which reason."""
    failed, not_run = [], dict[str, int]()
    for line in log.splitlines():
        if skipped := re.match(r"SKIPPED \[(\d+)\] \S+ (.*)", line):
            not_run[skipped[2]] = not_run.get(skipped[2], 0) + int(skipped[1])
        elif line.startswith(("FAILED ", "ERROR ")):
            if "::" not in line:  # a file that could not be collected; its message stands further up
                name = re.escape(Path(line.split()[1]).name)
                found = re.search(rf"ERROR collecting \S*{name} .*?^E +(.*?)$", log, re.DOTALL | re.MULTILINE)
                line = f"{line} - {found[1] if found else ''}"
            package = re.search(r"No module named '(\w+)", line)
            if package and not (ROOT / package[1]).exists() and find_spec(package[1]) is None:
                reason = f"needs {package[1]}, which is not installed"
                not_run[reason] = not_run.get(reason, 0) + 1
            else:
                failed.append(line[:300])
    return {"passed": len(re.findall(r"\bPASSED\b", log)), "failed": failed, "not_run": not_run}


def wait(process: subprocess.Popen[Any], seconds: float) -> bool:
    """Whether a process ends in time; if it does not it is killed, with all that it started."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False
    return True


# Sections


def run_child(results: Results, section: str, seconds: float, args: argparse.Namespace) -> Row:
    """Runs a section in a process of its own and takes over its rows as they appear."""
    options = [f"--section={section}", f"--budget={seconds}", f"--device={args.device}"]
    environment = dict(os.environ)
    if args.device == "cuda":
        environment.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu", *options, *["--smoke"] * args.smoke],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip
        in_time: list[bool] = []
        watch = threading.Thread(target=lambda: in_time.append(wait(process, seconds + GRACE)))
        watch.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.endswith("\n"):  # the last one may be cut
                    results.add(json.loads(line))
        finally:
            watch.join()
        if process.returncode == 0:
            return {"ok": True}
        log.seek(0)
        reason = f"ended with {process.returncode}" if in_time[0] else "killed: out of time"
        return {"ok": False, "failed": reason, "log": log.read()[-2000:]}


def run_section(args: argparse.Namespace) -> None:
    """In the child: the section's rows go to standard output, all that is printed to standard error."""
    end = time.monotonic() + args.budget - STARTUP
    rows = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def emit(row: Row) -> None:
        rows.write(json.dumps({"section": args.section, **row}) + "\n")

    section(args.section)(Recorder(args.device, args.smoke, lambda: time.monotonic() > end, emit))


def section(name: str) -> Callable[[Recorder], None]:
    """What measures a section; imported only where it runs, as a machine may lack what others need."""
    if name == "ceilings":
        from bench.ceilings import ceilings as run
    elif name == "model":
        from bench.bench_model import section as run
    elif name == "runtime":
        from bench.bench_runtime import section as run
    else:
        return partial(run_cases, name)
    return run


def run_cases(name: str, record: Recorder) -> None:
    record_cases(record, CASES[name](record.device, "tiny" if record.small else "gpu"))


if __name__ == "__main__":
    sys.exit(main())
