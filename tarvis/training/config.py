"""Schema and defaults of a training run: a YAML file holds what differs, `--set key=value` one-offs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from tarvis.config import ConfigError, LossConfig, ModelConfig, check, load
from tarvis.data.settings import DataSettings


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule. Steps are those of the optimiser.

    Args:
        lr: of everything but the image backbone, whose rate is `backbone_lr` times that; 0 freezes it.
        warmup_steps: the rate rises linearly from 0 over these.
        decay_steps, decay_rates: at each of these steps the rate is multiplied by its factor.
        clip_norm: largest norm of the whole gradient; 0 leaves it as it is.
        batch_size: clips of a step, over all processes.
        micro_batch: clips that a process trains on at once; gradients are accumulated.
        amp: "fp16" scales the loss.
        max_bad_steps: steps in a row that may be skipped, because a loss or gradient is not finite.
    """

    lr: float = 1e-4
    backbone_lr: float = 0.1
    weight_decay: float = 0.05
    warmup_steps: int = 0
    decay_steps: tuple[int, ...] = ()
    decay_rates: tuple[float, ...] = ()
    clip_norm: float = 0.01
    steps: int = 90_000
    batch_size: int = 32
    micro_batch: int = 1
    amp: Literal["off", "bf16", "fp16"] = "off"
    max_bad_steps: int = 20

    def __post_init__(self) -> None:
        check(self, "optim", least=0)
        if len(self.decay_steps) != len(self.decay_rates) or sorted(self.decay_steps) != [*self.decay_steps]:
            raise ConfigError("optim: expected rising decay_steps and a rate in decay_rates for each")
        for name in ("steps", "batch_size", "micro_batch", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"optim.{name}: expected a number from 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class RunConfig:
    """What does not change the result, but for `seed`.

    Args:
        checkpoint_every: steps; one is written at the end, too.
        ema: decay of an exponential moving average of the weights; 0 keeps none.
        compile: compile `extract`, `fuse` and `decode`.
        checkpoint_activations: recompute layers in the backward pass instead of keeping what they computed.
        show_every: steps between lines on the console, `summary_every` between entries of the logs.
        picture_every: steps between contact sheets of what the network sees; 0 makes none.
    """

    seed: int = 42
    checkpoint_every: int = 10_000
    ema: float = 0.0
    compile: bool = False
    checkpoint_activations: bool = False
    show_every: int = 5
    summary_every: int = 20
    picture_every: int = 1000

    def __post_init__(self) -> None:
        check(self, "run", least=0)
        for name in ("checkpoint_every", "show_every", "summary_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"run.{name}: expected a number from 1, got {getattr(self, name)}")
        if self.ema >= 1:
            raise ConfigError(f"run.ema: expected a number below 1, got {self.ema}")


@dataclass(frozen=True)
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataSettings = field(default_factory=DataSettings)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


def load_config(
    path: Path | None = None,
    overrides: Sequence[str] = (),
    base: Mapping[str, dict[str, Any]] | None = None,
) -> Config:
    """Defaults, then groups of `base`, the YAML file, `key.path=value` overrides.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, unknown choice; the message names the key.
    """
    config = load(Config, path, overrides, base)
    assert isinstance(config, Config)
    return config


def differing(there: ModelConfig, here: ModelConfig, *ignored: str) -> str:
    """In which settings two networks differ, but for names of classes: "model.hidden_dim is 64, here 128"."""
    names = [each.name for each in fields(ModelConfig) if each.name not in ("own_classes", *ignored)]
    values = [(name, getattr(there, name), getattr(here, name)) for name in names]
    return "; ".join(f"model.{name} is {one}, here {other}" for name, one, other in values if one != other)
