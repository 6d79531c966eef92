"""Frames a second of a clip in every runtime that is installed, after its masks were compared."""

from __future__ import annotations

import time

import torch

from bench.bench_runtime import RUNTIMES, NotHereError, Run, Setting, clip_through, opened
from bench.gpu.protocol import OUT_OF_TIME, Recorder, Row, short
from export.check import TOLERANCES, compare_masks
from export.runner import Runner
from tarvis.data.synthetic import synthetic_clip

SECONDS = 2.0  # of calls, for one number


def runtime(record: Recorder) -> None:
    """Section: eager, compiled, ONNX Runtime, AOTInductor, TensorRT; what cannot run is said not to have."""
    setting = Setting.of(record.device, small=record.small)
    T, H, W = setting.clip
    case = f"vis {setting.config.backbone} {T}x{H}x{W} {setting.precision}"
    for name in RUNTIMES:
        if record.over():
            record.not_run(case, name, OUT_OF_TIME)
            continue
        if record.small and name in ("compiled", "aoti"):
            record.not_run(case, name, "not compiled in a rehearsal")
            continue
        try:
            with opened(name, setting, record.device) as network:
                if not isinstance(network, Runner) or _masks_agree(record, case, name, setting, network):
                    record.emit(_timed(case, name, clip_through(network, setting, record.device), T))
        except NotHereError as reason:
            record.not_run(case, name, str(reason))
        except Exception as problem:
            record.emit({"kind": "time", "case": case, "impl": name, "failed": short(problem)})
        record.free()


def _masks_agree(record: Recorder, case: str, name: str, setting: Setting, runner: Runner) -> bool:
    """The gate: masks of two clips against those of PyTorch in float32."""
    frames = list(synthetic_clip(0, 2 * setting.clip[0], setting.clip[1:], come_and_go=False).frames)
    frames = frames[: setting.clip[0] + (setting.clip[0] + 1) // 2]

    def difference() -> float:
        return next(iter(compare_masks(setting.network(record.device), runner, frames, []))).largest

    return record.gate(case, name, "masks, 1 - IoU", difference, 1 - TOLERANCES[setting.precision].iou)


def _timed(case: str, name: str, run: Run, num_frames: int) -> Row:
    """Wall time of a call, the device idle before and after: a runtime may have streams of its own."""
    device = "cuda" if run().is_cuda else "cpu"
    for _ in range(3):  # TensorRT records its graph in the third
        run()
    calls, start = 0, _now(device)
    while calls < 3 or time.perf_counter() - start < SECONDS:
        run()
        calls += 1
    seconds = (_now(device) - start) / calls
    return {
        "kind": "time",
        "case": case,
        "impl": name,
        "amounts": {},
        "graph_us": None,
        "bench_us": None,
        "eager_us": seconds * 1e6,
        "frames_per_second": round(num_frames / seconds, 2),
    }


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
