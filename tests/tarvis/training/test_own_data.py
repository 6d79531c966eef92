"""From own data to masks: fine-tune on a file, then find its classes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tarvis import infer
from tarvis.datasets.registry import BENCHMARKS
from tarvis.demo.synthetic_benchmarks import make_benchmark
from tarvis.model.weights import BUNDLED, load_weights, read_config

TINY = Path(__file__).parents[3] / "configs" / "tiny.yaml"
OWN = str(TINY.with_name("own.yaml"))
FAST = ("data.num_workers=0", "loss.points=64", "loss.semantic_points=64", "data.sets.toys.min_sizes=[64]")
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
    assert "start/000001.pth: of another network (model.hidden_dim is 64, here 128)" in err


def test_own_data_is_learned_from_the_bundled_weights(own, run):
    options = ("--cfg", OWN, "--finetune_from", str(BUNDLED))
    code, told, err = run("bundled", f"data.train=[{own}]", *FAST, *FEW, options=options)
    assert code == 0, err
    assert f"starts from {BUNDLED}; class queries of toys start at random" in err
    state, config = load_weights(told["checkpoint"])
    before, start = load_weights(BUNDLED)
    assert config.class_sets == {"synthetic": 8, "toys": len(config.own_classes["toys"].names)}
    assert config.backbone == start.backbone == "efficientnet_lite0"
    learned = state | {"queries.semantic": state["queries.semantic"][:9]}
    for name, value in learned.items():  # in a step at the rate of a warm-up
        torch.testing.assert_close(value, before[name].to(value), rtol=0, atol=1e-3)


def test_a_file_that_has_got_more_classes_begins_with_queries_of_its_own(own, finished, run, runs):
    options = ("--cfg", OWN, "--finetune_from")
    changes = (f"data.train=[{own}]", *FAST, *FEW)
    assert run("few", *changes, options=(*options, str(finished)))[0] == 0
    tree = json.loads(own.read_text())
    tree["categories"].append({"id": 99, "name": "toy 99"})
    own.write_text(json.dumps(tree))
    code, _, err = run("few", "optim.steps=2")
    assert code == 2
    assert "A run keeps its network and classes; for others give a new --model_dir" in err
    code, _, err = run("more", *changes, options=(*options, str(runs / "few")))
    assert code == 0, err
    assert "class queries of toys start at random" in err
    config = read_config(runs / "more" / "config.yaml")
    assert config.class_sets == {"synthetic": 8, "toys": len(tree["categories"])}
    assert "toy 99" in config.own_classes["toys"].names
