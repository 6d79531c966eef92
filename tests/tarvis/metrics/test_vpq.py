import numpy as np
import pytest

from tarvis.metrics.overlaps import overlaps
from tarvis.metrics.vpq import VPQ, Segments, mean_over_windows

IS_THING = {0: False, 1: True, 2: True}


def segments(ids, categories, crowd=(), areas=()):
    crowd = [k in crowd for k in ids]
    return Segments(
        np.array(ids), np.array(categories), np.array(crowd, bool), np.array(areas or [0] * len(ids))
    )


def frame(truth, predicted, classes, crowd=()):
    """Ids as strings of digits, a pixel each; classes by id."""
    truth, predicted = (np.array([[int(c) for c in text]]) for text in (truth, predicted))
    ids = [sorted(set(a.ravel().tolist()) - {0}) for a in (truth, predicted)]
    areas = [int((truth == k).sum()) for k in ids[0]]
    return (
        overlaps(truth, predicted),
        segments(ids[0], [classes[k] for k in ids[0]], crowd, areas),
        segments(ids[1], [classes[k] for k in ids[1]]),
    )


def vpq_of(*videos, windows=(1,)):
    vpq = VPQ(IS_THING, windows)
    for frames in videos:
        for each in frames:
            vpq.add_frame(*each)
        vpq.end_video()
    return vpq


def test_one_match_one_miss_one_false_alarm():
    # class 1: iou 3/4, and the lone pixels of ids 2 and 3 match nothing; class 0: 4/5
    numbers = vpq_of([frame("1111244444", "1110334444", {1: 1, 2: 1, 3: 1, 4: 0})]).summary(1)
    assert numbers["per_class/1/iou"] == pytest.approx(3 / 4)
    assert [numbers[f"per_class/1/{key}"] for key in ("tp", "fp", "fn")] == [1, 1, 1]
    assert numbers["per_class/1/pq"] == pytest.approx(3 / 4 / 2)
    assert numbers["thing/pq"] == pytest.approx(37.5)
    assert numbers["stuff/pq"] == pytest.approx(80)
    assert numbers["all/pq"] == pytest.approx((37.5 + 80) / 2)
    assert (numbers["all/n"], numbers["thing/n"]) == (2, 1)
    assert numbers["thing/sq"] == pytest.approx(75)
    assert numbers["thing/rq"] == pytest.approx(50)


def test_half_is_not_enough():
    assert vpq_of([frame("1100", "1111", {1: 1})]).summary(1)["per_class/1/pq"] > 0.49  # void does not count
    assert vpq_of([frame("1122", "1111", {1: 1, 2: 1})]).summary(1)["per_class/1/tp"] == 0


def test_classes_must_agree():
    numbers = vpq_of([frame("1111", "2222", {1: 1, 2: 2})]).summary(1)
    assert (numbers["per_class/1/fn"], numbers["per_class/2/fp"]) == (1, 1)


def test_a_swap_of_ids_breaks_longer_windows_only():
    first, second = frame("1122", "1122", {1: 1, 2: 1}), frame("1122", "2211", {1: 1, 2: 1})
    vpq = vpq_of([first, second], windows=(1, 2))
    assert vpq.summary(1)["all/pq"] == pytest.approx(100)
    assert vpq.summary(2)["all/pq"] == 0  # each shares 2 of 6 pixels
    assert mean_over_windows({n: vpq.summary(n) for n in (1, 2)}, (1, 2))["all"] == pytest.approx(50)


def test_windows_end_with_the_video_and_short_videos_have_none():
    one = frame("1122", "1122", {1: 1, 2: 1})
    vpq = vpq_of([one], [one] * 3, windows=(1, 2, 4))
    assert vpq.summary(1)["per_class/1/tp"] == 8
    assert vpq.summary(2)["per_class/1/tp"] == 4
    assert vpq.summary(4) == {}
    assert "all" not in mean_over_windows({n: vpq.summary(n) for n in (1, 2, 4)}, (1, 4))


def test_false_alarms_on_void_and_crowd_are_waived():
    assert vpq_of([frame("1100044", "1122244", {1: 1, 2: 1, 4: 0})]).summary(1)["per_class/1/fp"] == 0
    crowd = vpq_of([frame("1155544", "1122244", {1: 1, 2: 1, 5: 1, 4: 0}, crowd=(5,))]).summary(1)
    assert [crowd[f"per_class/1/{key}"] for key in ("tp", "fp", "fn")] == [1, 0, 0]
    other = vpq_of([frame("1155544", "1122244", {1: 1, 2: 2, 5: 1, 4: 0}, crowd=(5,))]).summary(1)
    assert other["per_class/2/fp"] == 1


def test_of_several_crowds_of_a_class_the_last_listed_waives():
    # 2 lies on crowd 5 by half and a bit, 6 is listed after it
    numbers = vpq_of([frame("15556", "12222", {1: 1, 2: 1, 5: 1, 6: 1}, crowd=(5, 6))]).summary(1)
    assert numbers["per_class/1/fp"] == 1


def test_large_ids_and_many_runs_are_counted_exactly():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 2**24, (2, 3))[:, rng.integers(0, 3, (40, 50))]
    shared = overlaps(truth, predicted)
    for t, p, pixels in zip(*shared, strict=True):
        assert pixels == ((truth == t) & (predicted == p)).sum()
    assert shared.pixels.sum() == 2000
    assert overlaps(np.zeros((0, 4), int), np.zeros((0, 4), int)).pixels.size == 0
