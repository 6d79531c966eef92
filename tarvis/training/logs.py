"""Reports of a run: console, log.jsonl, TensorBoard, Weights & Biases, contact sheets of clips."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from tarvis.config import InferenceConfig
from tarvis.data.batch import Batch
from tarvis.datasets.classes import ClassTable
from tarvis.files.atomic import whole_file
from tarvis.files.pictures import Picture
from tarvis.model import TarVis
from tarvis.structures import VOID, InputError, Reference, VideoResult
from tarvis.tasks import TASKS
from tarvis.training.checkpoint import LOG
from tarvis.training.trainer import Step
from tarvis.video.overlays import painted, shown_tracks
from tarvis.video.segmenter import VideoSegmenter
from tarvis.video.visualize import contact_sheet, overlay, panoptic_overlay

LEAST_SCORE = 0.3
"""Least score of a track for a contact sheet to show it."""


class Sink(Protocol):
    """A log of numbers and pictures by step."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, step: int, name: str, rgb: Picture) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """log.jsonl, a line an entry; pictures/NAME_STEP.png.

    A run that continues after `start` steps appends, once the entries of later steps, from a run that was
    killed, are removed. A value that is not finite (the loss of a skipped step) is null.
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        path = folder / LOG
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= start]
            if len(kept) < len(lines):
                with whole_file(path) as file:
                    file.write("".join(kept).encode(errors="surrogateescape"))
        self._file = path.open("a", encoding="utf-8")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **known}) + "\n")
        self._file.flush()

    def picture(self, step: int, name: str, rgb: Picture) -> None:
        path = self._folder / "pictures" / f"{name}_{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].tobytes())

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):  # cut off, or not ours
        return math.inf


class TensorBoard:
    """Event files in tensorboard/, also sent to Weights & Biases if a `session` [PROJECT/]NAME is given."""

    def __init__(
        self, folder: Path, start: int = 0, session: str | None = None, config: dict[str, Any] | None = None
    ) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(f"TensorBoard is not installed: pip install -e '.[train]' ({error})") from None
        try:
            str(folder).encode()
        except UnicodeEncodeError:
            raise InputError(f"TensorBoard wants a folder whose name is UTF-8, got {folder}") from None
        # first: W&B follows the writers that are made after it has begun
        self._finish = None if session is None else start_wandb(folder, session, config or {})
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, rgb: Picture) -> None:
        self._writer.add_image(name, rgb, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()
        if self._finish is not None:
            self._finish()


def start_wandb(folder: Path, session: str, config: dict[str, Any]) -> Callable[[], None]:
    """Have Weights & Biases follow TensorBoard's files; returns the function that ends it.

    Raises:
        InputError: it is not installed, or cannot be reached.
    """
    try:
        import wandb
    except ImportError as error:
        raise InputError(f"Weights & Biases is not installed: pip install wandb ({error})") from None
    project, _, name = session.rpartition("/")
    names = {"project": project or "tarvis", "name": name, "id": name}
    try:
        run = wandb.init(**names, dir=str(folder), config=config, resume="allow", sync_tensorboard=True)
    except wandb.Error as error:
        raise InputError(f"--wandb_session {session}: {error}") from None
    finish: Callable[[], None] = run.finish
    return finish


class Console:
    """A line every few steps: loss, rate, seconds a step, share of time spent waiting for clips, ETA."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._last: tuple[int, float, float] | None = None

    def show(self, step: Step, waited_s: float) -> None:
        now = time.perf_counter()
        number, before, waited = self._last or (step.number - 1, now - step.seconds, waited_s)
        self._last = step.number, now, waited_s
        pace = (now - before) / max(step.number - number, 1)
        waiting = (waited_s - waited) / max(now - before, 1e-9)
        text = (
            f"{step.number:>7}/{self._total}  {step.set_name} {step.task}  loss {step.loss:.3f}  "
            f"gradient {step.gradient:.2f}  lr {step.rate:.1e}  {pace:.2f} s/step  data {waiting:.0%}  "
            f"{memory()}  ETA {duration(pace * (self._total - step.number))}"
        )
        print(text, file=sys.stderr, flush=True)


def step_numbers(step: Step) -> dict[str, float]:
    """Numbers of a step by name: each term of the last decoder output and, as aux, the mean of the others."""
    values = {"loss": step.loss, "gradient": step.gradient, "lr": step.rate, "seconds": step.seconds}
    if step.compiles:
        values["compiles"] = step.compiles
    for name, outputs in step.terms.items():
        found = outputs.tolist()
        values[f"{step.task}/{name}"] = found[-1]
        if found[:-1]:
            values[f"{step.task}/aux_{name}"] = float(np.mean(found[:-1]))
    return values


def memory() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    try:
        import resource
    except ImportError:  # Windows
        return "unknown"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"


def duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"


# Contact sheets


def contact_sheet_of(network: TarVis, batch: Batch, classes: ClassTable | None) -> Picture:
    """The first clip of a batch: its frames above, the truth in the middle, the network's answer below."""
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
    """The given objects of the first clip; none if the task finds objects by class."""
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
        ids, semantic = painted(result, shown_tracks(result, LEAST_SCORE), t)
        masks = {k: ids == k for k in np.unique(ids).tolist() if k}
        if semantic is not None and classes is not None:
            return panoptic_overlay(frame, semantic, masks, colors=classes.colors, names=classes.names)
        frame = overlay(frame, masks)
    return frame
