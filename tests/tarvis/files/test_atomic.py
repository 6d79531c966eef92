"""Files are whole or not there."""

import errno
import json
import zipfile
from pathlib import Path

import pytest

from tarvis.files.atomic import whole_file, whole_folder, write_json, write_json_list, zip_files
from tarvis.structures import InputError


def test_a_file_that_fails_keeps_the_old_one_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": 1})

    def fail():
        with whole_file(path) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("items", [[], [1], [{"a": None}, "b", [3]]])
def test_a_list_is_written_item_by_item(tmp_path, items):
    path = tmp_path / "list.json"
    write_json_list(path, iter(items), before='{"split": "val", "of": ', after="}")
    assert json.loads(path.read_text()) == {"split": "val", "of": items}


def test_the_same_files_make_the_same_zip(tmp_path):
    folder = tmp_path / "results"
    names = ("b/1.png", "a.json", "b/0.png")
    for name in (*names, "another.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    zip_files({name: folder / name for name in names}, tmp_path / "first.zip")
    (folder / "a.json").touch()
    zip_files({name: folder / name for name in reversed(names)}, tmp_path / "second.zip")
    assert (tmp_path / "first.zip").read_bytes() == (tmp_path / "second.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "first.zip") as archive:
        assert archive.namelist() == ["a.json", "b/0.png", "b/1.png"]
        assert archive.read("b/0.png") == b"b/0.png"


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_staged_folder_appears_when_it_is_complete(tmp_path):
    out = tmp_path / "runs" / "first"
    with whole_folder(out) as folder:
        (folder / "tracks.json").write_text("{}")
        assert not out.exists()
    assert contents(tmp_path) == ["runs", "runs/first", "runs/first/tracks.json"]


@pytest.mark.parametrize("error", [InputError("bad"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_and_keeps_what_was_there(error, tmp_path):
    out = tmp_path / "out"

    def fail(overwrite):
        with whole_folder(out, overwrite=overwrite) as folder:
            (folder / "half").write_text("")
            raise error

    with pytest.raises(type(error)):
        fail(overwrite=False)
    assert contents(tmp_path) == []
    with whole_folder(out) as folder:
        (folder / "tracks.json").write_text("old")
    with pytest.raises(type(error)):
        fail(overwrite=True)
    assert (out / "tracks.json").read_text() == "old"
    assert contents(tmp_path) == ["out", "out/tracks.json"]


def test_a_folder_in_use_is_replaced_only_on_demand_and_only_if_ours(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with whole_folder(out) as folder:  # empty: nothing to lose
        (folder / "vis").mkdir()
        (folder / "vis" / "tracks.json").write_text("old")
    with pytest.raises(InputError, match="already exists"), whole_folder(out):
        pass
    with whole_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("")
    assert contents(tmp_path) == ["out", "out/new"]
    with pytest.raises(InputError, match="will not be overwritten"), whole_folder(out, overwrite=True):
        pass
    with whole_folder(out, overwrite=True, marks=("n*",)) as folder:
        (folder / "newer").write_text("")
    assert contents(tmp_path) == ["out", "out/newer"]
    (tmp_path / "file").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(InputError), whole_folder(tmp_path / "file", overwrite=overwrite):
            pass
    assert (tmp_path / "file").read_text() == "precious"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", Path("/proc/nowhere/out")):
        with pytest.raises(InputError, match=rf"{out}: cannot be written"), whole_folder(out):
            pass


def test_errors_of_other_files_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), whole_folder(tmp_path / "out"):
        (tmp_path / "gone").read_text()
    with pytest.raises(InputError, match=r"out: cannot be written"), whole_folder(tmp_path / "out") as folder:
        (folder / "no" / "such").write_text("")


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(InputError, match=r"out: cannot be written \(No space left"),
        whole_folder(tmp_path / "out"),
    ):
        raise full
    assert contents(tmp_path) == []
