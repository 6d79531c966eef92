"""Weights of a pre-training as the start of a fine-tuning: by name, and class queries row by row."""

import pytest
import torch

from tarvis.config import VIDEO_CLASS_SETS
from tarvis.datasets.classes import class_table
from tarvis.model.weights import WeightsError
from tarvis.training.transfer import QUERIES, class_rows, transfer, with_backbone_of

IMAGES = {"ade20k": 150, "cityscapes": 34, "coco": 133, "mapillary": 65}
CITYSCAPES = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
"""Rows of the published pre-training's Cityscapes classes that both street sets start from."""


@pytest.fixture
def numbered(tiny_model):
    """The state of a network of these class sets, with the number of its row in each class query."""

    def make(class_sets):
        state = tiny_model(class_sets=class_sets).state_dict()
        rows = state[QUERIES].shape[0]
        return state | {QUERIES: torch.arange(rows).float()[:, None].expand(rows, 128)}

    return make


@pytest.fixture
def source_rows(tiny_model, numbered):
    """The row of the source that each class query of the target comes from, None where it is its own."""

    def find(to, given):
        model = tiny_model(class_sets=to)
        before = model.queries.semantic.clone()
        fresh = transfer(model, to, numbered(given), given)
        after = model.queries.semantic
        rows = [None if torch.equal(a, b) else int(a[0]) for a, b in zip(after, before, strict=True)]
        return rows, fresh

    return find


def test_street_sets_start_from_the_published_rows_of_cityscapes(source_rows):
    rows, fresh = source_rows(VIDEO_CLASS_SETS, IMAGES)
    assert len(rows) == 1 + 227
    expected = [1 + 150 + row for row in CITYSCAPES]
    assert rows == [0, *expected, *expected, *[None] * (25 + 124 + 40)]
    assert fresh == ["ovis", "vipseg", "youtube_vis_2021"]


def test_street_sets_find_cityscapes_wherever_it_is(source_rows):
    rows, _ = source_rows({"kitti_step": 19}, {"coco": 133, "cityscapes": 34})
    assert rows == [0, *(1 + 133 + row for row in CITYSCAPES)]


def test_a_set_that_both_runs_have_keeps_its_rows(source_rows):
    rows, fresh = source_rows({"mine": 2, "ovis": 25}, {"ovis": 25, "vipseg": 124})
    assert rows == [0, None, None, *range(1, 26)]
    assert fresh == ["mine"]


def test_a_set_keeps_its_own_rows_even_where_cityscapes_is_given_too(source_rows):
    rows, fresh = source_rows({"kitti_step": 19}, {"cityscapes": 34, "kitti_step": 19})
    assert rows == [0, *range(35, 54)]
    assert not fresh


def test_the_same_sets_in_another_order_are_the_same_classes(source_rows):
    rows, _ = source_rows({"ovis": 2, "vipseg": 3}, {"vipseg": 3, "ovis": 2})
    assert rows == [0, 4, 5, 1, 2, 3]


def test_a_network_without_classes_takes_the_shared_position(source_rows):
    assert source_rows({}, IMAGES) == ([0], [])
    assert source_rows({"ovis": 2}, {}) == ([0, None, None], ["ovis"])


@pytest.mark.parametrize(
    ("to", "given"),
    [
        ({"ovis": 25}, {"ovis": 24}),
        ({"kitti_step": 5}, {"cityscapes": 34}),
        ({"kitti_step": 19}, {"cityscapes": 19}),
        ({"mine": 34}, {"cityscapes": 34}),
    ],
)
def test_sets_of_another_number_of_classes_are_other_sets(to, given):
    assert class_rows(to, given) == ([], list(to))


def test_rows_are_matched_by_the_names_of_classes():
    pairs, _ = class_rows({"cityscapes_vps": 19}, {"cityscapes": 34})
    ours, theirs = class_table("cityscapes_vps").names, class_table("cityscapes").names
    assert [ours[a - 1] for a, _ in pairs] == [theirs[b - 1] for _, b in pairs]
    assert [b - 1 for _, b in pairs] == CITYSCAPES


def test_all_other_weights_are_those_of_the_source(tiny_model):
    start = tiny_model(class_sets={"synthetic": 8})
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.add_(1)
    model = tiny_model(class_sets={"ovis": 25})
    transfer(model, {"ovis": 25}, start.state_dict(), {"synthetic": 8})
    given = start.state_dict()
    for name, value in model.state_dict().items():
        if name != QUERIES:
            assert torch.equal(value, given[name]), name
    assert torch.equal(model.queries.semantic[0], start.queries.semantic[0])


def test_another_image_backbone_comes_with_the_layers_that_read_it(tiny_model):
    start = tiny_model(class_sets={"synthetic": 8}).state_dict()
    model = tiny_model(class_sets={"synthetic": 8}, backbone="resnet50")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    transfer(model, {"synthetic": 8}, with_backbone_of(model, start), {"synthetic": 8})
    for name, value in model.state_dict().items():
        of_backbone = name.startswith(("backbone.", "neck.input_proj.", "neck.adapter_1."))
        assert torch.equal(value, before[name] if of_backbone else start[name]), name


def test_the_source_is_left_as_it_was(tiny_model, numbered):
    state = numbered({"ovis": 25})
    model = tiny_model(class_sets={"ovis": 25})
    transfer(model, {"ovis": 25}, state, {"ovis": 25})
    with torch.no_grad():
        model.queries.semantic.zero_()
    assert state[QUERIES][:, 0].tolist() == list(range(26))


def without(name):
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("damage", "sets", "message"),
    [
        (without("queries.vos"), {}, r"missing queries\.vos"),
        (lambda state: state.update({"head.weight": torch.zeros(2)}), {}, r"unexpected head\.weight"),
        (
            lambda state: state.update({"queries.instance": torch.zeros(3, 128)}),
            {},
            r"queries\.instance is \[3, 128\], expected \[21, 128\]",
        ),
        (
            lambda state: state.update({QUERIES: torch.zeros(9, 64)}),
            {},
            r"queries\.semantic is \[9, 64\], expected rows of 128",
        ),
        (lambda _: None, {"ovis": 25}, "has 9 rows, but its class sets say 26"),
    ],
)
def test_weights_of_another_network_are_errors_that_name_them_and_change_nothing(
    tiny_model, damage, sets, message
):
    state = tiny_model().state_dict()
    damage(state)
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=message):
        transfer(model, {"synthetic": 8}, state, sets or {"synthetic": 8})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
