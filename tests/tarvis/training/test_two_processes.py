"""Two processes have the numbers of one, and gradients whatever each of them uses; one may be killed.

Under torchrun this file is the program that trains on clips made to measure: `learn` says on which.
"""

import dataclasses
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from tarvis.data.batch import Sample
from tarvis.data.loader import collate
from tarvis.distributed import World, world
from tarvis.model import build_model
from tarvis.training.config import load_config
from tarvis.training.trainer import Trainer

TRAIN = ("-m", "tarvis.train")

# What the four clips of a step show: how many objects are given by a mask, how many by a point. The first two
# are trained on first, one by each process, and are not synchronised; the last two are.
GIVEN = {
    "points in what is not synchronised": [(1, 1), (1, 1), (2, 0), (1, 0)],
    "points in one process, not synchronised": [(2, 0), (2, 1), (1, 0), (1, 0)],
    "points in one process, synchronised": [(1, 0), (2, 0), (1, 1), (1, 0)],
    "only points in one process": [(0, 2), (1, 0), (0, 1), (3, 0)],
    "only points": [(0, 1), (0, 2), (0, 3), (0, 1)],
    "only masks": [(1, 0), (2, 0), (3, 0), (1, 0)],
}
THINGS = {
    "vis, no objects in one process": [0, 3, 0, 1],
    "vps, no objects in what is synchronised": [2, 1, 0, 0],
    "vps, no objects": [0, 0, 0, 0],
}


@pytest.mark.slow
def test_two_processes_have_the_loss_curve_of_one_and_a_killed_run_goes_on(
    arguments, run, start, numbers, wait_for, children, runs
):
    changes = ["optim.steps=6", "data.point_share=0.4", "run.ema=0.9", "data.chunk=2"]
    whole = start(*TRAIN, *arguments("whole", *changes, "run.checkpoint_every=3"), processes=2)
    assert run("one", *changes)[0] == 0
    assert whole.communicate()[1].count("Traceback") == 0
    for one, two in zip(numbers("one"), numbers("whole"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["gradient"] == pytest.approx(one["gradient"], rel=1e-4)
        terms = {name: value for name, value in one.items() if "/" in name}
        assert terms
        assert {name: two[name] for name in terms} == pytest.approx(terms, rel=1e-4)

    own = [*changes, "data.num_workers=1"]
    killed = start(*TRAIN, *arguments("killed", *own), processes=2)
    wait_for(killed, "killed", 3)
    children(killed)[1].kill()
    err = killed.communicate(timeout=300)[1]  # long before the run's own --timeout
    assert killed.returncode != 0
    assert "error: process 0: another process of the run has ended" in err
    kept = int(max((runs / "killed").glob("*.pth")).stem)  # by the process that is left
    assert 3 <= kept < 6
    assert f"stopped at {kept} of 6 steps; start again to go on" in err
    again = start(*TRAIN, *arguments("killed", *own), processes=2)
    assert "Traceback" not in again.communicate()[1]
    same(*(torch.load(runs / name / "000006.pth") for name in ("killed", "whole")))

    # amid a chunk, with another number of processes
    shutil.copytree(runs / "whole", runs / "fewer")
    (runs / "fewer" / "000006.pth").unlink()
    code, _, err = run("fewer")
    assert code == 0
    assert f"goes on from {runs / 'fewer' / '000003.pth'}" in err
    for one, two in zip(numbers("fewer"), numbers("whole"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.slow
def test_gradients_are_those_of_one_process_whatever_parameters_each_uses(start, runs):
    folder = runs / "learned"
    folder.mkdir()
    two = start(Path(__file__), runs / "tiny.yaml", folder, processes=2)
    alone = learn(runs / "tiny.yaml")
    err = two.communicate()[1]
    assert two.returncode == 0, err
    ranks = [torch.load(folder / f"{rank}.pth") for rank in (0, 1)]
    assert len(alone) == len(GIVEN) + len(THINGS) + 2
    for case, (gradients, told) in alone.items():
        for of_rank, (found, told_rank) in enumerate(rank[case] for rank in ranks):
            assert told_rank[1] == told[1], case
            if told[1]:
                continue  # the gradient is not a number
            assert told_rank[0] == pytest.approx(told[0], rel=1e-5), case
            assert found.keys() == gradients.keys(), (case, of_rank, found.keys() ^ gradients.keys())
            # where the true gradient is zero, all that is left is the rounding of larger ones
            largest = max(gradient.abs().max() for gradient in gradients.values())
            for name, gradient in gradients.items():
                scale = gradient.abs().max().clamp(min=1e-2 * largest)
                assert (found[name] - gradient).abs().max() < 1e-4 * scale, (case, of_rank, name)
    used = alone["only points"][0].keys()
    assert "object_encoder.point_embed" in used
    assert alone["a bad value in one process"][1][1]
    assert not alone["after it"][1][1]


def same(one, other):
    """Checkpoints that do not differ in a bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            if key != "config":  # how often a checkpoint is written makes no difference
                same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            same(a, b)
    else:
        assert one == other


# The program


def learn(path, here=None):
    """By case, the gradient of its step by parameter, and what the step tells: loss, whether it is bad."""
    here = here or World()
    # layers are computed again where there are two: nothing changes
    again = f"run.checkpoint_activations={here.size > 1}"
    config = load_config(path, ["optim.clip_norm=0", "optim.lr=0", again])
    torch.manual_seed(0)
    network = build_model(dataclasses.replace(config.model, class_sets={"synthetic": 8}))
    trainer = Trainer(network, config, here)
    sent = Counter()  # of each bucket of gradients, how often
    if here.size > 1:
        trainer._loss.register_comm_hook(sent, send)
    cases = {name: [given(k, *n) for k, n in enumerate(numbers)] for name, numbers in GIVEN.items()}
    for name, counts in THINGS.items():
        cases[name] = [things(name[:3], k, count) for k, count in enumerate(counts)]
    cases["a bad value in one process"] = cases["after it"] = [things("vps", k, 1) for k in range(4)]
    found = {}
    for name, batches in cases.items():
        before = {key: value.clone() for key, value in network.state_dict().items()}
        is_hit = name == "a bad value in one process" and here.rank == here.size - 1
        hook = network.decoder.proj_layers["instance"].register_forward_hook(nothing) if is_hit else None
        sent.clear()
        (step,) = trainer.run(iter([batches[here.rank :: here.size]]))
        assert here.size == 1 or set(sent.values()) == {1}, sent  # a step, not a micro-batch
        if hook is not None:
            hook.remove()
        gradients = {key: p.grad.clone() for key, p in network.named_parameters() if p.grad is not None}
        found[name] = gradients, (step.loss, step.is_bad)
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    return found


def send(sent, bucket):
    sent[bucket.index()] += 1
    return allreduce_hook(None, bucket)


def nothing(*called):
    return called[-1] * float("nan")


def clip(seed, count):
    """Two frames of noise with rectangles."""
    random = np.random.default_rng(seed)
    frames = random.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    ids = np.zeros((1, 2, 64, 64), np.uint8)
    for k in range(count):
        ids[0, :, 10 + 2 * k : 50, 16 * k + 4 : 16 * k + 15] = k + 1
    labels = tuple(int(label) for label in random.integers(0, 5, count))
    semantic = np.where(ids[0] > 0, 1, 6).astype(np.uint8)
    return Sample(f"clip {seed}", frames, ids, labels, semantic)


def given(seed, by_mask, by_point):
    return collate("synthetic", "vos", [clip(seed, by_mask + by_point)], num_points=partial(min, by_point))


def things(task, seed, count):
    return collate("synthetic", task, [clip(seed, count)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    with world() as joined:
        learned = learn(Path(sys.argv[1]), joined)
        torch.save(learned, Path(sys.argv[2]) / f"{joined.rank}.pth")
