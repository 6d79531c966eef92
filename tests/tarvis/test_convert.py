"""python -m tarvis.convert: a checkpoint becomes one safe file, or one line says why not."""

import argparse
import dataclasses
import json
import os

import pytest
import torch
from safetensors import safe_open

from tarvis.convert import main
from tarvis.model import build_model
from tarvis.model.weights import load_into, load_weights, save_weights, to_published
from tests.tarvis.networks import SMALLEST


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return build_model(SMALLEST).state_dict()


@pytest.fixture
def checkpoint(tmp_path, state):
    path = tmp_path / "in.pth"
    torch.save({"model": to_published(state, SMALLEST), "config": dataclasses.asdict(SMALLEST)}, path)
    return path


def test_a_checkpoint_becomes_a_safe_file_that_loads_alone(tmp_path, checkpoint, state, capsys):
    out = tmp_path / "out.safetensors"
    assert main([str(checkpoint), str(out)]) == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert summary["backbone"] == "convnext_zepto"
    assert summary["tensors"] == len(state)
    assert str(out) in printed.err
    loaded, config = load_weights(out)
    assert config == SMALLEST
    assert all(torch.equal(loaded[name], state[name]) for name in state if not name.startswith("pixel_"))


def test_published_names_can_be_kept(tmp_path, checkpoint, state):
    out = tmp_path / "out.safetensors"
    assert main([str(checkpoint), str(out), "--published-names"]) == 0
    with safe_open(out, "pt") as file:
        assert "embedding_container._semantic_queries" in file.keys()  # noqa: SIM118
    assert load_weights(out)[0].keys() == state.keys()


def test_a_configuration_can_lie_elsewhere(tmp_path, state):
    torch.save({"model": state}, tmp_path / "in.pth")
    (tmp_path / "config").mkdir()
    config = tmp_path / "config" / "atto.yaml"
    config.write_text(json.dumps({"model": dataclasses.asdict(SMALLEST)}))
    assert main([str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors")]) == 2
    assert main([str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors"), "--config", str(config)]) == 0


def test_user_mistakes_are_one_line_and_leave_nothing_behind(tmp_path, checkpoint, state, capsys):
    def fails(*args):
        assert main([str(arg) for arg in args]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        return printed.err

    out = tmp_path / "out.safetensors"
    assert "no such file" in fails(tmp_path / "none.pth", out)
    assert "ends in .safetensors" in fails(checkpoint, tmp_path / "out.pth")
    assert "no such file" in fails(checkpoint, out, "--config", tmp_path / "none.yaml")
    assert "no folder" in fails(checkpoint, tmp_path / "nowhere" / "out.safetensors")
    assert main([str(checkpoint), str(out)]) == 0
    capsys.readouterr()
    (tmp_path / "link.safetensors").symlink_to(out)
    sound = out.read_bytes()
    for name in ("out.safetensors", "./out.safetensors", "link.safetensors"):
        assert "is the input" in fails(out, f"{tmp_path}/{name}", "--half")
    assert out.read_bytes() == sound
    (tmp_path / "link.safetensors").unlink()
    out.unlink()
    incomplete = {name: value for name, value in state.items() if name != "decoder.norm.bias"}
    content = {"model": incomplete, "config": dataclasses.asdict(SMALLEST), "other": argparse.Namespace()}
    torch.save(content, checkpoint)
    assert "argparse.Namespace" in fails(checkpoint, out)
    assert "missing decoder.norm.bias [64]" in fails(checkpoint, out, "--trust")
    assert [p.name for p in tmp_path.iterdir()] == ["in.pth"]


def test_names_that_are_not_utf8_are_names(tmp_path, state):
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    first, second = folder / "a.safetensors", folder / os.fsdecode(b"\xfe.safetensors")
    save_weights(first, state, SMALLEST)
    assert main([str(first), str(second)]) == 0
    found, config = load_weights(second)
    assert config == SMALLEST
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert sorted(folder.iterdir()) == sorted([first, second])


def test_the_moving_average_of_a_run_can_be_taken_at_half_the_size(tmp_path, state, capsys):
    averaged = {name: x + 1 if x.is_floating_point() else x for name, x in state.items()}
    content = {
        "model": state,
        "config": dataclasses.asdict(SMALLEST),
        "ema": {"n_averaged": torch.tensor(7), **{f"module.{name}": x for name, x in averaged.items()}},
    }
    torch.save(content, tmp_path / "000007.pth")
    out = tmp_path / "out.safetensors"
    assert main([str(tmp_path / "000007.pth"), str(out), "--average", "--half"]) == 0
    loaded, _ = load_weights(out)
    assert loaded["queries.semantic"].dtype == torch.float16
    network = build_model(SMALLEST)
    load_into(network, loaded)
    assert torch.allclose(network.queries.semantic, averaged["queries.semantic"], rtol=1e-3)

    del content["ema"]
    torch.save(content, tmp_path / "000008.pth")
    assert main([str(tmp_path / "000008.pth"), str(out), "--average"]) == 2
    assert "000008.pth: holds no moving average" in capsys.readouterr().err
