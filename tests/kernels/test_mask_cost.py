import importlib

import pytest
import torch
import torch.nn.functional as F

from kernels.dispatch import HAS_TRITON
from kernels.mask_cost import mask_cost
from kernels.point_sample import point_sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = [
    "reference",
    pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")),
]
NEEDS_GPU = "needs an NVIDIA GPU"
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    # leading dimensions and Q, C, R, G
    pytest.param((5,), 8, 7, 3, id="tiny"),
    pytest.param((2, 3), 16, 64, 1, id="decoder outputs"),
    pytest.param((70,), 20, 150, 4, id="ragged"),
    pytest.param((3,), 48, 130, 40, id="more targets than a block"),
    pytest.param((1,), 4, 1, 1, id="one of each"),
    pytest.param((1,), 1, 1, 1, id="one of each and one channel"),
]


def inputs(rows, C, R, G, dtype=torch.float32, scale=1.0, seed=0):
    """Embeddings, features, and soft targets of which most are 0 or 1. Logits have about this scale."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(*rows, C, generator=generator) * scale * C**-0.5
    features = torch.randn(R, C, generator=generator)
    targets = (torch.rand(G, R, generator=generator) * 3 - 1).clamp(0, 1)
    return embedding.to(DEVICE, dtype), features.to(DEVICE, dtype), targets.to(DEVICE)


def exact(embedding, features, targets):
    """The formulas in float64, element by element."""
    x = (embedding.double() @ features.double().T)[..., None, :]  # [.., Q, 1, R]
    t = targets.double().expand(*x.shape[:-2], *targets.shape)
    bce = F.binary_cross_entropy_with_logits(x.expand_as(t), t, reduction="none").mean(-1)
    p = x.sigmoid()
    return bce, 1 - (2 * (p * t).sum(-1) + 1) / (p.sum(-1) + t.sum(-1) + 1)


def close(got, want, dtype=torch.float32, scale=1.0):
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3  # logits and probabilities rounded to 11 bits
    torch.testing.assert_close(got[0].double(), want[0], rtol=tolerance, atol=tolerance * scale)
    torch.testing.assert_close(got[1].double(), want[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "C", "R", "G"), SHAPES)
def test_costs_agree_with_float64(impl, dtype, rows, C, R, G):
    arguments = inputs(rows, C, R, G, dtype, scale=3)
    got = mask_cost(*arguments, impl=impl)
    for cost in got:
        assert cost.shape == (*rows, G)
        assert cost.dtype == torch.float32
    close(got, exact(*arguments), dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_logits_stay_exact(impl, dtype):
    """Every logit is +-1e4: sigmoid is 0 or 1 and exp(x) would overflow."""
    embedding = torch.tensor([[1e4, 0], [-1e4, 0], [0, 1e4]], device=DEVICE, dtype=dtype)
    features = torch.randn(90, 2, generator=torch.Generator().manual_seed(0)).sign().to(DEVICE, dtype)
    targets = torch.stack(
        [features[:, 0] > 0, features[:, 0] < 0, torch.ones_like(features[:, 0]) > 0]
    ).float()
    got = mask_cost(embedding, features, targets, impl=impl)
    close(got, exact(embedding, features, targets), torch.float32, scale=1e4)
    assert got[0][0, 0] == got[0][1, 1] == 0
    assert got[1][0, 0] == got[1][1, 1] == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_logits_beyond_half_precision_stay_finite(impl):
    embedding, features, targets = inputs((4,), 8, 20, 2, torch.bfloat16)
    for cost in mask_cost(embedding * 1e6, features, targets, impl=impl):
        assert cost.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_stays_nan(impl, dtype):
    embedding, features, targets = inputs((4,), 8, 20, 2, dtype)
    embedding[1] = float("nan")
    for cost in mask_cost(embedding, features, targets, impl=impl):
        assert cost.isnan().all(1).tolist() == [False, True, False, False]
        assert cost[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("rows", "G"), [((0,), 3), ((4,), 0), ((2, 0), 3), ((0, 4), 0)])
def test_no_queries_or_no_targets_give_empty_costs(impl, rows, G):
    for cost in mask_cost(*inputs(rows, 8, 7, G), impl=impl):
        assert cost.shape == (*rows, G)


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides_and_kinds_of_targets(impl):
    embedding, features, targets = inputs((6,), 12, 40, 3)
    expected = exact(embedding, features, targets.round())
    strided = embedding.T.contiguous().T, features.T.contiguous().T
    close(mask_cost(*strided, targets.round().T.contiguous().T, impl=impl), expected)
    wide = torch.cat([features, features], 1)[:, :12], targets.round().repeat(2, 1)[::2]
    close(mask_cost(embedding, wide[0], wide[1], impl=impl), exact(embedding, *wide))
    for dtype in (torch.bool, torch.uint8, torch.bfloat16):
        close(mask_cost(embedding, features, targets.round().to(dtype), impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_precision_is_taken_as_it_is(impl):
    embedding, features, targets = inputs((6,), 12, 40, 3)
    features = features.bfloat16()
    close(mask_cost(embedding, features, targets, impl=impl), exact(embedding, features, targets))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(impl, dtype):
    arguments = inputs((6,), 12, 40, 3, dtype)
    plain = mask_cost(*arguments, impl=impl)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        under = mask_cost(*arguments, impl=impl)
    for before, after in zip(plain, under, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_gradient_flows(impl):
    arguments = [x.requires_grad_() for x in inputs((6,), 12, 40, 3)]
    assert not any(cost.requires_grad for cost in mask_cost(*arguments, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_results_are_bit_equal_from_run_to_run(impl):
    arguments = inputs((6,), 12, 200, 3)
    for first, second in zip(mask_cost(*arguments, impl=impl), mask_cost(*arguments, impl=impl), strict=True):
        assert torch.equal(first, second)


def test_float64_stays_float64():
    arguments = [x.double() for x in inputs((6,), 12, 700, 3)]
    got = mask_cost(*arguments)
    for cost, expected in zip(got, exact(*arguments), strict=True):
        assert cost.dtype == torch.float64
        torch.testing.assert_close(cost, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_costs_of_sampled_features_are_costs_of_stored_logits(impl):
    """The matching of a clip: points shared by its frames, queries and targets."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 12, 6, 8, generator=generator).to(DEVICE)  # [T, C, h, w]
    masks = (torch.rand(2, 3, 24, 32, generator=generator) > 0.5).to(DEVICE)  # [G, T, H, W]
    points = torch.rand(1, 30, 2, generator=generator).to(DEVICE)
    embedding = torch.randn(5, 12, generator=generator).to(DEVICE)
    targets = point_sample(masks.flatten(0, 1), points, impl=impl).view(2, -1)  # [G, T*R]
    got = mask_cost(embedding, point_sample(features, points, impl=impl).flatten(0, 1), targets, impl=impl)
    stored = torch.einsum("qc,tchw->tqhw", embedding, features).double()
    grid = (2 * points.double() - 1).expand(3, -1, -1)[:, None]
    x = F.grid_sample(stored, grid, align_corners=False)[:, :, 0].transpose(0, 1).flatten(1)  # [Q, T*R]
    close(got, exact(x, torch.eye(90, device=DEVICE), targets))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_operator_is_registered_as_torch_wants_it(impl):
    for dtype in (torch.float32, torch.float16):
        torch.library.opcheck(torch.ops.tarvis.mask_cost.default, (*inputs((6,), 12, 40, 3, dtype), impl))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_without_graph_breaks(impl, dynamic):
    compiled = torch.compile(
        lambda *arguments: mask_cost(*arguments, impl=impl),
        fullgraph=True,
        dynamic=dynamic,
        backend="aot_eager",
    )
    for G in (3, 4):
        arguments = inputs((6,), 12, 300, G)
        close(compiled(*arguments), exact(*arguments))


def test_an_exported_program_holds_one_operator():
    class Cost(torch.nn.Module):
        def forward(self, *arguments):
            return mask_cost(*arguments)

    arguments = inputs((2, 3), 12, 40, 3)
    program = torch.export.export(Cost(), arguments)
    assert [n.target for n in program.graph.nodes if "tarvis" in str(n.target)] == [
        torch.ops.tarvis.mask_cost.default
    ]
    close(program.module()(*arguments), exact(*arguments))


@pytest.mark.parametrize("points", [7, 40, 1000])
def test_the_reference_takes_points_in_blocks_of_any_size(points, monkeypatch):
    module = importlib.import_module("kernels.mask_cost")
    monkeypatch.setattr(module, "_POINTS", {DEVICE: points})
    arguments = inputs((6,), 12, 40, 3)
    close(module.mask_cost_reference(*arguments), exact(*arguments))


def test_wrong_inputs_are_named():
    embedding, features, targets = inputs((6,), 12, 40, 3)
    for wrong in [
        (embedding[0], features, targets),
        (embedding[0, 0], features, targets),
        (embedding, features[0, 0], targets),
        (embedding, features[0], targets),
        (embedding, features[:, :4], targets),
        (embedding, features[:4], targets),
        (embedding, features, targets[0]),
    ]:
        with pytest.raises(ValueError, match=r"expected \[.., Q, C\], \[R, C\] and \[G, R\], got"):
            mask_cost(*wrong)
    for wrong in [(embedding.int(), features, targets), (embedding, features.long(), targets)]:
        with pytest.raises(ValueError, match=r"mask_cost: expected (embedding|features) in float"):
            mask_cost(*wrong)
    with pytest.raises(ValueError, match="no points"):
        mask_cost(embedding, features[:0], targets[:, :0])


def test_triton_raises_where_it_cannot_run():
    embedding, features, targets = inputs((6,), 12, 40, 3)
    with pytest.raises(RuntimeError, match="mask_cost: impl='triton' cannot run here"):
        mask_cost(embedding.double(), features, targets, impl="triton")
    with pytest.raises(RuntimeError, match="not float64"):
        mask_cost(embedding, features.double(), targets, impl="triton")
    with pytest.raises(RuntimeError, match="not in the CUDA extension"):
        mask_cost(embedding, features, targets, impl="cuda")
    many = torch.zeros(1, device=DEVICE).expand(1 << 26, 12), torch.zeros(1, device=DEVICE).expand(3, 1 << 26)
    with pytest.raises(RuntimeError, match=r"blocks of rows that span fewer than 2\^31"):
        mask_cost(embedding, *many, impl="triton")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason=NEEDS_GPU)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "C", "R", "G"), SHAPES[2:])
def test_inductor_launches_the_kernel(dtype, rows, C, R, G):
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: mask_cost(*x, impl="triton"), fullgraph=True)
    arguments = inputs(rows, C, R, G, dtype, scale=3)
    close(compiled(*arguments), exact(*arguments), dtype)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason=NEEDS_GPU)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_cuda_graph_replays_the_kernel(dtype):
    arguments = inputs((70,), 20, 150, 4, dtype)
    mask_cost(*arguments, impl="triton")  # compiles it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = mask_cost(*arguments, impl="triton")
    for old, new in zip(arguments, inputs((70,), 20, 150, 4, dtype, seed=1), strict=True):
        old.copy_(new)
    graph.replay()
    close(got, exact(*arguments), dtype)
