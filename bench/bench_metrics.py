"""Time of the metrics: ours against the official formulas, one segment at a time, in NumPy.

    pytest bench/bench_metrics.py --benchmark-only

J&F: 3 frames of DAVIS, 480 x 854, 4 objects. VPQ: a video of Cityscapes-VPS at a quarter of its resolution,
6 frames of 512 x 1024, 24 segments, windows of 1 to 4. STQ: 6 frames of KITTI-STEP, 375 x 1242, 24 segments.
AP: 60 predicted and 6 true tracks of a class in 10 frames of 360 x 640, as run-length codes.
Both sides must give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from bench.timing import best_in_turn, timed
from tarvis.datasets.track_format import tube_iou
from tarvis.files import rle
from tarvis.metrics import jf, track_ap, vpq
from tarvis.metrics.overlaps import overlaps
from tarvis.metrics.stq import STQ, encode

Maps = NDArray[np.int64]
Numbers = list[float]

SPEEDUP = 5
"""At least; every one of the metrics."""
NUM_CLASSES, NUM_THINGS = 6, 4


def label_maps(frames: int, height: int, width: int, count: int, seed: int = 0) -> tuple[Maps, Maps]:
    """True and predicted ids 1 .. count [frames, height, width]: boxes that move, and those with errors."""
    rng = np.random.default_rng(seed)
    y, x = rng.uniform(0, 0.8, (2, count))
    vy, vx = rng.uniform(-0.01, 0.01, (2, count))
    h, w = rng.uniform(0.08, 0.3, (2, count))
    maps = np.ones((2, frames, height, width), np.int64)  # id 1 is the background
    for side in (0, 1):
        for t in range(frames):
            for k in range(1, count):
                top, left = y[k] + vy[k] * t + 0.01 * side, x[k] + vx[k] * t + 0.005 * side * (k % 3)
                rows = slice(max(int(top * height), 0), max(int((top + h[k]) * height), 0))
                columns = slice(max(int(left * width), 0), max(int((left + w[k]) * width), 0))
                maps[side, t, rows, columns] = k + 1 + (side and k % 7 == 0 and t > frames // 2)
    return maps[0], np.minimum(maps[1], count)


def class_of(ids: Any) -> Any:
    return ids % NUM_CLASSES


# J&F


@cache
def davis() -> tuple[Maps, Maps]:
    truth, predicted = label_maps(3, 480, 854, 5)
    return truth - 1, predicted - 1


def jf_tarvis() -> Numbers:
    truth, predicted = davis()
    return np.array([jf.jf_frame(t, p, 4) for t, p in zip(truth, predicted, strict=True)]).ravel().tolist()


def jf_naive() -> Numbers:
    numbers = []
    for truth, predicted in zip(*davis(), strict=True):
        masks = [(truth == k, predicted == k) for k in range(1, 5)]
        numbers += [naive_j(t, p) for t, p in masks] + [naive_f(t, p) for t, p in masks]
    return numbers


def naive_j(truth: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> float:
    union = (truth | predicted).sum()
    return float((truth & predicted).sum() / union) if union else 1.0


def naive_f(truth: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> float:
    radius = int(np.ceil(0.008 * np.linalg.norm(truth.shape)))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    true_edge, edge = naive_boundary(truth), naive_boundary(predicted)
    if not true_edge.any() or not edge.any():
        return float(true_edge.any() == edge.any())
    disk = x**2 + y**2 <= radius**2
    precision = (edge & ndimage.binary_dilation(true_edge, disk)).sum() / edge.sum()
    recall = (true_edge & ndimage.binary_dilation(edge, disk)).sum() / true_edge.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def naive_boundary(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    edge = np.zeros_like(mask)
    edge[:, :-1] |= mask[:, :-1] ^ mask[:, 1:]
    edge[:-1] |= mask[:-1] ^ mask[1:]
    edge[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return edge


# VPQ


@cache
def cityscapes_vps() -> tuple[Maps, Maps]:
    return label_maps(6, 512, 1024, 24)


def vpq_tarvis() -> Numbers:
    metric = vpq.VPQ({k: k < NUM_THINGS for k in range(NUM_CLASSES)}, vpq.CITYSCAPES_VPS_WINDOWS)
    for truth, predicted in zip(*cityscapes_vps(), strict=True):
        shared = overlaps(truth, predicted)
        metric.add_frame(shared, listed(shared.truth, shared.pixels), listed(shared.predicted, shared.pixels))
    metric.end_video()
    return [metric.summary(n)["all/pq"] for n in metric.windows]


def listed(ids: Maps, pixels: Maps) -> vpq.Segments:
    """Segments of a frame with their areas, as an annotation file lists them."""
    areas = np.bincount(ids, pixels).astype(int)
    present = np.flatnonzero(areas)
    return vpq.Segments(present, class_of(present), np.zeros(len(present), bool), areas[present])


def vpq_naive() -> Numbers:
    truth, predicted = cityscapes_vps()
    numbers = []
    for n in vpq.CITYSCAPES_VPS_WINDOWS:
        sums = np.zeros((NUM_CLASSES, 4))
        for start in range(len(truth) - n + 1):
            sums += naive_vpq_window(truth[start : start + n], predicted[start : start + n])
        iou, tp, fp, fn = sums[sums[:, 1:].any(1)].T
        numbers.append(float(100 * (iou / (tp + fp / 2 + fn / 2)).mean()))
    return numbers


def naive_vpq_window(truth: Maps, predicted: Maps) -> NDArray[np.float64]:
    """Sum of IoU, TP, FP, FN of each class."""
    sums = np.zeros((NUM_CLASSES, 4))
    matched = set()
    for g in np.flatnonzero(np.bincount(truth.ravel())):
        true_mask = truth == g
        for p in np.flatnonzero(np.bincount(predicted[true_mask])):
            if class_of(p) != class_of(g):
                continue
            mask = predicted == p
            iou = (true_mask & mask).sum() / (true_mask | mask).sum()
            if iou > 0.5:
                sums[class_of(g), :2] += iou, 1
                matched.add(p)
                break
        else:
            sums[class_of(g), 3] += 1
    for p in np.flatnonzero(np.bincount(predicted.ravel())):
        sums[class_of(p), 2] += p not in matched
    return sums


# STQ


@cache
def kitti_step() -> tuple[Maps, Maps]:
    return label_maps(6, 375, 1242, 24)


def stq_tarvis() -> Numbers:
    metric = STQ(NUM_CLASSES, range(NUM_THINGS))
    for truth, predicted in zip(*kitti_step(), strict=True):
        metric.add_frame(overlaps(encode(class_of(truth), truth), encode(class_of(predicted), predicted)))
    metric.end_sequence("a")
    return [metric.summary()[key] for key in ("STQ", "AQ", "IoU")]


def stq_naive() -> Numbers:
    truth, predicted = kitti_step()
    ious = []
    for k in range(NUM_CLASSES):
        true_mask, mask = class_of(truth) == k, class_of(predicted) == k
        ious.append((true_mask & mask).sum() / (true_mask | mask).sum())
    things = [g for g in np.flatnonzero(np.bincount(truth.ravel())) if class_of(g) < NUM_THINGS]
    total = 0.0
    for g in things:
        true_mask = truth == g
        for p in np.flatnonzero(np.bincount(predicted[true_mask])):
            if class_of(p) < NUM_THINGS:
                mask = predicted == p
                tpa = (true_mask & mask).sum()
                total += tpa * tpa / (true_mask | mask).sum() / true_mask.sum()
    aq, sq = total / len(things), float(np.mean(ious))
    return [(aq * sq) ** 0.5, aq, sq]


# AP


@cache
def youtube_vis() -> tuple[list[list[Any]], list[list[Any]], NDArray[np.float64]]:
    """Tubes of predictions and of truth, and scores."""
    truth, _ = label_maps(10, 360, 640, 7)
    predicted = [np.roll(truth, (k, k - 4), (1, 2)) for k in range(10)]
    true_tubes = [list(rle.encode(truth == g)) for g in range(2, 8)]
    tubes = [list(rle.encode(shifted == g)) for shifted in predicted for g in range(2, 8)]
    return tubes, true_tubes, np.random.default_rng(0).random(len(tubes))


def ap_tarvis() -> Numbers:
    tubes, true_tubes, scores = youtube_vis()
    ap = track_ap.TrackAP()
    ap.add(1, tube_iou(tubes, true_tubes), scores)
    numbers = track_ap.summary(ap, [1])
    return [numbers[key] for key in ("AP", "AP50", "AR_1", "AR_10")]


def ap_naive() -> Numbers:
    tubes, true_tubes, scores = youtube_vis()
    masks = [np.array([rle.decode(mask) for mask in tube]) for tube in tubes]
    true_masks = [np.array([rle.decode(mask) for mask in tube]) for tube in true_tubes]
    iou = [[(mask & truth).sum() / (mask | truth).sum() for truth in true_masks] for mask in masks]
    order = np.argsort(-scores, kind="stable")
    precisions, recalls = [], []
    for threshold in np.linspace(0.5, 0.95, 10):
        taken: set[int] = set()
        right = []
        for d in order:
            best, chosen = threshold, -1
            for g in range(len(true_masks)):
                if g not in taken and iou[d][g] >= best:
                    best, chosen = iou[d][g], g
            taken |= {chosen} - {-1}
            right.append(chosen >= 0)
        found = np.cumsum(right)
        precision = found / np.arange(1, len(order) + 1)
        at = [precision[found / len(true_masks) >= recall] for recall in np.linspace(0, 1, 101)]
        precisions.append(np.mean([values.max() if values.size else 0 for values in at]))
        recalls.append([found[0] / len(true_masks), found[9] / len(true_masks)])
    return [float(np.mean(precisions)), float(precisions[0]), *np.mean(recalls, axis=0).tolist()]


METRICS: dict[str, dict[str, Callable[[], Numbers]]] = {
    "jf": {"tarvis": jf_tarvis, "naive": jf_naive},
    "vpq": {"tarvis": vpq_tarvis, "naive": vpq_naive},
    "stq": {"tarvis": stq_tarvis, "naive": stq_naive},
    "ap": {"tarvis": ap_tarvis, "naive": ap_naive},
}


@pytest.mark.parametrize("impl", ["tarvis", "naive"])
@pytest.mark.parametrize("metric", METRICS)
def test_time(benchmark: Any, metric: str, impl: str) -> None:
    benchmark.group = metric
    numbers = timed(benchmark, METRICS[metric][impl])
    assert numbers == pytest.approx(METRICS[metric]["tarvis"](), abs=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_speedup(benchmark: Any, metric: str) -> None:
    best, _ = best_in_turn(METRICS[metric], 2)
    benchmark.extra_info["speedup"] = best["naive"] / best["tarvis"]
    benchmark.pedantic(METRICS[metric]["tarvis"])
    assert best["naive"] >= SPEEDUP * best["tarvis"], best
