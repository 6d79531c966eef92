"""Reports of a run: numbers by step as JSON lines, pictures, lines on the console."""

import json
import math
import re
import sys
import types

import cv2
import numpy as np
import pytest
import torch

from tarvis.structures import InputError
from tarvis.training.logs import Console, JsonLines, TensorBoard, duration, start_wandb, step_numbers
from tarvis.training.trainer import Step


def entries(folder):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.fixture
def step():
    return Step(
        number=12,
        set_name="davis",
        task="vos",
        loss=3.5,
        terms={"dice": torch.tensor([4.0, 2.0, 1.0]), "mask": torch.tensor([0.5])},
        gradient=0.25,
        rate=1e-4,
        seconds=2.0,
    )


def test_an_entry_is_there_as_soon_as_it_is_told(tmp_path):
    log = JsonLines(tmp_path / "run")
    log.numbers(0, {"loss": 2.5})
    assert entries(tmp_path / "run") == [{"step": 0, "loss": 2.5}]
    log.close()


def test_a_run_that_goes_on_appends(tmp_path):
    for number in range(3):
        log = JsonLines(tmp_path, number)
        log.numbers(number + 1, {"loss": float(number)})
        log.close()
    assert [entry["step"] for entry in entries(tmp_path)] == [1, 2, 3]


def test_what_a_killed_run_told_of_steps_that_come_again_goes(tmp_path):
    log = JsonLines(tmp_path)
    for number in range(1, 5):
        log.numbers(number, {"loss": 0.0})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    again = JsonLines(tmp_path, 2)
    again.numbers(3, {"loss": 1.0})
    again.close()
    assert [(entry["step"], entry["loss"]) for entry in entries(tmp_path)] == [(1, 0.0), (2, 0.0), (3, 1.0)]


@pytest.mark.parametrize(
    "line", [b"\xff\xfe", b"[" * 10**5, b'{"step": 1e999}', b'{"step": 1' + b"0" * 400 + b"}"]
)
def test_lines_that_are_not_ours_go(tmp_path, line):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1, "name": "caf\xe9"}\n' + line + b"\n")
    log = JsonLines(tmp_path, 5)
    log.numbers(6, {"loss": 1.0})
    log.close()
    kept = b'{"step": 1, "name": "caf\xe9"}\n{"step": 6, "loss": 1.0}\n'
    assert (tmp_path / "log.jsonl").read_bytes() == kept


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_null(tmp_path, value):
    log = JsonLines(tmp_path)
    log.numbers(4, {"loss": value, "lr": 0.0})
    log.close()
    assert entries(tmp_path) == [{"step": 4, "loss": None, "lr": 0.0}]


def test_a_picture_is_an_rgb_file_named_by_set_and_step(tmp_path):
    rgb = np.zeros((4, 6, 3), np.uint8)
    rgb[:, 2:, 0] = 200
    log = JsonLines(tmp_path)
    log.picture(12, "davis_vos", rgb)
    log.picture(13, "davis_vos", rgb)
    log.close()
    written = cv2.imread(str(tmp_path / "pictures" / "davis_vos_000012.png"))
    np.testing.assert_array_equal(written[..., ::-1], rgb)
    assert len(list((tmp_path / "pictures").iterdir())) == 2


def test_a_term_is_that_of_the_last_output_and_aux_the_mean_of_the_others(step):
    numbers = step_numbers(step)
    assert {"loss": 3.5, "gradient": 0.25, "lr": 1e-4, "seconds": 2.0}.items() <= numbers.items()
    terms = {name: value for name, value in numbers.items() if "/" in name}
    assert terms == {"vos/dice": 1.0, "vos/aux_dice": 3.0, "vos/mask": 0.5}


def test_the_console_tells_where_the_run_is(step, capsys):
    console = Console(total=100)
    console.show(step, waited_s=0.5)
    line = capsys.readouterr().err
    assert re.match(r" +12/100  davis vos  loss 3\.500  gradient 0\.25  lr 1\.0e-04  2\.00 s/step ", line)
    assert line.endswith("ETA 0:02:56\n")


def test_the_console_counts_only_what_came_since_its_last_line(step, capsys, monkeypatch):
    clock = iter([100.0, 130.0])
    monkeypatch.setattr("tarvis.training.logs.time.perf_counter", lambda: next(clock))
    console = Console(total=20)
    console.show(step, waited_s=1.0)
    step.number = 17  # five steps later
    console.show(step, waited_s=16.0)
    line = capsys.readouterr().err.splitlines()[1]
    assert "6.00 s/step  data 50%" in line
    assert line.endswith("ETA 0:00:18")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00:00"), (61, "0:01:01"), (90_061, "25:01:01")])
def test_durations_are_hours_minutes_seconds(seconds, text):
    assert duration(seconds) == text


def test_tensorboard_gets_numbers_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    board = TensorBoard(tmp_path)
    board.numbers(1, {"loss": 1.0})
    board.picture(1, "davis_vos", np.zeros((4, 6, 3), np.uint8))
    board.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_tensorboard_forgets_what_a_killed_run_told_of_steps_that_come_again(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, stop in ((0, 4), (2, 3)):
        board = TensorBoard(tmp_path, start)
        for number in range(start + 1, stop + 1):
            board.numbers(number, {"loss": float(start)})
        board.close()
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(entry.step, entry.value) for entry in found] == [(1, 0.0), (2, 0.0), (3, 2.0)]


@pytest.fixture
def wandb(monkeypatch):
    """Stands in for Weights & Biases: the calls it received; it fails for a run called "lost"."""
    calls = []

    def init(**options):
        if options["name"] == "lost":
            raise RuntimeError("no network")
        calls.append(options)
        return types.SimpleNamespace(finish=lambda: calls.append("end"))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Error=RuntimeError))
    return calls


@pytest.mark.parametrize(("session", "project"), [("mine/first", "mine"), ("first", "tarvis")])
def test_wandb_follows_tensorboard_in_a_run_that_can_be_continued(tmp_path, wandb, session, project):
    pytest.importorskip("tensorboard")
    board = TensorBoard(tmp_path, 0, session, {"lr": 1})
    board.numbers(1, {"loss": 1.0})
    board.close()
    options, *rest = wandb
    expected = {"project": project, "name": "first", "id": "first", "config": {"lr": 1}, "resume": "allow"}
    assert (expected | {"sync_tensorboard": True}).items() <= options.items()
    assert rest == ["end"]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_wandb_that_cannot_be_reached_is_one_line(tmp_path, wandb):
    with pytest.raises(InputError, match="--wandb_session mine/lost: no network"):
        start_wandb(tmp_path, "mine/lost", {})
    assert not wandb


@pytest.mark.parametrize(
    ("module", "make"),
    [
        ("wandb", lambda folder: start_wandb(folder, "project/run", {})),
        ("torch.utils.tensorboard", TensorBoard),
    ],
)
def test_a_logger_that_is_not_installed_is_one_line(tmp_path, monkeypatch, module, make):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match="is not installed: pip install"):
        make(tmp_path)
