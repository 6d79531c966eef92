"""The graphs give what the network gives, in ONNX Runtime, for every task."""

import dataclasses
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx

from export import check
from export.functions import plugin_form
from export.graphs import Sizes, in_precision
from export.manifest import read_manifest
from export.runner import open_runner
from export.runtimes.onnx import OPSETS, OrtGraph, _providers, write_graph
from tarvis.config import OwnClasses
from tarvis.model import build_model
from tarvis.stitch.panoptic import encode_labels
from tarvis.structures import Features, VideoResult

STATIC = {"size": "60x100", "frames": 2}
FREE = {"size": "128x64", "frames": 3, "dynamic": "frames"}
SETTINGS = {"vis": STATIC, "vps": FREE, "vos": STATIC, "pet": FREE}
"""Both sizes, with fixed and with free frames, for both kinds of task."""
every_task = pytest.mark.parametrize(
    "task", [*("vis", "vps", "vos"), pytest.param("pet", marks=pytest.mark.slow)]
)
CPU = torch.device("cpu")


def clip(num_frames, height, width, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, num_frames, 3, height, width), dtype=torch.uint8, generator=generator)


def sizes_of(task):
    """Clips that the graphs of a task take."""
    height, width = map(int, SETTINGS[task]["size"].split("x"))
    return [(T, height, width) for T in ((1, 3, 4) if "dynamic" in SETTINGS[task] else (2,))]


@pytest.fixture(scope="module")
def runner(graphs):
    return lambda task: open_runner(graphs(task, **SETTINGS[task]), device="cpu")


def assert_near(got, expected, tolerance):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@every_task
def test_the_encoder_gives_the_features_of_the_network(model, runner, task):
    for size in sizes_of(task):
        expected, got = model.encode(clip(*size)), runner(task).encode(clip(*size))
        for a, b in zip(
            (*got.memory, got.mask_features), (*expected.memory, expected.mask_features), strict=True
        ):
            assert_near(a, b, 1e-4)


@pytest.mark.parametrize("task", ["vis", "vps"])
def test_the_decoder_answers_the_queries_of_classes(model, runner, task):
    for size in sizes_of(task):
        features = model.encode(clip(*size))
        expected = model.decode(features, model.queries.classes("synthetic"))
        got = runner(task).decode(features, runner(task).queries.classes("synthetic"))
        assert got.groups == expected.groups
        assert_near(got.queries, expected.queries, 2e-3)
        assert_near(got.class_logits, expected.class_logits, 2e-3)
        for group in ("instance", "semantic"):
            assert_near(got.mask_logits(group), expected.mask_logits(group), 2e-3)


@pytest.mark.parametrize(
    ("task", "num_masks", "num_points"),
    [
        ("vos", 4, 0),
        ("vos", 1, 0),
        *(pytest.param("pet", *case, marks=pytest.mark.slow) for case in ((0, 1), (0, 3), (2, 1), (3, 0))),
    ],
)
def test_any_number_of_given_objects_becomes_queries_and_is_answered(
    model, runner, task, num_masks, num_points
):
    for T, H, W in sizes_of(task):
        features = model.encode(clip(T, H, W))
        h, w = features.mask_features.shape[-2:]
        masks = torch.zeros(num_masks, T, 4 * h, 4 * w, dtype=torch.bool)
        for i, mask in enumerate(masks[1:]):  # the first is empty
            mask[:, 3 + 5 * i : 20 + 3 * i, 4 : 30 + i] = True
        points = None
        if num_points:
            generator = torch.Generator().manual_seed(0)
            frame = torch.zeros(num_points, dtype=torch.long)
            points = model.object_encoder.look_up(
                features, frame, torch.rand(num_points, 2, generator=generator)
            )
        expected = model.object_encoder(features.mask_features[0], masks, points)
        got = runner(task).object_encoder(features.mask_features[0], masks, points)
        for a, b in zip(got, expected, strict=True):
            assert_near(a, b, 1e-4)
        queries = [model.queries.objects(*(x[None] for x in expected)) for _ in range(2)]
        a, b = runner(task).decode(features, queries[0]), model.decode(features, queries[1])
        assert a.class_logits is None
        assert_near(a.mask_logits("vos"), b.mask_logits("vos"), 2e-3)


@every_task
def test_the_masks_of_a_video_are_those_of_the_network(graphs, task, compared):
    status, rows = compared(graphs(task, **SETTINGS[task]))
    assert status == 0
    assert rows["masks, 1 - IoU"]["largest"] <= 1e-3


@pytest.mark.usefixtures("traced_writes")
def test_the_check_fails_where_a_graph_is_not_the_networks(graphs, weights, monkeypatch, capsys):
    run = OrtGraph.__call__
    monkeypatch.setattr(
        OrtGraph, "__call__", lambda self, inputs: {name: 1.01 * x for name, x in run(self, inputs).items()}
    )
    folder = graphs("vis", **STATIC)
    assert check.main([str(folder), "--weights", str(weights), "--device", "cpu"]) == 1
    assert "DIFFERS" in capsys.readouterr().err


def test_without_masks_and_bits_there_is_nothing_to_tell_a_decoder_by(graphs, monkeypatch, compared):
    def encoder_alone(self, inputs):
        found = run(self, inputs)
        return found if "frames" in inputs else {name: 0 * x for name, x in found.items()}

    run = OrtGraph.__call__
    nothing = VideoResult("vis", (60, 100), 2, ())
    monkeypatch.setattr(check, "attention_bits", lambda *_: None)  # as for engines and packages
    monkeypatch.setattr(OrtGraph, "__call__", encoder_alone)
    monkeypatch.setattr(check, "segment", lambda *_: nothing)
    status, rows = compared(graphs("vis", **STATIC))
    assert status == 1
    assert rows["class_logits"]["limit"] is None
    assert "nothing to compare" in rows["masks, 1 - IoU"]["note"]
    assert [name for name, row in rows.items() if not row["is_within"]] == ["masks, 1 - IoU"]


def test_a_decoder_without_class_logits_differs(graphs, monkeypatch, compared):
    run = OrtGraph.__call__

    def without(self, inputs):
        return {name: x for name, x in run(self, inputs).items() if name != "class_logits"}

    monkeypatch.setattr(OrtGraph, "__call__", without)
    monkeypatch.setattr(check, "segment", lambda *_: VideoResult("vis", (60, 100), 2, ()))
    status, rows = compared(graphs("vis", **STATIC))
    assert (status, rows["class_logits"]["note"]) == (1, "missing")


def test_a_network_that_is_not_finite_agrees_with_nothing():
    bad, good = torch.tensor([float("nan"), 1.0]), torch.ones(2)
    for expected, got in ((bad, good), (good, bad), (bad, bad)):
        row = check.compare("x", expected, got, None)
        assert (row.is_within, row.note) == (False, "not finite")


def class_maps(*frames, labels=(0, 1)):
    picture = encode_labels(np.array([labels], np.uint8))
    return VideoResult("vps", (1, 2), 2, (), dict.fromkeys(frames, picture))


def test_class_maps_of_other_frames_differ(graphs, monkeypatch):
    maps = [class_maps(0), class_maps(1)]
    monkeypatch.setattr(check, "segment", lambda *_: maps.pop())
    runner = open_runner(graphs("vps", **FREE), device="cpu")
    *_, row = check.compare_masks(None, runner, [], [])
    assert (row.output, row.is_within) == ("stuff, pixels", False)


@pytest.mark.parametrize(("labels", "is_told"), [((0, 1), True), ((3, 3), False)])
def test_classes_tell_a_decoder_by_if_there_is_more_than_one(graphs, monkeypatch, labels, is_told):
    monkeypatch.setattr(check, "segment", lambda *_: class_maps(0, labels=labels))
    runner = open_runner(graphs("vps", **FREE), device="cpu")
    masks, stuff = check.compare_masks(None, runner, [], [], judged=False)
    assert (masks.is_within, stuff.is_within) == (is_told, True)


@pytest.mark.usefixtures("traced_writes")
def test_one_folder_that_cannot_be_compared_does_not_cost_the_others(graphs, weights, tmp_path, capsys):
    folders = [str(tmp_path / "none"), str(graphs("vis", **STATIC))]
    assert check.main([*folders, "--weights", str(weights), "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["passed"] is False
    assert all(row["is_within"] for row in found["rows"])
    assert "memory_32" in err
    assert "error: " in err


@pytest.mark.usefixtures("traced_writes")
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA: .."), "out of memory"),
        (RuntimeError("no kernel\nimage"), "no kernel image"),
    ],
)
def test_what_a_runtime_raises_is_no_difference(graphs, weights, monkeypatch, capsys, error, said):
    def fail(*_):
        raise error

    monkeypatch.setattr(OrtGraph, "__call__", fail)
    folder = graphs("vis", **STATIC)
    assert check.main([str(folder), "--weights", str(weights), "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines()[-1] == f"error: {folder}: {said}"


def test_the_network_is_compared_without_tf32_and_the_setting_comes_back(graphs, monkeypatch, compared):
    run, seen = OrtGraph.__call__, set()

    def look(self, inputs):
        seen.add(torch.backends.cudnn.allow_tf32)
        return run(self, inputs)

    monkeypatch.setattr(OrtGraph, "__call__", look)
    before = torch.backends.cudnn.allow_tf32
    assert compared(graphs("vis", **STATIC))[0] == 0
    assert seen == {False}
    assert torch.backends.cudnn.allow_tf32 == before


def test_a_gpu_session_computes_float32_as_such_and_tries_nothing_for_each_shape():
    ((name, options),) = _providers(torch.device("cuda:1"), SimpleNamespace(cuda_stream=7), any_shape=True)
    assert name == "CUDAExecutionProvider"
    assert options == {
        "device_id": 1,
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "user_compute_stream": "7",
    }
    ((_, alone),) = _providers(torch.device("cuda"))
    assert "user_compute_stream" not in alone
    assert _providers(CPU) == ["CPUExecutionProvider"]


def test_deformable_attention_is_one_node_a_layer_and_nothing_awkward_is_left(graphs, config):
    folder = graphs("vis", **STATIC)
    nodes = Counter()
    for name in ("encoder", "decoder"):
        model = plugin_form(onnx.load(folder / f"{name}.onnx"))
        nodes += Counter(node.op_type for node in model.graph.node)
        assert not model.functions
    assert nodes["MSDeformAttn"] == config.neck_layers
    assert not {"GridSample", "ScatterND", "IsNaN", "BitShift"} & nodes.keys()


def test_files_do_not_tell_where_they_were_made(graphs):
    for path in graphs("vis", **STATIC).glob("*.onnx"):
        assert b".py" not in path.read_bytes()


@pytest.mark.slow
def test_half_precision_keeps_softmax_and_norms_in_float32(model, tmp_path):
    sizes = Sizes(in_precision(model, torch.float16), (64, 128), 2, ())
    write_graph(sizes.encoder(), tmp_path / "encoder.onnx", OPSETS["fp16"])
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "encoder.onnx")).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    for node in graph.node:
        if node.op_type in ("Softmax", "LayerNormalization", "InstanceNormalization"):
            assert types[node.output[0]] == onnx.TensorProto.FLOAT
    assert {types[output.name] for output in graph.output} == {onnx.TensorProto.FLOAT16}
    found = OrtGraph(tmp_path / "encoder.onnx", CPU)({"frames": clip(2, 64, 128)})
    expected = model.encode(clip(2, 64, 128))
    assert_near(found["mask_features"].float(), expected.mask_features, 3e-2)
    for name, level in zip(("memory_32", "memory_16", "memory_8"), expected.memory, strict=True):
        assert_near(found[name].float(), level, 3e-2)


@pytest.mark.slow
def test_bfloat16_is_written_and_checked_though_no_cpu_runs_it(model, tmp_path):
    sizes = Sizes(in_precision(model, torch.bfloat16), (64, 128), 2, ())
    queries = model.queries.classes("synthetic")
    write_graph(sizes.decoder(queries.groups), tmp_path / "decoder.onnx", OPSETS["bf16"])
    graph = onnx.load(tmp_path / "decoder.onnx").graph
    types = {output.name: output.type.tensor_type.elem_type for output in graph.output}
    assert types["mask_embedding"] == onnx.TensorProto.BFLOAT16
    assert types["class_logits"] == onnx.TensorProto.FLOAT


def test_rows_that_only_fill_up_change_no_query(model):
    features = model.encode(clip(2, 64, 64)).mask_features[0]
    masks = torch.zeros(2, 2, 64, 64, dtype=torch.bool)
    masks[0, :, 5:30, 5:40] = True
    alone = model.object_encoder(features, masks[:1])
    filled = model.object_encoder(features, masks, exist=torch.tensor([True, False]))
    assert_near(filled[0], alone[0], 1e-5)
    assert_near(filled[1][: len(alone[1])], alone[1], 1e-5)


def test_features_of_another_clip_length_are_decoded(model, runner):
    features = model.encode(clip(5, 128, 64))
    assert isinstance(features, Features)
    got = runner("vps").decode(features, runner("vps").queries.classes("synthetic"))
    assert got.mask_logits("instance").shape[2] == 5


@pytest.mark.slow
def test_tensors_that_stay_where_they_are_give_the_same(runner):
    graph = runner("pet").graphs["object_encoder"]
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "mask_features": torch.randn(2, 128, 32, 16, generator=generator),
        "masks": torch.rand(3, 2, 128, 64, generator=generator) > 0.5,
        "masks_exist": torch.ones(3, dtype=torch.bool),
        "point_features": torch.randn(2, 4, 128, generator=generator),
        "point_positions": torch.randn(2, 128, generator=generator),
        "points_exist": torch.ones(2, dtype=torch.bool),
    }
    expected, found = graph(inputs), graph.run_in_place(inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_near(found[name], value, 1e-6)


def test_the_check_knows_classes_that_came_with_training_data(graphs, config):
    own = OwnClasses(("cat", "lamp"), (True, False))
    config = dataclasses.replace(config, class_sets={"mine": 2}, own_classes={"mine": own})
    model = build_model(config).eval()
    manifest = dataclasses.replace(read_manifest(graphs("vis", **STATIC)), class_set="mine", model=config)
    frames = list(clip(2, 60, 100)[0].permute(0, 2, 3, 1).numpy())
    assert check.segment(model, manifest, frames, []).num_frames == 2
