"""The two implementations that replay the recorded cases, behind one interface.

Tensors come and go in the layouts of the recordings, maps coarse to fine. `visible` are the recorded
attention masks [B, Q, T, h, w], one a layer, which every layer uses instead of its own; empty for soft
attention. `flips` are, for each layer, the logits of the bits of its own mask that differ from the recorded
one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import tarvis.model.decoder
from bench.yardstick.features import patch_table, position_2d, position_3d, sample_levels
from bench.yardstick.network import QUERIES_PER_OBJECT, Decoder, Given, Predictions, State, Transcription
from kernels import mask_logits, ms_deform_attn_classic
from kernels.mask_bits import pack_bits, unpack_bits
from tarvis.config import InferenceConfig, ModelConfig
from tarvis.model import TarVis, build_model
from tarvis.model.layers import encode_grid, encode_time
from tarvis.model.neck import from_windows, to_windows
from tarvis.model.published import from_published
from tarvis.stitch.propagation import ObjectPropagation, hide_before_given
from tarvis.structures import Features, Geometry, Prediction, Queries, Reference
from tarvis.tasks.objects import best_of_object, object_queries

ANY = "resnet50"
"""Decoder and object encoder are the same behind every backbone."""

Weights = Callable[[str, int, str], dict[str, Tensor]]


class TranscriptionSubject:
    """The yardstick of the benchmarks."""

    queries_per_object = QUERIES_PER_OBJECT

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.model = functools.cache(self._model)

    def _model(self, variant: str, seed: int, attention: str = "hard") -> Transcription:
        model = Transcription(variant, attention).eval()
        model.load_state_dict(self.weights(variant, seed, attention), assign=True)
        return model

    def positions(self, T: int, h: int, w: int) -> dict[str, Tensor]:
        volume = position_3d(T, h, w).permute(3, 0, 1, 2)  # [C, T, h, w]
        return {
            "neck_2d": position_2d(h, w).permute(2, 0, 1)[None],
            "neck_3d": volume.transpose(0, 1)[None],
            "decoder_3d": volume[None],
            "encoder_2d_unnormalised": position_2d(h, w, normalised=False).permute(2, 0, 1)[None],
            "patch_table": patch_table(h, w),
        }

    def sample(self, value: Tensor, shapes: Any, locations: Tensor, weights: Tensor) -> Tensor:
        return sample_levels(value, shapes, locations, weights)

    def neck(self, variant: str, seed: int, maps: list[Tensor]) -> dict[str, Tensor]:
        neck = self.model(variant, seed).backbone["fpn"]
        layers = neck.transformer.encoder
        with outputs_of({"deform": layers.layers, "temporal": layers.temporal_layers}) as got:
            levels = neck(maps)
        return got | {f"out_{s}x": m.flatten(0, 1) for s, m in zip((32, 16, 8, 4), levels, strict=True)}

    def decoder(
        self,
        seed: int,
        attention: str,
        maps: list[Tensor],
        queries: Tensor,
        embeds: Tensor,
        groups: dict[str, int],
        visible: list[Tensor],
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        with attention_maps(visible) as flips:
            predictions = self.model(ANY, seed, attention).decoder(maps, queries, embeds, groups)
        return stacked(predictions), flips

    def object_encoder(
        self, seed: int, mask_features: Tensor, masks: Tensor, point_maps: list[Tensor], yx: Tensor
    ) -> tuple[Tensor, Tensor]:
        encoder = self.model(ANY, seed).vos_query_extractor
        return encoder(mask_features.transpose(0, 1), masks, point_maps, yx)

    def encode(self, variant: str, seed: int, frames: Tensor) -> tuple[Any, dict[str, Tensor]]:
        model = self.model(variant, seed)
        pyramid = model.extract(frames)
        maps = model.backbone["fpn"](pyramid)
        got = {f"backbone_res{i + 2}": m[0] for i, m in enumerate(pyramid)}
        return (model, maps), got | {f"neck_{s}x": m[0] for s, m in zip((32, 16, 8, 4), maps, strict=True)}

    def detect(
        self, features: Any, dataset: str, panoptic: bool, visible: list[Tensor]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        model, maps = features
        with attention_maps(visible) as flips:
            outputs, predictions = model.instance_clip(maps, dataset, panoptic)
        got = {f"decoder_{name}": value for name, value in stacked(predictions).items()}
        got["out_pred_instance_seg_logits"] = outputs["instances"]
        got["out_pred_semantic_seg_logits"] = outputs["semantic"]
        got["out_pred_instance_class_logits"] = outputs["classes"]
        return got, flips

    def follow(
        self,
        features: Any,
        numbers: list[int],
        size: tuple[int, int],
        given: list[Any],
        state: Any,
        visible: list[Tensor],
        shown: Tensor | None,
    ) -> tuple[dict[str, Any], list[Tensor], Any]:
        model, maps = features
        with attention_maps(visible) as flips, encoder_masks(model.vos_query_extractor, shown):
            outputs, state, lost = model.vos_clip(maps, numbers, size, [Given(*one) for one in given], state)
        got: dict[str, Any] = {
            "out_pred_vos_logits": outputs["objects"],
            "out_pred_background_logits": outputs["background"],
            "object_queries": outputs["object_queries"],
            "bg_queries": outputs["background_queries"],
            "encoder_masks": outputs["encoder_masks"],
            "ids": state.ids,
            "lost": lost,
        }
        return got, flips, state

    def state_with(self, state: Any, logits: Tensor) -> Any:
        return state._replace(logits=logits)


def stacked(predictions: Predictions) -> dict[str, Tensor]:
    return {name: value for name, value in predictions._asdict().items() if value is not None}


@contextmanager
def attention_maps(visible: list[Tensor]) -> Iterator[list[Tensor]]:
    """The transcription's layers see `visible`; the flips of each layer are collected."""
    flips: list[Tensor] = []
    make = Decoder.attention_map

    def attention_map(mask_logits: Tensor, size: Any) -> Tensor:
        weight = make(mask_logits, size)
        if not visible:
            return weight
        recorded = visible[len(flips)].flatten(2)
        flips.append(weight.logit()[(weight >= 0.5) != recorded])
        return recorded.float()

    with mock.patch.object(Decoder, "attention_map", staticmethod(attention_map)):
        yield flips
    assert len(flips) == len(visible)


@contextmanager
def encoder_masks(encoder: nn.Module, shown: Tensor | None) -> Iterator[None]:
    """The object encoder, whose second argument they are, gets the masks `shown` instead of its own."""

    def replace(_encoder: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return None if shown is None else (args[0], shown, *args[2:])

    hook = encoder.register_forward_pre_hook(replace)
    yield
    hook.remove()


@contextmanager
def outputs_of(layers: dict[str, nn.ModuleList]) -> Iterator[dict[str, Tensor]]:
    """Collects what each layer returns, as NAME_index."""
    got: dict[str, Tensor] = {}
    hooks = []
    for name, modules in layers.items():
        for i, layer in enumerate(modules):

            def keep(_layer: nn.Module, _args: Any, out: Tensor, key: str = f"{name}_{i}") -> None:
                got[key] = out

            hooks.append(layer.register_forward_hook(keep))
    yield got
    for hook in hooks:
        hook.remove()


class TarvisSubject:
    """The package."""

    queries_per_object = 8

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.model = functools.cache(self._model)

    def _model(self, variant: Any, seed: int, attention: Any = "hard") -> TarVis:
        config = ModelConfig(backbone=variant, attention=attention)
        model = build_model(config).eval()
        model.load_state_dict(from_published(self.weights(variant, seed, attention), config), assign=True)
        return model

    def positions(self, T: int, h: int, w: int) -> dict[str, Tensor]:
        cpu = torch.device("cpu")
        plane = encode_grid((h, w), 256, cpu).permute(2, 0, 1)  # [C, h, w]
        volume = plane[:, None] + encode_time(T, 256, cpu).t()[..., None, None]  # [C, T, h, w]
        sizes = [(h * scale, w * scale) for scale in (1, 2, 4)]
        tokens = torch.arange(sum(a * b for a, b in sizes)).split([a * b for a, b in sizes])
        levels = [part.view(1, 1, 1, *size) for part, size in zip(tokens, sizes, strict=True)]
        return {
            "neck_2d": plane[None],
            "neck_3d": volume.transpose(0, 1)[None],
            "decoder_3d": volume[None],
            "encoder_2d_unnormalised": encode_grid((h, w), 256, cpu, normalized=False).permute(2, 0, 1)[None],
            "patch_table": to_windows(levels)[0, 0, :, :, 0],
        }

    def sample(self, value: Tensor, shapes: Any, locations: Tensor, weights: Tensor) -> Tensor:
        """The operator with the published signature; `ms_deform_attn` differs in what happens before it."""
        return ms_deform_attn_classic(value, shapes, None, locations, weights, impl="reference")

    def neck(self, variant: str, seed: int, maps: list[Tensor]) -> dict[str, Tensor]:
        neck = self.model(variant, seed).neck
        grid = (maps[3].shape[-2] // 2, maps[3].shape[-1] // 2)
        with outputs_of({"deform": neck.spatial, "temporal": neck.temporal}) as windows:
            features = neck(tuple(maps))
        got = {
            name: torch.cat([m.flatten(3) for m in from_windows(tokens, grid)], 3)
            .flatten(0, 1)
            .transpose(1, 2)
            for name, tokens in windows.items()
        }
        return got | {f"out_{s}x": m.flatten(0, 1) for s, m in by_stride(features).items()}

    def decoder(
        self,
        seed: int,
        attention: str,
        maps: list[Tensor],
        queries: Tensor,
        embeds: Tensor,
        groups: dict[str, int],
        visible: list[Tensor],
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        coarse, middle, fine, mask_features = (m.transpose(1, 2) for m in maps)
        features = Features((coarse, middle, fine), mask_features)
        model = self.model(ANY, seed, attention)
        with attention_bits(visible) as flips:
            prediction = model.decode(features, Queries(queries, embeds, groups), all_layers=True)
        return all_ten(prediction), flips

    def object_encoder(
        self, seed: int, mask_features: Tensor, masks: Tensor, point_maps: list[Tensor], yx: Tensor
    ) -> tuple[Tensor, Tensor]:
        encoder = self.model(ANY, seed).object_encoder
        points = None
        if len(yx):
            coarse, middle, fine, finest = (m[None] for m in point_maps)  # one frame a point
            points = encoder.look_up(Features((coarse, middle, fine), finest), torch.arange(len(yx)), yx)
        background, objects = encoder(mask_features.transpose(0, 1), masks, points)
        return objects, background

    def encode(self, variant: str, seed: int, frames: Tensor) -> tuple[Any, dict[str, Tensor]]:
        model = self.model(variant, seed)
        pyramid = model.extract(frames[None])
        features = model.fuse(pyramid)
        got = {f"backbone_res{i + 2}": m[0] for i, m in enumerate(pyramid)}
        return (model, features), got | {f"neck_{s}x": m[0] for s, m in by_stride(features).items()}

    def detect(
        self, features: Any, dataset: str, panoptic: bool, visible: list[Tensor]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        model, encoded = features
        queries = model.queries.classes(CLASS_SETS[dataset])
        with attention_bits(visible) as flips:
            prediction = model.decode(encoded, queries, all_layers=True)
        semantic = prediction.mask_logits("semantic")[0]
        if not panoptic:
            background = prediction.mask_logits("background")[0].amax(0, keepdim=True)
            semantic = torch.cat([background, semantic])
        got = {f"decoder_{name}": value for name, value in all_ten(prediction).items()}
        got["out_pred_instance_seg_logits"] = prediction.mask_logits("instance")[0]
        got["out_pred_semantic_seg_logits"] = semantic
        got["out_pred_instance_class_logits"] = prediction.class_logits[0]
        return got, flips

    def follow(
        self,
        features: Any,
        numbers: list[int],
        size: tuple[int, int],
        given: list[Any],
        state: State | None,
        visible: list[Tensor],
        shown: Tensor | None,
    ) -> tuple[dict[str, Any], list[Tensor], State]:
        model, encoded = features
        geometry, frames = Geometry(size, size), as_range(numbers)
        propagation = ObjectPropagation(geometry, InferenceConfig())
        if state is not None:
            propagation.add(as_range(state.frames), state.ids, state.logits)
        references = propagation.references(frames, [as_reference(one, size) for one in given])
        with encoder_masks(model.object_encoder, shown):
            queries = object_queries(model, encoded, references, frames, geometry)
        background, objects = queries.content[0].split(list(queries.groups.values()))
        with attention_bits(visible) as flips:
            prediction = model.decode(encoded, queries)
        logits = best_of_object(prediction.mask_logits("vos")[0], references)
        logits = hide_before_given(logits, references.ids, references.first_frame)
        got: dict[str, Any] = {
            "out_pred_vos_logits": logits,
            "out_pred_background_logits": prediction.mask_logits("background_vos")[0],
            "object_queries": objects,
            "bg_queries": background,
            "encoder_masks": references.masks,
            "ids": list(references.ids),
            "lost": list(references.lost),
        }
        return got, flips, State(logits, list(references.ids), numbers)

    def state_with(self, state: State, logits: Tensor) -> State:
        return state._replace(logits=logits)


CLASS_SETS = {
    "CITYSCAPES_VPS": "cityscapes_vps",
    "KITTI_STEP": "kitti_step",
    "OVIS": "ovis",
    "VIPSEG": "vipseg",
    "YOUTUBE_VIS": "youtube_vis_2021",
}


def by_stride(features: Features) -> dict[int, Tensor]:
    return dict(zip((32, 16, 8, 4), (*features.memory, features.mask_features), strict=True))


def all_ten(prediction: Prediction) -> dict[str, Tensor]:
    """The predictions of all layers, stacked as the original stacks them."""
    predictions = (*prediction.layers, prediction)
    got = {
        "queries": torch.stack([p.queries for p in predictions]),
        "mask_logits": torch.stack([mask_logits(p.mask_embedding, p.mask_features) for p in predictions]),
    }
    if prediction.class_logits is not None:
        got["class_logits"] = torch.stack([p.class_logits for p in predictions])
    return got


def as_reference(
    given: tuple[int, int, Tensor | None, list[float] | None], size: tuple[int, int]
) -> Reference:
    """A recorded object: its point is (y, x) in 0..1 of the image, ours (x, y) of a pixel."""
    number, frame, mask, point = given
    if point is not None:
        return Reference(number, frame, point=(point[1] * size[1] - 0.5, point[0] * size[0] - 0.5))
    return Reference(number, frame, mask=mask)


def as_range(numbers: list[int]) -> range:
    frames = range(numbers[0], numbers[-1] + 1)
    assert list(frames) == numbers, "clips are runs of frames"
    return frames


@contextmanager
def attention_bits(visible: list[Tensor]) -> Iterator[list[Tensor]]:
    """The package's layers see `visible`; the flips of each layer are collected."""
    flips: list[Tensor] = []
    make = tarvis.model.decoder.mask_bits

    def mask_bits(query: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        own = unpack_bits(make(query, features)[0], features.shape[-1])
        recorded = visible[len(flips)].flatten(2)
        flips.append((query @ features)[own != recorded])
        return pack_bits(recorded), recorded.any(-1)

    with mock.patch.object(tarvis.model.decoder, "mask_bits", mask_bits):
        yield flips
    assert len(flips) == len(visible)
