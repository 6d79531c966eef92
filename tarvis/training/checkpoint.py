"""Checkpoints of a run: written whole or not at all, with a checksum, listed by step, old ones removed.

A checkpoint holds the state that does not follow from the number of the step: weights, their moving average,
the state of the optimiser and of the loss scaler. Random numbers, clips and rates follow from the step.
`tarvis.load` reads checkpoints as weights; a `config.yaml` lies beside them.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from tarvis.files.atomic import is_sealed, leftovers, seal, whole_file
from tarvis.model.weight_files import WeightsError, as_state, read_file
from tarvis.model.weights import CONFIG
from tarvis.structures import InputError
from tarvis.training.config import Config

NAME = re.compile(r"(\d{6,})\.pth")
LOG = "log.jsonl"
MARK = b"# all settings of a run of tarvis.train\n"
"""First line of the `config.yaml` of a run."""


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

    def sound(self) -> tuple[Path | None, list[str]]:
        """The latest checkpoint that is whole and finite; what is wrong with those after it, a line each.

        Raises:
            InputError: there are checkpoints, but none is sound.
        """
        wrong: list[str] = []
        for path in reversed(self.found()):
            try:
                require_finite(read_checkpoint(path), path)
            except DamagedCheckpointError as error:
                wrong.append(str(error))
            else:
                return path, wrong
        if wrong:
            raise InputError(wrong[0])
        return None, []

    def write(self, step: int, content: dict[str, Any], *, good: int | None = None) -> Path:
        """Write the checkpoint of a step, then remove the oldest of earlier steps beyond `keep`.

        Args:
            good: the last step whose checkpoint would have proved good: training went on from there. The
                newest checkpoint up to there stays, or the oldest of all.

        Raises:
            InputError: it cannot be written, or a value is not finite; an older one of that name stays.
        """
        path = self.folder / f"{step:06d}.pth"
        require_finite(content, path)
        try:
            with whole_file(path) as file:
                torch.save(content, file)
                seal(file)
                file.flush()
                os.fsync(file.fileno())  # before older ones go: the machine may stop at any time
        except (OSError, RuntimeError) as error:  # RuntimeError: a full disk, in torch.save
            raise InputError(f"{path}: cannot be written ({error})") from None
        for left in leftovers(self.folder):  # of a process that was killed as it wrote
            left.unlink()
        found = self.found()
        proved = [each for each in found if good is not None and int(each.stem) <= good]
        last_good = None if good is None else [found[0], *proved][-1]
        for old in found[: found.index(path) + 1][: -self.keep] if self.keep > 0 else ():
            if old != last_good and is_sealed(old):  # others are not ours
                old.unlink()
        return path


class DamagedCheckpointError(InputError):
    """A checkpoint is not what a run has written, or must not be gone on from."""


def require_finite(content: Any, path: Path) -> None:
    """Raise DamagedCheckpointError if a number of a checkpoint's weights or optimiser is not finite."""
    parts = {key: content.get(key) for key in ("model", "ema", "optimizer")}
    for part, tree in parts.items():
        if any(not x.isfinite().all() for x in _tensors(tree) if x.is_floating_point()):
            raise DamagedCheckpointError(
                f"{path}: the numbers of {part!r} are not all finite, so no run can go on from them: "
                "lower optim.lr, and go on from an earlier checkpoint"
            )


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(each)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content that `Checkpoints.write` wrote.

    Raises:
        DamagedCheckpointError: it is damaged.
        InputError: it cannot be read, or is not of a training run.
    """
    try:
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    try:
        content = read_file(path)
    except WeightsError as error:
        raise DamagedCheckpointError(str(error)) from None
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
        file.write(MARK + yaml.safe_dump(plain(config), sort_keys=False).encode())


def require_ours(folder: Path) -> None:
    """Raise InputError where a new run would replace files that no run wrote."""
    files = [path for name in (CONFIG, LOG) if (path := folder / name).exists()]
    if not files or Checkpoints(folder).found():
        return
    with suppress(OSError), (folder / CONFIG).open("rb") as file:
        if file.read(len(MARK)) == MARK:
            return
    raise InputError(f"{files[0]}: no run wrote it, and this one would replace it; name another --model_dir")


def plain(config: Any) -> Any:
    """A dataclass in the types of YAML and `torch.load`: dictionaries, lists, numbers, strings."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    return [plain(value) for value in config] if isinstance(config, tuple | list) else config
