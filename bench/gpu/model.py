"""The whole model: encode + decode of a clip against its straightforward transcription."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.bench_model import FRAMES, HEIGHT, IMPLEMENTATIONS, TASKS, WIDTH, prepare
from bench.gpu.measure import peak_bytes
from bench.gpu.protocol import OUT_OF_TIME, Recorder
from kernels.dispatch import using


def model(record: Recorder) -> None:
    """Section: ResNet-50, in float32 and under bfloat16 autocast, with our kernels and with plain PyTorch."""
    amps = (torch.bfloat16, None)
    for task in TASKS[:1] if record.small else TASKS:
        for amp in amps[1:] if record.small else amps:
            name = f"{task} {FRAMES}x{HEIGHT}x{WIDTH} {'amp bf16' if amp else 'fp32'}"
            for implementation in IMPLEMENTATIONS:
                kernels = ("auto", "reference") if implementation == "tarvis" else ("auto",)
                for impl in kernels:
                    label = implementation if impl == "auto" else f"{implementation} plain PyTorch"
                    if not record.over():
                        _measure(record, name, label, implementation, task, amp, impl)
                    else:
                        record.not_run(name, label, OUT_OF_TIME)
                    record.free()


def _measure(
    record: Recorder, name: str, label: str, implementation: str, task: str, amp: Any, impl: Any
) -> None:
    try:
        run = prepare(implementation, task, "resnet50", device=record.device)
    except Exception as problem:
        record.not_run(name, label, f"{type(problem).__name__}: {problem}")
        return
    device = torch.device(record.device).type

    def call(_: Tensor) -> Tensor:
        with torch.inference_mode(), torch.autocast(device, amp, enabled=amp is not None), using(impl):
            return run()

    here = torch.zeros(1, device=record.device)  # tells the clock where the model is
    record.time(name, label, call, [(here,)])
    if device == "cuda":
        record.memory(name, label, lambda: peak_bytes(lambda: call(here)))
