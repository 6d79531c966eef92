"""Attention masks of one decoder layer at strides 8, 16 and 32, against the chain over full-size logits.

    pytest bench/bench_mask_bits.py --benchmark-only

On a GPU 12 frames of 480 x 864 and 150 queries in bfloat16, on a CPU two frames of a quarter of the area and
50 queries in float32; 256 channels, 8 heads. The chain dots queries with features at stride 4, resizes the
logits, takes a sigmoid, compares and repeats the mask for every head, as Mask2Former does in each layer. The
operator reads features that were resized beforehand, which happens once for all layers and is not timed.
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
from kernels.mask_bits import mask_bits, unpack_bits

ON_GPU = DEVICE == "cuda"
FRAMES, SIZE, QUERIES = (12, (120, 216), 150) if ON_GPU else (2, (60, 108), 50)
CHANNELS, HEADS = 256, 8
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
STRIDES = (8, 16, 32)

pytestmark = pytest.mark.benchmark(timer=gpu_clock)


def chain(query: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
    """query [B, Q, C], features [B, T, C, H, W] -> [B * heads, Q, T * h * w] bool, True = hidden."""
    logits = torch.einsum("bqc,btchw->bqthw", query, features)
    small = F.interpolate(logits, (features.shape[1], *size), mode="trilinear", align_corners=False)
    hidden = small.sigmoid().flatten(2) < 0.5  # [B, Q, N]
    hidden = hidden & ~hidden.all(-1, keepdim=True)  # indexing by a mask would synchronise and not compile
    return hidden[:, None].repeat(1, HEADS, 1, 1).flatten(0, 1)


def resized(features: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, T, C, H, W] -> [B, C, T * h * w], channels last in memory."""
    small = F.interpolate(features.flatten(0, 1).float(), size, mode="bilinear", align_corners=False)
    small = small.to(features.dtype).unflatten(0, features.shape[:2])  # [B, T, C, h, w]
    return small.permute(0, 1, 3, 4, 2).flatten(1, 3).contiguous().transpose(1, 2)


@pytest.mark.parametrize("impl", ["chain", "chain compiled", "reference", "compiled", "cuda", "triton"])
@pytest.mark.parametrize("stride", STRIDES)
def test_mask_of_one_layer(benchmark: Any, stride: int, impl: str) -> None:
    require(impl.split()[-1])
    benchmark.group = f"attention mask, stride {stride}"
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, QUERIES, CHANNELS, generator=generator).to(DEVICE, DTYPE)
    features = torch.randn(1, FRAMES, CHANNELS, *SIZE, generator=generator).to(DEVICE, DTYPE)
    size = (SIZE[0] * 4 // stride, SIZE[1] * 4 // stride)
    keys = resized(features, size)
    run: Callable[[], Any]
    if impl.startswith("chain"):
        function = compiled(chain) if impl == "chain compiled" else chain
        run = lambda: function(query, features, size)  # noqa: E731
    else:
        operator: Callable[[Tensor, Tensor], Any]
        if impl == "compiled":
            operator = compiled(lambda q, k: mask_bits(q, k, impl="reference"))
        else:
            operator = lambda q, k: mask_bits(q, k, impl=cast(Impl, impl))  # noqa: E731
        run = lambda: operator(query, keys)  # noqa: E731
    with torch.inference_mode():
        result = timed(benchmark, run)
        if not impl.startswith("chain"):
            bits, seen = result
            hidden = ~unpack_bits(bits, keys.shape[2]) & seen[..., None]
            wrong = hidden != chain(query, features, size)[:QUERIES]
            assert wrong.float().mean() < 0.02, "the operator and the chain differ beyond rounding"
