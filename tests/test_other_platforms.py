"""On macOS and Windows there is no Triton, and on Windows nothing of POSIX: what a CPU needs does without."""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import export
import kernels
import tarvis

ROOT = Path(__file__).parents[1]
MODULES = [
    name
    for package in (tarvis, kernels, export)
    for _, name, _ in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if "._triton." not in name  # kernels, which are imported when they are first launched
]

WITHOUT = """
import importlib, os, signal, sys

# what others import for themselves is theirs
import av, cv2, filelock, numpy, PIL.Image, pycocotools.mask, safetensors.torch, scipy.optimize, tqdm, yaml
import multiprocessing.pool, torch, torch._dynamo, torch.distributed, torch.utils.data
for name in filter(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime", "starlette", "uvicorn")):
    importlib.import_module(name)

for gone in "triton fcntl resource termios tty pty pwd grp syslog readline curses".split():
    for name in [each for each in sys.modules if each.split(".")[0] == gone]:
        del sys.modules[name]
    sys.modules[gone] = None
functions = "fork getuid geteuid getgid setsid killpg uname statvfs fchmod mkfifo sched_getaffinity wait3"
for name in f"{functions} register_at_fork O_NOFOLLOW O_CLOEXEC O_DIRECTORY".split():
    vars(os).pop(name, None)
for name in "SIGKILL SIGHUP SIGALRM SIGUSR1 SIGUSR2 SIGCHLD SIGPIPE SIGQUIT setitimer".split():
    vars(signal).pop(name, None)
"""


def run(code, *argv, **settings):
    """What a process without all that prints to stderr, in the end."""
    command = [sys.executable, "-c", WITHOUT + code, *map(str, argv)]
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        command,
        env=variables | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        **settings,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_every_module_can_be_imported():
    run("for name in sys.argv[1:]: importlib.import_module(name)", *MODULES)


@pytest.mark.parametrize(
    "argv",
    [
        ["infer", tarvis.places.HERE / "assets" / "dog.mp4", "--limit", 2, "--task", "vis", "--out", "out"],
        ["info"],
    ],
    ids=lambda argv: argv[0],
)
def test_commands_run(argv, tmp_path):
    run("from tarvis.__main__ import main; assert main(sys.argv[1:]) == 0", *argv, cwd=tmp_path)
