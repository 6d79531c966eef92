"""The benchmark of post-processing compares two things that do the same; here on a small clip."""

import pytest
import torch

from bench import bench_postprocess as bench


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench, "FRAMES", 2)
    monkeypatch.setattr(bench, "QUARTER", (24, 48))
    monkeypatch.setattr(bench, "NETWORK", (90, 190))
    monkeypatch.setattr(bench, "SIZE", (113, 238))
    monkeypatch.setattr(bench, "NUM_TRACKS", 3)


@pytest.mark.parametrize("case", bench.CASES)
def test_both_sides_give_the_same_pixels(case):
    with torch.inference_mode():
        ours, theirs = (bench.pixels(case, bench.prepare(case, name)()) for name in bench.IMPLEMENTATIONS)
    assert ours.shape == theirs.shape
    assert (ours == theirs).mean() >= bench.AGREEMENT
    assert 0 < (ours == ours.flat[0]).mean() < 1  # and they are not all alike


def test_labels_are_those_of_stuff():
    with torch.inference_mode():
        labels = bench.prepare("labels", "tarvis")()
    assert labels.dtype == torch.uint8
    assert set(labels.unique().tolist()) <= set(bench.stuff_rows())
