import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.dispatch import HAS_TRITON
from kernels.mask_cost import mask_cost

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    Q=st.integers(0, 80),
    C=st.integers(1, 70),
    R=st.integers(1, 140),
    G=st.integers(0, 20),
    scale=st.floats(0, 100),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_triton_agrees_with_float64(Q, C, R, G, scale, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    embedding = (torch.randn(Q, C, generator=generator) * scale * C**-0.5).to(DEVICE, dtype)
    features = torch.randn(R, C, generator=generator).to(DEVICE, dtype)
    targets = torch.rand(G, R, generator=generator).to(DEVICE)
    bce, dice = mask_cost(embedding, features, targets, impl="triton")
    x = (embedding.double() @ features.double().T)[:, None]  # [Q, 1, R]
    t = targets.double().expand(Q, G, R)
    p = x.sigmoid()
    expected_bce = F.binary_cross_entropy_with_logits(x.expand(Q, G, R), t, reduction="none").mean(-1)
    expected_dice = 1 - (2 * (p * t).sum(-1) + 1) / (p.sum(-1) + t.sum(-1) + 1)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(bce.double(), expected_bce, rtol=0, atol=tolerance * (1 + scale))
    torch.testing.assert_close(dice.double(), expected_dice, rtol=0, atol=tolerance)
