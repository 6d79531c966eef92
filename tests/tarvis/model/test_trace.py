"""encode, decode and the object encoder trace.

torch.compile without graph breaks, torch.export with static and dynamic sizes.
"""

import os
import shutil

import pytest
import torch
from torch import nn
from torch.export import Dim

from tarvis.structures import Features, Queries

BACKEND = "aot_eager"
"""Traces, differentiates and functionalises as the default does, without a minute of C++ compilation."""
SIZES = ((7, 192, 320), (4, 192, 128), (2, 256, 192))
"""Frames, height and width of clips that one dynamic graph must serve.

In the first no size equals another, that of a window or the number of colours: the compiler takes equal sizes
for one and the same.
"""
MOST_UNLIKE = ["vis", "vos", *(pytest.param(task, marks=pytest.mark.slow) for task in ("vps", "pet"))]
"""The tasks; VIS and VOS, which differ most, are traced at every change."""
BACKBONES = [
    "convnext_zepto",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet50", "swin_tiny")),
]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


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
def model(tiny_model):
    return tiny_model()


@pytest.fixture(autouse=True)
def forget_graphs():
    """What was compiled for one test, and the sizes seen there, must not change what the next compiles."""
    torch.compiler.reset()


def test_encode_compiles_without_graph_breaks_and_keeps_its_result(model):
    compiled = torch.compile(model.encode, fullgraph=True, backend=BACKEND)
    assert_same(compiled(clip()), model.encode(clip()))


@pytest.mark.parametrize("task", MOST_UNLIKE)
def test_decode_compiles_without_graph_breaks_for_every_task(model, task):
    features = model.encode(clip())
    queries = task_queries(model, features, task)

    def masks(features, queries):
        return model.decode(features, queries).mask_logits(GROUP[task])

    compiled = torch.compile(masks, fullgraph=True, backend=BACKEND)
    assert_same(compiled(features, queries), masks(features, queries))


def test_object_encoder_compiles_without_graph_breaks(model):
    given = shown_objects(model, 2, 64, 128)
    compiled = torch.compile(model.object_encoder, fullgraph=True, backend=BACKEND)
    assert_same(compiled(*given), model.object_encoder(*given))


def compile_dynamic(function):
    """The function compiled for any size, and the graphs made for it."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    return torch.compile(function, fullgraph=True, dynamic=True, backend=keep), graphs


@pytest.mark.slow
def test_compiled_encode_serves_any_clip_size_with_one_dynamic_graph(model):
    compiled, graphs = compile_dynamic(model.encode)
    for size in SIZES:
        assert_same(compiled(clip(*size)), model.encode(clip(*size)))
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vis", "vos", "pet"])
def test_compiled_decode_serves_any_clip_size_with_one_dynamic_graph(model, task):
    def masks(features, queries):
        return model.decode(features, queries).mask_logits(GROUP[task])

    compiled, graphs = compile_dynamic(masks)
    for size in SIZES:
        features = model.encode(clip(*size))
        queries = task_queries(model, features, task)
        assert_same(compiled(features, queries), masks(features, queries))
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="no C++ compiler: neither $CXX nor g++ nor c++")
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="PyTorch 2.13's compiler writes C++ that lacks transpose_mxn for processors without vectors",
)
def test_encode_and_decode_compile_with_the_default_backend(model):
    frames = clip(2, 64, 64)
    features, queries = model.encode(frames), model.queries.classes("synthetic")
    assert_same(torch.compile(model.encode, fullgraph=True)(frames), features)
    assert_same(
        torch.compile(model.decode, fullgraph=True)(features, queries), model.decode(features, queries)
    )


@pytest.mark.parametrize("backbone", BACKBONES)
def test_encode_exports_with_static_size(tiny_model, backbone):
    model = tiny_model(backbone=backbone)
    program = torch.export.export(Encode(model), (clip(),))
    assert_same(program.module()(clip()), model.encode(clip()))


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_encode_exports_with_dynamic_frames_height_and_width(tiny_model, backbone):
    model = tiny_model(backbone=backbone)
    frames, rows, columns = (Dim(name, min=2, max=32) for name in ("frames", "rows", "columns"))
    program = torch.export.export(
        Encode(model),
        (clip(3, 128, 192),),
        dynamic_shapes={"frames": {1: frames, 3: 64 * rows, 4: 64 * columns}},
    )
    for size in ((3, 128, 192), (4, 192, 128)):
        assert_same(program.module()(clip(*size)), model.encode(clip(*size)))


@pytest.mark.parametrize("task", MOST_UNLIKE)
def test_decode_exports_for_every_task(model, task):
    features = model.encode(clip())
    queries = task_queries(model, features, task)
    program = torch.export.export(Decode(model), (features, queries))
    assert_same(program.module()(features, queries), model.decode(features, queries))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vis", "vos"])
def test_decode_exports_with_dynamic_frames_height_and_width(model, task):
    frames, rows, columns = (Dim(name, min=2, max=32) for name in ("frames", "rows", "columns"))
    sizes = {s: {1: frames, 3: 64 // s * rows, 4: 64 // s * columns} for s in (4, 8, 16, 32)}
    features = model.encode(clip(3, 128, 192))
    queries = task_queries(model, features, task)
    dynamic = {
        "features": [(sizes[32], sizes[16], sizes[8]), sizes[4]],
        "queries": [None, None, dict.fromkeys(queries.groups)],
    }
    program = torch.export.export(Decode(model), (features, queries), dynamic_shapes=dynamic)
    for size in ((3, 128, 192), (4, 192, 128)):
        features = model.encode(clip(*size))
        queries = task_queries(model, features, task)
        assert_same(program.module()(features, queries), model.decode(features, queries))


def shown_objects(model, num_frames, height, width):
    """Mask features of reference frames and two objects there: one of a rectangle, one of nothing."""
    masks = torch.zeros(2, num_frames, height, width, dtype=torch.bool)
    masks[0, :, 3:20, 20:60] = True
    return model.encode(clip(num_frames, height, width)).mask_features[0], masks


def test_object_encoder_exports_with_static_size(model):
    given = shown_objects(model, 2, 64, 128)
    program = torch.export.export(model.object_encoder, given)
    assert_same(program.module()(*given), model.object_encoder(*given))


def test_object_encoder_exports_with_dynamic_reference_frames_height_and_width(model):
    frames, rows, columns = (Dim(name, min=1, max=32) for name in ("frames", "rows", "columns"))
    program = torch.export.export(
        model.object_encoder,
        shown_objects(model, 3, 128, 192),
        dynamic_shapes={
            "mask_features": {0: frames, 2: 16 * rows, 3: 16 * columns},
            "masks": {1: frames, 2: 64 * rows, 3: 64 * columns},
        },
    )
    for size in ((3, 128, 192), (1, 192, 128), (2, 64, 64)):
        given = shown_objects(model, *size)
        assert_same(program.module()(*given), model.object_encoder(*given))
