"""The training loop: one process or many, which can stop after any step and resume as if it had not.

A step depends on the state of the weights and optimiser and on its number, from which everything random
follows: clips, points, stochastic depth. A micro-batch has the same numbers on whatever process it runs.
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tarvis.cli import AMP
from tarvis.config import ModelConfig, build
from tarvis.data.batch import Batch
from tarvis.distributed import World
from tarvis.model import TarVis
from tarvis.model.layers import recompute_activations
from tarvis.structures import InputError
from tarvis.tasks import TASKS
from tarvis.tasks.losses import uniform_points
from tarvis.tasks.task import Objective
from tarvis.training.checkpoint import plain
from tarvis.training.config import Config, differing
from tarvis.training.optim import build_optimizer, rate_at, set_rate


class LossNetwork(nn.Module):
    """The network and its loss in one module, as DistributedDataParallel wants it."""

    def __init__(self, network: TarVis, config: Config) -> None:
        super().__init__()
        self.network = network
        self._loss = config.loss

    def forward(
        self, batch: Batch, num_targets: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor], bool]:
        objective = Objective(self._loss, uniform_points(batch.frames.device, generator), num_targets)
        features = self.network.encode(batch.frames)
        loss = TASKS[batch.task].loss(self.network, features, batch, objective)
        # detached: DistributedDataParallel takes every output for something to go backward from
        return loss.total, {name: value.detach() for name, value in loss.terms.items()}, loss.is_matched


@dataclass
class Step:
    """Report of one optimiser step.

    Args:
        number: of steps done, this one included.
        loss: the mean over all processes, as are `terms` [outputs].
        is_bad: the step was skipped, because a loss or gradient is not finite.
        suspects: clips of this process whose loss is not finite; none where only a gradient is not.
        compiles: graphs that this process has compiled so far.
    """

    number: int
    set_name: str
    task: str
    loss: float
    terms: dict[str, Tensor] = field(default_factory=dict)
    gradient: float = math.nan
    rate: float = 0.0
    is_bad: bool = False
    suspects: tuple[str, ...] = ()
    seconds: float = 0.0
    compiles: int = 0
    batches: list[Batch] = field(default_factory=list)


class Trainer:
    """Runs the steps of training, one after the other.

    Args:
        network: on its device; this process's copy.
        should_stop: called by each process after each step; all stop if it is true on any.
    """

    def __init__(
        self,
        network: TarVis,
        config: Config,
        world: World | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.network = network.train()
        self.config = config
        self.step = 0
        """Number of steps that are done."""
        self.is_whole = True
        """Whether the weights are those after `step` steps; False if an update failed half-way."""
        self._world = world or World()
        self._should_stop = should_stop
        self._device = network.pixel_mean.device
        if config.optim.backbone_lr == 0:  # no gradients are computed that would change nothing
            network.backbone.requires_grad_(False)
        self._optimizer = build_optimizer(network, config.optim)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=config.optim.amp == "fp16")
        self._average = None
        if config.run.ema:
            self._average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.run.ema))
        if config.run.checkpoint_activations:
            recompute_activations(network)
        self._compilers = compile_parts(network) if config.run.compile else []
        self._loss: nn.Module = LossNetwork(network, config)
        if self._world.size > 1:
            ids = [self._device.index] if self._device.type == "cuda" else None
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                # what torch 2.13 wants in place of broadcast_buffers is unknown to 2.11
                self._loss = DistributedDataParallel(
                    self._loss, device_ids=ids, find_unused_parameters=True, broadcast_buffers=False
                )
        self._bad_in_a_row = 0

    def run(self, steps: Iterator[list[Batch]]) -> Iterator[Step]:
        """Train on `steps`, the micro-batches of this process; ends early if a process must stop.

        Raises:
            InputError: too many steps in a row had to be skipped.
        """
        for batches in steps:
            with self._own_random_numbers(), compiling() if self._compilers else nullcontext():
                done, must_stop = self._train(batches)
            yield done
            if must_stop:
                return

    def state(self) -> dict[str, Any]:
        """The content of a checkpoint."""
        content: dict[str, Any] = {
            "model": self.network.state_dict(),
            "config": plain(self.config),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "step": self.step,
        }
        if self._average is not None:
            content["ema"] = self._average.state_dict()
        return content

    def restore(self, content: dict[str, Any]) -> None:
        """Continue from a checkpoint; rates and decays are those of the configuration.

        Raises:
            InputError: it is of another network, or of other groups of parameters.
        """
        optimizer = self._optimizer.state_dict()
        groups, saved = ([g["params"] for g in o["param_groups"]] for o in (optimizer, content["optimizer"]))
        try:
            self.network.load_state_dict(content["model"])
            if self._average is not None and "ema" in content:
                self._average.load_state_dict(content["ema"])
        except RuntimeError as error:
            model = build(ModelConfig, content["config"]["model"], "model")
            raise InputError(
                f"the checkpoint of step {content['step']} is of another network "
                f"({differing(model, self.config.model) or error}). A run keeps its network and classes; "
                "for others give a new --model_dir, and the folder of this run as --finetune_from"
            ) from None
        if groups != saved:
            raise InputError(
                f"the checkpoint of step {content['step']} has other groups of parameters; "
                "optim.backbone_lr and optim.weight_decay cannot become 1 or 0 on the way, or cease to be"
            )
        state = content["optimizer"]["state"]
        if not _fits(state, [x for g in self._optimizer.param_groups for x in g["params"]]):
            raise InputError(f"the checkpoint of step {content['step']} holds another optimiser's state")
        self._optimizer.load_state_dict(optimizer | {"state": state})
        if self._scaler.is_enabled() and content.get("scaler"):
            self._scaler.load_state_dict(content["scaler"])
        self.step = content["step"]

    def averaged(self) -> dict[str, Tensor] | None:
        """The moving average of the weights; None without `run.ema`."""
        return None if self._average is None else self._average.module.state_dict()

    def _train(self, batches: list[Batch]) -> tuple[Step, bool]:
        began = time.perf_counter()
        optim, step, world = self.config.optim, self.step, self._world
        rate = rate_at(step, optim)
        set_rate(self._optimizer, rate)
        self._optimizer.zero_grad(set_to_none=True)
        num_targets = self._mean_targets(batches)
        losses, terms, fine = [], [], []
        for k, batch in enumerate(batches):
            batch = batch.to(self._device)
            # what is drawn depends on the micro-batch, not on the process it runs on
            generator = self._seed(step, world.rank + k * world.size)
            last = k == len(batches) - 1
            with self._unsynchronised() if not last else nullcontext():
                with self._autocast():
                    loss, found, is_matched = self._loss(batch, num_targets, generator)
                fine.append(loss.detach().isfinite() & is_matched)
                self._scaler.scale(loss / len(batches)).backward()
            losses.append(loss.detach())
            terms.append(found)
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), optim.clip_norm or math.inf)
        is_fine = torch.stack(fine).all() & norm.isfinite()
        means = {name: torch.stack([each[name] for each in terms]).mean(0) for name in terms[0]}
        bad, must_stop, mean, means = self._agree(is_fine, torch.stack(losses).mean(), means)
        suspects = [batch for batch, ok in zip(batches, fine, strict=True) if bad and not ok]
        self.is_whole = False
        if bad:
            self._bad_in_a_row += 1
        else:
            self._bad_in_a_row = 0
            self._scaler.step(self._optimizer)
            if self._average is not None:
                self._average.update_parameters(self.network)
        self._scaler.update()
        self.step += 1
        self.is_whole = True
        done = Step(
            number=self.step,
            set_name=batches[0].set_name,
            task=batches[0].task,
            loss=mean,
            terms=means,
            gradient=float(norm),
            rate=rate,
            is_bad=bad,
            suspects=tuple(name for batch in suspects for name in batch.names),
            seconds=time.perf_counter() - began,
            compiles=sum(each.count for each in self._compilers),
            batches=batches,
        )
        if self._bad_in_a_row >= optim.max_bad_steps:
            names, first = ", ".join(done.suspects or batches[0].names), self.step - self._bad_in_a_row + 1
            raise InputError(
                f"steps {first} to {self.step} all had a loss or gradient that is not finite, the last on "
                f"{batches[0].set_name} ({names}): lower optim.lr, or use optim.amp=bf16 or off"
            )
        return done, must_stop

    def _mean_targets(self, batches: list[Batch]) -> Tensor:
        """Number of targets of a micro-batch, averaged over all micro-batches of the step."""
        total = torch.tensor([sum(batch.num_targets for batch in batches), len(batches)], dtype=torch.float64)
        if self._world.size > 1:
            dist.all_reduce(total)
        return (total[0] / total[1]).float().to(self._device)

    def _agree(
        self, is_fine: Tensor, loss: Tensor, terms: dict[str, Tensor]
    ) -> tuple[bool, bool, float, dict[str, Tensor]]:
        """Whether a process has a bad value, whether one must stop; mean loss and terms of all processes."""
        values = torch.cat([(~is_fine)[None], torch.zeros_like(loss[None]), loss[None], *terms.values()])
        values = values.cpu().double()
        values[1] = self._should_stop()
        if self._world.size > 1:
            dist.all_reduce(values)  # a task has the same terms on every process
        means = values[2:] / self._world.size
        found = means[1:].split([len(term) for term in terms.values()])
        is_bad, must_stop = (values[:2] > 0).tolist()
        return is_bad, must_stop, means[0].item(), dict(zip(terms, found, strict=True))

    def _own_random_numbers(self) -> AbstractContextManager[None]:
        """Keep the seeding of global random numbers inside the block."""
        return torch.random.fork_rng([self._device] if self._device.type == "cuda" else [])

    def _seed(self, step: int, part: int) -> torch.Generator:
        """Seed the global random numbers, for stochastic depth; a generator for points."""
        digest = hashlib.sha256(f"{self.config.run.seed} {step} {part}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.Generator(self._device).manual_seed(int.from_bytes(digest[7:14], "big"))

    def _unsynchronised(self) -> AbstractContextManager[None]:
        if isinstance(self._loss, DistributedDataParallel):
            return self._loss.no_sync()
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = AMP[self.config.optim.amp]
        return nullcontext() if dtype is None else torch.autocast(self._device.type, dtype=dtype)


COMPILED = ("extract", "fuse", "decode")
MOST_GRAPHS = 64
"""Most graphs of a part: one for every shape of clips and, in `decode`, every number of queries."""


class Compiler:
    """torch.compile's backend, counting the graphs of a part of the network."""

    def __init__(self, part: str, backend: str) -> None:
        self.count = 0
        self._part = part
        self._compile = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        if self.count == MOST_GRAPHS:
            warnings.warn(
                f"{self._part} has been compiled {MOST_GRAPHS} times; what comes in yet another shape runs "
                "uncompiled. A larger data.pad_to makes fewer shapes.",
                stacklevel=2,
            )
        return self._compile(graph, inputs)


@contextmanager
def compiling() -> Iterator[None]:
    """The compiler's settings for calls of compiled parts and their backward passes."""
    with (
        torch._dynamo.config.patch(
            recompile_limit=MOST_GRAPHS,
            # gradients of a part come all at once; sending some of them earlier would break its graph
            optimize_ddp=False,
        ),
        torch._inductor.config.patch(fallback_random=True),  # stochastic depth draws what it draws uncompiled
    ):
        yield


def compile_parts(network: TarVis, backend: str = "inductor") -> list[Compiler]:
    """Compile the parts of the network for each shape they meet; steps run within `compiling()`."""
    compilers = [Compiler(part, backend) for part in COMPILED]
    for part, compiler in zip(COMPILED, compilers, strict=True):
        setattr(network, part, torch.compile(getattr(network, part), dynamic=False, backend=compiler))
    return compilers


def _fits(state: Mapping[Any, Mapping[str, Any]], parameters: Sequence[Tensor]) -> bool:
    """Whether the state of an optimiser, by number of the parameter, is of these parameters."""
    return all(
        isinstance(i, int) and 0 <= i < len(parameters) and x.shape in ((), parameters[i].shape)
        for i, values in state.items()
        for x in values.values()
        if isinstance(x, Tensor)
    )
