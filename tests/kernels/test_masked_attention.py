"""masked_attention: a query sees its visible keys and only those."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kernels
from kernels.dispatch import HAS_TRITON, using
from kernels.mask_bits import pack_bits
from kernels.masked_attention import masked_attention, masked_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
IMPLEMENTATIONS = ["reference", pytest.param("triton", marks=NO_TRITON)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # of the largest value


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def inputs(B=1, A=2, Q=5, N=40, D=16, dtype=torch.float32, density=0.3):
    """q, k, v that want gradients, and a mask [B, Q, N] whose second query sees nothing."""
    q, k, v = (random(B, A, n, D, seed=i, dtype=dtype).requires_grad_() for i, n in enumerate((Q, N, N)))
    mask = torch.rand(B, Q, N, generator=torch.Generator().manual_seed(3)) < density
    mask[:, 1:2] = False
    return q, k, v, mask.to(DEVICE)


def exact(q, k, v, mask, grad=None):
    """Output and gradients in float64, from the formula."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    mask = (mask | ~mask.any(-1, keepdim=True))[:, None]
    logits = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
    out = logits.softmax(-1) @ v
    grad = torch.ones_like(out) if grad is None else grad.double()
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def run(q, k, v, mask, impl, grad=None):
    out = masked_attention(q, k, v, pack_bits(mask), mask.any(-1), impl=impl)
    grad = torch.ones_like(out) if grad is None else grad
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def assert_close(got, expected):
    for name, x, y in zip(("out", "q", "k", "v"), got, expected, strict=True):
        assert x.shape == y.shape
        if y.numel():
            error = (x.double() - y).abs().max().item()
            scale = max(y.abs().max().item(), 0.1)
            assert error <= TOLERANCE[x.dtype] * scale, f"{name}: {error} of {scale}"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("D", [16, 32, 64])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients_are_those_of_a_softmax_over_the_visible_keys(impl, dtype, D):
    q, k, v, mask = inputs(Q=9, N=70, D=D, dtype=dtype)
    grad = random(1, 2, 9, D, seed=7, dtype=dtype)
    assert_close(run(q, k, v, mask, impl, grad), exact(q, k, v, mask, grad))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("B", "A", "Q", "N"), [(2, 1, 70, 150), (1, 1, 1, 1), (2, 2, 2, 31), (1, 1, 3, 33)])
def test_sizes_need_not_fit_the_blocks(impl, B, A, Q, N):
    q, k, v, mask = inputs(B, A, Q, N)
    grad = random(B, A, Q, 16, seed=7)
    assert_close(run(q, k, v, mask, impl, grad), exact(q, k, v, mask, grad))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("B", "Q", "N"), [(0, 3, 5), (2, 0, 40), (2, 3, 0)])
def test_without_keys_all_is_zero_and_without_queries_all_gradients_are(impl, B, Q, N):
    q, k, v, mask = inputs(B, 2, Q, N)
    for got, like in zip(run(q, k, v, mask, impl), (q, q, k, v), strict=True):
        assert torch.equal(got, torch.zeros_like(like))


@NO_TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_result_does_not_depend_on_how_keys_are_split(monkeypatch, dtype):
    from kernels._triton import masked_attention as gpu

    q, k, v, mask = inputs(A=1, Q=9, N=200, dtype=dtype)
    mask[0, 2, :100] = False  # nothing to see in the first spans
    results = []
    for programs in (1, 4, 1000):  # one span, two, as many as there are blocks
        monkeypatch.setattr(gpu, "programs", lambda _, n=programs: n)
        results.append(run(q, k, v, mask, "triton"))
        assert_close(results[-1], exact(q, k, v, mask))
    again = run(q, k, v, mask, "triton")
    assert all(torch.equal(x, y) for x, y in zip(again, results[-1], strict=True))


@NO_TRITON
def test_a_batch_larger_than_a_grid_runs_in_parts(monkeypatch):
    from kernels._triton import mask_bits, masked_attention

    monkeypatch.setattr(masked_attention, "MOST_PROGRAMS", 2)
    monkeypatch.setattr(mask_bits, "MOST_PROGRAMS", 2)
    q, k, v, mask = inputs(B=5, N=70)
    assert_close(run(q, k, v, mask, "triton"), exact(q, k, v, mask))
    query, features = random(5, 3, 16), random(5, 16, 40, seed=1)
    got, expected = (kernels.mask_bits(query, features, impl=impl) for impl in ("triton", "reference"))
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@NO_TRITON
@pytest.mark.parametrize("which", range(4))
def test_rows_may_be_further_apart_than_32_bits_reach(which):
    apart = 2**30 + 64
    if DEVICE == "cuda":
        memory = torch.zeros(2 * apart + 64, dtype=torch.float16, device=DEVICE)
    else:  # pages that nobody touches are never allocated
        memory = torch.from_numpy(np.zeros(2 * apart + 64, dtype=np.float16))
    *tensors, mask = inputs(A=1, Q=3, N=3, dtype=torch.float16)
    tensors = [x.detach() for x in tensors] + [random(1, 1, 3, 16, seed=9, dtype=torch.float16)]
    wide = memory.as_strided((1, 1, 3, 16), (16, 16, apart, 1))
    wide.copy_(tensors[which])
    expected = run(*(x.clone().requires_grad_() for x in tensors[:3]), mask, "triton", tensors[3])
    tensors[which] = wide
    got = run(*(x.requires_grad_(i < 3) for i, x in enumerate(tensors[:3])), mask, "triton", tensors[3])
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@NO_TRITON
@pytest.mark.skipif(DEVICE == "cuda", reason="makes memory on a CPU")
@pytest.mark.parametrize("shift", [1, 2])
def test_memory_from_elsewhere_may_begin_anywhere(shift):
    from kernels._triton.launch import is_aligned
    from kernels._triton.ms_deform_attn import _paired

    def moved(x):
        memory = np.zeros(x.numel() * x.element_size() + 64, dtype=np.uint8)
        begin = -memory.ctypes.data % 64 + shift * x.element_size()
        part = memory[begin : begin + x.numel() * x.element_size()]
        out = torch.from_numpy(part.view(torch.empty(0, dtype=x.dtype).numpy().dtype)).view(x.shape)
        assert out.storage_offset() == 0
        assert out.data_ptr() % 64 == shift * x.element_size()
        return out.copy_(x)

    q, k, v, mask = (x.detach() for x in inputs(dtype=torch.float16))
    bits, seen = pack_bits(mask), mask.any(-1)
    assert not is_aligned(moved(bits), 4)
    got = kernels.masked_attention(q, k, v, moved(bits), seen, impl="triton")
    assert torch.equal(got, kernels.masked_attention(q, k, v, bits, seen, impl="triton"))
    value, offset, logit = random(1, 6, 1, 16), random(1, 6, 1, 1, 2, 2), random(1, 6, 1, 1, 2)
    tensors = [x.half() for x in (value, offset, logit)]
    got = kernels.ms_deform_attn(*(moved(x) for x in tensors), [(2, 3)], impl="triton")
    assert torch.equal(got, kernels.ms_deform_attn(*tensors, [(2, 3)], impl="triton"))
    assert _paired(tensors[1])
    assert _paired(moved(tensors[1])) == (shift == 2)


@NO_TRITON
def test_work_is_cut_for_the_gpu_at_hand(monkeypatch):
    from kernels._triton.launch import programs

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=20)
    )
    assert programs(torch.device("cuda:7")) == 80


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_query_that_sees_one_key_takes_its_value(impl):
    q, k, v, mask = inputs(Q=3, N=40)
    mask[:] = False
    mask[0, 0, 0] = mask[0, 1, 31] = mask[0, 2, 39] = True
    got = run(q, k, v, mask, impl)
    torch.testing.assert_close(got[0], v.detach()[:, :, [0, 31, 39]])
    torch.testing.assert_close(got[1], torch.zeros_like(q), atol=1e-6, rtol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_where_nothing_is_visible_attention_is_plain(impl):
    q, k, v, mask = inputs(density=0.0)
    bits = pack_bits(mask)
    got = masked_attention(q, k, v, bits, mask.any(-1), impl=impl)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(got, plain)
    wrongly_flagged = masked_attention(q, k, v, bits, ~mask.any(-1), impl=impl)
    assert torch.equal(wrongly_flagged, torch.zeros_like(q))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_hidden_keys_do_not_matter_however_large_their_logits(impl):
    q, k, v, mask = inputs(Q=3, N=40)
    with torch.no_grad():
        k[:, :, ::2] *= 1000
    mask[:, :, ::2] = False
    mask[:, :, 1] = True
    assert_close(run(q, k, v, mask, impl), exact(q, k, v, mask))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_large_logits_do_not_overflow(impl):
    q, k, v, mask = inputs(Q=3, N=40)
    with torch.no_grad():
        q *= 300
    got = run(q, k, v, mask, impl)
    torch.testing.assert_close(got[0].double(), exact(q, k, v, mask)[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_views_are_read_as_they_lie(impl):
    _, _, _, mask = inputs(B=2, Q=3, N=40)
    q = random(2, 3, 32).unflatten(-1, (2, 16)).transpose(1, 2)  # heads of one product
    k = random(2, 40, 96, seed=1).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)[1]  # one layer's of three
    channels_first = random(2, 2, 16, 40, seed=2).transpose(2, 3)
    for v in (random(2, 40, 32, seed=2).unflatten(-1, (2, 16)).transpose(1, 2), channels_first):
        views = [x.detach().requires_grad_() for x in (q, k, v)]
        assert_close(run(*views, mask, impl), exact(*views, mask))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bits_may_be_a_view_that_starts_anywhere(impl):
    q, k, v, mask = inputs()
    bits = torch.zeros(1 + pack_bits(mask).numel(), dtype=torch.uint8, device=DEVICE)
    bits[1:] = pack_bits(mask).flatten()
    shifted = bits[1:].view(1, 5, 8)
    got = masked_attention(q, k, v, shifted, mask.any(-1), impl=impl)
    torch.testing.assert_close(got.double(), exact(q, k, v, mask)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_may_differ_and_autocast_changes_none(impl, autocast):
    q, k, v, mask = inputs()
    k, v = k.detach().half().requires_grad_(), v.detach().bfloat16().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        got = run(q, k, v, mask, impl)
    assert [x.dtype for x in got] == [torch.float32, torch.float32, torch.float16, torch.bfloat16]
    tolerance = 3e-2 if autocast and impl == "reference" else 2e-6
    assert (got[0] - exact(q, k, v, mask)[0]).abs().max() < tolerance


@NO_TRITON
def test_the_operators_pass_the_checks_of_pytorch():
    q, k, v, mask = inputs(A=1, Q=3, N=20)
    bits, seen = pack_bits(mask), mask.any(-1)
    for impl in ("triton", "reference"):
        torch.library.opcheck(torch.ops.tarvis.masked_attention.default, (q, k, v, bits, seen, impl))
    q, k, v = q.detach(), k.detach(), v.detach()
    out, lse = torch.ops.tarvis.masked_attention(q, k, v, bits, seen, "triton")
    backward = torch.ops.tarvis.masked_attention_backward.default
    torch.library.opcheck(backward, (torch.ones_like(out), q, k, v, bits, seen, out, lse))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_it_compiles_without_graph_breaks(impl):
    q, k, v, mask = inputs()
    bits, seen = pack_bits(mask), mask.any(-1)

    def loss(q, k, v):
        return masked_attention(q, k, v, bits, seen, impl=impl).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    for x, y in zip(got, torch.autograd.grad(loss(q, k, v), (q, k, v)), strict=True):
        torch.testing.assert_close(x, y)


def test_an_exported_program_holds_one_operator_and_can_be_trained():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, bits, seen):
            return masked_attention(q, k, v, bits, seen)

    q, k, v, mask = inputs()
    masks = pack_bits(mask), mask.any(-1)
    program = torch.export.export(Module(), (q.detach(), k.detach(), v.detach(), *masks))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls.count("tarvis.masked_attention.default") == 1
    assert not any("scaled_dot_product" in call for call in calls)
    out = program.module()(q, k, v, *masks)
    got = out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))
    assert_close(got, exact(q, k, v, mask))


def test_the_plain_form_runs_in_float64_and_its_gradients_are_right():
    q, k, v, mask = inputs(Q=3, N=9, D=4)
    masks = pack_bits(mask), mask.any(-1)
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: masked_attention_reference(*x, *masks), (q, k, v))


def test_what_cannot_run_is_refused():
    q, k, v, mask = inputs()
    bits, seen = pack_bits(mask), mask.any(-1)
    with pytest.raises(ValueError, match="expected 8 bytes a query for 40 keys, got 4"):
        masked_attention(q, k, v, bits[..., :4], seen)
    with pytest.raises(ValueError, match=r"expected \[B, A, Q, D\] and twice \[B, A, N, D\]"):
        masked_attention(q, k, v[:, :, 1:], bits, seen)
    with pytest.raises(ValueError, match=r"expected bits \[1, 5, ..\] and seen \[1, 5\]"):
        masked_attention(q, k, v, bits[:, :4], seen)
    with pytest.raises(RuntimeError, match="not float64"):
        masked_attention(q.double(), k.double(), v.double(), bits, seen, impl="triton")
    with pytest.raises(RuntimeError, match="not float64"):
        masked_attention(q, k.double(), v, bits, seen, impl="triton")
    with using("triton"), pytest.raises(RuntimeError, match="16, 32 or 64 channels a head, not 8"):
        masked_attention(q[..., :8], k[..., :8], v[..., :8], bits, seen)
