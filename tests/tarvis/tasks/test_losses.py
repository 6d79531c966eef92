import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tarvis.structures import Prediction
from tarvis.tasks import losses
from tarvis.tasks.losses import IGNORE, PointSampler

B, T, H, W, DIM = 2, 2, 16, 16, 32  # H, W of mask features; masks are four times as large
CPU = torch.device("cpu")


def points(count=96, seed=0, extent=None):
    """A sampler whose points are the same each time it is made."""
    return PointSampler(count, losses.uniform_points(CPU, torch.Generator().manual_seed(seed)), extent)


def predict(groups, outputs=2, classes=4, clips=B, seed=0, scale=0.5):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (scale * torch.randn(shape, generator=generator)).requires_grad_()

    features = normal(clips, T, DIM, H, W)
    made = []
    for _ in range(outputs):
        embedding = normal(clips, sum(groups.values()), DIM)
        class_logits = normal(clips, groups["instance"], 1 + classes) if "instance" in groups else None
        made.append(Prediction(embedding, embedding, features, class_logits, groups))
    return dataclasses.replace(made[-1], layers=tuple(made[:-1]))


def leaves(prediction):
    outputs = (*prediction.layers, prediction)
    return [prediction.mask_features, *(o.mask_embedding for o in outputs)]


def showing(maps, group):
    """The prediction, of a single output, whose logits are `maps` [B, Q, T, h, w]."""
    unit = torch.eye(maps.shape[1]).expand(len(maps), -1, -1)
    return Prediction(unit, unit, maps.transpose(1, 2), None, {group: maps.shape[1]})


def blobs(count, seed=0):
    """Masks [N, T, H, W] of boxes that overlap."""
    masks = torch.zeros(count, T, 4 * H, 4 * W, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for n in range(count):
        y, x = torch.randint(0, 3 * H, (2,), generator=generator).tolist()
        masks[n, :, y : y + 20, x : x + 24] = True
    return masks


INSTANCE = {"instance": 6, "background": 1, "semantic": 4}
MASKS = [blobs(3), blobs(1, seed=1)]
LABELS = [torch.tensor([0, 3, 1]), torch.tensor([2])]
PAIRS = torch.tensor([[[0, 2, 5, 1], [1, 3, 4, 0]], [[1, 0, 2, 3], [0, 2, 1, 3]]])  # [2, outputs, M]


def instance_terms(prediction, masks=MASKS, labels=LABELS, pairs=PAIRS, at=None, num_targets=4.0, **options):
    return losses.instance_terms(
        prediction, masks, labels, pairs, at or points(), num_targets=torch.tensor(num_targets), **options
    )


# instances


def test_mask_terms_are_those_of_logits_at_every_cell():
    """Against maps of all queries, read by grid_sample; the points are drawn alike."""
    prediction = predict(INSTANCE)
    terms = instance_terms(prediction)
    at = points()
    for i, output in enumerate((*prediction.layers, prediction)):
        logits = torch.einsum("bqc,btchw->bqthw", output.mask_embedding, output.mask_features)
        clip = torch.tensor([0, 0, 0, 1])
        maps = logits[clip, PAIRS[0, i]].flatten(0, 1)  # [M*T, h, w]
        targets = torch.cat(MASKS)[PAIRS[1, i]].flatten(0, 1).float()

        def read(maps, where):
            return F.grid_sample(maps[:, None], 2 * where[:, None] - 1, align_corners=False)[:, 0, 0]

        candidates = at.uniform(len(maps), 3 * at.count)
        order = read(maps, candidates).abs().argsort(1)[:, :72, None].expand(-1, -1, 2)
        where = torch.cat((candidates.gather(1, order), at.uniform(len(maps), 24)), 1)
        x, y = read(maps, where), read(targets, where)
        bce = F.binary_cross_entropy_with_logits(x, y, reduction="none").mean(1).sum() / (4 * T)
        p = x.sigmoid()
        dice = (1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)).sum() / (4 * T)
        torch.testing.assert_close(terms["mask"][i], bce)
        torch.testing.assert_close(terms["dice"][i], dice)


def test_class_loss_weighs_queries_without_target_a_tenth():
    prediction = predict(INSTANCE, outputs=1)
    got = instance_terms(prediction, pairs=PAIRS[:, :1])["class"]
    wanted = torch.zeros(B, 6, dtype=torch.long)
    wanted[0, [0, 2, 5]] = 1 + LABELS[0][[1, 0, 2]]
    wanted[1, 1] = 1 + LABELS[1][0]
    weight = torch.tensor([0.1, 1, 1, 1, 1])
    torch.testing.assert_close(
        got[0], F.cross_entropy(prediction.class_logits.flatten(0, 1), wanted.flatten(), weight)
    )


def test_an_ignored_query_costs_nothing_unless_it_has_a_target():
    prediction = predict(INSTANCE)
    everyone = torch.ones(2, B, 6, dtype=torch.bool)
    terms = instance_terms(prediction, ignored=everyone)
    terms["class"].sum().backward()
    asked = prediction.class_logits.grad.abs().sum(-1) > 0
    assert asked.nonzero().tolist() == [[0, 1], [0, 3], [0, 4], [1, 0]]


def test_mask_terms_are_divided_by_the_targets_of_a_batch():
    once, twice = (instance_terms(predict(INSTANCE), num_targets=n) for n in (2.0, 4))
    torch.testing.assert_close(once["mask"], 2 * twice["mask"])
    torch.testing.assert_close(once["dice"], 2 * twice["dice"])
    torch.testing.assert_close(once["class"], twice["class"])
    few = instance_terms(predict(INSTANCE), num_targets=0.25)
    torch.testing.assert_close(few["mask"], 2 * once["mask"])


def test_a_clip_without_targets_adds_no_mask_terms():
    nobody = torch.zeros(0, T, 4 * H, 4 * W, dtype=torch.bool)
    both = predict(INSTANCE)
    alone = instance_terms(both, [MASKS[0], nobody], [LABELS[0], LABELS[1][:0]], PAIRS[:, :, :3])
    assert all(values.isfinite().all() for values in alone.values())
    first = [
        dataclasses.replace(
            o, layers=(), mask_embedding=o.mask_embedding[:1], mask_features=o.mask_features[:1],
            class_logits=o.class_logits[:1],
        )
        for o in (*both.layers, both)
    ]  # fmt: skip
    single = dataclasses.replace(first[-1], layers=tuple(first[:-1]))
    terms = instance_terms(single, MASKS[:1], LABELS[:1], PAIRS[:, :, :3])
    torch.testing.assert_close(alone["mask"], terms["mask"])
    torch.testing.assert_close(alone["dice"], terms["dice"])


def test_without_any_target_gradients_still_reach_everything():
    nobody = [torch.zeros(0, T, 4 * H, 4 * W, dtype=torch.bool)] * B
    prediction = predict(INSTANCE)
    terms = instance_terms(
        prediction, nobody, [torch.zeros(0, dtype=torch.long)] * B, PAIRS[..., :0], num_targets=0.0
    )
    losses.total(terms, losses.INSTANCE_WEIGHTS).backward()
    assert not terms["mask"].any()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves(prediction))
    assert prediction.class_logits.grad.any()


# classes


def stripes(first, second):
    """Labels [B, T, H, W] in stripes of two classes, four pixels wide."""
    column = torch.arange(4 * W) // 4 % 2
    return torch.where(column == 0, first, second).to(torch.uint8).expand(B, T, 4 * H, -1)


def test_labels_at_borders_are_those_of_the_classes_there():
    """Interpolated, classes 0 and 9 are 1 .. 8 in between, whose logits are hopeless here."""
    maps = torch.full((B, 10, T, H, W), -1e4)
    maps[:, [0, 9]] = 0
    prediction = showing(maps, "semantic")
    got = losses.semantic_terms(prediction, stripes(0, 9), points(), background=False)
    torch.testing.assert_close(got["ce"], torch.tensor([2.0]).log())


def test_without_labels_classes_cost_nothing():
    prediction = predict(INSTANCE)
    labels = torch.full((B, T, 4 * H, 4 * W), IGNORE, dtype=torch.uint8)
    terms = losses.semantic_terms(prediction, labels, points(), background=False, dice=True, drop_absent=True)
    sum(values.sum() for values in terms.values()).backward()
    assert not any(values.any() for values in terms.values())
    assert all(not leaf.grad.any() for leaf in leaves(prediction))


@pytest.mark.parametrize("regularize", [False, True])
def test_what_lies_in_ignored_parts_does_not_matter(regularize):
    labels = stripes(0, 3).clone()
    labels[..., : 2 * W] = IGNORE
    options = {"background": False, "dice": True, "drop_absent": False}
    prediction = predict(INSTANCE)
    changed = dataclasses.replace(prediction, layers=(), mask_features=prediction.mask_features.clone())
    changed.mask_features.data[..., : W // 2 - 1] *= -3
    # enough candidates lie elsewhere, so that ignored points are drawn only among those anywhere
    terms, others = (
        losses.semantic_terms(p, labels, points(), **options, regularize=regularize)
        for p in (dataclasses.replace(prediction, layers=()), changed)
    )
    assert torch.equal(terms["ce"], others["ce"])
    torch.testing.assert_close(terms["dice"], others["dice"])
    assert ("reg" in terms) == regularize


def test_absent_classes_leave_the_softmax():
    maps = torch.zeros(B, 4, T, H, W)
    maps[:, 3] = -1  # never the guess
    maps[:, 0] = 1
    prediction = showing(maps.requires_grad_(), "semantic")
    labels = torch.ones(B, T, 4 * H, 4 * W, dtype=torch.uint8)
    # zeros beyond the border would lower class 0 to a tie
    inner = PointSampler(96, lambda n, r: 0.1 + 0.8 * points().uniform(n, r))
    terms = losses.semantic_terms(prediction, labels, inner, background=False, drop_absent=True)
    assert terms["ce"].item() == pytest.approx(torch.tensor([1.0, 0]).logsumexp(0).item(), abs=1e-6)
    terms["ce"].sum().backward()
    assert maps.grad.flatten(2).abs().sum((0, 2)).bool().tolist() == [True, True, False, False]


def test_the_best_background_query_is_label_zero():
    groups = {"background": 2, "semantic": 3}
    prediction = predict(groups, outputs=1)
    got = losses.class_maps(prediction, background=True).unflatten(0, (B, T))
    torch.testing.assert_close(got[:, :, 0], prediction.mask_logits("background").amax(1))
    torch.testing.assert_close(got[:, :, 1:].transpose(1, 2), prediction.mask_logits("semantic"))


def test_smaller_tubes_are_painted_over_larger_ones():
    masks = torch.zeros(3, T, 8, 8, dtype=torch.bool)
    masks[0, :, 2:4, 2:4] = True
    masks[1] = True
    masks[1, :, 7] = False
    masks[2, 0, 2, 2] = True
    labels = losses.semantic_labels(masks, torch.tensor([4, 0, 253]))
    assert labels.dtype == torch.uint8
    assert labels[0, 2, 2] == 254
    assert labels[1, 2, 2] == labels[0, 3, 3] == 5
    assert labels[0, 0, 0] == 1
    assert not labels[:, 7].any()


# given objects


def test_objects_are_shown_by_the_best_of_their_queries():
    groups = {"background_vos": 4, "vos": 5}
    masks = torch.stack([blobs(2), blobs(2, seed=3)])
    prediction = predict(groups, outputs=1)
    terms = losses.object_terms(prediction, masks, [4, 1], points())
    logits = prediction.mask_logits("background_vos"), prediction.mask_logits("vos")
    best = torch.stack((logits[0].amax(1), logits[1][:, :4].amax(1), logits[1][:, 4]), 1).detach()
    same = losses.object_terms(
        dataclasses.replace(showing(best, "vos"), groups={"background_vos": 1, "vos": 2}),
        masks, [1, 1], points(),
    )  # fmt: skip
    torch.testing.assert_close(terms, same)
    losses.total(terms, losses.OBJECT_WEIGHTS).backward()
    assert prediction.mask_embedding.grad.abs().sum((0, 2)).all()  # each query is the best somewhere


def test_right_masks_cost_little_and_wrong_ones_much():
    masks = torch.stack([blobs(2), blobs(2, seed=3)])
    maps = torch.where(masks[..., 2::4, 2::4], 20.0, -20.0)
    right = losses.object_terms(showing(maps, "vos"), masks, [1, 1], points())
    wrong = losses.object_terms(showing(-maps, "vos"), masks, [1, 1], points())
    # points crowd at borders, where cells are coarser than pixels
    assert right["dice"] < 0.4 < 0.9 < wrong["dice"]
    assert right["mask"] < 4 < wrong["mask"]


# all of them


def all_terms(prediction, objects, at):
    """Every loss once."""
    masks = torch.stack([blobs(2), blobs(2, seed=3)])
    labels = torch.stack([losses.semantic_labels(m, c) for m, c in zip(MASKS, LABELS, strict=True)])
    return {
        "instance": instance_terms(prediction, at=at),
        "semantic": losses.semantic_terms(
            prediction, labels, at, background=True, dice=True, regularize=True, drop_absent=True
        ),
        "objects": losses.object_terms(objects, masks, [4, 1], at),
    }


OBJECTS = {"background_vos": 4, "vos": 5}


def test_padding_is_not_looked_at():
    """What network and labels say there, more than a cell from the image, changes no loss."""
    extent = torch.tensor([[0.5, 0.75], [1.0, 0.5]])
    plain = all_terms(predict(INSTANCE), predict(OBJECTS), points(extent=extent))
    changed = predict(INSTANCE), predict(OBJECTS)
    for b, (x, y) in enumerate(extent.tolist()):
        right, bottom = int(x * W) + 1, int(y * H) + 1
        for prediction in changed:
            prediction.mask_features.data[b, ..., right:] = 7
            prediction.mask_features.data[b, ..., bottom:, :] = 7
    other = all_terms(*changed, points(extent=extent))
    torch.testing.assert_close(plain, other)
    at = points(extent=extent).uncertain(lambda part: part.sum(-1), torch.tensor([1, 0, 0]))
    assert (at <= extent[[1, 0, 0]][:, None]).all()


def as_dtype(prediction, dtype):
    """With mask embeddings and features in that precision, class logits in float32."""
    return dataclasses.replace(
        prediction,
        mask_features=prediction.mask_features.to(dtype),
        mask_embedding=prediction.mask_embedding.to(dtype),
        layers=tuple(as_dtype(output, dtype) for output in prediction.layers),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_losses_are_float32(dtype):
    plain = all_terms(predict(INSTANCE), predict(OBJECTS), points())
    with torch.autocast("cpu", torch.bfloat16):
        prediction = predict(INSTANCE), predict(OBJECTS)
        halved = [as_dtype(p, dtype) for p in prediction]
        half = all_terms(*halved, points())
    for name, terms in half.items():
        for term, values in terms.items():
            assert values.dtype == torch.float32
            torch.testing.assert_close(values, plain[name][term], rtol=0.02, atol=0.02)
    sum(losses.total(terms, dict.fromkeys(terms, 1.0)) for terms in half.values()).backward()
    for p in prediction:
        assert all(leaf.grad.isfinite().all() for leaf in leaves(p))


def test_total_weighs_and_adds_over_outputs():
    terms = {"mask": torch.tensor([1.0, 2.0]), "dice": torch.tensor([3.0, 4.0])}
    assert losses.total(terms, {"mask": 5.0, "dice": 0.5, "class": 2.0}) == 18.5


def test_compiles_without_graph_breaks():
    # not all_terms: matching comes to the host, and so do the sizes of what it pairs
    def run(prediction, objects, masks, labels):
        at = PointSampler(32, losses.uniform_points(CPU))
        found = losses.semantic_terms(prediction, labels, at, background=True, regularize=True)
        found |= losses.object_terms(objects, masks, [4, 1], at)
        mine = instance_terms(prediction, at=at)
        return sum(values.sum() for values in (found | mine).values())

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    masks = torch.stack([blobs(2), blobs(2, seed=3)])
    arguments = predict(INSTANCE), predict(OBJECTS), masks, stripes(0, 3)
    torch.manual_seed(0)
    plain = run(*arguments)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(*arguments), plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_losses_never_wait_for_the_gpu():
    device = torch.device("cuda")

    def there(p):
        return dataclasses.replace(
            p, queries=p.queries.to(device), mask_embedding=p.mask_embedding.to(device),
            mask_features=p.mask_features.to(device),
            class_logits=None if p.class_logits is None else p.class_logits.to(device),
            layers=tuple(there(o) for o in p.layers),
        )  # fmt: skip

    prediction, objects = there(predict(INSTANCE)), there(predict(OBJECTS))
    masks, labels = [m.to(device) for m in MASKS], [c.to(device) for c in LABELS]
    given, semantic = torch.stack([blobs(2), blobs(2, seed=3)]).to(device), stripes(0, 3).to(device)
    pairs, at = PAIRS.to(device), PointSampler(96, losses.uniform_points(device))

    def run():
        terms = instance_terms(prediction, masks, labels, pairs, at)
        terms |= losses.semantic_terms(prediction, semantic, at, background=True, dice=True)
        terms |= losses.object_terms(objects, given, [4, 1], at)
        return sum(values.sum() for values in terms.values())

    run().backward()  # kernels are compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
