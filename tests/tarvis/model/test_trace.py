"""encode and decode trace: torch.compile without graph breaks, torch.export with static and dynamic sizes."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

from tarvis.config import load_config
from tarvis.model import build_model
from tarvis.structures import Features, Queries

BACKEND = "aot_eager"
"""Traces, differentiates and functionalises as the default does, without a minute of C++ compilation."""
TINY = Path(__file__).parents[3] / "configs" / "tiny.yaml"


def small_model(backbone="convnext_atto"):
    torch.manual_seed(0)
    config = dataclasses.replace(
        load_config(TINY).model, backbone=backbone, neck_layers=1, decoder_layers=3, object_encoder_layers=1
    )
    return build_model(config).eval().requires_grad_(False)


def clip(num_frames=2, height=64, width=128):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (1, num_frames, 3, height, width), dtype=torch.uint8, generator=generator)


def task_queries(model, features, task):
    """Queries of each task: classes (VIS, VPS) or two given objects as masks (VOS) or points (PET)."""
    if task in ("vis", "vps"):
        return model.queries.classes("synthetic")
    h, w = features.mask_features.shape[-2:]
    masks = torch.zeros(2 if task == "vos" else 0, 1, 4 * h, 4 * w, dtype=torch.bool)
    masks[:1, 0, 8:40, 8:30] = True
    masks[1:, 0, 30:33, 50:52] = True
    points = None
    if task == "pet":
        points = model.object_encoder.look_up(
            features, torch.tensor([0, 0]), torch.tensor([[0.3, 0.2], [0.7, 0.9]])
        )
    background, objects = model.object_encoder(features.mask_features[0, :1], masks, points)
    return model.queries.objects(background[None], objects[None])


GROUP = {"vis": "instance", "vps": "semantic", "vos": "vos", "pet": "vos"}


class Encode(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, frames):
        return self.model.encode(frames)


class Decode(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, features: Features, queries: Queries):
        return self.model.decode(features, queries)


def assert_same(got, expected, tolerance=2e-4):
    got, expected = torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def model():
    return small_model()


def test_encode_compiles_without_graph_breaks_and_keeps_its_result(model):
    compiled = torch.compile(model.encode, fullgraph=True, backend=BACKEND)
    assert_same(compiled(clip()), model.encode(clip()))


@pytest.mark.parametrize("task", ["vis", "vps", "vos", "pet"])
def test_decode_compiles_without_graph_breaks_for_every_task(model, task):
    features = model.encode(clip())
    queries = task_queries(model, features, task)

    def masks(features, queries):
        return model.decode(features, queries).mask_logits(GROUP[task])

    compiled = torch.compile(masks, fullgraph=True, backend=BACKEND)
    assert_same(compiled(features, queries), masks(features, queries))


def test_object_encoder_compiles_without_graph_breaks(model):
    shown = model.encode(clip()).mask_features[0]
    masks = torch.zeros(2, 2, 64, 128, dtype=torch.bool)
    masks[0, :, 3:20, 50:90] = True
    compiled = torch.compile(model.object_encoder, fullgraph=True, backend=BACKEND)
    assert_same(compiled(shown, masks), model.object_encoder(shown, masks))


def test_compiled_encode_serves_any_clip_size_with_one_dynamic_graph(model):
    compiled = torch.compile(model.encode, fullgraph=True, dynamic=True, backend="eager")
    for size in ((2, 64, 128), (3, 128, 192), (4, 192, 128)):
        assert_same(compiled(clip(*size)), model.encode(clip(*size)))


@pytest.mark.parametrize("backbone", ["convnext_atto", "resnet50", "swin_tiny"])
def test_encode_exports_with_static_size(backbone):
    model = small_model(backbone)
    program = torch.export.export(Encode(model), (clip(),))
    assert_same(program.module()(clip()), model.encode(clip()))


@pytest.mark.parametrize("backbone", ["convnext_atto", "resnet50", "swin_tiny"])
def test_encode_exports_with_dynamic_frames_height_and_width(backbone):
    model = small_model(backbone)
    frames, rows, columns = (Dim(name, min=2, max=32) for name in ("frames", "rows", "columns"))
    program = torch.export.export(
        Encode(model),
        (clip(3, 128, 192),),
        dynamic_shapes={"frames": {1: frames, 3: 64 * rows, 4: 64 * columns}},
    )
    for size in ((3, 128, 192), (4, 192, 128)):
        assert_same(program.module()(clip(*size)), model.encode(clip(*size)))


@pytest.mark.parametrize("task", ["vis", "vps", "vos", "pet"])
def test_decode_exports_for_every_task(model, task):
    features = model.encode(clip())
    queries = task_queries(model, features, task)
    program = torch.export.export(Decode(model), (features, queries))
    assert_same(program.module()(features, queries), model.decode(features, queries))


def test_decode_exports_with_dynamic_frames_height_and_width(model):
    frames, rows, columns = (Dim(name, min=2, max=32) for name in ("frames", "rows", "columns"))
    sizes = {s: {1: frames, 3: 64 // s * rows, 4: 64 // s * columns} for s in (4, 8, 16, 32)}
    features = model.encode(clip(3, 128, 192))
    queries = task_queries(model, features, "vis")
    dynamic = {
        "features": [(sizes[32], sizes[16], sizes[8]), sizes[4]],
        "queries": [None, None, dict.fromkeys(queries.groups)],
    }
    program = torch.export.export(Decode(model), (features, queries), dynamic_shapes=dynamic)
    for size in ((3, 128, 192), (4, 192, 128)):
        features = model.encode(clip(*size))
        assert_same(program.module()(features, queries), model.decode(features, queries))
