"""Final masks and labels, against the chain of resizes that defines them.

    pytest bench/bench_mask_upsample.py --benchmark-only

On a GPU 12 frames of 480 x 864 with 20 masks or 124 classes, at that size and at 720 x 1280, in bfloat16; on
a CPU two frames of a quarter of the area with 8 maps in float32. The chain upsamples four times, cuts the
padding off, resizes and takes the sign or the largest map: what a model without the operator does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import DEVICE, compiled, gpu_clock, require, timed
from kernels.dispatch import Impl
from kernels.mask_upsample import label_upsample, mask_upsample
from kernels.taps import Size

ON_GPU = DEVICE == "cuda"
FRAMES, NETWORK = (12, (480, 864)) if ON_GPU else (2, (240, 432))
SIZES: tuple[Size, ...] = ((480, 864), (720, 1280)) if ON_GPU else ((240, 432), (360, 640))
NUM_MASKS, NUM_CLASSES = (20, 124) if ON_GPU else (8, 8)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32

Run = Callable[[Tensor, Size], Tensor]


def chain(logits: Tensor, size: Size) -> Tensor:
    """The upsampled logits [N, T, H, W], every step a map of full size."""
    big = F.interpolate(logits.float(), scale_factor=4, mode="bilinear", align_corners=False)
    cut = big[..., : NETWORK[0], : NETWORK[1]]
    return F.interpolate(cut, size, mode="bilinear", align_corners=False)


def chain_masks(logits: Tensor, size: Size) -> Tensor:
    return chain(logits, size) > 0


def chain_labels(logits: Tensor, size: Size) -> Tensor:
    return chain(logits, size).argmax(0).to(torch.uint8)


def masks(impl: str, form: str) -> Run:
    if impl == "chain":
        return chain_masks
    if impl == "compiled":
        return compiled(chain_masks)
    chosen = cast(Impl, impl)
    return lambda logits, size: mask_upsample(logits, NETWORK, size, packed=form == "bits", impl=chosen)


def labels(impl: str) -> Run:
    if impl == "chain":
        return chain_labels
    if impl == "compiled":
        return compiled(chain_labels)
    return lambda logits, size: label_upsample(logits, NETWORK, size, impl=cast(Impl, impl))


def random_logits(num_maps: int) -> Tensor:
    """[N, T, h, w], smooth on the scale of a few pixels as those of a network are."""
    h, w = NETWORK[0] // 4, NETWORK[1] // 4
    coarse = torch.randn(num_maps, FRAMES, h // 4, w // 4, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse.to(DEVICE), (h, w), mode="bilinear").to(DTYPE)


def name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


@pytest.mark.benchmark(group="mask_upsample", timer=gpu_clock)
@pytest.mark.parametrize("size", SIZES, ids=name)
@pytest.mark.parametrize(
    ("impl", "form"),
    [
        ("chain", "bytes"),
        ("compiled", "bytes"),
        *((impl, form) for impl in ("reference", "cuda", "triton") for form in ("bytes", "bits")),
    ],
)
def test_masks(benchmark: Any, impl: str, form: str, size: Size) -> None:
    require(impl)
    logits, run = random_logits(NUM_MASKS), masks(impl, form)
    with torch.inference_mode():
        out = timed(benchmark, lambda: run(logits, size))
    assert out.shape[:3] == (NUM_MASKS, FRAMES, size[0])


@pytest.mark.benchmark(group="label_upsample", timer=gpu_clock)
@pytest.mark.parametrize("size", SIZES, ids=name)
@pytest.mark.parametrize("impl", ["chain", "compiled", "reference", "cuda", "triton"])
def test_labels(benchmark: Any, impl: str, size: Size) -> None:
    require(impl)
    logits, run = random_logits(NUM_CLASSES), labels(impl)
    with torch.inference_mode():
        out = timed(benchmark, lambda: run(logits, size))
    assert out.shape == (FRAMES, *size)
