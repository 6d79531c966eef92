"""Random sizes, against the two resizes in float64."""

import pytest

pytest.importorskip("hypothesis")
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.dispatch import HAS_TRITON
from kernels.mask_bits import pack_bits
from kernels.mask_upsample import label_upsample, mask_upsample, upsample_logits

Size = tuple[int, int]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@st.composite
def cases(draw: st.DrawFn, largest: int) -> tuple[Size, Size, Size]:
    quarter = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    network = draw(st.integers(1, 4 * quarter[0])), draw(st.integers(1, 4 * quarter[1]))
    return quarter, network, (draw(st.integers(1, largest)), draw(st.integers(1, 2 * largest)))


def check(case: tuple[Size, Size, Size], impl: str) -> None:
    quarter, network, size = case
    logits = 5 * torch.randn(2, 2, *quarter, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    big = F.interpolate(logits.double(), scale_factor=4, mode="bilinear", align_corners=False)
    exact = F.interpolate(
        big[..., : network[0], : network[1]], size, mode="bilinear", align_corners=False
    )  # [2, 2, H, W]
    torch.testing.assert_close(upsample_logits(logits, network, size).double(), exact, atol=2e-5, rtol=0)
    masks = mask_upsample(logits, network, size, impl=impl)
    assert ((masks == (exact > 0)) | (exact.abs() < 2e-5)).all()
    assert torch.equal(mask_upsample(logits, network, size, packed=True, impl=impl), pack_bits(masks))
    labels = label_upsample(logits, network, size, impl=impl)
    chosen = exact.gather(0, labels[None].long())[0]
    assert (chosen >= exact.amax(0) - 4e-5).all()


@given(cases(largest=90))
@settings(max_examples=60, deadline=None)
def test_reference_equals_the_two_steps_it_is_composed_of(case: tuple[Size, Size, Size]) -> None:
    check(case, "reference")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@given(cases(largest=90 if torch.cuda.is_available() else 24))
@settings(max_examples=25, deadline=None)
def test_triton_equals_the_two_steps_it_is_composed_of(case: tuple[Size, Size, Size]) -> None:
    check(case, "triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@given(cases(largest=90))
@settings(max_examples=25, deadline=None)
def test_cuda_equals_the_two_steps_it_is_composed_of(case: tuple[Size, Size, Size]) -> None:
    check(case, "cuda")
