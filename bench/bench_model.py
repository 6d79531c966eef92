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

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.timing import DEVICE, gpu_clock, machine
from bench.transcription import Given, Transcription
from tarvis.config import ModelConfig
from tarvis.model import build_model

FRAMES, HEIGHT, WIDTH = CLIP = 6, 256, 448
SMALL_CLIP = 3, 128, 192
NUM_OBJECTS = 3
KEPT_INSTANCES = 10
THREADS = 2
IMPLEMENTATIONS = ("tarvis", "transcription")
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


def measure(implementation: str, task: str, backbone: str) -> dict[str, float]:
    """One run in this process, which must be fresh: seconds, and peak memory in MB."""
    torch.set_num_threads(THREADS)
    run = prepare(implementation, task, backbone)
    gc.collect()
    before = resident("VmRSS")
    with torch.inference_mode():
        run()  # threads start, kernels are chosen
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    peak = resident("VmHWM")
    return {"seconds": seconds, "peak_mb": peak, "peak_above_model_mb": peak - before}


def resident(field: str) -> float:
    """Resident memory of this process in MB: now (VmRSS) or at its peak (VmHWM). Linux."""
    # not ru_maxrss: that one survives exec, so that a child starts from its parent's peak
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--backbone", default="resnet50", choices=("resnet50", "swin_tiny"))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)

    fresh = multiprocessing.get_context("spawn")
    cases = [(task, implementation) for task in TASKS for implementation in IMPLEMENTATIONS]
    runs: dict[tuple[str, str], list[dict[str, float]]] = {case: [] for case in cases}
    for repeat in range(args.repeats):
        for task, implementation in cases:
            with fresh.Pool(1) as pool:
                result = pool.apply(measure, (implementation, task, args.backbone))
            runs[task, implementation].append(result)
            print(
                f"{repeat + 1}/{args.repeats} {task} {implementation} {result['seconds']:.2f} s",
                file=sys.stderr,
            )

    medians = {
        case: {name: statistics.median(r[name] for r in results) for name in results[0]}
        for case, results in runs.items()
    }
    rows = [
        {"task": task, "implementation": implementation, **medians[task, implementation], "runs": results}
        for (task, implementation), results in runs.items()
    ]
    about = {
        "command": f"python -m bench.bench_model --backbone {args.backbone} --repeats {args.repeats}",
        "clip": [FRAMES, HEIGHT, WIDTH],
        "dtype": "float32",
        "objects": NUM_OBJECTS,
        "backbone": args.backbone,
        "machine": {**machine(), "threads": THREADS},
    }
    args.out.write_text(json.dumps({**about, "results": rows}, indent=1) + "\n")
    print(table(medians))


def table(medians: dict[tuple[str, str], dict[str, float]]) -> str:
    """Medians side by side; a ratio below 1 is in favour of tarvis."""
    lines = [f"{'':6}{'':22}{IMPLEMENTATIONS[0]:>14}{IMPLEMENTATIONS[1]:>16}{'ratio':>8}"]
    for task in TASKS:
        ours, theirs = (medians[task, implementation] for implementation in IMPLEMENTATIONS)
        for name in ours:
            ratio = ours[name] / theirs[name]
            lines.append(f"{task:6}{name:22}{ours[name]:14.2f}{theirs[name]:16.2f}{ratio:8.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
