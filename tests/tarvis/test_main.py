"""The command `tarvis`: one table of verbs, and what they find by name from any folder."""

import dataclasses
import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

import tarvis
from tarvis import __main__ as command
from tarvis import info, places
from tarvis.model.weights import load_weights, read_config
from tarvis.structures import InputError
from tarvis.training.config import load_config


@pytest.mark.parametrize("name", command.VERBS)
def test_every_verb_has_a_help_that_calls_it_as_it_was_called(name, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main([*name.split(), "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert name == "kernels" or f"usage: tarvis {name} " in out
    assert f"python -m {command.VERBS[name].package}.{command.VERBS[name].module} " not in out


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (["infer", "a.mp4"], "infer"),
        (["export", "trt", "--task", "vis"], "export trt"),
        (["export", "--task", "vis"], "export onnx"),
        (["check", "my.json"], "check data"),
        (["check", "graphs"], "check graphs"),
        (["check", "data", "graphs"], "check data"),
        (["check", ".", "--device", "cpu"], "check graphs"),
        (["--version"], None),
        ([], None),
    ],
)
def test_verbs_are_found_by_one_word_or_two(given, name, tmp_path, monkeypatch):
    (tmp_path / "manifest.json").touch()
    monkeypatch.chdir(tmp_path)
    found, options = command.divide(given)
    assert found == name
    assert name is None or [*name.split(), *options][-len(given) :] == given or len(options) == len(given) - 1


def test_what_needs_no_verb_needs_no_torch():
    code = "import sys; from tarvis.__main__ import main; main([]); assert 'torch' not in sys.modules"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(name in out for name in command.VERBS)


def test_versions_and_unknown_verbs(capsys):
    for given, status, said in ((["--version"], 0, version("tarvis")), (["infr"], 2, "no verb 'infr'")):
        with pytest.raises(SystemExit) as ended:
            command.main(given)
        assert ended.value.code == status
        assert said in "".join(capsys.readouterr())


def test_a_verb_ends_with_the_status_of_its_module(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(["convert", "none.pth", "out.safetensors"]) == 2
    assert capsys.readouterr().err == "error: none.pth: no such file\n"


def test_ctrl_c_while_modules_are_imported_is_one_line(monkeypatch, capsys):
    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "import_module", stopped)
    assert command.main(["infer", "video.mp4"]) == 130
    assert capsys.readouterr().err == "error: stopped\n"


@pytest.mark.parametrize("name", ["tiny", "tiny.yaml", "configs/tiny.yaml", "ablations/finetune_vis"])
def test_settings_of_the_package_are_found_by_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert places.settings(name).parent in (places.ROOT / "configs", places.ROOT / "configs" / "ablations")
    assert read_config(name) == load_config(name).model


@pytest.mark.parametrize("name", ["nothing", "../pyproject", "configs/../tiny", "/tiny", "configs", ""])
def test_other_names_stay_what_they_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert places.settings(name) == type(tmp_path)(name)
    assert places.weights(name) == type(tmp_path)(name)


def test_a_file_of_ones_own_goes_before_that_of_the_package(tmp_path, monkeypatch, tiny_config):
    monkeypatch.chdir(tmp_path)
    own = dataclasses.replace(tiny_config, num_instance_queries=9)
    (tmp_path / "tiny").write_text(json.dumps({"num_instance_queries": 9}))
    (tmp_path / "small").touch()
    assert read_config("tiny").num_instance_queries == own.num_instance_queries
    with pytest.raises(InputError, match=r"^small: "):
        load_weights("small")


def test_weights_of_the_package_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tarvis.load("small", device="cpu").config == tarvis.load(device="cpu").config


def test_published_names_say_how_to_get_them():
    with pytest.raises(InputError, match="swin-tiny_finetune: no such file; fetch it: tarvis download swin"):
        load_weights("swin-tiny_finetune")


def test_info_says_what_runs_here(capsys):
    assert info.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["tarvis"] == version("tarvis")
    assert found["devices"]["cpu"]["mask_bits"] == "reference"
    assert {"onnx", "openvino", "aoti", "tensorrt", "tensorrt_rtx"} == found["runtimes"].keys()
    assert info.main([]) == 0
    assert "mask_bits" in capsys.readouterr().out


def test_info_says_what_a_file_holds(tmp_path, weights, config, state, capsys):
    assert info.main([str(weights), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[str(weights)]
    assert found["class_sets"] == config.class_sets
    assert found["parameters"] == sum(value.numel() for value in state.values())
    assert info.main([str(tmp_path / "none.pth")]) == 2


def test_a_command_started_as_a_program_is_the_same(tmp_path):
    save = [sys.executable, "-m", "tarvis", "infer", "none.mp4", "--out", "out", "--task", "vis"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(save, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: none.mp4")
