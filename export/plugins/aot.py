"""The plugin ahead of time: PTX of the Triton kernel inside the engine, which then needs no Python to run.

Through TensorRT's quick-deployable plugins (`tensorrt.plugin`), which TensorRT-RTX has not. Written from the
vendor's documentation and not run yet: see export/README.md. An engine holds PTX for the GPU it was built on.
"""

# ruff: noqa: ARG001  # TensorRT compares signatures, and reads annotations as values
# mypy: disable-error-code="valid-type, untyped-decorator, name-defined, attr-defined"

import functools
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtimes import RefusalError
from . import DOMAIN, FLOATS, NAME

BROKEN = ((10, 14),)
"""(major, minor) of TensorRT whose quick-deployable plugins do not work."""


@functools.cache
def register(trt: Any) -> int:
    """Make the plugin known, once a process; returns the flags that a network needs for it.

    Raises:
        RefusalError: this TensorRT has no quick-deployable plugins compiled ahead of time.
    """
    flags = trt.NetworkDefinitionCreationFlag.__members__
    why = ""
    if find_spec(f"{trt.__name__}.plugin") is None or "PREFER_AOT_PYTHON_PLUGINS" not in flags:
        why = "has no quick-deployable plugins compiled ahead of time (TensorRT has, from 10.9)"
    elif tuple(map(int, trt.__version__.split(".")[:2])) in BROKEN:
        why = "has them broken (10.15 and later work)"
    if why:
        said = f"--plugin aot: {trt.__name__} {trt.__version__} {why}"
        raise RefusalError(f"{said}; take --plugin triton or none")
    _describe(trt, import_module(f"{trt.__name__}.plugin"))
    return 1 << int(flags["PREFER_AOT_PYTHON_PLUGINS"])


def _describe(trt: Any, qdp: Any) -> None:
    """Give `tensorrt.plugin` the shapes, types and code of the plugin."""
    import torch

    from .launch import Launch
    from .ptx import compile_ptx

    dtypes = {getattr(trt, name): getattr(torch, name) for name in FLOATS}
    name, Tensor, Sizes = f"{DOMAIN}::{NAME}", qdp.TensorDesc, npt.NDArray[np.int32]

    @qdp.register(name)
    def shapes(value: Tensor, offset: Tensor, logit: Tensor, ref: Tensor, sizes: Sizes) -> Tensor:
        B, _, A, D = value.shape_expr
        return qdp.from_shape_expr((B, logit.shape_expr[1], A * D), dtype=value.dtype)

    @qdp.autotune(name)
    def types(
        value: Tensor, offset: Tensor, logit: Tensor, ref: Tensor, sizes: Sizes, outputs: tuple[Tensor]
    ) -> list[qdp.AutoTuneCombination]:
        every = [f"{kind}, {kind}, {kind}, FP32, {kind}" for kind in ("FP32", "FP16", "BF16")]
        return [qdp.AutoTuneCombination(types, "LINEAR") for types in every]

    @qdp.aot_impl(name)
    def code(
        value: Tensor,
        offset: Tensor,
        logit: Tensor,
        ref: Tensor,
        sizes: Sizes,
        outputs: tuple[Tensor],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, qdp.KernelLaunchParams, qdp.SymExprs]:
        # only the number of frames is free, and only the grid depends on it
        a, b, c = (
            [n.constant_value() if n.is_constant else 1 for n in x.shape_expr] for x in (value, logit, ref)
        )
        launch = Launch.of(dtypes[value.dtype], a, b, c, [int(side) for side in sizes])
        major, minor = torch.cuda.get_device_capability()
        kernel = compile_ptx(launch.variant, 10 * major + minor)
        numbers = [n for n in kernel.parameters if n in launch.numbers]
        extra = qdp.SymIntExprs(len(numbers))
        for i, number in enumerate(numbers):
            extra[i] = qdp.SymInt32(launch.numbers[number])
        params = qdp.KernelLaunchParams()
        params.grid_x = value.shape_expr[0] * (launch.grid[0] // a[0])
        params.block_x, params.shared_mem = kernel.threads, kernel.shared
        return kernel.name, kernel.text, params, extra
