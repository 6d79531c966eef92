"""Train, on images, videos, or your own data.

    python -m tarvis.train --cfg configs/tiny.yaml --model_dir runs/tiny
    torchrun --nproc_per_node 8 -m tarvis.train --cfg configs/pretrain.yaml --model_dir runs/pre --amp
    torchrun --nproc_per_node 8 -m tarvis.train --cfg configs/finetune.yaml --model_dir runs/fine --amp \\
        --finetune_from runs/pre
    python -m tarvis.train --cfg configs/own.yaml --finetune_from runs/fine --model_dir runs/mine \\
        --set "data.train=[my.json]"

Started again with the same --model_dir, a run continues from its last sound checkpoint, exactly. SIGTERM,
Ctrl-C and --max_hours end it with a checkpoint; its exit status is then 143, 130 or 0. The folder then holds

    config.yaml     the settings; NNNNNN.pth beside it are weights that tarvis.load reads
    log.jsonl       numbers by step; also tensorboard/
    pictures/       contact sheets of what the network sees
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tarvis import cli, places
from tarvis.api import pick_device
from tarvis.data.loader import TrainingLoader, WaitEndedError, worker_errors
from tarvis.data.sets import open_sets
from tarvis.datasets.benchmark import WORKSPACE
from tarvis.datasets.classes import ClassTable
from tarvis.distributed import PATIENCE_S, World, threads, world
from tarvis.files.outputs import LOCK, locked, made
from tarvis.model import build_model
from tarvis.structures import DamagedError, InputError
from tarvis.training.checkpoint import Checkpoints, plain, read_checkpoint, require_ours, write_config
from tarvis.training.config import Config
from tarvis.training.logs import Console, JsonLines, Sink, TensorBoard, contact_sheet_of, step_numbers
from tarvis.training.start import (
    checkpoint_to_continue,
    configure,
    initialise,
    read_start,
    run_folder,
    with_class_sets,
)
from tarvis.training.trainer import Step, Trainer

SILENCE_S = 600.0
"""How long a process waits for one that does not answer; one that has ended is noticed at once."""
PROOF_STEPS = 20
"""Steps that went well after a checkpoint, before it takes the place of the last that has proved good."""


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    def action() -> dict[str, Any]:
        if args.threads is not None and args.threads < 1:
            raise InputError(f"--threads: expected at least 1, got {args.threads}")
        if not 0 < args.timeout <= PATIENCE_S:
            raise InputError(f"--timeout: expected more than 0, up to {PATIENCE_S:.0f}, got {args.timeout}")
        if args.max_hours is not None and not args.max_hours >= 0:
            raise InputError(f"--max_hours: expected at least 0, got {args.max_hours}")
        try:
            with world(args.timeout) as processes, threads(args.threads, opencv=args.cv2_num_threads):
                return train(args, processes)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = str(error).strip()[:200]
            raise InputError(f"compiling needs a C++ compiler, or run.compile=false: {reason}") from None

    memory = "set run.checkpoint_activations=true, a smaller optim.micro_batch, or smaller frames"
    return cli.run(action, memory=f"out of GPU memory: {memory}")


def parser() -> argparse.ArgumentParser:
    p = cli.command("tarvis.train", __doc__)

    def alias(option: str, key: str) -> None:
        p.add_argument(
            option,
            dest="aliases",
            action="append",
            default=[],
            type=f"{key}={{}}".format,
            metavar="N",
            help=f"the same as --set {key}=N",
        )

    p.add_argument(
        "--model_dir",
        type=Path,
        metavar="DIR",
        help=f"the folder of the run; a relative one is below ${WORKSPACE}/checkpoints, if that is set",
    )
    p.add_argument("--cfg", type=Path, metavar="YAML", help="the settings that differ from the defaults")
    p.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings of this run"
    )
    p.add_argument(
        "--finetune_from",
        type=places.weights,
        metavar="PATH",
        help="start from trained weights with their network: the folder of a run, published or ours, whose "
        "last ones count, or a file (.safetensors, or .pth with its config.yaml beside it)",
    )
    p.add_argument(
        "--restore_weights",
        type=places.weights,
        metavar="FILE",
        help="start from weights of exactly the network and classes of this run",
    )
    p.add_argument(
        "--backbone_weights",
        type=Path,
        metavar="FILE",
        help="start from an image backbone; with --finetune_from, the trained network gets it",
    )
    p.add_argument("--restore_session", type=Path, metavar="FILE", help="continue from this checkpoint")
    p.add_argument(
        "--amp", action="store_true", help="the same as --set optim.amp=bf16 (fp16 where there is no bf16)"
    )
    alias("--max_samples_per_gpu", "optim.micro_batch")
    p.add_argument("--max_hours", type=float, metavar="H", help="end with a checkpoint after this time")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads of a process")
    p.add_argument(
        "--cv2_num_threads", type=int, default=1, metavar="N", help="of OpenCV in this process (1)"
    )
    p.add_argument("--wandb_session", metavar="[PROJECT/]NAME", help="log to Weights & Biases, too")
    alias("--display_interval", "run.show_every")
    alias("--summary_interval", "run.summary_every")
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


def changes(args: argparse.Namespace) -> list[str]:
    """The settings of the command line, KEY=VALUE; later ones count more."""
    found = [f"optim.amp={half_precision()}"] * args.amp + args.aliases + args.set
    if any(change.startswith("data.train=") for change in args.set):
        found.insert(0, "data.weights=[]")  # those of the file are of other sets
    return found


def half_precision() -> str:
    """bf16 where the GPU has it; a CPU does."""
    return "bf16" if not torch.cuda.is_available() or torch.cuda.is_bf16_supported() else "fp16"


def train(args: argparse.Namespace, processes: World) -> dict[str, Any]:
    """Train as the command line says; returns the summary of the main process, empty on the others."""
    began = time.monotonic()
    folder = run_folder(args.model_dir, args.restore_session)
    with ExitStack() as held:
        if processes.is_main:
            held.enter_context(made(folder))
            held.enter_context(locked(folder / LOCK, folder))
        return train_in(folder, args, processes, began)


def train_in(folder: Path, args: argparse.Namespace, processes: World, began: float) -> dict[str, Any]:
    """`train` in a folder that no other run writes into."""
    checkpoints = Checkpoints(folder, args.max_ckpts_to_keep)
    # every process continues from what the main one finds: a file system may show others less
    session = None
    if processes.is_main:
        require_ours(folder)
        session = checkpoint_to_continue(args.restore_session, checkpoints, partial(print, file=sys.stderr))
    (session,) = processes.from_main((session,))
    start = None
    if session is None and args.restore_weights:
        for option in ("finetune_from", "backbone_weights"):
            if getattr(args, option):
                raise InputError(f"give --{option} or --restore_weights, not both")
    if session is None and args.finetune_from is not None:
        start = read_start(args.finetune_from)
    config = configure(args.cfg, changes(args), session, None if start is None else start.model)
    saved = None if session is None else read_checkpoint(session)
    if saved is not None and saved["step"] >= config.optim.steps:
        if processes.is_main:
            cli.say(f"{folder}: has finished {saved['step']} steps; raise optim.steps to go on")
        return summary_of(processes, checkpoints, saved["step"], is_finished=True)
    device = pick_device(
        f"cuda:{processes.local_rank}" if args.device == "auto" and torch.cuda.is_available() else args.device
    )
    if device.type == "cpu" and config.optim.amp == "fp16":
        raise InputError("optim.amp=fp16 needs a GPU; a CPU takes bf16")

    sets = open_sets(config.data)
    config = with_class_sets(config, sets)
    loader = TrainingLoader(
        [each.clips for each in sets],
        config.data,
        seed=config.run.seed,
        batch_size=config.optim.batch_size,
        micro_batch=config.optim.micro_batch,
        world=processes,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(config.run.seed)
        network = build_model(config.model)
        if saved is None:
            begins = initialise(
                network,
                config,
                start,
                restore_weights=args.restore_weights,
                backbone_weights=args.backbone_weights,
            )
    del start  # its weights

    deadline = None if args.max_hours is None else began + 3600 * args.max_hours
    # kernels and collectives run on the current device
    with cli.stopping(deadline) as stop, torch.cuda.device_of(torch.empty(0, device=device)):
        trainer = Trainer(network.to(device), config, processes, stop)
        if saved is not None:
            trainer.restore(saved)
            del saved  # a file that is mapped
            begins = f"goes on from {session}; its config.yaml counts, not --cfg"
        sinks: list[Sink] = []
        if processes.is_main:
            write_config(folder, config)
            cli.say(begins)
            sinks = open_sinks(folder, trainer.step, args.wandb_session, config)
        classes = {each.name: each.classes for each in sets}
        last = loop(trainer, loader, checkpoints, sinks, classes, processes, stop, args.save_ckpts_after)
    is_finished = trainer.step >= config.optim.steps
    # torchrun would end the other processes at once if one ended with another status than 0
    status = 0 if is_finished or processes.size > 1 else stop.status
    if is_finished and last is not None and not is_sound(last, trainer):
        is_finished = False
        status = cli.fail(
            "the run ends on a step that was skipped, since a loss or gradient is not finite: no checkpoint "
            "is written of it: lower optim.lr, or raise optim.steps"
        )
    summary = summary_of(processes, checkpoints, trainer.step, last, is_finished=is_finished)
    return summary | {cli.STATUS: status}


def loop(
    trainer: Trainer,
    loader: TrainingLoader,
    checkpoints: Checkpoints,
    sinks: Sequence[Sink],
    classes: Mapping[str, ClassTable | None],
    processes: World,
    stop: cli.Stop,
    save_after: int,
) -> Step | None:
    """Train to the end or until asked to stop, with numbers, pictures and checkpoints; returns the last step.

    `classes` are those of each set; no checkpoint is written on the way up to step `save_after`.
    """
    run, steps = trainer.config.run, trainer.config.optim.steps
    console = Console(steps)
    last, written, is_due = None, trainer.step, False
    proof, streak, good = min(PROOF_STEPS, run.checkpoint_every), 0, -1

    def write_checkpoint() -> None:
        nonlocal written
        if processes.is_main and trainer.step > written and last is not None and is_sound(last, trainer):
            checkpoints.write(trainer.step, trainer.state(), good=good)
            written = trainer.step

    try:
        for last in trainer.run(loader.steps(trainer.step, steps, stop)):
            number = last.number
            streak = streak + 1 if is_sound(last, trainer) else 0
            good = number - proof if streak >= proof else good
            is_due |= number % run.checkpoint_every == 0 and number > save_after
            if is_due and is_sound(last, trainer):
                write_checkpoint()
                is_due = False
            if last.is_bad and (processes.is_main or last.suspects):
                cli.say(skipped(last, trainer.config.optim.amp))
            if processes.is_main and (number % run.show_every == 0 or number == steps):
                console.show(last, loader.waited_s)
            if number % run.summary_every == 0 or number == steps or last.is_bad:
                for sink in sinks:
                    sink.numbers(number, step_numbers(last))
            if sinks and run.picture_every and number % run.picture_every == 0:
                picture = contact_sheet_of(trainer.network, last.batches[0], classes[last.set_name])
                for sink in sinks:
                    sink.picture(number, f"{last.set_name}_{last.task}", picture)
        write_checkpoint()
        processes.wait()
    except WaitEndedError:  # the other processes will notice
        write_checkpoint()
    except Exception as error:  # a damaged clip, no memory, a process that has ended: keep what was learned
        if trainer.is_whole:
            with suppress(InputError):
                write_checkpoint()
        with worker_errors():
            if isinstance(error, DamagedError) and not trainer.step:
                raise InputError(str(error)) from None
            raise
    finally:
        for sink in sinks:
            sink.close()
        if processes.is_main and 0 < written < steps:
            print(f"stopped at {written} of {steps} steps; start again to go on", file=sys.stderr)
    return last


def open_sinks(folder: Path, start: int, wandb_session: str | None, config: Config) -> list[Sink]:
    """The files that a run of `start` steps so far continues: log.jsonl, and TensorBoard's if installed."""
    sinks: list[Sink] = [JsonLines(folder, start)]
    try:
        sinks.append(TensorBoard(folder, start, wandb_session, plain(config)))
    except InputError as error:
        if wandb_session is not None:
            raise
        print(f"only log.jsonl is written: {error}", file=sys.stderr)
    return sinks


def is_sound(last: Step, trainer: Trainer) -> bool:
    """Whether the weights are worth keeping: they are those after `last`, a step that was not skipped.

    A gradient that overflows in fp16 is no fault of the weights.
    """
    is_good = not last.is_bad or (trainer.config.optim.amp == "fp16" and math.isfinite(last.loss))
    return is_good and last.number == trainer.step


def summary_of(
    processes: World, checkpoints: Checkpoints, steps: int, last: Step | None = None, *, is_finished: bool
) -> dict[str, Any]:
    """What the main process prints at the end; empty on the others."""
    if not processes.is_main:
        return {}
    checkpoint = checkpoints.latest()
    return {
        "model_dir": str(checkpoints.folder),
        "steps": steps,
        "finished": is_finished,
        "loss": last.loss if last is not None and math.isfinite(last.loss) else None,
        "checkpoint": None if checkpoint is None else str(checkpoint),
    }


def skipped(step: Step, amp: str) -> str:
    """Why a step was skipped, in a line."""
    why = "a loss or gradient is not finite"
    if amp == "fp16" and math.isfinite(step.loss):
        why = "a gradient overflows in fp16, whose scale is halved"
    of = f": {', '.join(step.suspects)}" if step.suspects else ""
    return f"step {step.number} is skipped: {why} ({step.set_name} {step.task}{of})"


if __name__ == "__main__":
    sys.exit(main())
