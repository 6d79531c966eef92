"""ms_deform_attn_classic: the usual signature, against grid_sample in float64 and against ms_deform_attn."""

import pytest
import torch
import torch.nn.functional as F

from kernels import ms_deform_attn
from kernels.dispatch import HAS_TRITON
from kernels.ms_deform_attn_classic import ms_deform_attn_classic

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(2, 3), (4, 6), (1, 5)]
STARTS = [0, 6, 30]
IMPLS = [
    "reference",
    pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(autouse=True)
def skip_what_needs_a_gpu(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU")


def inputs(dtype=torch.float32, batch=2, queries=5, heads=2, dim=16, points=2, seed=0):
    """Value, locations some of which lie outside, and weights."""
    generator = torch.Generator().manual_seed(seed)
    cells = sum(h * w for h, w in SHAPES)
    value = torch.randn(batch, cells, heads, dim, generator=generator, dtype=dtype)
    weights = torch.rand(batch, queries, heads, len(SHAPES), points, generator=generator, dtype=dtype)
    locations = 1.4 * torch.rand(*weights.shape, 2, generator=generator, dtype=dtype) - 0.2
    return value.to(DEVICE), locations.to(DEVICE), weights.to(DEVICE)


def classic(value, locations, weights, shapes=SHAPES, **options):
    return ms_deform_attn_classic(value, shapes, None, locations, weights, **options)


def by_grid_sample(value, locations, weights):
    """The operator as everybody's PyTorch form computes it."""
    B, S, A, D = value.shape
    Q, P = locations.shape[1], locations.shape[4]
    out, start = 0, 0
    for level, (h, w) in enumerate(SHAPES):
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)  # [B*A, Q, P, 2]
        maps = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(B * A, D, h, w)
        by_level = weights[:, :, :, level].transpose(1, 2).reshape(B * A, 1, Q, P)
        out = out + (F.grid_sample(maps, grid, align_corners=False) * by_level).sum(-1)
        start += h * w
    return out.view(B, A * D, Q).transpose(1, 2)


def test_equals_grid_sample_in_double_precision():
    tensors = inputs(torch.float64)
    torch.testing.assert_close(classic(*tensors), by_grid_sample(*tensors))


@pytest.mark.parametrize("impl", IMPLS)
def test_value_and_gradients_equal_those_of_grid_sample(impl):
    tensors = [x.requires_grad_() for x in inputs()]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    out, expected = classic(*tensors, impl=impl), by_grid_sample(*exact)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ours = torch.autograd.grad(out, tensors, grad)
    for got, wanted in zip(ours, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_samples_where_the_rounded_locations_say(dtype, impl):
    value, locations, weights = (x.to(dtype) for x in inputs())
    exact = by_grid_sample(value.double(), locations.double(), weights.double())
    got = classic(value, locations, weights, impl=impl)
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), exact, atol=1e-5 + eps, rtol=eps)


@pytest.mark.parametrize("impl", IMPLS)
def test_values_may_be_half_precision_and_locations_single(impl):
    value, locations, weights = inputs()
    got = classic(value.half(), locations, weights, impl=impl)
    exact = by_grid_sample(value.half().double(), locations.double(), weights.double())
    torch.testing.assert_close(got.double(), exact, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_queries_give_an_empty_result(impl):
    assert classic(*inputs(queries=0), impl=impl).shape == (2, 0, 32)


def test_equals_the_operator_on_raw_offsets_and_logits():
    value, _, _ = inputs(torch.float64)
    generator = torch.Generator().manual_seed(3)
    offset = torch.randn(2, 5, 2, 3, 2, 2, generator=generator, dtype=torch.float64).to(DEVICE)
    logit = torch.randn(2, 5, 2, 3, 2, generator=generator, dtype=torch.float64).to(DEVICE)
    ref = torch.rand(2, 5, 3, 2, generator=generator, dtype=torch.float64).to(DEVICE)
    sizes = torch.tensor(SHAPES, dtype=torch.float64, device=DEVICE).flip(1)
    locations = ref[:, :, None, :, None] + offset / sizes[:, None]
    weights = logit.flatten(3).softmax(-1).view_as(logit)
    torch.testing.assert_close(
        classic(value, locations, weights), ms_deform_attn(value, offset, logit, SHAPES, ref)
    )


@pytest.mark.parametrize("starts", [None, STARTS, torch.tensor(STARTS)])
@pytest.mark.parametrize("shapes", [SHAPES, torch.tensor(SHAPES), [list(pair) for pair in SHAPES]])
def test_takes_shapes_and_starts_as_tensors_or_lists(shapes, starts):
    value, locations, weights = inputs()
    got = ms_deform_attn_classic(value, shapes, starts, locations, weights, 128)
    torch.testing.assert_close(got, classic(value, locations, weights), rtol=0, atol=0)


@pytest.mark.parametrize("starts", [[0, 6, 31], torch.tensor([0, 24, 30]), [0, 6]])
def test_levels_that_do_not_follow_each_other_are_refused(starts):
    value, locations, weights = inputs()
    with pytest.raises(ValueError, match=r"expected starts \[0, 6, 30\], got"):
        ms_deform_attn_classic(value, SHAPES, starts, locations, weights)


def test_shapes_that_do_not_fit_are_refused():
    value, locations, weights = inputs()
    with pytest.raises(ValueError, match="value has 35 cells"):
        classic(value, locations, weights, [*SHAPES[:2], (1, 6)])
    with pytest.raises(ValueError, match=r"expected sampling_locations \[2, Q, 2, 3, P, 2\]"):
        classic(value, locations[:, :, :1], weights)
    with pytest.raises(ValueError, match=r"attention_weights \[2, Q, 2, 3, P\]"):
        classic(value, locations, weights[..., :1])
    with pytest.raises(ValueError, match="expected value"):
        classic(value.flatten(2), locations, weights)
    with pytest.raises(ValueError, match=r"expected spatial_shapes"):
        classic(value, locations, weights, torch.tensor(SHAPES).float())


def test_autocast_leaves_dtypes_as_they_are():
    tensors = inputs()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = classic(*tensors)
    torch.testing.assert_close(got, classic(*tensors), rtol=0, atol=0)


def test_compiles_without_graph_breaks_when_shapes_are_a_list():
    tensors = inputs()
    compiled = torch.compile(classic, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), classic(*tensors))


def test_shapes_as_a_tensor_break_the_graph_and_say_so():
    tensors, shapes = inputs(), torch.tensor(SHAPES)
    compiled = torch.compile(classic, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors, shapes), classic(*tensors))
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="list of"):
        torch.compile(classic, backend="aot_eager", fullgraph=True)(*tensors, shapes)


class Classic(torch.nn.Module):
    def forward(self, value, locations, weights, shapes=SHAPES):
        return classic(value, locations, weights, shapes)


def test_export_holds_one_operator():
    tensors = inputs()
    program = torch.export.export(Classic(), tensors)
    called = [str(node.target) for node in program.graph.nodes if "tarvis" in str(node.target)]
    assert called == ["tarvis.ms_deform_attn.default"]
    torch.testing.assert_close(program.module()(*tensors), classic(*tensors))


def test_export_refuses_shapes_as_a_tensor():
    with pytest.raises(ValueError, match="needs spatial_shapes as a list"):
        torch.export.export(Classic(), (*inputs(), torch.tensor(SHAPES)))
