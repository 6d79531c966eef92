"""Time and memory of a training step: TarViS against its transcription, which makes all logits.

    python -m bench.bench_train_step --out bench/results/train_step_cpu.json
    pytest bench/bench_train_step.py --benchmark-only    # a smaller clip, to see that it runs

One clip of 3 frames of 256 x 448 with four objects, float32, two CPU threads, published sizes and numbers of
points, random weights. A step is forward, losses, backward, gradient clipping and AdamW. "checkpointed" is
ours when layers are computed again in the backward pass (`run.checkpoint_activations`).

The command measures each run in a fresh process, implementations in turn, and reports medians. Memory is
resident memory, at its peak:

* of a step: above the model, the state of the optimiser and the inputs; gradients count.
* of decoder and losses: above the features and what `encode` keeps for its own backward pass, until their
  gradients have been computed. (The gradients of the features count, those of their parameters too.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from bench.fresh import THREADS, Numbers, forget_peak, in_fresh_process, in_turn, parse, resident, rows, write
from bench.timing import DEVICE, gpu_clock, machine
from bench.yardstick import objectives as plain
from bench.yardstick.network import Transcription
from tarvis.config import LossConfig, ModelConfig
from tarvis.data.batch import Batch
from tarvis.model import TarVis, build_model
from tarvis.model.layers import recompute_activations
from tarvis.structures import Features
from tarvis.tasks import TASKS
from tarvis.tasks.losses import uniform_points
from tarvis.tasks.task import Objective

CLIP = 3, 256, 448
SMALL_CLIP = 2, 64, 128
NUM_OBJECTS = 4
IMPLEMENTATIONS = ("tarvis", "checkpointed", "transcription")
CASES = ("vis", "vos")
SETTINGS = LossConfig()
CLASS_SET = "youtube_vis_2021"
IN_TRAINING: dict[str, Any] = {"QUERIES_PER_OBJECT": 4, "MAX_SAMPLES": 2048}
"""Of the transcription, which has the numbers of inference."""
TARGETS = {
    ("tarvis", "seconds"): 0.75,
    ("tarvis", "decoder_mb"): 0.5,
    ("checkpointed", "step_mb"): 0.6,
}
"""At most this share of what the transcription takes."""

Maps = list[Tensor]  # strides 32, 16, 8, 4


@dataclass(frozen=True)
class Step:
    """A step in its parts."""

    network: nn.Module
    encode: Callable[[], Maps]
    loss: Callable[[Maps], Tensor]

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters(), lr=1e-4, weight_decay=0.05)

    def run(self, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.encode())
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 0.01)
        optimizer.step()
        return loss.detach()


def prepare(implementation: str, task: str, clip: tuple[int, int, int] = CLIP, device: str = "cpu") -> Step:
    torch.manual_seed(0)
    batch = clip_with_objects(task, clip).to(device)
    if implementation == "transcription":
        return of_transcription(Transcription("resnet50").to(device), batch)
    network = build_model(ModelConfig(backbone="resnet50")).to(device)
    if implementation == "checkpointed":
        recompute_activations(network)
    return of_tarvis(network, batch)


def of_tarvis(network: TarVis, batch: Batch, uniform: plain.Draw | None = None) -> Step:
    network.train()
    device = batch.frames.device
    uniform = uniform or uniform_points(device, torch.Generator(device).manual_seed(0))
    objective = Objective(SETTINGS, uniform, torch.tensor(float(batch.num_targets), device=device))

    def encode() -> Maps:
        features = network.encode(batch.frames)
        return [*features.memory, features.mask_features]

    def loss(maps: Maps) -> Tensor:
        features = Features((maps[0], maps[1], maps[2]), maps[3])
        return TASKS[batch.task].loss(network, features, batch, objective).total

    return Step(network, encode, loss)


def of_transcription(network: Transcription, batch: Batch, draw: plain.Draw | None = None) -> Step:
    """Of a single clip. Its masks come one-hot, as the published loader gives them."""
    network.train()
    frames, (masks,) = batch.frames[0], batch.masks()
    draw = draw or uniform_points(frames.device, torch.Generator(frames.device).manual_seed(0))

    def vis(maps: Maps) -> Tensor:
        contents, embeds, groups = network.embedding_container.detection("YOUTUBE_VIS")
        found = network.decode(maps, contents[None], embeds[None], groups)
        assert found.class_logits is not None
        instance, background, semantic = found.mask_logits.split(list(groups.values()), 2)
        classes, P = [1 + batch.labels], SETTINGS.points
        every = torch.cat([background.max(2, keepdim=True).values, semantic], 2)
        terms = plain.instance_loss(instance, found.class_logits, [masks], classes, P, draw)
        of_classes = plain.semantic_loss(every, [masks], classes, P, draw, w_ce=SETTINGS.vis_semantic)
        return terms["total"].sum() + of_classes["total"].sum()

    def vos(maps: Maps) -> Tensor:
        nowhere = masks.new_zeros(0, 2, dtype=torch.float32)
        features = maps[-1][0, :1].detach()  # pixels of masks send no gradient back, as published
        with mock.patch.multiple("bench.yardstick.network", **IN_TRAINING):
            queries = network.vos_query_extractor(features, masks[:, :1], [m[0, :0] for m in maps], nowhere)
        contents = torch.cat([queries.background, queries.objects])
        groups = {"background_vos": len(queries.background), "vos": len(queries.objects)}
        embeds = network.embedding_container.object_embeds(groups)
        found = network.decode(maps, contents[None], embeds[None], groups)
        counts = [groups["background_vos"], *[IN_TRAINING["QUERIES_PER_OBJECT"]] * len(masks)]
        logits = plain.condense(found.mask_logits, counts)
        return plain.object_loss(logits, masks[None], SETTINGS.points, draw)["total"].sum()

    return Step(network, lambda: network.encode(frames), {"vis": vis, "vos": vos}[batch.task])


def clip_with_objects(task: str, clip: tuple[int, int, int]) -> Batch:
    """Noise with ellipses of different sizes that move along the diagonal."""
    T, H, W = clip
    t, y, x = torch.arange(T)[:, None, None], torch.arange(H)[:, None], torch.arange(W)
    layers = torch.zeros(T, H, W, dtype=torch.uint8)
    for n in range(NUM_OBJECTS):
        place = (2 * n + 1) / (2 * NUM_OBJECTS) + 0.02 * t
        inside = ((y - place * H) / (H / (9 - n))) ** 2 + ((x - place * W) / (W / (10 - n))) ** 2 <= 1
        layers[inside] = n + 1
    return Batch(
        set_name=CLASS_SET,
        task=task,
        names=("ellipses",),
        frames=torch.randint(0, 256, (1, T, 3, H, W), dtype=torch.uint8),
        layers=layers[None, None],
        counts=(NUM_OBJECTS,),
        labels=torch.arange(NUM_OBJECTS),
        semantic=None,
        extent=torch.ones(1, 2),
        points=torch.zeros(1, 0, 2),
    )


@pytest.mark.benchmark(group="training step", timer=gpu_clock)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("task", CASES)
def test_step(benchmark: Any, task: str, implementation: str) -> None:
    step = prepare(implementation, task, SMALL_CLIP, DEVICE)
    loss = benchmark.pedantic(step.run, (step.optimizer(),), rounds=2, warmup_rounds=1)
    assert loss.isfinite()


def measure(task: str, implementation: str) -> Numbers:
    """In this process, which must be fresh: seconds and peak memory of a second step."""
    torch.set_num_threads(THREADS)
    step = prepare(implementation, task)
    optimizer = step.optimizer()
    step.run(optimizer)  # threads start, kernels are chosen, the optimiser has its state
    optimizer.zero_grad(set_to_none=True)
    before = forget_peak()
    start = time.perf_counter()
    step.run(optimizer)
    return {"seconds": time.perf_counter() - start, "step_mb": resident("VmHWM") - before}


def measure_decoder(task: str, implementation: str) -> Numbers:
    """In this process, which must be fresh: peak memory of decoder and losses with their backward pass."""
    torch.set_num_threads(THREADS)
    step = prepare(implementation, task)
    step.loss([x.detach() for x in step.encode()])  # as above
    features = step.encode()  # with all that its backward pass needs
    leaves = [x.detach().requires_grad_() for x in features]
    before = forget_peak()
    step.loss(leaves).backward()
    return {"decoder_mb": resident("VmHWM") - before}


def measure_both(task: str, implementation: str) -> Numbers:
    return {
        **in_fresh_process(measure, task, implementation),
        **in_fresh_process(measure_decoder, task, implementation),
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(__doc__, argv, repeats=5)
    cases = [(task, implementation) for task in CASES for implementation in IMPLEMENTATIONS]
    results = rows(in_turn(cases, args.repeats, measure_both), "task", "implementation")
    about = {
        "command": f"python -m bench.bench_train_step --out {args.out.name} --repeats {args.repeats}",
        "clip": list(CLIP),
        "dtype": "float32",
        "objects": NUM_OBJECTS,
        "backbone": "resnet50",
        "machine": {**machine(), "threads": THREADS},
    }
    write(args.out, {**about, "results": results})
    print(table(results))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians, and as a share of the transcription's; a share below 1 is in favour of tarvis."""
    by_case = {(row["task"], row["implementation"]): row for row in rows}
    lines = []
    for (task, implementation), row in by_case.items():
        for name in ("seconds", "step_mb", "decoder_mb"):
            share = row[name] / by_case[task, "transcription"][name]
            target = TARGETS.get((implementation, name))
            asked = "" if target is None else f"at most {target}: {'met' if share <= target else 'MISSED'}"
            lines.append(f"{task:5}{implementation:15}{name:12}{row[name]:10.2f}{share:8.2f}  {asked}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
