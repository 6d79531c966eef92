"""ms_deform_attn: the reference against grid_sample in float64, gradients, edges."""

import pytest
import torch
import torch.nn.functional as F

from kernels import ms_deform_attn
from kernels.ms_deform_attn import cell_centres

SHAPES = [(3, 5), (6, 10), (12, 20)]


def inputs(shapes=SHAPES, batch=2, queries=None, heads=2, dim=4, points=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cells = sum(h * w for h, w in shapes)
    queries = cells if queries is None else queries
    value = torch.randn(batch, cells, heads, dim, generator=generator, dtype=dtype)
    logit = torch.randn(batch, queries, heads, len(shapes), points, generator=generator, dtype=dtype)
    offset = 2.5 * torch.randn(*logit.shape, 2, generator=generator, dtype=dtype)
    return value, offset, logit


def by_grid_sample(value, offset, logit, shapes, ref):
    """The operator as Deformable DETR's own PyTorch form computes it."""
    B, S, A, D = value.shape
    Q, L, P = logit.shape[1], logit.shape[3], logit.shape[4]
    weight = logit.flatten(3).softmax(-1).view(B, Q, A, L, P)
    out, start = 0, 0
    for level, (h, w) in enumerate(shapes):
        centre = ref.expand(-1, -1, L, -1)[:, :, level].to(value.dtype)
        location = centre[:, :, None, None] + offset[:, :, :, level] / torch.tensor([w, h], dtype=value.dtype)
        grid = (2 * location - 1).transpose(1, 2).flatten(0, 1)  # [B*A, Q, P, 2]
        maps = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(B * A, D, h, w)
        sampled = F.grid_sample(maps, grid, align_corners=False)  # [B*A, D, Q, P]
        by_level = weight[:, :, :, level].transpose(1, 2).reshape(B * A, 1, Q, P)
        out = out + (sampled * by_level).sum(-1)
        start += h * w
    return out.view(B, A * D, Q).transpose(1, 2)


def test_equals_grid_sample_in_double_precision():
    value, offset, logit = inputs()
    expected = by_grid_sample(value, offset, logit, SHAPES, cell_centres(SHAPES, value.device))
    torch.testing.assert_close(ms_deform_attn(value, offset, logit, SHAPES), expected, atol=1e-6, rtol=1e-6)


def test_takes_reference_points_of_its_own_for_every_level_and_batch():
    value, offset, logit = inputs(queries=7)
    ref = torch.rand(2, 7, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = by_grid_sample(value, offset, logit, SHAPES, ref)
    torch.testing.assert_close(ms_deform_attn(value, offset, logit, SHAPES, ref), expected)


def test_gradients_equal_those_of_grid_sample():
    tensors = [x.requires_grad_() for x in inputs(queries=9)]
    ref = torch.rand(1, 9, 1, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = torch.autograd.grad(ms_deform_attn(*tensors, SHAPES, ref), tensors, grad)
    plain = torch.autograd.grad(by_grid_sample(*tensors, SHAPES, ref), tensors, grad)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    value, offset, logit = inputs([(3, 4), (2, 2)], batch=1, queries=2, heads=1, dim=2, points=2)
    tensors = [x.requires_grad_() for x in (value, offset, logit)]
    ref = torch.tensor([[[[0.31, 0.62]], [[0.77, 0.18]]]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: ms_deform_attn(*x, [(3, 4), (2, 2)], ref), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_keeps_coordinates_and_sums_in_single(dtype):
    value, offset, logit = inputs(dtype=dtype)
    exact = ms_deform_attn(value.double(), offset.double(), logit.double(), SHAPES)
    got = ms_deform_attn(value, offset, logit, SHAPES)
    assert got.dtype == dtype
    # the inputs are the same numbers: single precision inside, then the output is rounded
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), exact, atol=1e-5 + eps, rtol=eps)


def test_samples_outside_a_level_count_as_zero():
    value, offset, logit = inputs()
    assert not ms_deform_attn(value, offset + 1000, logit, SHAPES).any()


def test_offsets_that_are_not_finite_read_nothing_out_of_bounds():
    value, offset, logit = inputs()
    offset[0, 0] = float("nan")
    offset[0, 1] = float("inf")
    assert ms_deform_attn(value, offset, logit, SHAPES).isfinite()[1:].all()


def test_no_queries_give_an_empty_result():
    value, offset, logit = inputs(queries=0)
    assert ms_deform_attn(value, offset, logit, SHAPES, torch.zeros(1, 0, 1, 2)).shape == (2, 0, 8)


def test_shapes_that_do_not_fit_are_refused():
    value, offset, logit = inputs()
    with pytest.raises(ValueError, match="value has 315 cells"):
        ms_deform_attn(value, offset, logit, [*SHAPES[:2], (12, 21)])
    with pytest.raises(ValueError, match="expected offset"):
        ms_deform_attn(value, offset[..., :1, :], logit, SHAPES)
    with pytest.raises(ValueError, match="expected 315 queries, got 4"):
        ms_deform_attn(value, offset[:, :4], logit[:, :4], SHAPES)
