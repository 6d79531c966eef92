"""The training step's yardstick computes the published losses, and what ours computes."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench import bench_train_step as bench
from bench.yardstick import objectives as plain
from bench.yardstick.network import Decoder, Transcription
from kernels import nearest_sample
from kernels.mask_bits import unpack_bits
from tarvis.config import LossConfig, ModelConfig
from tarvis.model import build_model, decoder
from tarvis.model.published import to_published
from tarvis.tasks import losses as our_losses
from tests.parity_losses.interpolation import between_labels

INDEX = "index.json"
KINDS = {"instance_seg", "semantic_for_instance_seg", "panoptic_seg", "vos", "matcher"}


class Case:
    """Settings and tensors of a recorded case; random numbers in turn."""

    def __init__(self, folder, name, settings):
        self.settings = settings
        with np.load(folder / f"{name}.npz") as file:
            self.tensors = {key: torch.from_numpy(file[key]) for key in file.files}
        self.taken = 0

    def __getitem__(self, key):
        return self.tensors[key]

    def each(self, key):
        count = sum(name.startswith(f"in.{key}.") for name in self.tensors)
        return [self[f"in.{key}.{b}"] for b in range(count)]

    def inputs(self, *names):
        return [self[f"in.{name}"].requires_grad_() for name in names]

    def draw(self, n, r):
        block = self[f"tape.{self.taken}"]
        assert block.shape == (n, r, 2)
        self.taken += 1
        return block

    def check(self, terms, *names):
        expected = {key[9:]: value for key, value in self.tensors.items() if key.startswith("out.loss_")}
        assert terms.keys() == expected.keys()
        for name, value in terms.items():
            torch.testing.assert_close(value.detach(), expected[name], rtol=1e-5, atol=0)
        terms["total"].sum().backward()
        for name in names:
            torch.testing.assert_close(self[f"in.{name}"].grad, self[f"grad.{name}"], rtol=1e-4, atol=1e-6)
        assert f"tape.{self.taken}" not in self.tensors


def pytest_generate_tests(metafunc):
    if "recorded" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--goldens-losses")
        index = json.loads((folder / INDEX).read_text())
        cases = {name: entry for name, entry in index.items() if entry["loss"] in KINDS}
        metafunc.parametrize("recorded", [(folder, *case) for case in cases.items()], ids=list(cases))


def test_the_plain_losses_are_those_of_the_published_code(recorded, monkeypatch):
    monkeypatch.setattr(plain, "read_labels", lambda labels, points: between_labels(labels[:, 0], points))
    case = Case(*recorded)
    replay = {
        "instance_seg": instances,
        "semantic_for_instance_seg": classes,
        "panoptic_seg": panoptic,
        "vos": objects,
        "matcher": costs,
    }
    replay[case.settings["loss"]](case)


def instances(case):
    names = "pred_mask_logits", "pred_class_logits"
    terms = plain.instance_loss(
        *case.inputs(*names), case.each("gt_masks"), case.each("gt_classes"), case.settings["num_points"],
        case.draw, case.tensors.get("in.cls_ignore_mask"),
    )  # fmt: skip
    case.check(terms, *names)


def classes(case):
    has = case.settings
    (logits,) = case.inputs("pred_mask_logits")
    terms = plain.semantic_loss(
        logits, case.each("gt_instance_masks"), case.each("gt_classes"), has["num_points"], case.draw,
        w_ce=has["w_ce"], w_dice=has["w_dice"], regularize=has["logit_regularization_loss"],
        drop_absent=has["ignore_null_class_logits"],
    )  # fmt: skip
    case.check(terms, "pred_mask_logits")


def panoptic(case):
    has = case.settings
    names = "pred_instance_mask_logits", "pred_instance_class_logits", "pred_semantic_mask_logits"
    *instance, semantic = case.inputs(*names)
    things = plain.instance_loss(
        *instance, case.each("gt_instance_masks"), case.each("gt_instance_classes"),
        has["num_points_instance"], case.draw,
    )  # fmt: skip
    every = plain.panoptic_loss(
        semantic, case["in.gt_semantic_masks"], case["in.ignore_masks"], has["num_points_semantic"],
        case.draw, kind=has["semantic_loss_type"], regularize=has["semantic_logit_regularization_loss"],
        drop_absent=has["ignore_null_class_logits"],
    )  # fmt: skip
    every["total"] = has["semantic_w_ce"] * every["ce"] + plain.REGULARIZATION * every.get("reg", 0)
    terms = {f"instance_{name}": value for name, value in things.items()}
    terms |= {f"semantic_{name}": value for name, value in every.items()}
    case.check({**terms, "total": things["total"] + every["total"]}, *names)


def objects(case):
    has = case.settings
    (logits,) = case.inputs("pred_mask_logits")
    terms = plain.object_loss(
        logits, torch.stack(case.each("gt_masks")), has["num_points"], case.draw,
        background=has["apply_bg_loss"], dense=has["loss_type"] == "dense",
    )  # fmt: skip
    case.check(terms, "pred_mask_logits")


def costs(case):
    bce, dice = plain.pair_costs(case["logits"], case["targets"])
    torch.testing.assert_close(bce, case["cost_bce"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(dice, case["cost_dice"], rtol=1e-5, atol=1e-7)


def test_queries_of_an_object_become_one_map(pytestconfig):
    with np.load(pytestconfig.getoption("--goldens-losses") / "vos_condense.npz") as file:
        logits, counts, wanted = (torch.from_numpy(file[k]) for k in ("logits", "counts", "condensed"))
    assert torch.equal(plain.condense(logits, counts.tolist()), wanted)


def shared_points(n, r):
    """The same points whenever as many are drawn, so that it does not matter who draws first."""
    return torch.rand(n, r, 2, generator=torch.Generator().manual_seed(1000 * n + r))


@pytest.fixture(scope="module")
def networks():
    """Ours, and the transcription with the same weights."""
    torch.manual_seed(0)
    config = ModelConfig(backbone="resnet50")
    ours, theirs = build_model(config), Transcription("resnet50")
    for layer in ours.neck.spatial:  # between cells, at whose centres gradients of places jump
        layer.sampling_offsets.bias.data += 0.1 + 0.3 * torch.rand_like(layer.sampling_offsets.bias)
    theirs.load_state_dict(to_published(ours.state_dict(), config))
    return ours, theirs


@pytest.fixture
def no_decisions(monkeypatch):
    """No decision hangs on rounding, so that what differs between the two is arithmetic.

    The transcription's queries see what ours saw, layer by layer; rectifiers and maxima are smooth ones;
    points are drawn without regard to logits. (What this leaves out is tested case by case.) One rectifier in
    doubt among the 8 192 of a small map would change its gradient by a hundredth.
    """
    for owner, name in ((F, "relu"), (F, "relu_"), (torch.Tensor, "relu")):
        monkeypatch.setattr(owner, name, lambda x, **_: F.silu(x))
    monkeypatch.setattr(F, "max_pool2d", F.avg_pool2d)
    for losses, dim in ((our_losses, 1), (plain, 2)):
        monkeypatch.setattr(losses, "condense", partial(smooth_maximum, dim=dim))
    monkeypatch.setattr(
        our_losses.PointSampler, "uncertain", lambda points, _, clips: points.draw(clips, points.count)
    )
    monkeypatch.setattr(plain, "uncertain_points", lambda maps, _, count, draw: draw(len(maps), count))
    seen = []
    make = decoder.mask_bits

    def ours(query, features):
        bits, anything = make(query, features)
        seen.append(unpack_bits(bits, features.shape[-1]).float())
        return bits, anything

    monkeypatch.setattr(decoder, "mask_bits", ours)
    monkeypatch.setattr(Decoder, "attention_map", staticmethod(lambda *_: seen.pop(0)))
    yield
    assert not seen


def smooth_maximum(logits, counts, dim):
    return torch.stack([part.logsumexp(dim) for part in logits.split(list(counts), dim)], dim)


@pytest.mark.usefixtures("no_decisions")
@pytest.mark.parametrize("task", bench.CASES)
def test_a_step_of_both_has_the_same_loss_and_gradient(task, networks, monkeypatch):
    monkeypatch.setattr(bench, "SETTINGS", LossConfig(points=256))
    # the published way to read labels between pixels is not ours
    monkeypatch.setattr(plain, "read_labels", lambda labels, at: nearest_sample(labels[:, 0], at))
    batch = bench.clip_with_objects(task, (2, 64, 128))
    ours, theirs = networks
    found = []
    for make, network in ((bench.of_tarvis, ours), (bench.of_transcription, theirs)):
        network.zero_grad()
        step = make(network, batch, shared_points)
        loss = step.loss(step.encode())
        loss.backward()
        found.append(loss.detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)
    gradient = to_published(gradients(ours), ModelConfig(backbone="resnet50"))
    expected = gradients(theirs)
    largest = max(one.norm() for one in expected.values())
    compared = [name for name, wanted in expected.items() if wanted.norm() > 1e-3 * largest]
    assert len(compared) > 50
    for name in compared:
        assert (gradient[name] - expected[name]).norm() < 1e-4 * expected[name].norm(), name


def gradients(network):
    return {
        name: torch.zeros_like(one) if one.grad is None else one.grad
        for name, one in network.named_parameters()
    }


def test_both_train_the_same_number_of_weights(networks):
    counts = [sum(one.numel() for one in net.parameters() if one.requires_grad) for net in networks]
    assert counts[0] == counts[1]
