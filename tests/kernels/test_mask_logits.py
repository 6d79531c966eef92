"""mask_logits: every query dotted with every pixel."""

import pytest
import torch

from kernels import mask_logits


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_mask_logits_are_dot_products_whatever_the_memory_layout():
    query, features = random(2, 3, 8), random(2, 4, 8, 5, 6, seed=1)
    expected = torch.einsum("bqc,btchw->bqthw", query, features)
    torch.testing.assert_close(mask_logits(query, features), expected)
    channels_last = features.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 4))
    torch.testing.assert_close(mask_logits(query, channels_last), expected)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"expected \[B, Q, C\] and \[B, T, C, H, W\]"):
        mask_logits(random(2, 3, 8), random(2, 8, 5, 6))
