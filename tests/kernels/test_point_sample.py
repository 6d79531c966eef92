import pytest
import torch
import torch.nn.functional as F

from kernels.dispatch import HAS_TRITON, using
from kernels.point_sample import nearest_sample, point_sample, point_sample_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL = [pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed"))]
IMPLS = ["reference", *KERNEL]
NEEDS_GPU = "needs an NVIDIA GPU"
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    # N, C, H, W, R, points of each map
    pytest.param(2, 40, 4, 5, 9, True, id="a gather of rows"),
    pytest.param(2, 256, 3, 4, 7, False, id="features, points shared"),
    pytest.param(2, 3, 6, 5, 20, True, id="few channels"),
    pytest.param(1, 300, 2, 3, 3, True, id="channels beyond a block"),
    pytest.param(2, 1, 9, 8, 300, True, id="masks"),
    pytest.param(1, 1, 1, 1, 3, True, id="one cell"),
    pytest.param(1, 1, 1, 1, 1, True, id="one point in one cell"),
]
EMPTY = [(0, 4, 3, 3, 5), (2, 4, 3, 3, 0), (2, 0, 3, 3, 5), (0, 64, 3, 3, 0)]


def inputs(N, C, H, W, R, own=True, dtype=torch.float32, seed=0):
    """Maps, channels last if they have some, and points: mostly inside, some on and beyond the border."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(N, H, W, C, generator=generator).permute(0, 3, 1, 2).to(DEVICE, dtype)
    points = torch.rand(N if own else 1, R, 2, generator=generator) * 1.2 - 0.1
    points[:, :2] = torch.tensor([[0.0, 1.0], [1.0, 0.0]])[: points[:, :2].shape[1]]
    return maps, points.to(DEVICE)


def exact(maps, points):
    """By grid_sample in float64."""
    grid = (2 * points.double() - 1).expand(maps.shape[0], -1, -1)[:, None]
    return F.grid_sample(maps.double(), grid, align_corners=False)[:, :, 0].transpose(1, 2)


def close(got, want, dtype=torch.float32):
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("N", "C", "H", "W", "R", "own"), SHAPES)
def test_samples_and_gradients_agree_with_float64(impl, dtype, N, C, H, W, R, own):
    maps, points = inputs(N, C, H, W, R, own, dtype)
    expected_maps = maps.double().requires_grad_()
    expected = exact(expected_maps, points)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    (expected_grad,) = torch.autograd.grad(expected, expected_maps, weight.double())
    for deterministic in (False, True):
        leaf = maps.detach().requires_grad_()
        out = point_sample(leaf, points, deterministic=deterministic, impl=impl)
        assert out.shape == (N, R, C)
        assert out.dtype == dtype
        close(out, expected, dtype)
        (grad,) = torch.autograd.grad(out, leaf, weight)
        assert grad.dtype == dtype
        close(grad / max(1, R // 9), expected_grad / max(1, R // 9), dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["channels first", "channels last", "slice", "expanded"])
def test_any_strides_are_read_and_gradients_return(impl, layout):
    maps, points = inputs(2, 40, 5, 6, 7)
    maps = {
        "channels first": maps.contiguous(),
        "channels last": maps,
        "slice": maps.repeat(1, 2, 2, 3)[:, 40:, 2:7, ::3],
        "expanded": maps[:1].expand(2, -1, -1, -1),
    }[layout]
    leaf = maps.detach().requires_grad_()
    out = point_sample(leaf, points, impl=impl)
    close(out, exact(maps, points))
    copy = maps.double().contiguous().requires_grad_()
    cotangent = torch.linspace(-1, 1, 7, device=DEVICE)[None, :, None].expand(2, 7, 40)  # not contiguous
    (grad,) = torch.autograd.grad(out, leaf, cotangent)
    close(grad, torch.autograd.grad(exact(copy, points), copy, cotangent.double())[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_masks_without_channels_give_float32(impl, dtype):
    maps = (torch.rand(3, 8, 9, generator=torch.Generator().manual_seed(0)) > 0.5).to(DEVICE, dtype)
    points = inputs(3, 1, 8, 9, 30, own=False)[1]
    out = point_sample(maps[:, :, ::2], points, impl=impl)
    assert out.dtype == torch.float32
    assert out.shape == (3, 30)
    close(out, exact(maps[:, None, :, ::2], points)[..., 0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("N", "C", "H", "W", "R"), EMPTY)
def test_nothing_to_sample_gives_empty_results_and_zero_gradients(impl, deterministic, N, C, H, W, R):
    maps, points = inputs(N, C, H, W, R)
    maps.requires_grad_()
    out = point_sample(maps, points, deterministic=deterministic, impl=impl)
    assert out.shape == (N, R, C)
    out.sum().backward()
    assert maps.grad.shape == maps.shape
    assert not maps.grad.any()


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # of the interpreter
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("C", [2, 64])
def test_far_away_points_count_as_zero(impl, C):
    maps, points = inputs(1, C, 4, 4, 6)
    points[:] = torch.tensor([[-9.0, 0.5], [0.5, 9.0], [1e9, 0.5], [0.5, -1e9], [-1.0, -1.0], [1e20, 1e20]])
    maps.requires_grad_()
    for deterministic in (False, True):
        out = point_sample(maps, points, deterministic=deterministic, impl=impl)
        (grad,) = torch.autograd.grad(out.sum(), maps)
        assert not out.any()
        assert not grad.any()


@pytest.mark.parametrize("impl", KERNEL)
@pytest.mark.parametrize("C", [1, 64])
def test_deterministic_gradients_are_bit_equal(impl, C):
    maps, points = inputs(2, C, 2, 2, 20)
    maps.requires_grad_()
    cotangent = torch.randn(2, 20, C, device=DEVICE)
    torch.use_deterministic_algorithms(True, warn_only=True)  # what deterministic=None follows
    grads = [torch.autograd.grad(point_sample(maps, points, impl=impl), maps, cotangent)[0] for _ in range(2)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("impl", IMPLS)
def test_points_get_no_gradient_and_bare_inference_no_graph(impl):
    maps, points = inputs(1, 4, 3, 3, 5)
    assert not point_sample(maps, points.requires_grad_(), impl=impl).requires_grad
    out = point_sample(maps.requires_grad_(), points, impl=impl)
    out.sum().backward()
    assert points.grad is None


@pytest.mark.parametrize("impl", IMPLS)
def test_sampling_features_and_then_multiplying_gives_samples_of_logits(impl):
    features, points = inputs(3, 48, 6, 7, 13, own=False)
    embedding = torch.randn(4, 48, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    leaves = [embedding.requires_grad_(), features.requires_grad_()]
    logits = embedding @ point_sample(features, points, impl=impl).flatten(0, 1).T  # [4, 3*13]
    stored = torch.einsum("qc,tchw->tqhw", embedding.double(), features.double())
    expected = exact(stored, points).permute(2, 0, 1).flatten(1)
    close(logits / 7, expected / 7)
    grads = torch.autograd.grad(F.softplus(logits).mean(), leaves)
    for got, want in zip(grads, torch.autograd.grad(F.softplus(expected).mean(), leaves), strict=True):
        close(got, want)


def test_the_reference_has_the_right_derivative():
    for channels in (2, 33):
        maps, points = inputs(1, channels, 3, 4, 4)
        maps = maps.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, points=points: point_sample(x, points.double()), maps)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(impl, dtype):
    maps, points = inputs(2, 40, 5, 5, 6, dtype=dtype)
    plain = point_sample(maps, points, impl=impl)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        under = point_sample(maps, points, impl=impl)
    assert under.dtype == dtype
    assert torch.equal(plain, under)


@pytest.mark.parametrize(("impl", "channels"), [("reference", 1), ("reference", 40), ("triton", 2)])
def test_the_operators_are_registered_as_torch_wants_them(impl, channels):
    if impl == "triton" and not HAS_TRITON:
        pytest.skip("Triton is not installed")
    maps, points = inputs(1, channels, 2, 2, 3)
    for deterministic in (False, True):
        torch.library.opcheck(
            torch.ops.tarvis.point_sample.default, (maps.requires_grad_(), points, deterministic, impl)
        )
        grad = torch.randn(1, 3, channels, device=DEVICE)
        args = (grad, points, list(maps.shape), channels > 1, deterministic, impl)
        torch.library.opcheck(torch.ops.tarvis.point_sample_backward.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_without_graph_breaks(impl, dynamic):
    def loss(maps, points):
        return (point_sample(maps, points, impl=impl) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for R in (5, 6):
        maps, points = inputs(2, 40, 3, 4, R)
        maps.requires_grad_()
        grads = [torch.autograd.grad(run(maps, points), maps)[0] for run in (compiled, loss)]
        close(*grads)


def test_an_exported_program_holds_one_operator():
    class Sampler(torch.nn.Module):
        def forward(self, maps, points):
            return point_sample(maps, points)

    maps, points = inputs(2, 40, 3, 4, 5)
    program = torch.export.export(Sampler(), (maps, points))
    assert [n.target for n in program.graph.nodes if "tarvis" in str(n.target)] == [
        torch.ops.tarvis.point_sample.default
    ]
    close(program.module()(maps, points), point_sample_reference(maps, points))


@pytest.mark.parametrize("impl", KERNEL)
def test_gradients_use_plain_pytorch_where_the_implementation_became_it(impl):
    """An operator called with "auto" decides anew in its backward."""
    maps, points = inputs(2, 40, 3, 4, 5)
    maps.requires_grad_()
    with using(impl):
        out = torch.ops.tarvis.point_sample(maps, points, False, "auto")
    with using("reference"):
        (grad,) = torch.autograd.grad(out.sum(), maps)
    leaf = maps.detach().double().requires_grad_()
    close(grad, torch.autograd.grad(exact(leaf, points).sum(), leaf)[0])


def test_wrong_inputs_are_named():
    maps, points = inputs(2, 3, 4, 5, 6)
    with pytest.raises(ValueError, match=r"expected maps .* got \[4, 5\]"):
        point_sample(maps[0, 0], points)
    with pytest.raises(ValueError, match="with cells"):
        point_sample(maps[:, :, :0], points)
    with pytest.raises(ValueError, match=r"expected points \[2 or 1, R, 2\], got \[3, 6, 2\]"):
        point_sample(maps, points[:1].expand(3, -1, -1))
    with pytest.raises(ValueError, match=r"float64, got torch\.bfloat16"):
        point_sample(maps, points.bfloat16())
    with pytest.raises(ValueError, match=r"bool, uint8, got torch\.int64"):
        point_sample(maps.long(), points)
    with pytest.raises(ValueError, match=r"expected maps \[N, H, W\]"):
        nearest_sample(maps, points)
    for empty in (maps[:, 0, :0], maps[:, 0, :, :0]):
        with pytest.raises(ValueError, match="with cells"):
            nearest_sample(empty, points)


def test_triton_raises_where_it_cannot_run():
    maps, points = inputs(1, 3, 4, 5, 6)
    with pytest.raises(RuntimeError, match="point_sample: impl='triton' cannot run here"):
        point_sample(maps.double(), points, impl="triton")
    with pytest.raises(RuntimeError, match="not in the CUDA extension"):
        point_sample(maps, points, impl="cuda")
    huge = torch.empty(1, device=DEVICE).expand(1, 2**11, 2**10, 2**10)
    with pytest.raises(RuntimeError, match=r"2\^31"):
        point_sample(huge, points, impl="triton")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_nearest_samples_labels_as_grid_sample_does(dtype):
    labels = torch.randint(
        0, 2 if dtype == torch.bool else 90, (3, 7, 9), generator=torch.Generator().manual_seed(0)
    )
    labels = labels.to(DEVICE, dtype)
    points = torch.rand(3, 200, 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    grid = (2 * points.double() - 1)[:, None]
    expected = F.grid_sample(labels.double()[:, None], grid, mode="nearest", align_corners=False)[:, 0, 0]
    got = nearest_sample(labels, points)
    assert got.dtype == dtype
    assert torch.equal(got.double(), expected)
    assert torch.equal(
        nearest_sample(labels, points[:1]), nearest_sample(labels, points[:1].expand(3, -1, -1))
    )


def test_nearest_takes_the_even_cell_halfway_and_the_last_at_the_border():
    labels = torch.arange(1, 5, device=DEVICE).view(1, 1, 4)
    x = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], device=DEVICE)
    points = torch.stack((x, torch.full_like(x, 0.5)), -1)[None]
    assert nearest_sample(labels, points).tolist() == [[1, 1, 3, 3, 4]]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason=NEEDS_GPU)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("N", "C", "H", "W", "R", "own"), [SHAPES[0], SHAPES[-1]])
def test_inductor_launches_the_kernels(dtype, deterministic, N, C, H, W, R, own):
    def loss(maps, points):
        return (point_sample(maps, points, deterministic=deterministic, impl="triton") ** 2).sum() / R

    maps, points = inputs(N, C, H, W, R, own, dtype)
    maps.requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True)
    grads = [torch.autograd.grad(run(maps, points), maps)[0] for run in (compiled, loss)]
    close(*grads, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason=NEEDS_GPU)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_cuda_graph_replays_the_kernels(dtype, deterministic):
    shape = (2, 40, 4, 5, 9)
    maps, points = inputs(*shape, dtype=dtype)
    maps.requires_grad_()
    cotangent = torch.randn(2, 9, 40, device=DEVICE, dtype=dtype)

    def run():
        out = point_sample(maps, points, deterministic=deterministic, impl="triton")
        return out, torch.autograd.grad(out, maps, cotangent)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles the kernels
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grad = run()
    with torch.no_grad():
        for old, new in zip((maps, points), inputs(*shape, dtype=dtype, seed=1), strict=True):
            old.copy_(new)
    graph.replay()
    leaf = maps.detach().double().requires_grad_()
    expected = exact(leaf, points)
    close(out, expected, dtype)
    close(grad, torch.autograd.grad(expected, leaf, cotangent.double())[0], dtype)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason=NEEDS_GPU)
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_take_no_memory_but_their_own(deterministic):
    maps, points = inputs(1, 64, 512, 512, 5)
    maps.requires_grad_()
    out = point_sample(maps, points, deterministic=deterministic, impl="triton").sum()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(out, maps)
    assert torch.cuda.max_memory_allocated() - before < 1.5 * maps.nbytes
