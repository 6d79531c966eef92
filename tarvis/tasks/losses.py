"""The losses of training (Cheng et al. 2022, Mask2Former; Kirillov et al. 2020, PointRend).

Every term is computed for each decoder output: `[outputs]` float32, not weighted; `total` weights and adds.
Masks are compared in points, three quarters of them where the network is least certain. Every mask has
points of its own, more than its map at stride 4 has cells, so maps are made first and then read: just those
that a term needs, one decoder output after the other, and the backward pass keeps only what was read. In
matching all queries share their points: `tarvis.tasks.matching` reads the features there and makes no map.

Unlike the original: labels are read from the nearest pixel (it interpolates class numbers), points stay off
the padding where `PointSampler.extent` is given, and nothing labelled costs nothing (it returns NaN).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tarvis.operators import mask_logits, nearest_sample, point_sample
from tarvis.structures import Prediction

IGNORE = 255
"""Label of pixels that have none; so there are at most 255 classes."""

BACKGROUND_WEIGHT = 0.1  # of queries without a target in the class loss
INSTANCE_WEIGHTS = {"class": 2.0, "mask": 5.0, "dice": 5.0}
OBJECT_WEIGHTS = {"mask": 5.0, "dice": 5.0}
REGULARIZATION = 1e-3  # weight of "reg"

Terms = dict[str, Tensor]
Uniform = Callable[[int, int], Tensor]
"""(n, r) -> n rows of r points, [n, r, 2] float32 (x, y) in 0..1, drawn uniformly."""


@dataclass(frozen=True)
class PointSampler:
    """The number of points at which a mask is read, and their source.

    `extent` [B, 2] is the share (x, y) of each padded frame that shows an image; without it points fall into
    the padding too.
    """

    count: int
    uniform: Uniform
    extent: Tensor | None = None

    def draw(self, clips: Tensor, count: int) -> Tensor:
        """[N, count, 2]; clips [N] says whose extent counts."""
        points = self.uniform(len(clips), count)
        return points if self.extent is None else points * self.extent[clips][:, None]

    def uncertain(self, uncertainty: Callable[[Tensor], Tensor], clips: Tensor) -> Tensor:
        """The most uncertain quarter of 3 * count points, and a quarter of `count` anywhere (PointRend, 3.1).

        uncertainty: points [N, R, 2] -> [N, R]; clips [N]. Returns [N, count, 2].
        """
        chosen = int(0.75 * self.count)
        candidates = self.draw(clips, 3 * self.count)
        with torch.no_grad():
            # in parts: many classes in all candidates at once would be the largest tensor of a step
            values = torch.cat([uncertainty(part) for part in candidates.split(self.count, 1)], 1)
        best = values.topk(chosen, 1, sorted=False).indices  # [N, chosen]
        points = candidates.gather(1, best[..., None].expand(-1, -1, 2))
        return torch.cat((points, self.draw(clips, self.count - chosen)), 1)


def uniform_points(device: torch.device, generator: torch.Generator | None = None) -> Uniform:
    """Points from a generator (the device's own by default)."""

    def draw(n: int, r: int) -> Tensor:
        return torch.rand(n, r, 2, generator=generator, device=device)

    return draw


def total(terms: Terms, weights: Mapping[str, float]) -> Tensor:
    """Weighted sum of terms over all decoder outputs."""
    assert not terms.keys() - weights.keys(), (list(terms), list(weights))
    return torch.stack([weights[name] * values.sum() for name, values in terms.items()]).sum()


# Instances: VIS, and the things of VPS


def instance_terms(
    prediction: Prediction,
    masks: Sequence[Tensor],
    labels: Sequence[Tensor],
    pairs: Tensor,
    points: PointSampler,
    *,
    num_targets: Tensor,
    ignored: Tensor | None = None,
) -> Terms:
    """Class, mask and dice loss of instance queries: "class", "mask", "dice".

    Args:
        prediction: of B clips, with its `layers`.
        masks: for every clip [N, T, H, W] bool, uint8 or float at the padded size; N may be 0.
        labels: for every clip [N], classes from 0.
        pairs: [2, outputs, M] of `tarvis.tasks.matching.Matches`.
        num_targets: [], targets of a batch, as the mean over all that share an optimiser step (the original
            averages over processes, batch by batch); less than 1 counts as 1. Mask terms are divided by it.
        ignored: bool, broadcasts to [outputs, B, Q]: queries that cost nothing where they have no target.
    """
    outputs = (*prediction.layers, prediction)
    targets, classes = torch.cat(list(masks)), torch.cat(list(labels))  # [N, T, H, W], [N]
    B, T, device = len(masks), targets.shape[1], pairs.device
    rows = prediction.rows("instance")
    counts = [min(rows.stop - rows.start, len(mask)) for mask in masks]
    most = max(counts)
    # where each of the M pairs stands when every clip has room for `most`; the copy does not block
    places = torch.tensor([b * most + i for b, n in enumerate(counts) for i in range(n)], dtype=torch.long)
    places = places.to(device, non_blocking=True)
    clips = places // max(1, most)  # [M]
    every_clip = torch.arange(B, device=device)[:, None]
    mask, dice = [], []
    for output, query, target in zip(outputs, *pairs, strict=True):
        padded = query.new_zeros(B * most).index_copy(0, places, query).view(B, most)
        embedding = output.mask_embedding[every_clip, rows.start + padded]  # [B, most, C]
        maps = mask_logits(embedding, output.mask_features).flatten(0, 1)
        if len(places) < len(maps):
            maps = maps[places]  # [M, T, h, w]
        losses = mask_losses(
            maps.flatten(0, 1), targets[target].flatten(0, 1), points, clips.repeat_interleave(T)
        )
        mask.append(losses[0].sum())
        dice.append(losses[1].sum())
    scale = T * num_targets.clamp(min=1)
    return {
        "class": class_loss(outputs, classes, pairs, clips, ignored),
        "mask": torch.stack(mask) / scale,
        "dice": torch.stack(dice) / scale,
    }


def class_loss(
    outputs: Sequence[Prediction], classes: Tensor, pairs: Tensor, clips: Tensor, ignored: Tensor | None
) -> Tensor:
    """Cross-entropy of instance queries [outputs], the mean over queries as their targets weigh.

    classes [N] from 0; a query without a target ought to be background, column 0 of class logits.
    """
    class_logits = []
    for output in outputs:
        assert output.class_logits is not None, "queries without classes have no class loss"
        class_logits.append(output.class_logits)
    logits = torch.stack(class_logits)
    L, B, Q, _ = logits.shape
    wanted = torch.zeros(L, B, Q, dtype=torch.long, device=logits.device)
    wanted[torch.arange(L, device=logits.device)[:, None], clips, pairs[0]] = 1 + classes[pairs[1]].long()
    weight = torch.where(wanted == 0, BACKGROUND_WEIGHT, 1.0)
    if ignored is not None:
        weight = weight.masked_fill(ignored & (wanted == 0), 0)
    loss = F.cross_entropy(logits.float().flatten(0, 2), wanted.flatten(), reduction="none").view(L, B, Q)
    return (weight * loss).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1e-6)


def mask_losses(maps: Tensor, targets: Tensor, points: PointSampler, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice of N masks, each read where it is uncertain.

    maps [N, h, w] logits, targets [N, H, W], clips [N] -> [N], [N].
    """
    detached = maps.detach()
    at = points.uncertain(lambda part: -point_sample(detached, part).abs(), clips)
    return binary_losses(point_sample(maps, at), point_sample(targets, at))


def binary_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean binary cross-entropy and dice loss of each row; [N, R] both, targets in 0..1 -> [N], [N]."""
    logits, targets = logits.float(), targets.float()
    cross = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    return cross, dice_loss(logits.sigmoid(), targets)


def dice_loss(prob: Tensor, targets: Tensor, smooth: float = 1.0) -> Tensor:
    """1 - (2 sum p t + smooth) / (sum p + sum t + smooth) of each row; [N, R] both -> [N]."""
    return 1 - (2 * (prob * targets).sum(1) + smooth) / (prob.sum(1) + targets.sum(1) + smooth)


# Classes: every pixel's, of things and stuff


def semantic_labels(masks: Tensor, labels: Tensor) -> Tensor:
    """Labels [T, H, W] uint8 of a clip without stuff: 0, or 1 + class; smaller tubes lie on top.

    masks [N, T, H, W] bool, labels [N], classes from 0.
    """
    order = masks.flatten(1).sum(1).argsort(descending=True, stable=True)
    painted = torch.zeros(masks.shape[1:], dtype=torch.uint8, device=masks.device)
    for mask, label in zip(masks[order], labels[order], strict=True):
        painted = torch.where(mask.bool(), (1 + label).to(torch.uint8), painted)
    return painted


def semantic_terms(
    prediction: Prediction,
    labels: Tensor,
    points: PointSampler,
    *,
    background: bool,
    dice: bool = False,
    regularize: bool = False,
    drop_absent: bool = False,
) -> Terms:
    """Cross-entropy of the classes' masks against one another, in points of all frames: "ce".

    Args:
        labels: [B, T, H, W] uint8 at the padded size, `IGNORE` where there is none (and in the padding).
        background: whether label 0 means no class, for which the best background query speaks; classes
            then count from 1 (datasets without stuff).
        dice: also "dice", of all classes of a frame together, without the background (the original leaves
            label 0 out where it is a class, too).
        regularize: also "reg", the mean length of a point's logits, absent classes included.
        drop_absent: classes that are neither the label nor the guess in any point leave the softmax.
    """
    B, T = labels.shape[:2]
    frames = labels.flatten(0, 1)  # [B*T, H, W]
    clips = torch.arange(B, device=labels.device).repeat_interleave(T)
    size = prediction.mask_features.shape[-2:]
    skipped = F.interpolate((frames == IGNORE)[:, None].float(), size, mode="bilinear")[:, 0] > 0.5
    terms: dict[str, list[Tensor]] = {}
    for output in (*prediction.layers, prediction):
        maps = class_maps(output, background)  # [B*T, K, h, w]
        at = points.uncertain(class_uncertainty(maps.detach(), skipped), clips)
        logits = point_sample(maps, at).float()  # [B*T, P, K]
        label = nearest_sample(frames, at).long()  # [B*T, P]
        shown = without_absent(logits, label) if drop_absent else logits
        cross = F.cross_entropy(shown.flatten(0, 1), label.flatten(), ignore_index=IGNORE, reduction="sum")
        found = {"ce": cross / (label != IGNORE).sum().clamp(min=1)}
        if dice:
            found["dice"] = class_dice(shown, label, background)
        if regularize:
            found["reg"] = torch.linalg.vector_norm(logits, dim=-1).mean()
        for name, value in found.items():
            terms.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in terms.items()}


def class_maps(output: Prediction, background: bool) -> Tensor:
    """Logits of all classes, those of the background first if asked for, [B*T, K, h, w]; channels last."""
    # one product for both groups: each use of mask features is another gradient as large as they are
    names = ("background", "semantic") if background else ("semantic",)
    embedding = torch.cat([output.mask_embedding[:, output.rows(name)] for name in names], 1)  # [B, Q, C]
    B, T, _, h, w = output.mask_features.shape
    pixels = output.mask_features.permute(0, 1, 3, 4, 2).flatten(1, 3)  # [B, T*h*w, C], as they lie in memory
    maps = (pixels @ embedding.transpose(1, 2)).view(B, T, h, w, -1)
    if background:
        nothing, classes = maps.split([output.groups[name] for name in names], -1)
        maps = torch.cat((nothing.max(-1, keepdim=True).values, classes), -1)
    return maps.flatten(0, 1).permute(0, 3, 1, 2)


def class_uncertainty(maps: Tensor, skipped: Tensor) -> Callable[[Tensor], Tensor]:
    """How close the second class comes to the first at points [N, R, 2]; last where `skipped` [N, h, w]."""

    def at(points: Tensor) -> Tensor:
        logits = point_sample(maps, points)  # [N, R, K]
        first, best = logits.max(-1, keepdim=True)
        # not topk: it takes twice as long for 26 to 125 classes on a CPU
        second = logits.scatter_(-1, best, float("-inf")).amax(-1)
        return (second - first[..., 0]).masked_fill(point_sample(skipped, points) > 0, -1000)

    return at


def without_absent(logits: Tensor, label: Tensor) -> Tensor:
    """Logits [N, P, K], -1000 for classes that are neither in label [N, P] nor some point's best."""
    present = torch.zeros(IGNORE + 1, dtype=torch.bool, device=logits.device)
    present.index_fill_(0, torch.cat((label, logits.argmax(-1))).flatten(), True)
    return logits.masked_fill(~present[: logits.shape[-1]], -1000)


def class_dice(logits: Tensor, label: Tensor, background: bool) -> Tensor:
    """Soft dice of logits [N, P, K] and label [N, P], summed over points and classes; a mean over N."""
    known = (label != IGNORE)[..., None]
    wanted = F.one_hot(label.where(known[..., 0], 0), logits.shape[-1])
    prob, wanted = (
        x[..., int(background) :].flatten(1) for x in (logits.softmax(-1) * known, wanted * known)
    )
    return soft_dice(prob, wanted).mean()


def soft_dice(prob: Tensor, targets: Tensor) -> Tensor:
    """Dice of each row, hardly smoothed; nothing for a row whose target is empty. [N, R] both -> [N]."""
    loss = dice_loss(prob, targets, smooth=1e-6 * prob.shape[1])  # as much as the original adds to each value
    return loss.masked_fill(~targets.any(1), 0)


# Given objects: VOS and PET


def object_terms(
    prediction: Prediction, masks: Tensor, num_queries: Sequence[int], points: PointSampler
) -> Terms:
    """Mask and dice loss of given objects and, if it is asked for, of the background: "mask", "dice".

    Nothing is matched: object n is target n. Plain means over clips, objects and frames.

    Args:
        prediction: of B clips, with its `layers`; groups "vos" and, usually, "background_vos".
        masks: [B, N, T, H, W] bool at the padded size.
        num_queries: how many queries each object has, in order.
    """
    counts = [*num_queries]
    if "background_vos" in prediction.groups:
        assert next(iter(prediction.groups)) == "background_vos"
        masks = torch.cat((~masks.any(1, keepdim=True), masks), 1)
        counts.insert(0, prediction.groups["background_vos"])
    B, N, T, _, _ = masks.shape
    targets = masks.flatten(0, 2)
    clips = torch.arange(B, device=masks.device).repeat_interleave(N * T)
    mask, dice = [], []
    for output in (*prediction.layers, prediction):
        maps = condense(mask_logits(output.mask_embedding, output.mask_features), counts)  # [B, N, T, h, w]
        losses = mask_losses(maps.flatten(0, 2), targets, points, clips)
        mask.append(losses[0].mean())
        dice.append(losses[1].mean())
    return {"mask": torch.stack(mask), "dice": torch.stack(dice)}


def condense(logits: Tensor, counts: Sequence[int]) -> Tensor:
    """The best of each object's queries: [B, Q, T, h, w], counts that add up to Q -> [B, N, T, h, w]."""
    # max, not amax, which keeps the queries' maps for the backward pass
    return torch.stack([part.max(1).values for part in logits.split(list(counts), 1)], 1)
