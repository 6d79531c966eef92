"""masked_attention and mask_bits on random shapes and masks."""

import pytest
import torch

pytest.importorskip("hypothesis")
pytest.importorskip("triton")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.mask_bits import mask_bits, pack_bits, unpack_bits
from kernels.masked_attention import masked_attention, masked_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # poisoned memory stays poisoned
)


@QUICK
@given(st.integers(1, 2), st.integers(1, 70), st.integers(1, 40), st.integers(0, 140), st.integers(0, 99))
def test_bits_are_signs_of_logits(B, Q, C, N, seed):
    generator = torch.Generator().manual_seed(seed)
    # small integers: sums are exact, and many are zero
    query = torch.randint(-2, 3, (B, Q, C), generator=generator).float().to(DEVICE)
    features = torch.randint(-2, 3, (B, C, N), generator=generator).float().to(DEVICE)
    bits, seen = mask_bits(query, features, impl="triton")
    visible = query @ features >= 0
    assert torch.equal(bits, pack_bits(visible))
    assert torch.equal(unpack_bits(bits, N), visible)
    assert torch.equal(seen, visible.any(-1))


@QUICK
@given(
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 70),
    st.integers(1, 140),
    st.sampled_from([16, 32]),
    st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    st.integers(0, 99),
)
def test_attention_and_its_gradients_equal_the_plain_form_in_float64(B, A, Q, N, D, density, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, A, n, D, generator=generator).to(DEVICE).requires_grad_() for n in (Q, N, N))
    mask = (torch.rand(B, Q, N, generator=generator) < density).to(DEVICE)
    masks = pack_bits(mask), mask.any(-1)
    grad = torch.randn(B, A, Q, D, generator=generator).to(DEVICE)
    out = masked_attention(q, k, v, *masks, impl="triton")
    got = out, *torch.autograd.grad(out, (q, k, v), grad)
    double = [x.detach().double().requires_grad_() for x in (q, k, v)]
    plain = masked_attention_reference(*double, *masks)
    for x, y in zip(got, (plain, *torch.autograd.grad(plain, double, grad.double())), strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-5, rtol=1e-5)
