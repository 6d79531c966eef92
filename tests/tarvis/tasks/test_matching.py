import itertools

import pytest
import torch

from tarvis.structures import Prediction
from tarvis.tasks.matching import match

T, H, W = 2, 8, 12  # of mask features; masks are four times as large


def boxes(count, seed=0):
    """Masks [N, T, H, W] of boxes side by side, in random order."""
    masks = torch.zeros(count, T, 4 * H, 4 * W, dtype=torch.bool)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    for place, n in enumerate(order.tolist()):
        masks[n, :, :, place * 4 * W // count : (place + 1) * 4 * W // count] = True
    return masks


def random_prediction(outputs=3, clips=2, queries=6, classes=5, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    features = normal(clips, T, dim, H, W)
    made = [
        Prediction(
            normal(clips, queries, dim), normal(clips, queries, dim), features,
            normal(clips, queries, 1 + classes), {"instance": queries},
        )
        for _ in range(outputs)
    ]  # fmt: skip
    last = made[-1]
    return Prediction(
        last.queries, last.mask_embedding, features, last.class_logits, last.groups, tuple(made[:-1])
    )


def draw(clips, points=64):
    return torch.rand(clips, points, 2, generator=torch.Generator().manual_seed(1))


def labels(*counts):
    return [torch.arange(count) % 5 for count in counts]


def test_finds_the_planted_pairs_of_every_output_and_clip():
    masks = [boxes(4), boxes(3, seed=5)]
    features = torch.zeros(2, T, 6, H, W)  # channel n is target n
    for b, mask in enumerate(masks):
        features[b, :, : len(mask)] = torch.where(mask[..., 2::4, 2::4], 8.0, -8.0).transpose(0, 1)
    planted = [torch.randperm(6, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    layers = []
    for order in planted:
        embedding = torch.eye(6)[order].expand(2, -1, -1)  # query q shows target order[q]
        layers.append(Prediction(embedding, embedding, features, torch.zeros(2, 6, 6), {"instance": 6}))
    prediction = Prediction(
        layers[1].queries, layers[1].mask_embedding, features, layers[1].class_logits, {"instance": 6},
        (layers[0],),
    )  # fmt: skip
    matches = match(prediction, masks, labels(4, 3), draw(2))
    assert matches.is_finite
    assert matches.pairs.shape == (2, 2, 7)
    for (query, target), order in zip(matches.pairs.unbind(1), planted, strict=True):
        assert order[query].tolist() == [*target[:4].tolist(), *(target[4:] - 4).tolist()]
        assert sorted(target.tolist()) == list(range(7))
        assert query[:4].tolist() == sorted(query[:4].tolist())
        assert query[4:].tolist() == sorted(query[4:].tolist())


def test_the_class_decides_between_equal_masks():
    masks = boxes(1).expand(2, -1, -1, -1)
    embedding = torch.zeros(1, 2, 3)
    class_logits = torch.tensor([[[0.0, 0.0, 3.0], [0.0, 3.0, 0.0]]])  # background, class 0, class 1
    prediction = Prediction(embedding, embedding, torch.zeros(1, T, 3, H, W), class_logits, {"instance": 2})
    pairs = match(prediction, [masks], [torch.tensor([0, 1])], draw(1)).pairs
    assert pairs[:, 0].tolist() == [[0, 1], [1, 0]]


def test_pairs_cost_least():
    """All assignments of three targets to four queries, their costs as the formulas have them."""
    prediction, masks, points = random_prediction(1, 1, 4), boxes(3), draw(1)
    pairs = match(prediction, [masks], labels(3), points).pairs[:, 0]
    logits = prediction.mask_logits("instance")[0]  # [Q, T, h, w]

    def read(maps):
        grid = (2 * points - 1)[:, None].expand(len(maps), -1, -1, -1)
        return torch.nn.functional.grid_sample(maps, grid, align_corners=False)[:, :, 0].flatten(1)

    x, y = read(logits), read(masks.float())
    prob = prediction.class_logits[0].softmax(-1)

    def cost(q, n):
        bce = torch.nn.functional.binary_cross_entropy_with_logits(x[q], y[n])
        p = x[q].sigmoid()
        dice = 1 - (2 * (p * y[n]).sum() + 1) / (p.sum() + y[n].sum() + 1)
        return -2 * prob[q, 1 + n] + 5 * bce + 5 * dice

    best = min(itertools.permutations(range(4), 3), key=lambda q: sum(cost(q[n], n) for n in range(3)))
    assert dict(zip(pairs[1].tolist(), pairs[0].tolist(), strict=True)) == dict(enumerate(best))


def test_outputs_together_match_as_one_by_one():
    prediction, masks, points = random_prediction(), [boxes(3), boxes(2)], draw(2)
    together = match(prediction, masks, labels(3, 2), points).pairs
    for i, output in enumerate((*prediction.layers, prediction)):
        alone = Prediction(
            output.queries, output.mask_embedding, output.mask_features, output.class_logits, output.groups
        )
        assert torch.equal(match(alone, masks, labels(3, 2), points).pairs[:, 0], together[:, i])


def test_with_more_targets_than_queries_every_query_has_one():
    pairs = match(random_prediction(clips=1, queries=4), [boxes(6)], labels(6), draw(1)).pairs
    assert pairs.shape == (2, 3, 4)
    assert all(query.tolist() == [0, 1, 2, 3] and len(set(target.tolist())) == 4 for query, target in
               pairs.unbind(1))  # fmt: skip


@pytest.mark.parametrize("counts", [(0, 3), (3, 0), (0, 0)])
def test_a_clip_may_have_no_targets(counts):
    masks = [boxes(count) if count else torch.zeros(0, T, 4 * H, 4 * W, dtype=torch.bool) for count in counts]
    matches = match(random_prediction(), masks, labels(*counts), draw(2))
    assert matches.is_finite
    assert matches.pairs.shape == (2, 3, sum(counts))
    assert matches.pairs.dtype == torch.int64
    assert all(sorted(target.tolist()) == list(range(sum(counts))) for target in matches.pairs[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["mask_features", "mask_embedding", "class_logits"])
def test_a_bad_value_is_told_and_pairs_are_still_pairs(bad, where):
    prediction = random_prediction()
    getattr(prediction, where)[0, 0, 0] = bad
    matches = match(prediction, [boxes(3), boxes(2)], labels(3, 2), draw(2))
    assert not matches.is_finite
    for query, target in matches.pairs.unbind(1):
        assert sorted(target.tolist()) == list(range(5))
        assert len(set(query[:3].tolist())) == 3
        assert len(set(query[3:].tolist())) == 2


def test_half_precision_matches_alike():
    prediction, masks, points = random_prediction(), [boxes(3), boxes(2)], draw(2)
    exact = match(prediction, masks, labels(3, 2), points).pairs
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(match(prediction, masks, labels(3, 2), points).pairs, exact)
