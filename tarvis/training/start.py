"""What a run is and what it starts from: its folder, settings, classes and first weights."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tarvis.config import VIDEO_CLASS_SETS, ModelConfig, OwnClasses
from tarvis.data.sets import KNOWN, TrainingSet
from tarvis.datasets.benchmark import WORKSPACE
from tarvis.model import TarVis
from tarvis.model.weight_files import State
from tarvis.model.weights import CONFIG, WeightsError, load_backbone, load_into, load_weights
from tarvis.structures import InputError
from tarvis.training.checkpoint import Checkpoints, plain
from tarvis.training.config import Config, differing, load_config
from tarvis.training.transfer import transfer


@dataclass(frozen=True)
class Start:
    """Weights that a run starts from, and the network that they are of."""

    path: Path
    state: State
    model: ModelConfig


def model_folder(args: argparse.Namespace) -> Path:
    """Where the run is kept."""
    if args.model_dir is not None:
        return in_workspace(args.model_dir)
    if args.restore_session is None:
        raise InputError("give --model_dir, the folder of the run")
    return Path(args.restore_session).parent


def in_workspace(folder: Path) -> Path:
    """The folder of a run: a relative one is below the workspace's checkpoints, where there is one."""
    workspace = os.environ.get(WORKSPACE)
    return folder if workspace is None else Path(workspace) / "checkpoints" / folder


def session_of(named: Path | None, checkpoints: Checkpoints) -> Path | None:
    """The checkpoint to go on from: the last of the folder, else the one that is named, if any.

    A named one of another folder is how a run begins; started again, it goes on like any other.

    Raises:
        InputError: the named one does not exist, or is not the last of its own folder, which is the run's.
    """
    latest = checkpoints.latest()
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


def start_of(args: argparse.Namespace) -> Start | None:
    """What --finetune_from names: a file of weights, or the folder of a run, whose last ones count.

    Raises:
        InputError: it is neither, or its weights cannot be read.
    """
    if args.finetune_from is None:
        return None
    if args.restore_weights:
        raise InputError("give --finetune_from or --restore_weights, not both")
    path = in_workspace(args.finetune_from)
    path = path if path.exists() else args.finetune_from
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_dir():
        latest = Checkpoints(path).latest()
        if latest is None:
            raise InputError(
                f"{path}: has no checkpoint NNNNNN.pth; expected the folder of a run, or a file of weights"
            )
        path = latest
    return Start(path, *load_weights(path))


def configure(args: argparse.Namespace, session: Path | None, start: ModelConfig | None) -> Config:
    """The settings of the run, which starts from a network `start`, if any.

    A run that goes on keeps its settings; --set may change some. A new one has the network that it starts
    from, but for what the file or --set say.
    """
    options = {
        "optim.amp": half_precision() if args.amp else None,
        "optim.micro_batch": args.max_samples_per_gpu,
        "run.show_every": args.display_interval,
        "run.summary_every": args.summary_interval,
    }
    changes = [f"{key}={value}" for key, value in options.items() if value is not None] + args.set
    if any(change.startswith("data.train=") for change in args.set):
        changes.insert(0, "data.weights=[]")  # those of the file are of other sets
    if session is not None:
        return load_config(session.parent / CONFIG, changes)
    if args.cfg is None:
        raise InputError("give --cfg, the settings of the run (configs/ has some)")
    told = load_config(args.cfg, changes)
    return load_config(args.cfg, changes, {"model": network_before(told, start)})


def half_precision() -> str:
    """bf16 where the GPU has it; a CPU does."""
    return "bf16" if not torch.cuda.is_available() or torch.cuda.is_bf16_supported() else "fp16"


def network_before(told: Config, start: ModelConfig | None) -> dict[str, Any]:
    """The network as what was `told` changes it: that of the start, with its classes.

    A run on known sets alone has the class sets of the published video models instead, so that fine-tuning
    leaves those of pre-training behind; classes of own data stay even then.
    """
    base = {} if start is None else plain(start)
    given = {} if start is None else start.class_sets
    own = {} if start is None else start.own_classes
    sets = told.model.class_sets
    if sets == VIDEO_CLASS_SETS:  # the default: nothing was told of them
        is_known = all(name in KNOWN for name in told.data.train)
        sets = sets | {name: given[name] for name in own} if is_known else given
    kept = {name: each for name, each in own.items() if sets.get(name) == given[name]}
    return base | {"class_sets": sets, "own_classes": plain(kept)}


def with_class_sets(config: Config, sets: Sequence[TrainingSet]) -> Config:
    """The settings with class queries for every set that needs some, own data included."""
    class_sets, own = dict(config.model.class_sets), dict(config.model.own_classes)
    for each in sets:
        if each.classes is None:
            continue
        count = each.classes.num_classes
        if each.name in own:
            class_sets[each.name] = count  # the file may have got more since the start
        elif class_sets.setdefault(each.name, count) != count:
            raise InputError(
                f"model.class_sets: {each.name} has {count} classes, not {class_sets[each.name]}"
            )
        if each.name not in KNOWN:
            own[each.name] = OwnClasses(each.classes.names, each.classes.is_thing)
    model = dataclasses.replace(config.model, class_sets=class_sets, own_classes=own)
    return dataclasses.replace(config, model=model)


def initialise(args: argparse.Namespace, network: TarVis, config: Config, start: Start | None) -> str:
    """Give the network the weights that it starts from, and say which these are.

    Raises:
        InputError: they cannot be read, or are of another network.
    """
    if start is not None:
        try:
            fresh = transfer(network, config.model.class_sets, start.state, start.model.class_sets)
        except WeightsError as error:
            what = differing(start.model, config.model, "class_sets")
            raise InputError(f"{start.path}: of another network ({what or error})") from None
        anew = f"; class queries of {', '.join(fresh)} start at random" if fresh else ""
        return f"starts from {start.path}{anew}"
    if args.restore_weights is not None:
        state, _ = load_weights(args.restore_weights, config=config.model)
        try:
            load_into(network, state)
        except WeightsError as error:
            raise InputError(
                f"{args.restore_weights}: of another network than model.* says; --finetune_from takes the "
                f"network with the weights ({str(error)[:200]} ...)"
            ) from None
        return f"starts from {args.restore_weights}"
    if args.backbone_weights is not None:
        load_into(network.backbone, load_backbone(config.model.backbone, args.backbone_weights))
        return f"starts from random weights, but for the image backbone of {args.backbone_weights}"
    return "starts from random weights: neither --finetune_from nor --backbone_weights is given"
