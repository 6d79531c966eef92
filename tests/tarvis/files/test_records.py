import json

import pytest

from tarvis.files.folders import read_names
from tarvis.files.records import checked_path, read_json
from tarvis.structures import InputError


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"videos": [{"id": 3, "name": "x", "ok": true, "size": [4, 5.5], "file": "../x"}]}')
    return read_json(path)


def test_values_are_read(root):
    (video,) = root["videos"].entries(1)
    assert video["id"].integer() == 3
    assert video["id"].number() == 3.0
    assert video["name"].text() == video["name"].path() == "x"
    assert video["ok"].flag() is True
    assert [size.number() for size in video["size"].entries()] == [4.0, 5.5]
    assert video.get("other") is None
    assert [key for key, _ in video.items()][:2] == ["id", "name"]


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda video: video["other"], r"videos\[0\]: has no 'other'"),
        (
            lambda video: video["name"].integer(),
            r"videos\[0\].name: expected an integer of at least 0, got 'x'",
        ),
        (lambda video: video["ok"].integer(), "expected an integer of at least 0, got True"),
        (lambda video: video["id"].integer(5, 9), "expected an integer from 5 to 9, got 3"),
        (lambda video: video["id"].flag(), "expected 0 or 1, got 3"),
        (lambda video: video["id"].text(), "expected a string, got 3"),
        (lambda video: video["ok"].number(), "expected a finite number, got True"),
        (lambda video: video["id"]["x"], "expected an object, got 3"),
        (lambda video: video["id"].items(), "expected an object"),
        (lambda video: video["id"].entries(), "expected a list"),
        (lambda video: video["size"].entries(3, "sides"), "expected 3 sides, got 2"),
        (lambda video: video["file"].path(), r"videos\[0\].file: '../x' is not a path below its folder"),
    ],
)
def test_errors_name_file_and_entry(root, read, message):
    with pytest.raises(InputError, match=rf"a\.json: .*{message}"):
        read(root["videos"].entries()[0])


@pytest.mark.parametrize(
    "name", ["", "/x", "../x", "a/../x", "a//b", "./a", "a\0b", "..", "a\\..\\b", "C:/x", "a\nb"]
)
def test_paths_that_leave_their_folder(name):
    with pytest.raises(ValueError, match="is not a path below its folder"):
        checked_path(name)


@pytest.mark.parametrize("name", ["a", "a/b.png", "..a/b..", "ä b"])
def test_paths_that_stay(name):
    assert checked_path(name) == name


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match=r"b\.json: cannot be read \(No such file"):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, encoding):
    (tmp_path / "a.json").write_text('[{"id": "\u00e4"}]', encoding=encoding)
    assert read_json(tmp_path / "a.json").entries()[0]["id"].text() == "\u00e4"
    if encoding != "utf-16":
        (tmp_path / "names.txt").write_text("first\nsecond\n", encoding=encoding)
        assert read_names(tmp_path / "names.txt") == ["first", "second"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, r"is not a JSON file \(too deep\)"),
        ("9" * 5000, r"is not a JSON file \(a number of too many digits\)"),
        ('{"height": 32768, "width": 32768}', "expected at most 134217728 pixels, got 32768 x 32768"),
        (
            json.dumps({"height": "\x1b[31m" + "x" * 10**6}),
            r"height: expected .*, got '.x1b\[31mx",
        ),
        (json.dumps({"height": [[[[[[[[[[1]]]]]]]]]]}), "height: expected an integer"),
        (json.dumps({"height": list(range(10**5))}), r"height: expected an integer .*, got \[0, 1, 2"),
        ('{"height": 1e400}', "expected an integer"),
    ],
    ids=lambda text: text[:12],
)
def test_hostile_values_are_one_short_line(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_json(tmp_path / "a.json").size()
    assert len(str(error.value)) <= 300
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["x" * 256, "a/" + "\u00e9" * 128, "a/" * 600 + "b"])
def test_paths_that_no_file_system_takes(name):
    with pytest.raises(ValueError, match="is longer than a path can be"):
        checked_path(name)
