"""ms_deform_attn: random shapes, dtypes and places, the Triton kernels against the reference in float64."""

import pytest
import torch

from kernels import dispatch
from kernels.ms_deform_attn import deformable

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

pytestmark = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@st.composite
def cases(draw):
    place = draw(st.sampled_from(["cell", "ref", "classic"]))
    sizes = st.tuples(st.integers(1, 4), st.integers(1, 4))
    shapes = draw(st.lists(sizes, min_size=1, max_size=2 if place == "cell" else 4))
    return {
        "place": place,
        "shapes": shapes,
        "batch": draw(st.integers(1, 2)),
        "heads": draw(st.integers(1, 2)),
        "dim": draw(st.sampled_from([16, 32, 64])),
        "points": draw(st.integers(1, 8 // len(shapes))),
        "queries": sum(h * w for h, w in shapes) if place == "cell" else draw(st.integers(1, 9)),
        "dtypes": draw(st.tuples(DTYPES, DTYPES, DTYPES)),
        "shared": draw(st.booleans()),
        "deterministic": draw(st.sampled_from([False, False, True])),
        "seed": draw(st.integers(0, 2**16)),
    }


@pytest.mark.slow
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(cases())
def test_kernels_equal_the_reference_in_double_precision(case):
    torch.manual_seed(case["seed"])
    B, Q, A, D, P = (case[name] for name in ("batch", "queries", "heads", "dim", "points"))
    shapes, classic = case["shapes"], case["place"] == "classic"
    value = torch.randn(B, sum(h * w for h, w in shapes), A, D)
    logit = torch.randn(B, Q, A, len(shapes), P)
    # in steps of 1/16 of a pixel, which every dtype can say, and on no pixel, where derivatives jump
    offset = (torch.randint(-40, 40, (*logit.shape, 2)) * 2 + 1) / 16
    ref = None
    if classic:
        offset = torch.rand(offset.shape) * 1.4 - 0.2
    elif case["place"] == "ref":
        one = case["shared"]
        ref = torch.rand(1 if one else B, Q, 1 if one else len(shapes), 2).to(DEVICE)
    tensors = [x.to(DEVICE, dtype) for x, dtype in zip((value, offset, logit), case["dtypes"], strict=True)]
    options = {"classic": classic, "deterministic": case["deterministic"]}
    weight = torch.randn(B, Q, A * D).bfloat16().to(DEVICE)

    def run(dtype, impl):
        inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
        out = deformable(*inputs, shapes, ref, impl=impl, **options)
        return out, *torch.autograd.grad(out, inputs, weight.to(out))

    for got, exact in zip(run(None, "triton"), run(torch.float64, "reference"), strict=True):
        atol = 1e-5 * exact.abs().max().item() + 1e-6
        torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(got.dtype).eps, atol=atol)
