"""Deformable attention: grid_sample, as in Deformable DETR's PyTorch form, against this project's operator.

    pytest bench/bench_ms_deform_attn.py --benchmark-only

Encoder self-attention from raw offsets and logits to the output: softmax and sampling locations are part of
what is timed. 8 heads of 32 channels, levels at 1/8, 1/16 and 1/32, 4 points, offsets with a standard
deviation of 2 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu.classic import by_grid_sample
from bench.timing import DEVICE, compiled, gpu_clock, require, timed
from kernels import ms_deform_attn
from kernels.ms_deform_attn import cell_centres

STRIDES = (8, 16, 32)
HEADS, DIM, POINTS = 8, 32, 4
CLIPS = {"1x480x864": (1, 480, 864), "6x256x448": (6, 256, 448)}
if DEVICE == "cuda":
    CLIPS = {"12x480x864": (12, 480, 864), "3x512x896": (3, 512, 896)}
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16]
IMPLEMENTATIONS = ["grid_sample", "grid_sample compiled", "reference", "compiled", "cuda", "triton"]

Shapes = list[tuple[int, int]]


def inputs(clip: str, dtype: torch.dtype) -> tuple[list[Tensor], Shapes]:
    """Value, offset and logit of one encoder layer, and the sizes of its levels."""
    frames, height, width = CLIPS[clip]
    shapes = [(height // stride, width // stride) for stride in STRIDES]
    cells = sum(h * w for h, w in shapes)
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(frames, cells, HEADS, DIM, generator=generator)
    logit = torch.randn(frames, cells, HEADS, len(shapes), POINTS, generator=generator)
    offset = 2 * torch.randn(*logit.shape, 2, generator=generator)
    return [x.to(DEVICE, dtype) for x in (value, offset, logit)], shapes


def operator(implementation: str, shapes: Shapes) -> Callable[..., Tensor]:
    """(value, offset, logit) -> [B, S, A*D]; skips the test where it cannot run."""
    centres = cell_centres(shapes, torch.device(DEVICE))
    kind = implementation.removeprefix("grid_sample").strip() or "reference"
    require(kind)
    if implementation.startswith("grid_sample"):

        def run(value: Tensor, offset: Tensor, logit: Tensor) -> Tensor:
            return by_grid_sample(value, offset, logit, shapes, centres).to(value.dtype)
    else:
        impl: Any = "reference" if kind == "compiled" else kind

        def run(value: Tensor, offset: Tensor, logit: Tensor) -> Tensor:
            return ms_deform_attn(value, offset, logit, shapes, impl=impl)

    return compiled(run) if kind == "compiled" else run


@pytest.mark.benchmark(timer=gpu_clock)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
@pytest.mark.parametrize("clip", CLIPS)
def test_forward(benchmark: Any, clip: str, dtype: torch.dtype, implementation: str) -> None:
    benchmark.group = f"deformable attention, forward, {clip}, {str(dtype).split('.')[1]}"
    tensors, shapes = inputs(clip, dtype)
    run = operator(implementation, shapes)
    with torch.no_grad():
        out = timed(benchmark, lambda: run(*tensors))
    assert out.shape == (tensors[0].shape[0], tensors[0].shape[1], HEADS * DIM)


@pytest.mark.benchmark(timer=gpu_clock)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
@pytest.mark.parametrize("clip", CLIPS)
def test_forward_and_backward(benchmark: Any, clip: str, dtype: torch.dtype, implementation: str) -> None:
    benchmark.group = f"deformable attention, forward + backward, {clip}, {str(dtype).split('.')[1]}"
    tensors, shapes = inputs(clip, dtype)
    tensors = [x.requires_grad_() for x in tensors]
    run = operator(implementation, shapes)
    grad = torch.ones(*tensors[0].shape[:2], HEADS * DIM, device=DEVICE, dtype=dtype)
    grads = timed(benchmark, lambda: torch.autograd.grad(run(*tensors), tensors, grad))
    assert all(g.shape == x.shape for g, x in zip(grads, tensors, strict=True))
