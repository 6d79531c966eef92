"""Masked cross-attention of one decoder layer at strides 8, 16 and 32, forward and with its backward.

    pytest bench/bench_masked_attention.py --benchmark-only

On a GPU 12 frames of 480 x 864 and 150 queries in bfloat16, on a CPU two frames of a quarter of the area and
50 queries in float32; 8 heads of 32 channels. "float mask" is what torch.nn.MultiheadAttention computes
between its projections when it is given a mask for every head, as Mask2Former gives it: all scores in memory.
"reference" is scaled_dot_product_attention with a bool mask that the heads share, made from the bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from bench.timing import DEVICE, compiled, gpu_clock, require, timed
from kernels.dispatch import Impl
from kernels.mask_bits import pack_bits
from kernels.masked_attention import masked_attention

ON_GPU = DEVICE == "cuda"
FRAMES, HEIGHT, WIDTH, QUERIES = (12, 480, 864, 150) if ON_GPU else (2, 240, 432, 50)
HEADS, HEAD_DIM = 8, 32
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
STRIDES = (8, 16, 32)
VISIBLE = 0.05

pytestmark = pytest.mark.benchmark(timer=gpu_clock)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def with_float_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q, k, v [B, A, .., D], mask [B * A, Q, N] 0 or -inf."""
    B, A = q.shape[:2]
    scaled = q.flatten(0, 1) * q.shape[-1] ** -0.5
    weights = torch.baddbmm(mask, scaled, k.flatten(0, 1).transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, v.flatten(0, 1)).unflatten(0, (B, A))


def attention(impl: str, visible: Tensor) -> Attention:
    """visible: [B, Q, N] bool."""
    if impl == "float mask":
        free = ~visible.any(-1, keepdim=True)
        hidden = ~(visible | free)[:, None].repeat(1, HEADS, 1, 1).flatten(0, 1)  # [B * A, Q, N]
        mask = torch.zeros(hidden.shape, dtype=DTYPE, device=DEVICE).masked_fill(hidden, float("-inf"))
        return lambda q, k, v: with_float_mask(q, k, v, mask)
    bits, seen = pack_bits(visible), visible.any(-1)
    if impl == "compiled":
        plain = compiled(lambda q, k, v, b, s: masked_attention(q, k, v, b, s, impl="reference"))
        return lambda q, k, v: plain(q, k, v, bits, seen)
    return lambda q, k, v: masked_attention(q, k, v, bits, seen, impl=cast(Impl, impl))


def inputs(stride: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, heads of [B, n, A * D], and what is visible, [B, Q, N]; one query sees nothing."""
    generator = torch.Generator().manual_seed(0)
    num_keys = FRAMES * -(-HEIGHT // stride) * -(-WIDTH // stride)
    q, k, v = (
        torch.randn(1, n, HEADS * HEAD_DIM, generator=generator)
        .to(DEVICE, DTYPE)
        .unflatten(-1, (HEADS, HEAD_DIM))
        .transpose(1, 2)
        for n in (QUERIES, num_keys, num_keys)
    )
    visible = torch.rand(1, QUERIES, num_keys, generator=generator) < VISIBLE
    visible[:, 1] = False
    return q, k, v, visible.to(DEVICE)


@pytest.mark.parametrize("impl", ["float mask", "reference", "compiled", "triton"])
@pytest.mark.parametrize("stride", STRIDES)
def test_forward(benchmark: Any, stride: int, impl: str) -> None:
    require(impl)
    benchmark.group = f"masked attention, stride {stride}"
    q, k, v, visible = inputs(stride)
    run = attention(impl, visible)
    with torch.inference_mode():
        out = timed(benchmark, lambda: run(q, k, v))
        expected = attention("float mask", visible)(q, k, v)
    assert (out - expected).abs().max() < 0.05


@pytest.mark.parametrize("impl", ["float mask", "reference", "compiled", "triton"])
@pytest.mark.parametrize("stride", STRIDES)
def test_forward_and_backward(benchmark: Any, stride: int, impl: str) -> None:
    require(impl)
    benchmark.group = f"masked attention with backward, stride {stride}"
    q, k, v, visible = inputs(stride)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    run = attention(impl, visible)
    grad = torch.randn_like(q)
    timed(benchmark, lambda: torch.autograd.grad(run(q, k, v), leaves, grad))
