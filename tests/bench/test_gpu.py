"""The GPU benchmark without a GPU: every section rehearsed, and what holds them together."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu import deform_attn, floors, masks, measure, model, suite, table, targets
from bench.gpu.protocol import OUT_OF_TIME, Recorder, relative
from kernels import dispatch

SECTIONS = ["forward", "backward", "bits", "attention", "upsample", "matching"]


def rehearse(section, over=lambda: False):
    """The rows of a section with tiny shapes on the CPU."""
    rows = []
    module, function, _ = gpu.SECTIONS[section]
    run = getattr(__import__(module, fromlist=[function]), function)
    run(Recorder("cpu", True, over, rows.append))
    return rows


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    monkeypatch.setattr(measure, "EAGER_SECONDS", 0.001)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_passes_its_gates_and_times_what_it_can(section):
    rows = rehearse(section)
    gates = [row for row in rows if row["kind"] == "gate" and "not_run" not in row]
    if dispatch.INTERPRETED:
        assert gates
        assert {row["impl"] for row in gates} == {"triton"}
    for row in gates:
        assert row["passed"], row
    timed = [row for row in rows if row["kind"] == "time"]
    assert not [row for row in timed if "failed" in row]
    assert {row["impl"] for row in timed if "eager_us" in row} > {"reference"}  # and a baseline
    for row in timed:
        if dispatch.INTERPRETED and row["impl"] == "triton":
            assert row["not_run"] == "interpreted Triton is not timed"
        assert all(amount > 0 for amount in row.get("amounts", {}).values())
    assert json.loads(json.dumps(rows)) == rows
    about = {"gpu": "none", "started": "", "machine": {"torch": "", "triton": ""}}
    assert table.table(about, rows)


def test_the_model_section_compares_the_implementations(monkeypatch):
    monkeypatch.setattr(model, "prepare", lambda *_, **__: lambda: torch.zeros(1))
    rows = rehearse("model")
    names = {row["impl"] for row in rows if row["kind"] == "time"}
    assert names == {"tarvis", "tarvis plain PyTorch", "transcription"}


def test_nothing_starts_when_time_is_up():
    rows = rehearse("bits", over=lambda: True)
    reasons = {row.get("not_run") for row in rows}
    assert None not in reasons
    assert OUT_OF_TIME in reasons


def test_a_gate_that_fails_keeps_its_implementation_from_being_timed():
    rows = []
    record = Recorder("cpu", True, lambda: False, rows.append)
    assert not record.gate("case", "triton", "error", lambda: float("nan"), 1.0)
    assert not record.gate("case", "cuda", "error", lambda: 1 / 0, 1.0)
    assert record.gate("case", "reference", "error", lambda: 0.5, 1.0)
    for impl in ("triton", "cuda", "reference"):
        record.time("case", impl, torch.neg, [(torch.ones(1),)])
    assert [row.get("not_run") for row in rows[3:]] == ["its gate failed", "its gate failed", None]
    assert rows[1]["failed"].startswith("ZeroDivisionError")


def test_a_difference_hands_on_why_it_is_missing():
    rows = []
    record = Recorder("cpu", True, lambda: False, rows.append)
    whole = {"graph_us": 5.0, "bench_us": None, "eager_us": 7.0}
    row = record.difference("case", "triton", whole, {"graph_us": 2.0, "eager_us": 3.0}, {})
    assert (row["graph_us"], row["bench_us"], row["eager_us"]) == (3.0, None, 4.0)
    row = record.difference("case", "triton", {"failed": "no memory"}, {"graph_us": 2.0}, {})
    assert row["failed"] == "no memory"


def test_relative_error_counts_only_what_is_asked_for():
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0])
    assert relative(x, y) > 0.5
    assert relative(x, y, torch.tensor([True, False])) == 0


# the command


def test_the_command_writes_json_as_it_goes_and_ends_with_zero(tmp_path, capsys):
    code = gpu.main(["--device", "cpu", "--smoke", "--only", "ceilings", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "gpu_rehearsal_on_cpu.json").read_text())
    assert code == 0
    assert [row["case"] for row in found["rows"]] == ["copy", "matmul bf16", "ceilings"]
    assert found["rows"][-1]["ok"]
    assert found["machine"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "TFLOP/s" in printed
    assert "not run" in printed  # the targets


def test_a_section_that_takes_too_long_is_ended_and_recorded(tmp_path):
    results = gpu.Results(tmp_path / "out.json", {})
    args = gpu.parse(["--device", "cpu", "--smoke"])
    row = gpu.run_child(results, "ceilings", 0.2 - gpu.GRACE, args)
    assert row["ok"] is False
    assert row["failed"] == "killed: out of time"


def test_a_section_that_breaks_is_recorded_with_its_last_words(tmp_path):
    results = gpu.Results(tmp_path / "out.json", {})
    args = gpu.parse(["--device", "cpu", "--smoke"])
    args.device = "nowhere"
    row = gpu.run_child(results, "ceilings", 100, args)
    assert row["failed"] == "ended with 2"
    assert "invalid choice: 'nowhere'" in row["log"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_ends_with_two(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_rows_are_taken_over_line_by_line(tmp_path):
    results = gpu.Results(tmp_path / "out.json", {"gpu": "none"})
    rows = tmp_path / "rows"
    rows.write_text('{"kind": "time", "case": "a"}\n{"kind": "ti')
    with rows.open() as incoming:
        gpu.take(results, incoming)
        assert [row["case"] for row in results.rows] == ["a"]
        with rows.open("a") as more:
            more.write('me", "case": "b"}\n')
        gpu.take(results, incoming)
    assert [row["case"] for row in results.rows] == ["a", "b"]
    assert json.loads((tmp_path / "out.json").read_text()) == {"gpu": "none", "rows": results.rows}


@pytest.mark.parametrize(
    ("row", "passed"),
    [
        ({"kind": "gate", "passed": True}, True),
        ({"kind": "gate", "passed": False}, False),
        ({"kind": "gate", "not_run": "Triton is not installed"}, True),
        ({"kind": "gate", "not_run": OUT_OF_TIME}, False),
        ({"kind": "tests", "ok": False}, False),
        ({"kind": "section", "ok": False}, False),
        ({"kind": "time", "failed": "out of memory"}, True),
    ],
)
def test_only_tests_gates_and_broken_sections_decide_the_exit_code(tmp_path, row, passed):
    results = gpu.Results(tmp_path / "out.json", {})
    results.rows.append(row)
    assert results.passed is passed


def test_unknown_sections_are_refused():
    with pytest.raises(SystemExit):
        gpu.parse(["--only", "forward,nothing"])
    assert gpu.parse(["--only", "backward,forward"]).only == ["forward", "backward"]


# the tests it runs


def test_files_with_gpu_tests_are_found():
    found = list(suite.files())
    names = [name for name, _ in found]
    assert names.count("tests/kernels/test_ms_deform_attn.py") == suite.PARTS
    assert "tests/parity/test_model.py" in names
    assert ("tests/tarvis/model/test_gpu.py", ("-m", "gpu")) in found
    assert "tests/tarvis/test_rle.py" not in names
    assert "tests/kernels/test_codegen.py" not in names


def test_what_needs_a_missing_package_is_not_run_and_the_rest_is_told_apart():
    outcome = suite.read_report(
        "tests/test_x.py",
        """<testsuites><testsuite>
        <testcase name="good"/>
        <testcase name="bad"><failure message="AssertionError: 1 != 2">E assert</failure></testcase>
        <testcase name="import"><error message="collection failure">
            E ModuleNotFoundError: No module named 'no_such_package.part'</error></testcase>
        <testcase name="late"><failure message="E: No module named 'no_such_package'"/></testcase>
        <testcase name="skip"><skipped message="could not import 'no_such_package': No module"/></testcase>
        <testcase name="why"><skipped message="no nvcc"/></testcase>
        <testcase name="ours"><error message="E: No module named 'kernels.nothing'"/></testcase>
        </testsuite></testsuites>""",
    )
    assert outcome.passed == 1
    assert [line.partition(":")[0] for line in outcome.failed] == ["bad", "ours"]
    assert outcome.not_run == {"needs no_such_package, which is not installed": 3, "no nvcc": 1}


def test_a_test_file_is_run_in_a_process_of_its_own(tmp_path):
    path = tmp_path / "test_something.py"
    path.write_text(
        "import os\n"
        "def test_good(): assert 'TRITON_INTERPRET' not in os.environ\n"
        "def test_bad(): assert False, 'on purpose'\n"
        "def test_needs_a_package(): import no_such_package\n"
    )
    rows = []
    assert not suite.run(100, rows.append, [(str(path), ())])
    (row,) = rows
    assert (row["passed"], row["ok"]) == (1, False)
    assert row["failed"][0].startswith("test_bad: AssertionError: on purpose")
    assert row["not_run"] == {"needs no_such_package, which is not installed": 1}


def test_the_parts_of_a_file_are_all_of_it(tmp_path):
    path = tmp_path / "test_something.py"
    path.write_text("import pytest\n@pytest.mark.parametrize('i', range(5))\ndef test_it(i): assert i != 3\n")
    rows = []
    suite.run(100, rows.append, [(str(path), (f"--part={part}/2",)) for part in (1, 2)])
    parts = {row["case"].rpartition("=")[2]: row for row in rows}
    assert (parts["1/2"]["passed"], len(parts["1/2"]["failed"])) == (3, 0)
    assert (parts["2/2"]["passed"], len(parts["2/2"]["failed"])) == (1, 1)


def test_test_files_that_there_is_no_time_for_count_as_failed():
    rows = []
    assert not suite.run(0, rows.append, [("tests/kernels/test_dispatch.py", ())])
    assert rows[0]["failed"] == ["not started: out of time"]


# floors and targets


def test_the_table_shows_every_kind_of_row():
    case = {"case": "msda", "amounts": {"dram_bytes": 430e6}}
    rows = [
        {
            "kind": "tests",
            "ok": False,
            **vars(suite.Outcome("tests/x.py", 3, ["bad: 1 != 2"], {"no y": 2})),
        },
        {"kind": "ceiling", "case": "copy", "impl": "", "rate": 4.3, "unit": "TB/s"},
        {"kind": "time", "impl": "triton", "graph_us": 200.0, "bench_us": 210.0, "eager_us": 250.0, **case},
        {"kind": "time", "impl": "classic", "graph_us": None, "bench_us": 840.0, "eager_us": 900.0, **case},
        {"kind": "time", "impl": "cuda", "not_run": "no nvcc", **case},
        {"kind": "memory", "case": "kept", "impl": "triton", "bytes": 5_000_000},
        {"kind": "gate", "case": "msda", "impl": "triton", "check": "out", "error": 2.0, "limit": 1.0}
        | {"passed": False},
        {"kind": "gate", "case": "msda", "impl": "cuda", "not_run": "no nvcc"},
        {"kind": "section", "case": "forward", "impl": "", "ok": False, "failed": "killed", "log": "words"},
    ]
    about = {"gpu": "NVIDIA H200", "started": "", "machine": {"torch": "2.11", "triton": "3.6"}}
    text = table.table(about, rows)
    for part in (
        "3 passed; 2 not run: no y", "FAILED bad: 1 != 2", "4.30 TB/s", "2150  50% dram", "classic 4.00x",
        "cuda                  no nvcc", "5.0", "0 passed, 1 failed, 1 not run", "2.0 > 1.0",
        "FAILED section forward: killed\nwords",
    ):  # fmt: skip
        assert part in text


def test_the_binding_floor_is_the_largest_and_uses_measured_rates():
    rows = [{"kind": "ceiling", "case": "copy", "rate": 2.0}, {"kind": "ceiling", "case": "x", "failed": ""}]
    rate = floors.rates(rows)
    assert rate["dram_bytes"] == 2e12
    assert rate["tensor_flop"] == 790e12
    name, least = floors.binding({"dram_bytes": 4e6, "tensor_flop": 1.0}, rate)
    assert (name, round(least, 6)) == ("dram_bytes", 2.0)
    assert floors.binding({}, rate) is None


def test_targets_are_met_missed_or_not_run():
    case = targets.FORWARD.format("bf16")
    target = targets.TARGETS[0]
    ours = {"kind": "time", "case": case, "impl": "triton", "graph_us": 100.0, "amounts": {}}
    theirs = {"kind": "time", "case": case, "impl": "classic", "graph_us": None, "bench_us": 450.0}
    assert target.verdict([ours]) == (None, "not run")
    assert target.verdict([ours, theirs]) == (None, "not run")  # no clock in common
    for taken, verdict in ((390.0, "missed"), (450.0, "met"), (600.0, "stretch met")):
        assert target.verdict([ours, {**theirs, "graph_us": taken}]) == (taken / 100, verdict)
    assert target.verdict([ours, {**theirs, "failed": "no nvcc"}]) == (None, "not run")


def test_targets_name_cases_that_the_sections_have():
    forward = [f"msda forward {case}" for case in deform_attn.forward_cases()]
    backward = [f"msda backward {case}" for case in deform_attn.backward_cases()]
    for dtype in ("bf16", "fp32"):
        assert targets.FORWARD.format(dtype) in forward
        assert targets.BACKWARD.format(dtype) in backward
    first = next(deform_attn.backward_cases())
    assert f"msda kept for backward {first}" == targets.KEPT
    clip, training = masks.INFERENCE.name, masks.TRAINING.name
    assert f"attention masks of {masks.LAYERS} layers {clip} Q=150 bf16" == targets.CHAIN
    assert f"masked attention layer {clip} 1/8 Q=150 bf16" == targets.LAYER
    assert f"masked_attention {clip} 1/8 Q=150 bf16" == targets.ATTENTION
    assert f"mask_upsample {clip} N=150 to 480x864 bits" == targets.UPSAMPLE.format("bits")
    assert f"matching + losses + gradients {training} 10 outputs fp32" == targets.STEP


def test_floors_of_the_encoder_are_those_of_the_notes():
    amounts = deform_attn.ENCODER.forward_amounts()
    assert amounts["dram_bytes"] == pytest.approx(163e6, rel=0.01)
    assert amounts["l1_bytes"] == pytest.approx(2.51e9, rel=0.01)
    found = floors.floors(amounts, floors.rates([]))
    assert found["dram_bytes"] == pytest.approx(38, abs=1)
    assert found["l1_bytes"] == pytest.approx(75, abs=1)
    training = deform_attn.TRAINING[1].backward_amounts()
    assert training["red_bytes"] == pytest.approx(1.39e9, rel=0.01)


def test_memory_kept_for_the_backward_counts_each_tensor_once():
    x = torch.ones(100, requires_grad=True)
    assert measure.saved_bytes(lambda: x * x) == 400
    assert measure.saved_bytes(lambda: x + x) == 0


class Event:
    """Of a GPU on which everything takes a millisecond."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def elapsed_time(self, end):
        assert end is not self
        return 1.0


class Graph:
    def replay(self):
        pass

    def reset(self):
        pass


def pretend_gpu(monkeypatch, capture):
    monkeypatch.setattr(measure, "gpu_clock", time.perf_counter)
    monkeypatch.setattr(measure, "_bench_us", lambda *_: 100.0)
    monkeypatch.setattr(measure, "tensors", lambda _: [argparse.Namespace(is_cuda=True)])
    pretend = {
        "synchronize": lambda: None,
        "set_sync_debug_mode": lambda _: None,
        "current_stream": lambda: None,
        "Stream": lambda: mock.MagicMock(),
        "stream": contextlib.nullcontext,
        "CUDAGraph": Graph,
        "graph": capture,
        "Event": Event,
    }
    for name, value in pretend.items():
        monkeypatch.setattr(torch.cuda, name, value)


def test_times_on_a_gpu_take_turns_among_inputs_and_come_by_three_clocks(monkeypatch):
    pretend_gpu(monkeypatch, lambda *_, **__: contextlib.nullcontext())
    seen = []
    found = measure.times(lambda x: seen.append(int(x)), [(torch.tensor(i),) for i in range(4)])
    assert found["graph_us"] == pytest.approx(1000 / 20)  # five rounds of four
    assert found["bench_us"] == 100.0
    assert found["eager_us"] > 0
    assert seen[-20:] == [0, 1, 2, 3] * 5
    assert measure.device_us(found) == found["graph_us"]


def test_a_call_that_no_graph_can_hold_keeps_its_other_times(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    renewed = []
    pretend_gpu(monkeypatch, refuse)
    monkeypatch.setattr(measure, "_renew_generator", lambda: renewed.append(True))
    found = measure.times(lambda x: x, [(torch.tensor(1),)])
    assert found["graph_us"] is None
    assert found["graph_error"] == "operation not permitted when stream is capturing"
    assert renewed
    assert measure.device_us(found) == 100.0


def test_inputs_fill_the_cache_twice():
    assert measure.rotation(200 << 20) == 3
    assert measure.rotation(20_000_000) * 20_000_000 > 2 * measure.CACHE_BYTES
    assert measure.rotation(1) == 16


# ceilings


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="runs the kernels in the interpreter")
def test_the_kernels_of_the_ceilings_do_what_is_counted():
    from bench.gpu.ceilings_triton import gather_rows, reduce_blocks

    out = torch.zeros(4 * 64)
    reduce_blocks[(8,)](out, 4, BLOCK=64, STEPS=2, num_warps=4)
    assert (out == 4).all()  # 8 programs, 2 steps, 4 blocks
    table = torch.ones(8, 16, dtype=torch.int32)
    total = torch.empty(2, 64, 16, dtype=torch.int32)
    gather_rows[(2,)](table, total, 8, ROWS=64, STEPS=3, num_warps=4)
    assert (total == 3).all()


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="Triton is not installed")
def test_the_ceilings_are_of_the_instructions_they_name():
    code = (
        "import json\nfrom bench.gpu.ceilings_triton import variants\nfrom bench.codegen import measure\n"
        "print(json.dumps({v.name: measure(v, 90)['kinds'] for v in variants()}))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-500:]
    kinds = json.loads(done.stdout)
    assert any("F32x4" in name for name in kinds["reduce fp32 4 a thread"])
    assert not any("F32x4" in name for name in kinds["reduce fp32 1 a thread"])
    assert "LDG.128" in kinds["gather 64 bytes"]


def test_bench_modules_import_without_triton():
    """So that report and table work anywhere."""
    code = "import sys; sys.modules['triton'] = None; import bench.gpu, bench.report, bench.gpu.masks"
    subprocess.run([sys.executable, "-c", code], check=True)
