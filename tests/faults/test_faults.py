"""Commands that are killed, or find the disk full: the same command then goes on to the same result."""

import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
import torch

from tarvis.data.synthetic import synthetic_clip
from tarvis.demo.synthetic_benchmarks import make_benchmark
from tarvis.model.weights import load_weights

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "configs" / "tiny.safetensors"
CLIPS = ["--min-size", "0", "--clip-length", "3", "--overlap", "1"]
TRAIN = ["data.num_workers=1", "optim.steps=4", "run.checkpoint_every=1", "run.summary_every=1"]
SMALL = ["model.decoder_layers=3", "model.neck_layers=1", "data.synthetic={num_videos: 8, size: [64, 96]}"]
COMMANDS = {
    "infer": ["frames", "--task", "vis,vps", "--weights", WEIGHTS, "--out", "out", *CLIPS],
    "evaluate": ["davis", "--data", "davis", "--weights", WEIGHTS, "--out", "out", "--submission", *CLIPS],
    "convert": [WEIGHTS, "out/weights.safetensors"],
    "train": ["--cfg", ROOT / "configs/tiny.yaml", "--model_dir", "out", "--set", *TRAIN, *SMALL],
}
every_verb = pytest.mark.parametrize("verb", COMMANDS)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What the commands read."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "frames").mkdir()
    for t, frame in enumerate(synthetic_clip(3, 9, (64, 96)).frames):
        cv2.imwrite(str(folder / "frames" / f"{t}.png"), frame)
    make_benchmark("davis", folder / "davis", num_videos=3, size=(64, 96), num_objects=2)
    (folder / "out").mkdir()
    return folder


@pytest.fixture
def start(given, tmp_path):
    """Starts a command in the folder `at`, which has what it reads."""

    def go(verb, at, **options):
        if not (tmp_path / at).exists():
            shutil.copytree(given, tmp_path / at)
        command = [sys.executable, "-m", f"tarvis.{verb}", *map(str, COMMANDS[verb])]
        return subprocess.Popen(
            command,
            cwd=tmp_path / at,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    return go


@pytest.fixture(scope="module")
def whole():
    """Results of runs that nothing happened to, and how long these took, by verb."""
    return {}


@pytest.fixture
def expected(start, tmp_path, whole):
    def of(verb):
        if verb not in whole:
            began = time.monotonic()
            process = start(verb, "whole")
            error = process.communicate()[1]
            assert process.returncode == 0, error
            whole[verb] = made(tmp_path / "whole"), time.monotonic() - began
        return whole[verb]

    return of


def made(folder):
    """All files of a folder, hidden ones too: of weights their tensors; not those with dates or paths."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".pth":
            content = torch.load(path)
            found[name] = {key: x.tolist() for key, x in content["model"].items()} | {"step": content["step"]}
        elif path.suffix == ".safetensors":  # whose header has its entries in any order
            state, config = load_weights(path)
            found[name] = {key: x.tolist() for key, x in state.items()} | {"config": config}
        elif "tfevents" not in name and path.name not in ("log.jsonl", "run.json"):
            found[name] = path.read_bytes()
    return found


def goes_on(start, verb, folder, expected):
    process = start(verb, folder.name)
    error = process.communicate()[1]
    # it may have ended before anything happened to it
    assert process.returncode == 0 or "out: already exists" in error, error
    found = made(folder)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


@every_verb
@pytest.mark.parametrize("share", [0.55, 0.75, 0.95])
def test_what_was_killed_goes_on_to_the_same_result(verb, share, start, expected, tmp_path):
    result, seconds = expected(verb)
    process = start(verb, "killed")
    time.sleep(share * seconds)
    process.kill()
    process.communicate()
    goes_on(start, verb, tmp_path / "killed", result)


@every_verb
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_stopped_leaves_no_litter_and_goes_on(verb, number, start, expected, tmp_path):
    result, seconds = expected(verb)
    process = start(verb, "stopped")
    time.sleep(0.7 * seconds)
    process.send_signal(number)
    error = process.communicate()[1]
    assert process.returncode in (0, 128 + number, -number), error  # the last: before or after its work
    assert not [path for path in tmp_path.rglob(".*") if path.name.endswith((".part", ".lock", ".old"))]
    goes_on(start, verb, tmp_path / "stopped", result)


@every_verb
def test_a_full_disk_is_one_line_and_the_command_goes_on_when_there_is_room(verb, start, expected, tmp_path):
    result, _ = expected(verb)
    least = 100 if verb in ("infer", "evaluate") else 200_000

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (least, least))

    process = start(verb, "full", preexec_fn=limit)
    error = process.communicate()[1]
    assert process.returncode == 2, error
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("error: ")
    assert not [path for path in tmp_path.rglob(".*") if path.name.endswith((".part", ".lock", ".old"))]
    goes_on(start, verb, tmp_path / "full", result)
