"""TensorRT's plugin for `tarvis::MSDeformAttn`: an IPluginV3 whose enqueue launches the Triton kernel.

Inputs value, offset, logit (one float type) and ref (float32), as `export.functions` describes them, and the
levels' sizes as attribute `sizes`, since to read them from the device would be to wait for it. Everything is
contiguous; the output has value's type. One class serves `tensorrt` and `tensorrt_rtx`, when an engine is
built and when it runs: an engine can only be opened where the plugin is registered.

TensorRT's bindings catch what is raised here, print it, and let the build or the run fail; what `enqueue`
returns they ignore. A creator answers None and says why on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import DOMAIN, FLOATS, NAME

VERSION = "1"
INPUTS = 4  # value, offset, logit, ref

_registered: dict[str, Any] = {}  # library -> creator, which must live as long as the process


def register(trt: Any) -> int:
    """Make the plugin known to a TensorRT, once a process; no network needs flags for it."""
    if trt.__name__ not in _registered:
        creator = _classes(trt)()
        if not trt.get_plugin_registry().register_creator(creator, DOMAIN):
            raise RuntimeError(f"{trt.__name__} does not take the plugin {DOMAIN}::{NAME}")
        _registered[trt.__name__] = creator
    return 0


@dataclass(frozen=True)
class Pointer:
    """Device memory as an argument of a Triton kernel; `dtype` is torch's."""

    address: int
    dtype: Any

    def data_ptr(self) -> int:
        return self.address


def enqueue(
    kind: str,
    shapes: Sequence[tuple[int, ...]],
    sizes: tuple[int, ...],
    addresses: Sequence[int],
    stream: int,
) -> None:
    """Queue the kernel.

    Args:
        kind: the type of all tensors except ref, one of `FLOATS`.
        shapes: of value, offset, logit, ref.
        sizes: of levels: h0, w0, h1, w1, ..
        addresses: of the inputs and of the output.
    """
    import torch  # not to build an engine: see export.runtimes.tensorrt_build

    from .launch import launch_of

    dtype = getattr(torch, kind)
    value, _, logit, ref = shapes
    kinds = (dtype, dtype, dtype, torch.float32, dtype)
    with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
        launch_of(dtype, value, logit, ref, sizes)(*map(Pointer, addresses, kinds))


def _classes(trt: Any) -> Any:
    """The creator's class, over the interfaces of one TensorRT."""
    floats = {getattr(trt, name): name for name in FLOATS}

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[misc]
        """One node of a network, or of an engine."""

        def __init__(self, sizes: tuple[int, ...]) -> None:
            for base in Plugin.__bases__:
                base.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace = NAME, VERSION, DOMAIN
            self.num_outputs = 1
            self.sizes = sizes

        def get_capability_interface(self, _: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.sizes)

        def get_output_data_types(self, types: Any) -> Any:
            return [types[0]]

        def get_output_shapes(self, inputs: Any, _: Any, builder: Any) -> Any:
            value, _, logit, _ = inputs
            out = trt.DimsExprs(3)
            out[0], out[1] = value[0], logit[1]
            out[2] = builder.operation(trt.DimensionOperation.PROD, value[2], value[3])
            return [out]

        def supports_format_combination(self, position: int, tensors: Any, _: int) -> bool:
            tensor = tensors[position].desc
            if tensor.format != trt.TensorFormat.LINEAR:
                return False
            if position == INPUTS - 1:
                return bool(tensor.type == trt.float32)
            return tensor.type in floats if position == 0 else bool(tensor.type == tensors[0].desc.type)

        def configure_plugin(self, *_: Any) -> None:
            pass

        on_shape_change = set_tactic = configure_plugin

        def get_workspace_size(self, *_: Any) -> int:
            return 0

        def get_valid_tactics(self) -> list[int]:
            return []

        def attach_to_context(self, _: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            # TensorRT reads by pointer, after this has returned: array, field and list must live on
            self.kept = np.array(self.sizes, np.int32)
            self.field = trt.PluginField("sizes", self.kept, trt.PluginFieldType.INT32)
            self.fields = trt.PluginFieldCollection([self.field])
            return self.fields

        def enqueue(self, inputs: Any, _: Any, sources: Any, targets: Any, __: Any, stream: int) -> None:
            shapes = [tuple(x.dims) for x in inputs]
            enqueue(floats[inputs[0].type], shapes, self.sizes, [*sources, *targets], stream)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        """Makes plugins of a node's attributes, or of what an engine keeps of them."""

        def __init__(self) -> None:
            super().__init__()
            self.name, self.plugin_version, self.plugin_namespace = NAME, VERSION, DOMAIN
            self.field = trt.PluginField("sizes", np.array([], np.int32), trt.PluginFieldType.INT32)
            self.field_names = trt.PluginFieldCollection([self.field])

        def create_plugin(self, name: str, fields: Any, _: Any) -> Any:
            try:
                sizes = next(np.ravel(field.data) for field in fields if field.name == "sizes")
                return Plugin(tuple(int(side) for side in sizes))
            except Exception as error:
                print(f"{DOMAIN}::{NAME} {name}: {type(error).__name__}: {error}", file=sys.stderr)
                return None

    return Creator
