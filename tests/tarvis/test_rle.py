import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tarvis import rle


@given(st.integers(0, 4), st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_decoding_gives_back_what_was_encoded(n: int, height: int, width: int, seed: int) -> None:
    masks = np.random.default_rng(seed).random((n, height, width)) > 0.6
    codes = rle.encode(masks)
    assert rle.encode(torch.from_numpy(masks)) == codes
    assert len(codes) == n
    for mask, code in zip(masks, codes, strict=True):
        assert code["size"] == [height, width]
        assert (rle.decode(code) == mask).all()
        assert rle.area(code) == mask.sum()


def test_an_empty_mask_has_no_area() -> None:
    code = rle.empty((5, 7))
    assert rle.decode(code).shape == (5, 7)
    assert rle.area(code) == 0


def test_union_and_difference_are_those_of_pixels() -> None:
    masks = np.random.default_rng(0).random((3, 9, 11)) > 0.5
    a, b, c = rle.encode(masks)
    assert (rle.decode(rle.union([a, b, c])) == masks.any(0)).all()
    assert (rle.decode(rle.subtract(a, b)) == (masks[0] & ~masks[1])).all()
    assert rle.subtract(a, rle.empty((9, 11))) == a


def test_a_single_mask_without_its_list_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected masks \[N, H, W\]"):
        rle.encode(np.zeros((3, 4), bool))
