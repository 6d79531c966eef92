import numpy as np
import pytest
import torch

from tarvis.stitch.resize import area_size, network_size, resize_frame, resize_mask
from tarvis.structures import Size


@pytest.mark.parametrize(
    ("original", "min_size", "wanted"),
    [
        ((720, 1280), 448, (448, 796)),
        ((1280, 720), 448, (796, 448)),
        ((375, 1242), 448, (402, 1333)),  # the longer side decides
        ((480, 854), None, (480, 854)),
        ((3000, 4000), None, (3000, 4000)),  # native size knows no limit
        ((100, 125), 2, (2, 2)),  # 2.5 is rounded to even
        ((1, 5000), 448, (1, 1333)),  # never less than a pixel
    ],
)
def test_the_shorter_side_gets_its_size_unless_the_longer_gets_too_long(
    original: Size, min_size: int | None, wanted: Size
) -> None:
    assert network_size(original, min_size, 1333) == wanted


def test_area_rule_keeps_the_shape_and_about_the_area() -> None:
    height, width = area_size((720, 1280), 200_000)
    assert abs(height * width - 200_000) < width
    assert width / height == pytest.approx(1280 / 720, rel=0.01)
    assert area_size((1, 1000), 10) == (1, 10)


def test_frames_of_the_right_size_are_left_alone() -> None:
    frame = np.zeros((4, 6, 3), np.uint8)
    assert resize_frame(frame, (4, 6)) is frame
    assert resize_frame(frame, (8, 9)).shape == (8, 9, 3)


def test_a_mask_keeps_the_pixels_it_covers_by_more_than_half() -> None:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, :4] = True
    resized = resize_mask(mask, (4, 4))
    assert resized.dtype == torch.bool
    assert resized[:, :2].all()
    assert not resized[:, 2:].any()
    assert torch.equal(resize_mask(mask.to(torch.uint8) * 255, (4, 4)), resized)
    assert torch.equal(resize_mask(mask, (8, 8)), mask)
