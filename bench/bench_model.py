"""Time and peak memory of encode + decode: TarViS against its straightforward transcription.

    python -m bench.bench_model --out bench/results/model_cpu.json
    pytest bench/bench_model.py --benchmark-only    # a smaller clip, to see that it runs

One clip of 6 frames of 256 x 448, float32, two CPU threads. vis: class logits of all queries and mask logits
of the ten best instances. vos: mask logits of three objects given by a mask on the first frame, with the
object encoder. Both implementations have the published sizes and random weights.

The command measures each run in a fresh process, implementations in turn, and reports medians. Peak memory is
resident memory of the whole process, and what of it came on top of the model and its inputs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.fresh import (
    THREADS,
    Key,
    Numbers,
    in_fresh_process,
    in_turn,
    medians,
    parse,
    resident,
    rows,
    second_run,
    write,
)
from bench.record import OUT_OF_TIME, Recorder, short
from bench.timing import DEVICE, gpu_clock, machine, peak_bytes
from bench.yardstick.network import Given, Transcription
from kernels.dispatch import Impl, using
from tarvis.config import ModelConfig
from tarvis.model import build_model

CLIP = 6, 256, 448
SMALL_CLIP = 3, 128, 192
NUM_OBJECTS = 3
KEPT_INSTANCES = 10
IMPLEMENTATIONS = ("tarvis", "transcription")
WAYS: tuple[tuple[str, str, Impl], ...] = (  # on a GPU: label, implementation, kernels
    ("tarvis", "tarvis", "auto"),
    ("tarvis plain PyTorch", "tarvis", "reference"),
    ("transcription", "transcription", "auto"),
)
TASKS = ("vis", "vos")

Run = Callable[[], Tensor]


def prepare(
    implementation: str, task: str, backbone: str, device: str = "cpu", clip: tuple[int, int, int] = CLIP
) -> Run:
    """A model and its inputs. A run encodes and decodes one clip and returns mask logits [N, T, H/4, W/4]."""
    torch.manual_seed(0)
    T, H, W = clip
    frames = torch.randint(0, 256, (T, 3, H, W)).float().to(device)
    masks = first_frame_masks(H, W).to(device)
    if implementation == "transcription":
        return of_transcription(backbone, task, frames, masks)
    return of_tarvis(backbone, task, frames, masks)


def of_tarvis(backbone: Any, task: str, frames: Tensor, masks: Tensor) -> Run:
    model = build_model(ModelConfig(backbone=backbone)).eval().to(frames.device)
    clip = frames[None]

    def vis() -> Tensor:
        features = model.encode(clip)
        prediction = model.decode(features, model.queries.classes("youtube_vis_2021"))
        assert prediction.class_logits is not None
        scores = prediction.class_logits[0].softmax(-1)[:, 1:].amax(-1)
        return prediction.mask_logits("instance", scores.topk(KEPT_INSTANCES).indices)[0]

    def vos() -> Tensor:
        features = model.encode(clip)
        background, objects = model.object_encoder(features.mask_features[0, :1], masks[:, None])
        prediction = model.decode(features, model.queries.objects(background[None], objects[None]))
        return prediction.mask_logits("vos")[0].unflatten(0, (NUM_OBJECTS, -1)).amax(1)

    return {"vis": vis, "vos": vos}[task]


def of_transcription(backbone: str, task: str, frames: Tensor, masks: Tensor) -> Run:
    model = Transcription(backbone).eval().to(frames.device)
    given = [Given(i, 0, mask) for i, mask in enumerate(masks)]

    def vis() -> Tensor:
        outputs, _ = model.instance_clip(model.encode(frames), "YOUTUBE_VIS", panoptic=False)
        scores = outputs["classes"].softmax(-1)[:, 1:].amax(-1)
        return outputs["instances"][scores.topk(KEPT_INSTANCES).indices]

    def vos() -> Tensor:
        T, _, H, W = frames.shape
        outputs, _, _ = model.vos_clip(model.encode(frames), list(range(T)), (H, W), given)
        return outputs["objects"]

    return {"vis": vis, "vos": vos}[task]


def first_frame_masks(H: int, W: int) -> Tensor:
    """Ellipses of different sizes along the diagonal, bool [N, H, W]."""
    y, x = torch.arange(H)[:, None], torch.arange(W)
    masks = []
    for n in range(NUM_OBJECTS):
        place = (2 * n + 1) / (2 * NUM_OBJECTS)
        height, width = H / (8 - n), W / (9 - n)
        masks.append(((y - place * H) / height) ** 2 + ((x - place * W) / width) ** 2 <= 1)
    return torch.stack(masks)


@pytest.mark.benchmark(group="encode+decode", timer=gpu_clock)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("task", TASKS)
def test_encode_and_decode(benchmark: Any, task: str, implementation: str) -> None:
    run = prepare(implementation, task, "resnet50", DEVICE, SMALL_CLIP)
    with torch.inference_mode():
        logits = benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    T, H, W = SMALL_CLIP
    assert logits.shape[1:] == (T, H // 4, W // 4)


def measure(backbone: str, task: str, implementation: str) -> Numbers:
    """In this process, which must be fresh: seconds of a second run, and peak memory in MB."""
    torch.set_num_threads(THREADS)
    run = prepare(implementation, task, backbone)
    gc.collect()
    before = resident("VmRSS")
    with torch.inference_mode():
        found = second_run(run)
    peak = resident("VmHWM")
    return {**found, "peak_mb": peak, "peak_above_model_mb": peak - before}


def main(argv: Sequence[str] | None = None) -> None:
    backbones = {"default": "resnet50", "choices": ("resnet50", "swin_tiny")}
    args = parse(__doc__, argv, repeats=5, out=Path("model_cpu.json"), backbone=backbones)
    cases = [(task, implementation) for task in TASKS for implementation in IMPLEMENTATIONS]
    runs = in_turn(cases, args.repeats, partial(in_fresh_process, measure, args.backbone))
    about = {
        "command": f"python -m bench.bench_model --backbone {args.backbone} --repeats {args.repeats}",
        "clip": list(CLIP),
        "dtype": "float32",
        "objects": NUM_OBJECTS,
        "backbone": args.backbone,
        "machine": {**machine(), "threads": THREADS},
    }
    write(args.out, {**about, "results": rows(runs, "task", "implementation")})
    print(table({case: medians(found) for case, found in runs.items()}))


def table(found: dict[Key, Numbers]) -> str:
    """Medians side by side; a ratio below 1 is in favour of tarvis."""
    lines = [f"{'':6}{'':22}{IMPLEMENTATIONS[0]:>14}{IMPLEMENTATIONS[1]:>16}{'ratio':>8}"]
    for task in TASKS:
        ours, theirs = (found[task, implementation] for implementation in IMPLEMENTATIONS)
        for name in ours:
            ratio = ours[name] / theirs[name]
            lines.append(f"{task:6}{name:22}{ours[name]:14.2f}{theirs[name]:16.2f}{ratio:8.2f}")
    return "\n".join(lines)


def section(record: Recorder) -> None:
    """Of `bench.gpu`: in float32 and under bfloat16 autocast, with our kernels and with plain PyTorch."""
    amps = (torch.bfloat16, None)
    clip = SMALL_CLIP if record.small else CLIP
    for task, amp in [("vis", None)] if record.small else product(TASKS, amps):
        case = f"{task} {'x'.join(map(str, clip))} {'amp bf16' if amp else 'fp32'}"
        for label, implementation, impl in WAYS:
            if record.over():
                record.not_run(case, label, OUT_OF_TIME)
                continue
            run = None
            try:
                run = prepare(implementation, task, "resnet50", record.device, clip)
            except Exception as problem:
                record.not_run(case, label, short(problem))
            else:
                _record(record, case, label, run, amp, impl)
            del run
            record.free()


def _record(record: Recorder, case: str, label: str, run: Run, amp: torch.dtype | None, impl: Impl) -> None:
    device = torch.device(record.device)

    def call(_: Tensor) -> Tensor:
        with torch.inference_mode(), torch.autocast(device.type, amp, enabled=amp is not None), using(impl):
            return run()

    place = torch.zeros(1, device=device)  # from which the clock sees where the model is
    record.time(case, label, call, [(place,)])
    if device.type == "cuda":
        record.memory(case, label, lambda: peak_bytes(lambda: call(place)))


if __name__ == "__main__":
    main()
