"""Matching costs of ten decoder outputs for one clip, against costs from logits that were stored.

    pytest bench/bench_mask_cost.py --benchmark-only

150 queries, 10 targets, 12544 points in each of 3 frames of 512 x 896; on a GPU in bfloat16, on a CPU in
float32 with two decoder outputs, a quarter of the area and of the points. All outputs share their points. The
chain makes the logits of every query at stride 4, samples them and takes the costs in float32; the operator
samples features, once, and this is timed with it. "alone" is the operator for features already sampled.
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
from kernels.mask_cost import mask_cost
from kernels.point_sample import point_sample

ON_GPU = DEVICE == "cuda"
FRAMES, QUERIES, TARGETS, CHANNELS = 3, 150, 10, 256
OUTPUTS, SIZE, POINTS = (10, (128, 224), 12544) if ON_GPU else (2, (64, 112), 3136)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32

pytestmark = pytest.mark.benchmark(timer=gpu_clock)

Costs = tuple[Tensor, Tensor]


def chain(embedding: Tensor, features: Tensor, points: Tensor, targets: Tensor) -> Costs:
    """One decoder output after the other, as their logits would be stored."""
    grid = (2 * points - 1).expand(FRAMES, -1, -1)[:, None]
    costs = []
    for queries in embedding:
        stored = torch.einsum("qc,tchw->tqhw", queries, features)
        x = (
            F.grid_sample(stored.float(), grid, align_corners=False)[:, :, 0].transpose(0, 1).flatten(1)
        )  # [Q, R]
        bce = F.softplus(x).mean(1, keepdim=True) - x @ targets.T / x.shape[1]
        p = x.sigmoid()
        dice = 1 - (2 * p @ targets.T + 1) / (p.sum(1, keepdim=True) + targets.sum(1) + 1)
        costs.append(torch.stack((bce, dice)))
    bce, dice = torch.stack(costs, 1)
    return bce, dice


def operator(impl: Impl) -> Callable[[Tensor, Tensor, Tensor, Tensor], Costs]:
    def run(embedding: Tensor, features: Tensor, points: Tensor, targets: Tensor) -> Costs:
        sampled = point_sample(features, points, impl=impl).flatten(0, 1)  # [T*P, C]
        return mask_cost(embedding, sampled, targets, impl=impl)

    return run


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(OUTPUTS, QUERIES, CHANNELS, generator=generator) / CHANNELS**0.5
    features = torch.randn(FRAMES, *SIZE, CHANNELS, generator=generator).permute(0, 3, 1, 2)
    points = torch.rand(1, POINTS, 2, generator=generator)
    targets = (torch.rand(TARGETS, FRAMES * POINTS, generator=generator) > 0.9).float()
    return embedding.to(DEVICE, DTYPE), features.to(DEVICE, DTYPE), points.to(DEVICE), targets.to(DEVICE)


@pytest.mark.parametrize("impl", ["chain", "chain compiled", "reference", "compiled", "triton"])
def test_costs_of_a_clip(benchmark: Any, impl: str) -> None:
    require(impl.split()[-1])
    benchmark.group = "matching cost"
    run = {
        "chain": lambda: chain,
        "chain compiled": lambda: compiled(chain),
        "compiled": lambda: compiled(operator("reference")),
    }.get(impl, lambda: operator(cast(Impl, impl)))()
    arguments = inputs()
    with torch.inference_mode():
        result = timed(benchmark, lambda: run(*arguments))
        tolerance = 2e-2 if ON_GPU else 1e-4  # the chain rounds stored logits to bfloat16
        for got, expected in zip(result, chain(*arguments), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("impl", ["reference", "compiled", "triton"])
def test_alone(benchmark: Any, impl: str) -> None:
    require(impl)
    benchmark.group = "matching cost, features already sampled"
    embedding, features, points, targets = inputs()
    sampled = point_sample(features, points).flatten(0, 1)
    if impl == "compiled":
        run = compiled(lambda e, f, t: mask_cost(e, f, t, impl="reference"))
    else:
        run = lambda e, f, t: mask_cost(e, f, t, impl=cast(Impl, impl))  # noqa: E731
    with torch.inference_mode():
        timed(benchmark, lambda: run(embedding, sampled, targets))
