import numpy as np
import pytest

from tarvis.metrics.track_ap import AREA_RANGES, TrackAP, mean_of_defined, occlusion_score, outside, summary


def ap_of(*videos, ranges=("all",), **options):
    ap = TrackAP(ranges)
    for iou, scores in videos:
        ap.add(1, np.array(iou, float), np.array(scores, float), **options)
    return ap


def test_one_right_and_one_wrong_prediction():
    # thresholds .5 ... .95: right up to .7; then nothing is
    ap = ap_of(([[0.7, 0], [0, 0.1]], [0.9, 0.8]))
    at_half = ap.precision(1)[0, 0]  # recall reaches 1/2 with precision 1
    assert at_half[:51] == pytest.approx(1)
    assert at_half[51:] == pytest.approx(0)
    numbers = summary(ap, [1])
    assert numbers["AP50"] == pytest.approx(51 / 101)
    assert numbers["AP75"] == 0
    assert numbers["AP"] == pytest.approx(51 / 101 * 5 / 10)  # .5 .55 .6 .65 .7
    assert numbers["AR_1"] == pytest.approx(0.25)


def test_a_wrong_prediction_costs_only_what_comes_after_it():
    first_right = summary(ap_of(([[1.0], [0.0]], [0.9, 0.8])), [1])
    first_wrong = summary(ap_of(([[0.0], [1.0]], [0.9, 0.8])), [1])
    assert first_right["AP"] == pytest.approx(1)
    assert first_wrong["AP"] == pytest.approx(0.5)


def test_the_better_score_chooses_first_and_of_equal_truths_the_later_is_taken():
    # the first takes truth 1 (the later of two equal ones), so that nothing is left for the second
    taken = ap_of(([[0.8, 0.8], [0.0, 0.9]], [0.9, 0.8])).recall(1)[0, 0]
    left = ap_of(([[0.8, 0.7], [0.0, 0.9]], [0.9, 0.8])).recall(1)[0, 0]
    assert (taken, left) == (0.5, 1)


def test_equal_scores_keep_the_order_of_file_and_videos():
    right, wrong = ([[1.0]], [0.5]), ([[0.0]], [0.5])
    assert summary(ap_of(right, wrong), [1])["AP"] == pytest.approx(51 / 101)
    assert summary(ap_of(wrong, right), [1])["AP"] == pytest.approx(51 / 101 / 2)


def test_crowd_is_taken_again_and_again_and_counts_as_nothing():
    ap = ap_of(([[0.9, 0.6], [0.0, 0.8], [0.0, 0.8]], [0.9, 0.8, 0.7]), crowd=np.array([False, True]))
    assert summary(ap, [1])["AP50"] == pytest.approx(1)
    assert ap.recall(1)[0, 0] == 1


def test_ignored_truths_come_last_even_with_a_higher_iou():
    ap = ap_of(([[0.6, 0.9]], [0.9]), truth_outside=np.array([[False, True]]))
    assert ap.recall(1)[0, 0] == 1


def test_unmatched_predictions_out_of_range_are_ignored():
    outside_range = np.array([[False, False], [True, False]])  # of "all" and of another range
    ap = ap_of(([[0.0], [1.0]], [0.9, 0.8]), ranges=("all", "large"), predicted_outside=outside_range)
    numbers = summary(ap, [1])
    assert (numbers["AP"], numbers["AP_large"]) == (pytest.approx(0.5), pytest.approx(1))


def test_classes_without_truth_are_left_out_of_means():
    ap = ap_of(([[1.0]], [0.5]))
    ap.add(2, np.zeros((3, 0)), np.ones(3))
    numbers = summary(ap, [1, 2, 3])
    assert numbers["AP"] == pytest.approx(1)
    assert numbers["per_category/2/AP"] == numbers["per_category/3/AR_100"] == -1
    assert summary(TrackAP(), [1])["AP"] == -1


def test_only_the_best_hundred_predictions_count():
    iou, scores = np.zeros((101, 1)), np.linspace(1, 0, 101)
    iou[100] = 1
    assert ap_of((iou, scores)).recall(1)[0, 0] == 0
    assert ap_of((iou[1:], scores[1:])).recall(1)[0, 0] == 1
    assert ap_of((iou[1:], scores[1:])).recall(1, 10)[0, 0] == 0


def test_no_predictions_find_nothing():
    ap = ap_of((np.zeros((0, 2)), []))
    assert summary(ap, [1])["AP"] == summary(ap, [1])["AR_100"] == 0


def test_ranges_include_both_ends():
    assert outside(np.array([100.0, 128**2, 256**2]), AREA_RANGES).tolist() == [
        [False, False, True],
        [True, False, False],
        [True, True, False],
    ]


def test_occlusion_is_that_of_the_worse_half():
    assert occlusion_score(["no_occlusion", None, "severe_occlusion", "slight_occlusion"]) == 0.5  # 2 of 3
    assert occlusion_score([None]) == 0
    assert mean_of_defined(np.array([-1, 0.2, 0.4])) == pytest.approx(0.3)
