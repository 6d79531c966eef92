import numpy as np
import pytest

from tarvis.metrics.overlaps import overlaps
from tarvis.metrics.stq import STQ, encode


def stq_of(**sequences):
    """Sequences of frames (truth, predicted), a frame being pixels (class, instance). Class 1 is a thing."""
    stq = STQ(3, [1])
    for name, frames in sequences.items():
        for truth, predicted in frames:
            maps = [encode(np.array([[k for k, _ in pixels]]), np.array([[i for _, i in pixels]]))
                    for pixels in (truth, predicted)]  # fmt: skip
            stq.add_frame(overlaps(*maps))
        stq.end_sequence(name)
    return stq.summary()


CAR, OTHER, CROWD, ROAD, VOID = (1, 1), (1, 2), (1, 0), (0, 0), (255, 0)


def test_perfect():
    frames = [([CAR, CAR, OTHER, ROAD], [CAR, CAR, OTHER, ROAD])] * 2
    assert stq_of(a=frames)["STQ"] == pytest.approx(1)


def test_a_changed_id_costs_association_alone():
    frames = [([CAR], [CAR]), ([CAR], [OTHER])]
    numbers = stq_of(a=frames)
    assert numbers["IoU"] == 1
    # each half: TPA 1, |p| 1, |g| 2: 1 * 1 / 2, together 1, over |g| = 2
    assert numbers["AQ"] == pytest.approx(0.5)
    assert numbers["STQ"] == pytest.approx(0.5**0.5)


def test_tubes_count_alike_over_all_sequences():
    good, bad = [([CAR, OTHER], [CAR, OTHER])], [([CAR], [ROAD])]
    numbers = stq_of(a=good, b=bad)
    assert numbers["AQ"] == pytest.approx(2 / 3)
    assert numbers["per_sequence/a/AQ"] == 1
    assert numbers["per_sequence/b/STQ"] == 0
    assert numbers["per_sequence/b/Length"] == 1


def test_predictions_on_crowd_do_not_count_but_those_on_void_do():
    assert stq_of(a=[([CAR, CROWD], [CAR, CAR])])["AQ"] == 1
    assert stq_of(a=[([CAR, VOID], [CAR, CAR])])["AQ"] == pytest.approx(0.5)


def test_class_iou_ignores_void_truth():
    numbers = stq_of(a=[([ROAD, ROAD, VOID], [ROAD, CAR, CAR])])
    assert numbers["IoU"] == pytest.approx((1 / 2 + 0) / 2)  # road 1 of 2, class 1 only as a false positive


def test_predicted_void_is_one_class_more():
    assert stq_of(a=[([ROAD, ROAD], [ROAD, VOID])])["IoU"] == pytest.approx((1 / 2 + 0) / 2)


def test_nothing_at_all():
    assert stq_of()["STQ"] == 0
    assert stq_of(a=[])["per_sequence/a/Length"] == 0
