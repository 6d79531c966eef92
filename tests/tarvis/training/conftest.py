"""Runs of the command so small that a step takes a fraction of a second, alone and as two processes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from tarvis.data.batch import Sample
from tarvis.train import main

TINY = Path(__file__).parents[3] / "configs" / "tiny.yaml"


@pytest.fixture(scope="session")
def settings():
    """What is set in a tiny run: all tasks, a step of four clips, one at a time."""
    tree = yaml.safe_load(TINY.read_text())
    small = {"hidden_dim": 64, "num_heads": 2, "neck_layers": 1, "decoder_layers": 3}
    tree["model"] |= small | {"decoder_ffn_dim": 128, "object_encoder_layers": 1, "num_instance_queries": 6}
    tree["data"] = {
        "train": ["synthetic"],
        "synthetic": {"num_videos": 8, "num_frames": 4, "size": [64, 96], "most_objects": 3},
        "clip_length": 2,
        "chunk": 1,
        "num_workers": 0,
    }
    tree["loss"] = {"points": 64, "semantic_points": 96}
    tree["optim"] = {"lr": 1e-4, "steps": 6, "batch_size": 4}
    tree["run"] = {"checkpoint_every": 100, "summary_every": 1, "picture_every": 0}
    return tree


@pytest.fixture(scope="module")
def runs(tmp_path_factory, settings):
    """The folder of the runs of a test file."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture
def arguments(runs):
    """The command line of a run."""

    def of(name, *changes, options=()):
        found = ["--cfg", runs / "tiny.yaml", "--model_dir", runs / name, "--device", "cpu"]
        return [str(each) for each in (*found, *options, *(("--set", *changes) if changes else ()))]

    return of


@pytest.fixture
def run(arguments, capsys):
    """Runs the command here; gives exit code, what stdout's one line says, and stderr."""

    def go(name, *changes, options=()):
        code = main(arguments(name, *changes, options=options))
        printed = capsys.readouterr()
        return code, json.loads(printed.out) if printed.out else None, printed.err

    return go


@pytest.fixture
def start():
    """Starts `python ARGUMENTS` as a process, or as several under torchrun."""
    started = []

    def go(*arguments, processes=1):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        process = subprocess.Popen(
            [sys.executable, *(launch if processes > 1 else ()), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TINY.parents[1])},
        )
        started.append(process)
        return process

    yield go
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def numbers(runs):
    """What log.jsonl says of the steps of a run."""

    def of(name):
        path = runs / name / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    return of


@pytest.fixture
def wait_for(numbers):
    """Waits until a process has trained so many steps of a run."""

    def wait(process, name, steps):
        deadline = time.monotonic() + 600
        while len(numbers(name)) < steps:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    return wait


@pytest.fixture(scope="session")
def children():
    """The processes that torchrun started, by rank."""

    def of(process):
        found = psutil.Process(process.pid).children()
        return sorted(found, key=lambda child: int(child.environ()["RANK"]))

    return of


@pytest.fixture(scope="session")
def samples():
    """Makes a clip of two frames of noise with so many objects."""

    def make(seed, count, size=(64, 64)):
        random = np.random.default_rng(seed)
        frames = random.integers(0, 256, (2, *size, 3), dtype=np.uint8)
        ids = np.zeros((1, 2, *size), np.uint8)
        for k in range(count):
            ids[0, :, 10:30, 16 * k + 4 : 16 * k + 15] = k + 1
        labels = tuple(random.integers(0, 5, count).tolist())
        return Sample(f"clip {seed}", frames, ids, labels, np.where(ids[0] > 0, 1, 6).astype(np.uint8))

    return make
