"""The GPU benchmark without a GPU: every section rehearsed, its numbers, its verdicts."""

import contextlib
import json
import os
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch

from bench import gpu, report, targets, timing
from bench.case import record_cases
from bench.cases import SECTIONS, deformable
from bench.record import OUT_OF_TIME, Recorder, Results
from kernels import dispatch


def rehearse(section, over=lambda: False):
    """The rows of a section with tiny shapes on the CPU."""
    rows = []
    record_cases(Recorder("cpu", True, over, rows.append), SECTIONS[section]("cpu", "tiny"))
    return rows


@pytest.fixture
def short_measurements(monkeypatch):
    monkeypatch.setattr(timing, "EAGER_SECONDS", 0.001)


@pytest.mark.usefixtures("short_measurements")
@pytest.mark.parametrize(
    "section",
    [pytest.param(name, marks=[pytest.mark.slow] if name == "backward" else []) for name in SECTIONS],
)
def test_a_section_passes_its_gates_and_times_what_it_can(section):
    rows = rehearse(section)
    gates = [row for row in rows if row["kind"] == "gate" and "not_run" not in row]
    if dispatch.INTERPRETED and section != "points":
        assert {row["impl"] for row in gates} == {"triton"}
    for row in gates:
        assert row["passed"], row
    timed = [row for row in rows if row["kind"] == "time"]
    assert not [row for row in timed if "failed" in row]
    assert {row["impl"] for row in timed if "eager_us" in row} > {"reference"}  # and a baseline
    assert all(amount > 0 for row in timed for amount in row.get("amounts", {}).values())
    assert json.loads(json.dumps(rows)) == rows


def test_nothing_starts_when_time_is_up():
    reasons = {row.get("not_run") for row in rehearse("bits", over=lambda: True)}
    assert reasons == {OUT_OF_TIME}


@pytest.mark.usefixtures("short_measurements")
def test_a_gate_that_fails_keeps_its_implementation_from_being_timed(monkeypatch):
    monkeypatch.setattr(Recorder, "can_gate", lambda *_: True)
    monkeypatch.setattr(timing, "missing", lambda *_: "")
    rows = []
    record = Recorder("cpu", True, lambda: False, rows.append)
    assert not record.gate("case", "triton", "error", lambda: float("nan"), 1.0)
    assert not record.gate("case", "cuda", "error", lambda: 1 / 0, 1.0)
    assert record.gate("case", "reference", "error", lambda: 0.5, 1.0)
    assert record.failed == {("case", "triton"), ("case", "cuda")}
    (case, *_) = SECTIONS["upsample"]("cpu", "tiny")
    record.failed.add((case.name, "reference"))
    record_cases(record, iter([case]))
    times = {row["impl"]: row for row in rows if row["kind"] == "time"}
    assert times["reference"]["not_run"] == "its gate failed"
    assert times["interpolate"]["eager_us"] > 0


# The command


@pytest.mark.slow
def test_the_command_rehearses_every_section_and_ends_with_zero(tmp_path):
    options = ["--device", "cpu", "--smoke", "--out", str(tmp_path), "--tests", "test_dispatch"]
    command = [sys.executable, "-m", "bench.gpu", *options, "--budget", "5000"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = json.loads((tmp_path / "gpu_rehearsal_on_cpu.json").read_text())
    sections = [row for row in found["rows"] if row["kind"] == "section"]
    assert [row["case"] for row in sections] == list(gpu.SHARES)
    assert all(row["ok"] for row in sections), sections
    assert done.returncode == 0, done.stderr[-2000:]
    assert next(row for row in found["rows"] if row["kind"] == "tests")["passed"] > 5
    assert "TFLOP/s" in done.stdout


def test_a_section_that_takes_too_long_is_ended_and_recorded(tmp_path):
    results = Results(tmp_path / "out.json", {})
    row = gpu.run_child(results, "ceilings", 0.2 - gpu.GRACE, gpu.parse(["--device", "cpu", "--smoke"]))
    assert row["ok"] is False
    assert row["failed"] == "killed: out of time"


def test_a_section_that_breaks_is_recorded_with_its_last_words(tmp_path):
    args = gpu.parse(["--device", "cpu", "--smoke"])
    args.device = "nowhere"
    row = gpu.run_child(Results(tmp_path / "out.json", {}), "ceilings", 100, args)
    assert row["failed"] == "ended with 2"
    assert "invalid choice: 'nowhere'" in row["log"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_command_ends_with_two(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


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
    results = Results(tmp_path / "out.json", {"gpu": "none"})
    results.add(row)
    assert results.passed is passed
    assert json.loads((tmp_path / "out.json").read_text()) == {"gpu": "none", "rows": [row]}


def test_unknown_sections_are_refused():
    with pytest.raises(SystemExit):
        gpu.parse(["--only", "forward,nothing"])
    assert gpu.parse(["--only", "backward,forward"]).only == ["forward", "backward"]


@pytest.mark.slow
def test_tests_run_natively_and_those_that_need_a_missing_package_are_not_run(tmp_path):
    path = tmp_path / "test_something.py"
    path.write_text(
        "import os, pytest\n"
        "def test_good(): assert 'TRITON_INTERPRET' not in os.environ\n"
        "def test_bad(): assert False, 'on purpose'\n"
        "def test_needs_a_package(): import no_such_package\n"
        "def test_needs_a_module(): import kernels.nothing\n"
        "@pytest.mark.skip(reason='no nvcc')\ndef test_skipped(): pass\n"
    )
    (tmp_path / "test_import.py").write_text("import no_such_package\n")
    row = gpu.tested([str(path), str(tmp_path / "test_import.py")], 100)
    assert (row["passed"], row["ok"]) == (1, False)
    assert [line.partition("::")[2].partition(" ")[0] for line in row["failed"]] == [
        "test_bad", "test_needs_a_module",
    ]  # fmt: skip
    assert "on purpose" in row["failed"][0]
    assert row["not_run"] == {"needs no_such_package, which is not installed": 2, "no nvcc": 1}


def test_tests_that_do_not_end_in_time_count_as_failed():
    assert gpu.tested(["tests/kernels/test_dispatch.py"], 0.1)["failed"] == ["not finished in 0 s"]


def test_files_with_gpu_tests_are_found():
    found = gpu.test_files()
    assert {"tests/kernels/test_ms_deform_attn.py", "tests/tarvis/model/test_gpu.py"} <= set(found)
    assert not {"tests/tarvis/test_api.py", "tests/kernels/test_codegen.py"} & set(found)


# Floors and targets


def test_the_binding_floor_is_the_largest_and_uses_measured_rates():
    rows = [{"kind": "ceiling", "case": "copy", "rate": 2.0}, {"kind": "ceiling", "case": "x", "failed": ""}]
    rate = targets.rates(rows)
    assert rate["dram_bytes"] == 2e12
    assert rate["tensor_flop"] == 790e12
    name, least = targets.binding({"dram_bytes": 4e6, "tensor_flop": 1.0}, rate)
    assert (name, round(least, 6)) == ("dram_bytes", 2.0)
    assert targets.binding({}, rate) is None


def test_targets_are_met_missed_or_not_run():
    target = targets.TARGETS[0]
    ours = {"kind": "time", "case": target.case, "impl": "triton", "graph_us": 100.0, "amounts": {}}
    theirs = {"kind": "time", "case": target.case, "impl": "classic", "graph_us": None, "bench_us": 450.0}
    assert target.verdict([ours]) == (None, "not run")
    assert target.verdict([ours, theirs]) == (None, "not run")  # no clock in common
    for taken, verdict in ((390.0, "missed"), (450.0, "met"), (600.0, "stretch met")):
        assert target.verdict([ours, {**theirs, "graph_us": taken}]) == (taken / 100, verdict)
    assert target.verdict([ours, {**theirs, "failed": "no nvcc"}]) == (None, "not run")
    least = next(target for target in targets.TARGETS if target.value is targets.microseconds)
    assert least.verdict([ours]) == (100.0, "stretch met")
    assert least.verdict([{**ours, "graph_us": 190.0}]) == (190.0, "met")


def test_targets_name_cases_and_ways_that_the_sections_have():
    cases = {case.name: case for section in SECTIONS.values() for case in section("cpu", "gpu")}
    for target in targets.TARGETS:
        if target.case:
            assert {"triton", target.baseline} - {""} <= set(cases[target.case].ways), target
            assert cases[target.case].memory or target.value is not targets.share_of_bytes


def test_floors_of_the_encoder_are_those_of_the_notes():
    amounts = deformable.ENCODER.forward_amounts()
    rate = targets.rates([])
    assert amounts["dram_bytes"] == pytest.approx(163e6, rel=0.01)
    assert amounts["l1_bytes"] == pytest.approx(2.51e9, rel=0.01)
    for name, floor in (("dram_bytes", 38), ("l1_bytes", 75)):
        assert targets.binding({name: amounts[name]}, rate)[1] == pytest.approx(floor, abs=1)
    assert deformable.TRAINING[1].backward_amounts()["red_bytes"] == pytest.approx(1.39e9, rel=0.01)


def test_what_went_wrong_is_printed():
    rows = [
        {"kind": "tests", "ok": False, "passed": 3, "failed": ["bad: 1 != 2"], "not_run": {"no y": 2}},
        {"kind": "time", "case": "msda", "impl": "cuda", "not_run": "no nvcc"},
        {"kind": "gate", "case": "msda", "impl": "triton", "check": "out", "error": 2.0, "limit": 1.0}
        | {"passed": False},
        {"kind": "section", "case": "forward", "impl": "", "ok": False, "failed": "killed", "log": "words"},
    ]
    text = "\n".join(report.problems(rows))
    for part in (
        "3 passed, 1 failed", "bad: 1 != 2", "2 not run: no y", "0 passed, 1 failed, 0 not run", "2.0 > 1.0",
        "FAILED section forward: killed\nwords", "1 times not measured: no nvcc",
    ):  # fmt: skip
        assert part in text


# Clocks


def test_memory_kept_for_the_backward_counts_each_tensor_once():
    x = torch.ones(100, requires_grad=True)
    assert timing.saved_bytes(lambda: x * x) == 400
    assert timing.saved_bytes(lambda: x + x) == 0


def pretend_gpu(monkeypatch, capture):
    """A GPU on which everything takes a millisecond."""
    monkeypatch.setattr(timing, "gpu_clock", time.perf_counter)
    monkeypatch.setattr(timing, "_bench_us", lambda *_: 100.0)
    monkeypatch.setattr(timing, "tensors", lambda _: [mock.Mock(is_cuda=True)])
    event = mock.Mock(elapsed_time=lambda _: 1.0)
    pretend = {name: mock.MagicMock() for name in ("synchronize", "current_stream", "Stream", "CUDAGraph")}
    pretend |= {"set_sync_debug_mode": mock.Mock(), "stream": contextlib.nullcontext, "graph": capture}
    for name, value in {**pretend, "Event": lambda **_: event, "set_stream": mock.Mock()}.items():
        monkeypatch.setattr(torch.cuda, name, value)


def test_times_on_a_gpu_take_turns_among_inputs_and_come_by_three_clocks(monkeypatch):
    pretend_gpu(monkeypatch, lambda *_, **__: contextlib.nullcontext())
    seen = []
    found = timing.times(lambda x: seen.append(int(x)), [(torch.tensor(i),) for i in range(4)])
    assert found["graph_us"] == pytest.approx(1000 / 20)  # five rounds of four
    assert found["bench_us"] == 100.0
    assert found["eager_us"] > 0
    assert seen[-20:] == [0, 1, 2, 3] * 5


def test_a_call_that_no_graph_can_hold_keeps_its_other_times(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    pretend_gpu(monkeypatch, refuse)
    monkeypatch.setattr(timing, "_renew_generator", lambda: None)
    found = timing.times(lambda x: x, [(torch.tensor(1),)])
    assert found["graph_us"] is None
    assert found["graph_error"] == "operation not permitted when stream is capturing"
    assert targets.taken_us(found) == 100.0


# Ceilings


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="runs the kernels in the interpreter")
def test_the_kernels_of_the_ceilings_do_what_is_counted():
    from bench.ceilings_triton import gather_rows, reduce_blocks

    out = torch.zeros(4 * 64)
    reduce_blocks[(8,)](out, 4, BLOCK=64, STEPS=2, num_warps=4)
    assert (out == 4).all()  # 8 programs, 2 steps, 4 blocks
    table = torch.ones(8, 16, dtype=torch.int32)
    total = torch.empty(2, 64, 16, dtype=torch.int32)
    gather_rows[(2,)](table, total, 8, ROWS=64, STEPS=3, num_warps=4)
    assert (total == 3).all()


@pytest.mark.slow
@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="Triton is not installed")
def test_the_ceilings_are_of_the_instructions_they_name():
    code = (
        "import json\nfrom bench.ceilings_triton import variants\nfrom bench.codegen import measure\n"
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
    """So that the report works anywhere."""
    code = "import sys; sys.modules['triton'] = None; import bench.gpu, bench.report, bench.cases"
    subprocess.run([sys.executable, "-c", code], check=True)
