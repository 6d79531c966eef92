"""Samples of mask features, mask logits and targets at random points, against grid_sample.

    pytest bench/bench_point_sample.py --benchmark-only

12544 points a frame of 3 frames at 512 x 896. Features have 256 channels at stride 4 and points shared by
their frames; logits and targets are those of 12 objects, each map with its own points. On a GPU features are
bfloat16, on a CPU everything is a quarter of the area in float32, with a quarter of the points. Time includes
the backward pass where there are gradients.
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
from kernels.point_sample import point_sample

ON_GPU = DEVICE == "cuda"
FRAMES, OBJECTS, CHANNELS = 3, 12, 256
SIZE, POINTS = ((512, 896), 12544) if ON_GPU else ((256, 448), 3136)
QUARTER = (SIZE[0] // 4, SIZE[1] // 4)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
IMPLS = ("chain", "reference", "compiled", "triton", "triton deterministic")

pytestmark = pytest.mark.benchmark(timer=gpu_clock)

Sample = Callable[[Tensor, Tensor], Tensor]


def chain(maps: Tensor, points: Tensor) -> Tensor:
    """By grid_sample, [N, R, C], as models do without the operator."""
    grid = (2 * points - 1).expand(maps.shape[0], -1, -1)[:, None]
    sampled = F.grid_sample(maps.float(), grid, mode="bilinear", align_corners=False)
    return sampled[:, :, 0].transpose(1, 2)


def sampler(impl: str) -> Sample:
    if impl == "chain":
        return chain
    if impl == "compiled":
        return compiled(lambda maps, points: point_sample(maps, points, impl="reference"))
    name, _, deterministic = impl.partition(" ")
    return lambda m, p: point_sample(m, p, deterministic=bool(deterministic), impl=cast(Impl, name))


def with_gradient(sample: Sample, maps: Tensor, points: Tensor) -> Callable[[], Any]:
    maps.requires_grad_()

    def run() -> Tensor:
        out = sample(maps, points)
        (grad,) = torch.autograd.grad(out, maps, torch.ones_like(out))
        return grad

    return run


def random_points(sets: int) -> Tensor:
    return torch.rand(sets, POINTS, 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.mark.parametrize("impl", IMPLS)
def test_features(benchmark: Any, impl: str) -> None:
    require(impl.split()[0])
    benchmark.group = "points of mask features"
    maps = torch.randn(FRAMES, *QUARTER, CHANNELS, generator=torch.Generator().manual_seed(0))
    maps = maps.to(DEVICE, DTYPE).permute(0, 3, 1, 2)
    timed(benchmark, with_gradient(sampler(impl), maps, random_points(1)))


@pytest.mark.parametrize("impl", IMPLS)
def test_logits(benchmark: Any, impl: str) -> None:
    require(impl.split()[0])
    benchmark.group = "points of mask logits"
    maps = torch.randn(OBJECTS * FRAMES, 1, *QUARTER, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    timed(benchmark, with_gradient(sampler(impl), maps, random_points(OBJECTS * FRAMES)))


@pytest.mark.parametrize("impl", IMPLS[:-1])
def test_targets(benchmark: Any, impl: str) -> None:
    require(impl)
    benchmark.group = "points of targets"
    maps = torch.rand(OBJECTS * FRAMES, 1, *SIZE, generator=torch.Generator().manual_seed(0)) > 0.5
    maps, points, sample = maps.to(DEVICE), random_points(OBJECTS * FRAMES), sampler(impl)
    with torch.inference_mode():
        timed(benchmark, lambda: sample(maps, points))
