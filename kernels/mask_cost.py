"""What a query's mask costs as a target's, for the Hungarian matching (Cheng et al. 2022, Mask2Former).

    x[q,r]    = <embedding[q], features[r]>,  p = sigmoid(x)
    bce[q,g]  = mean over r of softplus(x[q,r]) - x[q,r] * targets[g,r]
    dice[q,g] = 1 - (2 * sum over r of p[q,r] * targets[g,r] + 1) / (sum p[q] + sum targets[g] + 1)

Masks are compared in R points, here all points of all frames of a clip. Sampling commutes with the product
that makes logits, so mask features are sampled once (`point_sample`) for all queries and all decoder outputs
that share points, and logits exist only inside the operator.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import FLOATS, Impl, require, unfit_dtype
from .operator import Operator, launcher

# points whose logits exist at once; on the CPU they should stay in the cache (150 queries, 37632 points and
# 10 targets, one thread: 84 -> 42 ms; 1500 queries: 1.09 -> 0.43 s)
_POINTS = {"cpu": 1024, "cuda": 1 << 14}
_BLOCK = 64  # the most queries, points or targets that a program of the kernels takes at once


def mask_cost(
    embedding: Tensor, features: Tensor, targets: Tensor, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice cost of every query with every target of one clip.

    Args:
        embedding: [.., Q, C] float mask embeddings; leading dimensions are decoder outputs, for instance.
        features: [R, C] float mask features at the points, any strides.
        targets: [G, R] ground truth at the points in [0, 1], float, bool or uint8.
        impl: see `kernels.dispatch`.

    Returns:
        bce, dice: [.., Q, G] float32 (float64 if `embedding` is). Logits and sums are float32; the kernel
        multiplies float32 as three TF32 products, which keeps the precision. Where embeddings and features
        share a half-precision dtype, it rounds logits (up to 65504), probabilities and targets to float16
        before they meet; dtypes that differ are taken as float32. Plain PyTorch on a GPU multiplies as
        `torch.set_float32_matmul_precision` says. The error of bce is relative to the mean of |x|, and NaN
        stays NaN. Results are bit-equal from run to run. No gradient flows. Autocast changes nothing.

    Raises:
        ValueError: shapes or dtypes that do not fit, or no points.
        RuntimeError: the implementation asked for cannot run.
    """
    require("mask_cost", FLOATS, embedding=embedding, features=features)
    require("mask_cost", (*FLOATS, torch.bool, torch.uint8), targets=targets)
    dims = embedding.ndim >= 2 and features.ndim == targets.ndim == 2
    if not dims or embedding.shape[-1] != features.shape[1] or features.shape[0] != targets.shape[1]:
        raise ValueError(
            f"expected [.., Q, C], [R, C] and [G, R], got {list(embedding.shape)}, {list(features.shape)} "
            f"and {list(targets.shape)}"
        )
    if features.shape[0] == 0:
        raise ValueError("a mean over no points: R must be at least 1")
    rows = embedding.detach().flatten(0, -2)  # [M, C]
    features, targets = features.detach(), targets.detach()
    chosen = _operator.choose(impl, rows, features, targets)
    if chosen == "reference":
        bce, dice = mask_cost_reference(rows, features, targets)
    else:
        bce, dice = torch.ops.tarvis.mask_cost(rows, features, targets, chosen)
    shape = (*embedding.shape[:-1], targets.shape[0])
    return bce.view(shape), dice.view(shape)


def mask_cost_reference(embedding: Tensor, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Defines the operator, for embedding [M, C]."""
    exact = torch.float64 if embedding.dtype == torch.float64 else torch.float32
    R = features.shape[0]
    # compiled code keeps no logits where it need not, and a loop would be unrolled
    step = R if torch.compiler.is_compiling() else _POINTS.get(embedding.device.type, R)
    embedding = embedding.to(exact)
    overlap, intersection = (embedding.new_zeros(len(embedding), len(targets)) for _ in range(2))  # [M, G]
    softplus, area = (embedding.new_zeros(len(embedding), 1) for _ in range(2))
    with torch.autocast(embedding.device.type, enabled=False):
        for feature, target in zip(features.split(step), targets.split(step, 1), strict=True):
            logit = embedding @ feature.to(exact).T  # [M, step]
            target = target.to(exact).T  # [step, G]
            softplus = softplus + F.softplus(logit).sum(1, keepdim=True)
            overlap = overlap + logit @ target
            prob = logit.sigmoid()
            area = area + prob.sum(1, keepdim=True)
            intersection = intersection + prob @ target
    return costs(softplus, overlap, area, intersection, targets)


def costs(
    softplus: Tensor, overlap: Tensor, area: Tensor, intersection: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """The two costs from sums over points: of softplus(x) and p [M, 1], of x * t and p * t [M, G]."""
    bce = (softplus - overlap) / targets.shape[1]
    dice = 1 - (2 * intersection + 1) / (area + targets.sum(1, dtype=area.dtype) + 1)
    return bce, dice


def _unfit(embedding: Tensor, features: Tensor, targets: Tensor) -> str:
    far = max(_reach(embedding), _reach(features), _reach(targets)) >= 1 << 31
    too_large = "its kernels take blocks of rows that span fewer than 2^31 values" if far else ""
    return unfit_dtype(embedding, features) or too_large


def _reach(x: Tensor) -> int:
    """Bounds where a block of rows ends, also of a contiguous copy, and a block of columns of targets."""
    rows, columns = x.shape
    return _BLOCK * max(x.stride(0), columns) + max(_BLOCK, columns) * x.stride(1)


def _fake(embedding: Tensor, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    exact = torch.float64 if embedding.dtype == torch.float64 else torch.float32
    shape = (embedding.shape[0], targets.shape[0])
    return embedding.new_empty(shape, dtype=exact), embedding.new_empty(shape, dtype=exact)


def _triton(embedding: Tensor, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    softplus, overlap, area, intersection = _sums(embedding, features, targets)
    return costs(softplus, overlap, area, intersection, targets)


_sums = launcher("mask_cost.sums")


_operator = Operator("mask_cost", mask_cost_reference, _fake, triton=_triton, unfit=_unfit)
