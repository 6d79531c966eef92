"""mask_bits: what a query may see, one bit a key."""

import numpy as np
import pytest
import torch

from kernels.dispatch import HAS_TRITON, using
from kernels.mask_bits import mask_bits, mask_bits_reference, pack_bits, unpack_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
NO_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
IMPLEMENTATIONS = [
    "reference",
    pytest.param("triton", marks=NO_TRITON),
    pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU]),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check(query, features, impl, tolerance=1e-4):
    """Bits are signs of exact logits, those near zero left out; padding is zero, seen follows the bits."""
    bits, seen = mask_bits(query, features, impl=impl)
    B, Q, N = query.shape[0], query.shape[1], features.shape[2]
    assert bits.shape == (B, Q, 4 * -(-N // 32))
    assert bits.dtype == torch.uint8
    assert seen.shape == (B, Q)
    assert seen.dtype == torch.bool
    visible = unpack_bits(bits, N)
    exact = query.double() @ features.double()
    decided = exact.abs() > tolerance
    assert torch.equal(visible & decided, (exact >= 0) & decided)
    assert torch.equal(bits, pack_bits(visible))
    assert torch.equal(seen, visible.any(-1))


@pytest.mark.parametrize("num_keys", [1, 7, 8, 31, 32, 33, 100])
def test_bits_round_trip_and_fill_whole_words(num_keys):
    mask = random(2, 3, num_keys) > 0
    bits = pack_bits(mask)
    assert bits.shape == (2, 3, 4 * -(-num_keys // 32))
    assert torch.equal(unpack_bits(bits, num_keys), mask)
    words = bits.view(torch.int32)
    assert torch.equal(words[0, 0, 0] & 1 == 1, mask[0, 0, 0])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("B", "Q", "C", "N"),
    [(1, 1, 1, 1), (2, 4, 8, 31), (1, 5, 16, 32), (1, 3, 70, 33), (2, 70, 33, 200), (1, 2, 256, 257)],
)
def test_a_key_is_visible_where_the_logit_is_not_negative(impl, B, Q, C, N):
    check(random(B, Q, C), random(B, C, N, seed=1), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_keeps_the_signs(impl, dtype):
    check(random(2, 9, 64, dtype=dtype), random(2, 64, 150, seed=1, dtype=dtype), impl)


@pytest.mark.parametrize("impl", ["triton", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_may_differ(impl, dtype):
    check(random(1, 9, 64, dtype=dtype), random(1, 64, 70, seed=1, dtype=torch.float16), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_logits_of_exactly_zero_are_visible_and_nan_is_not(impl):
    query, features = random(1, 3, 16), random(1, 16, 40, seed=1)
    query[0, 0] = 0
    features[0, 3, 5] = float("nan")
    bits, seen = mask_bits(query, features, impl=impl)
    expected = torch.ones(40, dtype=torch.bool)
    expected[5] = False
    assert torch.equal(unpack_bits(bits, 40)[0, 0].cpu(), expected)
    query[:] = float("nan")
    bits, seen = mask_bits(query, features, impl=impl)
    assert not bits.any()
    assert not seen.any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_query_that_sees_nothing_is_flagged(impl):
    query = torch.tensor([[[1.0], [-1.0]]], device=DEVICE)
    bits, seen = mask_bits(query, torch.full((1, 1, 40), 2.0, device=DEVICE), impl=impl)
    assert seen.tolist() == [[True, False]]
    assert not bits[0, 1].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("B", "Q", "C", "N"), [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 4, 0), (1, 2, 0, 40)])
def test_empty_inputs_give_empty_masks_and_empty_sums_are_zero(impl, B, Q, C, N):
    check(random(B, Q, C), random(B, C, N), impl, tolerance=-1)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_any_strides_are_read(impl):
    query = random(20, 2, 6)[::2].permute(1, 2, 0)  # [2, 6, 10]
    channels_last = random(2, 40, 10, seed=1).transpose(1, 2)
    every_other = random(2, 20, 80, seed=1)[:, ::2, ::2]
    one_clip = random(1, 10, 40, seed=1).expand(2, -1, -1)
    for features in (channels_last, every_other, one_clip):
        check(query, features, impl)


def test_masking_in_bfloat16_agrees_with_single_precision_but_for_logits_near_zero():
    query, features = random(1, 30, 64), random(1, 64, 500, seed=1)
    exact = query @ features
    bits, _ = mask_bits(query.bfloat16(), features.bfloat16())
    wrong = unpack_bits(bits, 500) != (exact >= 0)
    assert wrong.float().mean() < 5e-3
    assert exact[wrong].abs().max() < 0.2


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_mask_has_no_gradient(impl):
    query, features = random(1, 4, 8).requires_grad_(), random(1, 8, 50, seed=1).requires_grad_()
    bits, seen = mask_bits(query, features, impl=impl)
    assert not bits.requires_grad
    assert not seen.requires_grad


@NO_TRITON
def test_autocast_leaves_the_inputs_of_the_kernels_as_they_are():
    # in bfloat16 the sum would be exactly zero, hence visible
    query = torch.tensor([[[1.0, -1.0]]], device=DEVICE)
    features = torch.tensor([[[1.0], [1.0001]]], device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        bits, seen = mask_bits(query, features, impl="triton")
    assert not bits.any()
    assert not seen.any()


@NO_TRITON
def test_the_operator_passes_the_checks_of_pytorch():
    inputs = (random(1, 3, 16), random(1, 16, 40, seed=1))
    for impl in ("triton", "reference"):
        torch.library.opcheck(torch.ops.tarvis.mask_bits.default, (*inputs, impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS[:2])
def test_it_compiles_without_graph_breaks(impl):
    inputs = random(1, 3, 16), random(1, 16, 40, seed=1)
    compiled = torch.compile(lambda q, f: mask_bits(q, f, impl=impl), fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*inputs), mask_bits_reference(*inputs), strict=True):
        assert torch.equal(got, expected)


def test_an_exported_program_holds_one_operator():
    class Module(torch.nn.Module):
        def forward(self, query, features):
            return mask_bits(query, features)

    inputs = random(1, 3, 16), random(1, 16, 40, seed=1)
    program = torch.export.export(Module(), inputs)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls.count("tarvis.mask_bits.default") == 1
    for got, expected in zip(program.module()(*inputs), mask_bits_reference(*inputs), strict=True):
        assert torch.equal(got, expected)


def test_what_cannot_run_is_refused():
    with pytest.raises(ValueError, match=r"expected \[B, Q, C\] and \[B, C, N\]"):
        mask_bits(random(1, 4, 8), random(1, 9, 50))
    double = random(1, 4, 8).double(), random(1, 8, 50).double()
    with pytest.raises(RuntimeError, match="not float64"):
        mask_bits(*double, impl="triton")
    with using("triton"), pytest.raises(RuntimeError, match="not float64"):
        mask_bits(*double)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("which", [0, 1])
def test_values_may_be_further_apart_than_32_bits_reach(which):
    apart = 2**30 + 64
    if DEVICE == "cuda":
        memory = torch.zeros(2 * apart + 64, dtype=torch.float16, device=DEVICE)
    else:  # pages that nobody touches are never allocated
        memory = torch.from_numpy(np.zeros(2 * apart + 64, dtype=np.float16))
    tensors = [torch.randn(1, 3, 3, device=DEVICE).half(), torch.randn(1, 3, 40, device=DEVICE).half()]
    wide = memory.as_strided(tensors[which].shape, (1, apart, 1))
    wide.copy_(tensors[which])
    expected = mask_bits(*tensors, impl="triton")
    tensors[which] = wide
    assert all(torch.equal(x, y) for x, y in zip(mask_bits(*tensors, impl="triton"), expected, strict=True))
