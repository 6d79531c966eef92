"""ms_deform_attn: every implementation against grid_sample in float64; gradients, places, layouts, edges."""

from importlib.metadata import version

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels import dispatch, ms_deform_attn, ms_deform_attn_classic
from kernels.ms_deform_attn import cell_centres, deformable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(3, 5), (6, 10), (12, 20)]
SMALL = [(1, 3), (3, 2)]

needs_triton = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="Triton is not installed")
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")]
TRITON = pytest.param("triton", marks=needs_triton)
CUDA = pytest.param("cuda", marks=needs_gpu)
every_implementation = pytest.mark.parametrize("impl", ["reference", TRITON, CUDA])
every_kernel = pytest.mark.parametrize("impl", [TRITON, CUDA])


def inputs(shapes=SHAPES, batch=2, queries=None, heads=2, dim=4, points=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cells = sum(h * w for h, w in shapes)
    queries = cells if queries is None else queries
    value = torch.randn(batch, cells, heads, dim, generator=generator, dtype=torch.float64)
    logit = torch.randn(batch, queries, heads, len(shapes), points, generator=generator, dtype=torch.float64)
    offset = 2.5 * torch.randn(*logit.shape, 2, generator=generator, dtype=torch.float64)
    return tuple(x.to(DEVICE, dtype) for x in (value, offset, logit))


def random_points(*shape, seed=1):
    """Reference points, float32; with them no sample comes to lie on a pixel, where derivatives jump."""
    return torch.rand(*shape, 2, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def by_grid_sample(value, offset, logit, shapes, ref=None, classic=False):
    """The operator as Deformable DETR's own PyTorch form computes it."""
    B, S, A, D = value.shape
    Q, L, P = logit.shape[1], logit.shape[3], logit.shape[4]
    weight = logit if classic else logit.flatten(3).softmax(-1).view(B, Q, A, L, P)
    out, start = 0, 0
    for level, (h, w) in enumerate(shapes):
        location = offset[:, :, :, level]
        if not classic:
            centre = ref.expand(-1, -1, L, -1)[:, :, level].to(value.dtype)
            location = centre[:, :, None, None] + location / location.new_tensor([w, h])
        grid = (2 * location - 1).transpose(1, 2).flatten(0, 1)  # [B*A, Q, P, 2]
        maps = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(B * A, D, h, w)
        sampled = F.grid_sample(maps, grid, align_corners=False)  # [B*A, D, Q, P]
        by_level = weight[:, :, :, level].transpose(1, 2).reshape(B * A, 1, Q, P)
        out = out + (sampled * by_level).sum(-1)
        start += h * w
    return out.view(B, A * D, Q).transpose(1, 2)


def differentiate(function, tensors, seed=2):
    """The result, and the gradients of all tensors."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = function(*tensors)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # the gradient has the same numbers whatever the dtype, for they fit into the least exact
    return out, *torch.autograd.grad(out, tensors, weight.bfloat16().to(out))


def assert_close(got, exact):
    """Errors of single precision sums, and of rounding what came in each dtype."""
    for a, b in zip(got, exact, strict=True):
        eps = torch.finfo(a.dtype).eps if a.dtype != torch.float64 else 1e-7
        torch.testing.assert_close(a.double(), b.double(), rtol=eps, atol=1e-5 * b.abs().max().item() + 1e-7)


def check(impl, tensors, shapes, ref=None, classic=False, deterministic=False):
    """Value and all gradients, of `ref` too where it is given, against grid_sample in float64."""
    tensors = tensors if ref is None else (*tensors, ref)
    options = {"classic": classic, "deterministic": deterministic, "impl": impl}
    got = differentiate(lambda v, o, w, r=None: deformable(v, o, w, shapes, r, **options), tensors)
    assert [x.dtype for x in got] == [tensors[0].dtype, *(x.dtype for x in tensors)]
    exact = differentiate(
        lambda v, o, w, r=None: by_grid_sample(v, o, w, shapes, r, classic), [x.double() for x in tensors]
    )
    if ref is not None:  # sums gradients that were rounded to the dtype of `offset`
        worst = (got[4].double() - exact[4]).abs().max().item()
        assert worst <= 4 * torch.finfo(tensors[1].dtype).eps * exact[4].abs().max().item() + 1e-4
    assert_close(got[:4], exact[:4])


def test_equals_grid_sample_in_double_precision():
    value, offset, logit = inputs()
    expected = by_grid_sample(value, offset, logit, SHAPES, cell_centres(SHAPES, value.device))
    got = ms_deform_attn(value, offset, logit, SHAPES, impl="reference")
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_gradcheck():
    shapes = [(3, 4), (2, 2)]
    tensors = inputs(shapes, batch=1, queries=2, heads=1, dim=2, points=2)
    ref = torch.tensor([[[[0.31, 0.62]], [[0.77, 0.18]]]], dtype=torch.float64, device=DEVICE)
    tensors = [x.requires_grad_() for x in (*tensors, ref)]
    assert torch.autograd.gradcheck(lambda *x: ms_deform_attn(*x[:3], shapes, x[3]), tensors)


@every_implementation
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [
        (torch.float32, 16),
        (torch.float32, 32),
        (torch.float32, 64),
        (torch.float16, 32),
        (torch.bfloat16, 16),
        (torch.bfloat16, 32),
        (torch.bfloat16, 64),
    ],
)
def test_value_and_gradients_equal_those_of_grid_sample(impl, dtype, dim):
    tensors = inputs(SMALL, queries=5, dim=dim, points=4, dtype=dtype)
    check(impl, tensors, SMALL, random_points(2, 5, 2))


@every_implementation
@pytest.mark.parametrize(("levels", "points"), [(1, 1), (1, 5), (2, 4), (3, 3), (4, 8)])
def test_any_number_of_levels_and_points(impl, levels, points):
    shapes = [(2, 3), (1, 1), (3, 1), (2, 2)][:levels]
    tensors = inputs(shapes, batch=1, queries=3, heads=1, dim=16, points=points, dtype=torch.float16)
    check(impl, tensors, shapes, random_points(1, 3, 1))


@every_implementation
@pytest.mark.parametrize(
    "points",
    [(3, 6, 3), *(pytest.param(each, marks=pytest.mark.slow) for each in [(1, 1, 4), (2, 2, 2), (5, 1, 2)])],
)
@pytest.mark.parametrize("classic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.float64]
)
def test_levels_may_differ_in_their_numbers_of_points(impl, points, classic, dtype):
    if impl != "reference" and dtype == torch.float64:
        pytest.skip("has no kernel")
    shapes = [(3, 5), (6, 10), (2, 2)]
    value, offset, logit = inputs(shapes, queries=4, dim=16, points=sum(points), dtype=dtype)
    offset, logit, ref = offset[:, :, :, 0], logit[:, :, :, 0], random_points(2, 4, 1)
    if classic:
        offset = offset.sigmoid()

    def run(value, offset, logit):
        if classic:
            return ms_deform_attn_classic(value, shapes, None, offset, logit, points=points, impl=impl)
        return ms_deform_attn(value, offset, logit, shapes, ref, points=points, impl=impl)

    def exact(value, offset, logit):
        """Level by level, with the softmax over all of them before."""
        weight = logit if classic else logit.softmax(-1)
        parts = zip(
            shapes,
            value.split([h * w for h, w in shapes], 1),
            offset.split(points, 3),
            weight.split(points, 3),
            strict=True,
        )
        out = 0
        for (h, w), cells, moved, share in parts:
            if not classic:
                moved = ref[:, :, None].double() + moved / moved.new_tensor([w, h])
            out = out + by_grid_sample(cells, moved.unsqueeze(3), share.unsqueeze(3), [(h, w)], classic=True)
        return out

    got = differentiate(run, (value, offset, logit))
    expected = differentiate(exact, [x.double() for x in (value, offset, logit)])
    assert_close(got, expected)


@pytest.mark.parametrize("points", [(), (3, 6), (3, 0, 3), (2, 2, 3)])
def test_points_that_do_not_fit_are_refused(points):
    value, offset, logit = inputs(SMALL, queries=4, points=3)
    with pytest.raises(ValueError, match=r"for points .* expected offset .* and logit"):
        ms_deform_attn(
            value, offset.flatten(3, 4), logit.flatten(3), SMALL, random_points(1, 4, 1), points=points
        )


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_classic_form_takes_locations_and_finished_weights(impl, dtype, deterministic):
    value, offset, logit = inputs(SMALL, queries=4, heads=1, dim=16, dtype=dtype)
    location = offset.float().mul(0.2).add(0.5).mul(256).floor().add(0.37).div(256)  # next to no pixel
    check(impl, (value, location, logit), SMALL, classic=True, deterministic=deterministic)


@every_implementation
@pytest.mark.parametrize("shape", [(1, 5, 1), (1, 5, 2), (2, 5, 1), (2, 5, 2)])
def test_reference_points_may_be_shared_by_entries_and_levels(impl, shape):
    check(impl, inputs(SMALL, queries=5, heads=1, dim=16, dtype=torch.float32), SMALL, random_points(*shape))


@every_implementation
def test_without_reference_points_queries_sit_at_the_centres_of_cells(impl):
    tensors = inputs(SMALL, batch=1, heads=1, dim=16, dtype=torch.float32)
    centres = cell_centres(SMALL, tensors[0].device)
    check(impl, tensors, SMALL, centres)
    options = {"impl": impl, "deterministic": False}
    got = differentiate(lambda *x: ms_deform_attn(*x, SMALL, **options), tensors)
    assert_close(got, differentiate(lambda *x: ms_deform_attn(*x, SMALL, centres, **options), tensors))


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_inputs_may_be_slices_of_one_product(impl, dtype):
    A, L, P, D = 2, 2, 3, 16
    value, offset, logit = inputs(SMALL, queries=5, heads=A, dim=D, points=P, dtype=dtype)
    ref = random_points(1, 5, 1)
    rows = torch.cat((offset.flatten(2), logit.flatten(2)), 2)  # [B, Q, A*L*P*3]
    for padding in (16, 3):  # rows of values that are aligned, and that are not
        wide = F.pad(value.flatten(2), (padding, 0))

        def sliced(wide, rows, padding=padding):
            offset, logit = rows.split((A * L * P * 2, A * L * P), 2)
            offset, logit = offset.unflatten(2, (A, L, P, 2)), logit.unflatten(2, (A, L, P))
            value = wide[:, :, padding:].unflatten(2, (A, D))
            return ms_deform_attn(value, offset, logit, SMALL, ref, impl=impl, deterministic=False)

        got, grad_wide, grad_rows = differentiate(sliced, (wide, rows))
        plain = differentiate(
            lambda *x: ms_deform_attn(*x, SMALL, ref, impl=impl, deterministic=False), (value, offset, logit)
        )
        parts = grad_rows.split((A * L * P * 2, A * L * P), 2)
        sliced = (got, grad_wide[:, :, padding:].unflatten(2, (A, D)), *parts)
        for a, b in zip(sliced, plain, strict=True):
            torch.testing.assert_close(a.reshape(b.shape), b, atol=1e-6, rtol=torch.finfo(dtype).eps)


@every_implementation
def test_transposed_inputs_and_gradients_are_copied(impl):
    value, offset, logit = inputs(SMALL, queries=5, dim=16, dtype=torch.float32)
    ref = random_points(2, 5, 1).transpose(0, 1).contiguous().transpose(0, 1)
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (value, offset, logit)]
    check(impl, turned, SMALL, ref)
    out = ms_deform_attn(*(x.requires_grad_() for x in turned), SMALL, ref, impl=impl, deterministic=False)
    out.sum().backward()  # the gradient is expanded from one number


@every_implementation
def test_dtypes_may_be_mixed(impl):
    value, offset, logit = inputs(SMALL, queries=5, dim=16, dtype=torch.float32)
    check(impl, (value.bfloat16(), offset, logit.half()), SMALL, random_points(2, 5, 1))
    check(impl, (value, offset.half(), logit.bfloat16()), SMALL, random_points(2, 5, 1))


@every_implementation
def test_autocast_leaves_dtypes_as_they_are(impl):
    value, offset, logit = inputs(SMALL, queries=5, dim=16, dtype=torch.float32)
    ref = random_points(2, 5, 1)
    with torch.autocast(DEVICE, torch.bfloat16):
        check(impl, (value, offset.bfloat16(), logit.bfloat16()), SMALL, ref)


@every_kernel
def test_on_a_pixel_the_derivative_is_that_to_the_right(impl):
    value, offset, logit = inputs([(2, 4)], batch=1, heads=1, dim=16, dtype=torch.float32)
    tensors = (value, offset.round().clamp(-3, 3), logit)  # with sizes that are powers of two: on a pixel
    got, expected = (
        differentiate(lambda *x, impl=impl: ms_deform_attn(*x, [(2, 4)], impl=impl), tensors)
        for impl in (impl, "reference")
    )
    assert_close(got, expected)


def clamp_with(at_bound):
    """torch.clamp whose gradient at both bounds is this; versions of PyTorch differ."""

    class Clamp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, low, high):
            ctx.save_for_backward((low < x) & (x < high), (x == low) | (x == high))
            return torch.minimum(torch.maximum(x, torch.tensor(low)), torch.tensor(high))

        @staticmethod
        def backward(ctx, grad):
            inside, bound = ctx.saved_tensors
            return grad * (inside + at_bound * bound), None, None

    inf = float("inf")
    return lambda x, min=-inf, max=inf: Clamp.apply(x, float(min), float(max)).to(x.dtype)


@every_implementation
@pytest.mark.parametrize("at_bound", [0, 0.5, 1])
def test_the_derivative_at_every_cell_is_that_of_the_contract(impl, at_bound, monkeypatch):
    value, expected = [5.0, 3.0, 4.0, 8.0], [0.0, 5.0, -2.0, 1.0, 4.0, -8.0, 0.0, 0.0]  # at x = -2, .. 5
    value = torch.tensor(value, device=DEVICE).view(1, 4, 1, 1).expand(1, 4, 1, 16)
    offset = torch.zeros(1, 8, 1, 1, 1, 2, device=DEVICE)
    offset[0, :, 0, 0, 0, 0] = torch.arange(-2.0, 6)
    offset.requires_grad_()
    ref = torch.tensor([0.125, 0.5], device=DEVICE).view(1, 1, 1, 2).expand(1, 8, 1, 2)
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.Tensor, "clamp", clamp_with(at_bound))
    out = ms_deform_attn(value, offset, torch.zeros(1, 8, 1, 1, 1, device=DEVICE), [(1, 4)], ref, impl=impl)
    (grad,) = torch.autograd.grad(out.sum() / 16, offset)
    assert grad[0, :, 0, 0, 0, 0].tolist() == expected
    assert grad[0, :, 0, 0, 0, 1].tolist() == [0.0, 0.0, -5.0, -3.0, -4.0, -8.0, 0.0, 0.0]


@every_implementation
def test_samples_outside_a_level_count_as_zero(impl):
    value, offset, logit = inputs(SMALL, queries=5, dim=16, dtype=torch.float32)
    offset[:, 0] += 1000
    offset[:, 1:3, ..., 0] -= 1000
    offset[:, 3:, ..., 1] += 1e30
    options = {"ref": random_points(2, 5, 1), "impl": impl, "deterministic": False}
    got = differentiate(lambda *x: ms_deform_attn(*x, SMALL, **options), (value, offset, logit))
    assert not any(x.any() for x in got)


@every_implementation
@pytest.mark.parametrize("deterministic", [False, True])
def test_offsets_that_are_not_finite_read_and_write_nothing(impl, deterministic):
    value, offset, logit = inputs(SMALL, batch=1, queries=5, dim=16, dtype=torch.float32)
    bad = offset.clone()
    # interpreters before Triton 3.9 let NaN through a maximum, which GPUs do not
    old = impl == "triton" and dispatch.INTERPRETED and version("triton").startswith(("3.6", "3.7", "3.8"))
    bad[0, 0], bad[0, 1, 0], bad[0, 2, :, 1] = float("inf" if old else "nan"), float("inf"), float("-inf")
    ref = random_points(1, 5, 1)
    options = {"impl": impl, "deterministic": deterministic}
    far = torch.where(bad.isfinite(), bad, 1e6)
    got = differentiate(lambda *x: ms_deform_attn(*x, SMALL, ref, **options), (value, bad, logit))
    expected = differentiate(lambda *x: ms_deform_attn(*x, SMALL, ref, **options), (value, far, logit))
    assert_close(
        [got[0], got[1], got[2][bad.isfinite()], got[3]],
        [expected[0], expected[1], expected[2][bad.isfinite()], expected[3]],
    )


@every_implementation
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0)])
def test_nothing_asked_gives_an_empty_result(impl, deterministic, batch, queries):
    tensors = inputs(SMALL, batch=batch, queries=queries, dim=16, dtype=torch.float32)
    ref = torch.zeros(1, queries, 1, 2, device=DEVICE)
    out, *grads = differentiate(
        lambda *x: ms_deform_attn(*x, SMALL, ref, impl=impl, deterministic=deterministic), tensors
    )
    assert out.shape == (batch, queries, 32)
    assert not any(x.any() for x in grads)


@every_kernel
def test_batch_entries_may_be_further_apart_than_32_bits_reach(impl):
    value, offset, logit = inputs(SMALL[:1], queries=3, heads=1, dim=16, dtype=torch.float16)
    ref, apart = random_points(1, 3, 1), 2**31 + 64
    if DEVICE == "cuda":
        memory = torch.zeros(apart + 1024, dtype=torch.float16, device=DEVICE)
    else:  # pages that nobody touches are never allocated
        memory = torch.from_numpy(np.zeros(apart + 1024, dtype=np.float16))
    wide = memory.as_strided(value.shape, (apart, 16, 16, 1))
    wide.copy_(value)
    got = ms_deform_attn(wide, offset, logit, SMALL[:1], ref, impl=impl)
    assert torch.equal(got, ms_deform_attn(value, offset, logit, SMALL[:1], ref, impl=impl))


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_deterministic_gradients_are_equal_bit_by_bit(impl, dtype):
    shapes = [(1, 2), (2, 2)]
    tensors = inputs(shapes, queries=13, heads=1, dim=16, points=4, dtype=dtype)
    ref = random_points(1, 13, 1)
    first, second, atomic = (
        differentiate(
            lambda *x, d=deterministic: ms_deform_attn(*x, shapes, ref, impl=impl, deterministic=d),
            tensors,
        )
        for deterministic in (True, True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_close(first, atomic)
    check(impl, tensors, shapes, ref, deterministic=True)


@needs_triton
def test_unless_told_determinism_follows_the_setting_of_torch(monkeypatch):
    from kernels._triton import ms_deform_attn as gpu

    asked, backward = [], gpu.backward
    monkeypatch.setattr(gpu, "backward", lambda *x: asked.append(x[-1]) or backward(*x))
    tensors = inputs([(1, 2)], batch=1, heads=1, dim=16, dtype=torch.float32)
    for setting in (False, True):
        torch.use_deterministic_algorithms(setting, warn_only=True)
        differentiate(lambda *x: ms_deform_attn(*x, [(1, 2)], impl="triton"), tensors)
    assert asked == [False, True]


@every_implementation
@pytest.mark.parametrize("deterministic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_operator_is_registered_as_torch_expects(impl, deterministic):
    tensors = inputs([(1, 2), (2, 2)], batch=2, queries=3, heads=1, dim=16, dtype=torch.float32)
    ref = random_points(1, 3, 1)
    for x in (*tensors, ref):
        x.requires_grad_()
    arguments = (*tensors, ref, [1, 2, 2, 2], False, deterministic, impl)
    torch.library.opcheck(torch.ops.tarvis.ms_deform_attn.default, arguments)


@pytest.mark.slow
@every_implementation
def test_compiles_to_one_graph_with_dynamic_sizes(impl):
    def run(value, offset, logit, ref):
        h = value.shape[1]
        return ms_deform_attn(value, offset, logit, [(h, 1)], ref, impl=impl, deterministic=False)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, height, queries in ((2, 3, 5), (3, 5, 4)):
        tensors = inputs([(height, 1)], batch, queries, heads=1, dim=16, dtype=torch.float32)
        ref = random_points(batch, queries, 1)
        got = differentiate(lambda *x, ref=ref: compiled(*x, ref), tensors)
        assert_close(got, differentiate(lambda *x, ref=ref: run(*x, ref), tensors))


def test_compiled_training_on_a_cpu_sorts_patches_as_eager_does():
    """The backward of embedding_bag, which sorts four times as many indices, made it 1.7 times as slow."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    tensors = [x.cpu() for x in inputs(SMALL, dim=16, dtype=torch.float32)]
    compiled = torch.compile(lambda *x: ms_deform_attn(*x, SMALL), fullgraph=True, backend=backend)
    got = differentiate(compiled, tensors)
    assert_close(got, differentiate(lambda *x: ms_deform_attn(*x, SMALL), tensors))
    text = "".join(
        str(module.graph) for graph in graphs for module in graph.modules() if hasattr(module, "graph")
    )
    assert "sort" in text


class Module(torch.nn.Module):
    def forward(self, value, offset, logit, ref):
        return ms_deform_attn(value, offset, logit, SMALL, ref)


def test_export_holds_one_operator_that_runs_anywhere():
    tensors = (*inputs(SMALL, queries=5, dim=16, dtype=torch.float32), random_points(1, 5, 1))
    batch = torch.export.Dim("batch", max=64)
    dynamic = ({0: batch}, {0: batch}, {0: batch}, None)
    program = torch.export.export(Module(), tensors, dynamic_shapes=dynamic)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names == ["tarvis.ms_deform_attn.default"]
    for batch in (2, 3):
        tensors = inputs(SMALL, batch, queries=5, dim=16, dtype=torch.float32)
        ref = random_points(1, 5, 1)
        got = differentiate(lambda *x, ref=ref: program.module()(*x, ref), tensors)
        assert_close(got, differentiate(lambda *x, ref=ref: ms_deform_attn(*x, SMALL, ref), tensors))


def test_shapes_that_do_not_fit_are_refused():
    value, offset, logit = inputs()
    with pytest.raises(ValueError, match="value has 315 cells"):
        ms_deform_attn(value, offset, logit, [*SHAPES[:2], (12, 21)])
    with pytest.raises(ValueError, match="expected offset"):
        ms_deform_attn(value, offset[..., :1, :], logit, SHAPES)
    with pytest.raises(ValueError, match="expected 315 queries, got 4"):
        ms_deform_attn(value, offset[:, :4], logit[:, :4], SHAPES)
    with pytest.raises(ValueError, match="expected ref"):
        ms_deform_attn(value, offset, logit, SHAPES, torch.zeros(1, 4, 1, 2))


@every_kernel
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dim": 8}, "16, 32 or 64 channels"),
        ({"points": 17}, "up to 32 points"),
        ({"dtype": torch.float64}, "not float64"),
        ({"shapes": [(1, 1)] * 5, "points": 1}, "1 to 4 levels"),
    ],
)
def test_what_a_kernel_cannot_take_is_refused_not_passed_on(impl, options, why):
    options = {"shapes": SMALL, "dim": 16, "dtype": torch.float32, **options}
    with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot run here.*{why}"):
        ms_deform_attn(*inputs(**options), options["shapes"], impl=impl)


@needs_triton
def test_offsets_in_double_precision_are_refused_by_kernels():
    value, offset, logit = inputs(SMALL, dim=16)
    with pytest.raises(RuntimeError, match="not float64"):
        ms_deform_attn(value.float(), offset, logit.float(), SMALL, impl="triton")


@needs_triton
def test_asking_for_triton_on_a_cpu_raises_instead_of_falling_back(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    value, offset, logit = (x.cpu() for x in inputs(SMALL, dim=16, dtype=torch.float32))
    with pytest.raises(RuntimeError, match="tensors are on cpu"):
        ms_deform_attn(value, offset, logit, SMALL, impl="triton")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_many_samples_in_few_cells_have_the_same_gradient_in_every_run(impl):
    shapes = [(4, 6), (2, 3)]  # 16 000 samples a cell and head: thousands of programs add to the same places
    tensors = inputs(shapes, batch=2, queries=20_000, heads=8, dim=32, points=4, dtype=torch.float32)
    ref = random_points(1, 20_000, 1)
    first, again, atomic = (
        differentiate(
            lambda *x, d=deterministic: ms_deform_attn(*x, shapes, ref, impl=impl, deterministic=d), tensors
        )
        for deterministic in (True, True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for a, b in zip(first, atomic, strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_inductor_compiles_it_in_the_middle_of_other_operators(impl):
    shapes = [(16, 24), (8, 12), (4, 6)]
    cells = sum(h * w for h, w in shapes)
    x = torch.randn(2, cells, 256, device=DEVICE, requires_grad=True)
    weight = torch.randn(256, 8 * 3 * 4 * 3, device=DEVICE) / 16

    def run(x):
        offset, logit = (x @ weight).split((192, 96), -1)  # slices of one product
        out = ms_deform_attn(
            x.view(2, cells, 8, 32).relu(), offset.unflatten(-1, (8, 3, 4, 2)),
            logit.unflatten(-1, (8, 3, 4)), shapes, impl=impl,
        )  # fmt: skip
        return out.tanh()

    plain = torch.autograd.grad(run(x).sum(), x)[0]
    ours = torch.autograd.grad(torch.compile(run, fullgraph=True)(x).sum(), x)[0]
    torch.testing.assert_close(ours, plain, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, o, w: (v[0], o, w, SMALL), r"expected value \[B, S, A, D\]"),
        (lambda v, o, w: (v, o[..., 0], w[..., 0], SMALL), r"and logit \[B, Q, A, L, P\]"),
        (lambda v, o, w: (v.int(), o, w, SMALL), "expected value in float32, .*, got torch.int32"),
        (lambda v, o, w: (v, o, w, []), r"expected levels and points, got levels \[\]"),
        (lambda v, o, w: (v, o, w, [(-1, -6), *SMALL[1:]]), "expected levels and points"),
        (lambda v, o, w: (v, o[..., :0, :], w[..., :0], SMALL), "0 points in each"),
    ],
)
def test_ranks_dtypes_and_levels_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(*change(*inputs(SMALL, batch=1)))
