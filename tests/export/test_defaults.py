"""A task is all that must be named: weights, classes, size, clip length and folder have stated defaults."""

import json

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from export import aoti, folder, to_onnx, trt
from export.manifest import read_manifest
from export.runtimes import tensorrt
from tarvis import info
from tarvis.model.weights import BUNDLED
from tarvis.structures import InputError


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Runs a command up to the export; gives what it is to make, and where."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tensorrt, "installed", lambda _: "tensorrt_rtx")
    seen = []

    def stop(args, *_):
        seen.append(args)
        raise InputError("as far as that")

    monkeypatch.setattr(folder, "from_weights", stop)

    def run(command, *options):
        assert command.main([*options]) == 2
        args = seen.pop()
        return args.weights, args.dataset, args.size, args.frames, args.precision, str(args.out)

    return run


@pytest.mark.parametrize(("command", "runtime"), [(to_onnx, "onnx"), (aoti, "aoti"), (trt, "tensorrt_rtx")])
def test_a_task_is_all_that_must_be_named(asked, command, runtime, tmp_path, capsys):
    out = f"runs/small-vis-480x864x12-{runtime}"
    assert asked(command, "--task", "vis") == (BUNDLED, None, "480x864", 12, "fp32", out)
    (tmp_path / out).mkdir(parents=True)
    assert asked(command, "--task", "vis")[-1] == f"{out}-2"
    assert asked(command, "--task", "vis", "--overwrite")[-1] == out
    changed = asked(command, "--task", "vps", "--precision", "fp16", "--size", "64x96", "--dataset", "ovis")
    assert changed[-1] == f"runs/small-vps-ovis-64x96x12-fp16-{runtime}"
    assert "as far as that" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "(default: 480x864)" in said
    assert "(default: 12)" in said
    assert "(default: runs/NAME" in said


def test_engines_of_graphs_are_named_after_them(graphs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tensorrt, "installed", lambda _: "tensorrt_rtx")
    monkeypatch.setattr(trt, "build", lambda *_: ("vis", {}))
    source = graphs("vis")
    assert trt.main(["--onnx", str(source)]) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [f"{source.name}-tensorrt_rtx"]


def test_where_tensorrt_is_missing_the_packages_and_what_else_works_are_named(monkeypatch, capsys):
    monkeypatch.setattr(tensorrt, "find_spec", lambda _: None)
    assert trt.main(["--task", "vis"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert len(said) <= 300
    for name in ("tarvis[export-gpu]", "tarvis[export]", "export.aoti", "export.to_onnx"):
        assert name in said


@pytest.mark.slow
def test_graphs_of_the_package_are_made_and_say_what_they_are_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert to_onnx.main(["--task", "vis", "--size", "64x64", "--frames", "2"]) == 0
    manifest = read_manifest(tmp_path / "runs" / "small-vis-64x64x2-onnx")
    assert (manifest.class_set, manifest.frames, manifest.size) == ("synthetic", 2, (64, 64))


def test_info_says_what_a_folder_holds(graphs, capsys):
    path = str(graphs("vis"))
    assert info.main([path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[path]
    assert (found["task"], found["class_set"], found["backend"]) == ("vis", "synthetic", "onnx")
    assert found["size"] == [60, 100]
