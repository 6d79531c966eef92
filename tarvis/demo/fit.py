"""A minimal fit of a tiny network to a few clips, for the demo and the tests: minutes on a CPU.

Everything is dense and unaugmented; it is no substitute for training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tarvis.config import ModelConfig
from tarvis.data.synthetic import SyntheticClip
from tarvis.model import TarVis, build_model
from tarvis.structures import Features, Prediction

CLASS_SET = "synthetic"
CLIP_FRAMES = 3
BACKGROUND_WEIGHT = 0.1  # of class 0 in the class loss


def fit(
    config: ModelConfig,
    clips: Sequence[SyntheticClip],
    *,
    steps: int,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> TarVis:
    """Fit a fresh network to `clips` for all four tasks at once.

    Each step takes a few consecutive frames of one clip, encodes them once, and asks for the classes'
    instances and stuff (VIS, VPS) and for the objects of the first frame, by mask or by point (VOS, PET).

    Args:
        clips: their sides are multiples of 64.
        steps: how long to go on; the learning rate falls to zero over the second half.
        report: called with (step, loss) after every step.

    Returns:
        The network in eval mode.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    model = build_model(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=1e-4)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * min(1, (step + 1) / 20, 2 * (1 - step / steps))
        clip = clips[int(random.integers(len(clips)))]
        first = int(random.integers(len(clip.frames) - CLIP_FRAMES + 1))
        loss = clip_loss(model, clip, first, random)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if report is not None:
            report(step, loss.item())
    return model.eval()


def clip_loss(model: TarVis, clip: SyntheticClip, first: int, random: np.random.Generator) -> Tensor:
    """Loss of all tasks on frames first .. first + 2 of a clip, summed over decoder layers."""
    window = slice(first, first + CLIP_FRAMES)
    frames = torch.from_numpy(clip.frames[window]).permute(0, 3, 1, 2)[None]  # [1, T, 3, H, W]
    ids = [i for i in clip.classes if (clip.instance[window] == i).any()]
    instance = torch.from_numpy(clip.instance[window])
    masks = torch.stack([instance == i for i in ids])  # [N, T, H, W]
    labels = torch.tensor([clip.classes[i] for i in ids])
    semantic = torch.from_numpy(clip.semantic[window]).long()[:, ::4, ::4]  # [T, H/4, W/4]

    features = model.encode(frames)
    target = F.avg_pool2d(masks.float(), 4)  # [N, T, H/4, W/4]
    prediction = model.decode(features, model.queries.classes(CLASS_SET), all_layers=True)
    loss = torch.zeros(())
    for layer in (*prediction.layers, prediction):
        loss = loss + instance_loss(layer, target, labels) + semantic_loss(layer, semantic)
    shown = masks[:, 0].flatten(1).any(1)  # objects of the first frame are given, those that come later not
    if shown.any():
        prediction, order = ask_for_objects(model, features, masks[shown], random)
        for layer in (*prediction.layers, prediction):
            loss = loss + object_loss(layer, target[shown][order[0]], target[shown][order[1]], model)
    return loss


def ask_for_objects(
    model: TarVis, features: Features, masks: Tensor, random: np.random.Generator
) -> tuple[Prediction, tuple[Tensor, Tensor]]:
    """Give each object [N, T, H, W] by its mask or a point in its first frame; which are which, in order."""
    by_point = torch.from_numpy(random.random(len(masks)) < 0.4)
    size = torch.tensor(masks.shape[-2:])
    points = []
    for mask in masks[by_point, 0]:
        inside = mask.nonzero()
        points.append((inside[int(random.integers(len(inside)))] + 0.5) / size)
    at = torch.stack(points) if points else torch.zeros(0, 2)
    looked_up = model.object_encoder.look_up(features, torch.zeros(len(at), dtype=torch.long), at)
    background, objects = model.object_encoder(
        features.mask_features[0, :1], masks[~by_point][:, :1], looked_up if points else None
    )
    queries = model.queries.objects(background[None], objects[None])
    indices = torch.arange(len(masks))
    return model.decode(features, queries, all_layers=True), (indices[~by_point], indices[by_point])


def instance_loss(layer: Prediction, target: Tensor, labels: Tensor) -> Tensor:
    """Hungarian matching, then class, mask and dice losses; target [N, T, h, w], labels [N] (0-based)."""
    assert layer.class_logits is not None
    logits = layer.mask_logits("instance")[0].flatten(1)  # [Q, T*h*w]
    class_logits = layer.class_logits[0]  # [Q, 1 + K]
    masks = target.flatten(1)
    with torch.no_grad():
        cost = 2 * -class_logits.softmax(-1)[:, 1 + labels]
        cross = F.softplus(logits).sum(1, keepdim=True) - logits @ masks.T
        cost += 5 * cross / masks.shape[1]
        inside = logits.sigmoid()
        cost += 5 * (1 - (2 * inside @ masks.T + 1) / (inside.sum(1, keepdim=True) + masks.sum(1) + 1))
    rows, columns = (torch.from_numpy(x) for x in linear_sum_assignment(cost.numpy()))
    classes = torch.zeros(len(logits), dtype=torch.long)
    classes[rows] = 1 + labels[columns]
    weight = torch.ones(class_logits.shape[1])
    weight[0] = BACKGROUND_WEIGHT
    return 2 * F.cross_entropy(class_logits, classes, weight) + mask_loss(logits[rows], masks[columns])


def semantic_loss(layer: Prediction, semantic: Tensor) -> Tensor:
    """Cross-entropy over all classes, things and stuff; semantic [T, h, w]."""
    return 2 * F.cross_entropy(layer.mask_logits("semantic"), semantic[None])


def object_loss(layer: Prediction, by_mask: Tensor, by_point: Tensor, model: TarVis) -> Tensor:
    """Loss of given objects: mask objects [N, T, h, w], several queries each, then point objects [M, ..]."""
    logits = layer.mask_logits("vos")[0]  # [Q, T, h, w]
    parts = logits.split((len(logits) - len(by_point), len(by_point)))
    best = parts[0].unflatten(0, (-1, model.object_encoder.num_parts)).amax(1)
    return mask_loss(torch.cat((best, parts[1])).flatten(1), torch.cat((by_mask, by_point)).flatten(1))


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """5 binary cross-entropy + 5 dice (with soft targets), both [N, pixels], means over masks."""
    inside = logits.sigmoid()
    dice = 1 - (2 * (inside * target).sum(1) + 1) / (inside.sum(1) + target.sum(1) + 1)
    return 5 * F.binary_cross_entropy_with_logits(logits, target) + 5 * dice.mean()
