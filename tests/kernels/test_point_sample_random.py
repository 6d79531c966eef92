import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.dispatch import HAS_TRITON
from kernels.point_sample import point_sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    N=st.integers(0, 3),
    C=st.one_of(st.integers(1, 5), st.sampled_from([32, 33, 130])),
    H=st.integers(1, 6),
    W=st.integers(1, 6),
    R=st.integers(0, 12),
    own=st.booleans(),
    channels_last=st.booleans(),
    deterministic=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    spread=st.floats(0, 3),
    seed=st.integers(0, 1000),
)
def test_triton_agrees_with_float64(N, C, H, W, R, own, channels_last, deterministic, dtype, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (N, H, W, C) if channels_last else (N, C, H, W)
    maps = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    maps = (maps.permute(0, 3, 1, 2) if channels_last else maps).requires_grad_()
    points = ((torch.rand(N if own else 1, R, 2, generator=generator) - 0.5) * spread + 0.5).to(DEVICE)
    out = point_sample(maps, points, deterministic=deterministic, impl="triton")
    cotangent = torch.randn(out.shape, generator=generator).to(DEVICE, dtype)
    (grad,) = torch.autograd.grad(out, maps, cotangent)
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 4e-2}
    if N * R == 0:
        assert out.numel() == 0
        assert not grad.any()
        return
    exact = maps.detach().double().requires_grad_()
    grid = (2 * points.double() - 1).expand(N, R, 2)[:, None]
    expected = F.grid_sample(exact, grid, align_corners=False)[:, :, 0].transpose(1, 2)
    (expected_grad,) = torch.autograd.grad(expected, exact, cotangent.double())
    torch.testing.assert_close(out.double(), expected, **tolerance)
    torch.testing.assert_close(grad.double(), expected_grad, **tolerance)
