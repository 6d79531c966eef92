"""Published TarViS checkpoints: their names, constants and configuration, translated to ours and back."""

from __future__ import annotations

import re
from typing import Any

import torch

from tarvis.config import ModelConfig
from tarvis.model.backbone import BACKBONES, backbone_without_memory
from tarvis.model.decoder import soft_factors
from tarvis.model.weight_files import State, WeightsError

_ENCODER = "backbone.fpn.transformer.encoder"

NAMES: tuple[tuple[str, str], ...] = (
    # (published, ours): whole leading parts of a name, * stands for one part; the first match counts,
    # in either direction, and the rest of the name stays
    ("pixel_mean", "pixel_mean"),
    ("pixel_std", "pixel_std"),
    ("backbone.backbone", "backbone"),
    (f"{_ENCODER}.layers.*.self_attn.sampling_offsets", "neck.spatial.*.sampling_offsets"),
    (f"{_ENCODER}.layers.*.self_attn.attention_weights", "neck.spatial.*.attention_weights"),
    (f"{_ENCODER}.layers.*.self_attn.value_proj", "neck.spatial.*.value_proj"),
    (f"{_ENCODER}.layers.*.self_attn.output_proj", "neck.spatial.*.output_proj"),
    (f"{_ENCODER}.layers", "neck.spatial"),
    (f"{_ENCODER}.temporal_layers.*.self_attn", "neck.temporal.*.attention"),
    (f"{_ENCODER}.temporal_layers", "neck.temporal"),
    ("backbone.fpn.transformer.level_embed", "neck.level_embed"),
    ("backbone.fpn.transformer.level_embed_3d", "neck.level_embed_3d"),
    ("backbone.fpn.input_proj", "neck.input_proj"),
    ("backbone.fpn.adapter_1", "neck.adapter_1"),
    ("backbone.fpn.layer_1", "neck.layer_1"),
    ("backbone.fpn.mask_features", "neck.mask_features"),
    ("embedding_container._semantic_queries", "queries.semantic"),
    ("embedding_container._background_queries", "queries.background"),
    ("embedding_container._background_vos_queries", "queries.background_vos"),
    ("embedding_container._instance_queries", "queries.instance"),
    ("embedding_container._vos_queries", "queries.vos"),
    ("decoder.transformer_cross_attention_layers.*.multihead_attn._attn", "decoder.layers.*.cross_attention"),
    ("decoder.transformer_cross_attention_layers.*.norm", "decoder.layers.*.cross_norm"),
    ("decoder.transformer_self_attention_layers.*.self_attn", "decoder.layers.*.self_attention"),
    ("decoder.transformer_self_attention_layers.*.norm", "decoder.layers.*.self_norm"),
    ("decoder.transformer_ffn_layers.*.norm", "decoder.layers.*.ffn_norm"),
    ("decoder.transformer_ffn_layers", "decoder.layers"),
    ("decoder.decoder_norm", "decoder.norm"),
    ("decoder.scale_embed.weight", "decoder.scale_embed"),
    ("decoder.mask_embeds", "decoder.mask_embeds"),
    ("decoder.proj_layers", "decoder.proj_layers"),
    ("vos_query_extractor.self_attn_layers.*.attn", "object_encoder.layers.*.self_attention"),
    ("vos_query_extractor.self_attn_layers.*.norm", "object_encoder.layers.*.self_norm"),
    ("vos_query_extractor.cross_attn_layers.*.attn", "object_encoder.layers.*.cross_attention"),
    ("vos_query_extractor.cross_attn_layers.*.norm", "object_encoder.layers.*.cross_norm"),
    ("vos_query_extractor.ffn_layers.*.mlp.0", "object_encoder.layers.*.linear1"),
    ("vos_query_extractor.ffn_layers.*.mlp.2", "object_encoder.layers.*.linear2"),
    ("vos_query_extractor.ffn_layers.*.norm", "object_encoder.layers.*.ffn_norm"),
    ("vos_query_extractor.mask_object_query_embed", "object_encoder.mask_embed"),
    ("vos_query_extractor.bg_query_embed", "object_encoder.background_embed"),
    ("vos_query_extractor.point_object_query_embed", "object_encoder.point_embed"),
    ("vos_query_extractor.proj_point_features", "object_encoder.point_proj"),
    ("vos_query_extractor.point_vos_query_extractor.layers.0", "object_encoder.point_mlp.layers.0"),
    ("vos_query_extractor.point_vos_query_extractor.layers.2", "object_encoder.point_mlp.layers.1"),
    ("vos_query_extractor.point_vos_query_extractor.layers.4", "object_encoder.point_mlp.layers.2"),
)

CLASS_SETS = {"YOUTUBE_VIS": "youtube_vis_2021"}
"""Published dataset names that are not ours in upper case."""


def is_published(state: State) -> bool:
    """Whether `state` is in published names."""
    return any(name.startswith(("backbone.backbone.", "embedding_container.")) for name in state)


def from_published(state: State, config: ModelConfig) -> State:
    """Published names -> ours; values that are constants in our model are checked and left out.

    Raises:
        WeightsError: a name that no published model has, or a constant that is missing or another.
    """
    state = dict(state)
    for name, expected in _constants(config).items():
        if name not in state:
            raise WeightsError(f"missing key {name} {list(expected.shape)}")
        if not torch.equal(state.pop(name).to(expected), expected):
            raise WeightsError(f"{name} is not {expected.tolist()}, as the configuration says")
    scale = backbone_without_memory(config.backbone).published_scale
    renamed = {name: _translate(name, _TO_OURS) for name in state}
    unknown = [name for name, ours in renamed.items() if ours is None]
    if unknown:
        raise WeightsError(f"no key of a published model: {', '.join(unknown)}")
    return _rescale({str(renamed[name]): value for name, value in state.items()}, scale)


def to_published(state: State, config: ModelConfig) -> State:
    """Our names -> published ones, with the constants that those models keep in their state.

    Raises:
        WeightsError: a name that our model does not have.
    """
    renamed = {name: _translate(name, _TO_PUBLISHED) for name in state}
    unknown = [name for name, published in renamed.items() if published is None]
    if unknown:
        raise WeightsError(f"no published name for {unknown[0]}")
    state = _rescale(state, 1 / backbone_without_memory(config.backbone).published_scale)
    return {str(renamed[name]): value for name, value in state.items()} | _constants(config)


def config_from_published(tree: dict[str, Any]) -> ModelConfig:
    """The published configuration (upper-case keys, as nested dictionaries) as far as it shapes the network.

    Raises:
        WeightsError: a key that is missing, or a choice that our network does not have.
    """
    backbone = str(_get(tree, "MODEL", "BACKBONE"))
    names = {name.replace("_", ""): name for name in BACKBONES}
    if backbone.replace("_", "").lower() not in names:
        raise WeightsError(f"MODEL.BACKBONE: no backbone {backbone}")
    attention = str(_get(tree, "MODEL", "CROSS_ATTENTION_TYPE"))
    if attention not in ("hard_masked", "soft_masked"):
        raise WeightsError(
            f"MODEL.CROSS_ATTENTION_TYPE: expected hard_masked or soft_masked, got {attention}"
        )
    datasets = _get(tree, "TRAINING", "DATASET_LIST")
    if not isinstance(datasets, list) or not all(isinstance(name, str) for name in datasets):
        raise WeightsError(f"TRAINING.DATASET_LIST: expected names of datasets, got {datasets!r}")
    if _get(tree, "MODEL", "NUM_BACKGROUND_QUERIES") != 1:
        raise WeightsError("MODEL.NUM_BACKGROUND_QUERIES: only 1 is supported")
    class_sets = {}
    for name in sorted(datasets):  # the order of the rows of the semantic queries
        if _get(tree, "DATASETS", name, "TYPE") in ("instance_seg", "panoptic_seg"):
            class_sets[CLASS_SETS.get(name, name.lower())] = _count(tree, "DATASETS", name, "NUM_CLASSES")
    return ModelConfig(
        backbone=names[backbone.replace("_", "").lower()],
        attention="hard" if attention == "hard_masked" else "soft",
        num_instance_queries=_count(tree, "MODEL", "NUM_OBJECT_QUERIES"),
        num_queries_per_object=_count(tree, "MODEL", "NUM_VOS_QUERIES_PER_OBJECT"),
        class_sets=class_sets,
    )


def _get(tree: dict[str, Any], *keys: str) -> Any:
    node: Any = tree
    for key in keys:
        if not isinstance(node, dict) or key not in node:
            raise WeightsError(f"missing key {'.'.join(keys)}")
        node = node[key]
    return node


def _count(tree: dict[str, Any], *keys: str) -> int:
    value = _get(tree, *keys)
    if not isinstance(value, int) or value < 1:
        raise WeightsError(f"{'.'.join(keys)}: expected a number from 1, got {value!r}")
    return value


def _constants(config: ModelConfig) -> State:
    """Constants that published models keep in their state and ours in its code, by published name."""
    constants: State = {"vos_query_extractor.bg_grid_size": torch.tensor(config.background_grid)}
    if config.attention == "soft":
        factors = soft_factors(config.num_heads)
        for i in range(config.decoder_layers):
            name = f"decoder.transformer_cross_attention_layers.{i}.multihead_attn.scaling_factors"
            constants[name] = factors.clone()
    return constants


def _rescale(state: State, factor: float) -> State:
    """Weights with the statistics that frames are normalised by times `factor`."""
    return state | {name: state[name] * factor for name in ("pixel_mean", "pixel_std") if name in state}


Rule = tuple[re.Pattern[str], str]


def _rule(source: str, target: str) -> Rule:
    pattern = re.escape(source).replace(r"\*", "([^.]+)")
    return re.compile(rf"{pattern}(?=\.|$)"), target.replace("*", r"\1")


_TO_OURS = tuple(_rule(published, ours) for published, ours in NAMES)
_TO_PUBLISHED = tuple(_rule(ours, published) for published, ours in NAMES)


def _translate(name: str, rules: tuple[Rule, ...]) -> str | None:
    for pattern, target in rules:
        match = pattern.match(name)
        if match:
            return match.expand(target) + name[match.end() :]
    return None
