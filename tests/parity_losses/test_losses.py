"""Replays the losses of the published code: values, gradients, matches and points of every case.

A case's logits become a prediction whose mask features are those logits and whose mask embeddings are unit
vectors, so the losses run as in training. Random numbers are the recorded ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import mask_cost
from tarvis.model.object_encoder import background_counts, part_counts
from tarvis.stitch.resize import area_size, network_size, resize_frame, resize_mask
from tarvis.structures import Prediction
from tarvis.tasks import losses
from tarvis.tasks.losses import IGNORE, PointSampler, Terms, Uniform
from tarvis.tasks.matching import match
from tests.parity_losses.interpolation import between_labels

Read = Callable[..., list[Tensor]]
OURS = Path(__file__).parents[1] / "goldens" / "losses"
KINDS = {
    "test_instances": {"instance_seg"},
    "test_classes_of_datasets_without_stuff": {"semantic_for_instance_seg"},
    "test_panoptic": {"panoptic_seg"},
    "test_objects": {"vos"},
    "test_terms": {"common"},
    "test_costs": {"matcher"},
    "test_points": {"sampling"},
}


class Case:
    """One case: its settings, its tensors, and its random numbers in turn."""

    def __init__(self, folder: Path, name: str, settings: dict[str, Any]) -> None:
        self.folder, self.name, self.settings = folder, name, settings
        self.taken = 0
        self.seen: list[Tensor] = []  # points of the uncertainty sampler

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        with np.load(self.folder / f"{self.name}.npz") as file:
            return {key: torch.from_numpy(file[key]) for key in file.files}

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def each(self, key: str) -> list[Tensor]:
        """The list `in.<key>.0`, `in.<key>.1`, ..; one a clip."""
        count = sum(name.startswith(f"in.{key}.") for name in self.tensors)
        return [self[f"in.{key}.{b}"] for b in range(count)]

    def draw(self, n: int, r: int) -> Tensor:
        """The next block of the tape, which must be of that shape."""
        block = self[f"tape.{self.taken}"]
        assert block.shape == (n, r, 2)
        self.taken += 1
        return block

    def points(self, key: str = "num_points", uniform: Uniform | None = None) -> PointSampler:
        # neither has another value in any configuration
        assert self.settings.get("oversample", 3) == 3
        assert self.settings.get("importance", 0.75) == 0.75
        return Recording(self.settings[key], uniform or self.draw, seen=self.seen)

    def check(self, total: Tensor, terms: Terms, inputs: dict[str, Tensor]) -> None:
        """Total and terms [outputs] by their recorded names, gradients of `inputs`, points, all tape read."""
        expected = {key[4:]: value for key, value in self.tensors.items() if key.startswith("out.")}
        assert expected.keys() == {f"loss_{name}" for name in terms} | {"loss_total"}
        for name, value in {**terms, "total": total}.items():
            torch.testing.assert_close(value.detach(), expected[f"loss_{name}"], rtol=1e-5, atol=0)
        total.sum().backward()
        for name, leaf in inputs.items():
            torch.testing.assert_close(leaf.grad, self[f"grad.{name}"], rtol=1e-4, atol=1e-6)
        assert f"tape.{self.taken}" not in self.tensors
        assert f"points.{len(self.seen)}" not in self.tensors
        for k, got in enumerate(self.seen):
            assert_same_set(got, self[f"points.{k}"])


@dataclass(frozen=True)
class Recording(PointSampler):
    """Remembers the points that it chose."""

    seen: list[Tensor] = field(default_factory=list)

    def uncertain(self, *args: Any) -> Tensor:
        self.seen.append(super().uncertain(*args))
        return self.seen[-1]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("--goldens-losses", default=OURS))
        kinds = KINDS[metafunc.function.__name__]
        index = json.loads((folder / "index.json").read_text())
        cases = [Case(folder, name, entry) for name, entry in index.items() if entry["loss"] in kinds]
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.fixture(name="folder")
def find_folder(pytestconfig: pytest.Config) -> Path:
    return Path(pytestconfig.getoption("--goldens-losses", default=OURS))


@pytest.fixture
def tensors(folder: Path) -> Read:
    """Tensors of a file of the folder, or a skip where the given folder has no such file."""

    def read(name: str, *keys: str) -> list[Tensor]:
        if not (folder / name).exists():
            pytest.skip(f"no {folder / name}")
        with np.load(folder / name) as file:
            return [torch.from_numpy(file[key]) for key in keys]

    return read


def assert_same_set(got: Tensor, wanted: Tensor) -> None:
    for row, other in zip(got.tolist(), wanted.tolist(), strict=True):
        assert sorted(row) == sorted(other)


def predict(groups: dict[str, Tensor], class_logits: Tensor | None = None) -> Prediction:
    """A prediction with these mask logits [L, B, Q, T, h, w] of each group, and class logits [L, B, Q, K]."""
    logits = torch.cat(list(groups.values()), 2)
    L, B, Q = logits.shape[:3]
    features = logits.permute(1, 3, 0, 2, 4, 5).flatten(2, 3)  # [B, T, L*Q, h, w]
    unit = torch.eye(L * Q).view(L, 1, Q, L * Q).expand(L, B, Q, -1)
    counts = {name: part.shape[2] for name, part in groups.items()}
    outputs = [
        Prediction(unit[i], unit[i], features, None if class_logits is None else class_logits[i], counts)
        for i in range(L)
    ]
    return Prediction(unit[-1], unit[-1], features, outputs[-1].class_logits, counts, tuple(outputs[:-1]))


def with_grad(case: Case, *names: str) -> dict[str, Tensor]:
    return {name: case[f"in.{name}"].requires_grad_() for name in names}


def weighted(terms: Terms, weights: dict[str, float]) -> Tensor:
    return torch.stack([weights[name] * value for name, value in terms.items()]).sum(0)  # [outputs]


# Losses


def instance_terms(
    case: Case, prediction: Prediction, masks: list[Tensor], classes: list[Tensor], count: str, **options: Any
) -> Terms:
    """Matches are compared on the way. The original draws for one output after the other."""
    labels = [label - 1 for label in classes]
    P, B = case.settings[count], len(masks)
    pairs, blocks = [], []
    for number, output in enumerate((*prediction.layers, prediction)):
        points = torch.cat([case.draw(1, P) for _ in range(B)])
        single = Prediction(
            output.queries, output.mask_embedding, output.mask_features, output.class_logits, output.groups
        )
        matches = match(single, masks, labels, points)
        assert matches.is_finite
        assert_same_matches(case, number, matches.pairs[:, 0], masks, output)
        pairs.append(matches.pairs)
        R = matches.pairs.shape[2] * masks[0].shape[1]
        blocks += [case.draw(R, 3 * P), case.draw(R, P - int(0.75 * P))]
    return losses.instance_terms(
        prediction, masks, labels, torch.cat(pairs, 1), case.points(count, replay(blocks)),
        num_targets=torch.tensor(sum(map(len, masks))), **options,
    )  # fmt: skip


def replay(blocks: Sequence[Tensor]) -> Uniform:
    remaining: Iterator[Tensor] = iter(blocks)

    def draw(n: int, r: int) -> Tensor:
        block = next(remaining)
        assert block.shape == (n, r, 2)
        return block

    return draw


def assert_same_matches(
    case: Case, number: int, pairs: Tensor, masks: list[Tensor], output: Prediction
) -> None:
    Q, column, first = output.groups["instance"], 0, 0
    for b, mask in enumerate(masks):
        query, target = pairs[:, column : column + min(Q, len(mask))]
        assert query.tolist() == case[f"match.l{number}.b{b}.query"].tolist()
        assert (target - first).tolist() == case[f"match.l{number}.b{b}.gt"].tolist()
        column, first = column + len(query), first + len(mask)
    assert column == pairs.shape[1]


def as_published(terms: Terms) -> Terms:
    names = {"class": "cls", "mask": "mask_ce", "dice": "mask_dice"}
    return {names[name]: value for name, value in terms.items()}


def test_instances(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "BACKGROUND_WEIGHT", case.settings["bg_coef"])
    inputs = with_grad(case, "pred_mask_logits", "pred_class_logits")
    prediction = predict({"instance": inputs["pred_mask_logits"]}, inputs["pred_class_logits"])
    terms = instance_terms(
        case, prediction, case.each("gt_masks"), case.each("gt_classes"), "num_points",
        ignored=case.tensors.get("in.cls_ignore_mask"),
    )  # fmt: skip
    case.check(weighted(terms, losses.INSTANCE_WEIGHTS), as_published(terms), inputs)


def test_classes_of_datasets_without_stuff(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "nearest_sample", between_labels)
    inputs = with_grad(case, "pred_mask_logits")
    labels = torch.stack([
        losses.semantic_labels(mask, label - 1)
        for mask, label in zip(case.each("gt_instance_masks"), case.each("gt_classes"), strict=True)
    ])  # fmt: skip
    assert torch.equal(labels.long(), case["aux.semantic_target"].long())
    logits = inputs["pred_mask_logits"]
    w = {"ce": case.settings["w_ce"], "dice": case.settings["w_dice"], "reg": case.settings["w_reg"]}
    terms = losses.semantic_terms(
        predict({"background": logits[:, :, :1], "semantic": logits[:, :, 1:]}), labels, case.points(),
        background=True, dice=w["dice"] > 0, regularize=case.settings["logit_regularization_loss"],
        drop_absent=case.settings["ignore_null_class_logits"],
    )  # fmt: skip
    case.check(weighted(terms, w), terms, inputs)


def test_panoptic(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "BACKGROUND_WEIGHT", case.settings["bg_coef"])
    inputs = with_grad(
        case, "pred_instance_mask_logits", "pred_instance_class_logits", "pred_semantic_mask_logits"
    )
    instance, class_logits, semantic = inputs.values()
    prediction = predict({"instance": instance, "semantic": semantic}, class_logits)
    terms = instance_terms(
        case, prediction, case.each("gt_instance_masks"), case.each("gt_instance_classes"),
        "num_points_instance",
    )  # fmt: skip
    labels = case["in.gt_semantic_masks"].masked_fill(case["in.ignore_masks"], IGNORE)
    kind = case.settings["semantic_loss_type"]
    if kind == "sparse":
        found = losses.semantic_terms(
            prediction, labels, case.points("num_points_semantic"), background=False,
            dice=case.settings["semantic_w_dice"] > 0,
            regularize=case.settings["semantic_logit_regularization_loss"],
            drop_absent=case.settings["ignore_null_class_logits"],
        )  # fmt: skip
    else:
        found = of_all_pixels(prediction, labels, full_size=kind == "dense_full_res")
    w = {name: case.settings[f"semantic_w_{name}"] for name in ("ce", "dice")}
    parts = (
        weighted(terms, losses.INSTANCE_WEIGHTS),
        weighted(found, {**w, "reg": case.settings["w_reg"]}),
    )
    named = {f"instance_{name}": value for name, value in as_published(terms).items()}
    named |= {f"semantic_{name}": value for name, value in found.items()}
    named |= {"instance_total": parts[0], "semantic_total": parts[1]}
    case.check(sum(parts, torch.zeros(())), named, inputs)


def of_all_pixels(prediction: Prediction, labels: Tensor, *, full_size: bool = False) -> Terms:
    """Another published variant that no configuration uses: the mean of the worst quarter of all pixels.

    At the size of the maps, or of labels [B, T, H, W]. Pixels without a label cost nothing, and count.
    """
    frames = labels.flatten(0, 1)[:, None]  # [B*T, 1, H, W]
    ce = []
    for output in (*prediction.layers, prediction):
        maps = losses.class_maps(output, background=False)
        if full_size:
            maps = F.interpolate(maps, frames.shape[2:], mode="bilinear")
        target = F.interpolate(frames.float(), maps.shape[2:], mode="nearest-exact")[:, 0].long()
        loss = F.cross_entropy(maps, target, ignore_index=IGNORE, reduction="none").flatten()
        ce.append(loss.topk(round(0.25 * loss.numel())).values.mean())
    return {"ce": torch.stack(ce)}


def test_objects(case: Case) -> None:
    inputs = with_grad(case, "pred_mask_logits")
    logits, masks = inputs["pred_mask_logits"], torch.stack(case.each("gt_masks"))
    groups = {"background_vos": logits[:, :, :1], "vos": logits[:, :, 1:]}
    if not case.settings["apply_bg_loss"]:
        del groups["background_vos"]
    if case.settings["loss_type"] == "sparse":
        counts = [1] * masks.shape[1]
        terms = losses.object_terms(predict(groups), masks, counts, case.points())
    else:
        terms = in_all_pixels(logits, masks)
    w = {name: case.settings[f"w_{name}"] for name in ("ce", "dice")}
    terms = {"ce": terms["mask"], "dice": terms["dice"]}
    case.check(weighted(terms, w), terms, inputs)


def in_all_pixels(logits: Tensor, masks: Tensor) -> Terms:
    """The published dense variant, which no configuration uses: logits [L, B, 1 + N, T, h, w]."""
    targets = torch.cat((~masks.any(1, keepdim=True), masks), 1).flatten(0, 2)
    both = [
        losses.binary_losses(
            F.interpolate(output.flatten(0, 2)[:, None], targets.shape[1:], mode="bilinear").flatten(1),
            targets.flatten(1),
        )
        for output in logits
    ]
    return {
        "mask": torch.stack([b.mean() for b, _ in both]),
        "dice": torch.stack([d.mean() for _, d in both]),
    }


# What losses are made of


def test_terms(case: Case) -> None:
    def same(got: Tensor, key: str) -> None:
        torch.testing.assert_close(got, case[key], rtol=1e-5, atol=1e-7)

    prob, target, kept = case["dice_in"], case["dice_target"], ~case["dice_ignore"]
    same(losses.soft_dice(prob, target), "dice_none")
    same(losses.soft_dice(prob, target).mean(), "dice_mean")
    same(losses.soft_dice(prob * kept, target * kept).mean(), "dice_mean_ignore")
    logits, label = case["mc_logits"], case["mc_target"]
    same(losses.class_dice(logits.transpose(1, 2), label, background=True), "mc_dice")
    same(losses.class_dice(logits.transpose(1, 2), label, background=False), "mc_dice_with_zero")
    prediction = predict({"semantic": logits[None, :, :, None, None]})  # the points as a row of pixels
    same(of_all_pixels(prediction, label[:, None, None])["ce"][0], "boot_ce_025")


def test_costs(case: Case) -> None:
    bce, dice = mask_cost(case["logits"], torch.eye(case["logits"].shape[1]), case["targets"])
    torch.testing.assert_close(bce, case["cost_bce"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(dice, case["cost_dice"], rtol=1e-5, atol=1e-7)


def test_points(case: Case) -> None:
    logits = case["logits"]
    if case.name == "unc_binary":
        losses.mask_losses(logits[:, 0], torch.zeros_like(logits[:, 0]), case.points(), torch.arange(3))
        got = case.seen[0]
    else:
        ignored = "ignore" in case.name  # it is the first channel then
        skipped = logits[:, 0] > 0 if ignored else torch.zeros_like(logits[:, 0], dtype=torch.bool)
        uncertainty = losses.class_uncertainty(logits[:, int(ignored) :], skipped)
        got = case.points().uncertain(uncertainty, torch.arange(len(logits)))
    assert_same_set(got, case["points"])


def test_condensing(tensors: Read) -> None:
    logits, counts, wanted = tensors("vos_condense.npz", "logits", "counts", "condensed")
    for output, other in zip(logits, wanted, strict=True):
        assert torch.equal(losses.condense(output, counts.tolist()), other)


# What else the folder holds of training


def test_parts_of_masks_and_background(tensors: Read) -> None:
    keys = ("masks", "bg_grid_masks", "divided")
    masks, grid, divided = (x.bool() for x in tensors("pet_and_grid_helpers.npz", *keys))

    def cells(parts: Tensor) -> Tensor:
        blocks = parts[:, 0].unflatten(2, (-1, 4)).unflatten(1, (-1, 4))
        return blocks.sum((2, 4)).flatten(1).float()

    assert torch.equal(part_counts(masks[:, None], len(divided) // len(masks)), cells(divided))
    # the background was recorded beside the first two masks only
    assert torch.equal(background_counts(masks[:2, None], (4, 4)), cells(grid))


def test_resizing(tensors: Read) -> None:
    images, masks, image_out, mask_out = tensors(
        "resize_example.npz", "image", "mask", "image_out", "mask_out"
    )
    size = (image_out.shape[1], image_out.shape[2])
    for image, wanted in zip(images, image_out, strict=True):
        assert np.array_equal(resize_frame(image.numpy(), size), wanted.numpy())
    for mask, wanted in zip(masks.flatten(0, 1), mask_out.flatten(0, 1), strict=True):
        assert torch.equal(resize_mask(mask, size), wanted.bool())


def test_sizes(folder: Path) -> None:
    for entry in json.loads((folder / "misc_training.json").read_text())["resize_dims"]:
        original = (entry.pop("h"), entry.pop("w"))
        for rule, wanted in entry.items():
            if rule.startswith("area"):
                assert list(area_size(original, int(rule[4:]))) == wanted
            else:
                least, most = (int(part.strip("minax")) for part in rule.split("_"))
                assert list(network_size(original, least, most)) == wanted


def test_every_case_has_a_test(folder: Path) -> None:
    kinds = {entry["loss"] for entry in json.loads((folder / "index.json").read_text()).values()}
    assert kinds == set().union(*KINDS.values())
