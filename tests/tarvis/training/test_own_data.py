"""From own data to masks: fine-tune on a file, then find its classes."""

import json
import shutil

import pytest
import yaml

from tarvis import infer
from tarvis.data.synthetic_benchmarks import make_benchmark
from tarvis.datasets.benchmarks import BENCHMARKS
from tarvis.model.weights import load_weights, read_config

FEW = ("optim.steps=1", "optim.batch_size=1")


@pytest.fixture
def own(tmp_path):
    """A file in YouTube-VIS's format with frames beside it, whose classes no table has."""
    make_benchmark("youtube_vis_2021", tmp_path / "made", num_videos=1, num_frames=3, size=(64, 96))
    roots = BENCHMARKS["youtube_vis_2021"].find(tmp_path / "made", "val")
    tree = json.loads(roots.annotations.read_text())
    used = sorted({entry["category_id"] for entry in tree["annotations"]})
    tree["categories"] = [{"id": k, "name": f"toy {k}"} for k in used]
    path = tmp_path / "toys.json"
    path.write_text(json.dumps(tree))
    shutil.copytree(roots.images, tmp_path / "toys")
    return path


@pytest.fixture
def finished(run, runs):
    code, _, err = run("start", *FEW)
    assert code == 0, err
    return runs / "start"


def test_a_run_on_own_data_adds_its_classes_which_can_then_be_found(
    own, finished, run, runs, tmp_path, capsys
):
    code, told, err = run("toys", f"data.train=[{own}]", *FEW, options=("--finetune_from", str(finished)))
    assert code == 0, err
    assert "class queries of toys start at random" in err
    config = read_config(runs / "toys" / "config.yaml")
    assert list(config.class_sets) == ["synthetic", "toys"]
    assert config.own_classes["toys"].names[0].startswith("toy ")
    state, _ = load_weights(told["checkpoint"])
    before, _ = load_weights(finished / "000001.pth")
    assert len(state["queries.semantic"]) == len(before["queries.semantic"]) + config.class_sets["toys"]

    frames = next((tmp_path / "toys").iterdir())
    out = tmp_path / "out"
    argv = [
        str(frames),
        "--weights",
        told["checkpoint"],
        "--out",
        str(out),
        "--task",
        "vis",
        "--dataset",
        "toys",
    ]
    capsys.readouterr()
    assert infer.main(argv) == 0, capsys.readouterr().err
    tracks = json.loads((out / "tracks.json").read_text())["tracks"]
    assert tracks
    assert all(track["category"].startswith("toy ") for track in tracks)


def test_weights_of_the_sets_of_the_file_do_not_bind_other_sets(own, run, runs):
    tree = yaml.safe_load((runs / "tiny.yaml").read_text())
    tree["data"] |= {"train": ["synthetic", "davis"], "weights": [0.5, 0.5]}
    (runs / "two.yaml").write_text(yaml.safe_dump(tree))
    code, _, err = run("own", f"data.train=[{own}]", *FEW, options=("--cfg", str(runs / "two.yaml")))
    assert code == 0, err


def test_the_network_of_the_start_can_be_changed_only_on_purpose(finished, run):
    code, _, err = run("other", "model.hidden_dim=128", *FEW, options=("--finetune_from", str(finished)))
    assert code == 2
    assert "weights do not fit" in err
