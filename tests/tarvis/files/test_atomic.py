"""Files are whole or not there."""

import json
import zipfile

import pytest

from tarvis.files.atomic import PART, fresh, leftovers, whole_file, write_json, write_json_list, zip_files


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


def test_a_link_that_waits_under_the_name_of_a_part_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    for name in (".a.json.part", ".a.part"):
        (tmp_path / name).symlink_to(precious)
    write_json(tmp_path / "a.json", 1)
    assert precious.read_text() == "kept"
    assert (tmp_path / "a.json").read_text() == "1"


@pytest.mark.parametrize("length", [1, 246, 255])
def test_names_of_any_length_are_written_and_what_a_killed_process_left_is_found(length, tmp_path):
    path = tmp_path / ("a" * length)
    write_json(path, 1)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    (left := fresh(path, PART)).touch()
    assert leftovers(tmp_path) == leftovers(tmp_path, of=path) == [left]
    assert leftovers(tmp_path, of=tmp_path / "b") == leftovers(tmp_path / "nowhere") == []
