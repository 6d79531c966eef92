"""Names from outside become names of files."""

import pytest

from tarvis.files.folders import output_name

ODD = [
    "x" * 246,
    "x" * 255,
    "\u00e9" * 120,
    "\udcff",
    "a\udcff",
    "a\x1b[31m",
    "a/b",
    "a\\b",
    "a\nb",
    "",
    ".",
    "..",
]


@pytest.mark.parametrize("name", ["a", "00000", "img 7", "a:b", "\u00e9", "x" * 200, "~", ".hidden"])
def test_names_that_fit_stay(name):
    assert output_name(name) == name


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_other_names_become_files_whose_names_are_theirs_alone(tmp_path, name):
    found = output_name(name)
    assert found.isprintable()
    assert len(found.encode()) <= 200
    (tmp_path / f".{found}.json.part").write_text(name and "x")
    assert output_name(found) == found
    names = {output_name(other) for other in (*ODD, name + "_", found)}
    assert len(names) == len(ODD) + 1
