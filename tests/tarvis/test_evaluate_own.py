"""The same verb on own data: a file of tracks, a folder of masks."""

import dataclasses
import json
import shutil

import pytest
import torch

from tarvis.config import OwnClasses
from tarvis.evaluate import main
from tarvis.files.atomic import write_json
from tarvis.model import build_model
from tarvis.model.weights import save_weights

SMALL = ["--min-size", "0", "--clip-length", "4", "--overlap", "2"]
OWN = ("Boat", "Robot", "Turtle", "Fish", "Bird", "Lizard")
"""What the shapes are called in own data, and a class that is not in it."""


@pytest.fixture(scope="module")
def own_weights(tmp_path_factory, config):
    """Weights that have learned a class set of their own, and another one."""
    torch.manual_seed(10)
    own = {"mine": OwnClasses(OWN, (True,) * len(OWN))}
    config = dataclasses.replace(config, class_sets={"synthetic": 8, "mine": len(OWN)}, own_classes=own)
    network = build_model(config)
    with torch.no_grad():
        for group in ("instance", "semantic"):
            for parameter in network.decoder.proj_layers[group].parameters():
                parameter.mul_(4)
    path = tmp_path_factory.mktemp("mine") / "mine.safetensors"
    save_weights(path, network.state_dict(), config)
    return path


@pytest.fixture
def own(shapes, own_weights, tmp_path, capsys):
    """Makes own data of a benchmark's; runs on it as `run` does."""

    def go(name, *extra):
        if not (path := tmp_path / name).exists():
            if name == "my_val":
                shutil.copytree(shapes("davis") / "JPEGImages/480p", path / "JPEGImages")
                shutil.copytree(shapes("davis") / "Annotations/480p", path / "Annotations")
            else:
                shutil.copytree(shapes("ovis") / "valid", tmp_path / "images")
                tree = json.loads((shapes("ovis") / "annotations_valid.json").read_text())
                tree["categories"] = [each for each in tree["categories"] if each["name"] in OWN]
                path.write_text(json.dumps(tree))
        chosen = [] if "--results" in extra else ["--weights", own_weights, "--out", tmp_path / "own", *SMALL]
        code = main([str(each) for each in (path, *chosen, *extra)])
        printed = capsys.readouterr()
        return code, json.loads(printed.out) if printed.out else None, printed.err

    return go


def test_own_tracks_are_scored_by_the_names_of_classes(own, tmp_path):
    code, summary, err = own("my_val.json", "--viz", "--shard", "1/2")
    assert code == 0, err
    assert summary["missing"] == 1
    code, summary, err = own("my_val.json", "--viz")
    assert code == 0, err
    assert "the weights" not in err  # all classes are known
    assert summary["benchmark"] == "my_val"
    assert 0 <= summary["scores"]["AP"] <= 1
    record = json.loads((tmp_path / "own/run.json").read_text())
    tree = json.loads((tmp_path / "my_val.json").read_text())
    names = [each["name"] for each in tree["categories"]]
    assert record["classes"] == {
        "class_set": "mine",
        "labels": [names.index(name) if name in names else None for name in OWN],
    }
    found = json.loads((tmp_path / "own/results/results.json").read_text())
    assert found
    assert {each["category_id"] for each in found} <= {each["id"] for each in tree["categories"]}
    assert len(list((tmp_path / "own/viz").glob("*/overlay.mp4"))) == 3
    assert own("my_val.json", "--results", tmp_path / "own/results")[1]["scores"] == summary["scores"]


def test_own_classes_that_the_weights_do_not_know_are_said(own, tmp_path):
    own("my_val.json", "--videos", "none")
    tree = json.loads((tmp_path / "my_val.json").read_text())
    tree["categories"][0]["name"], first = "Ship", tree["categories"][0]["name"]
    (tmp_path / "my_val.json").write_text(json.dumps(tree))
    code, _, err = own("my_val.json")
    assert code == 0
    assert "the weights' 'mine' has no Ship, so these classes are not found" in err
    write_json(tmp_path / "map.json", {"class_set": "mine", "names": {first: "Ship"}})
    code, _, err = own("my_val.json", "--classes", tmp_path / "map.json", "--out", tmp_path / "mapped")
    assert code == 0, err
    labels = json.loads((tmp_path / "mapped/run.json").read_text())["classes"]["labels"]
    assert labels == [0 if name == first else None for name in OWN]
    code, _, err = own("my_val.json", "--dataset", "synthetic", "--out", tmp_path / "other")
    assert code == 2
    assert "my_val and the class set 'synthetic' of the weights have no class in common: " in err


@pytest.mark.parametrize("task", ["vos", "pet"])
def test_own_masks_are_followed_and_scored(own, tmp_path, task):
    code, summary, err = own("my_val", "--task", task, "--videos", "shapes-0", "shapes-2")
    assert code == 0, err
    assert 0 <= summary["scores"]["J&F-Mean"] <= 1
    assert json.loads((tmp_path / "own/run.json").read_text())["task"] == task
    code, whole, err = own("my_val", "--task", task)
    assert code == 0, err
    assert len(list((tmp_path / "own/videos").iterdir())) == 3
    assert own("my_val", "--results", tmp_path / "own/results")[1]["scores"] == whole["scores"]


def test_own_masks_score_as_those_of_the_benchmark(own, shapes, own_weights, tmp_path, capsys):
    where = ["--data", shapes("davis"), "--out", tmp_path / "davis", "--weights", own_weights, *SMALL]
    assert main(["davis", *map(str, where)]) == 0
    theirs = json.loads(capsys.readouterr().out)["scores"]
    assert own("my_val")[1]["scores"] == theirs


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    [
        ("my_val.json", ["--submission"], "--submission: no server waits for own data"),
        ("my_val.json", ["--data", "x"], "--data: own data is where "),
        ("my_val.json", ["--task", "vos"], "my_val is run with vis, not vos"),
        ("my_val.json", ["--split", "val"], "my_val has no split 'val'; it has: all"),
        ("my_val.json", ["--dataset", "coco"], "no classes of 'coco'; they have: synthetic, mine"),
        (
            "my_val.json",
            ["--dataset", "mine", "--classes", "x"],
            "--classes names a class set: drop --dataset",
        ),
        ("my_val", ["--classes", "x"], "--classes: my_val has objects without a class"),
        ("my_val", ["--dataset", "mine"], "no settings for dataset 'mine'"),
    ],
)
def test_a_wrong_wish_for_own_data_is_one_line(own, name, extra, message):
    code, _, err = own(name, *extra)
    assert code == 2
    assert message in err.splitlines()[-1]


def test_weights_of_several_class_sets_want_one_named(own, tmp_path, config):
    several = dataclasses.replace(config, class_sets={"synthetic": 8, "ovis": 25})
    save_weights(tmp_path / "several.safetensors", build_model(several).state_dict(), several)
    code, _, err = own("my_val.json", "--weights", tmp_path / "several.safetensors")
    assert code == 2
    assert "name the class set of the weights with --dataset; they have: synthetic, ovis" in err
    named = ["--weights", tmp_path / "several.safetensors", "--dataset", "ovis", "--videos", "00000001"]
    code, _, err = own("my_val.json", *named)
    assert code == 0, err
    settings = json.loads((tmp_path / "own/run.json").read_text())["settings"]
    assert settings["top_k"] == 20  # as published for OVIS
