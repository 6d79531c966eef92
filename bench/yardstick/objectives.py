"""Training losses as one would write them from the papers: the yardstick of a training step.

They share no code with `tarvis`, do nothing slowly on purpose, and replay the recorded losses of the
published code. They keep its habits: the logits of all queries, frames and decoder outputs exist at once;
outputs are matched one after the other, clip by clip, each in points of its own and with a copy to the host;
all queries are sampled to be matched, and those that are matched once more.

L outputs, N targets, P points; classes of instances count from 1, those of panoptic labels from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

CLASS, MASK, DICE = 2.0, 5.0, 5.0
BACKGROUND = 0.1
REGULARIZATION = 1e-3
IGNORE = -100

Draw = Callable[[int, int], Tensor]
"""(n, r) -> uniform points [n, r, 2], (x, y) in 0..1."""
Terms = dict[str, Tensor]  # name -> [L]


# Points


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """[N, C, H, W] at points [N, P, 2] -> [N, C, P]."""
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False)[..., 0]


def uncertain_points(maps: Tensor, measure: Callable[[Tensor, Tensor], Tensor], P: int, draw: Draw) -> Tensor:
    """[N, P, 2]: three quarters where `measure` (logits [N, C, 3P], their points) -> [N, 3P] is highest."""
    with torch.no_grad():
        candidates = draw(len(maps), 3 * P)
        best = measure(sample(maps, candidates), candidates).topk(int(0.75 * P), 1).indices
        chosen = candidates.gather(1, best[..., None].expand(-1, -1, 2))
        return torch.cat([chosen, draw(len(maps), P - int(0.75 * P))], 1)


def mask_measure(logits: Tensor, _: Tensor) -> Tensor:
    return -logits[:, 0].abs()


def class_measure(logits: Tensor, _: Tensor) -> Tensor:
    first, second = logits.topk(2, 1).values.unbind(1)
    return second - first


# Masks


def mask_terms(logits: Tensor, targets: Tensor, P: int, draw: Draw) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice [N] of masks of single frames: logits [N, h, w], targets [N, H, W]."""
    points = uncertain_points(logits[:, None], mask_measure, P, draw)
    with torch.no_grad():
        y = sample(targets[:, None].float(), points)[:, 0]
    return binary_terms(sample(logits[:, None], points)[:, 0], y)


def binary_terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows [N, P]."""
    p = x.sigmoid()
    dice = 1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)
    return F.binary_cross_entropy_with_logits(x, y, reduction="none").mean(1), dice


@torch.no_grad()
def match(
    logits: Tensor, class_logits: Tensor, masks: Tensor, classes: Tensor, points: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries and targets of a clip that belong together, for one decoder output.

    logits [Q, T, h, w], class_logits [Q, 1 + K], masks [N, T, H, W], classes [N], points [1, P, 2].
    """
    x = sample(logits, points.expand(len(logits), -1, -1)).flatten(1)  # [Q, T*P]
    y = sample(masks.float(), points.expand(len(masks), -1, -1)).flatten(1)  # [N, T*P]
    bce, dice = pair_costs(x, y)
    cost = CLASS * -class_logits.softmax(-1)[:, classes] + MASK * bce + DICE * dice
    query, target = linear_sum_assignment(cost.cpu().numpy())
    return torch.from_numpy(query).to(logits.device), torch.from_numpy(target).to(logits.device)


def pair_costs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice of every query [Q, R] with every target [N, R]."""
    if_set = F.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="none")
    if_not = F.binary_cross_entropy_with_logits(x, torch.zeros_like(x), reduction="none")
    bce = (if_set @ y.T + if_not @ (1 - y).T) / x.shape[1]
    p = x.sigmoid()
    return bce, 1 - (2 * p @ y.T + 1) / (p.sum(1)[:, None] + y.sum(1) + 1)


# Losses


def instance_loss(
    logits: Tensor,
    class_logits: Tensor,
    masks: Sequence[Tensor],
    classes: Sequence[Tensor],
    P: int,
    draw: Draw,
    ignored: Tensor | None = None,
) -> Terms:
    """ "cls", "mask_ce", "mask_dice", "total" of instance queries.

    logits [L, B, Q, T, h, w], class_logits [L, B, Q, 1 + K], of each clip masks [N, T, H, W] and classes [N].
    ignored [L, B, Q]: queries that cost nothing where they have no target.
    """
    L, B, Q, T = logits.shape[:4]
    Z = T * max(1, sum(len(mask) for mask in masks))
    weight = class_logits.new_ones(class_logits.shape[-1])
    weight[0] = BACKGROUND
    found = []
    for i in range(L):
        wanted = torch.zeros(B, Q, dtype=torch.long, device=logits.device)
        if ignored is not None:
            wanted[ignored[i]] = IGNORE
        chosen, targets = [], []
        for b, (mask, label) in enumerate(zip(masks, classes, strict=True)):
            query, target = match(logits[i, b], class_logits[i, b], mask, label, draw(1, P))
            wanted[b, query] = label[target]
            chosen.append(logits[i, b, query])
            targets.append(mask[target])
        ce, dice = mask_terms(torch.cat(chosen).flatten(0, 1), torch.cat(targets).flatten(0, 1), P, draw)
        cls = F.cross_entropy(class_logits[i].flatten(0, 1), wanted.flatten(), weight, ignore_index=IGNORE)
        ce, dice = ce.sum() / Z, dice.sum() / Z
        total = CLASS * cls + MASK * ce + DICE * dice
        found.append({"cls": cls, "mask_ce": ce, "mask_dice": dice, "total": total})
    return stacked(found)


def semantic_loss(
    logits: Tensor,
    masks: Sequence[Tensor],
    classes: Sequence[Tensor],
    P: int,
    draw: Draw,
    *,
    w_ce: float,
    w_dice: float = 0.0,
    regularize: bool = False,
    drop_absent: bool = False,
) -> Terms:
    """ "ce", .. of the classes where only instances are labelled; logits [L, B, 1 + K, T, h, w]."""
    labels = torch.stack([painted(mask, label) for mask, label in zip(masks, classes, strict=True)])
    frames = labels.flatten(0, 1)[:, None]  # [B*T, 1, H, W]
    found = []
    for output in logits:
        maps = output.transpose(1, 2).flatten(0, 1)  # [B*T, 1 + K, h, w]
        points = uncertain_points(maps, class_measure, P, draw)
        terms = class_terms(sample(maps, points), read_labels(frames, points), regularize, drop_absent)
        total = w_ce * terms["ce"] + REGULARIZATION * terms.get("reg", 0)
        if w_dice:
            terms["dice"] = class_dice(sample(maps, points), read_labels(frames, points))
            total = total + w_dice * terms["dice"]
        found.append({**terms, "total": total})
    return stacked(found)


def painted(masks: Tensor, classes: Tensor) -> Tensor:
    """[T, H, W] int64: masks [N, T, H, W] from the largest to the smallest, one over the other."""
    labels = torch.zeros(masks.shape[1:], dtype=torch.long, device=masks.device)
    for n in masks.flatten(1).sum(1).argsort(descending=True):
        labels[masks[n].bool()] = classes[n]
    return labels


def read_labels(labels: Tensor, points: Tensor) -> Tensor:
    """[N, P] of labels [N, 1, H, W]. As published: class numbers are interpolated and cut to whole ones."""
    return sample(labels.float(), points)[:, 0].long()


def class_terms(logits: Tensor, labels: Tensor, regularize: bool, drop_absent: bool) -> Terms:
    """Of logits [N, K, P] and labels [N, P]."""
    terms = {}
    if regularize:
        terms["reg"] = logits.norm(dim=1).mean()
    if drop_absent:
        seen = torch.cat([labels[labels != IGNORE], logits.argmax(1).flatten()]).unique()
        absent = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
        absent[seen] = False
        logits = logits.masked_fill(absent[:, None], -1000)
    return {"ce": F.cross_entropy(logits, labels, ignore_index=IGNORE), **terms}


def class_dice(logits: Tensor, labels: Tensor) -> Tensor:
    """Soft dice of all classes but the background: logits [N, K, P], labels [N, P]."""
    p = logits.softmax(1)[:, 1:].flatten(1)
    y = F.one_hot(labels, logits.shape[1]).transpose(1, 2)[:, 1:].flatten(1)
    loss = 1 - 2 * (p * y).sum(1) / (p.sum(1) + y.sum(1))
    return loss.masked_fill(~y.any(1), 0).mean()


def panoptic_loss(
    logits: Tensor,
    labels: Tensor,
    ignored: Tensor,
    P: int,
    draw: Draw,
    *,
    kind: str,
    regularize: bool = False,
    drop_absent: bool = False,
) -> Terms:
    """ "ce" (and "reg") of things and stuff, unweighted. labels, ignored [B, T, H, W].

    logits: [L, B, K, T, h, w].
    kind: "sparse", in points; "dense" or "dense_full_res", the worst quarter of all pixels.
    """
    frames, skipped = labels.flatten(0, 1)[:, None].float(), ignored.flatten(0, 1)[:, None].float()
    small = F.interpolate(skipped, scale_factor=0.25, mode="bilinear") > 0.5

    def measure(found: Tensor, points: Tensor) -> Tensor:
        return class_measure(found, points).masked_fill(sample(small.float(), points)[:, 0] > 0, -1000)

    found = []
    for output in logits:
        maps = output.transpose(1, 2).flatten(0, 1)  # [B*T, K, h, w]
        if kind != "sparse":
            found.append({"ce": worst_quarter(maps, frames, skipped, full_size=kind == "dense_full_res")})
            continue
        points = uncertain_points(maps, measure, P, draw)
        grid = 2 * points[:, :, None] - 1
        label, skip = (
            F.grid_sample(each, grid, mode="nearest", align_corners=False)[:, 0, :, 0]
            for each in (frames, skipped)
        )
        label = label.long().masked_fill(skip > 0.5, IGNORE)
        found.append(class_terms(sample(maps, points), label, regularize, drop_absent))
    return stacked(found)


def worst_quarter(maps: Tensor, frames: Tensor, skipped: Tensor, full_size: bool) -> Tensor:
    if full_size:
        maps = F.interpolate(maps, scale_factor=4, mode="bilinear")
    else:
        frames, skipped = (F.interpolate(x, maps.shape[2:], mode="nearest-exact") for x in (frames, skipped))
    label = frames[:, 0].long().masked_fill(skipped[:, 0] > 0.5, IGNORE)
    loss = F.cross_entropy(maps, label, ignore_index=IGNORE, reduction="none").flatten()
    return loss.topk(round(0.25 * len(loss))).values.mean()


def object_loss(
    logits: Tensor, masks: Tensor, P: int, draw: Draw, *, background: bool = True, dense: bool = False
) -> Terms:
    """ "ce", "dice", "total" of given objects: logits [L, B, 1 + N, T, h, w], masks [B, N, T, H, W].

    `condense` makes one map of an object's queries. The first map is that of the background.
    """
    masks = masks.bool()
    if background:
        masks = torch.cat([~masks.any(1, keepdim=True), masks], 1)
    else:
        logits = logits[:, :, 1:]
    targets = masks.flatten(0, 2)
    found = []
    for output in logits:
        maps = output.flatten(0, 2)
        if dense:
            big = F.interpolate(maps[:, None], scale_factor=4, mode="bilinear")
            ce, dice = binary_terms(big.flatten(1), targets.flatten(1).float())
        else:
            ce, dice = mask_terms(maps, targets, P, draw)
        ce, dice = ce.mean(), dice.mean()
        found.append({"ce": ce, "dice": dice, "total": MASK * ce + DICE * dice})
    return stacked(found)


def condense(logits: Tensor, counts: Sequence[int]) -> Tensor:
    """The maximum of each object's queries: [L, B, Q, T, h, w] -> [L, B, N, T, h, w]."""
    return torch.stack([part.max(2).values for part in logits.split(list(counts), 2)], 2)


def stacked(found: list[Terms]) -> Terms:
    return {name: torch.stack([terms[name] for terms in found]) for name in found[0]}
