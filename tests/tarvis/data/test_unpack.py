"""Packed folders: what is unpacked is what was packed; damage is named."""

import json
import sys

import pytest

from tarvis.data.unpack import main

FILES = {"dog/00000.jpg": b"first", "dog/00001.jpg": b"", "cat/00000.jpg": bytes(range(256))}


def packed(files=FILES):
    """As the published tool packs them: version, number, folder, names, sizes, contents."""

    def number(value):
        return value.to_bytes(8, sys.byteorder)

    names = b"".join(name.encode().ljust(128) for name in files)
    sizes = b"".join(number(len(content)) for content in files.values())
    return b"\x01" + number(len(files)) + b"/data/davis".ljust(256) + names + sizes + b"".join(files.values())


@pytest.fixture
def unpack(tmp_path, capsys):
    def run(data):
        (tmp_path / "davis.fpack").write_bytes(data)
        code = main([str(tmp_path / "davis.fpack")])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_what_is_unpacked_is_what_was_packed(unpack, tmp_path):
    code, out, _ = unpack(packed())
    assert code == 0
    assert json.loads(out) == {"folder": str(tmp_path / "davis"), "files": 3}
    found = {path.relative_to(tmp_path / "davis").as_posix() for path in tmp_path.rglob("*.jpg")}
    assert found == FILES.keys()
    assert all((tmp_path / "davis" / name).read_bytes() == content for name, content in FILES.items())


def test_a_folder_that_is_there_is_left_alone(unpack, tmp_path):
    (tmp_path / "davis").mkdir()
    code, _, err = unpack(packed())
    assert code == 2
    assert "davis: is there already" in err
    assert not list((tmp_path / "davis").iterdir())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no pack of version 1, or is cut off"),
        (b"\x02" + packed()[1:], "is no pack of version 1"),
        (packed()[:400], "is cut off"),
        (packed()[:-1], "expected 934 bytes, as its header says, got 933"),
        (packed({"../x.jpg": b""}), r"'../x.jpg' is not a path below its folder"),
        (packed({"\xff": b"1"}).replace("\xff".encode(), b"\xff "), "can't decode"),
    ],
)
def test_damage_is_named_and_nothing_is_left_behind(unpack, tmp_path, data, message):
    code, _, err = unpack(data)
    assert code == 2
    assert f"{tmp_path / 'davis.fpack'}: " in err
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["davis.fpack"]
