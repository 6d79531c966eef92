"""Checkpoints of a run: written whole or not at all, listed by step, old ones removed.

A checkpoint holds the state that does not follow from the number of the step: weights, their moving average,
the state of the optimiser and of the loss scaler. Random numbers, clips and rates follow from the step.
`tarvis.load` reads checkpoints as weights; a `config.yaml` lies beside them.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from tarvis.files.atomic import whole_file
from tarvis.model.weight_files import as_state, read_file
from tarvis.model.weights import CONFIG
from tarvis.structures import InputError
from tarvis.training.config import Config

NAME = re.compile(r"(\d{6,})\.pth")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a folder, NNNNNN.pth by step; the oldest beyond `keep` are removed, 0 keeps all."""

    folder: Path
    keep: int = 2

    def found(self) -> list[Path]:
        """The paths of all checkpoints, by rising step."""
        steps = [(int(m[1]), path) for path in self.folder.glob("*.pth") if (m := NAME.fullmatch(path.name))]
        return [path for _, path in sorted(steps)]

    def latest(self) -> Path | None:
        return next(reversed(self.found()), None)

    def write(self, step: int, content: dict[str, Any]) -> Path:
        """Write the checkpoint of a step, then remove the oldest of earlier steps beyond `keep`.

        Raises:
            InputError: it cannot be written; an older one of that name stays.
        """
        path = self.folder / f"{step:06d}.pth"
        try:
            with whole_file(path) as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())  # before older ones go: the machine may stop at any time
        except (OSError, RuntimeError) as error:  # RuntimeError: a full disk, in torch.save
            raise InputError(f"{path}: cannot be written ({error})") from None
        for left in self.folder.glob(".*.pth.part"):  # of a process that was killed as it wrote
            left.unlink()
        found = self.found()
        for old in found[: found.index(path) + 1][: -self.keep] if self.keep > 0 else ():
            old.unlink()
        return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content that `Checkpoints.write` wrote.

    Raises:
        InputError: it cannot be read, or is not of a training run.
    """
    content = read_file(path)
    needed = {"model", "config", "optimizer", "step"}
    if not isinstance(content, dict) or (missing := needed - content.keys()):
        what = f" (it has no {', '.join(sorted(missing))})" if isinstance(content, dict) else ""
        raise InputError(f"{path}: not a checkpoint that training can go on from{what}")
    for name in _RIGHT.keys() & content.keys():
        if not _RIGHT[name](content[name]):
            raise InputError(
                f"{path}: not a checkpoint that training can go on from (its {name} is malformed)"
            )
    as_state(path, content)
    return content


def _is_optimizer(state: Any) -> bool:
    """Whether it is the state of an optimiser, by number of the parameter, and its groups of parameters."""
    return (
        isinstance(state, dict)
        and isinstance(state.get("state"), dict)
        and isinstance(state.get("param_groups"), list)
        and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in state["param_groups"])
        and all(isinstance(x, dict) for x in state["state"].values())
    )


_RIGHT: dict[str, Callable[[Any], bool]] = {
    "model": lambda x: isinstance(x, dict),
    "config": lambda x: isinstance(x, dict) and isinstance(x.get("model"), dict),
    "optimizer": _is_optimizer,
    "step": lambda x: type(x) is int and x >= 0,
    "ema": lambda x: isinstance(x, dict) and all(isinstance(v, Tensor) for v in x.values()),
    "scaler": lambda x: x is None or isinstance(x, dict),
}


def write_config(folder: Path, config: Config) -> None:
    """`config.yaml`, from which the run can be repeated and its weights be loaded."""
    with whole_file(folder / CONFIG) as file:
        file.write(yaml.safe_dump(plain(config), sort_keys=False).encode())


def plain(config: Any) -> Any:
    """A dataclass in the types of YAML and `torch.load`: dictionaries, lists, numbers, strings."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    return [plain(value) for value in config] if isinstance(config, tuple | list) else config
