"""Folders of results: replaced only where all in them is ours, by one run at a time, whole or not at all."""

import errno
import os
import re
import shutil
import stat
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from tarvis.files import outputs
from tarvis.files.outputs import RECORD, GrowingFolder, whole_folder
from tarvis.structures import InputError
from tests.tarvis.fuzz import edit


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != RECORD
    }


def make(out, text="old", *, names=("tracks.json", "masks/0.png"), **options):
    with whole_folder(out, **options) as folder:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)


OLD = {"out": None, "out/tracks.json": "old", "out/masks": None, "out/masks/0.png": "old"}


def test_a_folder_appears_when_it_is_complete(tmp_path):
    out = tmp_path / "runs" / "first"
    with whole_folder(out) as folder:
        (folder / "tracks.json").write_text("{}")
        assert not out.exists()
    assert contents(tmp_path) == {"runs": None, "runs/first": None, "runs/first/tracks.json": "{}"}


@pytest.mark.parametrize("error", [InputError("bad"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_and_keeps_what_was_there(error, tmp_path):
    out = tmp_path / "out"

    def fail(overwrite):
        with whole_folder(out, overwrite=overwrite) as folder:
            (folder / "half").write_text("")
            raise error

    with pytest.raises(type(error)):
        fail(overwrite=False)
    assert contents(tmp_path) == {}
    make(out)
    with pytest.raises(type(error)):
        fail(overwrite=True)
    assert contents(tmp_path) == OLD


def test_a_folder_in_use_is_replaced_only_on_demand(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    make(out)  # empty: nothing to lose
    with pytest.raises(InputError, match="already exists"):
        make(out)
    assert contents(tmp_path) == OLD
    make(out, "new", names=["other"], overwrite=True)
    assert contents(tmp_path) == {"out": None, "out/other": "new"}


def test_what_a_stopped_run_left_is_replaced_unasked(tmp_path):
    out = tmp_path / "out"
    make(out, is_complete=lambda: False)
    make(out, "new")
    assert set(contents(out).values()) == {"new", None}
    with pytest.raises(InputError, match="already exists"):
        make(out)


def foreign_file(out):
    (out / "masks" / "thesis.tex").write_text("mine")


def changed_file(out):
    (out / "masks" / "0.png").write_text("mended by hand")


def foreign_folder(out):
    (out / "empty").mkdir()


def link_in_place_of_a_file(out):
    (out / "masks" / "0.png").rename(out.parent / "0.png")
    (out / "masks" / "0.png").symlink_to(out.parent / "0.png")


def link_in_place_of_a_folder(out):
    (out / "masks").rename(out.parent / "masks")
    (out / "masks").symlink_to(out.parent / "masks")


def pipe_in_place_of_a_file(out):
    (out / "tracks.json").unlink()
    os.mkfifo(out / "tracks.json")


def no_record(out):
    (out / RECORD).unlink()


def record_of_another_kind(out):
    (out / RECORD).write_text('["tracks.json"]')


def damaged_record(out):
    (out / RECORD).write_text("[" * 100_000)


def record_that_leads_elsewhere(out):
    (out / RECORD).rename(out.parent / "record")
    (out / RECORD).symlink_to(out.parent / "record")


def result_in_a_folder_below(out):
    out.rename(out.with_name("inner"))
    out.mkdir()
    out.with_name("inner").rename(out / "inner")


def manifest_of_somebody_else(out):
    shutil.rmtree(out)
    out.mkdir()
    (out / "manifest.json").write_text("{}")
    (out / "tracks.json").write_text("{}")


KINDS = [
    foreign_file,
    changed_file,
    foreign_folder,
    link_in_place_of_a_file,
    link_in_place_of_a_folder,
    pipe_in_place_of_a_file,
    no_record,
    record_of_another_kind,
    damaged_record,
    record_that_leads_elsewhere,
    result_in_a_folder_below,
    manifest_of_somebody_else,
]


@pytest.mark.parametrize("change", KINDS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("is_complete", [True, False])
def test_what_is_not_ours_is_never_replaced(change, is_complete, tmp_path):
    out = tmp_path / "out"
    make(out, is_complete=lambda: is_complete)
    change(out)
    before = contents(tmp_path)
    for overwrite in (True, False):
        with pytest.raises(InputError, match=str(out)) as error, whole_folder(out, overwrite=overwrite):
            pytest.fail("it began")
        assert len(str(error.value).splitlines()) == 1
    assert contents(tmp_path) == before


def test_a_file_in_the_place_of_the_folder_stays(tmp_path):
    (tmp_path / "file").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(InputError), whole_folder(tmp_path / "file", overwrite=overwrite):
            pass
    assert contents(tmp_path) == {"file": "precious"}


@pytest.mark.parametrize("change", [foreign_file, changed_file, foreign_folder, pipe_in_place_of_a_file])
def test_what_appears_during_the_run_stays_and_so_do_the_results(change, tmp_path):
    out = tmp_path / "out"
    make(out)
    before = {}

    def run():
        with whole_folder(out, overwrite=True) as folder:
            (folder / "tracks.json").write_text("new")
            change(out)
            before.update(contents(out))

    with pytest.raises(InputError, match=r"the results are in .*, since ") as error:
        run()
    assert contents(out) == before
    beside = Path(re.findall(r"results are in (.*?), since", str(error.value))[0])
    assert contents(beside) == {"tracks.json": "new"}
    assert sorted(tmp_path.iterdir()) == sorted([out, beside])


@pytest.mark.parametrize("name", [".", "masks", "masks/0.png", "link"])
def test_the_input_does_not_lie_in_what_is_replaced(name, tmp_path):
    out = tmp_path / "out"
    make(out)
    (tmp_path / "link").symlink_to(out / "masks")
    given = tmp_path / "link" / "0.png" if name == "link" else out / name
    with pytest.raises(InputError, match="is read by this run"):
        make(out, overwrite=True, inputs=["elsewhere", given])
    assert contents(tmp_path).items() >= OLD.items()


HOLD = """
import sys
from pathlib import Path
from tarvis.files.outputs import GrowingFolder, whole_folder
out = Path(sys.argv[2])
with whole_folder(out) if sys.argv[1] == "whole" else GrowingFolder(out).lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def held(out, kind):
    """A process that writes into a folder, until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, kind, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("ending", ["end", "kill"])
def test_two_runs_do_not_write_into_one_folder(ending, tmp_path):
    out = tmp_path / "out"
    with held(out, "whole") as process:
        with pytest.raises(InputError, match=f"{out}: another run is writing there"), whole_folder(out):
            pass
        process.stdin.close() if ending == "end" else process.kill()
    shutil.rmtree(out, ignore_errors=True)
    make(out)  # the lock of a killed run holds nobody up, and what it left is removed
    assert contents(tmp_path) == OLD


def test_one_process_does_not_write_into_a_folder_twice(tmp_path):
    with whole_folder(tmp_path / "out") as folder:
        for _ in range(2):
            with pytest.raises(InputError, match="another run"), whole_folder(tmp_path / "out"):
                pass
        (folder / "a").touch()
    assert contents(tmp_path) == {"out": None, "out/a": ""}


def test_a_run_that_is_killed_as_it_replaces_leaves_the_old_result(tmp_path, monkeypatch):
    out = tmp_path / "out"
    make(out)
    pid = os.fork()
    if not pid:
        monkeypatch.setattr(Path, "rename", lambda self, to: (os.rename(self, to), os._exit(9)))
        make(out, "new", overwrite=True)
    os.waitpid(pid, 0)
    assert not out.exists()
    with pytest.raises(InputError, match="already exists"):
        make(out)
    assert contents(tmp_path) == OLD


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_file_has_the_mode_of_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "out") as folder:
            (folder / "sub").mkdir()
            for name in ("private", "sub/private"):
                os.close(os.open(folder / name, os.O_CREAT, 0o600))
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~umask, path


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", Path("/proc/nowhere/out")):
        with pytest.raises(InputError, match=rf"{out}: cannot be written"), whole_folder(out):
            pass


def test_the_root_of_all_files_is_no_place_for_results():
    with pytest.raises(InputError, match=r"^/: is no folder of results"):
        make(Path("/"), overwrite=True)


def test_errors_of_other_files_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), whole_folder(tmp_path / "out"):
        (tmp_path / "gone").read_text()
    with pytest.raises(InputError, match=r"out: cannot be written"), whole_folder(tmp_path / "out") as folder:
        (folder / "no" / "such").write_text("")


@pytest.mark.parametrize("number", outputs.FULL)
def test_a_full_disk_is_reported_and_leaves_nothing(number, tmp_path):
    with (
        pytest.raises(InputError, match=r"out: cannot be written \("),
        whole_folder(tmp_path / "out"),
    ):
        raise OSError(number, os.strerror(number))
    assert contents(tmp_path) == {}
    assert errno.ENOSPC in outputs.FULL


# Folders that grow by pieces


def add(folder, name, files, *, last="videos/a.json"):
    with folder.piece(name, last) as piece:
        for path, text in files.items():
            (piece / path).parent.mkdir(parents=True, exist_ok=True)
            (piece / path).write_text(text)


A = {"results/a/0.png": "0", "results/a/1.png": "1", "videos/a.json": "done"}
B = {"results/b/0.png": "0", "videos/b.json": "done"}


def seen(folder):
    return {name: text for name, text in contents(folder).items() if text is not None and name[0] != "."}


def test_pieces_add_up_and_replace_themselves(tmp_path):
    folder = GrowingFolder(tmp_path)
    with folder.lock():
        add(folder, "a", A)
        add(folder, "b", B)
        assert seen(tmp_path) == A | B
        add(folder, "a", {"results/a/0.png": "new", "videos/a.json": "done"})
    assert seen(tmp_path) == B | {"results/a/0.png": "new", "videos/a.json": "done"}
    folder.clear()
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("name", ["results/a/0.png", "results/a/mine.txt", "notes", "run.json"])
def test_what_is_of_no_piece_is_not_removed(name, tmp_path):
    folder = GrowingFolder(tmp_path)
    add(folder, "a", A)
    (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=f"'{name}' in it"):
        folder.clear()
    assert contents(tmp_path) == before


def test_a_piece_replaces_nothing_but_itself_and_follows_no_link(tmp_path):
    folder = GrowingFolder(tmp_path / "out")
    add(folder, "a", A)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"results/a/0.png: will not be overwritten"):
        add(folder, "b", {"results/a/0.png": "other"})
    assert contents(tmp_path) == before
    add(folder, "b", {"results/a/0.png": "0"})  # as it is
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "viz").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="viz: is a link"):
        add(folder, "c", {"viz/c.mp4": "c"})
    assert contents(tmp_path / "elsewhere") == {}


@pytest.mark.parametrize("place", ["..", "absolute", "link"])
def test_a_record_that_leads_elsewhere_removes_nothing_there(tmp_path, place):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "0").write_text("0")
    folder = GrowingFolder(tmp_path / "out")
    add(folder, "a", {"kept": "1"})
    if place == "link":
        (tmp_path / "out" / "link").symlink_to(elsewhere)
    name = {"..": "../elsewhere/0", "absolute": str(elsewhere / "0"), "link": "link/0"}[place]
    edit(tmp_path / "out/.tarvis/a.json", ["files"], lambda files: files | {name: sha256(b"0").hexdigest()})
    add(folder, "a", {"kept": "2"})
    assert contents(elsewhere) == {"0": "0"}
    assert (tmp_path / "out" / "kept").read_text() == "2"


def test_a_piece_that_fails_changes_nothing(tmp_path):
    folder = GrowingFolder(tmp_path)
    add(folder, "a", A)
    before = contents(tmp_path)

    def fail():
        with folder.piece("a") as piece:
            (piece / "results").mkdir()
            raise InputError(f"{piece / 'results'}: bad")

    with pytest.raises(InputError, match=f"^{tmp_path}/results: bad$"):
        fail()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("moment", range(8))
def test_a_piece_that_is_killed_at_any_moment_can_be_made_again(moment, tmp_path, monkeypatch):
    folder = GrowingFolder(tmp_path)
    add(folder, "a", A)
    pid = os.fork()
    if not pid:
        calls = iter(range(100))

        def killed(change):
            def inner(*args, **kwargs):
                if next(calls) == moment:
                    os._exit(9)
                return change(*args, **kwargs)

            return inner

        for name in ("unlink", "replace"):
            monkeypatch.setattr(Path, name, killed(getattr(Path, name)))
        monkeypatch.setattr(os, "replace", killed(os.replace))
        add(folder, "a", {name: f"new {text}" for name, text in A.items()})
        os._exit(0)
    os.waitpid(pid, 0)
    if not (tmp_path / "videos/a.json").exists() or (tmp_path / "videos/a.json").read_text() == "new done":
        assert set(seen(tmp_path)) <= set(A)
    else:
        assert seen(tmp_path) == A
    with folder.lock():
        add(folder, "a", A)
    assert seen(tmp_path) == A
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]
    folder.clear()
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("first", "second", "is_free"),
    [
        pytest.param("", "", False, marks=pytest.mark.slow),
        pytest.param("", "1-2", False, marks=pytest.mark.slow),
        pytest.param("1-2", "", False, marks=pytest.mark.slow),
        ("1-2", "1-2", False),
        ("1-2", "2-2", True),
    ],
)
def test_parts_are_written_at_the_same_time_but_no_part_twice(first, second, is_free, tmp_path):
    out = tmp_path / "new" / "out"
    with held(out, first) as process:
        if is_free:
            with GrowingFolder(out).lock(second):
                process.stdin.close()
                process.wait()
        else:
            with pytest.raises(InputError, match="another run"), GrowingFolder(out).lock(second):
                pass
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
