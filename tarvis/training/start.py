"""How a run begins: its folder, settings, classes and first weights."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tarvis.config import VIDEO_CLASS_SETS, ModelConfig, OwnClasses
from tarvis.data.sets import KNOWN, TrainingSet
from tarvis.datasets.benchmark import WORKSPACE
from tarvis.model import TarVis
from tarvis.model.weight_files import State
from tarvis.model.weights import CONFIG, WeightsError, load_backbone, load_into, load_weights
from tarvis.structures import InputError
from tarvis.training.checkpoint import Checkpoints, plain
from tarvis.training.config import Config, differing, load_config
from tarvis.training.transfer import transfer, with_backbone_of


@dataclass(frozen=True)
class Start:
    """Weights that a run starts from, and their network."""

    path: Path
    state: State
    model: ModelConfig


def run_folder(model_dir: Path | None, session: Path | None) -> Path:
    """The folder of a run: `model_dir`, else that of the checkpoint it continues."""
    if model_dir is not None:
        return in_workspace(model_dir)
    if session is None:
        raise InputError("give --model_dir, the folder of the run")
    return session.parent


def in_workspace(folder: Path) -> Path:
    """The folder of a run: a relative one is below the workspace's checkpoints, if there is a workspace."""
    workspace = os.environ.get(WORKSPACE)
    return folder if workspace is None else Path(workspace) / "checkpoints" / folder


def checkpoint_to_continue(
    named: Path | None, checkpoints: Checkpoints, say: Callable[[str], None] = lambda _: None
) -> Path | None:
    """The last checkpoint of the run's folder, else the one that is named, if any.

    A damaged checkpoint is renamed, and the one before it becomes the last; `say` gets a line about each.

    A named one of another folder is how a run begins; started again, it continues like any other.

    Raises:
        InputError: the named one does not exist, or is not the last of its own folder, which is the run's.
    """
    latest, wrong = checkpoints.sound()
    for line, path in zip(wrong, reversed(checkpoints.found()), strict=False):
        aside = path.rename(path.with_name(f"{path.name}.damaged"))
        say(f"warning: {line}. It is now {aside.name}, and the run goes on from {latest}")
    if named is None:
        return latest
    if not named.is_file():
        raise InputError(f"{named}: no such file")
    if latest is None or named.samefile(latest):
        return named
    if named.parent.samefile(checkpoints.folder):
        raise InputError(
            f"{checkpoints.folder}: has later checkpoints than {named.name}, from which the run would go on "
            "next time; remove them, or name another --model_dir"
        )
    return latest


def read_start(path: Path) -> Start:
    """The weights of --finetune_from: a file, or the folder of a run, whose last ones count.

    Raises:
        InputError: it is neither, or its weights cannot be read.
    """
    found = in_workspace(path)
    found = found if found.exists() else path
    if not found.exists():
        raise InputError(f"{found}: no such file or folder")
    if found.is_dir():
        latest = Checkpoints(found).latest()
        if latest is None:
            raise InputError(
                f"{found}: has no checkpoint NNNNNN.pth; expected the folder of a run, or a file of weights"
            )
        found = latest
    return Start(found, *load_weights(found))


def configure(
    cfg: Path | None, changes: Sequence[str], session: Path | None, start: ModelConfig | None
) -> Config:
    """The settings of a run that continues `session`, or starts from a network `start`; either may be None.

    A run that continues keeps its settings, except for `changes`. A new one has the network that it starts
    from, except where the file `cfg` or `changes` say otherwise.
    """
    if session is not None:
        return load_config(session.parent / CONFIG, changes)
    if cfg is None:
        raise InputError("give --cfg, the settings of the run (configs/ has some)")
    return load_config(cfg, changes, {"model": inherited_network(load_config(cfg, changes), start)})


def inherited_network(config: Config, start: ModelConfig | None) -> dict[str, Any]:
    """The network of the start with its classes, as the base that the settings of a run change.

    A run on known sets alone has the class sets of the published video models instead, so that fine-tuning
    leaves those of pre-training behind; classes of own data stay even then.
    """
    base = {} if start is None else plain(start)
    given = {} if start is None else start.class_sets
    own = {} if start is None else start.own_classes
    sets = config.model.class_sets
    if sets == VIDEO_CLASS_SETS:  # the default: the settings do not name any
        is_known = all(name in KNOWN for name in config.data.train)
        sets = sets | {name: given[name] for name in own} if is_known else given
    kept = {name: each for name, each in own.items() if sets.get(name) == given[name]}
    return base | {"class_sets": sets, "own_classes": plain(kept)}


def with_class_sets(config: Config, sets: Sequence[TrainingSet]) -> Config:
    """The settings with class queries for every set whose objects have classes, own data included."""
    class_sets, own = dict(config.model.class_sets), dict(config.model.own_classes)
    for each in sets:
        if each.classes is None:
            continue
        count = each.classes.num_classes
        if each.name in own:
            class_sets[each.name] = count  # the file may have more classes than at the start
        elif class_sets.setdefault(each.name, count) != count:
            raise InputError(
                f"model.class_sets: {each.name} has {count} classes, not {class_sets[each.name]}"
            )
        if each.name not in KNOWN:
            own[each.name] = OwnClasses(each.classes.names, each.classes.is_thing)
    model = dataclasses.replace(config.model, class_sets=class_sets, own_classes=own)
    return dataclasses.replace(config, model=model)


def initialise(
    network: TarVis,
    config: Config,
    start: Start | None,
    *,
    restore_weights: Path | None = None,
    backbone_weights: Path | None = None,
) -> str:
    """Give the network its first weights, and say which these are.

    A start and `backbone_weights` together give the network another image backbone than the start has.

    Raises:
        InputError: they cannot be read, or are of another network.
    """
    if backbone_weights is not None:
        load_into(network.backbone, load_backbone(config.model.backbone, backbone_weights))
    if start is not None:
        state, exception = start.state, ""
        if backbone_weights is not None:
            state = with_backbone_of(network, state)
            exception = (
                f", except for the image backbone of {backbone_weights}; layers that read it start at random"
            )
        try:
            fresh = transfer(network, config.model.class_sets, state, start.model.class_sets)
        except WeightsError as error:
            what = differing(start.model, config.model, "class_sets")
            raise InputError(f"{start.path}: of another network ({what or error})") from None
        anew = f"; class queries of {', '.join(fresh)} start at random" if fresh else ""
        return f"starts from {start.path}{exception}{anew}"
    if restore_weights is not None:
        state, _ = load_weights(restore_weights, config=config.model)
        try:
            load_into(network, state)
        except WeightsError as error:
            raise InputError(
                f"{restore_weights}: of another network than model.* says; --finetune_from takes the "
                f"network with the weights ({str(error)[:200]} ...)"
            ) from None
        return f"starts from {restore_weights}"
    if backbone_weights is not None:
        return f"starts from random weights, except for the image backbone of {backbone_weights}"
    return "starts from random weights: neither --finetune_from nor --backbone_weights is given"
