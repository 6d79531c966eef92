"""The tables of README.md (speed) and kernels/README.md (machine code), from the files in bench/results.

    python -m bench.report            # rewrites what stands between two markers in each page
    python -m bench.report --check    # ends with 1 if that would change anything
    python -m bench.report --condense raw.json   # of pytest-benchmark -> bench/results/kernels_cpu.json

`raw.json` comes from `pytest bench --benchmark-only --benchmark-json=raw.json`. Every row that was measured
is shown, those that we lose among them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.codegen import kernel_and_dtype
from bench.record import write_rows
from bench.targets import TARGETS, Row, binding, has_numbers, rates, ratio, reached, taken_us

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
COMMAND = "pytest bench --benchmark-only --benchmark-json=raw.json"
SIDES = ("tarvis", "transcription")
MAIN = ("triton", "tarvis")  # on a GPU: whom all others are compared with
SECONDS, MEGABYTES = "{:.2f} s", "{:.0f} MB"

Results = dict[str, Any]  # a file of bench/results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--condense", type=Path, metavar="RAW")
    parser.add_argument("--pages", type=Path, default=ROOT, help="folder of the pages")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.condense:
        write_rows(args.results / "kernels_cpu.json", *condense(json.loads(args.condense.read_text())))
        return 0
    outdated = 0
    for name, (marker, render) in PAGES.items():
        page = args.pages / name
        old = page.read_text()
        new = replaced(old, marker, render(args.results))
        if new != old and args.check:
            print(f"error: {page} is out of date: python -m bench.report", file=sys.stderr)
            outdated = 1
        elif new != old:
            page.write_text(new)
    return outdated


def replaced(text: str, marker: str, tables: str) -> str:
    """The text with new tables between <!-- marker --> and <!-- /marker -->.

    Raises:
        ValueError: the two are not there, each once and in order.
    """
    first, last = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, start, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not start or not end or first in rest or last in after:
        raise ValueError(f"expected {first} and {last} once each, in this order")
    return f"{before}{first}\n{tables}\n{last}{after}"


def speed(results: Path) -> str:
    parts = [render(json.loads(path.read_text())) for path, render in on_cpu(results)]
    if not (results / "kernels_cpu.json").exists():
        parts.append("Operators on a CPU: not yet measured.")
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("gpu_*.json"))]
    runs = [run for run in runs if run["machine"].get("gpu")]  # a rehearsal is none
    parts += [on_gpu(run) for run in runs] or ["On a GPU: not yet measured; `make gpu` measures it."]
    return "\n\n".join(parts)


def on_cpu(results: Path) -> list[tuple[Path, Callable[[Results], str]]]:
    """The files of results on a CPU, in the order of the page, and what renders each."""
    renders = {
        "model_cpu.json": model, "train_step_cpu.json": train_step, "postprocess_cpu.json": postprocess,
        "loader_cpu.json": loader, "kernels_cpu.json": operators,
    }  # fmt: skip
    return [(results / name, render) for name, render in renders.items() if (results / name).exists()]


def part(about: str, head: Sequence[str], rows: Iterable[Sequence[str]], found: Results) -> str:
    """What was measured, its table, and the command that measures it."""
    return f"{about}\n\n{markdown(head, rows)}\n\n    {found['command']}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_case(found: Results, *keys: str) -> dict[tuple[str, ...], dict[str, Any]]:
    return {tuple(row[key] for key in keys): row for row in found["results"]}


def threads(found: Results) -> str:
    return f"{found['machine']['threads']} threads of an {found['machine']['cpu']}"


def model(found: Results) -> str:
    frames, height, width = found["clip"]
    cases = by_case(found, "task", "implementation")
    rows = []
    for task, name in {"vis": "VIS", "vos": f"VOS with {found['objects']} objects"}.items():
        ours, theirs = (cases[task, implementation] for implementation in SIDES)
        rows += against(name, ours, theirs, "peak_above_model_mb")
    about = (
        f"`encode` + `decode` of {frames} frames of {height} x {width}, ResNet-50, {found['dtype']}, "
        f"{threads(found)}, torch {found['machine']['torch']}; medians of "
        f"{len(found['results'][0]['runs'])} fresh processes, memory above the model and its inputs:"
    )
    return part(about, ["", "this code", "transcription", "ratio"], rows, found)


def against(name: str, ours: dict[str, float], theirs: dict[str, float], memory: str) -> list[list[str]]:
    """Rows of time and of peak memory: ours, theirs, the ratio."""
    return [
        [
            f"{name}, {what}",
            form.format(ours[key]),
            form.format(theirs[key]),
            f"{ours[key] / theirs[key]:.2f}",
        ]
        for key, what, form in (("seconds", "time", SECONDS), (memory, "peak memory", MEGABYTES))
    ]


def train_step(found: Results) -> str:
    frames, height, width = found["clip"]
    cases = by_case(found, "task", "implementation")
    rows = []
    for task in ("vis", "vos"):
        plain = cases[task, "transcription"]
        for key, what, form in (
            ("seconds", "time", SECONDS),
            ("step_mb", "peak memory of the step", MEGABYTES),
            ("decoder_mb", "of that, decoder and losses", MEGABYTES),
        ):
            ours = [cases[task, implementation][key] for implementation in ("tarvis", "checkpointed")]
            cells = [f"{form.format(value)} ({value / plain[key]:.2f})" for value in ours]
            rows.append([f"{task.upper()}, {what}", *cells, form.format(plain[key])])
    about = (
        f"A training step with {found['objects']} objects in {frames} frames of {height} x {width}, "
        f"ResNet-50, {found['dtype']}, {threads(found)}, "
        f"torch {found['machine']['torch']}; medians of {len(found['results'][0]['runs'])} fresh processes "
        "and, in brackets, shares of the transcription, which makes the logits of all queries. Memory is "
        "above model, optimiser and inputs; that of decoder and losses above `encode`:"
    )
    return part(about, ["", "this code", "with checkpointed layers", "transcription"], rows, found)


def postprocess(found: Results) -> str:
    frames, height, width = found["clip"]
    rows = [
        line
        for row in found["rows"]
        for line in against(row["case"], row["tarvis"], row["transcription"], "peak_mb")
    ]
    about = (
        f"From logits to labels and masks of {frames} frames of {height} x {width}, {threads(found)}; "
        f"medians of {found['repeats']} fresh processes, memory above the inputs:"
    )
    return part(about, ["", "this code", "transcription", "ratio"], rows, found)


def loader(found: Results) -> str:
    cases = by_case(found, "kind", "side")
    names = {"youtube_vis": "YouTube-VIS, 720p", "vipseg": "VIPSeg, 720p", "coco": "COCO, moving crops"}
    faster = ("speedup", "speedup_by_cpu")
    rows = [
        [
            name,
            *(number(cases[kind, side]["clips_per_s"]) for side in SIDES),
            *(f"{found[key][kind]:.1f}" for key in faster),
        ]
        for kind, name in names.items()
    ]
    rows.append(["mixed as in fine-tuning", "", "", *(f"{found[key]['fine-tuning']:.1f}" for key in faster)])
    about = (
        f"Training clips of {found['frames']} frames a second, from files of the sizes of these sets, by "
        f"{found['workers']} worker processes on {found['machine']['cores']} cores of an "
        f"{found['machine']['cpu']}; how many times as fast that is, by the clock and by the processor's "
        "time:"
    )
    head = ["", "this code", "transcription", "by the clock", "by processor time"]
    return part(about, head, rows, found)


def operators(found: Results) -> str:
    """A line a case: plain PyTorch, which is what runs on a CPU, the same compiled, and what others do."""
    cases: dict[str, dict[str, float]] = {}
    for row in found["rows"]:
        cases.setdefault(row["case"], {})[row["impl"]] = row["median_ms"]
    rows = []
    for case, times in cases.items():
        ours = [number(times.pop(impl, None)) for impl in ("reference", "compiled")]
        rows.append([case, *ours, ", ".join(f"{impl} {number(time)}" for impl, time in times.items())])
    about = (
        f"Operators at small sizes, {threads(found)}, "
        f"torch {found['machine']['torch']}, median milliseconds of our reference, which is what runs on a "
        "CPU, of the same under `torch.compile`, and of other ways to compute it:"
    )
    return part(about, ["", "reference", "compiled", "others"], rows, found)


# On a GPU


def on_gpu(found: Results) -> str:
    """Targets with what was found, ceilings, our implementations against every other, memory."""
    about = (
        f"Operators on one {found['gpu']}, torch {found['machine']['torch']}, Triton "
        f"{found['machine']['triton']}, CUDA graphs (`{found['command']}`, {found['started']}):"
    )
    reached = []
    for target in TARGETS:
        value, verdict = target.verdict(found["rows"])
        limits = ["" if x is None else f"{x:g}{target.unit}" for x in (target.must, target.stretch)]
        reached.append([target.name, *limits, "" if value is None else f"{value:.2f}{target.unit}", verdict])
    tables = [
        (["target", "must", "stretch", "found", ""], reached),
        (["ceiling", "rate"], ceilings(found["rows"])),
        (["", "us", "as Python calls it", "of the floor", "times as long"], speeds(found["rows"])),
        (["memory in MB", "", "times as much"], memory(found["rows"])),
    ]
    return "\n\n".join([about, *(markdown(head, rows) for head, rows in tables if rows)])


def ceilings(rows: Sequence[Row]) -> list[list[str]]:
    return [
        [row["case"], f"{row['rate']:.2f} {row['unit']}"]
        for row in rows
        if row["kind"] == "ceiling" and has_numbers(row)
    ]


def speeds(rows: Sequence[Row]) -> list[list[str]]:
    """A line a case that we ran: times, share of the binding floor, how much longer others take."""
    rate, lines = rates(rows), []
    timed = [row for row in rows if row["kind"] == "time" and has_numbers(row)]
    for ours in (row for row in timed if row["impl"] in MAIN):
        others = [
            (row["impl"], ratio(row, ours))
            for row in timed
            if row["case"] == ours["case"] and row is not ours
        ]
        taken, share, floor = taken_us(ours), reached(ours, rate), binding(ours["amounts"], rate)
        lines.append(
            [
                ours["case"],
                "" if taken is None else f"{taken:.0f}",
                "" if ours.get("eager_us") is None else f"{ours['eager_us']:.0f}",
                "" if share is None or floor is None else f"{share:.0%} {floor[0]}",
                ", ".join(f"{name} {factor:.2f}" for name, factor in others if factor is not None),
            ]
        )
    return lines


def memory(rows: Sequence[Row]) -> list[list[str]]:
    measured = [row for row in rows if row["kind"] == "memory" and has_numbers(row)]
    lines = []
    for ours in (row for row in measured if row["impl"] in MAIN and row["bytes"]):
        others = [row for row in measured if row["case"] == ours["case"] and row is not ours]
        factors = ", ".join(f"{row['impl']} {row['bytes'] / ours['bytes']:.2f}" for row in others)
        lines.append([ours["case"], f"{ours['bytes'] / 1e6:.1f}", factors])
    return lines


def problems(rows: Sequence[Row]) -> list[str]:
    """How tests and gates went; what failed or broke, a line each; why times are missing."""
    lines = []
    for row in (row for row in rows if row["kind"] == "tests"):
        lines.append(f"tests: {row['passed']} passed, {len(row['failed'])} failed")
        lines += [f"  {line}" for line in row["failed"]]
        lines += [f"  {count} not run: {reason}" for reason, count in row["not_run"].items()]
    gates = [row for row in rows if row["kind"] == "gate"]
    passed = sum(row.get("passed", False) for row in gates)
    skipped = sum("not_run" in row for row in gates)
    lines.append(f"gates: {passed} passed, {len(gates) - passed - skipped} failed, {skipped} not run")
    for row in gates:
        if not row.get("passed", "not_run" in row):
            why = row.get("failed") or f"{row['error']} > {row['limit']}"
            lines.append(f"  FAILED {row['case']}, {row['impl']}, {row['check']}: {why}")
    for row in rows:
        if row["kind"] == "section" and "failed" in row:
            lines.append(f"FAILED section {row['case']}: {row['failed']}\n{row['log'][-600:]}")
        elif row["kind"] in ("time", "memory") and "failed" in row:
            lines.append(f"FAILED {row['case']}, {row['impl']}: {row['failed']}")
    reasons = Counter(row["not_run"] for row in rows if row["kind"] == "time" and "not_run" in row)
    return [*lines, *(f"{count} times not measured: {reason}" for reason, count in reasons.items())]


# Machine code


WIDE = ("LDG.128", "LDG.64", "LDGSTS", "STG.128", "REDG.ADD.F32x4", "HGMMA")


def machine_code(results: Path) -> str:
    """A line a kernel: registers and instructions in its first variant of two dtypes, per Triton version."""
    table = json.loads((results / "codegen.json").read_text())
    newest = max(table, key=lambda version: [*map(int, version.split("."))])
    first: dict[str, dict[str, str]] = {}  # kernel -> dtype -> variant
    for name in table[newest]:
        kernel, dtype = kernel_and_dtype(name)
        first.setdefault(kernel, {}).setdefault(dtype, name)
    columns = [(version, dtype) for version in table for dtype in ("bf16", "fp32")]
    rows = []
    for kernel, variants in first.items():
        cells = []
        for version, dtype in columns:
            found = table[version].get(variants.get(dtype, ""))
            cells.append(f"{found['registers']} / {found['instructions']}" if found else "")
        kinds = table[newest][variants.get("bf16") or next(iter(variants.values()))]["kinds"]
        wide = {kind: sum(n for name, n in kinds.items() if name.startswith(kind)) for kind in WIDE}
        rows.append([f"`{kernel}`", *cells, ", ".join(f"{n} {kind}" for kind, n in wide.items() if n)])
    head = ["", *(f"{version}, {dtype}" for version, dtype in columns), "wide instructions, bf16"]
    return markdown(head, rows)


# page -> what stands around its tables, and what writes them
PAGES = {"README.md": ("speed", speed), "kernels/README.md": ("codegen", machine_code)}


def number(value: float | None) -> str:
    """Three digits that count."""
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def condense(raw: Results) -> tuple[Results, list[Results]]:
    """Machine and versions, and one median a case and implementation, from a file of pytest-benchmark."""
    rows = [
        {
            "case": benchmark["group"],
            "impl": benchmark["params"]["impl"],
            "median_ms": float(f"{benchmark['stats']['median'] * 1e3:.4g}"),
            "rounds": benchmark["stats"]["rounds"],
        }
        for benchmark in raw["benchmarks"]
        if benchmark["name"].startswith("test_operator[")
    ]
    return {"command": COMMAND, "machine": raw["machine"], "date": raw["datetime"][:10]}, rows


if __name__ == "__main__":
    sys.exit(main())
