"""The comparison of runtimes: what cannot run here, or not in time, is said not to have run."""

import dataclasses
import time
from contextlib import contextmanager

import pytest
import torch

from bench import bench_runtime
from bench.bench_runtime import RUNTIMES, NotHereError
from bench.record import OUT_OF_TIME, Recorder


def rehearse(monkeypatch, opened, over=lambda: False):
    """What became of each runtime: frames a second, or why there are none."""
    monkeypatch.setattr(bench_runtime, "opened", opened)
    monkeypatch.setattr(bench_runtime, "SECONDS", 0.0)
    monkeypatch.setattr(bench_runtime, "clip_through", lambda *_: lambda: torch.zeros(1))
    rows = []
    bench_runtime.section(Recorder("cpu", True, over, rows.append))
    found = {row["impl"]: row for row in rows if row["kind"] == "time"}
    assert tuple(found) == RUNTIMES
    return {
        name: row.get("not_run") or row.get("failed") or row["frames_per_second"]
        for name, row in found.items()
    }


@contextmanager
def nothing_here(name, *_):
    if name != "eager":
        raise NotHereError(f"no {name}")
    yield torch.nn.Identity()


def test_a_runtime_that_is_not_here_is_not_run(monkeypatch):
    found = rehearse(monkeypatch, nothing_here)
    assert found.pop("eager") > 0
    assert found.pop("compiled") == found.pop("aoti") == "not compiled in a rehearsal"
    assert found == {name: f"no {name}" for name in ("onnx", "openvino", "tensorrt", "tensorrt_rtx")}


def test_a_runtime_that_takes_too_long_is_stopped_and_not_run(monkeypatch):
    is_slow = []

    @contextmanager
    def slow(name, *_):
        if name == "onnx":
            is_slow.append(name)
            try:
                time.sleep(60)
            except Exception:
                pytest.fail("taken for an error of the compiler")
        with nothing_here(name) as network:
            yield network

    found = rehearse(monkeypatch, slow, over=lambda: bool(is_slow))
    assert found["eager"] > 0
    assert {found[name] for name in ("onnx", "openvino", "tensorrt", "tensorrt_rtx")} == {OUT_OF_TIME}


def test_masks_that_differ_fail_the_gate_and_keep_a_runtime_from_being_timed(monkeypatch):
    right, wrong = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    setting, rows = bench_runtime.Setting.of("cpu", small=True), []
    record = Recorder("cpu", True, lambda: False, rows.append)
    for masks, agree in ((right, True), (wrong, False)):
        answers = iter((right, masks))
        monkeypatch.setattr(bench_runtime, "_masks", lambda *_, answers=answers: next(answers))
        assert bench_runtime._masks_agree(record, "case", "onnx", setting, None) is agree
    assert [row["passed"] for row in rows] == [True, False]
    assert rows[1]["error"] == pytest.approx(0.5)


def test_the_gate_stays_a_gate_where_half_precision_changes_every_mask(monkeypatch):
    right, wrong, gone = (torch.tensor(x) for x in ([True, False], [False, True], [False, False]))
    setting, rows = dataclasses.replace(bench_runtime.Setting.of("cpu", small=True), precision="fp16"), []
    record = Recorder("cpu", True, lambda: False, rows.append)
    for masks in (wrong, gone):
        answers = iter((right, wrong, masks))  # in float32, under autocast, the runtime's
        monkeypatch.setattr(bench_runtime, "_masks", lambda *_, answers=answers: next(answers))
        assert not bench_runtime._masks_agree(record, "case", "onnx", setting, None)
    assert bench_runtime._differing(gone, gone) == 0


def test_each_tensorrt_builds_engines_of_its_own(monkeypatch, tmp_path):
    from export import to_onnx, trt

    asked = []
    monkeypatch.setattr(to_onnx, "export", lambda *_: None)
    monkeypatch.setattr(trt, "run", lambda args: asked.append(args.backend))
    setting = bench_runtime.Setting.of("cpu", small=True)
    for name in bench_runtime.ENGINES:
        (tmp_path / name).mkdir()
        bench_runtime.make(name, setting.network("cpu"), setting, tmp_path / name / "made", "cpu")
    assert asked == ["tensorrt", "tensorrt_rtx"]
