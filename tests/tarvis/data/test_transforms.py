"""Resizing, colouring and warping; points of masks."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tarvis.data.transforms import (
    BRIGHTNESS,
    Colour,
    about_centre,
    affine,
    brighter,
    mirror,
    mirrored,
    resize_labels,
    resizing,
    shift,
    warp_image,
    warp_labels,
)
from tarvis.datasets.points import inner_point


def blobs(size, count, seed=0, dtype=np.uint8):
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    labels = np.zeros(size, dtype)
    for k in range(1, count + 1):
        cy, cx, r = random.random(3) * (size[0], size[1], 0.4 * size[0])
        labels[(y - cy) ** 2 + (x - cx) ** 2 < r**2] = k
    return labels


@pytest.mark.parametrize("size", [(45, 75), (90, 150), (31, 97), (60, 99), (1, 1), (60, 100)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_label_map_is_resized_as_each_of_its_masks_would_be(size, dtype):
    labels = blobs((60, 100), 7, dtype=dtype)
    masks = torch.stack([torch.from_numpy(labels == k) for k in range(8)])
    each = F.interpolate(masks[None].float(), size, mode="bilinear")[0] > 0.5
    expected = np.full(size, 255)
    for k, mask in enumerate(each.numpy()):
        expected[mask] = k
    resized = resize_labels(labels, size, 255)
    assert resized.dtype == dtype
    assert (resized == expected).all()


def test_labels_between_others_are_not_made_up():
    labels = np.zeros((40, 40), np.uint8)
    labels[:, 20:] = 9
    assert set(np.unique(resize_labels(labels, (27, 33), 255))) <= {0, 9, 255}


def test_shear_and_rotation_are_the_published_ones():
    expected = [[0.945668, -0.295520], [0.293051, 0.955336]]
    np.testing.assert_allclose(affine(1, 0.2, 0.1), expected, atol=1e-6)


def test_a_map_about_the_centre_keeps_it():
    matrix = about_centre(affine(1.1, 0.3, 0.1), (48, 80))
    np.testing.assert_allclose(matrix @ (39.5, 23.5, 1), (39.5, 23.5, 1))


def test_resizing_as_a_map_is_resizing():
    ramp = np.arange(40, dtype=np.float32)[None].repeat(20, 0)
    image = np.stack([ramp * 6] * 3, -1).astype(np.uint8)
    target = (40, 80)
    warped = warp_image(image, resizing((20, 40), target), target)
    expected = F.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None].float(), target, mode="bilinear")[
        0, 0
    ]
    inside = np.s_[2:-2, 2:-2]
    assert abs(warped[..., 0][inside] - expected.numpy()[inside]).max() <= 1


def test_warped_labels_lie_where_the_warped_image_shows_them():
    labels = blobs((60, 100), 3)
    image = np.stack([80 * labels] * 3, -1)
    matrix = shift(-5, -3) @ resizing((60, 100), (90, 150)) @ about_centre(affine(0.95, 0.3, 0.1), (60, 100))
    seen, where = warp_image(image, matrix, (80, 120)), warp_labels(labels, matrix, (80, 120), 0)
    assert (abs(seen[..., 0].astype(int) - 80 * where.astype(int)) > 2).mean() < 0.05  # along the edges
    assert warp_labels(labels, shift(200, 0), (60, 100), 255).min() == 255


def test_flipping_as_a_map_is_flipping():
    labels = blobs((30, 50), 4)
    assert (warp_labels(labels, mirrored((30, 50)), (30, 50), 0) == labels[:, ::-1]).all()
    stack = np.stack([labels, labels[::-1]])[None]
    assert (mirror(stack) == stack[..., ::-1]).all()


def test_no_change_of_colour_leaves_the_image_as_it_is_but_for_rounding():
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    for space in (0, 3, 5):
        same = Colour(0, 0, 1.0, 0, space).apply(image)
        assert abs(same.astype(int) - image).mean() < 2


def test_hue_turns_and_brightness_adds_on_rgb():
    red = np.full((4, 4, 3), (200, 20, 20), np.uint8)
    turned = Colour(60, 0, 1.0, 0, 5).apply(red)[0, 0]  # 120 degrees: green
    assert turned[1] > 150 > 60 > max(turned[0], turned[2])
    grey = np.full((4, 4, 3), 100, np.uint8)
    for space in range(len(BRIGHTNESS)):
        assert abs(Colour(0, 0, 1.0, 20, space).apply(grey).mean() - 120) < 5
    assert Colour(0, 0, 1.05, 0, 5).apply(grey).mean() == pytest.approx(127 - 1.05 * 27, abs=1)


@pytest.mark.parametrize("space", [3, 4])
@pytest.mark.parametrize("brightness", [-20, 0, 25])
def test_brightness_in_lab_and_luv_is_closer_to_floats_than_their_bytes(space, brightness):
    image = np.random.default_rng(0).integers(60, 256, (64, 64, 3), np.uint8)
    there, back, _ = BRIGHTNESS[space]
    light = cv2.cvtColor(image.astype(np.float32) / 255, there)
    light[..., 0] = np.clip(light[..., 0] + brightness / 2.55, 0, 100)
    meant = np.clip(255 * cv2.cvtColor(light, back), 0, 255)
    coded = cv2.cvtColor(cv2.add(cv2.cvtColor(image, there), np.array([brightness, 0.0, 0, 0])), back)
    seen = brighter(image.copy(), space, brightness).astype(float)
    assert abs(seen - meant).mean() < abs(coded - meant).mean()
    assert np.percentile(abs(seen - meant), 99) < 4


def test_draws_of_colour_keep_within_their_ranges():
    random = np.random.default_rng(0)
    drawn = [Colour.draw(random, "wide") for _ in range(500)]
    assert {c.space for c in drawn} == set(range(6))
    assert max(abs(c.hue) for c in drawn) == 8
    assert max(abs(c.saturation) for c in drawn) == 12
    assert 20 < max(abs(c.brightness) for c in drawn) <= 25
    assert max(abs(Colour.draw(random, "narrow").brightness) for _ in range(500)) <= 20
    assert Colour.draw(random, "none") is None


def test_an_object_that_the_edge_cuts_has_its_point_inside():
    mask = np.zeros((20, 30), bool)
    mask[5:16, :9] = True  # a box of 11 x 9 at the left edge
    assert inner_point(mask) == (10, 4)


def test_a_mask_of_the_whole_picture_has_its_point_in_the_middle():
    assert inner_point(np.ones((21, 31), bool)) == (10, 15)


def test_a_point_lies_in_its_mask_and_an_empty_mask_has_none():
    ring = np.hypot(*(np.mgrid[:41, :41] - 20))
    mask = (ring < 18) & (ring > 9)
    assert mask[inner_point(mask)]
    with pytest.raises(ValueError, match="empty"):
        inner_point(np.zeros((4, 4), bool))
