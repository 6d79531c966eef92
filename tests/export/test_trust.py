"""Machine code runs if this user has built it on this machine, or says --trust."""

import json
import shutil
import zipfile

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from export import check
from export.manifest import read_manifest, write_manifest
from export.runner import open_runner
from export.runtimes import DATA, RUNTIMES, aoti
from tarvis.structures import InputError
from tests.export.support import edit_manifest

NATIVE = [name for name in RUNTIMES if name not in DATA]


@pytest.fixture
def folder(graphs, tmp_path):
    return shutil.copytree(graphs("vis"), tmp_path / "made")


def refused_for(folder, **options):
    with pytest.raises(InputError) as refused:
        open_runner(folder, device="cpu", **options)
    return str(refused.value)


@pytest.fixture(params=NATIVE)
def code(request, folder):
    """A folder that says it holds machine code, written here."""
    edit_manifest(folder, backend=request.param)
    write_manifest(folder, read_manifest(folder))
    return folder


def test_what_was_built_here_is_opened(code):
    assert "machine code" not in refused_for(code)  # but nothing of it is


@pytest.mark.parametrize("seal", [None, "", "0" * 64, 3, "\u00fc"])
def test_what_was_not_built_here_needs_trust(code, seal):
    path = code / "manifest.json"
    tree = json.loads(path.read_text()) | {"seal": seal}
    path.write_text(json.dumps(tree))
    assert "not built on this machine; build it here, or load it with --trust" in refused_for(code)
    assert "machine code" not in refused_for(code, trust=True)


def test_what_was_built_here_and_changed_since_needs_trust(code):
    edit_manifest(code, frames=3)
    assert "not built on this machine" in refused_for(code)


def test_what_somebody_else_has_built_needs_trust(code, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "another"))
    assert "not built on this machine" in refused_for(code)


def test_a_key_that_others_can_write_is_none(code, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    write_manifest(code, read_manifest(code))
    (tmp_path / "home" / "tarvis").chmod(0o777)
    assert "chmod go-w" in refused_for(code)


def test_without_a_home_code_is_written_and_needs_trust(code, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    write_manifest(code, read_manifest(code))
    assert "not built on this machine" in refused_for(code)


@pytest.mark.parametrize("flag", [[], ["--trust"]])
def test_commands_pass_trust_on(code, weights, capsys, flag):
    edit_manifest(code, frames=3)
    assert check.main([str(code), "--weights", str(weights), "--device", "cpu", *flag]) == 2
    assert ("with --trust" in capsys.readouterr().err) is (not flag)


def test_graphs_that_are_data_need_no_trust(folder):
    edit_manifest(folder)
    open_runner(folder, device="cpu")


@pytest.mark.parametrize(
    "names",
    [
        ["../evil.so"],
        ["sub/evil.so"],
        ["/etc/evil.so"],
        ["a.so", "b.so"],
        ["a.so", "a.so"],
        ["a.so", ""],
        ["a.so", ".."],
        ["a.json"],
        [],
    ],
)
def test_a_package_is_unpacked_nowhere_else(tmp_path, names):
    with zipfile.ZipFile(tmp_path / "x.pt2", "w") as archive:
        archive.writestr("x/archive_version", "0")
        for name in names:
            archive.writestr(f"x/data/aotinductor/model/{name}", "code")
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    with pytest.raises((ValueError, OSError)):
        aoti.unpack(tmp_path / "x.pt2", inside)
    assert {path.name for path in tmp_path.rglob("*")} <= {"x.pt2", "a", "b", "a.so", "b.so", "a.json"}


def test_a_package_that_cannot_be_loaded_leaves_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(aoti.tempfile, "tempdir", str(tmp_path))
    (folder / "encoder.onnx").write_bytes(b"no zip")
    before = set(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"encoder\.onnx: cannot be loaded"):
        aoti.AotiGraph(folder / "encoder.onnx", (), aoti.torch.device("cpu"))
    assert set(tmp_path.iterdir()) == before
