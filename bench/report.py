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
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.codegen import kernel_and_dtype
from bench.gpu.floors import binding, rates
from bench.gpu.targets import TARGETS, ratio, taken_us

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
COMMAND = "pytest bench --benchmark-only --benchmark-json=raw.json"


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
        small = condense(json.loads(args.condense.read_text()))
        rows = ",\n".join(f"  {json.dumps(row)}" for row in small.pop("rows"))
        head = json.dumps(small, indent=1).removesuffix("\n}")
        (args.results / "kernels_cpu.json").write_text(f'{head},\n "rows": [\n{rows}\n ]\n}}\n')
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
    parts = []
    for name, render in (
        ("model_cpu.json", model_on_cpu),
        ("train_step_cpu.json", train_step_on_cpu),
        ("postprocess_cpu.json", postprocess_on_cpu),
        ("loader_cpu.json", loader_on_cpu),
    ):
        if (results / name).exists():
            parts.append(render(json.loads((results / name).read_text())))
    operators = results / "kernels_cpu.json"
    if operators.exists():
        parts.append(operators_on_cpu(json.loads(operators.read_text())))
    else:
        parts.append("Operators on a CPU: not yet measured.")
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("gpu_*.json"))]
    runs = [run for run in runs if run["machine"].get("gpu")]  # a rehearsal is none
    parts += [on_gpu(run) for run in runs] or ["On a GPU: not yet measured; `make gpu` measures it."]
    return "\n\n".join(parts)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def model_on_cpu(found: dict[str, Any]) -> str:
    frames, height, width = found["clip"]
    machine = found["machine"]
    by_case = {(row["task"], row["implementation"]): row for row in found["results"]}
    names = {"vis": "VIS", "vos": f"VOS with {found['objects']} objects"}
    rows = []
    for task, name in names.items():
        ours, theirs = (by_case[task, implementation] for implementation in ("tarvis", "transcription"))
        for key, what, form in (
            ("seconds", "time", "{:.2f} s"),
            ("peak_above_model_mb", "peak memory", "{:.0f} MB"),
        ):
            a, b = ours[key], theirs[key]
            rows.append([f"{name}, {what}", form.format(a), form.format(b), f"{a / b:.2f}"])
    about = (
        f"`encode` + `decode` of {frames} frames of {height} x {width}, ResNet-50, {found['dtype']}, "
        f"{machine['threads']} threads of an {machine['cpu']}, torch {machine['torch']}; medians of "
        f"{len(found['results'][0]['runs'])} fresh processes, memory above the model and its inputs:"
    )
    table = markdown(["", "this code", "transcription", "ratio"], rows)
    return f"{about}\n\n{table}\n\n    {found['command']}"


def train_step_on_cpu(found: dict[str, Any]) -> str:
    frames, height, width = found["clip"]
    machine = found["machine"]
    by_case = {(row["task"], row["implementation"]): row for row in found["results"]}
    rows = []
    for task in ("vis", "vos"):
        plain = by_case[task, "transcription"]
        for key, what, form in (
            ("seconds", "time", "{:.2f} s"),
            ("step_mb", "peak memory of the step", "{:.0f} MB"),
            ("decoder_mb", "of that, decoder and losses", "{:.0f} MB"),
        ):
            cells = [f"{task.upper()}, {what}"]
            for implementation in ("tarvis", "checkpointed"):
                value = by_case[task, implementation][key]
                cells.append(f"{form.format(value)} ({value / plain[key]:.2f})")
            rows.append([*cells, form.format(plain[key])])
    about = (
        f"A training step with {found['objects']} objects in {frames} frames of {height} x {width}, "
        f"ResNet-50, {found['dtype']}, {machine['threads']} threads of an {machine['cpu']}, "
        f"torch {machine['torch']}; medians of {len(found['results'][0]['runs'])} fresh processes and, in "
        "brackets, shares of the transcription, which makes the logits of all queries. Memory is above "
        "model, optimiser and inputs; that of decoder and losses above `encode`:"
    )
    table = markdown(["", "this code", "with checkpointed layers", "transcription"], rows)
    return f"{about}\n\n{table}\n\n    {found['command']}"


def postprocess_on_cpu(found: dict[str, Any]) -> str:
    frames, height, width = found["clip"]
    machine = found["machine"]
    rows = []
    for row in found["rows"]:
        for key, what, form in (("seconds", "time", "{:.2f} s"), ("peak_mb", "peak memory", "{:.0f} MB")):
            a, b = row["tarvis"][key], row["transcription"][key]
            rows.append([f"{row['case']}, {what}", form.format(a), form.format(b), f"{a / b:.2f}"])
    about = (
        f"From logits to labels and masks of {frames} frames of {height} x {width}, {machine['threads']} "
        f"threads of an {machine['cpu']}; medians of {found['repeats']} fresh processes, memory above the "
        "inputs:"
    )
    table = markdown(["", "this code", "transcription", "ratio"], rows)
    return f"{about}\n\n{table}\n\n    {found['command']}"


def loader_on_cpu(found: dict[str, Any]) -> str:
    machine = found["machine"]
    names = {"youtube_vis": "YouTube-VIS, 720p", "vipseg": "VIPSeg, 720p", "coco": "COCO, moving crops"}
    by_case = {(row["kind"], row["side"]): row["clips_per_s"] for row in found["results"]}
    rows = [
        [
            name,
            *(number(by_case[kind, side]) for side in ("tarvis", "transcription")),
            *(f"{found[key][kind]:.1f}" for key in ("speedup", "speedup_by_cpu")),
        ]
        for kind, name in names.items()
    ]
    mixed = [f"{found[key]['fine-tuning']:.1f}" for key in ("speedup", "speedup_by_cpu")]
    rows.append(["mixed as in fine-tuning", "", "", *mixed])
    about = (
        f"Training clips of {found['frames']} frames a second, from files of the sizes of these sets, by "
        f"{found['workers']} worker processes on {machine['cores']} cores of an {machine['cpu']}; how many "
        "times as fast that is, by the clock and by the processor's time:"
    )
    table = markdown(["", "this code", "transcription", "by the clock", "by processor time"], rows)
    return f"{about}\n\n{table}\n\n    {found['command']}"


def operators_on_cpu(found: dict[str, Any]) -> str:
    """A line a case: plain PyTorch, which is what runs on a CPU, the same compiled, and what others do."""
    machine = found["machine"]
    cases: dict[str, dict[str, float]] = {}
    for row in found["rows"]:
        cases.setdefault(row["case"], {})[row["impl"]] = row["median_ms"]
    rows = []
    for case, times in cases.items():
        others = {impl: time for impl, time in times.items() if impl not in ("reference", "compiled")}
        listed = ", ".join(f"{impl} {number(time)}" for impl, time in others.items())
        rows.append([case, number(times.get("reference")), number(times.get("compiled")), listed])
    about = (
        f"Operators at small sizes, {machine['threads']} threads of an {machine['cpu']}, "
        f"torch {machine['torch']}, median milliseconds of our reference, which is what runs on a CPU, "
        "of the same under `torch.compile`, and of other ways to compute it:"
    )
    return f"{about}\n\n{markdown(['', 'reference', 'compiled', 'others'], rows)}\n\n    {found['command']}"


def on_gpu(found: dict[str, Any]) -> str:
    """Targets with what was found, then our kernels against every baseline."""
    machine, rows = found["machine"], found["rows"]
    about = (
        f"Operators on one {found['gpu']}, torch {machine['torch']}, Triton {machine['triton']}, CUDA graphs "
        f"(`{found['command']}`, {found['started']}):"
    )
    reached = []
    for target in TARGETS:
        value, verdict = target.verdict(rows)
        must = "" if target.must == float("inf") else f"{target.must:g}{target.unit}"
        stretch = "" if target.stretch is None else f"{target.stretch:g}{target.unit}"
        value_text = "" if value is None else f"{value:.2f}{target.unit}"
        reached.append([target.name, must, stretch, value_text, verdict])
    targets = markdown(["target", "must", "stretch", "found", ""], reached)
    return f"{about}\n\n{targets}\n\n{markdown(['', 'us', 'of the floor', 'times as long'], speeds(rows))}"


def speeds(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A line a case that Triton ran: time, share of the binding floor, how much longer others take."""
    rate = rates(rows)
    timed = [row for row in rows if row["kind"] == "time" and "not_run" not in row and "failed" not in row]
    lines = []
    for ours in (row for row in timed if row["impl"] in ("triton", "tarvis")):
        taken, floor = taken_us(ours), binding(ours["amounts"], rate)
        others = [row for row in timed if row["case"] == ours["case"] and row is not ours]
        ratios = [(row["impl"], ratio(row, ours)) for row in others]
        lines.append(
            [
                ours["case"],
                "" if taken is None else f"{taken:.0f}",
                "" if taken is None or floor is None else f"{floor[1] / taken:.0%}",
                ", ".join(f"{name} {factor:.2f}" for name, factor in ratios if factor is not None),
            ]
        )
    return lines


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


def condense(raw: dict[str, Any]) -> dict[str, Any]:
    """Machine, versions and one median a benchmark of an operator, from a file of pytest-benchmark.

    Operators are the groups that have an implementation called "reference".
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for benchmark in raw["benchmarks"]:
        groups.setdefault(benchmark["group"] or "", []).append(benchmark)
    rows = []
    for group, benchmarks in groups.items():
        named = [(benchmark, *split_name(benchmark)) for benchmark in benchmarks]
        several = len({function for _, function, _, _ in named}) > 1
        if "reference" not in {impl for _, _, impl, _ in named}:
            continue
        for benchmark, function, impl, parts in named:
            fresh = [part for part in parts if part not in re.split(r"[ ,]+", group)]
            case = " ".join([f"{group}," if several or fresh else group, *[function] * several, *fresh])
            median = float(f"{benchmark['stats']['median'] * 1e3:.4g}")
            rows.append(
                {"case": case, "impl": impl, "median_ms": median, "rounds": benchmark["stats"]["rounds"]}
            )
    return {"command": COMMAND, "machine": raw["machine"], "date": raw["datetime"][:10], "rows": rows}


def split_name(benchmark: dict[str, Any]) -> tuple[str, str, list[str]]:
    """("forward", "reference", ["240x432"]) of test_forward[reference-240x432]."""
    function, _, inside = benchmark["name"].partition("[")
    parts = inside.removesuffix("]").split("-") if inside else []
    params = benchmark.get("params") or {}
    impl = str(params.get("impl") or params.get("implementation") or "")
    if impl in parts:
        parts.remove(impl)
    return function.removeprefix("test_").replace("_", " "), impl, parts


if __name__ == "__main__":
    sys.exit(main())
