"""Deformable attention on the encoder's shapes: gates, forward, backward, memory kept for the backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from bench.gpu import classic
from bench.gpu.measure import rotation, saved_bytes
from bench.gpu.protocol import Recorder, dtype_name, relative
from bench.timing import compiled
from kernels import ms_deform_attn
from kernels.dispatch import Impl
from kernels.ms_deform_attn import cell_centres

DIM, POINTS = 32, 4
KINK = 1e-3  # offsets this close to a cell's border have a one-sided derivative

OUT_LIMIT = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
GRAD_LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

# instructions that our kernels spend on a sample, all threads together, with D = 32, L = 3, P = 4, by bytes
# of a value: from code compiled for sm_90 by Triton 3.9 (codegen.py), so bounds of this code, not of the task
FORWARD_INSTRUCTIONS = {2: 547, 4: 459}
BACKWARD_INSTRUCTIONS = {2: 1573, 4: 1376}

Shapes = tuple[tuple[int, int], ...]


def levels(height: int, width: int, strides: tuple[int, ...] = (32, 16, 8)) -> Shapes:
    return tuple((height // stride, width // stride) for stride in strides)


@dataclass(frozen=True)
class Case:
    """One setting; `queries` None is the encoder's self-attention, where every cell is a query."""

    name: str
    batch: int
    shapes: Shapes
    dtype: torch.dtype = torch.bfloat16
    offsets: str = "2px"
    queries: int | None = None
    heads: int = 8

    def __str__(self) -> str:
        return f"{self.name} {dtype_name(self.dtype)} {self.offsets}"

    @property
    def cells(self) -> int:
        return sum(h * w for h, w in self.shapes)

    @property
    def samples(self) -> int:
        return self.batch * (self.queries or self.cells) * self.heads * len(self.shapes) * POINTS

    @property
    def input_bytes(self) -> int:
        values = self.batch * self.cells * self.heads * DIM
        return self.dtype.itemsize * (values + 3 * self.samples)

    def forward_amounts(self) -> dict[str, float]:
        size = self.dtype.itemsize
        out = self.samples // (len(self.shapes) * POINTS) * DIM
        corners = self.samples * 4 * DIM
        return {
            "dram_bytes": self.input_bytes + out * size,
            "l1_bytes": corners * size,
            "fp32_flop": corners * 2,
            "instructions": self.samples * FORWARD_INSTRUCTIONS[size],
        }

    def backward_amounts(self) -> dict[str, float]:
        """Reads what the forward read and the gradient, writes three gradients, clears and casts one."""
        size = self.dtype.itemsize
        values = self.batch * self.cells * self.heads * DIM
        out = self.samples // (len(self.shapes) * POINTS) * DIM
        corners = self.samples * 4 * DIM
        return {
            "dram_bytes": 2 * self.input_bytes + out * size + 8 * values,
            "l1_bytes": corners * size,
            "fp32_flop": corners * 8,
            "red_bytes": corners * 4,
            "instructions": self.samples * BACKWARD_INSTRUCTIONS[size],
        }


ENCODER = Case("12x480x864", 12, levels(480, 864))
TRAINING = {clips: Case(f"3x512x896 B={clips}", 3 * clips, levels(512, 896)) for clips in (1, 2, 4, 8)}
DECODER = Case("decoder B=4 Q=300 L=4", 4, levels(736, 1280, (64, 32, 16, 8)), queries=300)


def varied(case: Case, **changes: Any) -> Case:
    return Case(**{**vars(case), **changes})


def forward_cases() -> Iterator[Case]:
    """The one that targets are about first."""
    yield ENCODER
    yield varied(ENCODER, dtype=torch.float32)
    yield varied(ENCODER, dtype=torch.float16)
    yield from (varied(ENCODER, offsets=offsets) for offsets in ("8px", "initial", "uniform"))
    yield from (varied(DECODER, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32))
    yield Case("12x736x1280", 12, levels(736, 1280))
    yield from TRAINING.values()
    yield varied(TRAINING[2], dtype=torch.float32)


def backward_cases() -> Iterator[Case]:
    yield TRAINING[1]
    yield varied(TRAINING[1], dtype=torch.float32)
    yield from (varied(TRAINING[1], offsets=offsets) for offsets in ("8px", "initial", "uniform"))
    yield varied(TRAINING[1], dtype=torch.float16)
    yield TRAINING[2]
    yield varied(TRAINING[2], dtype=torch.float32)
    yield TRAINING[4]
    yield TRAINING[8]


def tiny(cases: Iterator[Case]) -> Iterator[Case]:
    """A rehearsal's: the first case with few cells, and the first with queries of its own."""
    seen = set()
    for case in cases:
        kind = case.queries is None
        if kind not in seen:
            seen.add(kind)
            strides = (32, 16, 8) if len(case.shapes) == 3 else (32, 32, 16, 8)
            yield varied(case, batch=1, shapes=levels(32, 32, strides), queries=case.queries and 5, heads=1)


def make(case: Case, device: str, seed: int, grad: bool = False) -> tuple[Tensor, ...]:
    """value, offset, logit, and with `grad` the gradient of the output: offset and logit share one tensor."""
    torch.manual_seed(seed)
    B, S, A, L = case.batch, case.cells, case.heads, len(case.shapes)
    Q = case.queries or S
    samples = A * L * POINTS
    value = torch.randn(B, S, A, DIM, device=device).to(case.dtype)
    joint = torch.randn(B, Q, 3 * samples, device=device)
    offset = joint[..., : 2 * samples].view(B, Q, A, L, POINTS, 2)
    if case.offsets.endswith("px"):
        offset *= float(case.offsets[:-2])
    elif case.offsets == "initial":  # heads look around, point p looks p pixels far
        angle = torch.arange(A, device=device) * (2 * math.pi / A)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # [A, 2]
        far = torch.arange(1, POINTS + 1, device=device)[:, None]
        offset.copy_((direction[:, None, None] * far).expand_as(offset))
    elif case.offsets == "uniform":  # anywhere in the image: no two neighbours read the same
        sizes = torch.tensor([(w, h) for h, w in case.shapes], device=device)
        here = reference_points(case, device)[:, :, None, :, None]  # [1, Q, 1, 1, 1, 2]
        offset.copy_((torch.rand_like(offset) - here) * sizes[:, None])
    else:
        raise ValueError(f"offsets: expected 2px, 8px, initial or uniform, got {case.offsets!r}")
    joint = joint.to(case.dtype)
    offset = joint[..., : 2 * samples].view(B, Q, A, L, POINTS, 2)
    logit = joint[..., 2 * samples :].view(B, Q, A, L, POINTS)
    if not grad:
        return value, offset, logit
    out = torch.randn(B, Q, A * DIM, device=device).to(case.dtype)
    return value.requires_grad_(), offset.requires_grad_(), logit.requires_grad_(), out


def reference_points(case: Case, device: str) -> Tensor:
    """[1, Q, 1, 2]: the cells' centres, or places on a diagonal."""
    if case.queries is None:
        return cell_centres(case.shapes, torch.device(device))
    along = (torch.arange(case.queries, device=device) + 0.5) / case.queries
    return torch.stack((along, along), -1)[None, :, None]


def single(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same in float32, for what knows nothing else."""
    return tuple(x.detach().float().requires_grad_(x.requires_grad) for x in inputs)


def with_gradients(call: Callable[..., Tensor]) -> Callable[..., Any]:
    """Forward and backward: gradients of value, offset and logit."""

    def run(value: Tensor, offset: Tensor, logit: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        out = call(value, offset, logit)
        return torch.autograd.grad(out, (value, offset, logit), grad.to(out.dtype))

    return run


def ours(case: Case, impl: str, device: str, **more: Any) -> Callable[..., Tensor]:
    """Of (value, offset, logit). Not deterministic unless told so: atomics are what training uses."""
    ref = None if case.queries is None else reference_points(case, device)
    more = {"deterministic": False, **more}

    def run(value: Tensor, offset: Tensor, logit: Tensor) -> Tensor:
        return ms_deform_attn(value, offset, logit, case.shapes, ref, impl=cast(Impl, impl), **more)

    return run


def baselines(case: Case, device: str) -> dict[str, Callable[..., Tensor]]:
    """Of (value, offset, logit): grid_sample, and the usual kernel between PyTorch operations (float32)."""
    ref = reference_points(case, device)
    return {
        "grid_sample": partial(classic.by_grid_sample, shapes=case.shapes, ref=ref),
        "classic": partial(classic.by_classic_kernel, shapes=case.shapes, ref=ref),
    }


def forward(record: Recorder) -> None:
    """Section: gates of the forward and backward on a small case, then forward times."""
    small_gates(record)
    cases = forward_cases()
    for case in tiny(cases) if record.small else cases:
        name = f"msda forward {case}"
        with torch.no_grad():
            _gate_forward(record, case, name)
            _time_forward(record, case, name)
        record.free()


def _gate_forward(record: Recorder, case: Case, name: str) -> None:
    kernels = record.gated(name)
    if not kernels:
        return
    inputs = make(case, record.device, seed=0)
    expected = baselines(case, record.device)["grid_sample"](*single(inputs))

    def error(impl: str) -> float:
        return relative(ours(case, impl, record.device)(*inputs), expected)

    for impl in kernels:
        record.gate(
            name, impl, "out against grid_sample in fp32", partial(error, impl), OUT_LIMIT[case.dtype]
        )


def _time_forward(record: Recorder, case: Case, name: str) -> None:
    device, amounts = record.device, case.forward_amounts()
    count = 1 if record.small else rotation(case.input_bytes)
    sets = [make(case, device, seed) for seed in range(1, 1 + count)]
    for impl in record.timed(name, ["triton", "cuda", "reference"]):
        record.time(name, impl, ours(case, impl, device), sets, amounts)
    main = case.name == ENCODER.name and case.offsets == "2px"
    if main and "triton" in record.timed(name, ["triton"]):  # how far two measurements of the same lie apart
        record.time(name, "triton again", ours(case, "triton", device), sets, amounts)
    others = baselines(case, device)
    record.time(name, "grid_sample", others["grid_sample"], sets)
    if main and record.timed(name, ["compiled"]):
        record.time(name, "grid_sample compiled", compiled(others["grid_sample"]), sets)
    if classic.missing(device):
        record.not_run(name, "classic", classic.missing(device))
        return
    sets = [single(inputs) for inputs in sets]
    record.time(name, "classic", others["classic"], sets)
    ref = reference_points(case, device)
    ready = [
        (value, *classic.locations_and_weights(offset, logit, case.shapes, ref))
        for value, offset, logit in sets
    ]
    record.time(name, "classic kernel alone", partial(classic.classic, shapes=case.shapes), ready)


def backward(record: Recorder) -> None:
    """Section: gates of gradients, then times of forward + backward; "backward" is that less the forward."""
    cases = backward_cases()
    for case in tiny(cases) if record.small else cases:
        name = f"msda backward {case}"
        kernels = record.gated(name)
        if kernels and case.batch <= TRAINING[2].batch:  # the oracle of larger ones takes long
            _gate_gradients(record, case, name, kernels)
        _time_backward(record, case, name)
        record.free()


def _gate_gradients(record: Recorder, case: Case, name: str, kernels: list[str]) -> None:
    device = record.device
    inputs = make(case, device, seed=0, grad=True)
    exact = single(inputs)
    oracle = baselines(case, device)["grid_sample"]
    expected = with_gradients(oracle)(*exact)
    smooth = away_from_kinks(case, inputs[1].detach())

    def error(impl: str) -> float:
        got = with_gradients(ours(case, impl, device))(*inputs)
        return max(relative(got[i], expected[i], smooth if i == 1 else None) for i in range(3))

    def unequal(impl: str) -> float:
        run = with_gradients(ours(case, impl, device, deterministic=True))
        return float(not all(torch.equal(a, b) for a, b in zip(run(*inputs), run(*inputs), strict=True)))

    limit = GRAD_LIMIT[case.dtype]
    for impl in kernels:
        record.gate(name, impl, "gradients against grid_sample in fp32", partial(error, impl), limit)
        record.gate(name, impl, "deterministic gradients differ from run to run", partial(unequal, impl), 0)


def _time_backward(record: Recorder, case: Case, name: str) -> None:
    device = record.device
    count = 1 if record.small else rotation(case.input_bytes)
    sets = [make(case, device, seed, grad=True) for seed in range(1, 1 + count)]
    amounts = case.backward_amounts()
    both_amounts = {key: value + case.forward_amounts().get(key, 0) for key, value in amounts.items()}

    def time(label: str, call: Callable[..., Tensor], inputs: list[tuple[Tensor, ...]]) -> None:
        of_ours = label.partition(" ")[0] in ("triton", "cuda", "reference")
        whole = f"{name} (with forward)"
        if (name, label) in record.failed:
            record.failed.add((whole, label))
        both = record.time(whole, label, with_gradients(call), inputs, both_amounts if of_ours else {})
        with torch.no_grad():
            alone = record.time(
                f"{name} (forward alone)", label, call, [values[:3] for values in inputs]
            )  # fmt: skip
        record.difference(name, label, both, alone, amounts if of_ours else {})

    for impl in record.timed(name, ["triton", "cuda", "reference"]):
        time(impl, ours(case, impl, device), sets)
    main = case.name == TRAINING[1].name and case.offsets == "2px"
    if main:
        for impl in record.timed(name, ["triton"]):
            time(f"{impl} deterministic", ours(case, impl, device, deterministic=True), sets)
    others = baselines(case, device)
    time("grid_sample", others["grid_sample"], sets)
    if main and case.dtype == torch.bfloat16 and record.timed(name, ["compiled"]):
        time("grid_sample compiled", compiled(others["grid_sample"]), sets)
    if classic.missing(device):
        record.not_run(name, "classic", classic.missing(device))
    else:
        time("classic", others["classic"], [single(inputs) for inputs in sets])
    if main:
        memory = f"msda kept for backward {case}"
        value, offset, logit, _ = sets[0]
        kept = {impl: ours(case, impl, device) for impl in record.timed(memory, ["triton", "reference"])}
        for impl, call in kept.items():
            record.memory(memory, impl, partial(saved_bytes, partial(call, value, offset, logit)))
        if not classic.missing(device):
            inputs = single((value, offset, logit))
            record.memory(memory, "classic", partial(saved_bytes, partial(others["classic"], *inputs)))


def small_gates(record: Recorder) -> None:
    """Every dtype against float64 on a small case, and offsets that are far outside or not numbers."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        case = Case("small", 2, levels(64, 160), dtype)
        if record.small:
            case = varied(case, batch=1, shapes=levels(32, 32), heads=1)
        name = f"msda small {case}"
        for impl in record.gated(name):
            _gate_against_double(record, case, name, impl)
            harm = partial(_harm_of_wild_offsets, case, impl, record.device)
            record.gate(name, impl, "places that are not finite touch other queries", harm, 0)


def _gate_against_double(record: Recorder, case: Case, name: str, impl: str) -> None:
    device = record.device
    inputs = make(case, device, seed=0, grad=True)
    exact = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in inputs)
    oracle = baselines(case, device)["grid_sample"]
    smooth = away_from_kinks(case, inputs[1].detach())

    def out() -> float:
        with torch.no_grad():
            return relative(ours(case, impl, device)(*inputs[:3]), oracle(*exact[:3]))

    def gradients() -> float:
        got = with_gradients(ours(case, impl, device))(*inputs)
        expected = with_gradients(oracle)(*exact)
        return max(relative(got[i], expected[i], smooth if i == 1 else None) for i in range(3))

    record.gate(name, impl, "out against float64", out, OUT_LIMIT[case.dtype])
    record.gate(name, impl, "gradients against float64", gradients, GRAD_LIMIT[case.dtype])


def _harm_of_wild_offsets(case: Case, impl: str, device: str) -> float:
    """Whether queries change because others have offsets of NaN, infinity or 1e30."""
    value, offset, logit = make(case, device, seed=0)
    run = ours(case, impl, device)
    clean = run(value, offset, logit)
    wild = offset.clone()
    for query, place in enumerate((float("nan"), float("inf"), -float("inf"), 3e4)):
        wild[:, query] = place
    got = run(value, wild, logit.clone())
    return float(not torch.equal(got[:, 4:], clean[:, 4:]))


def away_from_kinks(case: Case, offset: Tensor) -> Tensor:
    """Where an offset is not on the border between two cells, nor is its partner: bool like `offset`."""
    ref = reference_points(case, str(offset.device)).double()
    sizes = torch.tensor([(w, h) for h, w in case.shapes], device=offset.device).double()
    place = ref[:, :, None, :, None] * sizes[:, None] - 0.5 + offset.double()
    return (place - place.round()).abs() > KINK
