"""Assign queries to targets: Hungarian matching (Carion et al. 2020, DETR; Mask2Former).

    cost[q,n] = 2 * -softmax(class logits)[q, class n] + 5 * bce[q,n] + 5 * dice[q,n]

Masks are compared as tubes, in P points that all frames, queries and targets of a clip share. All decoder
outputs share them too (the original draws anew for each), so mask features are sampled once a clip and no
mask is made; the costs of all outputs and clips come to the host together, the only synchronisation of a
training step's losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tarvis.operators import mask_cost, point_sample
from tarvis.structures import Prediction

CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 2.0, 5.0, 5.0
_WORST = 1e6  # what a cost counts that is not a number


class Matches(NamedTuple):
    """Pairs of queries and targets.

    `pairs` [2, outputs, M] int64, on the device of the prediction: rows of instance queries, and rows of
    targets numbered through all clips. M is the sum of min(Q, N) over clips; pairs stand in the order of
    clips, then of queries. `is_finite` is False where a cost was NaN or infinite: the step must be skipped,
    by all processes together, which is why nothing is raised here.
    """

    pairs: Tensor
    is_finite: bool


@torch.no_grad()
def match(
    prediction: Prediction, masks: Sequence[Tensor], labels: Sequence[Tensor], points: Tensor
) -> Matches:
    """Match instance queries to targets, anew for every decoder output; all costs are float32.

    Args:
        prediction: of B clips, with its `layers`; outputs are counted from the first of these.
        masks: for every clip [N, T, H, W] bool, uint8 or float at the padded size, N may be 0.
        labels: for every clip [N], classes from 0.
        points: [B, P, 2] float32 (x, y) in 0..1, uniformly drawn.
    """
    outputs = (*prediction.layers, prediction)
    rows = prediction.rows("instance")
    embeddings = torch.stack([output.mask_embedding[:, rows] for output in outputs])  # [L, B, Q, C]
    class_logits = torch.stack([class_logits_of(output) for output in outputs])  # [L, B, Q, 1 + K]
    costs = [
        clip_cost(embeddings[:, b], class_logits[:, b], prediction.mask_features[b], mask, label, point)
        for b, (mask, label, point) in enumerate(zip(masks, labels, points.split(1), strict=True))
    ]  # [L, Q, N] each
    on_host = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
    sizes = [cost.numel() for cost in costs]
    parts = [
        part.reshape(cost.shape)
        for part, cost in zip(np.split(on_host, np.cumsum(sizes)[:-1]), costs, strict=True)
    ]
    pairs = torch.from_numpy(assign(parts)).to(embeddings.device, non_blocking=True)
    return Matches(pairs, bool(np.isfinite(on_host).all()))


def clip_cost(
    embeddings: Tensor, class_logits: Tensor, features: Tensor, masks: Tensor, labels: Tensor, points: Tensor
) -> Tensor:
    """Cost of every query with every target of a clip.

    embeddings [L, Q, C], class_logits [L, Q, 1 + K], features [T, C, h, w], masks [N, T, H, W], labels [N],
    points [1, P, 2] -> [L, Q, N].
    """
    N = masks.shape[0]
    prob = class_logits.float().softmax(-1)  # background included
    class_cost = -prob[..., 1 + labels]  # [L, Q, N]
    if N == 0:
        return class_cost
    pixels = point_sample(features, points).flatten(0, 1)  # [T*P, C]
    targets = point_sample(masks.flatten(0, 1), points).view(N, -1)  # [N, T*P]
    bce, dice = mask_cost(embeddings, pixels, targets)
    return CLASS_WEIGHT * class_cost + MASK_WEIGHT * bce + DICE_WEIGHT * dice


def assign(costs: Sequence[np.ndarray]) -> np.ndarray:
    """The cheapest pairs of every clip's costs [L, Q, N] -> [2, L, M] int64, as in `Matches`."""
    found = []
    first = 0
    for cost in costs:
        clean = np.nan_to_num(cost, nan=_WORST, posinf=_WORST, neginf=-_WORST)
        pairs = np.array([linear_sum_assignment(output) for output in clean], np.int64)  # [L, 2, M]
        found.append(pairs.transpose(1, 0, 2) + np.array([[[0]], [[first]]]))
        first += cost.shape[2]
    return np.concatenate(found, 2)


def class_logits_of(output: Prediction) -> Tensor:
    assert output.class_logits is not None, "queries without classes are not matched"
    return output.class_logits
