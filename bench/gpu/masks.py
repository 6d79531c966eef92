"""Everything about masks: attention masks, attention that reads them, masks at image size, matching costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu.measure import peak_bytes, rotation, tensors
from bench.gpu.protocol import Recorder, dtype_name, relative
from bench.timing import compiled
from kernels import label_upsample, mask_bits, mask_upsample, masked_attention
from kernels.dispatch import Impl
from kernels.mask_bits import pack_bits, unpack_bits
from kernels.mask_cost import mask_cost
from kernels.point_sample import point_sample
from tarvis.model.decoder import pool_mask_features

C, HEADS, LAYERS = 256, 8, 9
STRIDES = (32, 16, 8)  # layers take keys from these in turn
EMPTY_ROWS = 4  # queries that see nothing
SURE = 1e-2  # logits closer to zero may fall on either side
ATTENTION_LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Clip(NamedTuple):
    """A batch of clips of T frames; sizes are multiples of 32."""

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
TINY = Clip("tiny", 1, 2, 64, 64)


def impl_of(name: str) -> Any:
    return cast(Impl, name)


# attention masks


def mask_features(clip: Clip, device: str, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[B, T, C, H/4, W/4], channels last in memory, as the neck gives them."""
    torch.manual_seed(seed)
    h, w = clip.size(4)
    return torch.randn(clip.batch, clip.frames, h, w, C, device=device).to(dtype).movedim(-1, 2)


def embeddings(clip: Clip, queries: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(clip.batch, queries, C, device=device).to(dtype)


def bits(record: Recorder) -> None:
    """Section: the product with its signs at each scale, then the chain of all layers of a decoder."""
    for clip in (TINY,) if record.small else (INFERENCE, TRAINING):
        for stride in STRIDES:
            wanted = (100, 150, 200) if stride == 8 and clip is INFERENCE else (150,)
            for queries in (40,) if record.small else wanted:
                _bits_at(record, clip, stride, queries)
        _mask_chain(record, clip, 40 if record.small else 150)
        record.free()


def _bits_at(record: Recorder, clip: Clip, stride: int, queries: int) -> None:
    device, N = record.device, clip.keys(stride)
    name = f"mask_bits {clip.name} 1/{stride} Q={queries} bf16"

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        features = torch.randn(clip.batch, N, C, device=device).bfloat16().transpose(1, 2)
        return embeddings(clip, queries, device), features

    query, features = inputs(0)

    def wrong(impl: str) -> float:
        found, seen = mask_bits(query, features, impl=impl_of(impl))
        logit = query.float() @ features.float()
        visible = unpack_bits(found, N)
        bad = (visible != (logit >= 0)) & (logit.abs() > SURE)
        padding = unpack_bits(found, 8 * found.shape[2])[..., N:]
        return float(bad.sum() + padding.sum() + (seen != visible.any(-1)).sum())

    for impl in record.gated(name):
        record.gate(name, impl, f"wrong bits where |logit| > {SURE}", partial(wrong, impl), 0)
    one = 2 * (query.numel() + features.numel())
    sets = [inputs(seed) for seed in range(1, 2 if record.small else 1 + rotation(one))]
    words = clip.batch * queries * -(-N // 32)
    amounts = {"dram_bytes": one + 4 * words, "tensor_flop": 2.0 * clip.batch * queries * N * C}
    for impl in record.timed(name, ["triton", "cuda", "reference"]):
        record.time(name, impl, partial(mask_bits, impl=impl_of(impl)), sets, amounts)
    if stride == 8 and queries == 150 and record.timed(name, ["compiled"]):
        record.time(name, "compiled", compiled(partial(mask_bits, impl="reference")), sets)


def _mask_chain(record: Recorder, clip: Clip, queries: int) -> None:
    """The attention masks of nine layers: pooled once and packed, or from full logits in each layer."""
    device, name = record.device, f"attention masks of {LAYERS} layers {clip.name} Q={queries} bf16"
    one = 2 * clip.batch * C * clip.keys(4)
    sets = []
    for seed in range(1, 2 if record.small else 1 + rotation(one)):
        features = mask_features(clip, device, seed)
        sets.append((features, *(embeddings(clip, queries, device) for _ in range(LAYERS))))

    def ours(impl: str, features: Tensor, *layers: Tensor) -> list[Tensor]:
        pooled = [pool_mask_features(features, clip.size(stride)) for stride in STRIDES]
        out: list[Tensor] = []
        for i, query in enumerate(layers):
            out += mask_bits(query, pooled[i % 3], impl=impl_of(impl))
        return out

    def usual(features: Tensor, *layers: Tensor) -> list[Tensor]:
        out = []
        for i, query in enumerate(layers):
            out.append(usual_mask(query, features, clip.size(STRIDES[i % 3])))
        return out

    reads = one + sum(3 * 2 * clip.batch * C * clip.keys(stride) for stride in STRIDES)
    writes = sum(3 * clip.batch * queries * clip.keys(stride) / 8 for stride in STRIDES)
    flop = sum(3 * 2.0 * clip.batch * queries * clip.keys(stride) * C for stride in STRIDES)
    amounts = {"dram_bytes": reads + writes, "tensor_flop": flop}
    for impl in record.timed(name, ["triton", "reference"]):
        record.time(name, impl, partial(ours, impl), sets, amounts)
    record.time(name, "usual", usual, sets)
    if clip is INFERENCE and record.timed(name, ["compiled"]):
        record.time(name, "usual compiled", compiled(usual), sets)


def usual_mask(query: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
    """As Mask2Former does it in every layer: full logits, resized, thresholded, repeated. True = hidden."""
    logits = torch.einsum("bqc,btchw->bqthw", query, features)
    small = F.interpolate(logits.flatten(0, 1), size=size, mode="bilinear", align_corners=False)
    hidden = small.unflatten(0, logits.shape[:2]).flatten(2).sigmoid() < 0.5  # [B, Q, N]
    hidden = hidden & ~hidden.all(-1, keepdim=True)  # a query that sees nothing sees everything
    return hidden[:, None].repeat(1, HEADS, 1, 1).flatten(0, 1)  # [B*A, Q, N]


# attention


class AttentionInputs(NamedTuple):
    q: Tensor  # [B, A, Q, D]
    k: Tensor  # [B, A, N, D]
    v: Tensor
    bits: Tensor
    seen: Tensor
    visible: Tensor  # [B, 1, Q, N] bool, for those who want it

    @property
    def size(self) -> int:
        return sum(x.numel() * x.element_size() for x in self[:5])


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


def stored_scores(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Attention as nn.MultiheadAttention computes it when weights are wanted: scores lie in memory."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v


def attention(record: Recorder) -> None:
    """Section: the operator at each scale, a layer with its projections, forward + backward."""
    if record.small:
        _attention_at(record, TINY, 8, 10, torch.float32)
        _attention_backward(record, TINY, 8, 10, torch.float32)
        _attention_layer(record, TINY, 8, 10, torch.float32)
        return
    _attention_at(record, INFERENCE, 8, 150, torch.bfloat16)
    _attention_layer(record, INFERENCE, 8, 150, torch.bfloat16)
    _attention_at(record, INFERENCE, 8, 150, torch.float32)
    _attention_backward(record, TRAINING, 8, 150, torch.bfloat16)
    _attention_backward(record, TRAINING, 8, 150, torch.float32)
    for stride, queries in ((16, 150), (32, 150), (8, 100), (8, 200)):
        _attention_at(record, INFERENCE, stride, queries, torch.bfloat16)
    _attention_at(record, TRAINING, 8, 150, torch.bfloat16)
    _attention_at(record, TRAINING, 8, 150, torch.float16)


def _ours(impl: str) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, words: Tensor, seen: Tensor, _: Tensor) -> Tensor:
        return masked_attention(q, k, v, words, seen, impl=impl_of(impl))

    return run


def _others() -> dict[str, Callable[..., Tensor]]:
    def sdpa(q: Tensor, k: Tensor, v: Tensor, _: Tensor, __: Tensor, visible: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)

    def stored(q: Tensor, k: Tensor, v: Tensor, _: Tensor, __: Tensor, visible: Tensor) -> Tensor:
        return stored_scores(q, k, v, visible)

    return {"sdpa bool mask": sdpa, "stored scores": stored}


def _attention_amounts(inputs: AttentionInputs, backward: bool = False) -> dict[str, float]:
    B, A, Q, D = inputs.q.shape
    product = 2.0 * B * A * Q * inputs.k.shape[2] * D
    out = inputs.q.numel() * inputs.q.element_size()
    if not backward:
        return {"dram_bytes": inputs.size + out, "tensor_flop": 2 * product}
    return {"dram_bytes": 2 * inputs.size + 2 * out, "tensor_flop": 5 * product}


def _attention_sets(
    record: Recorder, clip: Clip, stride: int, queries: int, dtype: torch.dtype
) -> list[AttentionInputs]:
    first = attention_inputs(clip, stride, queries, record.device, dtype, 0)
    count = 1 if record.small else rotation(first.size)
    rest = range(1, count)
    return [first, *(attention_inputs(clip, stride, queries, record.device, dtype, seed) for seed in rest)]


def _attention_at(record: Recorder, clip: Clip, stride: int, queries: int, dtype: torch.dtype) -> None:
    name = f"masked_attention {clip.name} 1/{stride} Q={queries} {dtype_name(dtype)}"
    sets = _attention_sets(record, clip, stride, queries, dtype)
    first = sets[0]

    def error(impl: str) -> float:
        q, k, v = (x.float() for x in first[:3])
        return relative(_ours(impl)(*first), stored_scores(q, k, v, first.visible))

    with torch.no_grad():
        for impl in record.gated(name, ["triton"]):
            check = "out against a softmax in fp32"
            record.gate(name, impl, check, partial(error, impl), ATTENTION_LIMIT[dtype])
        for impl in record.timed(name, ["triton", "reference"]):
            record.time(name, impl, _ours(impl), sets, _attention_amounts(first))
        for label, call in _others().items():
            record.time(name, label, call, sets)
    record.free()


def _attention_backward(record: Recorder, clip: Clip, stride: int, queries: int, dtype: torch.dtype) -> None:
    name = f"masked_attention backward {clip.name} 1/{stride} Q={queries} {dtype_name(dtype)}"
    sets = []
    for inputs in _attention_sets(record, clip, stride, queries, dtype):
        q, k, v = (x.requires_grad_() for x in inputs[:3])
        sets.append((*inputs, torch.randn_like(q)))
    first = AttentionInputs(*sets[0][:6])

    def gradients(call: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        *values, grad = inputs
        out = call(*values)
        return torch.autograd.grad(out, values[:3], grad.to(out.dtype))

    def error(impl: str) -> float:
        got = gradients(_ours(impl), *sets[0])
        q, k, v = (x.detach().float().requires_grad_() for x in first[:3])
        out = stored_scores(q, k, v, first.visible)
        expected = torch.autograd.grad(out, (q, k, v), sets[0][6].float())
        return max(relative(a, b) for a, b in zip(got, expected, strict=True))

    def unequal(impl: str) -> float:
        once, again = (gradients(_ours(impl), *sets[0]) for _ in range(2))
        return float(not all(torch.equal(a, b) for a, b in zip(once, again, strict=True)))

    for impl in record.gated(name, ["triton"]):
        limit = 2 * ATTENTION_LIMIT[dtype]
        record.gate(name, impl, "gradients against a softmax in fp32", partial(error, impl), limit)
        record.gate(name, impl, "gradients differ from run to run", partial(unequal, impl), 0)
    amounts = _attention_amounts(first)
    for key, amount in _attention_amounts(first, backward=True).items():
        amounts[key] += amount
    calls = {impl: _ours(impl) for impl in record.timed(name, ["triton", "reference"])}
    for label, call in (calls | _others()).items():
        record.time(name, label, partial(gradients, call), sets, amounts if label in calls else None)
    record.free()


def _attention_layer(record: Recorder, clip: Clip, stride: int, queries: int, dtype: torch.dtype) -> None:
    """With the projections of queries, keys, values and output, against nn.MultiheadAttention."""
    name = f"masked attention layer {clip.name} 1/{stride} Q={queries} {dtype_name(dtype)}"
    device, N = record.device, clip.keys(stride)
    torch.manual_seed(0)
    module = nn.MultiheadAttention(C, HEADS, batch_first=True, device=device, dtype=dtype)
    weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    sets = []
    for inputs in _attention_sets(record, clip, stride, queries, dtype):
        query = torch.randn(clip.batch, queries, C, device=device).to(dtype)
        memory = torch.randn(clip.batch, N, C, device=device).to(dtype)
        hidden = ~inputs.visible.expand(-1, HEADS, -1, -1).flatten(0, 1)  # [B*A, Q, N]
        sets.append((query, memory, inputs.bits, inputs.seen, hidden))

    def ours(impl: str, query: Tensor, memory: Tensor, words: Tensor, seen: Tensor, _: Tensor) -> Tensor:
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, memory, memory), weights, biases, strict=True)
        )
        out = masked_attention(q, k, v, words, seen, impl=impl_of(impl))
        return module.out_proj(out.transpose(1, 2).flatten(2))

    def usual(query: Tensor, memory: Tensor, _: Tensor, __: Tensor, hidden: Tensor) -> Tensor:
        return module(query, memory, memory, attn_mask=hidden)[0]

    with torch.no_grad():
        for impl in record.timed(name, ["triton", "reference"]):
            record.time(name, impl, partial(ours, impl), sets)
        record.time(name, "nn.MultiheadAttention", usual, sets)
    record.free()


# masks at image size


def upsample(record: Recorder) -> None:
    """Section: logits at a quarter of the size -> masks as bytes or bits, and labels."""
    if record.small:
        _upsample(record, 2, TINY, (50, 60))
        _labels(record, 3, TINY)
        return
    _upsample(record, 150, INFERENCE, INFERENCE[3:])
    _upsample(record, 20, INFERENCE, INFERENCE[3:])
    _upsample(record, 20, INFERENCE, (720, 1280))
    _labels(record, 20, INFERENCE)


def logit_maps(count: int, clip: Clip, device: str, seed: int, dtype: torch.dtype) -> Tensor:
    """Smooth maps [N, T, h, w]: noise at a quarter of their size, enlarged."""
    torch.manual_seed(seed)
    h, w = clip.size(4)
    noise = torch.randn(count, clip.frames, h // 4, w // 4, device=device)
    return F.interpolate(noise, size=(h, w), mode="bilinear").to(dtype)


def usual_upsampling(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """float32 maps of full size, resized once more if the image has another size."""
    full = F.interpolate(logits.float(), scale_factor=4, mode="bilinear", align_corners=False)
    return full if full.shape[2:] == size else F.interpolate(full, size=size, mode="bilinear")


def usual_masks(size: tuple[int, int], logits: Tensor) -> Tensor:
    return usual_upsampling(logits, size) > 0


def _upsample(record: Recorder, count: int, clip: Clip, size: tuple[int, int]) -> None:
    network = (clip.height, clip.width)
    one = 4 * count * clip.keys(4)
    sets = [
        (logit_maps(count, clip, record.device, seed, torch.float32),)
        for seed in range(1 if record.small else rotation(one))
    ]
    pixels = count * clip.frames * size[0] * size[1]

    def masks(impl: str, packed: bool, logits: Tensor) -> Tensor:
        return mask_upsample(logits, network, size, packed=packed, impl=impl_of(impl))

    def wrong(impl: str, packed: bool) -> float:
        values = usual_upsampling(sets[0][0], size)
        found = masks(impl, packed, sets[0][0])
        found = unpack_bits(found, size[1]) if packed else found
        return float(((found != (values > 0)) & (values.abs() > 1e-4)).sum())

    usual = partial(usual_masks, size)
    for packed in (False, True):
        kind = "bits" if packed else "bytes"
        name = f"mask_upsample {clip.name} N={count} to {size[0]}x{size[1]} {kind}"
        for impl in record.gated(name):
            record.gate(name, impl, "wrong pixels where |value| > 1e-4", partial(wrong, impl, packed), 0)
        amounts = {"dram_bytes": one + pixels / (8 if packed else 1)}
        for impl in record.timed(name, ["triton", "cuda", "reference"]):
            record.time(name, impl, partial(masks, impl, packed), sets, amounts)
        record.time(name, "interpolate", usual, sets)
        if not packed and count == 20 and record.timed(name, ["compiled"]):
            record.time(name, "interpolate compiled", compiled(usual), sets)
        record.free()


def _labels(record: Recorder, count: int, clip: Clip) -> None:
    size = network = (clip.height, clip.width)
    name = f"label_upsample {clip.name} K={count}"
    one = 4 * count * clip.keys(4)
    sets = [
        (logit_maps(count, clip, record.device, seed, torch.float32),)
        for seed in range(1 if record.small else rotation(one))
    ]

    def labels(impl: str, logits: Tensor) -> Tensor:
        return label_upsample(logits, network, size, impl=impl_of(impl))

    def usual(logits: Tensor) -> Tensor:
        return usual_upsampling(logits, size).argmax(0)

    def wrong(impl: str) -> float:
        values = usual_upsampling(sets[0][0], size)  # [K, T, H, W]
        found = labels(impl, sets[0][0]).long()
        taken = values.gather(0, found[None])[0]
        return float((values.amax(0) - taken > 1e-4).sum())

    for impl in record.gated(name):
        record.gate(name, impl, "labels that are not the largest by 1e-4", partial(wrong, impl), 0)
    amounts = {"dram_bytes": one + clip.frames * size[0] * size[1]}
    for impl in record.timed(name, ["triton", "cuda", "reference"]):
        record.time(name, impl, partial(labels, impl), sets, amounts)
    record.time(name, "interpolate", usual, sets)
    record.free()


# matching and losses


class Matching(NamedTuple):
    """What a training step has after the decoder, of one batch."""

    embeddings: Tensor  # [outputs, B, Q, C]
    features: Tensor  # [B, T, C, h, w]
    points: Tensor  # [R, 2], shared by queries, frames and outputs
    targets: Tensor  # [B, G, T*R] at the points
    matched: Tensor  # [B, G] queries
    mask_points: Tensor  # [outputs*B*G, R, 2], of each matched mask's loss
    truth: Tensor  # [outputs*B*G, T, R], at those points


def matching_inputs(record: Recorder, dtype: torch.dtype, seed: int) -> Matching:
    clip, device = (TINY if record.small else TRAINING), record.device
    outputs, queries, targets, points = (2, 6, 2, 20) if record.small else (10, 150, 12, 12544)
    features = mask_features(clip, device, seed, dtype)
    vectors = torch.randn(outputs, clip.batch, queries, C, device=device).to(dtype) / 16
    wanted = torch.rand(clip.batch, targets, clip.frames * points, device=device) > 0.8
    matched = torch.stack([torch.randperm(queries, device=device)[:targets] for _ in range(clip.batch)])
    masks = outputs * clip.batch * targets
    return Matching(
        vectors, features, torch.rand(points, 2, device=device), wanted.float(), matched,
        torch.rand(masks, points, 2, device=device),
        (torch.rand(masks, clip.frames, points, device=device) > 0.8).float(),
    )  # fmt: skip


def sampled_costs(impl: str, given: Matching) -> list[Tensor]:
    """Cost matrices of all outputs and clips; mask features are sampled at the points once."""
    out: list[Tensor] = []
    for b, features in enumerate(given.features):
        at_points = point_sample(features, given.points[None], impl=impl_of(impl)).flatten(0, 1)  # [T*R, C]
        out += mask_cost(given.embeddings[:, b], at_points, given.targets[b], impl=impl_of(impl))
    return out


def stored_costs(given: Matching, logits: list[Tensor] | None = None) -> list[Tensor]:
    """The same as Mask2Former does it: logits of all pixels, sampled, then three products."""
    out = []
    grid = (2 * given.points - 1)[None, None]  # [1, 1, R, 2]
    for index, embedding in enumerate(given.embeddings):
        maps = full_logits(embedding, given.features) if logits is None else logits[index]
        for b in range(len(maps)):
            frames = maps[b].detach().float()  # [Q, T, h, w]
            x = F.grid_sample(frames, grid.expand(len(frames), -1, -1, -1), align_corners=False)
            x = x.flatten(1)  # [Q, T*R]
            target = given.targets[b].T  # [T*R, G]
            positive = F.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="none")
            negative = F.binary_cross_entropy_with_logits(x, torch.zeros_like(x), reduction="none")
            prob = x.sigmoid()
            area = prob.sum(1, keepdim=True) + target.sum(0)
            out.append((positive @ target + negative @ (1 - target)) / x.shape[1])
            out.append(1 - (2 * prob @ target + 1) / (area + 1))
    return out


def full_logits(embedding: Tensor, features: Tensor) -> Tensor:
    return torch.einsum("bqc,btchw->bqthw", embedding, features)


def loss_step(impl: str, given: Matching) -> tuple[Tensor, ...]:
    """Matching and mask losses of all outputs, and their gradients; "usual" keeps all queries' logits."""
    vectors, features = (x.detach().requires_grad_() for x in (given.embeddings, given.features))
    given = given._replace(embeddings=vectors, features=features)
    clips = torch.arange(len(features), device=features.device)[:, None]
    if impl == "usual":
        logits = [full_logits(embedding, features) for embedding in vectors]
        with torch.no_grad():
            stored_costs(given, logits)
        maps = torch.stack([maps[clips, given.matched] for maps in logits])  # [outputs, B, G, T, h, w]
        maps = maps.flatten(0, 2).float()
        grid = (2 * given.mask_points - 1)[:, None]
        x = F.grid_sample(maps, grid, align_corners=False)[:, :, 0]  # [M, T, R]
    else:
        with torch.no_grad():
            sampled_costs(impl, given)
        maps = torch.stack([full_logits(vector[clips, given.matched], features) for vector in vectors])
        maps = maps.flatten(0, 2)  # [M, T, h, w]
        x = point_sample(maps, given.mask_points, impl=impl_of(impl)).transpose(1, 2).float()
    prob = x.sigmoid()
    overlap = (prob * given.truth).sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (prob.sum((1, 2)) + given.truth.sum((1, 2)) + 1)
    loss = F.binary_cross_entropy_with_logits(x, given.truth) + dice.mean()
    return torch.autograd.grad(loss, (vectors, features))


def matching(record: Recorder) -> None:
    """Section: costs of all outputs of a step, and time and peak memory of matching + losses + gradients."""
    given = matching_inputs(record, torch.float32, 0)
    device, name = record.device, f"matching {TRAINING.name} 10 outputs fp32"

    def cost_error(impl: str) -> float:
        got, expected = sampled_costs(impl, given), stored_costs(given)
        # ours come clip by clip, with all outputs in one tensor; theirs output by output
        clips = len(given.features)
        errors = []
        for b in range(clips):
            for kind in range(2):
                theirs = torch.stack(expected[2 * b + kind :: 2 * clips])
                errors.append(relative(got[2 * b + kind], theirs))
        return max(errors)

    def loss_error(impl: str) -> float:
        pairs = zip(loss_step(impl, given), loss_step("usual", given), strict=True)
        return max(relative(a, b) for a, b in pairs)

    step = f"matching + losses + gradients {TRAINING.name} 10 outputs fp32"
    with torch.no_grad():
        for impl in record.gated(name, ["triton"]):
            record.gate(name, impl, "costs against stored logits", partial(cost_error, impl), 1e-4)
    for impl in record.gated(step, ["triton"]):
        record.gate(step, impl, "gradients against stored logits", partial(loss_error, impl), 1e-4)

    sets = [(given,)]  # larger than the cache by far

    def costs(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *flat: call(Matching(*flat))

    flat = [tuple(tensors(given)) for (given,) in sets]
    points = given.targets.shape[2]
    outputs, B, Q, _ = given.embeddings.shape
    read = given.features.numel() * given.features.element_size()
    touched = 4 * B * points * C * given.features.element_size()  # four corners a point, if none is shared
    amounts = {
        "dram_bytes": min(read, touched) + given.targets.numel() * 4,
        "tensor_flop": 2.0
        * outputs
        * B
        * Q
        * points
        * (C + 2 * given.targets.shape[1])
        * 4,  # TF32 is half as
        # fast as bf16, and takes three products to be as exact as float32: at least four times the work here
    }
    with torch.no_grad():
        for impl in record.timed(name, ["triton", "reference"]):
            record.time(name, impl, costs(partial(sampled_costs, impl)), flat, amounts)
        record.time(name, "stored logits", costs(stored_costs), flat)
    for impl in (*record.timed(step, ["triton", "reference"]), "usual"):
        run = partial(loss_step, impl)
        record.time(step, impl, costs(run), flat)
        if device != "cpu" and not record.over() and (step, impl) not in record.failed:
            record.memory(step, impl, partial(peak_bytes, partial(run, given)))
        record.free()
