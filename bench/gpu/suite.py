"""The tests that touch a GPU, run natively: every file in a few pytest processes, many at a time.

Most of the time goes into compiling kernels, which takes one core each. A test that needs a package which is
not installed counts as not run, under the package's name. As a pytest plugin this module gives `--part 1/3`.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WORKERS = 12
PARTS = 3  # of a file with many tests
LAST_TEST = 10.0  # seconds before the end from which on no test starts
STOPPED = "the tests' time is up"
WITHOUT_GPU = ("test_codegen.py", "test_build.py")  # compile ahead of time, which needs no GPU and takes long

MISSING = re.compile(r"No module named '([\w.]+)'|could not import '([\w.]+)'")


@dataclass
class Outcome:
    """What became of the tests of one file, or a part of it."""

    case: str
    passed: int = 0
    failed: list[str] = field(default_factory=list)  # "test: message"
    not_run: dict[str, int] = field(default_factory=dict)  # reason -> tests
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.failed


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--part", default="1/1", help="only every n-th test, from the k-th: k/n")
    parser.addoption("--until", type=float, default=math.inf, help="time.monotonic() to start no test after")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    first, _, step = config.getoption("part").partition("/")
    items[:] = items[int(first) - 1 :: int(step)]


def pytest_runtest_teardown(item: Any, nextitem: Any) -> None:
    """Ends in time to write a report of what has run."""
    if nextitem is not None and time.monotonic() > item.config.getoption("until"):
        item.session.shouldstop = STOPPED


def files(root: Path = ROOT) -> Iterator[tuple[str, Sequence[str]]]:
    """(test file, options): all tests of the kernels and of parity, elsewhere those marked `gpu`."""
    for path in sorted((root / "tests").rglob("test_*.py")):
        name = path.relative_to(root).as_posix()
        if path.name in WITHOUT_GPU:
            continue
        if name.startswith(("tests/kernels/", "tests/parity/")):
            yield from ((name, (f"--part={part}/{PARTS}",)) for part in range(1, PARTS + 1))
        elif "mark.gpu" in path.read_text():
            yield name, ("-m", "gpu")


def run(
    seconds: float, emit: Callable[[dict[str, Any]], None], chosen: Sequence[tuple[str, Sequence[str]]]
) -> bool:
    """Runs the files and emits a row for each; whether nothing failed. Ends after so many seconds."""
    end = time.monotonic() + seconds
    good = True
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(_run_file, name, options, end) for name, options in chosen]
        for future in as_completed(futures):
            outcome = future.result()
            good &= outcome.ok
            emit({"kind": "tests", "ok": outcome.ok, **asdict(outcome)})
    return good


def _run_file(name: str, options: Sequence[str], end: float) -> Outcome:
    label = " ".join((name, *options))
    left = end - time.monotonic()
    if left < 5:
        return Outcome(label, failed=["not started: out of time"])
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "2"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        plugins = ["-p", "no:cacheprovider", "-p", "bench.gpu.suite"]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            *plugins,
            f"--junitxml={report}",
            f"--until={end - LAST_TEST}",
        ]
        start = time.monotonic()
        try:
            done = subprocess.run(
                [*command, *options, name],
                cwd=ROOT, env=environment, capture_output=True, text=True, timeout=left, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            tail = late.stdout.decode(errors="replace")[-300:] if isinstance(late.stdout, bytes) else ""
            return Outcome(label, failed=[f"not finished in {left:.0f} s: {tail}"], seconds=left)
        seconds = time.monotonic() - start
        if not report.exists():
            problem = (done.stderr or done.stdout).strip()[-500:]
            outcome = Outcome(label)
            _fail(outcome, "pytest", problem or f"ended with {done.returncode}")
        else:
            outcome = read_report(label, report.read_text())
            if STOPPED in done.stdout:
                outcome.failed.append(f"not finished in {seconds:.0f} s")
            if done.returncode not in (0, 5) and not outcome.failed and not outcome.not_run:
                outcome.failed.append(f"pytest ended with {done.returncode}")
    outcome.seconds = round(seconds, 1)
    return outcome


def read_report(name: str, xml: str) -> Outcome:
    """Sorts the tests of a JUnit report into passed, failed and not run."""
    outcome = Outcome(name)
    for case in ET.fromstring(xml).iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if problem is None:
            outcome.passed += 1
            continue
        text = f"{problem.get('message', '')}\n{problem.text or ''}"
        if problem.tag == "skipped":
            _not_run(outcome, missing_package(text) or problem.get("message", "skipped")[:120])
        else:
            _fail(outcome, case.get("name") or case.get("classname") or "?", text)
    return outcome


def _fail(outcome: Outcome, test: str, text: str) -> None:
    package = missing_package(text)
    if package:
        _not_run(outcome, package)
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        outcome.failed.append(f"{test}: {lines[0][:200] if lines else ''}")


def _not_run(outcome: Outcome, reason: str) -> None:
    outcome.not_run[reason] = outcome.not_run.get(reason, 0) + 1


def missing_package(text: str) -> str:
    """ "needs NAME" if a report speaks of a package that is indeed not installed; empty otherwise."""
    for match in MISSING.finditer(text):
        package = (match[1] or match[2]).partition(".")[0]
        if not (ROOT / package).exists() and find_spec(package) is None:
            return f"needs {package}, which is not installed"
    return ""
