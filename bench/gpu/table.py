"""What `bench.gpu` prints: tests, ceilings, a line a case and implementation, what failed, targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.gpu.floors import binding, rates
from bench.gpu.targets import CLOCKS, TARGETS, Row, ratio, taken_us

OURS = ("triton", "cuda", "triton again", "triton deterministic", "tarvis")


def table(about: Mapping[str, Any], rows: Sequence[Row]) -> str:
    machine = about["machine"]
    versions = f"torch {machine['torch']}, triton {machine['triton']}"
    parts = [
        f"{about['gpu']}, {versions}, {about['started']}",
        *tests(rows),
        *ceilings(rows),
        *times(rows),
        *memory(rows),
        *problems(rows),
        *targets(rows),
    ]
    return "\n".join(parts)


def tests(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in (row for row in rows if row["kind"] == "tests"):
        not_run = "".join(f"; {count} not run: {reason}" for reason, count in row["not_run"].items())
        lines.append(
            f"  {row['case']:60} {row['passed']:5} passed{not_run}"
            + "".join(f"\n    FAILED {test}" for test in row["failed"])
        )
    return ["", "tests", *lines] if lines else []


def ceilings(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if row["kind"] == "ceiling" and "rate" in row]
    lines = [f"  {row['case']:48} {row['rate']:9.2f} {row['unit']}" for row in found]
    return ["", "ceilings", *lines] if lines else []


def times(rows: Sequence[Row]) -> list[str]:
    """Microseconds by three clocks, compulsory bytes a second, share of the binding floor, ratios."""
    timed = [row for row in rows if row["kind"] == "time"]
    if not timed:
        return []
    rate = rates(rows)
    lines = [
        "",
        f"{'times in us':24}{'graph':>10}{'do_bench':>10}{'eager':>10}{'GB/s':>8}{'floor':>16}   ratios",
    ]
    for case in dict.fromkeys(row["case"] for row in timed):
        here = {row["impl"]: row for row in timed if row["case"] == case}
        lines.append(case)
        for impl, row in here.items():
            if "not_run" in row or "failed" in row:
                lines.append(f"  {impl:22}{row.get('not_run') or row['failed']}")
                continue
            numbers = "".join(f"{row[c]:10.1f}" if row.get(c) else f"{'-':>10}" for c in CLOCKS)
            lines.append(f"  {impl:22}{numbers}{_floor(row, rate)}   {_ratios(impl, here)}".rstrip())
    return lines


def _floor(row: Row, rate: Mapping[str, float]) -> str:
    taken, floor = taken_us(row), binding(row["amounts"], rate)
    if taken is None or floor is None:
        return f"{'':24}"
    speed = row["amounts"].get("dram_bytes", 0) / taken * 1e-3
    return f"{speed:8.0f}{floor[1] / taken:5.0%} {floor[0].partition('_')[0][:10]:10}"


def _ratios(impl: str, here: Mapping[str, Row]) -> str:
    """How many times as long every other takes, for those that are ours."""
    if impl not in OURS:
        return ""
    found = []
    for other, row in here.items():
        factor = None if other in OURS or "not_run" in row or "failed" in row else ratio(row, here[impl])
        if factor is not None:
            found.append(f"{other} {factor:.2f}x")
    return ", ".join(found)


def memory(rows: Sequence[Row]) -> list[str]:
    lines = [
        f"  {row['case']:64}{row['impl']:26}{row['bytes'] / 1e6:10.1f}"
        for row in rows
        if row["kind"] == "memory" and "bytes" in row
    ]
    return ["", "memory in MB", *lines] if lines else []


def problems(rows: Sequence[Row]) -> list[str]:
    """Gates that failed, sections that broke; how many gates passed or did not run."""
    gates = [row for row in rows if row["kind"] == "gate"]
    passed = sum(row.get("passed", False) for row in gates)
    skipped = sum("not_run" in row for row in gates)
    lines = ["", f"gates: {passed} passed, {len(gates) - passed - skipped} failed, {skipped} not run"]
    for row in gates:
        if not row.get("passed", "not_run" in row):
            found = row.get("failed") or f"{row['error']} > {row['limit']}"
            lines.append(f"  FAILED {row['case']}, {row['impl']}, {row['check']}: {found}")
    for row in rows:
        if row["kind"] == "section" and not row["ok"] and row["case"] != "tests":
            lines.append(f"  FAILED section {row['case']}: {row['failed']}\n{row['log'][-600:]}")
    return lines


def targets(rows: Sequence[Row]) -> list[str]:
    lines = ["", f"{'targets':72}{'must':>7}{'stretch':>9}{'found':>9}  verdict"]
    for target in TARGETS:
        found, verdict = target.verdict(rows)
        must = "-" if target.must == float("inf") else f"{target.must:g}"
        stretch = "-" if target.stretch is None else f"{target.stretch:g}"
        number = "-" if found is None else f"{found:.2f}"
        lines.append(f"{target.name:72}{must:>7}{stretch:>9}{number:>9}  {verdict}")
    return lines
