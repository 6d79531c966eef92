"""Train, on images, videos, or your own data.

    python -m tarvis.train --cfg configs/tiny.yaml --model_dir runs/tiny
    torchrun --nproc_per_node 8 -m tarvis.train --cfg configs/pretrain.yaml --model_dir runs/pre --amp
    torchrun --nproc_per_node 8 -m tarvis.train --cfg configs/finetune.yaml --model_dir runs/fine --amp \\
        --finetune_from runs/pre
    python -m tarvis.train --cfg configs/own.yaml --finetune_from runs/fine --model_dir runs/mine \\
        --set "data.train=[my.json]"

Started again with the same --model_dir, a run goes on from its last checkpoint, exactly. SIGTERM, Ctrl-C and
--max_hours end it with a checkpoint. The folder then holds

    config.yaml     what was set; NNNNNN.pth beside it are weights that tarvis.load reads
    log.jsonl       numbers by step; also tensorboard/
    pictures/       what the network sees, now and then
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from tarvis import cli
from tarvis.api import pick_device
from tarvis.data.loader import TrainingLoader
from tarvis.data.sets import open_sets
from tarvis.datasets.benchmark import WORKSPACE
from tarvis.datasets.classes import ClassTable
from tarvis.distributed import World, threads, world
from tarvis.model import build_model
from tarvis.structures import InputError
from tarvis.training.checkpoint import Checkpoints, plain, read_checkpoint, write_config
from tarvis.training.config import Config
from tarvis.training.logs import Console, JsonLines, Sink, TensorBoard, WandB, step_numbers
from tarvis.training.pictures import contact_sheet_of
from tarvis.training.start import (
    configure,
    initialise,
    model_folder,
    session_of,
    start_of,
    with_class_sets,
)
from tarvis.training.trainer import Step, Trainer

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
        with world(args.timeout) as here, threads(args.threads, opencv=args.cv2_num_threads):
            told = train(args, here)
    except (InputError, OSError) as error:
        return cli.fail(str(error))
    except torch.OutOfMemoryError:
        return cli.fail(
            "out of GPU memory: set run.checkpoint_activations=true, a smaller optim.micro_batch, or smaller "
            "frames"
        )
    except torch._dynamo.exc.BackendCompilerFailed as error:
        return cli.fail(f"compiling needs a C++ compiler, or run.compile=false: {str(error).strip()[:200]}")
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
        "--model_dir",
        type=Path,
        metavar="DIR",
        help=f"the folder of the run; a relative one is below ${WORKSPACE}/checkpoints, if that is set",
    )
    p.add_argument("--cfg", type=Path, metavar="YAML", help="what differs from the defaults")
    p.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings of this run"
    )
    p.add_argument(
        "--finetune_from",
        type=Path,
        metavar="PATH",
        help="start from trained weights with their network: the folder of a run, published or ours, whose "
        "last ones count, or a file (.safetensors, or .pth with its config.yaml beside it)",
    )
    p.add_argument(
        "--restore_weights",
        type=Path,
        metavar="FILE",
        help="start from weights of exactly the network and classes of this run",
    )
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
    folder = model_folder(args)
    checkpoints = Checkpoints(folder, args.max_ckpts_to_keep)
    # all go on from what the main process sees: a file system may show others less
    session = session_of(args.restore_session, checkpoints) if here.is_main else None
    (session,) = here.from_main((session,))
    start = None if session is not None else start_of(args)
    config = configure(args, session, None if start is None else start.model)
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
        world=here,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(config.run.seed)
        network = build_model(config.model)
        first = initialise(args, network, config, start) if saved is None else None
    del start  # its weights
    deadline = None if args.max_hours is None else began + 3600 * args.max_hours
    # kernels and collectives run on the current device
    with stopping(deadline) as should_stop, torch.cuda.device_of(torch.empty(0, device=device)):
        trainer = Trainer(network.to(device), config, here, should_stop)
        if saved is not None:
            trainer.restore(saved)
            del saved  # a file that is mapped
            if here.is_main:
                print(f"goes on from {session}; its config.yaml counts, not --cfg", file=sys.stderr)
        if here.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            write_config(folder, config)
            if first is not None:
                print(first, file=sys.stderr)
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

    def keep() -> None:
        nonlocal written
        if here.is_main and trainer.step > written:
            checkpoints.write(trainer.step, trainer.state())
            written = trainer.step

    try:
        for step in trainer.run(loader.steps(trainer.step, optim.steps)):
            number = step.number
            if number % run.checkpoint_every == 0 and number > args.save_ckpts_after:
                keep()
            if step.is_bad and (here.is_main or step.suspects):
                print(skipped(step, optim.amp), file=sys.stderr)
            if here.is_main and (number % run.show_every == 0 or number == optim.steps):
                console.show(step, loader.waited_s)
            if number % run.summary_every == 0 or number == optim.steps or step.is_bad:
                for sink in sinks:
                    sink.numbers(number, step_numbers(step))
            if sinks and run.picture_every and number % run.picture_every == 0:
                picture = contact_sheet_of(trainer.network, step.batches[0], classes[step.set_name])
                for sink in sinks:
                    sink.picture(number, f"{step.set_name}_{step.task}", picture)
        keep()
        here.wait()
    except Exception:  # a damaged clip, no memory, another process that has ended: what was learned stays
        if trainer.is_whole:
            with suppress(InputError):
                keep()
        raise
    finally:
        for sink in sinks:
            sink.close()
        if here.is_main and 0 < written < optim.steps:
            print(f"stopped at {written} of {optim.steps} steps; start again to go on", file=sys.stderr)
    return step


def skipped(step: Step, amp: str) -> str:
    """Why a step has changed nothing, in a line."""
    why = "a loss or gradient is not finite"
    if amp == "fp16" and math.isfinite(step.loss):
        why = "a gradient overflows in fp16, whose scale is halved"
    of = f": {', '.join(step.suspects)}" if step.suspects else ""
    return f"step {step.number} is skipped: {why} ({step.set_name} {step.task}{of})"


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
