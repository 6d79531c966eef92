"""The command: it is interrupted, goes on exactly, says what is wrong in a line, and shows what it sees."""

import itertools
import os
import shutil
import signal
import time
from pathlib import Path

import cv2
import pytest
import torch
import torch._inductor.config

from tarvis.data.loader import Batches, TrainingLoader
from tarvis.files.outputs import LOCK, locked
from tarvis.structures import DamagedError
from tarvis.train import main, skipped
from tarvis.training.trainer import LossNetwork, Step, Trainer

TRAIN = ("-m", "tarvis.train")
FEW = ("optim.steps=1", "optim.batch_size=1")


@pytest.fixture(scope="module")
def copy_of_one_step(runs):
    """Gives a run of one step another name; returns its folder."""
    command = ["--cfg", runs / "tiny.yaml", "--model_dir", runs / "one", "--device", "cpu", "--set", *FEW]
    assert main([str(each) for each in command]) == 0
    return lambda name: shutil.copytree(runs / "one", runs / name)


@pytest.fixture
def checkpoint(runs):
    """The last checkpoint of a run."""
    return lambda name: torch.load(max((runs / name).glob("*.pth")))


def differing(one, other, at=""):
    """Where two checkpoints differ."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [at]
    if isinstance(one, dict):
        keys = [*one, *(other.keys() - one.keys())]
        return [d for k in keys for d in differing(one.get(k), other.get(k), f"{at}/{k}")]
    if isinstance(one, list | tuple) and len(one) == len(other):
        return [d for a, b in zip(one, other, strict=True) for d in differing(a, b, at)]
    return [] if one == other else [at]


@pytest.mark.filterwarnings("error::FutureWarning", "error::DeprecationWarning:tarvis")
@pytest.mark.parametrize(
    "changes",
    [
        ["run.ema=0.9", "data.chunk=8", "optim.batch_size=3"],
        pytest.param(["optim.amp=bf16", "optim.batch_size=2", "optim.micro_batch=2"], marks=pytest.mark.slow),
        pytest.param(
            ["optim.batch_size=1", "run.checkpoint_activations=true", "optim.warmup_steps=4"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_three_steps_and_three_more_are_six(run, numbers, checkpoint, changes, request):
    whole, parts = f"whole-{request.node.name}", f"parts-{request.node.name}"
    assert run(whole, *changes)[0] == 0
    code, summary, _ = run(parts, *changes, "optim.steps=3")
    assert code == 0
    assert summary["steps"] == 3
    assert run(parts, "optim.steps=6")[0] == 0  # the other settings are those of the run
    assert differing(checkpoint(whole), checkpoint(parts)) == []
    told = [[entry | {"seconds": 0} for entry in numbers(name)] for name in (whole, parts)]
    assert told[0] == told[1]
    assert [entry["step"] for entry in told[1]] == [*range(1, 7)]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_a_run_with_a_checkpoint_and_it_goes_on(
    arguments, run, start, wait_for, numbers, number
):
    process = start(*TRAIN, *arguments(f"ended{number}", "optim.steps=5000", "data.num_workers=1"))
    wait_for(process, f"ended{number}", 2)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    steps = len(numbers(f"ended{number}"))
    assert f'"steps": {steps}, "finished": false' in out
    assert f"stopped at {steps} of 5000 steps; start again to go on" in err
    code, summary, _ = run(f"ended{number}", f"optim.steps={steps + 1}")
    assert code == 0
    assert summary["steps"] == steps + 1
    assert [entry["step"] for entry in numbers(f"ended{number}")] == [*range(1, steps + 2)]


def test_what_was_learned_before_a_damaged_clip_is_kept(run, runs, checkpoint, numbers, monkeypatch):
    """The run goes on when the clip is mended, and is the run that never met it."""
    few = ("optim.steps=3", "optim.batch_size=1")
    steps = TrainingLoader.steps

    def damaged(self, start, stop, should_stop):
        yield from itertools.islice(steps(self, start, stop, should_stop), 2 - start)
        raise DamagedError("mine, 'clip.jpg': damaged")

    assert run("sound", *few)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoader, "steps", damaged)
        for _ in range(2):
            code, summary, err = run("mended", *few)
            assert (code, summary) == (3, None)
            assert err.splitlines()[-2:] == [
                "stopped at 2 of 3 steps; start again to go on",
                "error: mine, 'clip.jpg': damaged",
            ]
            assert [path.name for path in (runs / "mended").glob("*.pth")] == ["000002.pth"]
    code, _, err = run("mended")
    assert code == 0
    assert "stopped" not in err
    assert differing(checkpoint("sound"), checkpoint("mended")) == []
    assert [entry["step"] for entry in numbers("mended")] == [1, 2, 3]


def test_a_run_says_what_it_starts_from(run, runs, tmp_path):
    assert (
        "starts from random weights: neither --finetune_from nor --backbone_weights" in run("random", *FEW)[2]
    )
    path = runs / "random" / "000001.pth"
    state = torch.load(path)["model"]
    backbone = {name[9:]: value for name, value in state.items() if name.startswith("backbone.")}
    torch.save(backbone, tmp_path / "images.pth")
    for option, given, told in (
        ("--restore_weights", path, f"starts from {path}\n"),
        ("--finetune_from", path.parent, f"starts from {path}\n"),
        (
            "--backbone_weights",
            tmp_path / "images.pth",
            f"starts from random weights, except for the image backbone of {tmp_path / 'images.pth'}\n",
        ),
    ):
        code, _, err = run(f"by{option}", *FEW, options=(option, str(given)))
        assert code == 0, err
        assert told in err
    both = ("--finetune_from", str(path), "--backbone_weights", str(tmp_path / "images.pth"))
    told = f"starts from {path}, except for the image backbone of {tmp_path / 'images.pth'}"
    assert told in run("other backbone", *FEW, options=both)[2]
    assert "starts from" not in run("random", "optim.steps=2")[2]


@pytest.mark.slow
def test_sigterm_of_one_process_ends_all(arguments, start, wait_for, runs, children):
    both = start(*TRAIN, *arguments("both", "optim.steps=5000"), processes=2)
    wait_for(both, "both", 1)
    children(both)[1].send_signal(signal.SIGTERM)
    out, err = both.communicate()
    assert both.returncode == 0, err
    assert len(out.splitlines()) == 1
    assert len([*(runs / "both").glob("*.pth")]) == 1


def test_a_run_ends_when_its_time_is_over(run, runs):
    for steps in (1, 2):
        code, summary, err = run("timed", options=["--max_hours", "0"])
        assert code == 0
        assert (f"goes on from {runs / 'timed' / '000001.pth'}" in err) == (steps == 2)
        assert summary["steps"] == steps
        assert not summary["finished"]
        assert summary["checkpoint"].endswith(f"{steps:06d}.pth")


def test_a_finished_run_says_so_and_does_nothing(run, copy_of_one_step):
    folder = copy_of_one_step("done")
    before = {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
    code, summary, err = run("done")
    assert code == 0
    assert summary["finished"]
    assert "done: has finished 1 steps; raise optim.steps to go on" in err
    assert {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))} == before


def test_old_checkpoints_go_and_none_is_written_before_the_step_that_is_named(run, runs):
    options = ["--max_ckpts_to_keep", "2", "--save_ckpts_after", "2"]
    run("kept", "optim.steps=5", "optim.batch_size=1", "run.checkpoint_every=1", options=options)
    assert sorted(path.name for path in (runs / "kept").glob("*.pth")) == ["000004.pth", "000005.pth"]
    run(
        "late",
        "optim.steps=3",
        "optim.batch_size=1",
        "run.checkpoint_every=1",
        options=["--save_ckpts_after", "9"],
    )
    assert [path.name for path in (runs / "late").glob("*.pth")] == ["000003.pth"]


def test_a_named_session_begins_a_run_that_then_goes_on_by_itself(run, runs, copy_of_one_step):
    first = copy_of_one_step("begun") / "000001.pth"
    options = ["--restore_session", str(first)]
    for steps, latest in ((2, first), (3, runs / "other" / "000002.pth")):
        code, summary, err = run("other", f"optim.steps={steps}", options=options)
        assert code == 0
        assert summary["steps"] == steps
        assert f"goes on from {latest}" in err
    assert run("begun", "optim.steps=2", options=options)[0] == 0
    code, _, err = run("begun", "optim.steps=3", options=options)
    assert code == 2
    assert f"{runs / 'begun'}: has later checkpoints than 000001.pth" in err


@pytest.mark.parametrize("names", [["config.yaml"], ["log.jsonl"], ["config.yaml", "log.jsonl"]])
def test_files_that_no_run_wrote_are_not_replaced(run, runs, names):
    folder = runs / "-".join(names)
    folder.mkdir()
    for name in names:
        (folder / name).write_text("mine: 1\n")
    code, _, err = run(folder.name, "optim.steps=1")
    assert code == 2
    assert f"{folder / names[0]}: no run wrote it" in err
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(names, "mine: 1\n")


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(run, copy_of_one_step):
    folder = copy_of_one_step("killed early")
    (folder / "000001.pth").unlink()
    assert run("killed early", "optim.steps=1")[0] == 0
    assert (folder / "000001.pth").exists()


def test_a_skipped_step_is_told_with_the_clips_that_had_the_bad_value(run, numbers, monkeypatch):
    forward, calls = LossNetwork.forward, []

    def hit(self, batch, *rest):
        calls.append(batch.names[0])
        total, terms, is_matched = forward(self, batch, *rest)
        return total * (float("nan") if len(calls) == 5 else 1), terms, is_matched

    monkeypatch.setattr(LossNetwork, "forward", hit)
    code, summary, err = run("skipped", "optim.steps=3")
    assert code == 0
    assert summary["finished"]
    (line,) = [line for line in err.splitlines() if "skipped" in line and line.startswith("step")]
    assert line.startswith("step 2 is skipped: a loss or gradient is not finite (synthetic ")
    assert line.endswith(f": {calls[4]})")  # of its four clips the first
    assert [entry["loss"] is None for entry in numbers("skipped")] == [False, True, False]


def test_a_gradient_that_only_overflows_is_told_as_such():
    step = Step(3, "davis", "vos", 2.5, is_bad=True)
    assert skipped(step, "fp16") == (
        "step 3 is skipped: a gradient overflows in fp16, whose scale is halved (davis vos)"
    )
    assert "not finite" in skipped(step, "bf16")
    step.loss = float("nan")
    assert "not finite" in skipped(step, "fp16")


def test_rates_of_a_run_can_be_changed_but_not_its_network_or_groups(run, copy_of_one_step):
    copy_of_one_step("rates")
    for change, message in (
        (
            "model.decoder_layers=6",
            "the checkpoint of step 1 is of another network (model.decoder_layers is 3, here 6). A run keeps "
            "its network and classes; for others give a new --model_dir, and ",
        ),
        (
            "model.class_sets={synthetic: 8, ovis: 25}",
            "(model.class_sets is {'synthetic': 8}, here {'synthetic': 8, 'ovis': 25})",
        ),
        ("optim.backbone_lr=1", "the checkpoint of step 1 has other groups of parameters"),
    ):
        code, _, err = run("rates", "optim.steps=2", change)
        assert code == 2
        assert message in err
        assert len(err.splitlines()) == 1
    assert run("rates", "optim.steps=2", "optim.backbone_lr=0.2", "optim.weight_decay=0.01")[0] == 0


@pytest.mark.parametrize("task", ["vis", "vps", "vos"])
def test_contact_sheets_show_frames_truth_and_what_is_found(run, runs, task):
    weights = ", ".join(f"{each}: {float(each == task)}" for each in ("vis", "vps", "vos"))
    code, _, err = run(
        f"seen-{task}",
        *("optim.steps=1", "optim.batch_size=1", "run.picture_every=1"),
        f"data.task_weights={{{weights}}}",
    )
    assert code == 0, err
    picture = cv2.imread(str(runs / f"seen-{task}" / "pictures" / f"synthetic_{task}_000001.png"))
    frames, truth, found = (row.astype(int) for row in (picture[:64], picture[64:128], picture[-64:]))
    assert picture.shape[1] >= 2 * 96
    assert frames.std() > 10
    assert abs(frames - truth).max() > 20
    assert frames.shape == found.shape


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (["optim.stepz=1"], [], "unknown key optim.stepz; known: lr"),
        (["optim.lr=fast"], [], "optim.lr: expected float, got 'fast'"),
        (["optim.lr"], [], "expected key=value, got 'optim.lr'"),
        (["data.train=[a"], [], "data.train: '[a' is not a YAML value"),
        (
            ["optim.micro_batch=3"],
            [],
            "a batch of 4 clips cannot be shared by 1 processes that take 3 at once",
        ),
        (["data.train=[coco2]"], [], "training set 'coco2' is neither a file or folder nor known; known: "),
        (["data.train=[]"], [], "nothing to train on: set data.train"),
        (["data.train=[ovis]"], [], "where is ovis?"),
        (["model.class_sets={synthetic: 3}"], [], "model.class_sets: synthetic has 8 classes, not 3"),
        ([], ["--cfg", "/nonexistent.yaml"], "/nonexistent.yaml: no such file"),
        ([], ["--finetune_from", __file__], "truncated, or not a file of weights"),
        ([], ["--finetune_from", "/nonexistent"], "/nonexistent: no such file or folder"),
        (
            [],
            ["--finetune_from", str(Path(__file__).parent)],
            "has no checkpoint NNNNNN.pth; expected the folder",
        ),
        (
            [],
            ["--finetune_from", "a", "--restore_weights", "b"],
            "--finetune_from or --restore_weights, not both",
        ),
        (
            [],
            ["--backbone_weights", "a", "--restore_weights", "b"],
            "--backbone_weights or --restore_weights, not both",
        ),
        ([], ["--restore_weights", "/nonexistent.pth"], "/nonexistent.pth: no such file"),
        ([], ["--restore_weights", __file__], "truncated, or not a file of weights"),
        ([], ["--backbone_weights", "/nonexistent.pth"], "/nonexistent.pth: no such file"),
        ([], ["--restore_session", "/nonexistent.pth"], "/nonexistent.pth: no such file"),
        ([], ["--restore_session", __file__], "config.yaml: no such file"),
        ([], ["--device", "gpu"], "gpu"),
        (["optim.amp=fp16"], [], "optim.amp=fp16 needs a GPU; a CPU takes bf16"),
        ([], ["--threads", "0"], "--threads: expected at least 1, got 0"),
        ([], ["--max_samples_per_gpu", "-1"], "optim.micro_batch"),
        ([], ["--max_samples_per_gpu", "0"], "optim.micro_batch: expected a number from 1, got 0"),
        ([], ["--display_interval", "-1"], "run.show_every"),
        ([], ["--display_interval", "0"], "run.show_every: expected a number from 1, got 0"),
        ([], ["--timeout", "0"], "--timeout: expected more than 0, up to 604800, got 0.0"),
        ([], ["--timeout", "nan"], "--timeout: expected more than 0, up to 604800, got nan"),
        ([], ["--timeout", "inf"], "--timeout: expected more than 0, up to 604800, got inf"),
        (["data.clip_length=1000000"], [], "data.clip_length: expected a number from 1"),
        ([], ["--max_hours", "-1"], "--max_hours: expected at least 0, got -1.0"),
        ([], ["--max_hours", "nan"], "--max_hours: expected at least 0, got nan"),
        ([], ["--model_dir", __file__], "test_train.py"),
    ],
)
def test_a_wrong_wish_is_one_line(run, runs, monkeypatch, changes, options, message):
    monkeypatch.delenv("TARVIS_WORKSPACE_DIR", raising=False)
    code, summary, err = run("wrong", *changes, options=options)
    assert code == 2
    assert summary is None
    assert len(err.splitlines()) == 1, err
    assert message in err
    assert not (runs / "wrong").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_leaves_the_random_numbers_of_its_process_alone(run, workers):
    before = torch.get_rng_state()
    steps = "optim.steps=1", "optim.batch_size=1", f"data.num_workers={workers}"
    assert run(f"random{workers}", *steps)[0] == 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_compiling_without_a_compiler_is_one_line(run, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent")}):
        code, _, err = run("uncompiled", "run.compile=true", "optim.steps=1", "optim.batch_size=1")
    assert code == 2
    assert "error: compiling needs a C++ compiler, or run.compile=false" in err
    assert "Traceback" not in err


def test_what_is_missing_is_said(arguments, capsys):
    wanted = arguments("new")
    for option in ("--cfg", "--model_dir"):
        at = wanted.index(option)
        assert main(wanted[:at] + wanted[at + 2 :]) == 2
        assert f"error: give {option}, the " in capsys.readouterr().err


def test_a_damaged_checkpoint_is_one_line(run, copy_of_one_step):
    path = copy_of_one_step("damaged") / "000001.pth"
    path.write_bytes(path.read_bytes()[:-100])
    code, _, err = run("damaged", "optim.steps=2")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert f"{path}: truncated, or not a file of weights" in err


@pytest.fixture
def three_checkpoints(run, runs):
    """A run with a checkpoint of each of its three steps; gives its folder."""

    def make(name):
        steps = "optim.steps=3", "optim.batch_size=1", "run.checkpoint_every=1"
        assert run(name, *steps, options=["--max_ckpts_to_keep", "0"])[0] == 0
        return runs / name

    return make


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def spoil(path):
    content = torch.load(path)
    next(iter(content["optimizer"]["state"].values()))["exp_avg"][..., 0] = float("nan")
    torch.save(content, path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip, spoil, cut])
def test_a_run_goes_on_from_the_last_checkpoint_that_is_sound(run, three_checkpoints, checkpoint, damage):
    folder = three_checkpoints(f"from-{damage.__name__}")
    whole = checkpoint(folder.name)
    damage(folder / "000003.pth")
    code, summary, err = run(folder.name)
    assert code == 0
    assert summary["finished"]
    (line,) = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert str(folder / "000003.pth") in line
    assert line.endswith(f"It is now 000003.pth.damaged, and the run goes on from {folder / '000002.pth'}")
    assert differing(whole, checkpoint(folder.name)) == []
    assert (folder / "000003.pth.damaged").exists()
    for path in (left := sorted(folder.glob("*.pth"))):
        damage(path)
    code, _, err = run(folder.name, "optim.steps=4")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert sorted(folder.glob("*.pth")) == left


def test_a_run_that_ends_on_a_skipped_step_is_not_finished(run, runs, monkeypatch):
    forward, calls = LossNetwork.forward, []

    def diverged(self, batch, *rest):
        calls.append(0)
        total, terms, is_matched = forward(self, batch, *rest)
        return total * (float("nan") if len(calls) > 2 else 1), terms, is_matched

    monkeypatch.setattr(LossNetwork, "forward", diverged)
    few = "optim.steps=4", "optim.batch_size=1", "run.checkpoint_every=1"
    code, summary, err = run("skips", *few, options=["--max_ckpts_to_keep", "1"])
    assert (code, summary["finished"], summary["steps"]) == (2, False, 4)
    assert summary["checkpoint"] == str(runs / "skips" / "000002.pth")
    assert err.splitlines()[-1].startswith("error: the run ends on a step that was skipped")
    # the one before stays, since none has come after the last that went well
    assert sorted(path.name for path in (runs / "skips").glob("*.pth")) == ["000001.pth", "000002.pth"]


def test_weights_that_are_not_finite_are_not_written(run, runs, monkeypatch):
    train = Trainer._train

    def spoilt(self, batches):
        found = train(self, batches)
        if self.step == 2:
            with torch.no_grad():
                self.network.neck.level_embed.fill_(float("inf"))
        return found

    monkeypatch.setattr(Trainer, "_train", spoilt)
    few = "optim.steps=4", "optim.batch_size=1", "run.checkpoint_every=1"
    code, _, err = run("spoilt", *few)
    assert code == 2
    assert "000002.pth: the numbers of 'model' are not all finite" in err.splitlines()[-1]
    assert [path.name for path in (runs / "spoilt").glob("*.pth")] == ["000001.pth"]


def test_a_folder_of_any_name_is_trained_in(run):
    name = os.fsdecode(b"\xff\x1b[31m")
    code, _, err = run(name, *FEW)
    assert code == 0
    assert "only log.jsonl is written: TensorBoard wants a folder whose name is UTF-8" in err
    code, summary, err = run(name, "optim.steps=2")
    assert (code, summary["steps"]) == (0, 2)
    assert "goes on from" in err


def test_two_runs_do_not_train_in_one_folder(run, copy_of_one_step):
    folder = copy_of_one_step("shared")
    with locked(folder / LOCK, folder):
        code, _, err = run("shared", "optim.steps=2")
    assert code == 2
    assert f"{folder}: another run is writing there" in err
    assert run("shared", "optim.steps=2")[0] == 0
    assert not (folder / LOCK).exists()


@pytest.mark.parametrize("ending", ["--max_hours", signal.SIGTERM, signal.SIGINT])
def test_a_run_whose_loader_hangs_ends_with_what_it_has_learned(run, monkeypatch, ending):
    sample = Batches.sample

    def stuck(self, cell, earlier, step, number):
        if step == 2:
            if ending != "--max_hours":
                os.kill(os.getpid(), ending)
            time.sleep(600)
        return sample(self, cell, earlier, step, number)

    monkeypatch.setattr("tarvis.data.loader.GRACE_S", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "sample", stuck)
        options = ["--max_hours", "0.004"] if ending == "--max_hours" else []
        code, summary, _ = run(f"stuck{ending}", options=options)
    assert code == (0 if options else 128 + ending)
    assert (summary["steps"], summary["finished"]) == (2, False)
    assert summary["checkpoint"].endswith("000002.pth")


def test_weights_alone_are_no_session(run, copy_of_one_step):
    path = copy_of_one_step("alone") / "000001.pth"
    content = torch.load(path)
    torch.save({key: content[key] for key in ("model", "config")}, path)
    code, _, err = run("alone", "optim.steps=2")
    assert code == 2
    assert "not a checkpoint that training can go on from (it has no optimizer, step)" in err
