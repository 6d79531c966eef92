"""Object encoder: counts of pixels by part and by background cell, half precision, empty masks."""

import numpy as np
import pytest
import torch

from tarvis.model.object_encoder import ObjectEncoder, background_counts, part_counts


def random_masks(*shape, seed=0, share=0.3):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def counts_by_lists(mask, num_parts):
    """The definition: the list of pixels, repeated if too short, cut into runs; pixels counted by cell."""
    T, H, W = mask.shape
    pixels = np.argwhere(mask.numpy())
    counts = np.zeros((num_parts, T, H // 4, W // 4))
    if len(pixels):
        pixels = np.concatenate([pixels] * -(-num_parts // len(pixels)))
        for part, run in enumerate(np.array_split(pixels, num_parts)):
            for t, y, x in run:
                counts[part, t, y // 4, x // 4] += 1
    return counts.reshape(num_parts, -1)


@pytest.mark.parametrize("num_parts", [4, 8])
@pytest.mark.parametrize("num_pixels", [0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 100, 512])
def test_parts_are_runs_of_the_mask_in_raster_order(num_parts, num_pixels):
    chosen = torch.randperm(2 * 16 * 16, generator=torch.Generator().manual_seed(num_pixels))[:num_pixels]
    mask = torch.zeros(2 * 16 * 16, dtype=torch.bool)
    mask[chosen] = True
    masks = torch.stack([mask.view(2, 16, 16), random_masks(2, 16, 16)])
    got = part_counts(masks, num_parts).view(2, num_parts, -1)
    for one, expected in zip(got, masks, strict=True):
        np.testing.assert_array_equal(one.numpy(), counts_by_lists(expected, num_parts))


def test_background_cells_count_the_pixels_that_no_object_covers():
    masks = random_masks(3, 2, 64, 128)
    counts = background_counts(masks, (4, 4)).view(4, 4, 2, 16, 32)
    free = ~masks.any(0)
    for row in range(4):
        for column in range(4):
            cell = free[:, 16 * row : 16 * row + 16, 32 * column : 32 * column + 32]
            assert counts[row, column].sum() == cell.sum()


def test_no_objects_leave_the_whole_frame_to_the_background():
    assert (background_counts(torch.zeros(0, 1, 64, 64, dtype=torch.bool), (4, 4)).sum(1) == 256).all()
    assert part_counts(torch.zeros(0, 1, 64, 64, dtype=torch.bool), 8).shape == (0, 256)


def test_empty_and_tiny_masks_give_finite_queries():
    torch.manual_seed(0)
    encoder = ObjectEncoder(64, 4, 2, 128).eval()
    masks = torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    masks[1, 0, 5, 7] = True
    background, objects = encoder(torch.randn(1, 64, 16, 16), masks)
    assert background.shape == (16, 64)
    assert objects.shape == (16, 64)
    assert objects.isfinite().all()
    # eight queries of one pixel see the same
    torch.testing.assert_close(objects[8:], objects[8:9].expand(8, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_large_masks_do_not_overflow_half_precision(dtype):
    torch.manual_seed(0)
    encoder = ObjectEncoder(64, 4, 2, 128).eval()
    features = 4 + torch.randn(1, 64, 128, 224)  # 28 672 pixels a background cell
    masks = torch.zeros(1, 1, 512, 896, dtype=torch.bool)
    masks[:, :, 100:400, 100:800] = True
    exact = torch.cat(encoder(features, masks))
    with torch.autocast("cpu", dtype=dtype):
        half = torch.cat(encoder(features.to(dtype), masks))
    assert half.isfinite().all()
    assert (half - exact).abs().max() < 0.15


def test_training_uses_half_as_many_queries_per_object():
    encoder = ObjectEncoder(64, 4, 1, 128, num_queries_per_object=4)
    assert encoder.train().num_parts == 4
    assert encoder.eval().num_parts == 8
