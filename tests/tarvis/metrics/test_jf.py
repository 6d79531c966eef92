import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tarvis.metrics.jf import jf_frame, statistics, summary


def boundary_f(truth, predicted):
    """F of two masks [H, W]."""
    return jf_frame(truth.astype(np.uint8), predicted.astype(np.uint8), 1)[1].item()


def plain_f(truth, predicted):
    """F by the book: boundaries of whole masks, dilated by a disk."""

    def boundary(mask):
        edge = np.zeros_like(mask)
        edge[:, :-1] |= mask[:, :-1] ^ mask[:, 1:]
        edge[:-1] |= mask[:-1] ^ mask[1:]
        edge[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
        return edge

    radius = int(np.ceil(0.008 * np.linalg.norm(truth.shape)))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = x**2 + y**2 <= radius**2
    true_edge, edge = boundary(truth), boundary(predicted)
    if not true_edge.any() or not edge.any():
        return float(true_edge.any() == edge.any())
    precision = (edge & ndimage.binary_dilation(true_edge, disk)).sum() / edge.sum()
    recall = (true_edge & ndimage.binary_dilation(edge, disk)).sum() / true_edge.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 1), (3, 200), (40, 60), (300, 450)]), st.floats(0, 3))
@settings(max_examples=40, deadline=None)
def test_boundaries_are_those_of_plain_dilation(seed, shape, sigma):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).random((2, *shape)), (0, sigma, sigma))
    truth, predicted = noise > np.quantile(noise, 0.7)
    assert boundary_f(truth, predicted) == plain_f(truth, predicted)


def test_regions_by_hand():
    truth, predicted = np.array([[1, 1, 1, 2, 0, 0]]), np.array([[1, 1, 2, 2, 3, 0]])
    j, _ = jf_frame(truth, predicted, 4)
    assert j == pytest.approx([2 / 3, 1 / 2, 0, 1])


def test_empty_masks():
    mask, nothing = np.zeros((2, 20, 20), bool)
    mask[5:9, 5:9] = True
    assert boundary_f(nothing, nothing) == 1
    assert boundary_f(mask, nothing) == boundary_f(nothing, mask) == 0
    assert boundary_f(mask, mask) == 1


def test_a_shift_within_the_tolerance_costs_nothing():
    mask = np.zeros((60, 100), bool)  # tolerance: 1 pixel
    mask[20:40, 20:40] = True
    assert boundary_f(mask, np.roll(mask, 1, 1)) == 1
    assert boundary_f(mask, np.roll(mask, 2, 1)) < 1


def test_statistics_by_hand():
    mean, recall, decay = statistics(np.array([1, 0.8, 0.6, 0.4, 0.2]))  # borders at frames 0 1 2 3 4
    assert (mean, recall) == (pytest.approx(0.6), pytest.approx(3 / 5))
    assert decay == pytest.approx(0.9 - 0.3)
    assert statistics(np.array([0.3]))[2] == 0
    assert statistics(np.r_[np.ones(300), np.zeros(300)])[2] == 1  # more than 256 frames


def test_objects_count_alike():
    numbers = summary(
        {"a_1": (np.array([1.0, 1.0]), np.array([0.0, 0.0])), "b_1": (np.array([0.0]), np.array([1.0]))}
    )
    assert numbers["J-Mean"] == numbers["F-Mean"] == numbers["J&F-Mean"] == 0.5
    assert (numbers["J-Recall"], numbers["per_object/a_1/J"]) == (0.5, 1)
