"""Every parameter that a task uses receives a gradient, and no other does."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch

from tarvis.config import LossConfig, build
from tarvis.data.loader import TrainingLoader, collate
from tarvis.data.sets import open_sets
from tarvis.demo.synthetic_benchmarks import make_benchmark
from tarvis.model import build_model
from tarvis.structures import Features
from tarvis.tasks import TASKS
from tarvis.tasks.losses import uniform_points
from tarvis.tasks.task import Objective
from tarvis.training.config import Config, load_config
from tarvis.training.trainer import Trainer

CONFIGS = Path(__file__).parents[3] / "configs"
CLASSES = ("instance", "background", "semantic")
OBJECTS = ("background_vos", "vos")


def unused(task, by_mask=1, by_point=1):
    """Beginnings of the names of parameters that a task leaves alone."""
    names = ["decoder.mask_embeds.free."]  # comes with published weights
    others = CLASSES if task == "vos" else OBJECTS
    names += [f"queries.{each}/" for each in others]
    names += [f"decoder.mask_embeds.{each}." for each in others]
    names += [f"decoder.proj_layers.{each}." for each in others]
    if task == "vos":
        names += [f"decoder.proj_layers.{each}." for each in OBJECTS]  # objects have no classes
        names += [] if by_point else ["object_encoder.point_"]
        names += [] if by_mask else ["object_encoder.mask_embed"]
    else:
        names += ["object_encoder."]
    if task == "vps":
        # its masks only guide attention, and no gradient flows through that; in vis they are a class
        names += ["decoder.mask_embeds.background."]
    return tuple(names)


def receiving(network):
    """Names of the parameters with a gradient that is not zero."""
    return {
        name for name, p in network.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)
    }


def expected(network, *left_alone):
    return {name for name, _ in network.named_parameters() if not f"{name}/".startswith(left_alone)}


@pytest.fixture
def tiny(settings):
    def make(**changes):
        torch.manual_seed(0)
        model = build(Config, {"model": settings["model"] | changes}).model
        return awake(build_model(model)).train()

    return make


def awake(network):
    """The network without weights that start at zero: nothing would flow through them."""
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return network


def backward(network, task, *clips, by_point=0):
    """The loss of clips; gradients add up."""
    batch = collate("synthetic", task, clips, num_points=partial(min, by_point))
    generator = torch.Generator().manual_seed(0)
    objective = Objective(
        LossConfig(points=64, semantic_points=96),
        uniform_points(torch.device("cpu"), generator),
        torch.tensor(float(batch.num_targets)),
    )
    features = network.encode(batch.frames)
    TASKS[task].loss(network, features, batch, objective).total.backward()


@pytest.mark.parametrize("attention", ["hard", "soft"])
@pytest.mark.parametrize("task", ["vis", "vps"])
def test_finding_by_class(tiny, samples, task, attention):
    network = tiny(attention=attention, class_sets={"ovis": 25, "synthetic": 8, "vipseg": 124})
    for seed in range(3):  # stochastic depth leaves layers out
        backward(network, task, samples(seed, 3))
    assert receiving(network) == expected(network, *unused(task))
    rows = network.queries.semantic.grad.abs().sum(1)
    assert (rows[26:34] > 0).all()
    assert rows[0] > 0
    assert rows[1:26].sum() == rows[34:].sum() == 0  # classes of other sets


@pytest.mark.parametrize(("by_mask", "by_point"), [(2, 0), (2, 1), (0, 2)])
def test_given_objects(tiny, samples, by_mask, by_point):
    network = tiny()
    for seed in range(3):
        backward(network, "vos", samples(seed, by_mask + by_point), by_point=by_point)
    assert receiving(network) == expected(network, *unused("vos", by_mask, by_point))
    rows = network.queries.background_vos.grad.abs().sum(1)
    assert rows[0] > 0
    assert rows[1] == 0  # the object encoder stands in for it


@pytest.mark.parametrize("task", ["vis", "vps"])
def test_a_clip_without_objects_still_teaches_that_there_are_none(tiny, samples, task):
    network = tiny()
    for seed in range(3):
        backward(network, task, samples(seed, 0))
    # no mask of an instance is compared with anything
    assert receiving(network) == expected(network, *unused(task), "decoder.mask_embeds.instance.")


@pytest.fixture
def features():
    """Of a clip of one frame of 64 x 64 pixels; leaves."""
    torch.manual_seed(0)
    maps = [torch.randn(1, 1, 64, side, side, requires_grad=True) for side in (2, 4, 8, 16)]
    return Features(tuple(maps[:3]), maps[3])


def test_masks_send_no_gradient_into_the_features_they_are_encoded_from(tiny, features):
    masks = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    masks[..., 10:30, 20:40] = True
    background, objects = tiny().object_encoder(features.mask_features[0], masks)
    (background.square().sum() + objects.square().sum()).backward()
    assert features.mask_features.grad is None


def test_points_send_gradient_into_the_features_they_are_encoded_from(tiny, features):
    encoder = tiny().object_encoder
    masks = torch.zeros(0, 1, 64, 64, dtype=torch.bool)
    at = encoder.look_up(features, torch.zeros(1, dtype=torch.int64), torch.tensor([[0.3, 0.8]]))
    _, objects = encoder(features.mask_features[0].detach(), masks, at)
    (objects * torch.arange(64)).sum().backward()
    for level in (*features.memory, features.mask_features):
        side = level.shape[-1]
        touched = level.grad.abs().sum((0, 1, 2)).nonzero().tolist()
        assert touched == [[int(0.3 * side), int(0.8 * side)]]


# As published, on all seven sets


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """A clip of each of the sets of fine-tuning, out of its own files."""
    config = load_config(CONFIGS / "finetune.yaml")
    found = []
    for name in config.data.train:
        root = tmp_path_factory.mktemp(name)
        make_benchmark(name, root, split="train", num_videos=1, size=(64, 96), num_objects=2)
        data = dataclasses.replace(
            config.data,
            train=(name,),
            weights=(),
            root=str(root),
            clip_length=2,
            num_workers=0,
            point_share=float(name == "davis"),
            sets={name: {"min_sizes": (64,), "crop": (1.0, 0.66)}},
        )
        (opened,) = open_sets(data)
        ((batch,),) = TrainingLoader([opened.clips], data, seed=0, batch_size=1).steps(0, 1)
        found.append(batch)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet50", "swin_tiny"])
def test_a_step_of_fine_tuning_on_each_of_the_seven_sets(seven, backbone):
    config = load_config(
        CONFIGS / "finetune.yaml",
        [f"model.backbone={backbone}", "loss={points: 112, semantic_points: 112}", "optim.warmup_steps=0"],
    )
    torch.manual_seed(0)
    trainer = Trainer(awake(build_model(config.model)), config)
    network, ever = trainer.network, set()
    for batch in seven:
        (step,) = trainer.run(iter([[batch]]))
        assert not step.is_bad, batch.set_name
        assert step.set_name == batch.set_name
        possible = expected(
            network, *unused(batch.task, batch.counts[0] - batch.num_points, batch.num_points)
        )
        found = receiving(network)
        assert found <= possible, (batch.set_name, found - possible)
        # stochastic depth leaves out other blocks of Swin every time
        assert not {name for name in possible - found if not name.startswith("backbone.")}, batch.set_name
        ever |= found
    never = ("decoder.mask_embeds.free.", *(f"decoder.proj_layers.{each}." for each in OBJECTS))
    assert ever == expected(network, *never)
