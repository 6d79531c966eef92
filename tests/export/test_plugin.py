"""What TensorRT's plugin launches is the operator, from shapes alone."""

import pytest
import torch

pytest.importorskip("triton")

from export.plugins import FLOATS
from export.plugins.launch import Launch
from kernels import ms_deform_attn
from kernels.dispatch import INTERPRETED

LEVELS = [(2, 3), (4, 6), (8, 12)]
SIZES = [side for level in LEVELS for side in level]
CELLS = sum(h * w for h, w in LEVELS)


def inputs(dtype, P=4, ref_shape=(1, 1), device="cpu"):
    """B = 2, Q = 70, A = 2, D = 16."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, CELLS, 2, 16, generator=generator).to(dtype)
    offset = (2 * torch.randn(2, 70, 2, 3, P, 2, generator=generator)).to(dtype)
    logit = torch.randn(2, 70, 2, 3, P, generator=generator).to(dtype)
    batch, levels = ref_shape
    ref = torch.rand(batch, 70, levels, 2, generator=generator)
    return [x.to(device) for x in (value, offset, logit, ref)]


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="Triton is not interpreted")
@pytest.mark.parametrize("ref_shape", [(1, 1), (2, 3)])
@pytest.mark.parametrize(("dtype", "P"), [(torch.float32, 3), (torch.float16, 4)])
def test_a_launch_made_of_shapes_is_the_operator(dtype, P, ref_shape):
    device = "cpu" if INTERPRETED else "cuda"
    value, offset, logit, ref = inputs(dtype, P, ref_shape, device)
    out = torch.empty(2, 70, 32, dtype=dtype, device=device)
    Launch.of(dtype, value.shape, logit.shape, ref.shape, SIZES)(value, offset, logit, ref, out)
    expected = ms_deform_attn(value, offset, logit, LEVELS, ref, impl="reference")
    torch.testing.assert_close(out, expected, atol=2e-3 if dtype == torch.float16 else 2e-5, rtol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", FLOATS)
def test_enqueue_launches_on_a_stream_it_is_given_and_is_captured(kind):
    from export.plugins.msda import enqueue

    dtype = getattr(torch, kind)
    tensors = inputs(dtype, device="cuda")
    out = torch.zeros(2, 70, 32, dtype=dtype, device="cuda")
    stream = torch.cuda.Stream()
    shapes = [tuple(x.shape) for x in tensors]
    addresses = [x.data_ptr() for x in (*tensors, out)]

    def run():
        enqueue(kind, shapes, tuple(SIZES), addresses, stream.cuda_stream)

    stream.wait_stream(torch.cuda.current_stream())
    run()
    torch.cuda.synchronize()
    expected = ms_deform_attn(*tensors[:3], LEVELS, tensors[3], impl="triton")
    torch.testing.assert_close(out, expected, atol=0, rtol=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("value", "logit", "sizes"),
    [
        ((2, CELLS, 2, 16), (2, 70, 2, 3, 4), SIZES[:4]),
        ((2, CELLS + 1, 2, 16), (2, 70, 2, 3, 4), SIZES),
        ((2, CELLS, 2, 16), (2, 70, 4, 3, 4), SIZES),
        ((2, CELLS, 2, 24), (2, 70, 2, 3, 4), SIZES),
        ((2, CELLS, 2, 16), (2, 70, 2, 3, 11), SIZES),
    ],
)
def test_shapes_that_the_kernel_does_not_take_are_refused(value, logit, sizes):
    with pytest.raises(ValueError, match=r"do not fit|the kernel takes no"):
        Launch.of(torch.float16, value, logit, (1, 70, 1, 2), sizes)


class Dimension:
    """As `tensorrt.plugin` has them: `constant_value` is a method."""

    def __init__(self, size):
        self.size = size

    is_constant = property(lambda self: self.size is not None)

    def constant_value(self):
        assert self.is_constant
        return self.size

    def __mul__(self, n):
        return f"frames * {n}"


def test_the_kernel_ahead_of_time_is_launched_for_a_number_of_frames_not_yet_known(monkeypatch):
    from types import SimpleNamespace

    from export.plugins import aot

    made = {}

    def keep(name):
        return lambda _: lambda function: made.setdefault(name, function)

    names = ("TensorDesc", "AutoTuneCombination", "SymExprs")
    types = {name: type(name, (), {}) for name in names}
    qdp = SimpleNamespace(
        **types,
        register=keep("shapes"),
        autotune=keep("types"),
        aot_impl=keep("code"),
        KernelLaunchParams=SimpleNamespace,
        SymIntExprs=lambda n: [None] * n,
        SymInt32=lambda n: n,
    )
    kernel = SimpleNamespace(name="kernel", text="ptx", parameters=("Q", "h0", "ref_b"), threads=64, shared=9)
    monkeypatch.setattr("export.plugins.ptx.compile_ptx", lambda *_: kernel)
    aot._describe(SimpleNamespace(float32="f", float16="h", bfloat16="b"), qdp)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    def tensor(*sizes):
        return SimpleNamespace(dtype="h", shape_expr=[Dimension(size) for size in sizes])

    value, logit, ref = tensor(None, CELLS, 2, 16), tensor(None, 70, 2, 3, 4), tensor(1, 70, 1, 2)
    name, text, launch, extra = made["code"](value, None, logit, ref, SIZES, (None,), 0)
    expected = Launch.of(torch.float16, (1, CELLS, 2, 16), (1, 70, 2, 3, 4), (1, 70, 1, 2), SIZES)
    assert (name, text, launch.grid_x) == ("kernel", "ptx", f"frames * {expected.grid[0]}")
    assert (launch.block_x, launch.shared_mem) == (64, 9)
    assert extra == [70, 2, 0]
