"""torch.func and torch.jit over the operators: right, or refused, never silently wrong."""

import pytest
import torch
from torch.func import grad, jvp, vjp, vmap

import kernels
from kernels.dispatch import HAS_TRITON, explain

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(2, 3), (1, 2)]


def rand(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def tensors(name):
    if name == "ms_deform_attn":
        return rand(2, 8, 2, 16), rand(2, 8, 2, 2, 3, 2), rand(2, 8, 2, 2, 3)
    if name == "ms_deform_attn_classic":
        return rand(2, 8, 2, 16), rand(2, 5, 2, 2, 3, 2).sigmoid(), rand(2, 5, 2, 2, 3)
    if name == "masked_attention":
        return rand(2, 2, 5, 16), rand(2, 2, 40, 16), rand(2, 2, 40, 16)
    return (rand(2, 3 if name == "few channels" else 40, 4, 6),)


def function(name, impl):
    """Of differentiable tensors only."""
    if name == "ms_deform_attn":
        return lambda v, o, w: kernels.ms_deform_attn(v, o, w, SHAPES, impl=impl)
    if name == "ms_deform_attn_classic":
        return lambda v, o, w: kernels.ms_deform_attn_classic(v, SHAPES, None, o, w, impl=impl)
    if name == "masked_attention":
        bits, seen = kernels.mask_bits(rand(2, 5, 8), rand(2, 8, 40))
        return lambda q, k, v: kernels.masked_attention(q, k, v, bits, seen, impl=impl)
    points = rand(2, 7, 2).sigmoid()
    return lambda maps: kernels.point_sample(maps, points, impl=impl)


NAMES = ["ms_deform_attn", "ms_deform_attn_classic", "masked_attention", "few channels", "many channels"]
every_operator = pytest.mark.parametrize("name", NAMES)
interpreted = [pytest.param("triton", marks=pytest.mark.slow)] if HAS_TRITON else []
every_way = pytest.mark.parametrize("impl", ["reference", *interpreted])


@every_operator
@every_way
def test_gradients_within_torch_func(name, impl):
    run, args = function(name, impl), tensors(name)
    every = tuple(range(len(args)))

    def loss(*args):
        return run(*args).square().sum()

    leaves = [x.clone().requires_grad_() for x in args]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(grad(loss, every)(*args), expected)
    out, pull = vjp(run, *args)
    torch.testing.assert_close(pull(2 * out), expected)
    several = [torch.stack([x, x.flip(0)]) for x in args]
    if name == "ms_deform_attn_classic":  # also where an argument is the same for all
        by_entry = vmap(grad(loss, every), (0, None, 0))(several[0], args[1], several[2])
        again = grad(loss, every)(several[0][1], args[1], several[2][1])
    else:
        by_entry = vmap(grad(loss, every))(*several)
        again = grad(loss, every)(*(x[1] for x in several))
    torch.testing.assert_close([x[0] for x in by_entry], [*expected])
    torch.testing.assert_close([x[1] for x in by_entry], [*again])


@every_operator
@every_way
def test_forward_mode_is_refused(name, impl):
    run, args = function(name, impl), tensors(name)
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        jvp(run, args, args)
    out, tangent = jvp(lambda x: 2 * x.sum() + run(*(y.detach() for y in args)).sum(), args[:1], args[:1])
    torch.testing.assert_close(tangent, 2 * args[0].sum())
    assert out.isfinite()


@every_operator
@every_way
def test_a_trace_that_would_freeze_sizes_is_refused(name, impl):
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace would freeze all sizes"):
        torch.jit.trace(function(name, impl), tensors(name), check_trace=False)


def test_operators_of_plain_pytorch_keep_sizes_free_in_a_trace():
    traced = torch.jit.trace(kernels.mask_logits, (rand(1, 5, 8), rand(1, 2, 8, 4, 6)))
    args = rand(3, 7, 8), rand(3, 4, 8, 5, 3)
    torch.testing.assert_close(traced(*args), kernels.mask_logits(*args))
    traced = torch.jit.trace(kernels.nearest_sample, (rand(1, 5, 8), rand(1, 7, 2).sigmoid()))
    args = rand(3, 5, 8), rand(3, 9, 2).sigmoid()
    torch.testing.assert_close(traced(*args), kernels.nearest_sample(*args))


@every_operator
def test_explain_computes_nothing(name, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "embedding_bag", None)
    monkeypatch.setattr(torch.nn.functional, "grid_sample", None)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    assert explain(function(name, "reference"), *tensors(name)).impl == "reference"
