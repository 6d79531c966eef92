import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from kernels.mask_bits import pack_bits
from tarvis.files import rle


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


@given(st.integers(0, 3), st.integers(0, 70), st.integers(0, 70), st.floats(0, 1), st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_codes_are_those_of_pycocotools(n: int, height: int, width: int, density: float, seed: int) -> None:
    values = np.random.default_rng(seed).random((n, height, width))
    masks = values < density  # anything from empty to full
    expected = [coco.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
    assert rle.encode(masks) == expected
    assert rle.encode(np.where(masks, values + 1, 0)) == expected
    assert rle.encode_bits(pack_bits(torch.from_numpy(masks)).numpy(), width) == expected


def test_codes_of_long_runs_are_those_of_pycocotools() -> None:
    masks = np.zeros((5, 2100, 2000), bool)
    masks[1] = masks[2, 1050:] = masks[3, :, :1000] = masks[4, -1, -1] = True
    assert rle.encode(masks) == [coco.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
    square = np.zeros((1, 64, 64), bool)
    square[:, 20:50, 10:30] = True
    assert rle.encode(square.transpose(0, 2, 1)[:, ::2]) == rle.encode(square.mT[:, ::2].copy())


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


@given(st.integers(0, 6), st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_codes_of_files_are_accepted_in_both_forms(n: int, height: int, width: int, seed: int) -> None:
    masks = np.random.default_rng(seed).random((n, height, width)) > 0.6
    codes = rle.encode(masks)
    size = (height, width)
    assert rle.from_file([code["counts"].decode() for code in codes], size) == codes
    columns = masks.transpose(0, 2, 1).reshape(n, height * width)
    runs = [
        np.diff(np.flatnonzero(np.diff(m, prepend=False)), prepend=0, append=m.size).tolist() for m in columns
    ]
    assert rle.from_file(runs, size) == codes


def test_large_and_long_runs_are_accepted() -> None:
    mask = np.zeros((720, 1280), bool)
    mask[100:500, 300:900] = np.random.default_rng(0).random((400, 600)) > 0.5
    for code in rle.encode(np.stack([mask, ~mask, mask & False])):
        assert rle.from_file([code["counts"].decode()], (720, 1280)) == [code]


@given(st.text(st.characters(max_codepoint=130), max_size=12), st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_only_codes_of_a_mask_of_the_size_are_accepted(text: str, height: int, width: int) -> None:
    good = rle.empty((height, width))
    known = good["counts"].decode()
    first, found, last = rle.from_file([known, text, known], (height, width))
    assert first == last == good
    assert found is None or found == rle.encode(rle.decode(found)[None])[0]


@pytest.mark.parametrize(
    "counts", ["", "P", "0", "PPPPPPPPPPPP0", "o", [5], [-1, 10], [4, 5.0], ["9"], [True, 8]]
)
def test_what_is_no_code_is_found(counts: str | list[int]) -> None:
    good, bad = rle.from_file([[9], counts], (3, 3))
    assert good == rle.empty((3, 3))
    assert bad is None


def test_no_foreign_character_stands_for_one_of_a_code() -> None:
    assert rle.from_file(["?"], (3, 5)) == [rle.empty((3, 5))]  # fifteen pixels, none inside
    assert rle.from_file(["\u00e9", "\ud800"], (3, 5)) == [None, None]


def written(runs: list[int], groups: int) -> str:
    """COCO's compressed string of run lengths, each number of at least so many characters."""
    text = ""
    for k, run in enumerate(runs):
        number, characters = run - (runs[k - 2] if k > 2 else 0), 0
        while True:
            bits, number, characters = number & 31, number >> 5, characters + 1
            more = number != -(bits >> 4) or characters < groups
            text += chr(48 + bits + 32 * more)
            if not more:
                break
    return text


@st.composite
def encodings(draw: st.DrawFn) -> tuple[np.ndarray, list[int], str]:
    """A mask of 6 x 7, and two valid encodings of it: with runs of no pixels, and with spare characters."""
    mask = np.array(draw(st.lists(st.booleans(), min_size=42, max_size=42))).reshape(7, 6).T
    pixels = mask.T.ravel()
    runs = np.diff(np.flatnonzero(np.diff(pixels, prepend=False)), prepend=0, append=42).tolist()
    for place in draw(st.lists(st.integers(0, 42), max_size=5)):
        place %= len(runs)
        cut = draw(st.integers(0, runs[place]))  # at an end, a run of no pixels is among the parts
        runs[place : place + 1] = [cut, 0, runs[place] - cut]
    return mask, runs, written(runs, draw(st.integers(1, 4)))


@given(encodings(), encodings())
@settings(max_examples=200, deadline=None)
def test_every_encoding_of_a_mask_means_the_same(one, other) -> None:
    (a, *codes), (b, *others) = one, other
    normal, other_normal = rle.encode(np.stack([a, b]))
    found, other_found = rle.from_file(codes, (6, 7)), rle.from_file(others, (6, 7))
    assert found == [normal] * 2
    assert other_found == [other_normal] * 2
    assert {rle.area(each) for each in found} == {a.sum()}
    assert (rle.shared_pixels(found, other_found) == (a & b).sum()).all()
    assert (rle.decode(rle.union([found[0], other_found[1]])) == (a | b)).all()


def test_shared_pixels_are_counted_exactly() -> None:
    masks, others = np.random.default_rng(0).random((2, 7, 31, 17)) > 0.5
    masks[0] = False
    expected = np.einsum("nhw,mhw->nm", masks.astype(int), others[:3].astype(int))
    np.testing.assert_array_equal(rle.shared_pixels(rle.encode(masks), rle.encode(others[:3])), expected)
    assert rle.shared_pixels([], rle.encode(others)).shape == (0, 7)


def test_boxes_are_compared() -> None:
    masks = np.zeros((3, 8, 8), bool)
    masks[0, 1:5, 1:5] = masks[1, [1, 4], [1, 8 - 1]] = True
    assert rle.box_iou(rle.encode(masks[:1]), rle.encode(masks)).tolist() == [[1, 16 / 28, 0]]


def test_runs_of_masks_are_their_pixels_column_by_column():
    random = np.random.default_rng(0)
    masks = np.stack([random.random((7, 9)) < share for share in (0, 0.3, 0.8, 1)])
    starts, stops, mask = rle.runs(rle.encode(masks))
    found = np.zeros((4, 9 * 7), bool)
    for start, stop, k in zip(starts, stops, mask, strict=True):
        assert not found[k, start:stop].any()
        found[k, start:stop] = True
    assert (found.reshape(4, 9, 7).transpose(0, 2, 1) == masks).all()
