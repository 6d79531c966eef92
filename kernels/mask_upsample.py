"""Logits at a quarter of the padded network input -> masks or labels at the size of the image.

    out = Wy logits Wx^T,  Wy = bilinear(H <- network) crop(network <- 4h) bilinear(4h <- h),  Wx alike
    mask = out > 0,  label = argmax over the maps

Two bilinear steps (half-pixel centres, no antialiasing) with the padding cut off between them, as in the
published model. Both steps are linear and separable, so each axis is one matrix with at most three non-zeros
a row, side by side, and thresholds and maxima are taken of values just made: no float map of full size ever
exists. Neither result has a gradient; autocast changes neither.

The matrices are made on the host by the first call with a size and kept. So before kernels are captured in a
CUDA graph, which torch.compile(mode="reduce-overhead") does too, they must have run once with the same
sizes; the reference must not be captured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cuda
from .dispatch import FLOATS, Impl, require, unfit_dtype
from .mask_bits import pack_bits
from .operator import Operator, launcher
from .taps import Size, axis_taps, bands

_MAPS = 32  # masks upsampled at once
_COLUMNS = 256  # columns of a block
_ROWS = {"cpu": 32}  # its rows at most: of more, products are mostly with zeros
_BLOCK = {"cpu": 1 << 19, "cuda": 1 << 26}  # values in a block; on the CPU it should stay in the cache


def mask_upsample(
    logits: Tensor, network: Size, size: Size, *, packed: bool = False, impl: Impl = "auto"
) -> Tensor:
    """Where the upsampled logits are positive.

    Args:
        logits: [N, T, h, w], finite, any float dtype (computed in float32) and strides; N = 0 or T = 0 are
            fine.
        network: (height, width) of the network input before padding, at most (4h, 4w).
        size: (height, width) of the result.
        packed: a bit per pixel instead of a byte.
        impl: see `kernels.dispatch`. Implementations sum in different orders, so they may differ where a
            value is within rounding of zero.

    Returns:
        [N, T, H, W] bool; or packed [N, T, H, 4 * ceil(W / 32)] uint8: pixel x is bit x % 8 of byte x // 8,
        and the rows are padded with zeros to whole int32 words, as in `mask_bits`.

    Raises:
        ValueError: `logits` is not a four-dimensional float tensor, or `network` does not fit into it.
        RuntimeError: the implementation asked for cannot run.
    """
    _check("mask_upsample", logits, network, size)
    logits = logits.detach()
    chosen = _masks.choose(impl, logits, network, size, packed)
    return torch.ops.tarvis.mask_upsample(logits, network, size, packed, chosen)


def label_upsample(
    logits: Tensor, network: Size, size: Size, *, background: bool = False, impl: Impl = "auto"
) -> Tensor:
    """Which map has the largest upsampled logit; the first of equals.

    Args:
        logits: [K, T, h, w], finite, any float dtype (computed in float32) and strides. In the kernels NaN
            never wins against a number; the reference lets it win.
        network: (height, width) of the network input before padding, at most (4h, 4w).
        size: (height, width) of the result.
        background: label 0 then means that no logit is positive, and map k has label k + 1.
        impl: as in `mask_upsample`; maps within rounding of each other may be told apart differently.

    Returns:
        [T, H, W] uint8, or int16 where the labels do not fit.

    Raises:
        ValueError: as `mask_upsample`, or there is nothing to choose from (K = 0 without background).
        RuntimeError: the implementation asked for cannot run.
    """
    _check("label_upsample", logits, network, size)
    if logits.shape[0] == 0 and not background:
        raise ValueError("label_upsample needs at least one map")
    logits = logits.detach()
    chosen = _labels.choose(impl, logits, network, size, background)
    return torch.ops.tarvis.label_upsample(logits, network, size, background, chosen)


def upsample_logits(logits: Tensor, network: Size, size: Size) -> Tensor:
    """The upsampled logits themselves: [.., h, w] -> float32 [.., H, W], for those who need values.

    Plain PyTorch everywhere, as are the references: on a GPU with the precision of products that
    `torch.set_float32_matmul_precision` says.
    """
    maps = logits.detach().reshape(-1, *logits.shape[-2:])
    out = maps.new_empty(len(maps), *size, dtype=torch.float32)
    for rows, columns, values in _blocks(maps, network, size):
        out[:, rows, columns] = values.transpose(0, 1)
    return out.unflatten(0, logits.shape[:-2])


def mask_upsample_reference(
    logits: Tensor, network: Sequence[int], size: Sequence[int], packed: bool
) -> Tensor:
    """Defines `mask_upsample`, block by block."""
    out = _empty_masks(logits, network, size, packed).flatten(0, 1)  # [N*T, H, W] or [N*T, H, bytes]
    if len(out):
        for maps, masks in zip(logits.flatten(0, 1).split(_MAPS), out.split(_MAPS), strict=True):
            for rows, columns, values in _blocks(maps, network, size):
                if packed:
                    words = slice(
                        columns.start // 8, (columns.stop + 31) // 32 * 4
                    )  # blocks begin with words
                    masks[:, rows, words] = pack_bits(values > 0).transpose(0, 1)
                else:  # "> 0" of finite values: on a CPU a comparison takes 2.5 times as long as these steps
                    masks[:, rows, columns] = values.clamp_(min=0).transpose(0, 1)
    return out.unflatten(0, logits.shape[:2])


def label_upsample_reference(
    logits: Tensor, network: Sequence[int], size: Sequence[int], background: bool
) -> Tensor:
    """Defines `label_upsample`, block by block."""
    out = _empty_labels(logits, network, size, background)  # [T, H, W]
    if len(logits) == 0:
        return out.zero_()
    for t in range(logits.shape[1]):
        for rows, columns, values in _blocks(logits[:, t], network, size):
            best, label = _largest(values)  # [rows, columns]
            out[t, rows, columns] = (label + 1).masked_fill_(~(best > 0), 0) if background else label
    return out


def _check(operator: str, logits: Tensor, network: Size, size: Size) -> None:
    require(operator, FLOATS, logits=logits)
    if logits.ndim != 4:
        raise ValueError(f"expected float logits [N, T, h, w], got {logits.dtype} {list(logits.shape)}")
    h, w = logits.shape[2:]
    if not (0 < network[0] <= 4 * h and 0 < network[1] <= 4 * w) or min(size) < 1:
        raise ValueError(f"cannot cut {network} out of {(4 * h, 4 * w)} and resize it to {size}")


def _unfit(logits: Tensor, _: Sequence[int], size: Sequence[int], __: bool) -> str:
    """Kernels count the pixels of a map in 32 bits, and tiles along an axis and frames in 16."""
    (T, h, w), (H, W) = logits.shape[1:], size
    fits = h * w < 1 << 31 and H * W < 1 << 31 and max(H, W) < 1 << 18 and T < 1 << 16
    return unfit_dtype(logits) or ("" if fits else f"{(T, h, w)} -> {(H, W)} is too large for their indices")


@torch.no_grad()
def _blocks(
    maps: Tensor, network: Sequence[int], size: Sequence[int]
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of the upsampled maps [M, h, w]: (which rows, which columns, float32 [rows, M, columns]).

    With the maps between rows and columns both steps are plain matrix products.
    """
    M, h, w = maps.shape
    H, W = size
    device = maps.device
    num_rows = max(1, _BLOCK.get(device.type, 1 << 24) // max(1, M * min(W, _COLUMNS)))
    num_rows = min(num_rows, _ROWS.get(device.type, H), H)
    with torch.autocast(device.type, enabled=False):
        lines = maps.float().transpose(0, 1).contiguous()  # [h, M, w]
        for columns, taps, weight in bands(w, network[1], W, _COLUMNS, device):
            wide = (lines[:, :, taps] @ weight.T).flatten(1)  # [h, M*columns]
            for rows, taps, weight in bands(h, network[0], H, num_rows, device):
                yield rows, columns, (weight @ wide[taps]).view(len(weight), M, -1 if M else 0)


def _largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum over the maps of a block [rows, M, columns] and the first that reaches it, [rows, columns]."""
    if values.device.type != "cpu":
        best, label = values.max(1)
        return best, label
    # pooling over maps with the columns as channels is vectorised, which max with its indices is not:
    # 17 instead of 48 ms for 66 maps of 720 x 1280 on two cores
    pixels = values[:, :, None].permute(0, 3, 1, 2)  # [rows, columns, M, 1], channels last
    best, label = F.adaptive_max_pool2d(pixels, 1, return_indices=True)
    return best[..., 0, 0], label[..., 0, 0]


def _empty_masks(logits: Tensor, _: Sequence[int], size: Sequence[int], packed: bool) -> Tensor:
    (N, T), (H, W) = logits.shape[:2], size
    if packed:
        return logits.new_empty(N, T, H, (W + 31) // 32 * 4, dtype=torch.uint8)
    return logits.new_empty(N, T, H, W, dtype=torch.bool)


def _empty_labels(logits: Tensor, _: Sequence[int], size: Sequence[int], background: bool) -> Tensor:
    (K, T), (H, W) = logits.shape[:2], size
    return logits.new_empty(T, H, W, dtype=torch.uint8 if K + int(background) <= 256 else torch.int16)


def _taps(logits: Tensor, network: Sequence[int], size: Sequence[int]) -> tuple[Tensor, ...]:
    """y_start [H], y_weight [H, 3], x_start [W], x_weight [W, 3]."""
    axes = zip(logits.shape[2:], network, size, strict=True)
    return tuple(table for axis in axes for table in axis_taps(*axis, logits.device))


def _cuda_masks(logits: Tensor, network: Sequence[int], size: Sequence[int], packed: bool) -> Tensor:
    return _cuda.mask_upsample(logits, *_taps(logits, network, size), packed)


def _cuda_labels(logits: Tensor, network: Sequence[int], size: Sequence[int], background: bool) -> Tensor:
    return _cuda.label_upsample(logits, *_taps(logits, network, size), background)


# Opaque to torch.compile, and operators also where the reference runs: the tables of an axis are made on the
# host and kept for the next call, which can be neither traced nor fused. They must not lie in the memory of a
# CUDA graph, so torch.compile(mode="reduce-overhead") leaves these operators outside of its graphs.
_TAGS = (torch.Tag.cudagraph_unsafe,)
_masks = Operator(
    "mask_upsample",
    mask_upsample_reference,
    _empty_masks,
    triton=launcher("mask_upsample.masks"),
    cuda=_cuda_masks,
    unfit=_unfit,
    opaque=True,
    tags=_TAGS,
)
_labels = Operator(
    "label_upsample",
    label_upsample_reference,
    _empty_labels,
    triton=launcher("mask_upsample.labels"),
    cuda=_cuda_labels,
    unfit=_unfit,
    opaque=True,
    tags=_TAGS,
)
