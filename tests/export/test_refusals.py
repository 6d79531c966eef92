"""What does not fit is refused in one sentence, and no half-written folder is left."""

import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from export import check, to_onnx
from export.manifest import parse_size, read_manifest
from export.runner import open_runner
from export.runtimes import onnx
from tarvis.config import InferenceConfig
from tarvis.datasets.classes import class_table
from tarvis.model.weights import save_weights
from tarvis.structures import InputError, Reference
from tarvis.video.segmenter import VideoSegmenter
from tests.export.support import edit_manifest


@pytest.fixture
def folder(graphs, tmp_path):
    """Graphs of VIS that a test may damage."""
    return shutil.copytree(graphs("vis"), tmp_path / "graphs")


def refusal(folder):
    with pytest.raises(InputError) as refused:
        open_runner(folder, device="cpu")
    return str(refused.value)


def test_a_manifest_comes_back_as_it_was_written(graphs, config):
    manifest = read_manifest(graphs("vis"))
    assert (manifest.task, manifest.class_set, manifest.padded) == ("vis", "synthetic", (64, 128))
    assert manifest.model == config
    assert set(manifest.graphs) == {"encoder", "decoder"}
    assert set(manifest.files) >= {"encoder.onnx", "encoder.onnx.data", "queries.safetensors"}


def test_a_folder_without_manifest_is_refused(tmp_path):
    assert "manifest.json" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx.data", "queries.safetensors"])
def test_truncated_and_missing_files_are_refused(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    assert name in refusal(folder)
    (folder / name).unlink()
    assert name in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 0}, "export again"),
        ({"task": 3}, "task"),
        ({"precision": "int8"}, "precision"),
        ({"surprise": 1}, "surprise"),
        ({"graphs": {"encoder": "../encoder.onnx", "decoder": "decoder.onnx"}}, "encoder.onnx"),
        ({"files": {"../x": "0"}}, "manifest"),
        ({"backend": "coreml"}, "made for 'coreml'"),
        ({"groups": {}}, "groups"),
        ({"groups": {"semantic": 0}}, "groups"),
        ({"frames": 0}, "frames"),
        ({"size": [1, 10**9]}, "size"),
        ({"task": "vos"}, "class_set"),
        ({"class_set": None}, "class_set"),
        ({"class_set": "ovis"}, "class_set"),
        ({"graphs": {"encoder": "encoder.onnx"}}, "decoder"),
    ],
)
def test_manifests_that_do_not_fit_are_refused(folder, changes, said):
    edit_manifest(folder, **changes)
    assert said in refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "vps"},
        {"precision": "fp16"},
        {"frames": 4},
        {"size": [64, 128]},
        {"weights": "0" * 64},
        {"target": {"device": "cpu"}},
        {"versions": {}},
        {"files": {}},
    ],
)
def test_a_manifest_that_was_edited_is_refused(folder, weights, capsys, changes):
    edit_manifest(folder, digests=False, **changes)
    assert "was changed" in refusal(folder)
    assert check.main([str(folder), "--weights", str(weights), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_manifest_without_digest_is_refused(folder):
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    del tree["digest"]
    path.write_text(json.dumps(tree))
    assert "export again" in refusal(folder)


def test_a_manifest_of_endless_depth_is_refused(folder):
    (folder / "manifest.json").write_text("[" * 10**5)
    assert "manifest.json" in refusal(folder)


def test_a_manifest_that_is_no_json_is_refused(folder):
    (folder / "manifest.json").write_bytes(b"\xff{")
    assert "manifest.json" in refusal(folder)


def test_other_weights_are_refused(graphs, model, config, tmp_path, capsys):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["neck.level_embed"] += 1
    save_weights(tmp_path / "other.safetensors", state, config)
    argv = [str(graphs("vis")), "--weights", str(tmp_path / "other.safetensors"), "--device", "cpu"]
    assert check.main(argv) == 2
    assert "other weights" in capsys.readouterr().err


def segment(runner, frames, task="vis", classes="synthetic", references=()):
    segmenter = VideoSegmenter(
        runner,
        [task],
        classes=class_table(classes),
        references=references,
        settings=InferenceConfig(2, 1),
    )
    segmenter.step(frames)
    return segmenter.finish()


@pytest.mark.parametrize(
    ("num_frames", "width", "said"),
    [
        (2, 200, r"--size 60x200 .* --dynamic frames,size"),
        (1, 100, r"--frames 1, or with --dynamic frames$"),
    ],
)
def test_clips_of_another_size_or_length_are_refused(graphs, num_frames, width, said):
    runner = open_runner(graphs("vis"), device="cpu")
    with pytest.raises(InputError, match=said):
        segment(runner, np.zeros((num_frames, 60, width, 3), np.uint8))


def test_frames_that_pad_to_the_same_size_are_taken(graphs):
    runner = open_runner(graphs("vis"), device="cpu")
    assert segment(runner, np.zeros((2, 64, 128, 3), np.uint8))["vis"].size == (64, 128)


def test_other_classes_and_objects_are_refused(graphs):
    runner = open_runner(graphs("vis"), device="cpu")
    with pytest.raises(InputError, match="ovis"):
        runner.queries.classes("ovis")
    frames = np.zeros((2, 60, 100, 3), np.uint8)
    with pytest.raises(InputError, match="--task vos"):
        segment(
            runner, frames, "vos", references=[Reference(1, 0, mask=torch.ones(60, 100, dtype=torch.bool))]
        )


def test_points_need_graphs_that_take_points(graphs):
    runner = open_runner(graphs("vos"), device="cpu")
    with pytest.raises(InputError, match="--task pet"):
        segment(
            runner, np.zeros((2, 60, 100, 3), np.uint8), "pet", references=[Reference(1, 0, point=(3, 4))]
        )


@pytest.mark.parametrize(
    "text", ["480", "480x", "0x64", "-1x64", "axb", "480x864x3", "64x99999999", "64x" + "9" * 5000]
)
def test_a_size_is_height_by_width(text):
    with pytest.raises(InputError, match="--size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("task", "walk", "walk"),
        ("dynamic", "size", "--dynamic"),
        ("frames", "0", "frame"),
        ("dataset", "ovis", "ovis"),
        ("weights", "nowhere.pth", "nowhere.pth"),
    ],
)
def test_options_that_do_not_fit_leave_no_folder(asked, tmp_path, capsys, option, value, said):
    assert to_onnx.main(asked(**{option: value})) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


OUT_OF_MEMORY = "out of memory: try a smaller --size"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("disk full"), "disk full"),
        (MemoryError(), OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA"), OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), OUT_OF_MEMORY),
    ],
)
def test_an_export_that_fails_halfway_says_why_and_leaves_no_folder(
    asked, tmp_path, monkeypatch, capsys, error, said
):
    def write(_, path, __):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(onnx, "write_graph", write)
    assert to_onnx.main(asked()) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(asked, monkeypatch, capsys):
    monkeypatch.setattr(onnx, "find_spec", lambda _: None)
    assert to_onnx.main(asked()) == 2
    assert "tarvis[export]" in capsys.readouterr().err


@pytest.fixture
def written(asked, monkeypatch):
    """The exit code of an export whose graphs are empty files."""
    monkeypatch.setattr(onnx, "write_graph", lambda _, path, __: path.touch())
    return lambda *flags, **options: to_onnx.main([*asked(**options), *flags])


def test_a_folder_of_graphs_is_replaced_only_when_asked(written, tmp_path, capsys):
    out = tmp_path / "out"
    assert written() == 0
    (out / "mine").touch()
    assert written() == 2
    assert "already exists" in capsys.readouterr().err
    assert written("--overwrite", frames=3) == 2
    assert "'mine' in it is not ours" in capsys.readouterr().err
    (out / "mine").unlink()
    assert written("--overwrite", frames=3) == 0
    assert read_manifest(out).frames == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_something_else_is_never_replaced(written, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "manifest.json").touch()
    assert written("--overwrite", out=tmp_path / "thesis") == 2
    assert "no record (.tarvis.json) says what a run wrote there" in capsys.readouterr().err
    assert (tmp_path / "thesis" / "manifest.json").exists()
