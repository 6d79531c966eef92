"""The CUDA extension: its arithmetic, emulated on the CPU where there is no GPU, its machine code, its build.

The emulation compiles the very sources with g++ (`cuda_on_cpu`), with checks for undefined behaviour such as
misaligned vectors, and registers the very binding for CPU tensors.
"""

import importlib.util
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import _cuda, build, dispatch
from kernels.mask_bits import unpack_bits
from kernels.ms_deform_attn import cell_centres, ms_deform_attn_reference
from kernels.taps import axis_taps

HERE = Path(__file__).parent
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def emulation(folder):
    """The library for CPU tensors."""
    torch_dir = Path(torch.__file__).parent
    flags = [
        "-std=c++20", "-O1", "-fPIC", "-fsanitize=undefined", "-fno-sanitize-recover=all", "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{HERE / 'cuda_on_cpu'}",
        f"-I{torch_dir / 'include'}", f"-I{build.SOURCES}",
    ]  # fmt: skip
    sources = [*sorted(build.SOURCES.glob("*.cu")), HERE / "cuda_on_cpu" / "binding_on_cpu.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    running = [
        subprocess.Popen(
            ["g++", *flags, "-x", "c++", "-c", source, "-o", made], stderr=subprocess.PIPE, text=True
        )
        for source, made in zip(sources, objects, strict=True)
    ]
    for process in running:
        message = process.communicate()[1]
        assert process.returncode == 0, message
    library = folder / "emulation.so"
    link = [
        "-shared",
        "-fsanitize=undefined",
        "-Wl,-Bsymbolic",
        f"-L{torch_dir / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
    ]
    subprocess.run(["g++", *objects, *link, "-o", library], check=True)
    return library


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("g++, which compiles the emulation, was not found")
    if not sys.platform.startswith("linux"):
        pytest.skip("the emulation needs Linux")
    return emulation(tmp_path_factory.mktemp("cuda_on_cpu"))


MODES = ["emulated"] if DEVICE == "cpu" else [pytest.param("native", marks=pytest.mark.gpu)]


@pytest.fixture(scope="session", params=MODES)
def cuda(request):
    """The operators, on `DEVICE`."""
    if request.param == "native":
        if build.missing():
            pytest.skip(build.missing())
    else:
        _cuda.load(request.getfixturevalue("emulated"))
    return _cuda


@pytest.fixture
def chosen(cuda, monkeypatch):  # noqa: ARG001
    """impl="cuda" works on `DEVICE`."""
    monkeypatch.setattr(dispatch, "cuda_missing", lambda _: "")


def randn(*shape, seed, dtype=F32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


CASES = {
    "encoder": {"shapes": [(3, 5), (6, 10)], "batch": 2, "heads": 2, "dim": 16, "points": 3},
    "one level": {"shapes": [(4, 7)], "queries": 5, "heads": 3, "dim": 32, "points": 4, "ref": (1, 1)},
    "decoder": {
        "shapes": [(1, 1), (2, 3), (5, 4), (7, 6)],
        "batch": 2, "queries": 9, "heads": 1, "dim": 64, "points": 8, "ref": (2, 4),
    },
    "classic": {
        "shapes": [(5, 3), (2, 6)], "queries": 11, "heads": 2, "dim": 32, "points": 2, "classic": True,
    },
}  # fmt: skip
DTYPES = [(F32, F32), (F16, F16), (BF16, BF16), (BF16, F32), (F16, BF16), (F32, F16)]  # of values, of offsets


class Attention:
    """Inputs of one case, and what the reference makes of them in double precision."""

    def __init__(
        self, shapes, heads, dim, points, batch=1, queries=None, ref=None, classic=False, dtypes=(F32, F32)
    ):
        cells = sum(h * w for h, w in shapes)
        queries = cells if queries is None else queries
        levels = len(shapes)
        self.shapes, self.classic = shapes, classic
        self.value = randn(batch, cells, heads, dim, seed=1, dtype=dtypes[0])
        self.logit = randn(batch, queries, heads, levels, points, seed=2, dtype=dtypes[1])
        self.offset = 2.5 * randn(*self.logit.shape, 2, seed=3, dtype=dtypes[1])
        if classic:
            self.offset = self.offset / 5 + 0.5
        self.ref = None
        if ref is not None:
            self.ref = randn(ref[0], queries, ref[1], 2, seed=4).sigmoid()
        self.grad = randn(batch, queries, heads * dim, seed=5, dtype=dtypes[0])

    @property
    def flat(self):
        return [side for shape in self.shapes for side in shape]

    def exact(self):
        """Output and gradients of value, offset and logit."""
        ref = self.ref
        if ref is None and not self.classic:
            ref = cell_centres(self.shapes, self.value.device)
        inputs = [x.detach().double().requires_grad_() for x in (self.value, self.offset, self.logit)]
        out = ms_deform_attn_reference(*inputs, self.shapes, ref, self.classic)
        return out.detach(), *torch.autograd.grad(out, inputs, self.grad.double())

    def smooth(self):
        """Where offsets have one derivative: away from the lines through the cells' centres."""
        sizes = torch.tensor([(w, h) for h, w in self.shapes], device=DEVICE)[:, None].double()  # [L, 1, 2]
        if self.classic:
            place = self.offset.double() * sizes - 0.5
        else:
            ref = cell_centres(self.shapes, self.value.device) if self.ref is None else self.ref
            ref = ref.double()[:, :, None, :, None]  # [B or 1, Q, 1, L or 1, 1, 2]
            place = self.offset.double() + ref * sizes - 0.5
        near = ((place - place.round()).abs() < 1e-4).any(
            -1, keepdim=True
        )  # x bends the derivative in y, too
        return ~near.expand_as(place)


def assert_close(got, exact, dtype, where=None):
    """Single precision inside, then one rounding."""
    assert got.dtype == dtype
    assert got.shape == exact.shape
    scale = exact.abs().max().item() if exact.numel() else 0.0
    got, exact = (got.double(), exact) if where is None else (got.double()[where], exact[where])
    torch.testing.assert_close(got, exact, atol=2e-6 * max(scale, 1), rtol=1e-5 + torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_attention_and_its_gradients_equal_the_reference(cuda, case, dtypes):
    x = Attention(**CASES[case], dtypes=dtypes)
    inputs = (x.value, x.offset, x.logit, x.ref, x.flat, x.classic)
    out, *grads = x.exact()
    assert_close(cuda.ms_deform_attn(*inputs), out, dtypes[0])
    for deterministic in (False, True):
        got = cuda.ms_deform_attn_backward(x.grad, *inputs, deterministic)
        for g, exact, dtype, where in zip(
            got, grads, (*dtypes, dtypes[1]), (None, x.smooth(), None), strict=True
        ):
            assert_close(g, exact, dtype, where)


def test_slices_of_one_product_are_read_in_place(cuda, monkeypatch):
    x = Attention(**CASES["encoder"])
    B, S, A, D = x.value.shape
    product = torch.cat([t.flatten(2) for t in (x.value, x.offset, x.logit)], 2)
    value, offset, logit = product.split([A * D, A * 2 * 3 * 2, A * 2 * 3], 2)
    views = value.view(x.value.shape), offset.view(x.offset.shape), logit.view(x.logit.shape)
    expected = cuda.ms_deform_attn(x.value, x.offset, x.logit, None, x.flat, False)
    monkeypatch.setattr(torch.Tensor, "clone", None)
    assert torch.equal(cuda.ms_deform_attn(*views, None, x.flat, False), expected)


def test_layouts_that_kernels_cannot_read_are_copied(cuda):
    x = Attention(**CASES["decoder"], dtypes=(BF16, BF16))
    plain = (x.value, x.offset, x.logit, x.ref, x.flat, False)
    odd = [torch.stack((t, t), -1)[..., 0] for t in (x.value, x.offset, x.logit)]
    shifted = [F.pad(t.flatten(), (1, 0))[1:].view(t.shape) for t in (x.value, x.offset, x.logit, x.grad)]
    ref = x.ref.transpose(1, 3).contiguous().transpose(1, 3)
    assert torch.equal(cuda.ms_deform_attn(*odd, ref, x.flat, False), cuda.ms_deform_attn(*plain))
    got = cuda.ms_deform_attn_backward(shifted[3], *shifted[:3], ref, x.flat, False, True)
    for a, b in zip(got, cuda.ms_deform_attn_backward(x.grad, *plain, True), strict=True):
        assert torch.equal(a, b)


def test_deterministic_gradients_are_equal_bit_by_bit_where_atomics_are_not(cuda):
    x = Attention([(2, 3), (4, 4)], batch=2, heads=4, dim=32, points=4, queries=None)
    inputs = (x.grad, x.value, x.offset, x.logit, None, x.flat, False)
    once, again = (cuda.ms_deform_attn_backward(*inputs, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    if DEVICE == "cpu":  # the emulation turns the order round; a GPU only may
        once, again = (cuda.ms_deform_attn_backward(*inputs, False)[0] for _ in range(2))
        assert not torch.equal(once, again)


def test_places_that_are_not_finite_or_far_outside_read_nothing(cuda):
    x = Attention(**CASES["encoder"])
    for i, place in enumerate((float("nan"), float("inf"), -float("inf"), 1e30, -1e30)):
        x.offset[0, i] = place
    inputs = (x.value, x.offset, x.logit, None, x.flat, False)
    assert not cuda.ms_deform_attn(*inputs)[0, :5].any()
    assert cuda.ms_deform_attn(*inputs).isfinite().all()
    for deterministic in (False, True):
        grads = cuda.ms_deform_attn_backward(x.grad, *inputs, deterministic)
        assert all(g.isfinite().all() for g in grads)
        assert not any(g[0, :5].any() for g in grads[1:])


def test_derivatives_at_the_borders_equal_the_reference(cuda):
    """One exactly on each line around a level; the last is where a sample begins to see nothing."""
    x = Attention([(3, 4)], heads=1, dim=16, points=1, queries=7, classic=True)
    places = torch.tensor([-1, 0, 1, 2, 2.5, 3, 4], device=DEVICE)
    x.offset[0, :, 0, 0, 0] = torch.stack(((places + 0.5) / 4, torch.full_like(places, 0.5)), 1)
    got = cuda.ms_deform_attn_backward(x.grad, x.value, x.offset, x.logit, None, x.flat, True, True)
    for g, exact in zip(got, x.exact()[1:], strict=True):
        assert_close(g, exact, F32)


def test_nothing_in_gives_nothing_out(cuda):
    x = Attention([(2, 2)], heads=2, dim=16, points=2, queries=0, ref=(1, 1))
    inputs = (x.value, x.offset, x.logit, x.ref, x.flat, False)
    assert cuda.ms_deform_attn(*inputs).shape == (1, 0, 32)
    for deterministic in (False, True):
        grads = cuda.ms_deform_attn_backward(x.grad, *inputs, deterministic)
        assert [g.shape for g in grads] == [x.value.shape, x.offset.shape, x.logit.shape]
        assert not grads[0].any()
    empty = [t[:0] for t in (x.value, x.offset, x.logit)]
    assert cuda.ms_deform_attn(*empty, x.ref, x.flat, False).shape == (0, 0, 32)


@pytest.mark.parametrize("deterministic", [False, True])
def test_batches_beyond_a_grid_run_in_parts(cuda, monkeypatch, deterministic):
    x = Attention([(2, 3)], batch=5, heads=2, dim=16, points=2, ref=(1, 1))
    inputs = (x.value, x.offset, x.logit, x.ref, x.flat, False)
    out, *grads = x.exact()
    monkeypatch.setattr(_cuda, "_MOST_ENTRIES", 2)
    assert_close(cuda.ms_deform_attn(*inputs), out, F32)
    got = cuda.ms_deform_attn_backward(x.grad, *inputs, deterministic)
    for g, exact, where in zip(got, grads, (None, x.smooth(), None), strict=True):
        assert_close(g, exact, F32, where)
    monkeypatch.setattr(_cuda, "_MOST_QUERIES", 2)
    query, features = randn(5, 3, 4, seed=1), randn(5, 4, 33, seed=2)
    bits, seen = cuda.mask_bits(query, features)
    assert torch.equal(seen, unpack_bits(bits, 33).any(-1))
    assert torch.equal(unpack_bits(bits, 33), query @ features >= 0)


def test_more_samples_than_one_sort_numbers_are_sorted_in_parts(cuda, monkeypatch):
    x = Attention([(2, 3)], batch=5, heads=2, dim=16, points=2, ref=(1, 1))
    inputs = (x.grad, x.value, x.offset, x.logit, x.ref, x.flat, False, True)
    whole = cuda.ms_deform_attn_backward(*inputs)
    assert _cuda._sortable(x.logit, x.flat) == 65535
    monkeypatch.setattr(_cuda, "_LIMIT", 2 * 2 * 12 + 1)  # 12 bins, fewer samples
    assert _cuda._sortable(x.logit, x.flat) == 2
    for a, b in zip(cuda.ms_deform_attn_backward(*inputs), whole, strict=True):
        assert torch.equal(a, b)


def test_sizes_that_32_bits_cannot_count_are_refused(cuda):
    one = torch.zeros(1, device=DEVICE)
    value, logit = one.expand(1, 1, 1, 16), one.expand(1, 2**27, 1, 4, 4)
    with pytest.raises(ValueError, match="samples of one batch entry are more than"):
        cuda.ms_deform_attn(value, one.expand(*logit.shape, 2), logit, None, [1, 1] * 4, False)
    arguments = (one.expand(1, 1, 8), one.expand(1, 8, 2**31), one.int(), one.byte())
    with pytest.raises(RuntimeError, match="a size of 2147483648 is more than the kernels can count"):
        torch.ops.tarvis_cuda.mask_bits(*arguments)


def test_tensors_on_several_devices_are_refused(cuda):  # noqa: ARG001
    query, features = torch.ones(1, 2, 8, device=DEVICE), torch.ones(1, 8, 32)
    words, seen = query.new_empty(1, 2, 1, dtype=torch.int32), query.new_zeros(1, 2, dtype=torch.uint8)
    run = torch.ops.tarvis_cuda.mask_bits
    if DEVICE == "cpu":
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        run, features = (lambda *x, op=run.default: op.redispatch(keys, *x)), features.to("meta")
    with pytest.raises(RuntimeError, match="features is not on the device of query"):
        run(query, features, words, seen)


def test_memory_that_begins_anywhere_is_copied(cuda):
    x = Attention(**CASES["one level"])
    shifted = []
    for t in (x.value, x.offset, x.logit, x.grad):
        memory = torch.zeros(t.numel() + 8, device=DEVICE)
        shift = (4 - memory.data_ptr() // 4) % 4 + 1
        memory[shift : shift + t.numel()] = t.flatten()
        if DEVICE == "cpu":  # from elsewhere: what begins at an odd address has no offset into its storage
            shifted.append(torch.from_numpy(memory.numpy()[shift : shift + t.numel()]).view(t.shape))
            assert shifted[-1].storage_offset() == 0
        else:
            shifted.append(memory[shift : shift + t.numel()].view(t.shape))
        assert shifted[-1].data_ptr() % 16 == 4
    *inputs, grad = shifted
    plain = (x.value, x.offset, x.logit, x.ref, x.flat, False)
    other = (*inputs, x.ref, x.flat, False)
    assert torch.equal(cuda.ms_deform_attn(*other), cuda.ms_deform_attn(*plain))
    got = cuda.ms_deform_attn_backward(grad, *other, True)
    for a, b in zip(got, cuda.ms_deform_attn_backward(x.grad, *plain, True), strict=True):
        assert torch.equal(a, b)
    ref = x.ref.expand(1, x.ref.shape[1], 1, 2)
    with pytest.raises(RuntimeError, match="value does not begin at a multiple of 16 bytes"):
        torch.ops.tarvis_cuda.ms_deform_attn(*inputs, ref, x.flat, False, torch.empty_like(x.grad))


def load(name, folders):
    path = next(folder / f"{name}.py" for folder in folders if (folder / f"{name}.py").exists())
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # make_inputs imports fill_weights by its plain name
    spec.loader.exec_module(module)
    return module


def test_tensors_of_the_original_model_are_met(cuda, pytestconfig):
    """In classic form, which is what was recorded."""
    goldens = pytestconfig.getoption("goldens")
    cases = sorted(goldens.glob("deform_attn_op_*.json"))
    if not cases:
        pytest.skip(f"no deform_attn_op_* in {goldens}")
    folders = (goldens, HERE.parent / "parity")
    load("fill_weights", folders)
    make_inputs = load("make_inputs", folders)
    for path in cases:
        inputs = json.loads(path.read_text())["inputs"]
        names = ("shapes", "batch", "queries", "heads", "head_dim", "n_points", "seed", "spread")
        arrays = make_inputs.deform_attn_inputs(*(inputs[name] for name in names))
        value, locations, weights, grad = (torch.from_numpy(a).float().to(DEVICE) for a in arrays)
        flat = [side for shape in inputs["shapes"] for side in shape]
        recorded = {
            name: torch.from_numpy(a).to(DEVICE) for name, a in np.load(path.with_suffix(".npz")).items()
        }
        out = cuda.ms_deform_attn(value, locations, weights, None, flat, True)
        assert_close(out, recorded["output"], F32)
        for deterministic in (False, True):
            got = cuda.ms_deform_attn_backward(
                grad, value, locations, weights, None, flat, True, deterministic
            )
            for name, g in zip(("grad_value", "grad_locations", "grad_weights"), got, strict=True):
                assert_close(g, recorded[name], F32)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_attention_of_training_size_equals_the_reference(cuda, dtype):
    x = Attention([(16, 28), (32, 56), (64, 112)], batch=3, heads=8, dim=32, points=4, dtypes=(dtype, dtype))
    inputs = (x.value, x.offset, x.logit, None, x.flat, False)
    out, *grads = x.exact()
    assert_close(cuda.ms_deform_attn(*inputs), out, dtype)
    got = [cuda.ms_deform_attn_backward(x.grad, *inputs, deterministic) for deterministic in (False, True)]
    for result in got:
        for g, exact, where in zip(result, grads, (None, x.smooth(), None), strict=True):
            assert_close(g, exact, dtype, where)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_decide_on_which_gpu_kernels_run(cuda):
    x = Attention(**CASES["encoder"])
    inputs = (x.value, x.offset, x.logit)
    expected = cuda.ms_deform_attn(*inputs, None, x.flat, False)
    with torch.cuda.device(0):
        got = cuda.ms_deform_attn(*(t.to("cuda:1") for t in inputs), None, x.flat, False)
        assert got.device == torch.device("cuda:1")
        assert torch.equal(got.cpu(), expected.cpu())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_kernels_run_on_the_current_stream(cuda):
    x = Attention(**CASES["encoder"])
    value, offset, logit = x.value, x.offset, x.logit
    expected = cuda.ms_deform_attn(value, offset, logit, None, x.flat, False)
    late, stream = torch.zeros_like(value), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a kernel on another stream would read zeros
        late.copy_(value)
        got = cuda.ms_deform_attn(late, offset, logit, None, x.flat, False)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_the_forward_pass_can_be_captured_in_a_cuda_graph(cuda):
    x = Attention(**CASES["encoder"])
    value = torch.zeros_like(x.value)
    expected = cuda.ms_deform_attn(x.value, x.offset, x.logit, None, x.flat, False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda.ms_deform_attn(value, x.offset, x.logit, None, x.flat, False)
    value.copy_(x.value)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_batches_of_more_than_2_31_values_and_65535_entries_are_addressed(cuda):
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    x = Attention([(2, 3)], batch=2, heads=2, dim=16, points=2, ref=(1, 1), dtypes=(BF16, BF16))
    torch.utils.deterministic.fill_uninitialized_memory = False
    step = 2**31 + 64
    far = torch.empty(step + x.value[0].numel(), dtype=BF16, device=DEVICE)
    far = far.as_strided(x.value.shape, (step, *x.value.stride()[1:])).copy_(x.value)
    inputs = (x.offset, x.logit, x.ref, x.flat, False)
    expected = cuda.ms_deform_attn(x.value, *inputs)
    assert torch.equal(cuda.ms_deform_attn(far, *inputs), expected)
    many = [t.repeat(33_000, *[1] * (t.ndim - 1)) for t in (x.value, x.offset, x.logit)]
    out = cuda.ms_deform_attn(*many, *inputs[2:])
    assert torch.equal(out, expected.repeat(33_000, 1, 1))


@pytest.mark.parametrize(
    ("batch", "queries", "channels", "keys"), [(2, 70, 40, 150), (1, 1, 1, 1), (1, 5, 16, 128)]
)
@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F16), (BF16, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_bits_are_the_signs_of_the_product(cuda, batch, queries, channels, keys, dtypes, channels_last):
    query = randn(batch, queries, channels, seed=1, dtype=dtypes[0])
    features = randn(batch, channels, keys, seed=2, dtype=dtypes[1])
    if channels_last:
        features = features.transpose(1, 2).contiguous().transpose(1, 2)
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
    query[0, 0] = 0  # a logit of zero is visible
    exact = query.double() @ features.double()
    bits, seen = cuda.mask_bits(query, features)
    assert bits.shape == (batch, queries, 4 * -(-keys // 32))
    assert bits.dtype == torch.uint8
    got = unpack_bits(bits, 8 * bits.shape[2])
    assert not got[..., keys:].any()
    got = got[..., :keys]
    clear = (exact.abs() > 1e-5) | (exact == 0)
    assert torch.equal(got[clear], (exact >= 0)[clear])
    assert torch.equal(seen, got.any(-1))


def test_queries_that_see_nothing_say_so(cuda):
    query, features = -torch.ones(1, 3, 4, device=DEVICE), torch.ones(1, 4, 33, device=DEVICE)
    query[0, 1] = 1
    bits, seen = cuda.mask_bits(query, features)
    assert seen.tolist() == [[False, True, False]]
    assert bits[0, 1].tolist() == [255] * 4 + [1, 0, 0, 0]
    features[:] = float("nan")
    assert not cuda.mask_bits(query, features)[1].any()


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0)])
def test_no_queries_or_no_keys_give_no_bits(cuda, queries, keys):
    bits, seen = cuda.mask_bits(
        torch.ones(2, queries, 3, device=DEVICE), torch.ones(2, 3, keys, device=DEVICE)
    )
    assert bits.shape == (2, queries, 4 * -(-keys // 32))
    assert not seen.any()


def test_bits_of_float64_are_refused_rather_than_rounded(cuda):
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        cuda.mask_bits(torch.ones(1, 1, 4, device=DEVICE), torch.ones(1, 4, 8, device=DEVICE).double())


UPSAMPLINGS = [  # (h, w), network, size
    ((5, 9), (19, 33), (40, 70)),
    ((6, 4), (24, 16), (9, 130)),  # smaller in one axis than the network
    ((1, 2), (3, 8), (7, 5)),  # fewer inputs than taps
    ((3, 3), (12, 12), (12, 12)),
]


def upsampled(logits, network, size):
    """The two steps in double precision."""
    wide = F.interpolate(logits.double(), scale_factor=4, mode="bilinear", align_corners=False)
    return F.interpolate(wide[..., : network[0], : network[1]], size, mode="bilinear", align_corners=False)


def taps(logits, network, size):
    axes = zip(logits.shape[2:], network, size, strict=True)
    return [table for axis in axes for table in axis_taps(*axis, logits.device)]


@pytest.mark.parametrize(("quarter", "network", "size"), UPSAMPLINGS)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_masks_are_where_upsampled_logits_are_positive(cuda, quarter, network, size, dtype):
    logits = randn(3, 2, *quarter, seed=1, dtype=dtype)
    exact = upsampled(logits, network, size)
    clear = exact.abs() > 1e-5
    masks = cuda.mask_upsample(logits, *taps(logits, network, size), False)
    assert masks.dtype == torch.bool
    assert torch.equal(masks[clear], (exact > 0)[clear])
    packed = cuda.mask_upsample(logits, *taps(logits, network, size), True)
    assert packed.shape == (3, 2, size[0], 4 * -(-size[1] // 32))
    bits = unpack_bits(packed, 8 * packed.shape[3])
    assert torch.equal(bits[..., : size[1]], masks)
    assert not bits[..., size[1] :].any()


@pytest.mark.parametrize(("quarter", "network", "size"), UPSAMPLINGS)
@pytest.mark.parametrize("maps", [1, 5, 300])
@pytest.mark.parametrize("background", [False, True])
def test_labels_are_the_largest_of_upsampled_logits(cuda, quarter, network, size, maps, background):
    frames = 1 if maps == 300 else 2
    logits = randn(maps, frames, *quarter, seed=1).permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    labels = cuda.label_upsample(logits, *taps(logits, network, size), background)
    assert labels.dtype == (torch.uint8 if maps + background <= 256 else torch.int16)
    exact = upsampled(logits, network, size)  # [K, T, H, W]
    if background:
        exact = torch.cat((torch.zeros_like(exact[:1]), exact))
    best = exact.topk(min(2, len(exact)), 0).values
    clear = best[0] - best[-1] > 1e-5 if len(best) == 2 else torch.ones_like(best[0], dtype=torch.bool)
    assert torch.equal(labels[clear].long(), exact.argmax(0)[clear])


def test_taps_before_the_first_input_are_not_read(cuda):
    """One zero tap earlier in every table, the same sums."""
    logits = randn(2, 1, 4, 5, seed=1)
    plain = taps(logits, (16, 20), (23, 30))
    early = [t.clone() for t in plain]
    for start, weight in (early[:2], early[2:]):
        free = weight[:, 2] == 0
        assert (free & (start == 0)).any()
        start[free] -= 1
        weight[free] = F.pad(weight[free], (1, 0))[:, :3]
    for run in (cuda.mask_upsample, cuda.label_upsample):
        assert torch.equal(run(logits, *early, False), run(logits, *plain, False))


def test_the_first_of_equal_maps_gives_the_label(cuda):
    logits = randn(1, 1, 4, 4, seed=1).expand(3, -1, -1, -1)
    assert not cuda.label_upsample(logits, *taps(logits, (16, 16), (20, 20)), False).any()
    nothing = logits.new_zeros(2, 1, 4, 4)  # not positive
    assert not cuda.label_upsample(nothing, *taps(nothing, (16, 16), (20, 20)), True).any()


def test_operators_do_what_their_schemas_and_fakes_say(cuda):
    x = Attention(**CASES["one level"])
    Q, samples = x.logit.shape[1], x.logit.numel()
    bins = 3 * 5 * 8  # of three heads
    attention = (x.value, x.offset, x.logit, x.ref.expand(1, Q, 1, 2), x.flat, False)
    grads = (torch.zeros_like(x.offset), torch.zeros_like(x.logit), torch.zeros_like(x.value))
    ints = {"dtype": torch.int32, "device": DEVICE}
    order, first = torch.zeros(samples, device=DEVICE, dtype=torch.int64), torch.zeros(bins + 1, **ints)
    weight = x.value.new_zeros(samples, 4)
    logits = randn(2, 1, 3, 4, seed=1)
    axes = taps(logits, (12, 16), (20, 21))
    seen, words = torch.zeros(1, 6, device=DEVICE, dtype=torch.uint8), torch.zeros(1, 6, 2, **ints)
    pixels = torch.zeros(2, 1, 20, 21, device=DEVICE, dtype=torch.uint8)
    calls = {
        "ms_deform_attn": (*attention, torch.zeros_like(x.grad)),
        "ms_deform_attn_backward": (x.grad, *attention, *grads, None, None),
        "ms_deform_attn_gather": (x.grad, x.value, x.logit, x.flat, order, first, weight, grads[2]),
        "mask_bits": (randn(1, 6, 8, seed=1), randn(1, 8, 40, seed=2), words, seen),
        "mask_upsample": (logits, *axes, False, pixels),
        "label_upsample": (logits, *axes, False, pixels[0]),
    }
    for name, arguments in calls.items():
        operator = getattr(torch.ops.tarvis_cuda, name).default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema",))
    for operator, arguments in (
        (cuda.ms_deform_attn, attention),
        (cuda.ms_deform_attn_backward, (x.grad, *attention, True)),
        (cuda.mask_bits, calls["mask_bits"][:2]),
        (cuda.mask_upsample, (logits, *axes, False)),
        (cuda.mask_upsample, (logits, *axes, True)),
        (cuda.label_upsample, (logits, *axes, True)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_contract_of_attention_runs_and_differentiates_it(deterministic):
    x = Attention(**CASES["one level"])
    results = []
    for impl in ("cuda", "reference"):
        inputs = [t.clone().requires_grad_() for t in (x.value, x.offset, x.logit, x.ref)]
        out = kernels.ms_deform_attn(*inputs[:3], x.shapes, inputs[3], impl=impl, deterministic=deterministic)
        results.append((out, *torch.autograd.grad(out, inputs, x.grad)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("chosen")
def test_the_contracts_of_masks_run_them():
    query, features, logits = randn(1, 4, 8, seed=1), randn(1, 8, 40, seed=2), randn(3, 2, 5, 6, seed=3)
    size = ((20, 22), (31, 47))
    for run in (
        lambda impl: kernels.mask_bits(query, features, impl=impl),
        lambda impl: (kernels.mask_upsample(logits, *size, impl=impl),),
        lambda impl: (kernels.mask_upsample(logits, *size, packed=True, impl=impl),),
        lambda impl: (kernels.label_upsample(logits, *size, impl=impl),),
        lambda impl: (kernels.label_upsample(logits, *size, background=True, impl=impl),),
    ):
        for got, expected in zip(run("cuda"), run("reference"), strict=True):
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected)


SEEN_THROUGH = """
import sys
from pathlib import Path
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
import kernels
from kernels import _cuda, dispatch

device, library = sys.argv[1:]
if library:
    _cuda.load(Path(library))
    dispatch.cuda_missing = lambda _: ""
graphs = []


def keep(graph, _):
    graphs.append(graph.code)
    return make_boxed_func(graph.forward)


@torch.compile(fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
def run(value, offset, logit, ref):
    return kernels.ms_deform_attn(value, offset, logit, [(3, 4)], ref, impl="cuda")


torch.manual_seed(0)
shapes = (1, 12, 2, 16), (1, 5, 2, 1, 4, 2), (1, 5, 2, 1, 4), (1, 5, 1, 2)
inputs = [torch.rand(shape, device=device, requires_grad=True) for shape in shapes]
out = run(*inputs)
grads = torch.autograd.grad(out.sum(), inputs[:3])
plain = kernels.ms_deform_attn(*inputs[:3], [(3, 4)], inputs[3], impl="reference")
torch.testing.assert_close(out, plain)
for got, expected in zip(grads, torch.autograd.grad(plain.sum(), inputs[:3])):
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
assert "ops.tarvis.ms_deform_attn_cuda" in graphs[0], graphs[0]
assert "ops.tarvis.ms_deform_attn_backward" in graphs[1], graphs[1]
"""


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="torch.compile looks into operators where Triton is")
def test_torch_compile_sees_through_to_the_operators_of_the_extension(cuda, request):  # noqa: ARG001
    """In a process of its own: where Triton is interpreted, as it is here, operators are opaque."""
    library = request.getfixturevalue("emulated") if DEVICE == "cpu" else ""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SEEN_THROUGH, DEVICE, str(library)],
        env=environment, cwd=HERE.parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


CEILING = {
    "forward": 80,
    "backward": 96,
    "gather": 48,
    "mask_bits": 128,
    "mask_upsample": 40,
    "label_upsample": 40,
}


@pytest.mark.slow
@pytest.mark.skipif(build.nvcc() is None, reason="nvcc was not found")
def test_all_compiles_for_every_architecture_without_spills():
    """The binding, too, against the installed PyTorch."""
    rows = build.usage(build.check())
    assert {row["arch"] for row in rows} == set(build.ARCHITECTURES)
    assert len(rows) == len(build.ARCHITECTURES) * (5 + 5 + 4 * 3)  # mixed dtypes in attention; else one each
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["registers"] <= CEILING[row["kernel"].split("[")[0]], row


NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit;;
  --list-gpu-arch) printf 'compute_%s\\n' 75 80 86 87 89 90 100 120; exit;;
esac
for last; do :; done
sleep 0.2
echo "$@" > "$last"
"""


@pytest.fixture
def toolkit(monkeypatch, tmp_path, forgetful):  # noqa: ARG001
    """A PyTorch for CUDA with one GPU, and an nvcc that writes what it was called with."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    compiler = home / "bin" / "nvcc"
    compiler.write_text(NVCC)
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(build, "_capabilities", lambda: ["89"])
    return compiler


@pytest.fixture
def forgetful():
    """What this machine has is found out anew."""
    found_out = (build.missing, build._library, build._about, build._stem)
    for once in found_out:
        once.cache_clear()
    yield
    for once in found_out:
        once.cache_clear()


@pytest.fixture
def no_nvcc(monkeypatch):
    monkeypatch.setattr(build, "nvcc", lambda: None)


def test_cuda_home_comes_before_the_path(toolkit):
    assert build.nvcc() == str(toolkit)


def test_a_library_is_compiled_once_by_however_many(toolkit, tmp_path):
    assert build.missing() == ""
    calls = tmp_path / "calls"
    toolkit.write_text(NVCC + f"echo called >> {calls}\n")
    libraries = []
    threads = [threading.Thread(target=lambda: libraries.append(build.build(["89", "80"]))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls.read_text().split() == ["called"]
    assert len(set(libraries)) == 1
    command = libraries[0].read_text()
    assert "-gencode arch=compute_80,code=[sm_80,sm_89] -shared" in command
    assert "-ltorch_cuda" in command
    assert {path.suffix for path in libraries[0].parent.iterdir()} <= {".so", ".lock"}  # nothing half made


@pytest.mark.usefixtures("toolkit")
def test_libraries_are_found_again_for_gpus_that_run_them(monkeypatch):
    library = build.build(["80", "90"])
    monkeypatch.setattr(build, "nvcc", lambda: None)
    for capabilities, found in ((["89"], True), (["80", "90"], True), (["75"], False), (["100"], False)):
        monkeypatch.setattr(build, "_capabilities", lambda names=capabilities: names)
        build.missing.cache_clear()
        assert (build.missing() == "") is found
        assert build._built(capabilities) == (library if found else None)


@pytest.mark.usefixtures("toolkit", "no_nvcc")
def test_without_nvcc_the_message_says_what_to_install(monkeypatch):
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert "nvcc was not found; install the CUDA toolkit (version 13.0" in build.missing()
    with pytest.raises(RuntimeError, match="set CUDA_HOME, or compile elsewhere"):
        build.library()
    with pytest.raises(RuntimeError, match="nvcc was not found"):
        build.build(["90"])


def test_a_failed_compilation_names_its_log(toolkit):
    toolkit.write_text("#!/bin/sh\necho 'kernel.cu(1): error: no'\nexit 2\n")
    with pytest.raises(RuntimeError, match=r"kernel.cu\(1\): error: no") as raised:
        build.build(["90"])
    log = next(word.rstrip(",") for word in str(raised.value).split() if word.endswith(".log,"))
    assert "-gencode" in Path(log).read_text()


def test_a_failure_is_remembered(toolkit, tmp_path, caplog):
    calls = tmp_path / "calls"
    toolkit.write_text(NVCC.replace("sleep 0.2", f"echo called >> {calls}; exit 2"))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="nvcc could not compile"):
                build.library()
    assert calls.read_text().split() == ["called"]
    (record,) = caplog.records
    assert "compiling the CUDA kernels for sm_89, once" in record.getMessage()


@pytest.mark.usefixtures("toolkit")
def test_a_library_that_does_not_load_is_named(monkeypatch):
    monkeypatch.setattr(_cuda, "_loaded", False)
    library = build.build(["89"])  # is text
    with pytest.raises(RuntimeError, match=f"{library} cannot be loaded: .*\n.*delete it"):
        _cuda.load()


@pytest.mark.usefixtures("toolkit")
def test_a_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match=r"cannot write .*tarvis_cuda_.*; set TORCH_EXTENSIONS_DIR"):
        build.build(["89"])


@pytest.mark.usefixtures("toolkit")
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o772])
@pytest.mark.parametrize("what", ["library", "folder", "parent"])
def test_what_others_can_write_is_not_loaded(monkeypatch, tmp_path, what, mode):
    monkeypatch.setattr(_cuda, "_loaded", False)
    library = build.build(["89"])
    place = {"library": library, "folder": library.parent, "parent": tmp_path / "cache"}[what]
    place.chmod(mode)
    for load in (_cuda.load, lambda: _cuda.load(library), lambda: build.build(["89"])):
        with pytest.raises(RuntimeError, match=f"^{place}: others can write there.* chmod go-w"):
            load()


@pytest.mark.usefixtures("toolkit")
def test_what_belongs_to_somebody_else_is_not_loaded(monkeypatch):
    library = build.build(["89"])
    monkeypatch.setattr(os, "getuid", lambda: library.stat().st_uid + 1)
    if library.stat().st_uid:
        with pytest.raises(RuntimeError, match="belongs to another user"):
            build.require_private(library)
    else:
        build.require_private(library)  # of the administrator


@pytest.mark.usefixtures("toolkit")
def test_folders_are_made_for_their_owner_alone(tmp_path):
    before = os.umask(0)
    try:
        library = build.build(["89"])
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (library.parent, tmp_path / "cache")} == {0o700}


def test_a_folder_where_only_owners_can_rename_is_as_good_as_private(tmp_path):
    (tmp_path / "mine").mkdir(mode=0o700)
    tmp_path.chmod(0o1777)
    build.require_private(tmp_path / "mine")


@pytest.mark.parametrize("module", ["kernels", "kernels.build"])
def test_programs_name_themselves_and_warn_of_nothing(module):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: python -m {module} [")


def test_what_a_library_depends_on_is_in_its_name(monkeypatch, toolkit):
    names = {build.build(["89"]).name}
    for change in (
        lambda: monkeypatch.setattr(platform, "machine", lambda: "another"),
        lambda: monkeypatch.setattr(torch.version, "cuda", "12.8"),
        lambda: toolkit.write_text(NVCC.replace("13.0", "13.1")),
    ):
        change()
        build._stem.cache_clear()
        build._about.cache_clear()
        assert build._built(["89"]) is None
        names.add(build.build(["89"]).name)
    assert len(names) == 4
    assert "_cuda13.1_sm89" in build._built(["89"]).name
    monkeypatch.setattr(build, "nvcc", lambda: None)
    assert build._built(["89"]) is not None  # where none can be made, that of any release


@pytest.mark.usefixtures("toolkit")
def test_a_gpu_that_nvcc_does_not_know_leaves_the_others_theirs(monkeypatch):
    capabilities = {"cuda:0": "61", "cuda:1": "89", "cuda:2": "88"}
    monkeypatch.setattr(build, "_capabilities", lambda: sorted(capabilities.values()))
    monkeypatch.setattr(build, "_capability", capabilities.get)
    assert build._targets() == {"89", "86"}  # the nearest older code of the generation
    for _ in range(2):  # before and after it is compiled, then without nvcc
        assert build.missing() == build.missing("cuda:1") == build.missing("cuda:2") == ""
        assert "of CUDA 13.0 does not compile for sm_61" in build.missing("cuda:0")
        library = build.build(build._targets())
        assert build._built(build._capabilities()) == library
    monkeypatch.setattr(build, "nvcc", lambda: None)
    build.missing.cache_clear()
    assert build.missing() == build.missing("cuda:1") == ""
    assert "has no code for sm_61" in build.missing("cuda:0")


@pytest.mark.parametrize(
    ("code", "on", "runs"),
    [
        ("80", "86", True), ("86", "80", False), ("86", "87", False), ("87", "89", False), ("87", "87", True),
        ("70", "72", False), ("90", "100", False), ("100", "103", True),
    ],
)  # fmt: skip
def test_code_runs_on_its_generation_and_on_embedded_gpus_only_their_own(code, on, runs):
    assert build._runs(code, on) is runs


@pytest.mark.usefixtures("toolkit")
def test_a_cuda_home_without_nvcc_is_not_passed_over(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    assert build.nvcc() is None
    expected = f"nvcc was not found in {tmp_path / 'nothing' / 'bin'}, which CUDA_HOME names"
    assert expected in build.missing()


@pytest.mark.usefixtures("toolkit")
def test_a_pytorch_before_the_stable_abi_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu130")
    assert build.missing() == "the CUDA kernels need PyTorch 2.11 or later, this is 2.10.1+cu130"


@pytest.mark.parametrize("name", ["9.0a", "sm_90a", "90,x", "compute_90", "9", "-90"])
@pytest.mark.usefixtures("toolkit")
def test_names_of_no_architecture_are_refused(name, capsys):
    assert build.main([f"--arch={name}"]) == 1
    assert "expected compute capabilities such as 80, sm_80 or 8.0" in capsys.readouterr().err


@pytest.mark.usefixtures("forgetful")
def test_a_pytorch_without_cuda_cannot_have_the_extension(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert build.missing() == "this PyTorch was built without CUDA"
    assert build.main(["--arch", "9.0"]) == 1
    assert "built without CUDA" in capsys.readouterr().err


@pytest.mark.usefixtures("toolkit")
def test_without_a_gpu_architectures_must_be_named(monkeypatch, capsys):
    monkeypatch.setattr(build, "_capabilities", list)
    assert build.main([]) == 1
    assert "as in --arch 80,90" in capsys.readouterr().err
    assert build.main(["--arch", "8.0,sm_90"]) == 0
    assert Path(capsys.readouterr().out.strip()).name.endswith("_sm80_90.so")
