"""The verb from data to number, on tiny synthetic benchmarks, with a network that has learned nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest

from tarvis.datasets.registry import BENCHMARKS
from tarvis.evaluate import main
from tarvis.files.outputs import GrowingFolder

SEVEN = [name for name in BENCHMARKS if name != "youtube_vis_2019"]
SMALL = ["--min-size", "0", "--clip-length", "4", "--overlap", "2"]


@pytest.fixture
def arguments(shapes, weights):
    """Of a run into a folder."""

    def of(name, out, *extra):
        classes = shapes(name) / "classes.json"
        mapped = ["--classes", classes] if classes.exists() else []
        found = [name, "--data", shapes(name), "--weights", weights, "--out", out, *SMALL, *mapped, *extra]
        return [str(argument) for argument in found]

    return of


@pytest.fixture
def run(arguments, capsys):
    """Runs; gives exit code, what stdout's one line says, and stderr."""

    def go(name, out, *extra):
        code = main(arguments(name, out, *extra))
        printed = capsys.readouterr()
        return code, json.loads(printed.out) if printed.out else None, printed.err

    return go


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("name", SEVEN)
def test_from_data_to_number_and_submission(name, run, shapes, tmp_path, capsys):
    out = tmp_path / "run"
    code, summary, err = run(name, out, "--submission")
    assert code == 0, err
    assert summary["scores"]
    assert summary["scores"].items() <= json.loads((out / "scores.json").read_text()).items()
    with zipfile.ZipFile(summary["submission"]) as archive:
        assert {entry: archive.read(entry) for entry in archive.namelist()} == files(out / "results")

    truth = BENCHMARKS[name].find(shapes(name), "val").truth
    assert main([name, "--results", str(out / "results"), "--truth", str(truth)]) == 0
    assert json.loads(capsys.readouterr().out)["scores"] == summary["scores"]


def test_without_weights_the_network_of_the_package_is_scored_here(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["davis", "--data", str(shapes("davis")), "--videos", "shapes-0", "--min-size", "64"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == "davis_val_small"
    settings = json.loads((tmp_path / "davis_val_small/run.json").read_text())["settings"]
    assert (settings["min_size"], settings["clip_length"]) == (64, 24)


def test_a_finished_video_is_not_inferred_again_unless_asked(run, tmp_path):
    out = tmp_path / "run"
    run("davis", out)
    times = {path: path.stat().st_mtime_ns for path in (out / "videos").iterdir()}
    lost = out / "videos" / "shapes-1.json"
    lost.unlink()
    code, _, _ = run("davis", out)
    assert code == 0
    changed = {path for path in times if path.stat().st_mtime_ns != times[path]}
    assert changed == {lost}
    run("davis", out, "--overwrite")
    assert all(path.stat().st_mtime_ns != times[path] for path in times)


def test_videos_can_be_chosen_and_are_scored_alone(run, shapes, tmp_path):
    code, summary, _ = run("davis", tmp_path / "run", "--videos", "shapes-0", "shapes-2")
    assert code == 0
    truth = BENCHMARKS["davis"].find(shapes("davis"), "val").truth
    chosen = BENCHMARKS["davis"].score(tmp_path / "run" / "results", truth, "val", ["shapes-0", "shapes-2"])
    assert summary["scores"].items() <= chosen.items()
    assert {name.split("/")[1][:8] for name in chosen if name.startswith("per_object")} == {
        "shapes-0",
        "shapes-2",
    }
    assert not (tmp_path / "run" / "scores.json").exists()  # those of a part are not the benchmark's


def test_shards_add_up_to_the_whole(run, tmp_path):
    run("kitti_step", tmp_path / "whole")
    code, summary, err = run("kitti_step", tmp_path / "parts", "--shard", "1/2")
    assert code == 0
    assert "scores" not in summary
    assert summary["missing"] == 1
    assert "2 of 3 videos are finished; run the other shards" in err
    _, summary, err = run("kitti_step", tmp_path / "parts", "--shard", "2/2")
    assert summary["missing"] == 0  # not scored: another shard might be writing still
    assert "3 of 3 videos are finished; run this command without --shard" in err
    _, summary, _ = run("kitti_step", tmp_path / "parts")
    assert "STQ" in summary["scores"]
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_pictures_to_look_at(run, tmp_path):
    run("vipseg", tmp_path / "run", "--viz", "--videos", "0_synthetic")
    folder = tmp_path / "run" / "viz" / "0_synthetic"
    assert (folder / "overlay.mp4").stat().st_size > 0
    assert (folder / "contact_sheet.png").stat().st_size > 0


def test_pictures_of_finished_videos_are_drawn_when_they_are_asked_for(run, tmp_path):
    run("davis", tmp_path / "run")
    run("davis", tmp_path / "run", "--viz")
    assert len(list((tmp_path / "run" / "viz").glob("*/overlay.mp4"))) == 3


def test_burst_by_masks(run, tmp_path):
    code, summary, err = run("burst", tmp_path / "run", "--task", "vos")
    assert code == 0, err
    assert "HOTA/all" in summary["scores"]


@pytest.mark.slow
def test_two_processes_make_the_files_of_one(arguments, run, tmp_path):
    run("burst", tmp_path / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "tarvis.evaluate", *arguments("burst", tmp_path / "two")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_a_killed_run_goes_on_and_makes_the_same_files(arguments, run, tmp_path):
    run("vipseg", tmp_path / "whole")
    out = tmp_path / "killed"
    with subprocess.Popen(
        [sys.executable, "-m", "tarvis.evaluate", *arguments("vipseg", out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 600
        while process.poll() is None and not any(out.glob("videos/*.json")):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert any(out.glob("videos/*.json"))
    code, _, err = run("vipseg", out)
    assert code == 0, err
    assert files(out) == files(tmp_path / "whole")


def test_what_a_killed_write_left_is_replaced(run, tmp_path):
    run("vipseg", tmp_path / "whole")
    out = tmp_path / "run"
    run("vipseg", out, "--videos", "0_synthetic")
    picture = next((out / "results" / "pan_pred" / "0_synthetic").iterdir())
    (out / ".tarvis" / f".piece.{'0' * 8}.part").mkdir()
    picture.rename(out / ".tarvis" / f".piece.{'0' * 8}.part" / picture.name)
    (out / "videos" / "0_synthetic.json").unlink()
    assert run("vipseg", out)[0] == 0
    assert files(out) == files(tmp_path / "whole")


def test_a_video_that_is_inferred_again_stays_whole_until_it_is(run, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run("davis", out)

    def killed(*_):
        raise OSError("killed")

    monkeypatch.setattr(BENCHMARKS["davis"], "write", killed)
    before = files(out)
    assert run("davis", out, "--overwrite")[0] == 2
    assert files(out) == before


@pytest.mark.slow
def test_shards_may_start_at_the_same_time(arguments, run, tmp_path):
    run("davis", tmp_path / "whole")
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tarvis.evaluate", *arguments("davis", tmp_path / "run", "--shard", part)]
        )
        for part in ("1/3", "2/3", "3/3")
    ]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert run("davis", tmp_path / "run")[0] == 0
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_a_missing_frame_is_said_before_anything_is_inferred(run, shapes, tmp_path):
    shutil.copytree(shapes("davis"), tmp_path / "data")
    missing = next((tmp_path / "data").rglob("JPEGImages/480p/shapes-2/00005.jpg"))
    missing.unlink()
    missing.symlink_to("nowhere")
    code, _, err = run("davis", tmp_path / "run", "--data", tmp_path / "data")
    assert code == 2
    assert f"{missing}: not found" in err
    assert not (tmp_path / "run" / "results").exists()


@pytest.mark.parametrize("name", ["youtube_vis_2021", "burst"])
def test_results_may_be_a_file_of_any_name_and_the_truth_the_download(name, run, shapes, tmp_path, capsys):
    _, summary, _ = run(name, tmp_path / "run")
    theirs = (tmp_path / "run" / "results" / "results.json").rename(tmp_path / "theirs.json")
    assert main([name, "--results", str(theirs), "--data", str(shapes(name)), "--submission"]) == 0
    with zipfile.ZipFile(json.loads(capsys.readouterr().out)["submission"]) as archive:
        assert {each: archive.read(each) for each in archive.namelist()} == {
            "results.json": theirs.read_bytes()
        }
    assert main([name, "--results", str(theirs), "--truth", str(shapes(name))]) == 0
    assert json.loads(capsys.readouterr().out)["scores"] == summary["scores"]


def test_what_is_no_result_is_not_submitted(run, tmp_path):
    run("davis", tmp_path / "run")
    (tmp_path / "run/results/global_results-val.csv").touch()
    _, summary, _ = run("davis", tmp_path / "run", "--submission")
    assert all(name.endswith(".png") for name in zipfile.ZipFile(summary["submission"]).namelist())


def test_results_of_another_run_are_not_mixed_in(run, tmp_path):
    out = tmp_path / "run"
    run("davis", out)
    code, _, err = run("davis", out, "--amp", "bf16")
    assert code == 2
    assert "has results of another run (amp 'off' instead of 'bf16'); name another --out" in err
    code, _, err = run("davis", out, "--amp", "bf16", "--overwrite", "--shard", "1/2")
    assert code == 2
    assert "or remove them" in err
    assert run("davis", out, "--amp", "bf16", "--overwrite")[0] == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "is in use and holds no run" in run("davis", tmp_path / "mine")[2]


@pytest.mark.parametrize("record", ["{}", "[]", '{"benchmark": "davis"}'])
def test_what_lies_beside_a_foreign_record_is_not_removed(record, run, tmp_path):
    for name in ("run.json", "videos/a.mp4", "results/thesis.tex"):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text(record)
    before = files(tmp_path)
    code, _, err = run("davis", tmp_path / "mine", "--overwrite")
    assert code == 2
    assert "'results' in it is not ours" in err
    assert files(tmp_path) == before


def test_what_was_put_beside_results_is_not_removed_with_them(run, tmp_path):
    run("davis", tmp_path / "run", "--videos", "shapes-0")
    (tmp_path / "run" / "results" / "notes.txt").write_text("mine")
    before = files(tmp_path)
    code, _, err = run("davis", tmp_path / "run", "--overwrite", "--amp", "bf16")
    assert code == 2
    assert "'results/notes.txt' in it is not ours" in err
    assert files(tmp_path) == before


def test_a_damaged_frame_ends_a_run_that_keeps_the_videos_before_it(run, shapes, tmp_path):
    shutil.copytree(shapes("davis"), tmp_path / "data")
    for name in ("shapes-1", "shapes-0"):
        frame = next((tmp_path / "data").rglob(f"JPEGImages/480p/{name}/00002.jpg"))
        whole = frame.read_bytes()
        frame.write_bytes(whole[:100])
        code, summary, err = run("davis", tmp_path / name, "--data", tmp_path / "data")
        assert (code, summary) == (3 if name == "shapes-1" else 2, None)
        record = json.loads((tmp_path / name / "run.json").read_text())
        finished = sorted(path.stem for path in (tmp_path / name).glob("videos/*"))
        assert (record["complete"], finished) == (False, ["shapes-0"] if name == "shapes-1" else [])
        assert (record["frames"] > 0) == bool(finished)
        assert str(frame) in err.splitlines()[-1]
        frame.write_bytes(whole)
        assert run("davis", tmp_path / name, "--data", tmp_path / "data")[0] == 0
        assert json.loads((tmp_path / name / "run.json").read_text())["complete"]


def test_two_runs_do_not_write_into_one_folder(run, tmp_path):
    with GrowingFolder(tmp_path / "run").lock():
        code, _, err = run("davis", tmp_path / "run")
    assert code == 2
    assert f"{tmp_path / 'run'}: another run is writing there" in err
    assert not (tmp_path / "run").exists()


def test_an_archive_beside_the_results_of_others_is_not_replaced_by_another(run, shapes, tmp_path, capsys):
    run("davis", tmp_path / "run", "--submission")
    archive, truth = tmp_path / "run" / "davis_val.zip", str(shapes("davis"))
    whole = archive.read_bytes()
    command = ["davis", "--results", str(tmp_path / "run" / "results"), "--data", truth, "--submission"]
    assert main(command) == 0
    archive.write_bytes(b"mine")
    assert main(command) == 2
    assert f"{archive}: already exists, with other content" in capsys.readouterr().err
    assert archive.read_bytes() == b"mine"
    archive.unlink()
    assert main(command) == 0
    assert archive.read_bytes() == whole


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--split", "minival"], "davis has no split 'minival'; it has: val, test-dev, train"),
        (["--videos", "bear"], "no video 'bear' in this split, which has: shapes-0, shapes-1, shapes-2"),
        (["--shard", "3/2"], "--shard: expected I/N with 1 <= I <= N, got '3/2'"),
        (["--task", "vis"], "davis is run with vos, not vis"),
        (["--submission", "--videos", "shapes-0"], "--submission: a server wants all videos"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--data", "/nonexistent"], "/nonexistent: no such folder"),
        (["--images", "/nonexistent"], "/nonexistent"),
        (["--truth", "/nonexistent"], "/nonexistent: not found"),
        (["--results", "/nonexistent"], "give either --weights"),
        (["--dataset", "synthetic"], "--dataset: davis has classes and settings of its own"),
        (["--overlap", "4"], "overlap must be 0 .. clip length - 1"),
        (["--weights", "/nonexistent"], "/nonexistent: no such file"),
    ],
)
def test_a_wrong_wish_is_one_line(run, tmp_path, extra, message):
    code, summary, err = run("davis", tmp_path / "run", *extra)
    assert code == 2
    assert summary is None
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_without_classes_it_says_which_the_weights_have(arguments, tmp_path, capsys):
    wanted = arguments("ovis", tmp_path / "run")
    del wanted[wanted.index("--classes") : wanted.index("--classes") + 2]
    assert main(wanted) == 2
    assert "these weights have no classes of 'ovis'; they have: synthetic" in capsys.readouterr().err


def test_frames_of_another_size_than_the_annotations_say(run, shapes, tmp_path):
    annotations = tmp_path / "other.json"
    tree = json.loads((BENCHMARKS["ovis"].find(shapes("ovis"), "val").annotations).read_text())
    for entry in (*tree["videos"], *tree.get("annotations", [])):
        entry["height"] = 32
    tree["annotations"] = []
    annotations.write_text(json.dumps(tree))
    code, _, err = run("ovis", tmp_path / "run", "--annotations", annotations)
    assert code == 2
    assert "expected a picture of (32, 96), as the annotations say, got (64, 96)" in err


def test_a_split_without_truth_gives_no_number_but_the_submission(run, shapes, tmp_path):
    annotations = tmp_path / "valid.json"
    tree = json.loads((BENCHMARKS["ovis"].find(shapes("ovis"), "val").annotations).read_text())
    del tree["annotations"]
    annotations.write_text(json.dumps(tree))
    images = BENCHMARKS["ovis"].find(shapes("ovis"), "val").images
    code, summary, err = run(
        "ovis", tmp_path / "run", "--annotations", annotations, "--images", images, "--submission"
    )
    assert code == 0
    assert "scores" not in summary
    assert "found no truth, so there is no score; say where it is with --truth" in err
    assert zipfile.ZipFile(summary["submission"]).namelist() == ["results.json"]


def test_what_is_neither_a_benchmark_nor_own_data_lists_both(weights, capsys):
    assert main(["davos", "--weights", str(weights)]) == 2
    err = capsys.readouterr().err
    assert "davos: expected a benchmark (youtube_vis_2019, " in err
    assert "or own data: a .json file as YouTube-VIS has it, or a folder of frames and masks" in err
