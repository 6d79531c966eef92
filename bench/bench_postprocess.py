"""What follows the network in video panoptic segmentation: ours against the plain transcription of it.

    pytest bench/bench_postprocess.py --benchmark-only
    python -m bench.bench_postprocess --out bench/results/postprocess_cpu.json   # in fresh processes

A clip of VIPSeg: 12 frames of 720 x 1280 seen at 576 x 1024, so logits of 144 x 256; 124 classes, of which 58
are things; 20 tracks. float32, two threads on a CPU.

labels: every pixel's stuff class. Ours upsamples the rows of stuff frame by frame and keeps bytes; the
transcription sets the other rows to -1000 and takes the whole clip through
interpolate -> crop -> interpolate -> argmax.
masks: the sign of the tracks' logits as run-length codes. Ours frame by frame; the transcription resizes the
clip in the same way and gives pycocotools one mask after another.

Both sides must agree on 99.99 % of the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pycocotools import mask as coco
from torch import Tensor

from bench.fresh import (
    THREADS,
    Numbers,
    forget_peak,
    in_fresh_process,
    in_turn,
    medians,
    parse,
    resident,
    second_run,
    write,
)
from bench.timing import DEVICE, best_in_turn, machine, timed
from kernels.mask_upsample import label_upsample, mask_upsample
from tarvis.datasets.classes import class_table
from tarvis.files import rle
from tarvis.structures import RLE

FRAMES, QUARTER, NETWORK, SIZE = 12, (144, 256), (576, 1024), (720, 1280)
NUM_TRACKS = 20
AGREEMENT = 0.9999
"""Share of the pixels that must be equal; rounding decides between values that are nearly so."""
SPEEDUP, MEMORY = 4, 1 / 4
"""Of the labels on a CPU: how much faster at least, and at most how much of the peak memory."""

Codes = list[list[RLE]]  # of each frame and track


def stuff_rows() -> list[int]:
    return list(class_table("vipseg").stuff)


def semantic_logits() -> Tensor:
    """[124, T, h, w] that change over a few pixels, as those of a network do."""
    return smooth(len(class_table("vipseg").names), (QUARTER[0] // 4, QUARTER[1] // 4))


def track_logits() -> Tensor:
    """[N, T, h, w]: a few blobs a track, which cover a tenth of the frame."""
    return smooth(NUM_TRACKS, (QUARTER[0] // 24, QUARTER[1] // 24)) - 0.8


def smooth(num_maps: int, coarse: tuple[int, int]) -> Tensor:
    noise = torch.randn(num_maps, FRAMES, *coarse, generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, QUARTER, mode="bicubic").to(DEVICE)


def resized(logits: Tensor) -> Tensor:
    """The upsampled logits [N, T, H, W] as the published code makes them."""
    big = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
    return F.interpolate(big[..., : NETWORK[0], : NETWORK[1]], SIZE, mode="bilinear", align_corners=False)


def labels_tarvis(logits: Tensor) -> Tensor:
    """[T, H, W] uint8. The model computes nothing but the rows of stuff, so that taking them is no part."""
    stuff = np.zeros(256, np.uint8)
    stuff[: len(logits)] = stuff_rows()
    maps = [label_upsample(logits[:, t : t + 1], NETWORK, SIZE)[0].cpu() for t in range(FRAMES)]
    return torch.from_numpy(np.stack([cv2.LUT(rows.numpy(), stuff) for rows in maps]))


def labels_transcription(logits: Tensor) -> Tensor:
    """[T, H, W] int64."""
    things = sorted({*range(len(logits))} - {*stuff_rows()})
    logits[things] = -1000  # in place, as published
    return resized(logits).argmax(0).cpu()


def masks_tarvis(logits: Tensor) -> Codes:
    return [rle.encode(mask_upsample(logits[:, t : t + 1], NETWORK, SIZE)[:, 0]) for t in range(FRAMES)]


def masks_transcription(logits: Tensor) -> Codes:
    masks = (resized(logits) > 0).cpu().numpy()
    return [[coco.encode(np.asfortranarray(mask, np.uint8)) for mask in masks[:, t]] for t in range(FRAMES)]


Run = Callable[[], Any]
IMPLEMENTATIONS = ("tarvis", "transcription")
CASES = ("labels", "masks")


def prepare(case: str, implementation: str) -> Run:
    """The inputs are made here, so that they are neither timed nor counted."""
    if case == "masks":
        logits = track_logits()
        return lambda: {"tarvis": masks_tarvis, "transcription": masks_transcription}[implementation](logits)
    logits = semantic_logits()
    if implementation == "transcription":
        return lambda: labels_transcription(logits)
    stuff = logits[stuff_rows()]
    return lambda: labels_tarvis(stuff)


def pixels(case: str, found: Any) -> NDArray[Any]:
    if case == "labels":
        return found.numpy()
    return np.array([[rle.decode(code) for code in codes] for codes in found])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_time(benchmark: Any, case: str, implementation: str) -> None:
    benchmark.group = f"postprocess {case}"
    with torch.inference_mode():
        timed(benchmark, prepare(case, implementation))


@pytest.mark.parametrize("case", CASES)
def test_speedup(benchmark: Any, case: str) -> None:
    benchmark.group = f"postprocess {case}"
    runs = {name: prepare(case, name) for name in IMPLEMENTATIONS}
    with torch.inference_mode():
        best, found = best_in_turn(runs, 3)
        benchmark.pedantic(runs["tarvis"])
    benchmark.extra_info["speedup"] = best["transcription"] / best["tarvis"]
    ours, theirs = (pixels(case, found[name]) for name in IMPLEMENTATIONS)
    assert (ours == theirs).mean() >= AGREEMENT
    if case == "labels" and DEVICE == "cpu":
        assert best["transcription"] >= SPEEDUP * best["tarvis"], best


@pytest.mark.skipif(DEVICE != "cpu", reason="resident memory is that of the CPU")
def test_memory(benchmark: Any) -> None:
    benchmark.group = "postprocess memory"
    peaks = {name: in_fresh_process(measure, "labels", name)["peak_mb"] for name in IMPLEMENTATIONS}
    benchmark.extra_info.update(peaks)
    benchmark.pedantic(lambda: None)
    assert peaks["tarvis"] <= MEMORY * peaks["transcription"], peaks


def measure(case: str, implementation: str) -> Numbers:
    """In this process, which must be fresh: seconds of the second run, peak memory above the inputs in MB."""
    torch.set_num_threads(THREADS)
    run = prepare(case, implementation)
    before = forget_peak()
    with torch.inference_mode():
        found = second_run(run)
    return {**found, "peak_mb": resident("VmHWM") - before}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(__doc__, argv, repeats=3)
    cases = [(case, name) for case in CASES for name in IMPLEMENTATIONS]
    runs = in_turn(cases, args.repeats, partial(in_fresh_process, measure))
    rows = []
    for case in CASES:
        ours, theirs = (medians(runs[case, name]) for name in IMPLEMENTATIONS)
        speedup, memory = theirs["seconds"] / ours["seconds"], ours["peak_mb"] / theirs["peak_mb"]
        rows.append(
            {"case": case, "tarvis": ours, "transcription": theirs, "speedup": speedup, "memory": memory}
        )
    about = {
        "command": f"python -m bench.bench_postprocess --out {args.out.name} --repeats {args.repeats}",
        "clip": [FRAMES, *SIZE],
        "repeats": args.repeats,
        "machine": {**machine(), "threads": THREADS},
    }
    write(args.out, {**about, "rows": rows})
    for row in rows:
        print(f"{row['case']}: {row['speedup']:.1f} times as fast, {row['memory']:.2f} of the memory")


if __name__ == "__main__":
    main()
