"""Training: costs of matching and losses without stored logits, and samples at random points.

All outputs of the decoder share their points. The usual way makes the logits of every query at stride 4,
samples them and takes the costs; the operators sample features once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Gate, Scale, relative, ways
from bench.cases.masks import ON_CPU, TINY, TRAINING, C, Clip, mask_features
from bench.timing import Inputs
from kernels.mask_cost import mask_cost
from kernels.point_sample import point_sample

OBJECTS = 12


class Matching(NamedTuple):
    """What a training step has after the decoder, of one batch."""

    embeddings: Tensor  # [outputs, B, Q, C]
    features: Tensor  # [B, T, C, h, w]
    points: Tensor  # [R, 2], shared by queries, frames and outputs
    targets: Tensor  # [B, G, T*R] at the points
    matched: Tensor  # [B, G] queries
    mask_points: Tensor  # [outputs*B*G, R, 2], of each matched mask's loss
    truth: Tensor  # [outputs*B*G, T, R], at those points


class Numbers(NamedTuple):
    clip: Clip
    outputs: int
    queries: int
    targets: int
    points: int


NUMBERS: dict[Scale, Numbers] = {
    "gpu": Numbers(TRAINING, 10, 150, OBJECTS, 12544),
    "cpu": Numbers(ON_CPU, 2, 150, OBJECTS, 3136),
    "tiny": Numbers(TINY, 2, 6, 2, 20),
}


def make_matching(n: Numbers, device: str, seed: int) -> Matching:
    torch.manual_seed(seed)
    clip, masks = n.clip, n.outputs * n.clip.batch * n.targets
    return Matching(
        embeddings=torch.randn(n.outputs, clip.batch, n.queries, C, device=device) / 16,
        features=mask_features(clip, device, torch.float32),
        points=torch.rand(n.points, 2, device=device),
        targets=random_bits(clip.batch, n.targets, clip.frames * n.points, device=device),
        matched=torch.stack(
            [torch.randperm(n.queries, device=device)[: n.targets] for _ in range(clip.batch)]
        ),
        mask_points=torch.rand(masks, n.points, 2, device=device),
        truth=random_bits(masks, clip.frames, n.points, device=device),
    )


def random_bits(*shape: int, device: str) -> Tensor:
    return (torch.rand(shape, device=device) > 0.8).float()


def matching(device: str, scale: Scale) -> Iterator[Case]:
    """Costs of all outputs of a step, and time and peak memory of matching + losses + gradients."""
    n = NUMBERS[scale]
    B, make = n.clip.batch, partial(make_matching, n, device)
    about, compiles = f"{n.clip.name} {n.outputs} outputs fp32", scale == "cpu"

    def sampled(seed: int) -> Inputs:
        given = make(seed)
        return given.embeddings[:, 0], features_at_points(given, 0, "auto"), given.targets[0]

    read, touched = B * n.clip.keys(4), 4 * B * n.points  # four corners a point, if none is shared
    amounts = {
        "dram_bytes": 4.0 * (min(read, touched) * C + B * n.targets * n.clip.frames * n.points),
        # TF32 is half as fast as bf16, and takes three products to be as exact as float32: at least four
        # times the work
        "tensor_flop": 4 * 2.0 * n.outputs * B * n.queries * n.points * (C + 2 * n.targets),
    }
    yield Case(
        f"matching {about}",
        make,
        ways(sampled_costs, {"stored logits": stored_costs}, ("triton", "reference"), compiles),
        [Gate("costs against stored logits", 1e-4, partial(cost_error, make))],
        amounts,
    )
    yield Case(
        f"matching, features already sampled, {about}",
        sampled,
        ways(alone, {}, ("triton", "reference"), compiles),
    )
    yield Case(
        f"matching + losses + gradients {about}",
        make,
        ways(loss_step, {"usual": partial(loss_step, "usual")}, ("triton", "reference")),
        [Gate("gradients against stored logits", 1e-4, partial(step_error, make))],
        memory="peak",
    )


def features_at_points(given: Matching, b: int, impl: Any) -> Tensor:
    return point_sample(given.features[b], given.points[None], impl=impl).flatten(0, 1)  # [T*R, C]


def sampled_costs(impl: Any, *inputs: Tensor) -> list[Tensor]:
    """Two cost matrices [outputs, Q, G] of each clip; mask features are sampled at the points once."""
    given, found = Matching(*inputs), list[Tensor]()
    for b in range(len(given.features)):
        at_points = features_at_points(given, b, impl)
        found += mask_cost(given.embeddings[:, b], at_points, given.targets[b], impl=impl)
    return found


def alone(impl: Any, embeddings: Tensor, at_points: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return mask_cost(embeddings, at_points, targets, impl=impl)


def stored_costs(*inputs: Tensor) -> list[Tensor]:
    """The same as Mask2Former does it: logits of all pixels, output by output, sampled, three products."""
    given = Matching(*inputs)
    return costs_of([full_logits(embedding, given.features) for embedding in given.embeddings], given)


def costs_of(logits: list[Tensor], given: Matching) -> list[Tensor]:
    grid = (2 * given.points - 1)[None, None]  # [1, 1, R, 2]
    found: dict[tuple[int, int], list[Tensor]] = {}  # by clip and kind of cost, of all outputs
    for maps in logits:
        for b in range(len(maps)):
            frames = maps[b].detach().float()  # [Q, T, h, w]
            x = F.grid_sample(frames, grid.expand(len(frames), -1, -1, -1), align_corners=False)
            x = x.flatten(1)  # [Q, T*R]
            target = given.targets[b].T  # [T*R, G]
            positive = F.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="none")
            negative = F.binary_cross_entropy_with_logits(x, torch.zeros_like(x), reduction="none")
            prob = x.sigmoid()
            area = prob.sum(1, keepdim=True) + target.sum(0)
            bce = (positive @ target + negative @ (1 - target)) / x.shape[1]
            dice = 1 - (2 * prob @ target + 1) / (area + 1)
            for kind, cost in enumerate((bce, dice)):
                found.setdefault((b, kind), []).append(cost)
    return [torch.stack(costs) for costs in found.values()]


def full_logits(embedding: Tensor, features: Tensor) -> Tensor:
    return torch.einsum("bqc,btchw->bqthw", embedding, features)


@torch.enable_grad()
def loss_step(impl: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Matching and mask losses of all outputs, and their gradients; "usual" keeps all queries' logits."""
    given = Matching(*inputs)
    vectors, features = (x.detach().requires_grad_() for x in (given.embeddings, given.features))
    given = given._replace(embeddings=vectors, features=features)
    clips = torch.arange(len(features), device=features.device)[:, None]
    if impl == "usual":
        logits = [full_logits(embedding, features) for embedding in vectors]
        with torch.no_grad():
            costs_of(logits, given)
        maps = torch.stack([maps[clips, given.matched] for maps in logits])  # [outputs, B, G, T, h, w]
        maps = maps.flatten(0, 2).float()
        grid = (2 * given.mask_points - 1)[:, None]
        x = F.grid_sample(maps, grid, align_corners=False)[:, :, 0]  # [M, T, R]
    else:
        with torch.no_grad():
            sampled_costs(impl, *given)
        maps = torch.stack([full_logits(vector[clips, given.matched], features) for vector in vectors])
        maps = maps.flatten(0, 2)  # [M, T, h, w]
        x = point_sample(maps, given.mask_points, impl=impl).transpose(1, 2).float()
    prob = x.sigmoid()
    overlap = (prob * given.truth).sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (prob.sum((1, 2)) + given.truth.sum((1, 2)) + 1)
    loss = F.binary_cross_entropy_with_logits(x, given.truth) + dice.mean()
    return torch.autograd.grad(loss, (vectors, features))


@torch.no_grad()
def cost_error(make: Callable[[int], Matching], impl: str) -> float:
    given = make(0)
    pairs = zip(sampled_costs(impl, *given), stored_costs(*given), strict=True)
    return max(relative(a, b) for a, b in pairs)


def step_error(make: Callable[[int], Matching], impl: str) -> float:
    given = make(0)
    pairs = zip(loss_step(impl, *given), loss_step("usual", *given), strict=True)
    return max(relative(a, b) for a, b in pairs)


# Points


def points(device: str, scale: Scale) -> Iterator[Case]:
    """Features have points that frames share; every map of logits or targets has its own."""
    n = NUMBERS[scale]
    (h, w), (H, W), T = n.clip.size(4), n.clip.size(1), n.clip.frames
    dtype = torch.bfloat16 if scale == "gpu" else torch.float32
    masks = n.targets * T

    def features(seed: int) -> Inputs:
        torch.manual_seed(seed)
        maps = torch.randn(T, h, w, C, device=device).to(dtype).permute(0, 3, 1, 2).requires_grad_()
        return maps, torch.rand(1, n.points, 2, device=device), torch.randn(T, n.points, C, device=device)

    def logits(seed: int) -> Inputs:
        torch.manual_seed(seed)
        maps = torch.randn(masks, 1, h, w, device=device).requires_grad_()
        return (
            maps,
            torch.rand(masks, n.points, 2, device=device),
            torch.randn(masks, n.points, 1, device=device),
        )

    def targets(seed: int) -> Inputs:
        torch.manual_seed(seed)
        maps = torch.rand(masks, 1, H, W, device=device) > 0.5
        return maps, torch.rand(masks, n.points, 2, device=device)

    others: dict[str, Callable[..., Any]] = {"grid_sample": by_grid_sample}
    sampled = ways(sample, others, ("triton", "reference"), compiles=scale == "cpu")
    for what, make in (("features", features), ("logits", logits), ("targets", targets)):
        yield Case(f"points of {what} {n.clip.name}", make, sampled, backward=what != "targets")


def sample(impl: Any, maps: Tensor, at: Tensor) -> Tensor:
    return point_sample(maps, at, deterministic=False, impl=impl)


def by_grid_sample(maps: Tensor, at: Tensor) -> Tensor:
    """[N, R, C], as models do without the operator."""
    grid = (2 * at - 1).expand(maps.shape[0], -1, -1)[:, None]
    sampled = F.grid_sample(maps.float(), grid, mode="bilinear", align_corners=False)
    return sampled[:, :, 0].transpose(1, 2)
