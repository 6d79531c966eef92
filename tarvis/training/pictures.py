"""What the network sees of a training clip, beside what is true."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from tarvis.config import InferenceConfig
from tarvis.data.batch import Batch
from tarvis.datasets.classes import ClassTable
from tarvis.files.pictures import Picture
from tarvis.model import TarVis
from tarvis.structures import VOID, Reference, VideoResult
from tarvis.tasks import TASKS
from tarvis.video.overlays import painted, painting_order
from tarvis.video.segmenter import VideoSegmenter
from tarvis.video.visualize import contact_sheet, overlay, panoptic_overlay

LEAST_SCORE = 0.3


def contact_sheet_of(network: TarVis, batch: Batch, classes: ClassTable | None) -> Picture:
    """The first clip of a batch: its frames above, the truth in the middle, what is found below."""
    T = batch.frames.shape[1]
    width, height = (batch.extent[0].cpu() * torch.tensor(batch.frames.shape[:-3:-1])).round().int().tolist()
    frames = batch.frames[0].permute(0, 2, 3, 1)[:, :height, :width].cpu().numpy()
    masks = batch.masks()[0][..., :height, :width].cpu()  # [N, T, H, W]
    references = _references(batch, masks)
    tasks = [name for name in TASKS if TASKS[name].targets(references)] or [batch.task]
    settings = InferenceConfig(clip_length=T, overlap=0, max_size=max(height, width))
    was_training = network.training
    try:
        with torch.compiler.set_stance("force_eager"):  # one picture is not worth a graph
            segmenter = VideoSegmenter(
                network.eval(), tasks, classes=classes, references=references, settings=settings
            )
            segmenter.step(list(frames))
            results = segmenter.finish()
    finally:
        network.train(was_training)
    rows: list[Picture] = [*frames]
    rows += [_truth(frames[t], masks[:, t].numpy(), batch, t, classes) for t in range(T)]
    rows += [_found(frames[t], list(results.values()), t, classes) for t in range(T)]
    titles = [name if t == 0 else "" for name in ("frames", "truth", "found") for t in range(T)]
    return contact_sheet(rows, columns=T, titles=titles)


def _references(batch: Batch, masks: torch.Tensor) -> list[Reference]:
    """Objects of the first clip as they were given; none where they are found by class."""
    if TASKS[batch.task].finds_classes:
        return []
    by_mask = len(masks) - batch.num_points
    size = torch.tensor(batch.frames.shape[-2:])
    given = [Reference(k + 1, 0, mask=masks[k, 0]) for k in range(by_mask) if masks[k, 0].any()]
    for k, (y, x) in enumerate((batch.points[0].cpu() * size - 0.5).tolist(), by_mask + 1):
        given.append(Reference(k, 0, point=(x, y)))
    return given


def _truth(
    frame: Picture, masks: NDArray[np.bool_], batch: Batch, t: int, classes: ClassTable | None
) -> Picture:
    shown = {k: mask for k, mask in enumerate(masks, 1) if mask.any()}
    if batch.semantic is None or classes is None:
        return overlay(frame, shown)
    semantic = batch.semantic[0, t, : frame.shape[0], : frame.shape[1]].cpu().numpy()
    known = np.where(semantic == VOID, 0, semantic)
    return panoptic_overlay(frame, known, shown, colors=classes.colors, names=classes.names)


def _found(frame: Picture, results: list[VideoResult], t: int, classes: ClassTable | None) -> Picture:
    for result in results:
        ids, semantic = painted(result, painting_order(result, LEAST_SCORE), t)
        masks = {k: ids == k for k in np.unique(ids).tolist() if k}
        if semantic is not None and classes is not None:
            return panoptic_overlay(frame, semantic, masks, colors=classes.colors, names=classes.names)
        frame = overlay(frame, masks)
    return frame
