"""Masks: attention masks, attention that reads them, masks and labels at image size."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.case import Case, Gate, Scale, dtype_name, relative, unequal, ways, with_gradients
from bench.timing import Inputs
from kernels import label_upsample, mask_bits, mask_upsample, masked_attention
from kernels.mask_bits import pack_bits, unpack_bits
from tarvis.model.decoder import pool_mask_features

C, HEADS, LAYERS = 256, 8, 9
STRIDES = (32, 16, 8)  # layers take keys from these in turn
EMPTY_ROWS = 4  # queries that see nothing
SURE = 1e-2  # logits closer to zero may fall on either side
ATTENTION_LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Clip(NamedTuple):
    """A batch of clips of T frames; sizes are multiples of the strides that are used."""

    name: str
    batch: int
    frames: int
    height: int
    width: int

    def size(self, stride: int) -> tuple[int, int]:
        return self.height // stride, self.width // stride

    def keys(self, stride: int) -> int:
        h, w = self.size(stride)
        return self.frames * h * w


INFERENCE = Clip("12x480x864", 1, 12, 480, 864)
TRAINING = Clip("3x512x896 B=2", 2, 3, 512, 896)
ON_CPU = Clip("2x256x448", 1, 2, 256, 448)
TINY = Clip("tiny", 1, 2, 64, 64)


# Attention masks


def mask_features(clip: Clip, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[B, T, C, H/4, W/4], channels last in memory, as the neck gives them."""
    h, w = clip.size(4)
    return torch.randn(clip.batch, clip.frames, h, w, C, device=device).to(dtype).movedim(-1, 2)


def bits(device: str, scale: Scale) -> Iterator[Case]:
    """The product with its signs at each scale, then the chain of all layers of a decoder."""
    dtype = torch.float32 if scale == "cpu" else torch.bfloat16
    for clip in {"gpu": (INFERENCE, TRAINING), "cpu": (ON_CPU,), "tiny": (TINY,)}[scale]:
        queries = {"gpu": 150, "cpu": 50, "tiny": 40}[scale]
        for stride in STRIDES:
            for count in (100, 150, 200) if stride == 8 and clip is INFERENCE else (queries,):
                main = scale == "cpu" or (stride == 8 and count == 150)
                yield bits_case(clip, stride, count, dtype, device, main)
        yield all_layers_case(clip, queries, dtype, device, scale == "cpu" or clip is INFERENCE)


def bits_case(clip: Clip, stride: int, queries: int, dtype: torch.dtype, device: str, compiles: bool) -> Case:
    """Features are pooled beforehand, which happens once for all layers; "usual" reads those at stride 4."""
    N = clip.keys(stride)

    def make(seed: int) -> Inputs:
        torch.manual_seed(seed)
        features = mask_features(clip, device, dtype)
        query = torch.randn(clip.batch, queries, C, device=device).to(dtype)
        return query, pool_mask_features(features, clip.size(stride)), features

    def ours(impl: Any, query: Tensor, pooled: Tensor, _: Tensor) -> Any:
        return mask_bits(query, pooled, impl=impl)

    def usual(query: Tensor, _: Tensor, features: Tensor) -> Tensor:
        return usual_mask(query, features, clip.size(stride))

    def wrong(impl: str) -> float:
        query, pooled, _ = make(0)
        found, seen = ours(impl, query, pooled, _)
        logit = query.float() @ pooled.float()
        visible = unpack_bits(found, N)
        bad = (visible != (logit >= 0)) & (logit.abs() > SURE)
        padding = unpack_bits(found, 8 * found.shape[2])[..., N:]
        return float(bad.sum() + padding.sum() + (seen != visible.any(-1)).sum())

    values, words = clip.batch * C * (queries + N), clip.batch * queries * -(-N // 32)
    return Case(
        f"mask_bits {clip.name} 1/{stride} Q={queries} {dtype_name(dtype)}",
        make,
        ways(ours, {"usual": usual}, compiles=compiles),
        [Gate(f"wrong bits where |logit| > {SURE}", 0, wrong)],
        {
            "dram_bytes": dtype.itemsize * values + 4 * words,
            "tensor_flop": 2.0 * clip.batch * queries * N * C,
        },
    )


def all_layers_case(clip: Clip, queries: int, dtype: torch.dtype, device: str, compiles: bool) -> Case:
    """The attention masks of nine layers: pooled once and packed, or from full logits in each layer."""

    def make(seed: int) -> Inputs:
        torch.manual_seed(seed)
        layers = torch.randn(LAYERS, clip.batch, queries, C, device=device).to(dtype)
        return mask_features(clip, device, dtype), *layers

    def ours(impl: Any, features: Tensor, *layers: Tensor) -> list[Tensor]:
        pooled = [pool_mask_features(features, clip.size(stride)) for stride in STRIDES]
        found: list[Tensor] = []
        for i, query in enumerate(layers):
            found += mask_bits(query, pooled[i % 3], impl=impl)
        return found

    def usual(features: Tensor, *layers: Tensor) -> list[Tensor]:
        return [usual_mask(query, features, clip.size(STRIDES[i % 3])) for i, query in enumerate(layers)]

    keys = sum(clip.batch * 3 * clip.keys(stride) for stride in STRIDES)  # of all layers
    amounts = {
        "dram_bytes": dtype.itemsize * C * (clip.batch * clip.keys(4) + 2 * keys / 3 + keys / 3)
        + queries * keys / 8,
        "tensor_flop": 2.0 * queries * keys * C,
    }
    name = f"attention masks of {LAYERS} layers {clip.name} Q={queries} {dtype_name(dtype)}"
    return Case(name, make, ways(ours, {"usual": usual}, ("triton", "reference"), compiles), amounts=amounts)


def usual_mask(query: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
    """As Mask2Former does it in every layer: full logits, resized, thresholded, repeated. True = hidden."""
    logits = torch.einsum("bqc,btchw->bqthw", query, features)
    small = F.interpolate(logits.flatten(0, 1), size=size, mode="bilinear", align_corners=False)
    hidden = small.unflatten(0, logits.shape[:2]).flatten(2).sigmoid() < 0.5  # [B, Q, N]
    hidden = hidden & ~hidden.all(-1, keepdim=True)  # a query that sees nothing sees everything
    return hidden[:, None].repeat(1, HEADS, 1, 1).flatten(0, 1)  # [B*A, Q, N]


# Attention


class AttentionInputs(NamedTuple):
    q: Tensor  # [B, A, Q, D]
    k: Tensor  # [B, A, N, D]
    v: Tensor
    bits: Tensor
    seen: Tensor
    visible: Tensor  # [B, 1, Q, N] bool, for those who want it


def attention_inputs(
    clip: Clip, stride: int, queries: int, device: str, dtype: torch.dtype, seed: int
) -> AttentionInputs:
    """Queries see blobs of two percent of the keys; the first few see nothing."""
    torch.manual_seed(seed)
    B, N = clip.batch, clip.keys(stride)
    h, w = clip.size(stride)
    q = torch.randn(B, HEADS, queries, C // HEADS, device=device).to(dtype)
    k, v = torch.randn(2, B, N, HEADS, C // HEADS, device=device).to(dtype).transpose(2, 3)
    centre = torch.rand(B, queries, 2, 1, 1, 1, device=device)
    y = (torch.arange(h, device=device) + 0.5)[:, None] / h - centre[:, :, 0]
    x = (torch.arange(w, device=device) + 0.5) / w - centre[:, :, 1]
    blob = (y**2 + x**2) < 0.02 / 3.14  # [B, Q, 1, h, w]
    blob[:, :EMPTY_ROWS] = False
    mask = blob.expand(B, queries, clip.frames, h, w).reshape(B, queries, N)
    seen = mask.any(-1)
    return AttentionInputs(q, k, v, pack_bits(mask), seen, (mask | ~seen[..., None])[:, None])


def attention(device: str, scale: Scale) -> Iterator[Case]:
    """The operator at each scale, with its backward, and a layer with its projections."""
    if scale != "gpu":
        clip, queries, strides = (TINY, 10, (8,)) if scale == "tiny" else (ON_CPU, 50, STRIDES)
        for backward in (False, True):
            for stride in strides:
                yield attention_case(clip, stride, queries, FP32, device, backward, scale == "cpu")
        yield layer_case(clip, 8, queries, FP32, device)
        return
    yield attention_case(INFERENCE, 8, 150, BF16, device)
    yield layer_case(INFERENCE, 8, 150, BF16, device)
    yield attention_case(INFERENCE, 8, 150, FP32, device)
    yield attention_case(TRAINING, 8, 150, BF16, device, backward=True)
    yield attention_case(TRAINING, 8, 150, FP32, device, backward=True)
    for stride, queries in ((16, 150), (32, 150), (8, 100), (8, 200)):
        yield attention_case(INFERENCE, stride, queries, BF16, device)
    yield attention_case(TRAINING, 8, 150, BF16, device)
    yield attention_case(TRAINING, 8, 150, FP16, device)


def attend(impl: Any, q: Tensor, k: Tensor, v: Tensor, words: Tensor, seen: Tensor, _: Tensor) -> Tensor:
    return masked_attention(q, k, v, words, seen, impl=impl)


def attend_by_sdpa(q: Tensor, k: Tensor, v: Tensor, _: Tensor, __: Tensor, visible: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def attend_by_scores(q: Tensor, k: Tensor, v: Tensor, _: Tensor, __: Tensor, visible: Tensor) -> Tensor:
    """As nn.MultiheadAttention computes it when weights are wanted: scores lie in memory."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v


def attention_case(
    clip: Clip,
    stride: int,
    queries: int,
    dtype: torch.dtype,
    device: str,
    backward: bool = False,
    compiles: bool = False,
) -> Case:
    def make(seed: int) -> Inputs:
        inputs = attention_inputs(clip, stride, queries, device, dtype, seed)
        if not backward:
            return inputs
        q, k, v = (x.requires_grad_() for x in inputs[:3])
        return *inputs, torch.randn_like(q)

    def exact() -> Inputs:
        q, k, v, words, seen, visible, *grad = make(0)
        return *(x.detach().float().requires_grad_(backward) for x in (q, k, v)), words, seen, visible, *grad

    @torch.no_grad()
    def error(impl: str) -> float:
        return relative(attend(impl, *make(0)), attend_by_scores(*exact()))

    def gradient_error(impl: str) -> float:
        got, expected = run(impl)(*make(0)), with_gradients(attend_by_scores)(*exact())
        return max(relative(a, b) for a, b in zip(got, expected, strict=True))

    def run(impl: str) -> Any:
        return with_gradients(partial(attend, impl))

    def unsteady(impl: str) -> float:
        return unequal(run(impl), make(0))

    gates = [Gate("out against a softmax in fp32", ATTENTION_LIMIT[dtype], error)]
    if backward:
        limit = 2 * ATTENTION_LIMIT[dtype]
        gates = [
            Gate("gradients against a softmax in fp32", limit, gradient_error),
            Gate("gradients differ from run to run", 0, unsteady),
        ]
    B, N, kind = clip.batch, clip.keys(stride), "backward " if backward else ""
    rows = B * C * (2 * queries + 2 * N)  # of queries, output, keys, values
    read = dtype.itemsize * rows + B * queries * (N // 8 + 1)
    others = {"sdpa bool mask": attend_by_sdpa, "stored scores": attend_by_scores}
    return Case(
        f"masked_attention {kind}{clip.name} 1/{stride} Q={queries} {dtype_name(dtype)}",
        make,
        ways(attend, others, ("triton", "reference"), compiles),
        gates,
        {
            "dram_bytes": (2 if backward else 1) * read,
            "tensor_flop": (5 if backward else 2) * 2.0 * B * queries * N * C,
        },
        backward,
    )


def layer_case(clip: Clip, stride: int, queries: int, dtype: torch.dtype, device: str) -> Case:
    """With the projections of queries, keys, values and output, against nn.MultiheadAttention."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(C, HEADS, batch_first=True, device=device, dtype=dtype)
    weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)

    def make(seed: int) -> Inputs:
        inputs = attention_inputs(clip, stride, queries, device, dtype, seed)
        query = torch.randn(clip.batch, queries, C, device=device).to(dtype)
        memory = torch.randn(clip.batch, clip.keys(stride), C, device=device).to(dtype)
        hidden = ~inputs.visible.expand(-1, HEADS, -1, -1).flatten(0, 1)  # [B*A, Q, N]
        return query, memory, inputs.bits, inputs.seen, hidden

    def ours(impl: Any, query: Tensor, memory: Tensor, words: Tensor, seen: Tensor, _: Tensor) -> Tensor:
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, memory, memory), weights, biases, strict=True)
        )
        out = masked_attention(q, k, v, words, seen, impl=impl)
        return module.out_proj(out.transpose(1, 2).flatten(2))

    def usual(query: Tensor, memory: Tensor, _: Tensor, __: Tensor, hidden: Tensor) -> Tensor:
        return module(query, memory, memory, attn_mask=hidden)[0]

    name = f"masked attention layer {clip.name} 1/{stride} Q={queries} {dtype_name(dtype)}"
    return Case(name, make, ways(ours, {"nn.MultiheadAttention": usual}, ("triton", "reference")))


# Masks at image size


def upsample(device: str, scale: Scale) -> Iterator[Case]:
    """Logits at a quarter of the size -> masks as bytes or bits, and labels."""
    clip = INFERENCE
    masks = [(150, (480, 864)), (20, (480, 864)), (20, (720, 1280))]
    labels = [(20, (480, 864))]
    if scale == "cpu":
        clip = Clip("2x240x432", 1, 2, 240, 432)
        masks = labels = [(8, (240, 432)), (8, (360, 640))]
    elif scale == "tiny":
        clip, masks, labels = TINY, [(2, (50, 60))], [(3, (64, 64))]
    for count, size in masks:
        for packed in (False, True):
            compiles = not packed and (scale == "cpu" or count == 20)
            yield mask_case(clip, count, size, packed, device, compiles)
    for count, size in labels:
        yield label_case(clip, count, size, device, compiles=scale == "cpu")


def logit_maps(count: int, clip: Clip, device: str, seed: int) -> tuple[Tensor]:
    """Smooth maps [N, T, h, w]: noise at a quarter of their size, enlarged."""
    torch.manual_seed(seed)
    h, w = clip.size(4)
    noise = torch.randn(count, clip.frames, h // 4, w // 4, device=device)
    return (F.interpolate(noise, size=(h, w), mode="bilinear"),)


def usual_upsampling(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """float32 maps of full size, resized once more if the image has another size."""
    full = F.interpolate(logits.float(), scale_factor=4, mode="bilinear", align_corners=False)
    return full if full.shape[2:] == size else F.interpolate(full, size=size, mode="bilinear")


def mask_case(
    clip: Clip, count: int, size: tuple[int, int], packed: bool, device: str, compiles: bool
) -> Case:
    network, make = (clip.height, clip.width), partial(logit_maps, count, clip, device)

    def ours(impl: Any, logits: Tensor) -> Tensor:
        return mask_upsample(logits, network, size, packed=packed, impl=impl)

    def usual(logits: Tensor) -> Tensor:
        return usual_upsampling(logits, size) > 0

    def wrong(impl: str) -> float:
        (logits,) = make(0)
        values, found = usual_upsampling(logits, size), ours(impl, logits)
        found = unpack_bits(found, size[1]) if packed else found
        return float(((found != (values > 0)) & (values.abs() > 1e-4)).sum())

    pixels = count * clip.frames * size[0] * size[1]
    kind = "bits" if packed else "bytes"
    return Case(
        f"mask_upsample {clip.name} N={count} to {size[0]}x{size[1]} {kind}",
        make,
        ways(ours, {"interpolate": usual}, compiles=compiles),
        [Gate("wrong pixels where |value| > 1e-4", 0, wrong)],
        {"dram_bytes": 4 * count * clip.keys(4) + pixels / (8 if packed else 1)},
    )


def label_case(clip: Clip, count: int, size: tuple[int, int], device: str, compiles: bool) -> Case:
    network, make = (clip.height, clip.width), partial(logit_maps, count, clip, device)

    def ours(impl: Any, logits: Tensor) -> Tensor:
        return label_upsample(logits, network, size, impl=impl)

    def usual(logits: Tensor) -> Tensor:
        return usual_upsampling(logits, size).argmax(0)

    def wrong(impl: str) -> float:
        (logits,) = make(0)
        values, found = usual_upsampling(logits, size), ours(impl, logits).long()  # [K, T, H, W], [T, H, W]
        return float((values.amax(0) - values.gather(0, found[None])[0] > 1e-4).sum())

    return Case(
        f"label_upsample {clip.name} K={count} to {size[0]}x{size[1]}",
        make,
        ways(ours, {"interpolate": usual}, compiles=compiles),
        [Gate("labels that are not the largest by 1e-4", 0, wrong)],
        {"dram_bytes": 4 * count * clip.keys(4) + clip.frames * size[0] * size[1]},
    )
