"""A folder of graphs takes the place of weights on the command line."""

import json

import cv2
import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from tarvis import evaluate, infer
from tarvis.data.synthetic import synthetic_clip
from tarvis.demo.synthetic_benchmarks import make_benchmark
from tarvis.files.pictures import encode_ids


@pytest.fixture
def video(tmp_path):
    """Makes a folder of frames of the size of the graphs, and the mask of an object in the first."""

    def make(num_frames):
        folder = tmp_path / "frames"
        folder.mkdir()
        clip = synthetic_clip(0, num_frames, (60, 100), come_and_go=False)
        for t, frame in enumerate(clip.frames):
            cv2.imwrite(str(folder / f"{t:05}.png"), frame[..., ::-1])
        mask = (clip.instance[0] > 0).astype(np.uint8)
        (tmp_path / "00000.png").write_bytes(encode_ids(mask, np.eye(256, 3, dtype=np.uint8)))
        return folder

    return make


def segment(video, out, *options):
    return infer.main(
        [str(video), "--out", str(out), "--device", "cpu", "--min-score", "0", *map(str, options)]
    )


@pytest.mark.parametrize(
    ("task", "options"), [("vis", []), pytest.param("vos", ["--masks", "00000.png"], marks=pytest.mark.slow)]
)
def test_an_engine_finds_what_its_weights_find(graphs, weights, video, tmp_path, task, options, monkeypatch):
    frames = video(3)
    monkeypatch.chdir(tmp_path)
    options = ["--task", task, *options]
    clips = ["--clip-length", 2, "--overlap", 1, "--min-size", 60]
    assert segment(frames, tmp_path / "engine", "--engine", graphs(task), *options) == 0
    assert segment(frames, tmp_path / "weights", "--weights", weights, *options, *clips) == 0
    ours, theirs = (
        json.loads((tmp_path / name / "tracks.json").read_text()) for name in ("weights", "engine")
    )
    assert len(theirs["tracks"]) == len(ours["tracks"]) > 0
    for a, b in zip(theirs["tracks"], ours["tracks"], strict=True):
        assert (a["id"], a.get("category")) == (b["id"], b.get("category"))
        assert a.get("score") == pytest.approx(b.get("score"), abs=1e-3)


def test_a_video_whose_last_clip_is_short_is_refused_at_once(graphs, video, tmp_path, capsys):
    assert (
        segment(video(3), tmp_path / "out", "--engine", graphs("vis"), "--task", "vis", "--overlap", 0) == 2
    )
    assert "--dynamic frames" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_frames_of_another_shape_are_refused(graphs, video, tmp_path, capsys):
    code = segment(video(2), tmp_path / "out", "--engine", graphs("vis"), "--task", "vis", "--min-size", 200)
    assert code == 2
    assert "--size 200x333" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--compile"], ["--amp", "bf16"]])
def test_an_engine_is_not_compiled_again(graphs, video, tmp_path, capsys, option):
    assert segment(video(2), tmp_path / "out", "--engine", graphs("vis"), "--task", "vis", *option) == 2
    assert "drop --compile and --amp" in capsys.readouterr().err


def test_a_folder_that_is_no_engine_is_refused(video, tmp_path, capsys):
    assert segment(video(2), tmp_path / "out", "--engine", tmp_path, "--task", "vis") == 2
    assert "manifest.json" in capsys.readouterr().err


def test_weights_and_engine_together_are_one_too_many(capsys, tmp_path):
    with pytest.raises(SystemExit):
        infer.main(["x", "--task", "vis", "--out", "y", "--weights", "w", "--engine", "e"])
    assert "not allowed with" in capsys.readouterr().err
    argv = ["davis", "--weights", "w", "--engine", "e", "--out", str(tmp_path / "out")]
    assert evaluate.main(argv) == 2
    assert "either --weights or --engine" in capsys.readouterr().err


@pytest.mark.slow
def test_a_benchmark_is_inferred_by_an_engine_and_scored(graphs, tmp_path, capsys):
    make_benchmark("davis", tmp_path / "davis", num_videos=1, size=(60, 100), num_objects=1)
    argv = ["davis", "--engine", graphs("vos"), "--data", tmp_path / "davis", "--out", tmp_path / "run"]
    assert evaluate.main([*map(str, argv), "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    clips = {name: run["settings"][name] for name in ("clip_length", "overlap", "min_size")}
    assert clips == {"clip_length": 2, "overlap": 1, "min_size": 60}
