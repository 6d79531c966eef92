"""What every step trains on: shares, order, and that nothing but the step decides."""

from collections import Counter
from itertools import groupby

import numpy as np
import pytest

from tarvis.data.clips import Kind
from tarvis.data.mixture import ROUND, Mixture, Purpose, generator, num_points
from tarvis.structures import InputError

WEIGHTS = {"vis": 0.3, "vps": 0.3, "vos": 0.4}


class Items:
    """A set of kinds with as many items."""

    def __init__(self, name, kinds):
        self.name = name
        self._kinds = kinds

    def kinds(self):
        return self._kinds


VIS = Items("vis", {Kind("vis"): 7})
VOS = Items("vos", {Kind("vos", n): 5 for n in (1, 2, 3, 4)})
IMAGES = Items("images", {Kind(task): 11 for task in WEIGHTS})


def kinds_of(mixture, count, start=0):
    return [mixture.chunk(number)[0] for number in range(start, start + count)]


def test_sets_tasks_and_numbers_of_objects_come_as_often_as_they_weigh():
    mixture = Mixture([VIS, VOS, IMAGES], (0.2, 0.3, 0.5), WEIGHTS, seed=1)
    cells = kinds_of(mixture, 20 * ROUND)
    sets = Counter(cell.set_index for cell in cells)
    assert [sets[k] / len(cells) for k in range(3)] == pytest.approx([0.2, 0.3, 0.5], abs=0.002)
    tasks = Counter(cell.kind.task for cell in cells if cell.set_index == 2)
    assert [tasks[t] / sets[2] for t in WEIGHTS] == pytest.approx([0.3, 0.3, 0.4], abs=0.01)
    objects = Counter(cell.kind.num_objects for cell in cells if cell.set_index == 1)
    assert max(objects.values()) - min(objects.values()) <= 2


def test_shares_hold_in_every_stretch_of_a_round_or_more():
    mixture = Mixture([VIS, VOS], (0.9, 0.1), WEIGHTS, seed=1)
    for start in range(0, 10 * ROUND, ROUND):
        counts = Counter(cell.set_index for cell in kinds_of(mixture, ROUND, start))
        assert abs(counts[1] - 6.4) < 4  # four kinds of clips, each up to one away


def test_published_weights_of_fine_tuning_are_kept():
    weights = (0.225, 0.225, 0.075, 0.075, 0.15, 0.2, 0.05)
    sets = [Items(str(k), {Kind("vis"): 3} if k < 5 else VOS.kinds()) for k in range(7)]
    counts = Counter(
        cell.set_index for cell in kinds_of(Mixture(sets, weights, WEIGHTS, seed=0), 90_000 // 8)
    )
    assert [counts[k] / (90_000 // 8) for k in range(7)] == pytest.approx(weights, abs=2e-4)


def test_the_order_is_random_and_depends_on_the_seed():
    orders = [
        [cell.number for cell in kinds_of(Mixture([VIS, VOS], (1, 1), WEIGHTS, seed=s), 64)]
        for s in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    runs = [len(list(run)) for _, run in groupby(k == 0 for k in orders[0])]
    assert 15 < len(runs) < 50


def test_a_chunk_is_the_same_whatever_was_asked_before():
    asked = Mixture([VIS, VOS, IMAGES], (1, 1, 1), WEIGHTS, seed=4)
    chunks = [asked.chunk(number) for number in range(300)]
    for number in (299, 150, 64, 0):
        assert Mixture([VIS, VOS, IMAGES], (1, 1, 1), WEIGHTS, seed=4).chunk(number) == chunks[number]


def test_visits_count_the_chunks_of_a_cell():
    mixture = Mixture([VIS, VOS], (0.3, 0.7), WEIGHTS, seed=2)
    seen = Counter()
    for number in range(3 * ROUND):
        cell, visit = mixture.chunk(number)
        assert visit == seen[cell.number]
        seen[cell.number] += 1


def test_every_item_comes_once_before_any_comes_again():
    mixture = Mixture([VIS], (1,), WEIGHTS, seed=3)
    cell = mixture.cells[0]
    epochs = np.array([mixture.item(cell, k) for k in range(70)]).reshape(10, 7)
    assert (np.sort(epochs, 1) == np.arange(7)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 5


def test_a_set_of_one_task_needs_no_weight_of_it():
    assert kinds_of(Mixture([VIS], (1,), {"vos": 1.0}, seed=0), 1)[0].kind.task == "vis"
    only = Mixture([IMAGES], (1,), {"vis": 0.0, "vps": 1.0}, seed=0)
    assert {cell.kind.task for cell in kinds_of(only, 50)} == {"vps"}
    with pytest.raises(InputError, match="images: none of its tasks has a weight: vis, vps, vos"):
        Mixture([IMAGES], (1,), {}, seed=0)
    with pytest.raises(InputError, match="no set has a weight"):
        Mixture([IMAGES], (0,), WEIGHTS, seed=0)


def test_draws_depend_on_seed_purpose_and_place_alone():
    base = (1, Purpose.SAMPLE, 5, 6, 7)
    first = generator(*base).random(4).tolist()
    assert generator(*base).random(4).tolist() == first
    for k in range(5):
        other = list(base)
        other[k] = Purpose.POINTS if k == 1 else other[k] + 1
        assert generator(*other).random(4).tolist() != first
    long = generator(1, Purpose.SAMPLE, 0).random(10_000)  # does not run into the numbers of the next place
    assert not np.isin(generator(1, Purpose.SAMPLE, 1).random(100), long).any()


def test_the_share_of_points_is_that_of_small_numbers():
    uniforms = np.random.default_rng(0).random((4000, 8))
    counts = [num_points(row, 4, 0.3) for row in uniforms.tolist()]
    assert np.mean(counts) == pytest.approx(1.2, abs=0.05)
    assert {num_points(row, 4, 0.0) for row in uniforms[:9].tolist()} == {0}
