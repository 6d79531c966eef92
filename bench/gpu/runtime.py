"""Frames a second of a clip in every runtime that is installed, after its masks were compared."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.bench_runtime import RUNTIMES, NotHereError, Run, Setting, clip_through, opened
from bench.gpu.protocol import OUT_OF_TIME, Recorder, Row, short
from export.manifest import DTYPES
from tarvis.data.synthetic import synthetic_clip
from tarvis.structures import Network

SECONDS = 2.0  # of calls, for one number
MOST_DIFFERING = 0.2  # 1 - IoU of masks that half precision excuses, whatever it does elsewhere


class OutOfTimeError(BaseException):
    """Time is up. No Exception, which compilers catch."""


def runtime(record: Recorder) -> None:
    """Section: a clip in each of `RUNTIMES`; what cannot run is said not to have."""
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
            with ended_in_time(record.over), opened(name, setting, record.device) as network:
                if name in ("eager", "compiled") or _masks_agree(record, case, name, setting, network):
                    record.emit(_timed(case, name, clip_through(network, setting, record.device), T))
        except NotHereError as reason:
            record.not_run(case, name, str(reason))
        except OutOfTimeError:
            record.not_run(case, name, OUT_OF_TIME)
        except Exception as problem:
            record.emit({"kind": "time", "case": case, "impl": name, "failed": short(problem)})
        record.free()


@contextmanager
def ended_in_time(over: Callable[[], bool]) -> Iterator[None]:
    """Raises OutOfTimeError inside the block once `over()`: how long compilers take nobody can tell."""

    def look(*_: Any) -> None:
        if over():
            raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _masks(network: Network, setting: Setting, device: str, amp: torch.dtype | None) -> Tensor:
    """Masks of all instances of a clip, bool [Q, T, H/4, W/4]: which are best, rounding may change."""
    T, H, W = setting.clip
    clip = torch.from_numpy(synthetic_clip(0, T, (H, W), come_and_go=False).frames)
    frames = clip.permute(0, 3, 1, 2)[None].to(device)
    with torch.inference_mode(), torch.autocast(device, amp, enabled=amp is not None):
        prediction = network.decode(network.encode(frames), network.queries.classes(setting.class_set))
        return prediction.mask_logits("instance")[0].float() > 0


def _differing(masks: Tensor, expected: Tensor) -> float:
    """1 - IoU of all masks together; 0 where there is none on either side."""
    joined = (masks | expected).sum().item()
    return 1 - (masks & expected).sum().item() / joined if joined else 0.0


def _masks_agree(record: Recorder, case: str, name: str, setting: Setting, runner: Network) -> bool:
    """The gate: masks against PyTorch's in float32, at most twice as far from them as PyTorch under autocast.

    And by no more than `MOST_DIFFERING`. A random network has no margin: what float16 may change can only be
    told from what it changes elsewhere.
    """
    device, amp = record.device, DTYPES[setting.precision]
    network = setting.network(device)
    expected, allowed = _masks(network, setting, device, None), 1e-3
    if amp != torch.float32:
        allowed = min(
            allowed + 2 * _differing(_masks(network, setting, device, amp), expected), MOST_DIFFERING
        )
    return record.gate(
        case,
        name,
        "masks, 1 - IoU",
        lambda: _differing(_masks(runner, setting, device, None), expected),
        allowed,
    )


def _timed(case: str, name: str, run: Run, num_frames: int) -> Row:
    """Wall time of a call, the device idle before and after: a runtime may have streams of its own."""
    device = "cuda" if run().is_cuda else "cpu"
    for _ in range(3):  # TensorRT records its graph in the second
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
