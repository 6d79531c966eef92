"""Weights: published names both ways, strict errors that say what is wrong, files that are safe to read."""

import argparse
import copy
import dataclasses
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tarvis.config import ModelConfig
from tarvis.model import build_model
from tarvis.model.backbone import build_backbone
from tarvis.model.published import config_from_published, from_published, to_published
from tarvis.model.weights import (
    WeightsError,
    load_backbone,
    load_into,
    load_weights,
    read_config,
    save_weights,
)
from tests.tarvis.networks import SMALLEST

MANIFESTS = Path(__file__).parents[2] / "goldens" / "state_dict"
ZEPTO = dataclasses.replace(SMALLEST, class_sets={"ovis": 25, "youtube_vis_2021": 40})
SMALL = dataclasses.replace(ZEPTO, backbone="resnet50")
PUBLISHED_CONFIG = {
    "MODEL": {
        "BACKBONE": "ResNet50",
        "CROSS_ATTENTION_TYPE": "hard_masked",
        "NUM_BACKGROUND_QUERIES": 1,
        "NUM_OBJECT_QUERIES": 128,
        "NUM_VOS_QUERIES_PER_OBJECT": 4,
    },
    "TRAINING": {"DATASET_LIST": ["YOUTUBE_VIS", "DAVIS", "OVIS"], "BASE_LR": 1e-4},
    "DATASETS": {
        "OVIS": {"TYPE": "instance_seg", "NUM_CLASSES": 25},
        "YOUTUBE_VIS": {"TYPE": "instance_seg", "NUM_CLASSES": 40},
        "VIPSEG": {"TYPE": "panoptic_seg", "NUM_CLASSES": 124},
        "DAVIS": {"TYPE": "vos"},
    },
}


def meta_model(config):
    with torch.device("meta"):
        return build_model(config)


def cheap_state(model):
    """A state of the model's shapes, one number in memory for each tensor."""
    return {
        name: torch.full((), float(i), dtype=value.dtype).expand(value.shape)
        for i, (name, value) in enumerate(model.state_dict().items())
    }


def shapes(state):
    return {name: (tuple(value.shape), value.dtype) for name, value in state.items()}


@pytest.fixture(scope="module")
def atto():
    """Our-name weights of a small network, and its configuration."""
    torch.manual_seed(0)
    return build_model(ZEPTO).state_dict(), ZEPTO


@pytest.mark.parametrize("name", ["resnet50", "swin_tiny", "swin_large"])
def test_published_models_load_and_are_written_back_key_for_key(name):
    rows = json.loads((MANIFESTS / f"{name}.json").read_text())
    published = {key: torch.zeros((), dtype=getattr(torch, dtype)).expand(size) for key, size, dtype in rows}
    published["vos_query_extractor.bg_grid_size"] = torch.tensor([4, 4])
    config = ModelConfig(backbone=name)
    model = meta_model(config)
    load_into(model, from_published(published, config))
    assert shapes(to_published(model.state_dict(), config)) == shapes(published)


@pytest.mark.parametrize("attention", ["hard", "soft"])
def test_names_translate_both_ways_without_loss(attention):
    config = dataclasses.replace(SMALL, attention=attention)
    state = cheap_state(meta_model(config))
    published = to_published(state, config)
    back = from_published(published, config)
    assert list(back) == list(state)
    assert all(torch.equal(back[name].flatten()[:1], state[name].flatten()[:1]) for name in state)
    scales = [key for key in published if key.endswith("scaling_factors")]
    assert len(scales) == (3 if attention == "soft" else 0)
    assert all(published[key].tolist() == [32, 32, 16, 16, 8, 8, 4, 4] for key in scales)


def test_constants_of_published_models_are_checked():
    config = dataclasses.replace(SMALL, attention="soft")
    published = to_published(cheap_state(meta_model(config)), config)
    grid = "vos_query_extractor.bg_grid_size"
    with pytest.raises(WeightsError, match=r"bg_grid_size is not \[4, 4\]"):
        from_published(published | {grid: torch.tensor([8, 8])}, config)
    with pytest.raises(WeightsError, match=r"missing key vos_query_extractor\.bg_grid_size \[2\]"):
        from_published({key: value for key, value in published.items() if key != grid}, config)
    with pytest.raises(WeightsError, match=r"no key of a published model: .*scaling_factors"):
        from_published(published, SMALL)


def test_published_convnext_statistics_in_0_to_1_become_0_to_255():
    state = {"pixel_mean": torch.tensor([123.675]), "pixel_std": torch.tensor([58.395])}
    published = to_published(state, ZEPTO)
    assert published["pixel_mean"].item() == pytest.approx(0.485)
    assert from_published(published, ZEPTO)["pixel_std"].item() == pytest.approx(58.395)


def test_published_configuration_gives_class_sets_in_the_order_of_their_rows():
    config = config_from_published(PUBLISHED_CONFIG)
    assert config == ModelConfig(backbone="resnet50", class_sets={"ovis": 25, "youtube_vis_2021": 40})
    assert list(config.class_sets) == ["ovis", "youtube_vis_2021"]


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("MODEL", "BACKBONE"), "VGG16", "MODEL.BACKBONE: no backbone VGG16"),
        (("MODEL", "CROSS_ATTENTION_TYPE"), "none", "expected hard_masked or soft_masked, got none"),
        (("MODEL", "NUM_BACKGROUND_QUERIES"), 2, "only 1 is supported"),
        (("DATASETS", "OVIS"), {}, "missing key DATASETS.OVIS.TYPE"),
    ],
)
def test_an_unfit_published_configuration_names_its_key(tmp_path, keys, value, message):
    tree = copy.deepcopy(PUBLISHED_CONFIG)
    tree[keys[0]][keys[1]] = value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(WeightsError, match=message) as error:
        read_config(path)
    assert str(path) in str(error.value)


def test_our_configuration_file_is_read_too(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {backbone: swin_base, background_grid: [2, 3]}\n")
    assert read_config(path) == ModelConfig(backbone="swin_base", background_grid=(2, 3))
    with pytest.raises(WeightsError, match=r"nowhere/config\.yaml: no such file$"):
        read_config(tmp_path / "nowhere" / "config.yaml")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_our_files_round_trip_with_their_configuration(tmp_path, atto, suffix):
    state, config = atto
    path = tmp_path / f"w{suffix}"
    save_weights(path, state, config)
    loaded, loaded_config = load_weights(path)
    assert loaded_config == config
    assert list(loaded_config.class_sets) == list(config.class_sets)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no temporary file is left
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    model = meta_model(config)
    load_into(model, loaded)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_published_names_are_read_from_either_kind_of_file(tmp_path, atto, suffix):
    state, config = atto
    path = tmp_path / f"w{suffix}"
    save_weights(path, to_published(state, config), config)
    loaded, _ = load_weights(path)
    assert loaded.keys() == state.keys()


def test_a_published_folder_needs_its_config_yaml_beside_the_weights(tmp_path):
    config = config_from_published(PUBLISHED_CONFIG)
    published = to_published(cheap_state(meta_model(config)), config)
    path = tmp_path / "090000.pth"
    torch.save({"model": published, "trainer_state_params": {"total_iterations": 90000}}, path)
    with pytest.raises(WeightsError, match=r"no config.yaml beside it; .*--config"):
        load_weights(path)
    assert load_weights(path, config=config)[1] == config
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(PUBLISHED_CONFIG))
    state, found = load_weights(path)
    assert found == config
    load_into(meta_model(config), state)


def test_a_configuration_of_another_network_is_called_so(tmp_path, atto):
    state, config = atto
    path = tmp_path / "w.safetensors"
    save_weights(path, state, config)
    with pytest.raises(
        WeightsError, match=r"holds a convnext_zepto network, .* says swin_tiny; training .*--finetune_from"
    ):
        load_weights(path, config=dataclasses.replace(config, backbone="swin_tiny"))
    with pytest.raises(WeightsError, match=r"queries.semantic has 66 rows, but its configuration says 26"):
        load_weights(path, config=dataclasses.replace(config, class_sets={"ovis": 25}))


def test_every_key_that_does_not_fit_is_named_with_its_shape(atto):
    state, config = atto
    wrong = dict(state, extra=torch.zeros(2, 3), pixel_mean=torch.zeros(4))
    del wrong["decoder.norm.bias"]
    with pytest.raises(WeightsError) as error:
        load_into(meta_model(config), wrong)
    assert "3 keys differ" in str(error.value)
    assert "missing decoder.norm.bias [64]" in str(error.value)
    assert "unexpected extra [2, 3]" in str(error.value)
    assert "pixel_mean is [4], expected [3]" in str(error.value)
    with pytest.raises(WeightsError, match=rf"{len(state)} keys differ") as error:
        load_into(meta_model(config), {})
    assert all(f"missing {key} " in str(error.value) for key in state)


def test_missing_and_damaged_files_are_one_clear_error(tmp_path, atto):
    with pytest.raises(WeightsError, match=r"none\.pth: no such file"):
        load_weights(tmp_path / "none.pth")
    for suffix, options in ((".safetensors", {}), (".pth", {}), (".pth", {"legacy": True}), (".pkl", {})):
        path = tmp_path / f"cut{suffix}"
        if suffix == ".pkl":
            path.write_bytes(pickle.dumps({"model": np.ones(100)}))
        elif options:
            torch.save(atto[0], path, _use_new_zipfile_serialization=False)
        else:
            save_weights(path, *atto)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(WeightsError, match=f"cut{suffix}: truncated, or not a file of weights"):
            load_weights(path)
    path = tmp_path / "text.pth"
    path.write_text("hello")
    with pytest.raises(WeightsError, match=r"text.pth: truncated, or not a file of weights"):
        load_weights(path)
    torch.save({"model": [1, 2]}, path)
    with pytest.raises(WeightsError, match="expected tensors by name, got list"):
        load_weights(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_other_pickled_objects_are_refused_by_name_and_loaded_on_trust(tmp_path, atto, legacy):
    state, config = atto
    path = tmp_path / "w.pth"
    content = {"model": state, "config": dataclasses.asdict(config), "scheduler": argparse.Namespace(step=1)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match=r"pickled argparse.Namespace, .*--trust"):
        load_weights(path)
    assert load_weights(path, trust=True)[1] == config


def test_files_are_written_whole_or_not_at_all(tmp_path, atto, monkeypatch):
    state, config = atto
    path = tmp_path / "w.safetensors"
    path.write_text("older")
    with pytest.raises(WeightsError, match="no folder"):
        save_weights(tmp_path / "nowhere" / "w.pth", state, config)
    with pytest.raises(WeightsError, match="expected a name that ends in"):
        save_weights(tmp_path / "w.bin", state, config)

    def fills_the_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("tarvis.model.weight_files.save", fills_the_disk)
    with pytest.raises(WeightsError, match=r"w.safetensors: cannot be written \(No space left"):
        save_weights(path, state, config)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("w.safetensors", "older")]


def torchvision_name(name):
    """The name that torchvision gives a ResNet parameter of ours."""
    name = name.removeprefix("stem.")
    name = re.sub(r"res(\d)", lambda m: f"layer{int(m[1]) - 1}", name)
    name = re.sub(r"shortcut\.norm", "downsample.1", name)
    name = re.sub(r"shortcut", "downsample.0", name)
    return re.sub(r"conv(\d)\.norm", r"bn\1", name)


def pretrained(name):
    """A state of the backbone's shapes, each tensor full of its own number."""
    with torch.device("meta"):
        state = build_backbone(name).state_dict()
    return {key: torch.full_like(value, i, device="cpu") for i, (key, value) in enumerate(state.items())}


def test_torchvision_resnet_loads_by_name(tmp_path):
    state = pretrained("resnet50")
    file = {torchvision_name(name): value for name, value in state.items()}
    assert {"conv1.weight", "bn1.running_var", "layer1.0.downsample.1.bias"} < file.keys()
    file |= {"bn1.num_batches_tracked": torch.tensor(7), "fc.weight": torch.zeros(10, 2048)}
    torch.save(file, tmp_path / "resnet50.pth")
    loaded = load_backbone("resnet50", tmp_path / "resnet50.pth")
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert loaded.keys() == state.keys()


@pytest.mark.parametrize("protocol", [2, 5])
def test_detectron2_resnet_of_numpy_arrays_loads(tmp_path, protocol):
    state = pretrained("resnet50")
    arrays = {name: value.numpy() for name, value in state.items()}
    arrays |= {"stem.fc.bias": np.zeros(10, np.float32), "stem.conv1.norm.num_batches_tracked": np.int64(3)}
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    loaded = load_backbone("resnet50", tmp_path / "R-50.pkl")
    assert loaded.keys() == state.keys()
    assert torch.equal(loaded["res5.2.conv3.weight"], state["res5.2.conv3.weight"])


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_official_swin_loads_and_output_norms_stay_fresh(tmp_path, suffix):
    state = pretrained("swin_tiny")
    file = {name: value for name, value in state.items() if not re.match(r"norm\d", name)}
    file |= {"norm.weight": torch.zeros(768), "head.bias": torch.zeros(1000)}
    file |= {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}
    path = tmp_path / f"swin{suffix}"
    if suffix == ".pth":
        torch.save({"model": file}, path)
    else:
        path.write_bytes(pickle.dumps({"model": file, "__author__": "third_party"}))
    loaded = load_backbone("swin_tiny", path)
    assert loaded.keys() == state.keys()
    assert torch.equal(loaded["layers.2.blocks.5.attn.qkv.bias"], state["layers.2.blocks.5.attn.qkv.bias"])
    assert loaded["norm3.weight"].unique().tolist() == [1.0]
    assert loaded["norm0.bias"].unique().tolist() == [0.0]


def test_official_convnext_loads(tmp_path):
    state = pretrained("convnext_zepto")
    file = {name: value for name, value in state.items() if not re.match(r"norm\d", name)}
    torch.save(
        {"model": file | {"norm.bias": torch.zeros(320), "head.bias": torch.zeros(9)}}, tmp_path / "c.pth"
    )
    loaded = load_backbone("convnext_zepto", tmp_path / "c.pth")
    assert torch.equal(loaded["stages.2.3.gamma"], state["stages.2.3.gamma"])
    with pytest.raises(WeightsError, match=r"c.pth: not the weights of a swin_tiny; .*missing patch_embed"):
        load_backbone("swin_tiny", tmp_path / "c.pth")


def test_a_backbone_pickle_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit",))

    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"model": {"w": Evil()}}))
    with pytest.raises(WeightsError, match=r"R-50.pkl: holds a pickled builtins.exec"):
        load_backbone("resnet50", path)
