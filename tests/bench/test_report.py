"""README's tables come from the result files."""

import json

import pytest

from bench import report

MACHINE = {"cpu": "a CPU", "threads": 2, "torch": "2.13.0", "triton": "3.6.0"}


def compiled(registers, instructions):
    kinds = {"LDG.128": 6, "LDG.128.CTA": 2, "LDG": 5}
    return {"registers": registers, "stack": 0, "local": 0, "instructions": instructions, "kinds": kinds}


CODEGEN = {
    "3.10.0": {"op bf16 sm_90": compiled(40, 300), "op fp32 sm_90": compiled(50, 400)},
    "3.9.0": {"op bf16 sm_90": compiled(41, 310)},
}


def model_file():
    def row(task, implementation, seconds):
        numbers = {"seconds": seconds, "peak_mb": 900.0, "peak_above_model_mb": 100 * seconds}
        return {"task": task, "implementation": implementation, **numbers, "runs": [numbers] * 5}

    rows = [
        row(task, name, t) for task in ("vis", "vos") for name, t in (("tarvis", 3), ("transcription", 6))
    ]
    return {
        "command": "python -m bench.bench_model", "clip": [6, 256, 448], "dtype": "float32", "objects": 3,
        "machine": MACHINE, "results": rows,
    }  # fmt: skip


def train_step_file():
    def row(task, implementation, seconds):
        numbers = {"seconds": seconds, "step_mb": 100 * seconds, "decoder_mb": 10 * seconds}
        return {"task": task, "implementation": implementation, **numbers, "runs": [numbers] * 3}

    times = {"tarvis": 3, "checkpointed": 4, "transcription": 8}
    rows = [row(task, name, seconds) for task in ("vis", "vos") for name, seconds in times.items()]
    return {
        "command": "python -m bench.bench_train_step", "clip": [3, 256, 448], "dtype": "float32",
        "objects": 4, "machine": MACHINE, "results": rows,
    }  # fmt: skip


def postprocess_file():
    row = {"tarvis": {"seconds": 1, "peak_mb": 50}, "transcription": {"seconds": 4, "peak_mb": 500}}
    return {
        "command": "python -m bench.bench_postprocess", "clip": [12, 720, 1280], "repeats": 3,
        "machine": MACHINE, "rows": [{"case": "labels", **row}],
    }  # fmt: skip


def gpu_file():
    case = {"kind": "time", "case": "msda forward 12x480x864 bf16 2px"}
    return {
        "command": "python3 -m bench.gpu",
        "gpu": "NVIDIA H200",
        "started": "2026-01-01",
        "machine": {**MACHINE, "gpu": "NVIDIA H200"},
        "rows": [
            {
                **case,
                "impl": "triton",
                "graph_us": 200.0,
                "eager_us": 250.0,
                "amounts": {"dram_bytes": 430e6},
            },
            {**case, "impl": "classic", "graph_us": 1000.0, "amounts": {}},
            {**case, "impl": "cuda", "not_run": "no nvcc"},
        ],
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model_cpu.json").write_text(json.dumps(model_file()))
    (tmp_path / "README.md").write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    (tmp_path / "codegen.json").write_text(json.dumps(CODEGEN))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/README.md").write_text("<!-- codegen -->\n<!-- /codegen -->\n")
    return tmp_path


def run(folder, *options):
    return report.main(["--pages", str(folder), "--results", str(folder), *options])


def test_the_tables_are_written_between_the_markers(folder):
    assert run(folder, "--check") == 1
    assert run(folder) == 0
    assert run(folder, "--check") == 0
    text = (folder / "README.md").read_text()
    assert text.startswith("before\n<!-- speed -->\n`encode`")
    assert text.endswith("<!-- /speed -->\nafter\n")
    assert "| VIS, time | 3.00 s | 6.00 s | 0.50 |" in text
    assert "| VOS with 3 objects, peak memory | 300 MB | 600 MB | 0.50 |" in text
    assert "Operators on a CPU: not yet measured." in text
    assert "On a GPU: not yet measured" in text


def test_training_and_postprocessing_are_shown_where_they_were_measured(folder):
    assert "training step" not in report.speed(folder)
    (folder / "train_step_cpu.json").write_text(json.dumps(train_step_file()))
    (folder / "postprocess_cpu.json").write_text(json.dumps(postprocess_file()))
    text = report.speed(folder)
    assert "| VIS, time | 3.00 s (0.38) | 4.00 s (0.50) | 8.00 s |" in text
    assert "| VOS, of that, decoder and losses | 30 MB (0.38) | 40 MB (0.50) | 80 MB |" in text
    assert "medians of 3 fresh processes" in text
    assert "| labels, time | 1.00 s | 4.00 s | 0.25 |" in text
    assert "| labels, peak memory | 50 MB | 500 MB | 0.10 |" in text


def test_a_run_on_a_gpu_is_shown_and_a_rehearsal_is_not(folder):
    (folder / "gpu_rehearsal_on_cpu.json").write_text(json.dumps({"machine": MACHINE, "rows": []}))
    assert "not yet measured; `make gpu`" in report.speed(folder)
    (folder / "gpu_nvidia_h200.json").write_text(json.dumps(gpu_file()))
    text = report.speed(folder)
    assert "not yet measured; `make gpu`" not in text
    assert "| msda forward 12x480x864 bf16 2px | 200 | 250 | 50% dram_bytes | classic 5.00 |" in text
    assert "against classic fp32 | 4x | 6x | 5.00x | met |" in text
    assert "not run |" in text


def test_markers_that_are_missing_or_doubled_are_an_error():
    start, end = "<!-- speed -->", "<!-- /speed -->"
    for text in ("nothing", end + start, start * 2 + end):
        with pytest.raises(ValueError, match="once each"):
            report.replaced(text, "speed", "")


def test_machine_code_is_a_line_a_kernel(folder):
    run(folder)
    text = (folder / "kernels/README.md").read_text()
    assert "| `op` | 40 / 300 | 50 / 400 | 41 / 310 |  | 8 LDG.128 |" in text


def test_a_file_of_pytest_benchmark_is_condensed(folder):
    def benchmark(name, impl, median):
        return {
            "name": name, "group": "mask_bits 4x5", "params": {"case": "mask_bits 4x5", "impl": impl},
            "stats": {"median": median, "rounds": 7, "data": [median] * 7},
        }  # fmt: skip

    raw = {
        "machine": MACHINE,
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [
            benchmark("test_operator[mask_bits 4x5-reference]", "reference", 0.0012345),
            benchmark("test_operator[mask_bits 4x5-compiled]", "compiled", 0.25),
            benchmark("test_operator[mask_bits 4x5-chain]", "chain", 0.5),
            benchmark("test_encode[tarvis]", "tarvis", 0.2),
        ],
    }
    (folder / "raw.json").write_text(json.dumps(raw))
    assert run(folder, "--condense", str(folder / "raw.json")) == 0
    small = json.loads((folder / "kernels_cpu.json").read_text())
    assert small["date"] == "2026-01-02"
    assert small["rows"][0] == {
        "case": "mask_bits 4x5", "impl": "reference", "median_ms": 1.234, "rounds": 7,
    }  # fmt: skip
    assert "| mask_bits 4x5 | 1.23 | 250 | chain 500 |" in report.speed(folder)


def test_pages_are_up_to_date():
    assert report.main(["--check"]) == 0
