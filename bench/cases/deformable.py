"""Deformable attention: grid_sample and the usual CUDA kernel against this project's operator.

From raw offsets and logits to the output: softmax and sampling locations are part of what is timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import classic
from bench.case import OURS, Case, Gate, Scale, Way, dtype_name, relative, unequal, with_gradients
from bench.timing import Call, Inputs
from kernels import ms_deform_attn
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
class Setting:
    """`queries` None is the encoder's self-attention, where every cell is a query."""

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

    @property
    def out_bytes(self) -> int:
        return self.dtype.itemsize * self.samples // (len(self.shapes) * POINTS) * DIM

    def forward_amounts(self) -> dict[str, float]:
        corners = self.samples * 4 * DIM
        return {
            "dram_bytes": self.input_bytes + self.out_bytes,
            "l1_bytes": corners * self.dtype.itemsize,
            "fp32_flop": corners * 2,
            "instructions": self.samples * FORWARD_INSTRUCTIONS[self.dtype.itemsize],
        }

    def backward_amounts(self) -> dict[str, float]:
        """Reads what the forward read and the gradient, writes three gradients, clears and casts one."""
        values = self.batch * self.cells * self.heads * DIM
        corners = self.samples * 4 * DIM
        return {
            "dram_bytes": 2 * self.input_bytes + self.out_bytes + 8 * values,
            "l1_bytes": corners * self.dtype.itemsize,
            "fp32_flop": corners * 8,
            "red_bytes": corners * 4,
            "instructions": self.samples * BACKWARD_INSTRUCTIONS[self.dtype.itemsize],
        }


ENCODER = Setting("12x480x864", 12, levels(480, 864))
TRAINING = {clips: Setting(f"3x512x896 B={clips}", 3 * clips, levels(512, 896)) for clips in (1, 2, 4, 8)}
DECODER = Setting("decoder B=4 Q=300 L=4", 4, levels(736, 1280, (64, 32, 16, 8)), queries=300)
ON_CPU = [
    Setting("1x480x864", 1, levels(480, 864), torch.float32),
    Setting("6x256x448", 6, levels(256, 448), torch.float32),
]
TINY = [
    Setting("tiny", 1, levels(32, 32), heads=1),
    Setting("tiny Q=5 L=4", 1, levels(32, 32, (32, 32, 16, 8)), heads=1, queries=5),
]
OTHER_OFFSETS = ("8px", "initial", "uniform")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def forward_settings(scale: Scale) -> list[Setting]:
    """Of a GPU the one that targets are about first."""
    if scale != "gpu":
        return ON_CPU if scale == "cpu" else TINY
    return [
        ENCODER,
        *(replace(ENCODER, dtype=dtype) for dtype in (torch.float32, torch.float16)),
        *(replace(ENCODER, offsets=offsets) for offsets in OTHER_OFFSETS),
        *(replace(DECODER, dtype=dtype) for dtype in DTYPES),
        Setting("12x736x1280", 12, levels(736, 1280)),
        *TRAINING.values(),
        replace(TRAINING[2], dtype=torch.float32),
    ]


def backward_settings(scale: Scale) -> list[Setting]:
    if scale != "gpu":
        return ON_CPU if scale == "cpu" else TINY[:1]
    first = TRAINING[1]
    return [
        first,
        replace(first, dtype=torch.float32),
        *(replace(first, offsets=offsets) for offsets in OTHER_OFFSETS),
        replace(first, dtype=torch.float16),
        TRAINING[2],
        replace(TRAINING[2], dtype=torch.float32),
        TRAINING[4],
        TRAINING[8],
    ]


def forward(device: str, scale: Scale) -> Iterator[Case]:
    for setting in forward_settings(scale):
        is_main = setting.name == ENCODER.name and setting.offsets == "2px"
        ways = ways_of(setting, device, compiles=is_main or scale == "cpu")
        if is_main:  # how far two measurements of the same lie apart
            ways["triton again"] = ways["triton"]
        ways["classic kernel alone"] = Way(
            partial(classic.classic, shapes=setting.shapes),
            prepare=partial(located, setting, device),
            not_here=classic.missing(device),
        )
        gate = Gate(
            "out against grid_sample in fp32", OUT_LIMIT[setting.dtype], partial(out_error, setting, device)
        )
        yield Case(
            f"msda forward {setting}", partial(make, setting, device), ways, [gate], setting.forward_amounts()
        )


def backward(device: str, scale: Scale) -> Iterator[Case]:
    for setting in backward_settings(scale):
        is_main = setting.name == TRAINING[1].name and setting.offsets == "2px"
        ways = ways_of(setting, device, compiles=scale == "cpu" or setting == TRAINING[1])
        if is_main:
            ways["triton deterministic"] = Way(ours(setting, device, "triton", deterministic=True))
        gates = [
            Gate(
                "gradients against grid_sample in fp32",
                GRAD_LIMIT[setting.dtype],
                partial(gradient_error, setting, device),
            ),
            Gate("deterministic gradients differ from run to run", 0, partial(unsteady, setting, device)),
        ]
        yield Case(
            f"msda backward {setting}",
            partial(make, setting, device, grad=True),
            ways,
            gates if setting.batch <= TRAINING[2].batch else (),  # the oracle of larger ones takes long
            setting.backward_amounts(),
            backward=True,
            memory="kept" if is_main or scale == "tiny" else "",
        )


def ways_of(setting: Setting, device: str, compiles: bool) -> dict[str, Way]:
    """Ways to compute (value, offset, logit) -> output; the classic kernel knows float32 only."""
    ref = reference_points(setting, device)
    plain: Call = partial(classic.by_grid_sample, shapes=setting.shapes, ref=ref)
    usual: Call = partial(classic.by_classic_kernel, shapes=setting.shapes, ref=ref)
    ways = {impl: Way(ours(setting, device, impl)) for impl in OURS}
    ways["grid_sample"] = Way(plain)
    if compiles:
        ways["compiled"] = Way(ours(setting, device, "reference"), compile=True)
        ways["grid_sample compiled"] = Way(plain, compile=True)
    ways["classic"] = Way(usual, prepare=in_single, not_here=classic.missing(device))
    return ways


def ours(setting: Setting, device: str, impl: Any, deterministic: bool = False) -> Call:
    """Not deterministic unless asked to be: training uses atomics."""
    ref = None if setting.queries is None else reference_points(setting, device)
    return partial(attend, impl=impl, shapes=setting.shapes, ref=ref, deterministic=deterministic)


def attend(value: Tensor, offset: Tensor, logit: Tensor, shapes: Shapes, **options: Any) -> Tensor:
    return ms_deform_attn(value, offset, logit, shapes, **options)


# Inputs


def make(setting: Setting, device: str, seed: int, grad: bool = False) -> tuple[Tensor, ...]:
    """value, offset, logit, and with `grad` the gradient of the output: offset and logit share one tensor."""
    torch.manual_seed(seed)
    B, S, A, L = setting.batch, setting.cells, setting.heads, len(setting.shapes)
    Q = setting.queries or S
    samples = A * L * POINTS
    value = torch.randn(B, S, A, DIM, device=device).to(setting.dtype)
    joint = torch.randn(B, Q, 3 * samples, device=device)
    offset = joint[..., : 2 * samples].view(B, Q, A, L, POINTS, 2)
    if setting.offsets.endswith("px"):
        offset *= float(setting.offsets[:-2])
    elif setting.offsets == "initial":  # heads look around, point p looks p pixels far
        angle = torch.arange(A, device=device) * (2 * math.pi / A)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # [A, 2]
        far = torch.arange(1, POINTS + 1, device=device)[:, None]
        offset.copy_((direction[:, None, None] * far).expand_as(offset))
    elif setting.offsets == "uniform":  # anywhere in the image: no two neighbours read the same
        sizes = torch.tensor([(w, h) for h, w in setting.shapes], device=device)
        centre = reference_points(setting, device)[:, :, None, :, None]  # [1, Q, 1, 1, 1, 2]
        offset.copy_((torch.rand_like(offset) - centre) * sizes[:, None])
    else:
        raise ValueError(f"offsets: expected 2px, 8px, initial or uniform, got {setting.offsets!r}")
    joint = joint.to(setting.dtype)
    offset = joint[..., : 2 * samples].view(B, Q, A, L, POINTS, 2)
    logit = joint[..., 2 * samples :].view(B, Q, A, L, POINTS)
    if not grad:
        return value, offset, logit
    out = torch.randn(B, Q, A * DIM, device=device).to(setting.dtype)
    return value.requires_grad_(), offset.requires_grad_(), logit.requires_grad_(), out


def reference_points(setting: Setting, device: str) -> Tensor:
    """[1, Q, 1, 2]: the cells' centres, or places on a diagonal."""
    if setting.queries is None:
        return cell_centres(setting.shapes, torch.device(device))
    along = (torch.arange(setting.queries, device=device) + 0.5) / setting.queries
    return torch.stack((along, along), -1)[None, :, None]


def in_single(inputs: Inputs) -> tuple[Tensor, ...]:
    """The same in float32."""
    return tuple(x.detach().float().requires_grad_(x.requires_grad) for x in inputs)


def located(setting: Setting, device: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """What the classic kernel itself takes: value, locations, weights."""
    value, offset, logit = in_single(inputs)
    ref = reference_points(setting, device)
    return value, *classic.locations_and_weights(offset, logit, setting.shapes, ref)


# Gates


@torch.no_grad()
def out_error(setting: Setting, device: str, impl: str) -> float:
    inputs = make(setting, device, seed=0)
    oracle = ways_of(setting, device, compiles=False)["grid_sample"].call
    return relative(ours(setting, device, impl)(*inputs), oracle(*in_single(inputs)))


def gradient_error(setting: Setting, device: str, impl: str) -> float:
    inputs = make(setting, device, seed=0, grad=True)
    oracle = ways_of(setting, device, compiles=False)["grid_sample"].call
    expected = with_gradients(oracle)(*in_single(inputs))
    got = with_gradients(ours(setting, device, impl))(*inputs)
    smooth = away_from_kinks(setting, inputs[1].detach())
    return max(relative(got[i], expected[i], smooth if i == 1 else None) for i in range(3))


def unsteady(setting: Setting, device: str, impl: str) -> float:
    run = with_gradients(ours(setting, device, impl, deterministic=True))
    return unequal(run, make(setting, device, seed=0, grad=True))


def away_from_kinks(setting: Setting, offset: Tensor) -> Tensor:
    """Where an offset is not on the border between two cells: bool like `offset`."""
    ref = reference_points(setting, str(offset.device)).double()
    sizes = torch.tensor([(w, h) for h, w in setting.shapes], device=offset.device).double()
    place = ref[:, :, None, :, None] * sizes[:, None] - 0.5 + offset.double()
    return (place - place.round()).abs() > KINK
