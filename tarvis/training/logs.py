"""What a run tells: lines on the console, log.jsonl, TensorBoard or Weights & Biases, contact sheets."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from tarvis.files.atomic import whole_file
from tarvis.structures import InputError
from tarvis.training.trainer import Step


class Sink(Protocol):
    """Where numbers go by step."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, step: int, name: str, rgb: NDArray[np.uint8]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """log.jsonl, a line an entry; pictures/NAME_STEP.png.

    A run that goes on after `start` steps appends; what a killed one has told of later steps goes first. What
    is not a number (the loss of a step that was skipped) is null.
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        path = folder / "log.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= start]
            if len(kept) < len(lines):
                with whole_file(path) as file:
                    file.write("".join(kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **known}) + "\n")
        self._file.flush()

    def picture(self, step: int, name: str, rgb: NDArray[np.uint8]) -> None:
        path = self._folder / "pictures" / f"{name}_{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].tobytes())

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):  # cut off, or not ours
        return math.inf


class TensorBoard:
    def __init__(self, folder: Path, start: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(f"TensorBoard is not installed: pip install -e '.[train]' ({error})") from None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, rgb: NDArray[np.uint8]) -> None:
        self._writer.add_image(name, rgb, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandB:
    def __init__(self, folder: Path, session: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise InputError(f"Weights & Biases is not installed: pip install wandb ({error})") from None
        self._wandb = wandb
        project, _, name = session.rpartition("/")
        names = {"project": project or "tarvis", "name": name, "id": name}
        try:
            self._run = wandb.init(**names, dir=str(folder), config=config, resume="allow")
        except wandb.Error as error:
            raise InputError(f"--wandb_session {session}: {error}") from None

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, rgb: NDArray[np.uint8]) -> None:
        self._run.log({name: self._wandb.Image(rgb)}, step=step)

    def close(self) -> None:
        self._run.finish()


class Console:
    """A line every few steps: loss, rate, seconds a step, the share of them spent waiting for clips, ETA."""

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
    import resource

    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"


def duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"
