"""The learning rate of every step, and which parameters learn slower or are not decayed."""

import json
import re
from pathlib import Path

import pytest
import torch

from tarvis.config import ModelConfig
from tarvis.model import build_model
from tarvis.training.config import OptimConfig, load_config
from tarvis.training.optim import build_optimizer, rate_at, set_rate

ROOT = Path(__file__).parents[3]
GOLDENS = ROOT / "tests" / "goldens"
CURVES = json.loads((GOLDENS / "losses" / "misc_training.json").read_text())
NORMS = {"LayerNorm", "MapNorm", "GroupNorm"}


@pytest.mark.parametrize("name", ["lr_small", "lr_no_warmup"])
def test_the_rate_of_every_step_is_that_of_the_published_schedule(name):
    curve = CURVES[name]
    config = OptimConfig(
        lr=curve["base_lr"],
        warmup_steps=curve["warmup"],
        decay_steps=tuple(curve["steps"]),
        decay_rates=tuple(curve["rates"]),
    )
    for step, rate in curve["values"].items():
        assert rate_at(int(step), config) == pytest.approx(rate, rel=1e-9)


def test_fine_tuning_starts_from_nothing_and_pre_training_at_the_full_rate():
    fine, pre = (load_config(ROOT / "configs" / f"{name}.yaml").optim for name in ("finetune", "pretrain"))
    rates = [rate_at(step, fine) for step in (0, 5_000, 10_000, 49_999, 50_000, 83_999, 84_000, 89_999)]
    assert rates == pytest.approx([0, 5e-5, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6])
    rates = [rate_at(step, pre) for step in (0, 444_499, 444_500, 481_500, 499_999)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-6, 1e-6])


# Parameter groups


@pytest.fixture(scope="module", params=["resnet50", "swin_tiny", "convnext_tiny"])
def network(request):
    with torch.device("meta"):
        return build_model(ModelConfig(backbone=request.param))


@pytest.fixture(scope="module")
def groups(network):
    """(rate, weight decay) of every parameter by name."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    optimizer = build_optimizer(network, OptimConfig())
    return {
        names[parameter]: (group["rate"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_every_parameter_is_in_one_group(network, groups):
    optimizer = build_optimizer(network, OptimConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(groups)
    assert groups.keys() == dict(network.named_parameters()).keys()


def test_the_image_backbone_alone_learns_at_a_tenth_of_the_rate(groups):
    for name, (rate, _) in groups.items():
        assert rate == (0.1 if name.startswith("backbone.") else 1.0), name


def test_norms_queries_and_embeddings_are_not_decayed_and_all_else_is(network, groups):
    modules = dict(network.named_modules())
    for name, (_, decay) in groups.items():
        is_norm = type(modules[name.rpartition(".")[0]]).__name__ in NORMS
        is_embedding = re.search(r"^queries\.|_embed(_3d)?$", name)
        assert decay == (0.0 if is_norm or is_embedding else 0.05), name


def test_biases_and_tables_of_relative_positions_are_decayed(groups):
    decayed = {name for name, (_, decay) in groups.items() if decay}
    assert {"neck.mask_features.bias", "decoder.layers.0.self_attention.in_proj_bias"} <= decayed
    tables = {name for name in groups if name.endswith("relative_position_bias_table")}
    gammas = {name for name in groups if name.endswith(".gamma")}
    assert tables | gammas <= decayed
    assert {
        "queries.semantic", "queries.vos", "neck.level_embed", "neck.level_embed_3d", "decoder.scale_embed",
        "object_encoder.point_embed",
    }.isdisjoint(decayed)  # fmt: skip


def test_frozen_norms_have_nothing_to_train(groups):
    assert not [name for name in groups if re.match(r"backbone\.(stem|res\d).*norm", name)]


def test_frozen_parameters_are_left_out(tiny_model):
    model = tiny_model().requires_grad_(True)
    model.backbone.requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig())
    assert {group["rate"] for group in optimizer.param_groups} == {1.0}


def test_adam_has_the_published_settings_and_follows_the_rate(tiny_model):
    optimizer = build_optimizer(tiny_model().requires_grad_(True), OptimConfig(lr=2e-4))
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.999)
        assert group["eps"] == 1e-8
        assert group["lr"] == 2e-4 * group["rate"]
    set_rate(optimizer, 3e-5)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(3e-5 * group["rate"])
