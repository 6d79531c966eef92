"""AdamW with the published parameter groups, and a learning rate that follows from the step alone."""

from __future__ import annotations

import torch
from torch import nn

from tarvis.training.config import OptimConfig

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
EMBEDDINGS = (
    "queries.",
    "neck.level_embed",
    "decoder.scale_embed",
    "object_encoder.background_embed",
    "object_encoder.mask_embed",
    "object_encoder.point_embed",
)
"""Prefixes of the names of learned vectors."""


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all parameters: the image backbone at a lower rate, norms and embeddings without decay.

    Everything else is decayed, biases included, as published. The original also decayed ConvNeXt's
    norms, whose class it did not know as one.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = config.backbone_lr if name.startswith("backbone.") else 1.0
            decay = config.weight_decay if is_decayed(model, name) else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "rate": rate, "weight_decay": decay, "lr": config.lr * rate}
            for (rate, decay), parameters in groups.items()
        ],
        lr=config.lr,
    )


def is_decayed(model: nn.Module, name: str) -> bool:
    """Whether weight decay applies to a parameter."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return not isinstance(owner, (*NORMS, nn.Embedding)) and not name.startswith(EMBEDDINGS)


def rate_at(step: int, config: OptimConfig) -> float:
    """The learning rate of optimiser step `step`, from 0."""
    rate = config.lr
    if step <= config.warmup_steps and config.warmup_steps:
        rate *= step / config.warmup_steps
    for at, factor in zip(config.decay_steps, config.decay_rates, strict=True):
        if step >= at:
            rate *= factor
    return rate


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate"]
