import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.mask_upsample import label_upsample, mask_upsample, upsample_logits

Size = tuple[int, int]
module = sys.modules[mask_upsample.__module__]  # the package offers the function under the file's name


def chain(logits: Tensor, network: Size, size: Size) -> Tensor:
    """The definition: two resizes and the crop between them."""
    big = F.interpolate(logits.double(), scale_factor=4, mode="bilinear", align_corners=False)
    return F.interpolate(big[..., : network[0], : network[1]], size, mode="bilinear", align_corners=False)


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Size, Size, Size]:
    quarter = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    network = draw(st.integers(1, 4 * quarter[0])), draw(st.integers(1, 4 * quarter[1]))
    return quarter, network, (draw(st.integers(1, 90)), draw(st.integers(1, 90)))


@given(cases())
@settings(max_examples=60, deadline=None)
def test_equals_the_two_steps_it_is_composed_of(case: tuple[Size, Size, Size]) -> None:
    quarter, network, size = case
    logits = random_logits(3, 2, *quarter)
    exact = chain(logits, network, size)  # [3, 2, H, W]
    torch.testing.assert_close(upsample_logits(logits, network, size).double(), exact, atol=2e-5, rtol=0)
    masks = mask_upsample(logits, network, size)
    assert ((masks == (exact > 0)) | (exact.abs() < 2e-5)).all()
    labels = label_upsample(logits, network, size)
    chosen = exact.gather(0, labels[None].long())[0]
    assert (chosen >= exact.amax(0) - 4e-5).all()


@pytest.mark.parametrize("size", [(97, 160), (128, 192), (300, 401)])
def test_an_output_line_comes_from_at_most_three_input_lines(size: Size) -> None:
    for n, quarter in zip(size, (32, 48), strict=True):
        for _, _, weight in module._bands(quarter, 4 * quarter - 5, n, 1, torch.device("cpu")):
            assert (weight != 0).sum() <= 3
            assert weight.sum() == pytest.approx(1)


def test_slabs_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(5, 2, 16, 32)
    whole = mask_upsample(logits, (61, 100), (97, 151)), label_upsample(logits, (61, 100), (97, 151))
    monkeypatch.setitem(module._SLAB, "cpu", 1)
    monkeypatch.setattr(module, "_MAPS", 3)
    assert torch.equal(mask_upsample(logits, (61, 100), (97, 151)), whole[0])
    assert torch.equal(label_upsample(logits, (61, 100), (97, 151)), whole[1])


def test_background_wins_where_no_logit_is_positive() -> None:
    logits = random_logits(3, 2, 16, 16)
    best, index = upsample_logits(logits, (50, 64), (33, 44)).max(0)
    labels = label_upsample(logits, (50, 64), (33, 44), background=True)
    assert torch.equal(labels.long(), torch.where(best > 0, index + 1, 0))
    assert (label_upsample(torch.zeros(2, 1, 4, 4), (16, 16), (16, 16), background=True) == 0).all()


def test_labels_are_bytes_until_they_do_not_fit() -> None:
    assert label_upsample(random_logits(256, 1, 2, 2), (8, 8), (4, 4)).dtype == torch.uint8
    wide = label_upsample(random_logits(256, 1, 2, 2), (8, 8), (4, 4), background=True)
    assert wide.dtype == torch.int16
    assert wide.max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_only_the_inputs_rounding(dtype: torch.dtype) -> None:
    logits = random_logits(3, 2, 16, 16).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            mask_upsample(logits, (60, 62), (45, 70)), mask_upsample(logits.float(), (60, 62), (45, 70))
        )


def test_views_and_empty_inputs_work() -> None:
    logits = random_logits(4, 3, 16, 16)
    view = logits[1:, 1:2].transpose(2, 3)
    assert torch.equal(
        mask_upsample(view, (60, 60), (45, 70)), mask_upsample(view.contiguous(), (60, 60), (45, 70))
    )
    assert mask_upsample(logits[:0], (60, 60), (45, 70)).shape == (0, 3, 45, 70)
    assert mask_upsample(logits[:, :0], (60, 60), (45, 70)).shape == (4, 0, 45, 70)
    assert label_upsample(logits[:, :0], (60, 60), (45, 70)).shape == (0, 45, 70)
    assert not label_upsample(logits[:0], (60, 60), (45, 70), background=True).any()


def test_what_does_not_fit_is_refused() -> None:
    logits = random_logits(2, 1, 4, 4)
    with pytest.raises(ValueError, match="expected float logits"):
        mask_upsample(logits[0], (16, 16), (16, 16))
    with pytest.raises(ValueError, match="expected float logits"):
        mask_upsample(logits > 0, (16, 16), (16, 16))
    with pytest.raises(ValueError, match="cannot cut"):
        mask_upsample(logits, (17, 16), (16, 16))
    with pytest.raises(ValueError, match="at least one map"):
        label_upsample(logits[:0], (16, 16), (16, 16))
