"""Deformable attention as others compute it, for comparison: grid_sample, and the usual CUDA kernel.

`classic` is float32 only: softmax and locations are separate PyTorch operations, then comes the kernel of
`classic_msda.cu`, compiled on the spot by nvcc, or by the NVRTC that torch brings where there is no nvcc.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SOURCE = Path(__file__).with_name("classic_msda.cu")
THREADS = 256
MOST_CHANNELS = 64

Shapes = Sequence[tuple[int, int]]


def by_grid_sample(value: Tensor, offset: Tensor, logit: Tensor, shapes: Shapes, ref: Tensor) -> Tensor:
    """The operator as Deformable DETR's PyTorch form has it, in float32 or float64. -> [B, Q, A*D].

    ref [1 or B, Q, 1 or L, 2].
    """
    B, S, A, D = value.shape
    Q, L, P = logit.shape[1], logit.shape[3], logit.shape[4]
    exact = torch.float64 if value.dtype == torch.float64 else torch.float32
    weights = logit.to(exact).flatten(3).softmax(-1)  # [B, Q, A, L*P]
    levels = value.to(exact).split([h * w for h, w in shapes], 1)
    samples = []
    for level, ((h, w), cells) in enumerate(zip(shapes, levels, strict=True)):
        centre = ref[:, :, min(level, ref.shape[2] - 1), None, None].to(exact)  # [1 or B, Q, 1, 1, 2]
        shift = offset[:, :, :, level].to(exact)  # [B, Q, A, P, 2]
        x, y = centre[..., 0] + shift[..., 0] / w, centre[..., 1] + shift[..., 1] / h
        grid = torch.stack((2 * x - 1, 2 * y - 1), -1).transpose(1, 2).flatten(0, 1)  # [B*A, Q, P, 2]
        image = cells.permute(0, 2, 3, 1).reshape(B * A, D, h, w)
        samples.append(F.grid_sample(image, grid, align_corners=False))  # [B*A, D, Q, P]
    by_sample = weights.transpose(1, 2).reshape(B * A, 1, Q, L * P)
    out = (torch.stack(samples, -2).flatten(-2) * by_sample).sum(-1)  # [B*A, D, Q]
    return out.view(B, A * D, Q).transpose(1, 2)


def by_classic_kernel(value: Tensor, offset: Tensor, logit: Tensor, shapes: Shapes, ref: Tensor) -> Tensor:
    """The operator with the usual CUDA kernel, softmax and locations included. float32 -> [B, Q, A*D]."""
    return classic(value, *locations_and_weights(offset, logit, shapes, ref), shapes)


def locations_and_weights(
    offset: Tensor, logit: Tensor, shapes: Shapes, ref: Tensor
) -> tuple[Tensor, Tensor]:
    """What the usual operator takes: locations [B, Q, A, L, P, 2] in 0..1, weights [B, Q, A, L, P]."""
    sizes = _sizes(tuple(shapes), offset.device)[0].flip(-1).float()  # [L, 2] as (w, h)
    locations = ref[:, :, None, :, None] + offset / sizes[:, None]
    return locations, logit.flatten(3).softmax(-1).view(logit.shape)


def classic(value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
    """The usual operator, differentiable.

    [B, S, A, D], [B, Q, A, L, P, 2], [B, Q, A, L, P] -> [B, Q, A*D].
    """
    return _Classic.apply(value, locations, weights, tuple(shapes))


def missing(device: str) -> str:
    """Why the usual kernel cannot run on a device; empty where it can, if a compiler is found."""
    return "" if device.startswith("cuda") else f"tensors are on {device}"


class _Classic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, shapes: Any) -> Tensor:
        value, locations, weights = (_checked(x) for x in (value, locations, weights))
        B, S, A, D = value.shape
        Q, L, P = weights.shape[1], weights.shape[3], weights.shape[4]
        out = value.new_empty(B, Q, A * D)
        grid = (-(-B * Q * A * D // THREADS), 1, 1)
        tensors = [value, *_sizes(shapes, value.device), locations, weights, out]
        kernel("classic_forward")(grid, (THREADS, 1, 1), [*tensors, B, S, Q, A, D, L, P])
        ctx.save_for_backward(value, locations, weights)
        ctx.shapes = shapes
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        value, locations, weights = ctx.saved_tensors
        B, S, A, D = value.shape
        Q, L, P = weights.shape[1], weights.shape[3], weights.shape[4]
        assert D <= MOST_CHANNELS
        grads = torch.zeros_like(value), torch.empty_like(locations), torch.empty_like(weights)
        tensors = [_checked(grad), value, *_sizes(ctx.shapes, value.device), locations, weights, *grads]
        kernel("classic_backward")((B * Q * A, 1, 1), (D, 1, 1), [*tensors, B, S, Q, A, D, L, P])
        return *grads, None


def _checked(x: Tensor) -> Tensor:
    assert x.dtype == torch.float32
    return x.contiguous()


@lru_cache(maxsize=32)
def _sizes(shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Sizes [L, 2] and first cells [L], int64 on the device; kept, as copying would synchronise."""
    sizes = torch.tensor(shapes, dtype=torch.int64)
    cells = sizes.prod(1)
    return sizes.to(device), (cells.cumsum(0) - cells).to(device)


@cache
def kernel(name: str) -> Any:
    """A kernel of `classic_msda.cu`, to be called with grid, block and arguments.

    Raises:
        RuntimeError: neither compiler works here; the message says why.
    """
    from torch.cuda._utils import _cuda_load_module

    failures = []
    for compiler, build in (("nvcc", _by_nvcc), ("NVRTC", _by_nvrtc)):
        try:
            return _cuda_load_module(build(name), [name])[name]  # type: ignore[index]
        except Exception as error:
            failures.append(f"{compiler}: {(str(error) or repr(error)).splitlines()[0]}")
    raise RuntimeError("classic_msda.cu cannot be compiled here: " + "; ".join(failures))


def _by_nvcc(_: str) -> bytes:
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise RuntimeError("not found")
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "classic.cubin"
        arch = f"-arch=sm_{major}{minor}"
        command = [nvcc, "-O3", "-std=c++17", arch, "-cubin", "-o", str(out), str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True)
        return out.read_bytes()


def _by_nvrtc(name: str) -> bytes:
    from torch.cuda._utils import _nvrtc_compile
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME is None:  # torch wants a folder of headers to name; none is read
        cpp_extension.CUDA_HOME = "/usr/local/cuda"
    return _nvrtc_compile(SOURCE.read_text(), name)[0]
