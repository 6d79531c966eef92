"""TarViS as one would write it from the paper with stock PyTorch: the yardstick of the benchmarks.

It shares no code with `tarvis`, does nothing slowly on purpose, and passes the same parity tests. It keeps
the habits of the original model that `tarvis` is free of: every decoder layer predicts masks at a quarter of
the resolution, all ten predictions are kept and stacked, and attention masks are those masks resized and
repeated per head; attention weights are materialised; the neck's windows are gathered and scattered by
index; position embeddings are built for every frame and added in every layer; the object encoder reads a
feature per mask pixel and pads all queries to the longest list.

Parameter names are those of published checkpoints, which therefore load strictly. Letters in shapes are
those of `tarvis.structures`; N also counts frames of a batch (B * T).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.yardstick.features import DIM, HEADS, TemporalNeck, build_backbone, position_2d, position_3d

CLASS_SETS = {"CITYSCAPES_VPS": 19, "KITTI_STEP": 19, "OVIS": 25, "VIPSEG": 124, "YOUTUBE_VIS": 40}
NUM_INSTANCES = 128
QUERIES_PER_OBJECT = 8
GRID = 4
"""Background cells a side."""
MAX_SAMPLES = 16384
"""Pixels of a mask that a query of the object encoder may see; more are subsampled at random."""


class Given(NamedTuple):
    """An object given by a mask (bool [H, W]) or a point ((y, x) in 0..1 of the image) at a video frame."""

    id: int
    frame: int
    mask: Tensor | None = None
    point: tuple[float, float] | None = None


class State(NamedTuple):
    """What the next VOS clip needs of this one: object logits [N, T, H/4, W/4], their ids, its frames."""

    logits: Tensor
    ids: list[int]
    frames: list[int]


class Predictions(NamedTuple):
    """Stacked over the initial queries and the nine layers."""

    queries: Tensor  # [10, B, Q, C], before the final norm
    mask_logits: Tensor  # [10, B, Q, T, H/4, W/4]
    class_logits: Tensor | None  # [10, B, instances, 1 + K], background first


class ObjectQueries(NamedTuple):
    """What the object encoder makes."""

    objects: Tensor  # [8 * mask objects + point objects, C]
    background: Tensor  # [16, C]


class Transcription(nn.Module):
    """The network for one clip at a time. `attention` is "hard" (published) or "soft"."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, variant: str, attention: str = "hard") -> None:
        super().__init__()
        backbone, channels = build_backbone(variant)
        self.register_buffer("pixel_mean", torch.tensor([123.675, 116.28, 103.53]))
        self.register_buffer("pixel_std", torch.tensor([58.395, 57.12, 57.375]))
        self.backbone = nn.ModuleDict({"backbone": backbone, "fpn": TemporalNeck(channels)})
        self.embedding_container = QueryTables()
        self.decoder = Decoder(attention)
        self.vos_query_extractor = ObjectEncoder()

    def extract(self, frames: Tensor) -> list[Tensor]:
        """frames [T, 3, H, W], RGB 0..255, any size -> backbone maps [1, T, C, h, w] at strides 4 .. 32."""
        H, W = frames.shape[-2:]
        x = F.pad(frames.float(), (0, -W % 64, 0, -H % 64), value=128.0)
        x = (x - self.pixel_mean[:, None, None]) / self.pixel_std[:, None, None]
        return [m.unsqueeze(0) for m in self.backbone["backbone"](x)]

    def encode(self, frames: Tensor) -> list[Tensor]:
        """frames [T, 3, H, W] -> maps [1, T, 256, h, w] at strides 32, 16, 8 and 4 (mask features)."""
        return self.backbone["fpn"](self.extract(frames))

    def decode(
        self, maps: list[Tensor], contents: Tensor, embeds: Tensor, groups: dict[str, int]
    ) -> Predictions:
        """All ten predictions of queries whose contents and position embeddings are [1, Q, C]."""
        return self.decoder([m.transpose(1, 2) for m in maps], contents, embeds, groups)

    def instance_clip(
        self, maps: list[Tensor], class_set: str, panoptic: bool
    ) -> tuple[dict[str, Tensor], Predictions]:
        """Instance or panoptic segmentation of an encoded clip: last outputs, and all predictions.

        Outputs: instance mask logits [128, T, H/4, W/4], class logits [128, 1 + K], semantic logits
        [1 + K, T, H/4, W/4] with the background first (panoptic: [K, ...] without it).
        """
        contents, embeds, groups = self.embedding_container.detection(class_set)
        predictions = self.decode(maps, contents[None], embeds[None], groups)
        instance, background, semantic = predictions.mask_logits[-1, 0].split(list(groups.values()))
        if not panoptic:
            semantic = torch.cat([background.amax(0, keepdim=True), semantic])
        assert predictions.class_logits is not None
        outputs = {"instances": instance, "classes": predictions.class_logits[-1, 0], "semantic": semantic}
        return outputs, predictions

    def vos_clip(
        self,
        maps: list[Tensor],
        frames: list[int],
        size: tuple[int, int],
        given: Sequence[Given],
        state: State | None = None,
    ) -> tuple[dict[str, Tensor], State | None, list[int]]:
        """Object segmentation (VOS, PET) of an encoded clip.

        `frames` are the clip's frame numbers in the video, `size` the un-padded image size, `given` the
        objects whose mask or point falls into the clip, `state` what the clip before returned.
        Returns outputs (objects [N, T, H/4, W/4], background [16, ...], the queries of the object encoder
        and the masks it saw), the new state, and the ids that were lost. Without objects the outputs are
        empty and the state is None.
        """
        h, w = maps[-1].shape[-2:]
        padded = (4 * h, 4 * w)
        masks, lost = self._reference_masks(frames, padded, given, state)
        points = [g for g in given if g.point is not None and g.id not in masks]
        ids = [*masks, *(p.id for p in points)]
        if not ids:
            return {}, None, lost

        shared = [f for f in frames if state is not None and f in state.frames]
        numbers = sorted({*shared, *(g.frame for g in given)})
        rows = [frames.index(n) for n in numbers]
        blank = torch.zeros(padded, dtype=torch.bool, device=maps[-1].device)
        object_masks = [torch.stack([by_frame.get(n, blank) for n in numbers]) for by_frame in masks.values()]
        encoder_masks = torch.stack(object_masks) if object_masks else blank.new_zeros(0, len(rows), *padded)
        scale = blank.new_tensor([size[0] / padded[0], size[1] / padded[1]], dtype=torch.float32)
        coordinates = torch.tensor([p.point for p in points], device=scale.device).view(-1, 2) * scale
        point_maps = [m[0, [frames.index(p.frame) for p in points]] for m in maps]

        queries = self.vos_query_extractor(maps[-1][0, rows], encoder_masks, point_maps, coordinates)
        contents = torch.cat([queries.background, queries.objects])
        counts = [QUERIES_PER_OBJECT] * len(masks) + [1] * len(points)
        groups = {"background_vos": len(queries.background), "vos": len(queries.objects)}
        embeds = self.embedding_container.object_embeds(groups)
        predictions = self.decode(maps, contents[None], embeds[None], groups)
        background, objects = predictions.mask_logits[-1, 0].split(list(groups.values()))
        objects = torch.stack([one.amax(0) for one in objects.split(counts)])
        for g in given:
            objects[ids.index(g.id), : frames.index(g.frame)] = -1000.0
        outputs = {
            "objects": objects,
            "background": background,
            "object_queries": queries.objects,
            "background_queries": queries.background,
            "encoder_masks": encoder_masks,
        }
        return outputs, State(objects, ids, list(frames)), lost

    @staticmethod
    def _reference_masks(
        frames: list[int], padded: tuple[int, int], given: Sequence[Given], state: State | None
    ) -> tuple[dict[int, dict[int, Tensor]], list[int]]:
        """Masks [H, W] of the mask objects by id and video frame, propagated ones first, and the ids lost."""
        masks: dict[int, dict[int, Tensor]] = {}
        lost = []
        if state is not None:
            shared = [f for f in state.frames if f in frames]
            old = state.logits[:, [state.frames.index(f) for f in shared]]
            old = F.interpolate(old, scale_factor=4, mode="bilinear", align_corners=False) > 0
            for i, track in zip(state.ids, old, strict=True):
                if track.any():
                    masks[i] = dict(zip(shared, track, strict=True))
                elif all(g.id != i for g in given):
                    lost.append(i)
        for g in given:
            if g.mask is not None:
                H, W = g.mask.shape
                masks.setdefault(g.id, {})[g.frame] = F.pad(g.mask, (0, padded[1] - W, 0, padded[0] - H))
        return masks, lost


class QueryTables(nn.Module):
    """Learned queries. Row 0 of a table is the position embedding of its group, the others are contents."""

    def __init__(self) -> None:
        super().__init__()
        self._semantic_queries = nn.Parameter(torch.randn(1 + sum(CLASS_SETS.values()), DIM))
        self._background_queries = nn.Parameter(torch.randn(2, DIM))
        self._background_vos_queries = nn.Parameter(torch.randn(2, DIM))
        self._instance_queries = nn.Parameter(torch.randn(1 + NUM_INSTANCES, DIM))
        self._vos_queries = nn.Parameter(torch.randn(1, DIM))

    def detection(self, class_set: str) -> tuple[Tensor, Tensor, dict[str, int]]:
        """Contents [Q, C], embeddings [Q, C] and groups for instance and panoptic segmentation."""
        names = sorted(CLASS_SETS)
        start = 1 + sum(CLASS_SETS[n] for n in names[: names.index(class_set)])
        contents = {
            "instance": self._instance_queries[1:],
            "background": self._background_queries[1:],
            "semantic": self._semantic_queries[start : start + CLASS_SETS[class_set]],
        }
        tables = (self._instance_queries, self._background_queries, self._semantic_queries)
        embeds = [t[:1].expand_as(c) for t, c in zip(tables, contents.values(), strict=True)]
        groups = {name: len(c) for name, c in contents.items()}
        return torch.cat(list(contents.values())), torch.cat(embeds), groups

    def object_embeds(self, groups: dict[str, int]) -> Tensor:
        """Embeddings [Q, C] of the queries made by the object encoder."""
        background = self._background_vos_queries[:1].expand(groups["background_vos"], -1)
        return torch.cat([background, self._vos_queries[:1].expand(groups["vos"], -1)])


class Decoder(nn.Module):
    """Nine layers of masked cross-attention, self-attention and FFN, with a prediction around each."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.attention = attention
        self.transformer_self_attention_layers = nn.ModuleList(SelfAttentionLayer() for _ in range(9))
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(attention) for _ in range(9)
        )
        self.transformer_ffn_layers = nn.ModuleList(FFNLayer() for _ in range(9))
        self.decoder_norm = nn.LayerNorm(DIM)
        self.scale_embed = nn.Embedding(3, DIM)
        names = ("background", "semantic", "background_vos", "vos", "instance")
        self.mask_embeds = nn.ModuleDict({name: MLP() for name in (*names, "free")})
        self.proj_layers = nn.ModuleDict({name: nn.Linear(DIM, DIM) for name in names})

    def forward(
        self, maps: list[Tensor], queries: Tensor, embeds: Tensor, groups: dict[str, int]
    ) -> Predictions:
        """maps [B, C, T, h, w] at strides 32, 16, 8, 4; queries, embeds [B, Q, C]."""
        *levels, mask_features = maps
        memory = [
            (m + e[:, None, None, None]).flatten(2).transpose(1, 2)  # [B, T*h*w, C]
            for m, e in zip(levels, self.scale_embed.weight, strict=True)
        ]
        positions = []
        for m in levels:
            T, h, w = m.shape[2:]
            positions.append(position_3d(T, h, w, m.device).flatten(0, 2))  # [T*h*w, C]
        predictions = [self.predict(queries, mask_features, groups)]
        for i in range(9):
            scale = i % 3
            weight = self.attention_map(predictions[-1][1], levels[scale].shape[-2:])
            key = memory[scale] + positions[scale]
            cross = self.transformer_cross_attention_layers[i]
            queries = cross(queries, embeds, key, memory[scale], weight)
            queries = self.transformer_self_attention_layers[i](queries, embeds)
            queries = self.transformer_ffn_layers[i](queries)
            predictions.append(self.predict(queries, mask_features, groups))
        all_queries, masks, classes = zip(*predictions, strict=True)
        return Predictions(
            torch.stack(all_queries),
            torch.stack(masks),
            None if classes[0] is None else torch.stack(classes),
        )

    def predict(
        self, queries: Tensor, mask_features: Tensor, groups: dict[str, int]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The queries themselves, mask logits [B, Q, T, H/4, W/4] and class logits [B, instances, 1 + K]."""
        normed = dict(zip(groups, self.decoder_norm(queries).split(list(groups.values()), 1), strict=True))
        embedding = torch.cat([self.mask_embeds[name](x) for name, x in normed.items()], 1)
        mask_logits = torch.einsum("bqc,bcthw->bqthw", embedding, mask_features)
        if not {"instance", "semantic"} <= normed.keys():
            return queries, mask_logits, None
        kinds = ("instance", "background", "semantic")
        instance, background, semantic = (self.proj_layers[name](normed[name]) for name in kinds)
        nothing = (instance @ background.transpose(1, 2)).amax(-1, keepdim=True)
        return queries, mask_logits, torch.cat([nothing, instance @ semantic.transpose(1, 2)], -1)

    @staticmethod
    def attention_map(mask_logits: Tensor, size: Sequence[int]) -> Tensor:
        """How much a query sees of each key at a scale of that size. [B, Q, T, H/4, W/4] -> [B, Q, T*h*w]."""
        small = F.interpolate(
            mask_logits.flatten(0, 1), size=tuple(size), mode="bilinear", align_corners=False
        )
        return small.unflatten(0, mask_logits.shape[:2]).flatten(2).sigmoid()


class MaskedAttention(nn.Module):
    """Attention that is kept to, or drawn to, the mask that each query predicted so far."""

    scaling_factors: Tensor

    def __init__(self, attention: str) -> None:
        super().__init__()
        self._attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.hard = attention == "hard"
        if not self.hard:
            self.register_buffer("scaling_factors", torch.tensor([32.0, 32, 16, 16, 8, 8, 4, 4]))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        """weight [B, Q, S] in 0..1."""
        weight = weight.unsqueeze(1).repeat(1, HEADS, 1, 1)  # [B, A, Q, S]
        if self.hard:
            mask = (weight < 0.5).flatten(0, 1)
            mask[torch.where(mask.all(-1))] = False  # a query that sees nothing sees everything
        else:
            mask = (weight * self.scaling_factors[:, None, None]).flatten(0, 1)
        return self._attn(query, key, value, attn_mask=mask)[0]


class CrossAttentionLayer(nn.Module):
    def __init__(self, attention: str) -> None:
        super().__init__()
        self.multihead_attn = MaskedAttention(attention)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor, embed: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        return self.norm(x + self.multihead_attn(x + embed, key, value, weight))


class SelfAttentionLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor, embed: Tensor) -> Tensor:
        query = x + embed
        return self.norm(x + self.self_attn(query, query, x)[0])


class FFNLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(DIM, 2048)
        self.linear2 = nn.Linear(2048, DIM)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear2(self.linear1(x).relu()))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2](self.layers[1](self.layers[0](x).relu()).relu())


class ObjectEncoder(nn.Module):
    """Queries of given masks and points, and of a 4 x 4 grid of background cells."""

    def __init__(self) -> None:
        super().__init__()
        self.mask_object_query_embed = nn.Parameter(torch.randn(DIM))
        self.bg_query_embed = nn.Parameter(torch.randn(DIM))
        self.point_object_query_embed = nn.Parameter(torch.randn(DIM))
        self.register_buffer("bg_grid_size", torch.tensor([GRID, GRID]))
        self.cross_attn_layers = nn.ModuleList(EncoderAttention() for _ in range(4))
        self.self_attn_layers = nn.ModuleList(EncoderAttention() for _ in range(4))
        self.ffn_layers = nn.ModuleList(EncoderFFN() for _ in range(4))
        self.proj_point_features = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(4))
        self.point_vos_query_extractor = PointMLP()

    def forward(
        self, mask_features: Tensor, masks: Tensor, point_maps: Sequence[Tensor], points: Tensor
    ) -> ObjectQueries:
        """mask_features [T', C, h, w] of the reference frames, masks bool [N, T', 4h, 4w].

        point_maps: per stride 32, 16, 8, 4 the map [M, C, h, w] of each point's frame; points [M, 2], (y, x)
        in 0..1 of the padded image.
        """
        T, C, h, w = mask_features.shape
        plane = position_2d(h, w, mask_features.device, normalised=False)  # [h, w, C]
        generator = torch.Generator(masks.device).manual_seed(0)
        pieces = [cell.nonzero() for cell in self.background_masks(masks)]
        for mask in masks:
            pieces += split_pixels(mask.nonzero())
        features, positions = [], []
        for pixels in pieces:  # [n, 3] as (t, y, x)
            if len(pixels) > MAX_SAMPLES:
                chosen = torch.randperm(len(pixels), generator=generator, device=masks.device)
                pixels = pixels[chosen[:MAX_SAMPLES]]
            if len(pixels) == 0:  # a background cell that objects cover
                features.append(mask_features.new_zeros(1, C))
                positions.append(mask_features.new_zeros(1, C))
                continue
            t, y, x = pixels[:, 0], pixels[:, 1] // 4, pixels[:, 2] // 4
            features.append(mask_features[t, :, y, x])
            positions.append(plane[y, x])
        x = torch.stack([f.mean(0) for f in features])  # [16 + 8 N, C]
        if len(points):
            levels = [nearest(m, points) for m in point_maps]  # 4 x [M, C]
            x = torch.cat([x, self.point_vos_query_extractor(torch.cat(levels, -1))])
            keys = torch.stack([proj(f) for proj, f in zip(self.proj_point_features, levels, strict=True)], 1)
            place = nearest(plane.permute(2, 0, 1).expand(len(points), -1, -1, -1), points)
            features += list(keys)
            positions += list(place[:, None].expand(-1, 4, -1))
        counts = torch.tensor([len(f) for f in features], device=x.device)
        padding = torch.arange(int(counts.max()), device=x.device) >= counts[:, None]  # [Q, longest]
        value = nn.utils.rnn.pad_sequence(features, batch_first=True)  # [Q, longest, C]
        key = value + nn.utils.rnn.pad_sequence(positions, batch_first=True)

        num_background = GRID * GRID
        num_masks = QUERIES_PER_OBJECT * len(masks)
        kinds = (self.bg_query_embed, self.mask_object_query_embed, self.point_object_query_embed)
        sizes = (num_background, num_masks, len(points))
        embed = torch.cat([e.expand(n, -1) for e, n in zip(kinds, sizes, strict=True)])  # [Q, C]
        for self_attn, cross_attn, ffn in zip(
            self.self_attn_layers, self.cross_attn_layers, self.ffn_layers, strict=True
        ):
            query = (x + embed)[None]
            x = self_attn(x[None], query, query, x[None])[0]
            x = cross_attn(x[:, None], (x + embed)[:, None], key, value, padding)[:, 0]
            x = ffn(x)
        return ObjectQueries(x[num_background:], x[:num_background])

    @staticmethod
    def background_masks(masks: Tensor) -> Tensor:
        """Each cell of the grid less all objects. masks [N, T, H, W] -> [16, T, H, W]."""
        T, H, W = masks.shape[1:]
        y = torch.linspace(-0.499, GRID - 1 + 0.499, H, device=masks.device).round().long()
        x = torch.linspace(-0.499, GRID - 1 + 0.499, W, device=masks.device).round().long()
        cell = GRID * y[:, None] + x  # [H, W]
        inside = cell == torch.arange(GRID * GRID, device=masks.device)[:, None, None]
        return inside[:, None] & ~masks.any(0)


def split_pixels(pixels: Tensor) -> list[Tensor]:
    """The pixels [n, 3] of a mask in raster order as one list a query; few pixels are repeated."""
    n = len(pixels)
    if n == 0:
        raise ValueError("expected masks with at least one pixel, got an empty one")
    return list(pixels.repeat(max(1, -(-QUERIES_PER_OBJECT // n)), 1).tensor_split(QUERIES_PER_OBJECT))


def nearest(maps: Tensor, points: Tensor) -> Tensor:
    """The value of map [M, C, h, w] nearest to each point [M, 2], (y, x) in 0..1. -> [M, C]."""
    grid = 2 * points.flip(-1)[:, None, None] - 1
    return F.grid_sample(maps, grid, mode="nearest", align_corners=False)[..., 0, 0]


class EncoderAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.norm = nn.LayerNorm(DIM)

    def forward(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None
    ) -> Tensor:
        return self.norm(x + self.attn(query, key, value, key_padding_mask=padding)[0])


class EncoderFFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(DIM, 2048), nn.ReLU(), nn.Linear(2048, DIM))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.mlp(x))


class PointMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4 * DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
