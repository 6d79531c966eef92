import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import taps
from kernels.dispatch import HAS_TRITON
from kernels.mask_bits import pack_bits, unpack_bits
from kernels.mask_upsample import label_upsample, mask_upsample, upsample_logits
from kernels.taps import axis_taps

module = importlib.import_module("kernels.mask_upsample")  # the package offers the function under this name
Size = tuple[int, int]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed"))
CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")],
)
KERNELS = [TRITON, CUDA]
every_impl = pytest.mark.parametrize("impl", ["reference", *KERNELS])

# quarter, network, size
CASES = {
    "four times": ((6, 9), (24, 36), (24, 36)),
    "cut": ((8, 10), (29, 37), (29, 37)),
    "cut and enlarged": ((8, 10), (29, 37), (45, 71)),
    "enlarged a lot": ((4, 5), (15, 18), (35, 266)),
    "cut and shrunk": ((16, 24), (63, 90), (37, 20)),
    "shrunk to little": ((30, 16), (120, 63), (9, 2)),
    "one pixel from one": ((1, 1), (1, 1), (1, 1)),
    "one column": ((7, 1), (25, 4), (33, 6)),
    "two columns": ((2, 2), (7, 8), (10, 33)),
}


def chain(logits: Tensor, network: Size, size: Size) -> Tensor:
    """The definition: two resizes and the crop between them."""
    big = F.interpolate(logits.double(), scale_factor=4, mode="bilinear", align_corners=False)
    return F.interpolate(big[..., : network[0], : network[1]], size, mode="bilinear", align_corners=False)


def random_logits(*shape: int, seed: int = 0, device: str = DEVICE) -> Tensor:
    return 5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def assert_masks(masks: Tensor, exact: Tensor) -> None:
    """The sign of the exact values, except those within rounding of zero."""
    assert masks.shape == exact.shape
    assert masks.dtype == torch.bool
    assert ((masks == (exact > 0)) | (exact.abs() < 1e-5 * exact.abs().max())).all()


def assert_labels(labels: Tensor, exact: Tensor) -> None:
    """A largest value, up to rounding; exact is [K, T, H, W]."""
    assert labels.shape == exact.shape[1:]
    assert (labels < len(exact)).all()
    chosen = exact.gather(0, labels[None].long())[0]
    assert (chosen >= exact.amax(0) - 2e-5 * exact.abs().max()).all()


@every_impl
@pytest.mark.parametrize("case", CASES)
def test_equals_the_two_steps_it_is_composed_of(case: str, impl: str) -> None:
    quarter, network, size = CASES[case]
    logits = random_logits(2, 2, *quarter)
    exact = chain(logits, network, size)  # [2, 2, H, W]
    torch.testing.assert_close(upsample_logits(logits, network, size).double(), exact, atol=2e-5, rtol=0)
    assert_masks(mask_upsample(logits, network, size, impl=impl), exact)
    assert_labels(label_upsample(logits, network, size, impl=impl), exact)


@every_impl
@pytest.mark.parametrize("case", CASES)
def test_packed_masks_hold_the_same_bits(case: str, impl: str) -> None:
    quarter, network, size = CASES[case]
    logits = random_logits(2, 2, *quarter)
    masks = mask_upsample(logits, network, size, impl=impl)
    bits = mask_upsample(logits, network, size, packed=True, impl=impl)
    assert bits.dtype == torch.uint8
    assert bits.shape == (2, 2, size[0], 4 * -(-size[1] // 32))
    assert torch.equal(bits, pack_bits(masks))
    assert torch.equal(unpack_bits(bits, size[1]), masks)


@every_impl
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_only_the_inputs_rounding(dtype: torch.dtype, impl: str) -> None:
    logits = random_logits(3, 1, 8, 9).to(dtype)
    sizes = (30, 35), (23, 70)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        masks = mask_upsample(logits, *sizes, impl=impl)
        labels = label_upsample(logits, *sizes, impl=impl)
    assert torch.equal(masks, mask_upsample(logits.float(), *sizes, impl=impl))
    assert torch.equal(labels, label_upsample(logits.float(), *sizes, impl=impl))


@every_impl
def test_background_wins_where_no_logit_is_positive(impl: str) -> None:
    logits = random_logits(3, 2, 16, 16)
    exact = chain(logits, (50, 64), (33, 44))
    labels = label_upsample(logits, (50, 64), (33, 44), background=True, impl=impl)
    assert_labels(labels, torch.cat([torch.zeros_like(exact[:1]), exact]))
    flat = torch.zeros(2, 1, 4, 4, device=DEVICE)
    assert (label_upsample(flat, (16, 16), (16, 16), background=True, impl=impl) == 0).all()


@every_impl
def test_the_first_of_equal_maps_wins(impl: str) -> None:
    logits = random_logits(1, 2, 6, 6).expand(4, -1, -1, -1)
    assert (label_upsample(logits, (24, 24), (30, 40), impl=impl) == 0).all()
    background = label_upsample(logits, (24, 24), (30, 40), background=True, impl=impl)
    assert set(background.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("impl", KERNELS)
def test_nan_never_wins(impl: str) -> None:
    logits = random_logits(3, 1, 6, 6)
    logits[0], logits[2] = float("nan"), float("nan")
    assert (label_upsample(logits, (24, 24), (30, 40), impl=impl) == 1).all()
    assert not mask_upsample(logits[:1], (24, 24), (30, 40), impl=impl).any()


@every_impl
def test_labels_are_bytes_until_they_do_not_fit(impl: str) -> None:
    logits = torch.zeros(256, 1, 2, 2, device=DEVICE)
    logits[255] = 1
    narrow = label_upsample(logits, (8, 8), (4, 4), impl=impl)
    assert narrow.dtype == torch.uint8
    assert (narrow == 255).all()
    wide = label_upsample(logits, (8, 8), (4, 4), background=True, impl=impl)
    assert wide.dtype == torch.int16
    assert (wide == 256).all()


@every_impl
def test_strides_are_followed(impl: str) -> None:
    logits = random_logits(3, 2, 6, 8)
    args = (20, 23), (10, 33)
    views = logits[1:, 1:], logits[::2], logits.transpose(0, 1), logits.transpose(2, 3), logits[..., 2:]
    for view in views:
        plain = view.contiguous()
        assert torch.equal(mask_upsample(view, *args, impl=impl), mask_upsample(plain, *args, impl=impl))
        assert torch.equal(label_upsample(view, *args, impl=impl), label_upsample(plain, *args, impl=impl))


@every_impl
def test_one_map_of_one_value_is_its_sign_everywhere(impl: str) -> None:
    for value in (2.0, -2.0):
        logits = torch.full((1, 1, 1, 1), value, device=DEVICE)
        for size in ((1, 1), (3, 5)):
            assert (mask_upsample(logits, (4, 4), size, impl=impl) == (value > 0)).all()
            labels = label_upsample(logits, (4, 4), size, background=True, impl=impl)
            assert (labels == (value > 0)).all()


@every_impl
def test_nothing_gives_nothing(impl: str) -> None:
    logits = random_logits(4, 3, 16, 16)
    args = (60, 60), (45, 70)
    assert mask_upsample(logits[:0], *args, impl=impl).shape == (0, 3, 45, 70)
    assert mask_upsample(logits[:, :0], *args, impl=impl).shape == (4, 0, 45, 70)
    assert mask_upsample(logits[:0], *args, packed=True, impl=impl).shape == (0, 3, 45, 12)
    assert label_upsample(logits[:, :0], *args, impl=impl).shape == (0, 45, 70)
    assert label_upsample(logits[:0], *args, background=True, impl=impl).shape == (3, 45, 70)
    assert not label_upsample(logits[:0], *args, background=True, impl=impl).any()


@every_impl
def test_no_gradient_flows(impl: str) -> None:
    logits = random_logits(2, 1, 4, 4).requires_grad_()
    assert not mask_upsample(logits, (16, 16), (20, 20), packed=True, impl=impl).requires_grad
    assert not label_upsample(logits, (16, 16), (20, 20), impl=impl).requires_grad


def test_blocks_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(5, 2, 16, 32)
    args = (61, 100), (97, 151)
    masks, labels = (
        mask_upsample(logits, *args, impl="reference"),
        label_upsample(logits, *args, impl="reference"),
    )
    monkeypatch.setattr(module, "_BLOCK", {DEVICE: 1})
    monkeypatch.setattr(module, "_COLUMNS", 64)
    monkeypatch.setattr(module, "_MAPS", 3)
    assert torch.equal(mask_upsample(logits, *args, impl="reference"), masks)
    assert torch.equal(label_upsample(logits, *args, impl="reference"), labels)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_more_maps_than_a_grid_holds_take_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(5, 2, 4, 4)
    masks = mask_upsample(logits, (16, 16), (20, 20), impl="triton")
    monkeypatch.setattr(importlib.import_module("kernels._triton.mask_upsample"), "MOST_PROGRAMS", 3)
    assert torch.equal(mask_upsample(logits, (16, 16), (20, 20), impl="triton"), masks)


@pytest.mark.parametrize("case", CASES)
def test_an_output_line_comes_from_at_most_three_input_lines(case: str) -> None:
    for quarter, network, size in zip(*CASES[case], strict=True):
        start, weight = axis_taps(quarter, network, size, torch.device("cpu"))
        assert start.dtype == torch.int32
        assert (start.diff() >= 0).all()
        assert 0 <= start.min() <= start.max() <= max(quarter - 3, 0)
        dense = torch.zeros(size, quarter + 2).scatter_(1, start[:, None] + torch.arange(3), weight)
        assert not dense[:, quarter:].any()
        torch.testing.assert_close(dense[:, :quarter].double(), taps.axis_matrix(quarter, network, size))
        torch.testing.assert_close(weight.sum(1), torch.ones(size))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_tables_are_kept_for_the_cuda_graphs_that_read_them() -> None:
    gpu = importlib.import_module("kernels._triton.mask_upsample")
    device = torch.device(DEVICE)
    for make in (axis_taps, gpu._rows, gpu._columns):
        first = make(4, 16, 1, device)
        for size in range(2, 200):
            make(4, 16, size, device)
        assert make(4, 16, 1, device) is first


@every_impl
def test_operators_are_well_behaved(impl: str) -> None:
    logits = random_logits(3, 2, 4, 5)
    for packed in (False, True):
        torch.library.opcheck(
            torch.ops.tarvis.mask_upsample.default, (logits, [15, 18], [20, 33], packed, impl)
        )
    for background in (False, True):
        torch.library.opcheck(
            torch.ops.tarvis.label_upsample.default, (logits, [15, 18], [20, 33], background, impl)
        )


@every_impl
def test_compiles_without_graph_breaks(impl: str) -> None:
    def run(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        args = (15, 18), (20, 33)
        masks = mask_upsample(2 * logits, *args, impl=impl)
        bits = mask_upsample(2 * logits, *args, packed=True, impl=impl)
        return masks, bits, label_upsample(2 * logits, *args, impl=impl)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for n in (3, 5):  # the second time with a dynamic number of maps
        logits = random_logits(n, 2, 4, 5)
        for got, expected in zip(compiled(logits), run(logits), strict=True):
            assert torch.equal(got, expected)


def test_an_exported_program_holds_one_operator_that_chooses_where_it_runs() -> None:
    class Masks(torch.nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return mask_upsample(logits, (15, 18), (20, 33))

    logits = random_logits(3, 2, 4, 5)
    dynamic = {"logits": {0: torch.export.Dim("N", min=0, max=100)}}
    program = torch.export.export(Masks(), (logits,), dynamic_shapes=dynamic)
    nodes = [node for node in program.graph.nodes if "mask_upsample" in str(node.target)]
    assert [node.args[-1] for node in nodes] == ["auto"]
    more = random_logits(7, 2, 4, 5)
    assert torch.equal(program.module()(more), mask_upsample(more, (15, 18), (20, 33)))


def test_what_does_not_fit_is_refused() -> None:
    logits = random_logits(2, 1, 4, 4)
    with pytest.raises(ValueError, match="expected"):
        mask_upsample(logits[0], (16, 16), (16, 16))
    with pytest.raises(ValueError, match="expected"):
        mask_upsample(logits > 0, (16, 16), (16, 16))
    with pytest.raises(ValueError, match="cannot cut"):
        mask_upsample(logits, (17, 16), (16, 16))
    with pytest.raises(ValueError, match="cannot cut"):
        label_upsample(logits, (16, 16), (0, 16))
    with pytest.raises(ValueError, match="at least one map"):
        label_upsample(logits[:0], (16, 16), (16, 16))
    with pytest.raises(ValueError, match="impl='fast'"):
        mask_upsample(logits, (16, 16), (16, 16), impl="fast")  # type: ignore[arg-type]


def test_an_implementation_that_cannot_run_raises() -> None:
    logits = random_logits(2, 1, 4, 4)
    for run in (mask_upsample, label_upsample):
        with pytest.raises(RuntimeError, match=f"{run.__name__}: impl='triton' cannot run here.*float64"):
            run(logits.double(), (16, 16), (16, 16), impl="triton")
        with pytest.raises(RuntimeError, match="too large"):
            run(logits, (16, 16), (1 << 19, 16), impl="triton")
        with pytest.raises(RuntimeError, match="impl='cuda' cannot run here: tensors are on cpu"):
            run(logits.cpu(), (16, 16), (16, 16), impl="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_maps_and_masks_beyond_32_bits_are_reached(impl: str) -> None:
    far = torch.zeros((1 << 31) + 64, dtype=torch.bfloat16, device="cuda")
    far[-64:] = 1
    logits = far.as_strided((2, 1, 8, 8), (1 << 31, 64, 8, 1))
    assert mask_upsample(logits, (32, 32), (32, 32), impl=impl).flatten(1).all(1).tolist() == [False, True]
    assert (label_upsample(logits, (32, 32), (32, 32), impl=impl) == 1).all()
    many = torch.full((2100, 1, 8, 8), -1.0, device="cuda")
    many[-1] = 1
    masks = mask_upsample(many, (32, 32), (1024, 1024), impl=impl)  # 2.2e9 pixels
    assert masks[-1].all()
    assert not masks[-2].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("impl", ["triton", "cuda"])
@pytest.mark.parametrize(
    ("n", "case"), [(3, "cut and enlarged"), (3, "two columns"), (1, "one pixel from one")]
)
def test_inductor_launches_the_kernels(n: int, case: str, impl: str) -> None:
    quarter, network, size = CASES[case]

    def run(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        masks = mask_upsample(2 * logits, network, size, impl=impl)
        bits = mask_upsample(2 * logits, network, size, packed=True, impl=impl)
        return masks, bits, label_upsample(2 * logits, network, size, impl=impl)

    torch.compiler.reset()
    logits = random_logits(n, 1, *quarter)
    for got, expected in zip(torch.compile(run, fullgraph=True)(logits), run(logits), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_a_cuda_graph_replays_the_kernels(impl: str) -> None:
    def run(logits: Tensor, size: Size = (45, 71)) -> tuple[Tensor, Tensor]:
        masks = mask_upsample(logits, (29, 37), size, impl=impl)
        return masks, label_upsample(logits, (29, 37), size, impl=impl)

    logits = random_logits(3, 2, 8, 10)
    run(logits)  # compiles them and makes the tables
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(logits)
    for width in range(1, 100):
        run(logits, (45, width))  # other tables
    logits.copy_(random_logits(3, 2, 8, 10, seed=1))
    graph.replay()
    for got, expected in zip(captured, run(logits), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_tables_serve_every_stream() -> None:
    logits = random_logits(3, 2, 8, 10)
    expected = mask_upsample(logits, (29, 37), (47, 73), impl="reference")
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        torch.cuda._sleep(100_000_000)  # what follows on this stream runs late
        mask_upsample(logits, (29, 37), (47, 73), impl="triton")
    masks = mask_upsample(logits, (29, 37), (47, 73), impl="triton")
    exact = chain(logits, (29, 37), (47, 73))
    assert ((masks == expected) | (exact.abs() < 1e-5 * exact.abs().max())).all()
