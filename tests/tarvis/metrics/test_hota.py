import numpy as np
import pytest

from tarvis.metrics.hota import Detections, class_means, judged


def detections(truth, predicted, iou):
    return Detections(
        np.array(truth, int),
        np.array(predicted, int),
        np.array(iou, float).reshape(len(truth), len(predicted)),
    )


@pytest.fixture
def hota():
    pytest.importorskip("trackeval")
    from tarvis.metrics.hota import HOTA

    return HOTA()


def test_perfect_tracks(hota):
    hota.add(1, "a", [detections([5, 9], [9, 5], [[0, 1], [1, 0]])] * 2)
    assert hota.numbers()[1] == pytest.approx(dict.fromkeys(("HOTA", "DetA", "AssA", "DetRe", "OWTA"), 1))


def test_a_changed_id_halves_association(hota):
    hota.add(1, "a", [detections([1], [1], [[1]]), detections([1], [2], [[1]])])
    numbers = hota.numbers()[1]
    assert numbers["DetA"] == pytest.approx(1)
    assert numbers["AssA"] == pytest.approx(0.5)
    assert numbers["HOTA"] == pytest.approx(0.5**0.5)


def test_thresholds_are_averaged_and_sequences_summed(hota):
    hota.add(1, "a", [detections([1], [1], [[0.5]])])  # found at .05 ... .5: 10 of 19
    hota.add(1, "b", [detections([1], [], np.zeros((1, 0)))])
    numbers = hota.numbers()[1]
    assert numbers["DetRe"] == pytest.approx(10 / 19 / 2)
    assert numbers["AssA"] == pytest.approx(10 / 19)


def test_what_nobody_annotated_is_not_judged():
    frame = detections([1], [1, 2], [[0.6, 0.2]])
    assert judged(frame, is_negative=False, is_exhaustive=True) is frame
    assert judged(frame, is_negative=True, is_exhaustive=False).predicted.tolist() == [1]
    lone = detections([], [1, 2], np.zeros((0, 2)))
    assert judged(lone, is_negative=False, is_exhaustive=True).predicted.size == 0
    assert judged(lone, is_negative=True, is_exhaustive=True).predicted.tolist() == [1, 2]


def test_means_over_classes():
    numbers = {4: {"HOTA": 0.2}, 5: {"HOTA": 0.4}, 6: {"HOTA": 0.6}}
    means = class_means(numbers, common=[4])
    assert means == pytest.approx({"HOTA/all": 40, "HOTA/common": 20, "HOTA/uncommon": 50})
    assert class_means({5: {"HOTA": 0.4}}, common=[4]).keys() == {"HOTA/all", "HOTA/uncommon"}
