"""How every command ends: with one line and the right status, also when it is stopped or nobody reads it."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from tarvis import cli
from tarvis.structures import DamagedError, InputError


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C interrupts, also where a shell that ran the tests in the background made them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("a: bad\n and so on"), 2, "error: a: bad and so on"),
        (FileNotFoundError(2, "No such file", "a"), 2, "error: [Errno 2] No such file: 'a'"),
        (DamagedError("a: cut off"), 3, "error: a: cut off"),
        (KeyboardInterrupt(), 130, "error: it goes on"),
        (signal.SIGINT, 130, "error: it goes on"),
        (signal.SIGTERM, 143, "error: it goes on"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_a_command_ends_with_one_line_and_a_status(error, status, line, capsys):
    def action():
        if isinstance(error, signal.Signals):
            os.kill(os.getpid(), error)
        raise error

    assert cli.run(action, stopped="it goes on") == status
    out, err = capsys.readouterr()
    assert (out, err.strip()) == ("", line)


def test_a_bug_shows_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: {"a": 1 // 0})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_a_second_interrupt_is_raised(number):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with cli.stopping() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        assert stop.status == 128 + number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_commands_run_in_any_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(cli.run(dict)))
    thread.start()
    thread.join()
    assert found == [0]


COMMANDS = {
    "tarvis.convert": ["in.pth", "out.safetensors"],
    "tarvis.evaluate": ["davis", "--weights", "in.pth"],
    "tarvis.infer": ["video.mp4", "--task", "vis", "--weights", "in.pth", "--out", "out"],
    "tarvis.train": ["--model_dir", "run"],
    "tarvis.data.check": ["nothing.json"],
}
ONE_IS_QUICK = [
    pytest.param(name, marks=[pytest.mark.slow] if name != "tarvis.infer" else []) for name in COMMANDS
]


@pytest.mark.parametrize("name", ONE_IS_QUICK)
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_nobody_reads_what_a_command_says(name, stream, tmp_path):
    """As `python -m NAME | head -0`: the command says no more, and not how Python feels about that."""
    reading, writing = os.pipe()
    os.close(reading)
    other = {"stdout": "stderr", "stderr": "stdout"}[stream]
    done = subprocess.run(
        [sys.executable, "-m", name, *COMMANDS[name]],
        **{stream: writing, other: subprocess.PIPE},
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        text=True,
        check=False,
    )
    os.close(writing)
    said = getattr(done, other)
    assert done.returncode in (1, 2, 141)
    assert done.returncode == 141 or stream == "stdout"
    assert "BrokenPipe" not in said
    assert "Traceback" not in said
