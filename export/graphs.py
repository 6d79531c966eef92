"""The parts of the network that become graphs, with their names, example inputs and free dimensions.

    encoder          frames -> memory_32, memory_16, memory_8, mask_features
    decoder          content, position and what the encoder gives -> queries, mask_embedding, class_logits
    object_encoder   mask_features of reference frames, masks (and points, for PET) -> background, objects

A task takes the encoder and the decoder; VOS and PET, whose queries stand for given objects, take the
object encoder too. Masks are made outside, of the queries that are wanted: <mask_embedding, mask_features>.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tarvis.model import TarVis
from tarvis.model.resnet import FrozenBatchNorm
from tarvis.structures import STRIDE, Features, PointFeatures, Queries, Size

from .forms import take_plain_forms

ENCODED = ("memory_32", "memory_16", "memory_8", "mask_features")
DECODED = ("queries", "mask_embedding", "class_logits")  # the last where queries have classes
FOUND = ("background", "objects")
OUTPUTS = {"encoder": ENCODED, "decoder": DECODED, "object_encoder": FOUND}
OBJECTS = "vos"
"""The query group of given objects, of VOS and PET: the number of its queries varies."""

ISLANDS = (nn.LayerNorm, nn.GroupNorm)
"""Modules that compute in float32 whatever the precision, besides softmax, positions and class logits."""

Shapes = dict[str, dict[int, Dim]]


@dataclass(frozen=True)
class Graph:
    """A part to trace: `inputs` are examples, `dynamic` says which of their dimensions are free."""

    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: Shapes

    def trace(self, device: torch.device | None = None) -> ExportedProgram:
        """The part as torch.export sees it."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        shapes = {name: self.dynamic.get(name) for name in inputs}
        with torch.no_grad():
            return torch.export.export(self.module, (), inputs, dynamic_shapes=shapes, strict=False)


def graphs(
    model: TarVis,
    *,
    groups: Mapping[str, int],
    size: Size,
    frames: int,
    dynamic: Collection[str],
    points: bool,
) -> dict[str, Graph]:
    """The graphs of one task.

    Args:
        model: as `in_precision` gives it.
        groups: the query groups and their numbers of queries; that of `OBJECTS` varies.
        size: padded (H, W) of the frames.
        frames: of a clip.
        dynamic: what may vary besides: "frames", "size".
        points: whether objects may be given by points.
    """
    sizes = Sizes(model, size, frames, dynamic)
    made = {"encoder": sizes.encoder(), "decoder": sizes.decoder(groups)}
    if OBJECTS in groups:
        made["object_encoder"] = sizes.object_encoder(points)
    return made


class Sizes:
    """Example inputs and free dimensions for clips of one size, or of any."""

    def __init__(self, model: TarVis, size: Size, frames: int, dynamic: Collection[str]) -> None:
        self.model, self.dtype = model, model.queries.instance.dtype
        self.dim = model.queries.instance.shape[1]
        self.rows, self.columns = size[0] // STRIDE, size[1] // STRIDE
        self.frames = frames
        self.free_frames, self.free_size = "frames" in dynamic, "size" in dynamic
        # examples of what varies are at least 2 and differ: tracing takes 1 and equal sizes for constants
        if self.free_frames:
            self.frames = max(frames, 2)
        if self.free_size:
            self.rows = max(self.rows, 2)
            self.columns = max(self.columns, 2) + (self.columns == self.rows)

    def shape(self, stride: int, *leading: int, channels: int | None = None) -> tuple[int, ...]:
        """[*leading, C, H/s, W/s]."""
        scale = STRIDE // stride
        return *leading, self.dim if channels is None else channels, self.rows * scale, self.columns * scale

    def free(self, stride: int, rows_at: int, frames_at: int | None = None) -> dict[int, Dim]:
        """The free dimensions of a map at a stride, whose columns are at the dimension after its rows."""
        scale, free = STRIDE // stride, {}
        if self.free_frames and frames_at is not None:
            free[frames_at] = Dim("frames", min=1)
        if self.free_size:
            free |= {rows_at: scale * Dim("rows", min=1), rows_at + 1: scale * Dim("columns", min=1)}
        return free

    def encoder(self) -> Graph:
        frames = torch.zeros(self.shape(1, 1, self.frames, channels=3), dtype=torch.uint8)
        return Graph(Encoder(self.model), {"frames": frames}, ENCODED, {"frames": self.free(1, 3, 1)})

    def decoder(self, groups: Mapping[str, int]) -> Graph:
        inputs, dynamic = {}, {}
        num_queries = sum(groups.values())
        if OBJECTS in groups:
            others = num_queries - groups[OBJECTS]
            num_queries = others + 3
            objects = Dim("object_queries", min=1)
            dynamic = {name: {1: objects + others} for name in ("content", "position")}
        for name in ("content", "position"):
            inputs[name] = torch.zeros(1, num_queries, self.dim, dtype=self.dtype)
        for name, stride in zip(ENCODED, (32, 16, 8, 4), strict=True):
            inputs[name] = torch.zeros(self.shape(stride, 1, self.frames), dtype=self.dtype)
            dynamic[name] = self.free(stride, 3, 1)
        module = Decoder(self.model, groups)
        outputs = DECODED if module.has_classes else DECODED[:-1]
        return Graph(module, inputs, outputs, dynamic)

    def object_encoder(self, points: bool) -> Graph:
        """The number of reference frames and of objects always varies."""
        N, T, M = 3, 2, 5
        inputs = {
            "mask_features": torch.zeros(self.shape(4, T), dtype=self.dtype),
            "masks": torch.zeros(self.shape(1, N, channels=T), dtype=torch.bool),
        }
        shown, mask, point = (Dim(name, min=1) for name in ("reference_frames", "num_masks", "num_points"))
        dynamic = {
            "mask_features": {0: shown} | self.free(4, 2),
            "masks": {0: mask, 1: shown} | self.free(1, 2),
        }
        if points:
            inputs |= {
                "masks_exist": torch.ones(N, dtype=torch.bool),
                "point_features": torch.zeros(M, 4, self.dim, dtype=self.dtype),
                "point_positions": torch.zeros(M, self.dim, dtype=self.dtype),
                "points_exist": torch.ones(M, dtype=torch.bool),
            }
            dynamic |= {name: {0: point} for name in ("point_features", "point_positions", "points_exist")}
            dynamic["masks_exist"] = {0: mask}
        return Graph(ObjectEncoder(self.model), inputs, FOUND, dynamic)


class Encoder(nn.Module):
    """Frames of a clip, already padded -> its features."""

    def __init__(self, model: TarVis) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        """uint8 [B, T, 3, H, W] -> the names of `ENCODED`."""
        B, T = frames.shape[:2]
        mean, std = (x[:, None, None] for x in (self.model.pixel_mean, self.model.pixel_std))
        # the only thing TensorRT does with uint8 is to cast it
        pixels = (frames.float().flatten(0, 1) - mean) / std  # [B*T, 3, H, W], float32 in any precision
        maps = self.model.backbone(pixels.to(self.model.queries.instance.dtype))
        features = self.model.fuse(tuple(x.unflatten(0, (B, T)) for x in maps))
        return *features.memory, features.mask_features


class Decoder(nn.Module):
    """Queries ask a clip."""

    def __init__(self, model: TarVis, groups: Mapping[str, int]) -> None:
        super().__init__()
        self.model, self.groups = model, dict(groups)
        self.has_classes = "semantic" in groups

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        memory_32: Tensor,
        memory_16: Tensor,
        memory_8: Tensor,
        mask_features: Tensor,
    ) -> tuple[Tensor, ...]:
        groups = self.groups
        if OBJECTS in groups:  # the group that varies is the last
            groups = groups | {OBJECTS: content.shape[1] - sum(groups.values()) + groups[OBJECTS]}
        features = Features((memory_32, memory_16, memory_8), mask_features)
        answer = self.model.decode(features, Queries(content, position, groups))
        if answer.class_logits is None:
            return answer.queries, answer.mask_embedding
        return answer.queries, answer.mask_embedding, answer.class_logits


class ObjectEncoder(nn.Module):
    """Masks and points -> contents of object queries. `exist` is False for rows that only fill up."""

    def __init__(self, model: TarVis) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        mask_features: Tensor,
        masks: Tensor,
        masks_exist: Tensor | None = None,
        point_features: Tensor | None = None,
        point_positions: Tensor | None = None,
        points_exist: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        points = exist = None
        if masks_exist is not None and points_exist is not None:
            assert point_features is not None
            assert point_positions is not None
            points = PointFeatures(point_features, point_positions)
            exist = torch.cat((masks_exist, points_exist))
        return self.model.object_encoder(mask_features, masks, points, exist)


def in_precision(model: TarVis, dtype: torch.dtype, *, plain: bool = True) -> TarVis:
    """A copy of the network in eval mode that computes in `dtype`, with what needs float32 in float32.

    Norms take and give `dtype` and compute in float32; class logits come out in float32; frames are
    normalised in float32. (Softmax and sampling places are so by `export.forms` and the operator.) The copy
    is made of the `plain` forms of `export.forms`, or calls our kernels.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False).to(torch.float32)
    fold_norms(model)
    if plain:
        take_plain_forms(model)
    if dtype == torch.float32:
        return model
    heads = set(model.decoder.proj_layers.modules())
    for module in model.modules():
        if isinstance(module, ISLANDS):
            module.register_forward_pre_hook(lambda _, args: (args[0].float(),))
            module.register_forward_hook(lambda _, __, out: out.to(dtype))
        elif module in heads:
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, args: (args[0].float(),))
        elif module is not model:  # the root holds only the normalisation constants
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(module, name, buffer.to(dtype))
    return model


def fold_norms(model: nn.Module) -> None:
    """Multiply frozen batch norms into their convolutions, in float32; what stays of them is the shift."""
    for module in model.modules():
        norm = getattr(module, "norm", None)
        if isinstance(module, nn.Conv2d) and isinstance(norm, FrozenBatchNorm):
            scale, shift = norm.scale_and_shift()
            module.weight.data = module.weight.data * scale[:, None, None, None]
            norm.bias, norm.running_mean = shift, torch.zeros_like(shift)
            norm.weight, norm.running_var = torch.ones_like(shift), torch.full_like(shift, 1 - norm.eps)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions of float32 in float32 within the block: PyTorch lets cuDNN round their inputs to TF32."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
