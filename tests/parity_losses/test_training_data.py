"""Replays what the published code drew and made for training: points, chunks, sizes of clips."""

import json

import cv2
import numpy as np
import pytest
import torch

from tarvis.data.mixture import deal, num_points
from tarvis.data.transforms import resize_labels
from tarvis.datasets.points import inner_point


@pytest.fixture
def folder(request):
    return request.config.getoption("--goldens-losses")


@pytest.fixture
def recorded(folder):
    return json.loads((folder / "misc_training.json").read_text())


def test_as_many_objects_get_points_as_published(recorded):
    random = torch.Generator().manual_seed(22021994)
    counts = [num_points(torch.rand(4, generator=random).tolist(), 4, 0.3) for _ in range(64)]
    assert counts == recorded["pet_count_for_4_objects_p0.3_seed22021994"]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_chunks_are_dealt_as_published(recorded, world):
    """The original permutes 16 blocks of 4 steps; every rank has its clips of each."""
    kinds = ("A_instance_seg", "B_panoptic_seg", "V_vos_1", "V_vos_2")
    order = torch.randperm(16, generator=torch.Generator().manual_seed(123987)).tolist()
    chunks = [kinds[k] for k in deal([4, 8, 2, 2], order)]
    mine = [kind for kind in chunks for _ in range(16 // world)]
    assert recorded["sampler_toy"]["worlds"][str(world)]["per_rank_types"] == [mine] * world


def test_label_maps_are_resized_as_the_published_masks(folder):
    example = np.load(folder / "resize_example.npz")
    size = example["image_out"].shape[1:3]
    for frame, expected in zip(example["image"], example["image_out"], strict=True):
        assert (cv2.resize(frame, size[::-1]) == expected).all()
    masks, resized = (example[key].reshape(-1, *example[key].shape[2:]) for key in ("mask", "mask_out"))
    for mask, expected in zip(masks, resized, strict=True):
        assert (resize_labels(mask, size, 0) == expected).all()


def test_points_of_masks_are_the_published_ones(folder):
    stored = np.load(folder / "pet_and_grid_helpers.npz")
    for mask, (y, x) in zip(stored["masks"], stored["points_yx"], strict=True):
        row, column = inner_point(mask, edge_is_border=False)
        np.testing.assert_allclose(
            [(row + 0.5) / mask.shape[0], (column + 0.5) / mask.shape[1]], [y, x], atol=1e-6
        )
