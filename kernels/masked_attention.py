"""Cross-attention that reads a bit per (query, key) (Cheng et al. 2022, Mask2Former, eq. 1).

    out = softmax(q k^T / sqrt(D) + m) v,  m = 0 where visible or where the query sees nothing, else -inf

The mask is shared by all heads. A query that sees no key at all attends to every key. Mask2Former instead
fills such rows of a float mask, one copy a head.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import FLOATS, Impl, require, unfit_dtype
from .mask_bits import unpack_bits
from .operator import Operator, differentiate, launcher, register, runner

HEAD_DIMS = (16, 32, 64)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, bits: Tensor, seen: Tensor, *, impl: Impl = "auto"
) -> Tensor:
    """Masked multi-head cross-attention.

    Args:
        q: [B, A, Q, D] float, any strides; the kernels take D = 16, 32 and 64.
        k: [B, A, N, D].
        v: [B, A, N, D].
        bits: [B, Q, 4 * ceil(N / 32)] uint8, as `mask_bits` gives them.
        seen: [B, Q] bool, False for queries without a visible key.
        impl: see `kernels.dispatch`. The kernels accumulate in float32, whatever the dtypes, and take the
            softmax in float32; their gradients are the same bit for bit in every run.

    Returns:
        [B, A, Q, D] in the dtype of `q`, a view of [B, Q, A, D] from the kernels. Differentiable in q, k and
        v; the mask has no gradient. Zeros without keys (N = 0), and for a query that has no visible key
        although `seen` says so. Autocast leaves the kernels' inputs as they are; plain PyTorch computes in
        the autocast dtype, and otherwise in the widest of the inputs'.

    Raises:
        ValueError: shapes that do not fit together, bits of another length than the keys need.
        RuntimeError: the implementation asked for cannot run.
    """
    _check(q, k, v, bits, seen)
    chosen = _operator.choose(impl, q, k, v, bits, seen)
    if chosen == "reference":
        return masked_attention_reference(q, k, v, bits, seen)
    return _operator.run(q, k, v, bits, seen, chosen)[0]


def masked_attention_reference(q: Tensor, k: Tensor, v: Tensor, bits: Tensor, seen: Tensor) -> Tensor:
    """Defines the operator."""
    visible = unpack_bits(bits, k.shape[2]) | ~seen[..., None]  # [B, Q, N]
    widest = reduce(torch.promote_types, (k.dtype, v.dtype), q.dtype)
    out = F.scaled_dot_product_attention(q.to(widest), k.to(widest), v.to(widest), attn_mask=visible[:, None])
    return out.to(q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, bits: Tensor, seen: Tensor) -> None:
    require("masked_attention", FLOATS, q=q, k=k, v=v)
    require("masked_attention", (torch.uint8,), bits=bits)
    require("masked_attention", (torch.bool,), seen=seen)
    if q.ndim != 4 or k.shape != v.shape or k.shape[:2] + k.shape[3:] != q.shape[:2] + q.shape[3:]:
        raise ValueError(
            f"expected [B, A, Q, D] and twice [B, A, N, D], "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    B, Q, N = q.shape[0], q.shape[2], k.shape[2]
    if seen.shape != (B, Q) or bits.shape[:-1] != (B, Q):
        raise ValueError(
            f"expected bits [{B}, {Q}, ..] and seen [{B}, {Q}], got {list(bits.shape)} and {list(seen.shape)}"
        )
    words = (N + 31) // 32
    if bits.shape[-1] != 4 * words:
        raise ValueError(f"expected {4 * words} bytes a query for {N} keys, got {bits.shape[-1]}")


def _unfit(q: Tensor, k: Tensor, v: Tensor, bits: Tensor, seen: Tensor) -> str:
    if q.shape[-1] not in HEAD_DIMS:
        return f"its kernels take 16, 32 or 64 channels a head, not {q.shape[-1]}"
    if q.shape[1:].numel() >= 2**31:
        return f"its kernels take fewer than 2^31 values of queries a batch entry, not {q.shape[1:].numel()}"
    return unfit_dtype(q, k, v)


def _plain(q: Tensor, k: Tensor, v: Tensor, bits: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """As the kernels: the output in their layout, and zeros in the place of the log-sum-exp."""
    out = masked_attention_reference(q, k, v, bits, seen)
    lse = q.new_zeros(q.shape[:3], dtype=torch.float32)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _empty(x: Tensor) -> Tensor:
    B, A, n, D = x.shape
    return x.new_empty(B, n, A, D).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, bits, seen, out, lse = ctx.saved_tensors
    if _operator.chosen(ctx.impl, q, k, v, bits, seen) == "triton":
        grads = _run_backward(grad, q, k, v, bits, seen, out, lse)
        return *grads, None, None, None

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attention_reference(q, k, v, bits, seen)

    return *differentiate(function, (q, k, v), ctx.needs_input_grad[:3], grad), None, None, None


_operator = Operator(
    "masked_attention",
    _plain,
    _fake,
    triton=launcher("masked_attention.forward"),
    unfit=_unfit,
    save=_save,
    backward=_backward,
)

_launch_backward = launcher("masked_attention.backward")


def _triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bits: Tensor, seen: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_backward(grad, q, k, v, bits, seen, out, lse)


def _fake_backward(_: Tensor, q: Tensor, k: Tensor, v: Tensor, *__: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q), _empty(k), _empty(v)


register("masked_attention_backward", _triton_backward, _fake_backward, opaque=True)
_run_backward = runner("masked_attention_backward")
