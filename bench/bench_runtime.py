"""One clip through every runtime here: eager, compiled, ONNX Runtime, OpenVINO, AOTInductor, TensorRT (RTX).

    pytest bench/bench_runtime.py --benchmark-only

vis: encode and decode a clip, mask logits of the ten best instances. On a GPU ResNet-50 with random weights
in float16 on 12 frames of 480 x 864, on a CPU the bundled network in float32 on 2 frames of 128 x 192. Making
the graphs takes longer than timing them, and is not timed. A runtime that is not here is skipped, saying why.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.record import OUT_OF_TIME, Recorder, Row, short
from bench.timing import CLOCKS, DEVICE, compiled, gpu_clock, missing, timed
from export.manifest import DTYPES, Manifest
from tarvis.config import ModelConfig
from tarvis.data.synthetic import synthetic_clip
from tarvis.model import TarVis, build_model
from tarvis.model.weights import BUNDLED, load_into, load_weights
from tarvis.structures import InputError, Network

ENGINES = ("tensorrt", "tensorrt_rtx")
RUNTIMES = ("eager", "compiled", "onnx", "openvino", "aoti", *ENGINES)
KEPT_INSTANCES = 10
SECONDS = 2.0  # of calls, for one number
MOST_DIFFERING = 0.2  # 1 - IoU of masks that half precision excuses, whatever it does elsewhere

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Setting:
    """What is run: a network (random without weights), a clip (T, H, W), a precision."""

    config: ModelConfig
    clip: tuple[int, int, int]
    precision: str
    weights: Mapping[str, Tensor] | None = None

    @classmethod
    def of(cls, device: str, *, small: bool = False) -> Setting:
        """Published sizes for a GPU; small ones for a CPU and for a rehearsal."""
        if small or device == "cpu":
            weights, bundled = load_weights(BUNDLED)
            return cls(bundled, (2, 128, 192), "fp32", weights)
        config = ModelConfig(backbone="resnet50", class_sets={"youtube_vis_2021": 40})
        return cls(config, (12, 480, 864), "fp16")

    def network(self, device: str) -> TarVis:
        torch.manual_seed(0)
        network = build_model(self.config).eval().requires_grad_(False)
        if self.weights is not None:
            load_into(network, self.weights)
        return network.to(device)

    def frames(self, device: str) -> Tensor:
        T, H, W = self.clip
        return torch.randint(0, 256, (1, T, 3, H, W), dtype=torch.uint8).to(device)

    @property
    def class_set(self) -> str:
        return next(iter(self.config.class_sets))


class NotHereError(Exception):
    """A runtime cannot run here; the message says why."""


class OutOfTimeError(BaseException):
    """Time is up. Not an Exception: compilers catch those."""


@contextmanager
def opened(runtime: str, setting: Setting, device: str) -> Iterator[Network]:
    """A network in a runtime, with its files in a folder of their own meanwhile.

    Raises:
        NotHereError: it cannot run here.
    """
    if reason := why_not(runtime, device):
        raise NotHereError(reason)
    network = setting.network(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "made"
        try:
            if runtime == "eager":
                yield network
            elif runtime == "compiled":
                for part in ("encode", "decode"):
                    setattr(network, part, compiled(getattr(network, part)))
                yield network
            else:
                make(runtime, network, setting, folder, device)
                from export.runner import open_runner

                yield open_runner(folder, device=device, trust=True)
        except ModuleNotFoundError as error:
            raise NotHereError(f"needs {error.name}, which is not installed") from None
        except InputError as error:
            raise NotHereError(str(error)) from None


def make(runtime: str, network: TarVis, setting: Setting, folder: Path, device: str) -> Manifest | None:
    """Write a runtime's files."""
    from export.folder import Request

    T, H, W = setting.clip
    request = Request("vis", (H, W), T, setting.class_set, setting.precision)
    if runtime == "aoti":
        from export import aoti

        folder.mkdir()
        return aoti.package(network.cpu(), setting.config, folder, request, device=torch.device(device))
    if runtime == "openvino":
        from export import to_openvino

        folder.mkdir()
        return to_openvino.export(network.cpu(), setting.config, folder, request)
    from export import to_onnx

    graphs = folder if runtime == "onnx" else folder.with_name("onnx")
    graphs.mkdir()
    manifest = to_onnx.export(network.cpu(), setting.config, graphs, request)
    if runtime in ENGINES:
        from export import trt

        options = ["--onnx", str(graphs), "--backend", runtime, "--out", str(folder)]
        trt.run(trt.parser().parse_args(options))
    return manifest


def why_not(runtime: str, device: str) -> str:
    """Why a runtime cannot run on a device, as far as can be told before it is tried."""
    if runtime in ("compiled", "aoti") and (reason := missing("compiled", device)):
        return reason
    by_name = {"onnx": ("onnxruntime",), "openvino": ("openvino",)}
    needs = {name: ("onnx", "onnxscript", *own) for name, own in by_name.items()} | dict.fromkeys(
        ENGINES, ("onnx", "onnxscript")
    )
    if lacking := [name for name in needs.get(runtime, ()) if find_spec(name) is None]:
        return f"{', '.join(lacking)} not installed"
    if runtime in ENGINES:
        from export.runtimes.tensorrt import installed

        try:
            installed(runtime)
        except InputError as error:
            return str(error)
        return "" if device.startswith("cuda") else "engines run on an NVIDIA GPU"
    return ""


def clip_through(network: Network, setting: Setting, device: str) -> Run:
    """A call that encodes and decodes a clip and gives mask logits [N, T, H/4, W/4]."""
    frames, queries = setting.frames(device), network.queries.classes(setting.class_set)
    amp = DTYPES[setting.precision] if isinstance(network, TarVis) and setting.precision != "fp32" else None

    def run() -> Tensor:
        with torch.inference_mode(), torch.autocast(torch.device(device).type, amp, enabled=amp is not None):
            prediction = network.decode(network.encode(frames), queries)
            assert prediction.class_logits is not None
            scores = prediction.class_logits[0].softmax(-1)[:, 1:].amax(-1)
            best = scores.topk(min(KEPT_INSTANCES, len(scores))).indices
            return prediction.mask_logits("instance", best)[0]

    return run


@pytest.mark.benchmark(group="a clip of vis, by runtime", timer=gpu_clock)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_clip(benchmark: Any, runtime: str) -> None:
    setting = Setting.of(DEVICE)
    try:
        with opened(runtime, setting, DEVICE) as network:
            logits = timed(benchmark, clip_through(network, setting, DEVICE))
    except NotHereError as reason:
        pytest.skip(f"{runtime}: {reason}")
    T, H, W = setting.clip
    assert logits.shape[1:] == (T, -(-H // 64) * 16, -(-W // 64) * 16)
    benchmark.extra_info["frames_per_second"] = T / benchmark.stats.stats.median


# For the benchmark of the GPU


def section(record: Recorder) -> None:
    """Of `bench.gpu`: frames a second in each of `RUNTIMES`, after masks were compared."""
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
    """Raises OutOfTimeError inside the block once `over()`: compilers take unknown time."""

    def look(*_: Any) -> None:
        if over():
            signal.setitimer(signal.ITIMER_REAL, 0)  # so that it is raised in the block, and once
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

    And by no more than `MOST_DIFFERING`. A random network has no margin: what float16 changes in PyTorch is
    the only measure of what it may change in a runtime.
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
    for _ in range(3):  # TensorRT records its graph in the second
        run()
    calls, start = 0, gpu_clock()
    while calls < 3 or time.perf_counter() - start < SECONDS:
        run()
        calls += 1
    seconds = (gpu_clock() - start) / calls
    row: Row = {"kind": "time", "case": case, "impl": name, "amounts": {}, **dict.fromkeys(CLOCKS)}
    return {**row, "eager_us": seconds * 1e6, "frames_per_second": round(num_frames / seconds, 2)}
