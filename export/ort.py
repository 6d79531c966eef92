"""ONNX Runtime: the graphs of `export.to_onnx` as they are, on a CPU or an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from export.manifest import Manifest
from tarvis.structures import InputError

VISIBLE = "GreaterOrEqual"
"""The node that makes attention bits (`export.rewrites.visible_keys`); a decoder has no other of its kind."""


class OrtGraph:
    """One graph in a session. Tensors go in by name and come out by name, on the session's device."""

    def __init__(self, path: Path, device: torch.device) -> None:
        import onnxruntime as ort

        self.device = device
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = ort.InferenceSession(path, options, providers=_providers(ort, device))
        except Exception as error:  # its own classes differ between versions
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: ONNX Runtime cannot run it on {device}: {reason}") from None
        self.outputs = [output.name for output in self.session.get_outputs()]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = {name: value.detach().to(self.device).contiguous() for name, value in inputs.items()}
        if self.device.type == "cpu":
            values = self.session.run(self.outputs, {name: value.numpy() for name, value in tensors.items()})
            found = [torch.from_numpy(value) for value in values]
        else:
            found = self._run_on_device(tensors)
        return dict(zip(self.outputs, found, strict=True))

    def _run_on_device(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Inputs and outputs stay on the GPU; work is queued on torch's stream without waiting for it."""
        import onnxruntime as ort

        index = self.device.index or 0
        binding = self.session.io_binding()
        for name, value in tensors.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.from_dlpack(value))
        for name in self.outputs:
            binding.bind_output(name, "cuda", index)
        options = ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.session.run_with_iobinding(binding, options)
        return [from_dlpack(value) for value in binding.get_outputs()]


def attention_bits(path: Path, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Which keys each query sees in every layer of a decoder graph, bool [B, Q, N], for `export.check`."""
    import onnx
    import onnxruntime as ort

    model = onnx.load(path)
    names = [node.output[0] for node in model.graph.node if node.op_type == VISIBLE]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(names, {name: value.cpu().contiguous().numpy() for name, value in inputs.items()})
    return [torch.from_numpy(visible) for visible in found]


def open_graphs(folder: Path, manifest: Manifest, device: torch.device) -> dict[str, OrtGraph]:
    """A session for every graph of a folder.

    Raises:
        InputError: ONNX Runtime is not installed, or cannot run these graphs on that device.
    """
    if find_spec("onnxruntime") is None:
        raise InputError("onnxruntime is not installed: pip install 'tarvis[export]', or onnxruntime-gpu")
    return {name: OrtGraph(folder / file, device) for name, file in manifest.graphs.items()}


def _providers(ort: Any, device: torch.device) -> list[Any]:
    if device.type == "cpu":
        return ["CPUExecutionProvider"]
    if device.type != "cuda" or "CUDAExecutionProvider" not in ort.get_available_providers():
        raise InputError(f"this ONNX Runtime cannot use {device}: install onnxruntime-gpu in its place")
    stream = torch.cuda.current_stream(device).cuda_stream
    return [("CUDAExecutionProvider", {"device_id": device.index or 0, "user_compute_stream": str(stream)})]
