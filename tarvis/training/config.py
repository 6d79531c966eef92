"""Schema and defaults of a training run: a YAML file holds the settings that differ, `--set` one-offs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from tarvis.config import ConfigError, LossConfig, ModelConfig, bounded, check, load
from tarvis.data.settings import DataSettings
from tarvis.model.backbone import require_backbone


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
    steps: int = bounded(90_000, least=1)
    batch_size: int = bounded(32, least=1)
    micro_batch: int = bounded(1, least=1)
    amp: Literal["off", "bf16", "fp16"] = "off"
    max_bad_steps: int = bounded(20, least=1)

    def __post_init__(self) -> None:
        check(self, "optim", least=0)
        if len(self.decay_steps) != len(self.decay_rates) or sorted(self.decay_steps) != [*self.decay_steps]:
            raise ConfigError("optim: expected rising decay_steps and a rate in decay_rates for each")


@dataclass(frozen=True)
class RunConfig:
    """Settings that do not affect the result (except `seed`).

    Args:
        checkpoint_every: steps; one is written at the end, too.
        ema: decay of an exponential moving average of the weights; 0 keeps none.
        compile: compile `extract`, `fuse` and `decode`.
        checkpoint_activations: recompute layers in the backward pass instead of keeping what they computed.
        show_every: steps between lines on the console, `summary_every` between entries of the logs.
        picture_every: steps between contact sheets of what the network sees; 0 makes none.
    """

    seed: int = 42
    checkpoint_every: int = bounded(10_000, least=1)
    ema: float = bounded(0.0, least=0, below=1)
    compile: bool = False
    checkpoint_activations: bool = False
    show_every: int = bounded(5, least=1)
    summary_every: int = bounded(20, least=1)
    picture_every: int = 1000

    def __post_init__(self) -> None:
        check(self, "run", least=0)


@dataclass(frozen=True)
class Config:
    """The settings of one run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataSettings = field(default_factory=DataSettings)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        require_backbone(self.model.backbone)


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
    """The settings in which two networks differ, "model.hidden_dim is 64, here 128"; not names of classes."""
    names = [each.name for each in fields(ModelConfig) if each.name not in ("own_classes", *ignored)]
    values = [(name, getattr(there, name), getattr(here, name)) for name in names]
    return "; ".join(f"model.{name} is {one}, here {other}" for name, one, other in values if one != other)
