"""Commands that are killed, or find disk or memory full: the same command then goes on to the same result."""

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
from safetensors import safe_open

from tarvis.data.synthetic import synthetic_clip
from tarvis.demo.synthetic_benchmarks import make_benchmark

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
WEIGHTS = ROOT / "configs" / "tiny.safetensors"
CLIPS = ["--min-size", "0", "--clip-length", "3", "--overlap", "1"]
TRAIN = ["data.num_workers=1", "optim.steps=4", "run.checkpoint_every=1", "run.summary_every=1"]
SMALL = ["model.decoder_layers=3", "model.neck_layers=1", "data.synthetic={num_videos: 8, size: [64, 96]}"]
GRAPHS = ["--task", "pet", "--size", "64x96", "--frames", "2"]
COMMANDS = {
    "tarvis.infer": ["frames", "--task", "vis,vps", "--weights", WEIGHTS, "--out", "out", *CLIPS],
    "tarvis.evaluate": [
        "davis",
        "--data",
        "davis",
        "--weights",
        WEIGHTS,
        "--out",
        "out",
        "--submission",
        *CLIPS,
    ],
    "tarvis.convert": [WEIGHTS, "out/weights.safetensors"],
    "tarvis.train": ["--cfg", ROOT / "configs/tiny.yaml", "--model_dir", "out", "--set", *TRAIN, *SMALL],
    "export.to_onnx": [
        "--weights",
        WEIGHTS,
        "--task",
        "pet",
        "--size",
        "64x96",
        "--frames",
        "2",
        "--out",
        "out",
    ],
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
        command = [sys.executable, "-m", verb, *map(str, COMMANDS[verb])]
        return subprocess.Popen(
            command,
            cwd=tmp_path / at,
            env=ENVIRONMENT,
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
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key).tolist() for key in file.keys()}  # noqa: SIM118
                found[name] = tensors | {"metadata": file.metadata()}
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
    least = 100 if verb in ("tarvis.infer", "tarvis.evaluate") else 200_000

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (least, least))

    process = start(verb, "full", preexec_fn=limit)
    error = process.communicate()[1]
    assert process.returncode == 2, error
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("error: ")
    assert not [path for path in tmp_path.rglob(".*") if path.name.endswith((".part", ".lock", ".old"))]
    goes_on(start, verb, tmp_path / "full", result)


SMALL_MEMORY = 'mount -t tmpfs -o size=$0 tmpfs /dev/shm && exec "$@"'


@pytest.mark.parametrize("size", ["4k,ro", "4k", "100k", "8m"])
def test_little_shared_memory_ends_a_run_within_seconds_with_advice(size, tmp_path):
    """Loader processes send clips of 480 x 864 through it; without them the run needs none."""
    small = ["unshare", "-m", "bash", "-c", SMALL_MEMORY, size]
    if subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("mounting a small /dev/shm is not allowed here")
    command = [*small, sys.executable, "-m", "tarvis.train", *map(str, COMMANDS["tarvis.train"])]

    def go(workers, frames):
        return subprocess.run(
            [*command, f"data.synthetic={{num_videos: 8, size: {frames}}}", f"data.num_workers={workers}"],
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )

    done = go(2, [480, 864])
    assert done.returncode in (2, 3), done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "data.num_workers=0" in last
    assert "--shm-size" in last
    assert not (tmp_path / "out/.lock").exists()
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    done = go(0, [64, 96])
    assert done.returncode == 0, done.stderr
