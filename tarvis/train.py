"""Train, on images, videos, or your own data.

    python -m tarvis.train --cfg configs/tiny.yaml --model_dir runs/tiny
    torchrun --nproc_per_node 8 -m tarvis.train --cfg configs/pretrain.yaml --model_dir runs/pre --amp
    torchrun --nproc_per_node 8 -m tarvis.train --cfg configs/finetune.yaml --model_dir runs/fine --amp \\
        --finetune_from runs/pre
    python -m tarvis.train --cfg configs/finetune.yaml --finetune_from runs/pre --model_dir runs/mine \\
        --set "data.train=[my.json]" optim.steps=5000

Started again with the same --model_dir, a run goes on from its last checkpoint, exactly. SIGTERM, Ctrl-C and
--max_hours end it with a checkpoint. The folder then holds

    config.yaml     what was set; NNNNNN.pth beside it are weights that tarvis.load reads
    log.jsonl       numbers by step; also tensorboard/
    pictures/       what the network sees, now and then
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import torch

from tarvis.api import pick_device
from tarvis.config import ModelConfig, OwnClasses
from tarvis.data.loader import TrainingLoader
from tarvis.data.sets import KNOWN, TrainingSet, open_sets
from tarvis.datasets.classes import ClassTable
from tarvis.distributed import World, world
from tarvis.infer import fail
from tarvis.model import TarVis, build_model
from tarvis.model.weights import load_backbone, load_into, load_weights, read_config
from tarvis.structures import InputError
from tarvis.training.checkpoint import CONFIG, Checkpoints, plain, read_checkpoint, write_config
from tarvis.training.config import Config, load_config
from tarvis.training.logs import Console, JsonLines, Sink, TensorBoard, WandB, step_numbers
from tarvis.training.pictures import contact_sheet_of
from tarvis.training.trainer import Step, Trainer
from tarvis.training.transfer import transfer

WORKSPACE = "TARVIS_WORKSPACE_DIR"
SILENCE_S = 600.0
"""How long a process waits for one that does not answer; it takes notice at once of one that has ended."""


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        if args.threads is not None and args.threads < 1:
            raise InputError(f"--threads: expected at least 1, got {args.threads}")
        if args.timeout <= 0:
            raise InputError(f"--timeout: expected more than 0, got {args.timeout}")
        if args.max_hours is not None and not args.max_hours >= 0:
            raise InputError(f"--max_hours: expected at least 0, got {args.max_hours}")
        with world(args.timeout) as here:
            told = train(args, here)
    except (InputError, OSError) as error:
        return fail(str(error))
    except torch.OutOfMemoryError:
        return fail(
            "out of GPU memory: set run.checkpoint_activations=true, a smaller optim.micro_batch, or smaller "
            "frames"
        )
    except torch._dynamo.exc.BackendCompilerFailed as error:
        return fail(f"compiling needs a C++ compiler, or run.compile=false: {str(error).strip()[:200]}")
    except KeyboardInterrupt:  # before the first step, or a second time
        return 130
    if told:
        print(json.dumps(told))
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m tarvis.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--model_dir", type=Path, metavar="DIR", help="a relative one is below WORKSPACE/checkpoints, if set"
    )
    p.add_argument("--cfg", type=Path, metavar="YAML", help="what differs from the defaults")
    p.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings of this run"
    )
    p.add_argument(
        "--finetune_from",
        type=Path,
        metavar="DIR",
        help="start from a finished run: its network, its last weights",
    )
    p.add_argument("--restore_weights", type=Path, metavar="FILE", help="start from these weights")
    p.add_argument("--backbone_weights", type=Path, metavar="FILE", help="start from an image backbone")
    p.add_argument("--restore_session", type=Path, metavar="FILE", help="go on from this checkpoint")
    p.add_argument(
        "--amp", action="store_true", help="the same as --set optim.amp=bf16 (fp16 where there is no bf16)"
    )
    p.add_argument(
        "--max_samples_per_gpu", type=int, metavar="N", help="the same as --set optim.micro_batch=N"
    )
    p.add_argument("--max_hours", type=float, metavar="H", help="end with a checkpoint after so long")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads of a process")
    p.add_argument(
        "--cv2_num_threads", type=int, default=1, metavar="N", help="of OpenCV in this process (1)"
    )
    p.add_argument(
        "--wandb_session", metavar="[PROJECT/]NAME", help="log to Weights & Biases, not TensorBoard"
    )
    p.add_argument("--display_interval", type=int, metavar="N", help="the same as --set run.show_every=N")
    p.add_argument("--summary_interval", type=int, metavar="N", help="the same as --set run.summary_every=N")
    p.add_argument("--save_ckpts_after", type=int, default=0, metavar="STEP", help="no checkpoint before")
    p.add_argument("--max_ckpts_to_keep", type=int, default=2, metavar="N", help="0 keeps all (default: 2)")
    p.add_argument(
        "--timeout",
        type=float,
        default=SILENCE_S,
        metavar="S",
        help="how long to wait for other processes (600)",
    )
    return p


def train(args: argparse.Namespace, here: World) -> dict[str, Any]:
    """Run as told; returns the summary that goes to stdout, empty on all but the main process."""
    began = time.monotonic()
    cv2.setNumThreads(args.cv2_num_threads)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    folder = model_folder(args)
    checkpoints = Checkpoints(folder, args.max_ckpts_to_keep)
    # all go on from what the main process sees: a file system may show others less
    session = session_of(args.restore_session, checkpoints) if here.is_main else None
    (session,) = here.from_main((session,))
    config, start = configure(args, session)
    saved = None if session is None else read_checkpoint(session)
    if saved is not None and saved["step"] >= config.optim.steps:
        if here.is_main:
            print(
                f"{folder}: has finished {saved['step']} steps; raise optim.steps to go on", file=sys.stderr
            )
        return summary(here, checkpoints, config, saved["step"])
    device = pick_device(
        f"cuda:{here.local_rank}" if args.device == "auto" and torch.cuda.is_available() else args.device
    )
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # kernels and collectives run on the current one
    sets = open_sets(config.data)
    config = with_class_sets(config, sets)
    loader = TrainingLoader(
        [each.clips for each in sets],
        config.data,
        seed=config.run.seed,
        batch_size=config.optim.batch_size,
        micro_batch=config.optim.micro_batch,
        world=here,
    )
    torch.manual_seed(config.run.seed)
    network = build_model(config.model)
    if saved is None:
        initialise(args, network, config, start)
    deadline = None if args.max_hours is None else began + 3600 * args.max_hours
    with stopping(deadline) as should_stop:
        trainer = Trainer(network.to(device), config, here, should_stop)
        if saved is not None:
            trainer.restore(saved)
            del saved  # a file that is mapped
            if here.is_main:
                print(f"goes on from {session}; its config.yaml counts, not --cfg", file=sys.stderr)
        if here.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            write_config(folder, config)
        classes = {each.name: each.classes for each in sets}
        last = loop(args, trainer, loader, checkpoints, classes, here)
    return summary(here, checkpoints, config, trainer.step, last)


def summary(
    here: World, checkpoints: Checkpoints, config: Config, steps: int, last: Step | None = None
) -> dict[str, Any]:
    """What the main process says at the end; the others say nothing."""
    if not here.is_main:
        return {}
    checkpoint = checkpoints.latest()
    return {
        "model_dir": str(checkpoints.folder),
        "steps": steps,
        "finished": steps >= config.optim.steps,
        "loss": last.loss if last is not None and math.isfinite(last.loss) else None,
        "checkpoint": None if checkpoint is None else str(checkpoint),
    }


def loop(
    args: argparse.Namespace,
    trainer: Trainer,
    loader: TrainingLoader,
    checkpoints: Checkpoints,
    classes: Mapping[str, ClassTable | None],
    here: World,
) -> Step | None:
    """Train to the end or until told to stop; numbers, pictures and checkpoints on the way."""
    config, optim, run = trainer.config, trainer.config.optim, trainer.config.run
    sinks: list[Sink] = []
    if here.is_main:
        sinks.append(JsonLines(checkpoints.folder, trainer.step))
        if args.wandb_session:
            sinks.append(WandB(checkpoints.folder, args.wandb_session, plain(config)))
        else:
            try:
                sinks.append(TensorBoard(checkpoints.folder, trainer.step))
            except InputError as error:
                print(f"only log.jsonl is written: {error}", file=sys.stderr)
    console = Console(optim.steps)
    step, written = None, trainer.step
    try:
        for step in trainer.run(loader.steps(trainer.step, optim.steps)):
            number = step.number + 1
            if number % run.checkpoint_every == 0 and number > args.save_ckpts_after and here.is_main:
                checkpoints.write(number, trainer.state())
                written = number
            if step.is_bad and (here.is_main or step.suspects):
                of = f": {', '.join(step.suspects)}" if step.suspects else ""
                print(
                    f"step {step.number} is skipped: a loss or gradient is not finite "
                    f"({step.set_name} {step.task}{of})",
                    file=sys.stderr,
                )
            if here.is_main and (number % run.show_every == 0 or number == optim.steps):
                console.show(step, loader.waited_s)
            if number % run.summary_every == 0 or number == optim.steps or step.is_bad:
                for sink in sinks:
                    sink.numbers(step.number, step_numbers(step))
            if sinks and run.picture_every and number % run.picture_every == 0:
                picture = contact_sheet_of(trainer.network, step.batches[0], classes[step.set_name])
                for sink in sinks:
                    sink.picture(step.number, f"{step.set_name}_{step.task}", picture)
        if here.is_main and trainer.step > written:
            checkpoints.write(trainer.step, trainer.state())
        here.wait()
    finally:
        for sink in sinks:
            sink.close()
    return step


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


def model_folder(args: argparse.Namespace) -> Path:
    """Where the run is kept."""
    if args.model_dir is None:
        if args.restore_session is None:
            raise InputError("give --model_dir, the folder of the run")
        return Path(args.restore_session).parent
    workspace = os.environ.get(WORKSPACE)
    if args.model_dir.is_absolute() or workspace is None:
        return args.model_dir
    return Path(workspace) / "checkpoints" / args.model_dir


def configure(args: argparse.Namespace, session: Path | None) -> tuple[Config, ModelConfig | None]:
    """The settings of the run, and those of the network that --finetune_from starts from.

    A run that goes on keeps its settings; --set may change some. With --finetune_from the network is that
    of the other run, but for what the file or --set say.
    """
    if args.finetune_from and args.restore_weights:
        raise InputError("give --finetune_from or --restore_weights, not both")
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
        return load_config(session.parent / CONFIG, changes), None
    if args.cfg is None:
        raise InputError("give --cfg, the settings of the run (configs/ has some)")
    if args.finetune_from is None:
        return load_config(args.cfg, changes), None
    if not args.finetune_from.is_dir():
        raise InputError(f"{args.finetune_from}: expected the folder of a finished run")
    start = read_config(args.finetune_from / CONFIG)
    base = plain(start)
    names = load_config(args.cfg, changes).data.train
    if any(name in KNOWN for name in names):  # own data alone adds to the classes of the start
        del base["class_sets"], base["own_classes"]
    return load_config(args.cfg, changes, {"model": base}), start


def half_precision() -> str:
    """bf16 where the GPU has it; a CPU does."""
    return "bf16" if not torch.cuda.is_available() or torch.cuda.is_bf16_supported() else "fp16"


def with_class_sets(config: Config, sets: Sequence[TrainingSet]) -> Config:
    """The settings with class queries for every set that needs some, own data included."""
    class_sets, own = dict(config.model.class_sets), dict(config.model.own_classes)
    for each in sets:
        count = None if each.classes is None else each.classes.num_classes
        if count is not None and class_sets.setdefault(each.name, count) != count:
            raise InputError(
                f"model.class_sets: {each.name} has {count} classes, not {class_sets[each.name]}"
            )
        if each.classes is not None and each.name not in KNOWN:
            own[each.name] = OwnClasses(each.classes.names, each.classes.is_thing)
    model = dataclasses.replace(config.model, class_sets=class_sets, own_classes=own)
    return dataclasses.replace(config, model=model)


def initialise(args: argparse.Namespace, network: TarVis, config: Config, start: ModelConfig | None) -> None:
    """Weights to start from, where some are given."""
    if args.finetune_from is not None:
        latest = Checkpoints(args.finetune_from).latest()
        if latest is None:
            raise InputError(f"{args.finetune_from}: has no checkpoint NNNNNN.pth")
        state, given = load_weights(latest, config=start)
        fresh = transfer(network, config.model.class_sets, state, given.class_sets)
        if fresh:
            print(f"class queries of {', '.join(fresh)} start at random", file=sys.stderr)
    elif args.restore_weights is not None:
        state, _ = load_weights(args.restore_weights, config=config.model)
        load_into(network, state)
    elif args.backbone_weights is not None:
        load_into(network.backbone, load_backbone(config.model.backbone, args.backbone_weights))


@contextmanager
def stopping(deadline: float | None) -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether SIGTERM, SIGINT or `deadline` (time.monotonic) have come."""
    told: list[int] = []

    def note(number: int, _: object) -> None:
        if told and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice
        told.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(told) or (deadline is not None and time.monotonic() >= deadline)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
