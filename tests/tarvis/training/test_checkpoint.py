"""Checkpoints: found by number, whole or not there, old ones removed, read as weights too."""

import dataclasses
import resource

import pytest
import torch
import yaml

import tarvis
from tarvis.files.atomic import PART, SEAL_LENGTH, fresh
from tarvis.model import build_model
from tarvis.model.weights import CONFIG, load_weights
from tarvis.structures import InputError
from tarvis.training import checkpoint
from tarvis.training.checkpoint import Checkpoints, plain, read_checkpoint, write_config
from tarvis.training.config import Config, load_config

CONTENT = {
    "model": {"x": torch.zeros(1)},
    "config": {"model": {}},
    "optimizer": {"state": {}, "param_groups": []},
    "step": 0,
}


@pytest.fixture
def write(tmp_path):
    """Writes small checkpoints of these steps, in turn; gives the names of those that are left."""

    def make(*steps, keep=2):
        checkpoints = Checkpoints(tmp_path, keep)
        for step in steps:
            checkpoints.write(step, CONTENT | {"step": step})
        return [path.name for path in checkpoints.found()]

    return make


@pytest.fixture
def run_state(tiny_config):
    """The settings of a run, and what its checkpoint holds."""
    config = Config(model=dataclasses.replace(tiny_config, num_instance_queries=6))
    torch.manual_seed(0)
    network = build_model(config.model)
    content = CONTENT | {"model": network.state_dict(), "config": plain(config), "step": 7}
    return config, content


def test_the_newest_are_kept(write):
    assert write(10, 20, 30, 40) == ["000030.pth", "000040.pth"]
    assert write(50, keep=3) == ["000030.pth", "000040.pth", "000050.pth"]
    assert write(60, keep=1) == ["000060.pth"]


@pytest.mark.parametrize("keep", [0, -1])
def test_all_are_kept_if_wanted(write, keep):
    assert len(write(1, 2, 3, 4, 5, keep=keep)) == 5


def test_the_latest_is_that_of_the_largest_number_not_of_the_last_name(write, tmp_path):
    write(999_999, 1_000_000)
    assert Checkpoints(tmp_path).latest().name == "1000000.pth"
    write(1_000_001)
    assert [path.name for path in Checkpoints(tmp_path).found()] == ["1000000.pth", "1000001.pth"]


def test_a_run_that_went_back_removes_none_of_what_is_later_nor_what_it_wrote(write):
    write(30, 40)
    assert write(10, keep=1) == ["000010.pth", "000030.pth", "000040.pth"]
    assert write(20, keep=1) == ["000020.pth", "000030.pth", "000040.pth"]


def test_writing_a_step_again_replaces_it(write, tmp_path):
    assert write(1, 2, 2) == ["000001.pth", "000002.pth"]
    assert read_checkpoint(tmp_path / "000002.pth")["step"] == 2


def test_other_files_are_neither_found_nor_removed(write, tmp_path):
    others = ["best.pth", "000001.pth.bak", "12.pth", ".000009.pth", "swin_000100.pth"]
    for name in others:
        (tmp_path / name).write_bytes(b"")
    assert write(1, 2, keep=1) == ["000002.pth"]
    assert all((tmp_path / name).exists() for name in others)


def test_an_empty_folder_has_none(tmp_path):
    assert Checkpoints(tmp_path / "nowhere").latest() is None
    assert Checkpoints(tmp_path).found() == []


@pytest.mark.parametrize("error", [RuntimeError("file write failed"), OSError(28, "No space left on device")])
def test_a_checkpoint_that_cannot_be_written_leaves_the_older_ones(write, tmp_path, monkeypatch, error):
    write(1, 2)

    def full(_, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(checkpoint.torch, "save", full)
    for step in (2, 3):
        with pytest.raises(InputError, match=rf"00000{step}\.pth: cannot be written"):
            write(step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000001.pth", "000002.pth"]
    assert read_checkpoint(tmp_path / "000002.pth")["step"] == 2


def test_a_full_disk_leaves_the_older_checkpoints(write, tmp_path):
    write(1, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(InputError, match=r"000003\.pth: cannot be written \("):
            Checkpoints(tmp_path).write(3, CONTENT | {"model": {"weight": torch.zeros(2**20)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000001.pth", "000002.pth"]


def test_what_a_process_left_that_was_killed_as_it_wrote_goes_with_the_next_checkpoint(write, tmp_path):
    write(1)
    fresh(tmp_path / "000002.pth", PART).write_bytes(b"half")
    assert Checkpoints(tmp_path).latest().name == "000001.pth"
    assert write(3) == ["000001.pth", "000003.pth"]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("kept", [slice(-200), slice(300), slice(0)])
def test_a_damaged_checkpoint_is_an_error_that_names_it(write, tmp_path, kept):
    write(5)
    path = tmp_path / "000005.pth"
    path.write_bytes(path.read_bytes()[kept])
    with pytest.raises(InputError, match=r"000005\.pth: truncated, or not a file of weights"):
        read_checkpoint(path)
    with pytest.raises(InputError, match=r"000006\.pth: no such file"):
        read_checkpoint(tmp_path / "000006.pth")


def test_any_byte_that_changes_is_noticed(write, tmp_path):
    write(5)
    path = tmp_path / "000005.pth"
    whole = path.read_bytes()
    for at in range(0, len(whole) - SEAL_LENGTH, 37):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        for read in (read_checkpoint, load_weights):
            with pytest.raises(InputError, match=r"000005\.pth: (damaged|truncated)"):
                read(path)


def test_checkpoints_without_a_checksum_are_read_and_never_removed(write, tmp_path):
    torch.save(CONTENT, tmp_path / "000001.pth")
    assert read_checkpoint(tmp_path / "000001.pth") == CONTENT
    assert write(2, 3, keep=1) == ["000001.pth", "000003.pth"]


@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_neither_written_nor_gone_on_from(write, tmp_path, part, value):
    write(1)
    numbers = {"weight": torch.tensor([1.0, value])}
    bad = CONTENT | {part: {"state": {0: numbers}, "param_groups": []} if part == "optimizer" else numbers}
    with pytest.raises(InputError, match=f"000002.pth: the numbers of '{part}' are not all finite"):
        Checkpoints(tmp_path).write(2, bad)
    torch.save(bad, tmp_path / "000002.pth")
    path, wrong = Checkpoints(tmp_path).sound()
    assert path == tmp_path / "000001.pth"
    assert len(wrong) == 1
    (tmp_path / "000001.pth").unlink()
    with pytest.raises(InputError, match="not all finite"):
        Checkpoints(tmp_path).sound()


@pytest.mark.parametrize(
    ("good", "left"), [(-1, [1, 5]), (1, [1, 5]), (3, [3, 5]), (4, [4, 5]), (5, [5]), (None, [5])]
)
def test_the_last_that_has_proved_good_stays(write, tmp_path, good, left):
    write(1, 2, 3, 4, keep=0)
    Checkpoints(tmp_path, 1).write(5, CONTENT, good=good)
    assert [int(path.stem) for path in Checkpoints(tmp_path).found()] == left


def test_weights_alone_are_not_a_checkpoint(tmp_path):
    torch.save({"model": {}, "config": {}}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a\.pth: not a checkpoint .*it has no optimizer, step"):
        read_checkpoint(tmp_path / "a.pth")
    torch.save([1], tmp_path / "b.pth")
    with pytest.raises(InputError, match=r"b\.pth: not a checkpoint"):
        read_checkpoint(tmp_path / "b.pth")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", {"x": 1}),
        ("model", [torch.zeros(1)]),
        ("model", {}),
        ("config", {}),
        ("config", "x"),
        ("optimizer", {}),
        ("optimizer", {"state": [], "param_groups": []}),
        ("optimizer", {"state": {}, "param_groups": [{}]}),
        ("optimizer", {"state": {0: 1}, "param_groups": []}),
        ("step", -1),
        ("step", 1.5),
        ("step", True),
        ("ema", {"module.x": 1}),
        ("scaler", 3),
    ],
)
def test_a_checkpoint_with_something_else_in_it_is_an_error_that_names_it(tmp_path, name, value):
    path = tmp_path / "000007.pth"
    torch.save(CONTENT | {name: value}, path)
    with pytest.raises(InputError, match=rf"^{path}: .*(its {name} is malformed|expected tensors by name)"):
        read_checkpoint(path)


def test_what_was_written_is_read(tmp_path, run_state):
    config, content = run_state
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    content |= {"optimizer": optimizer.state_dict(), "scaler": {}}
    read = read_checkpoint(Checkpoints(tmp_path).write(7, content))
    assert read["step"] == 7
    assert read["config"] == plain(config)
    assert all(torch.equal(value, content["model"][name]) for name, value in read["model"].items())
    state = read["optimizer"]["state"][0]
    assert torch.equal(state["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_a_checkpoint_is_read_as_weights_with_their_network(tmp_path, run_state):
    config, content = run_state
    path = Checkpoints(tmp_path).write(7, content)
    state, model = load_weights(path)
    assert model == config.model
    assert all(torch.equal(value, content["model"][name]) for name, value in state.items())
    assert tarvis.load(path, device="cpu").config == config.model


def test_the_settings_of_a_run_come_back_from_its_folder(tmp_path):
    config = load_config(
        None,
        [
            "model.class_sets={ovis: 25, 'yes': 2}",
            "data.train=[davis, mine.json]",
            "data.sets={davis: {min_sizes: [480], crop: [1, 1]}}",
            "data.root=/data",
            "optim.lr=5e-5",
            "optim.decay_steps=[3]",
            "optim.decay_rates=[0.5]",
        ],
    )
    assert config.data.sets["davis"] == {"min_sizes": (480,), "crop": (1.0, 1.0)}
    write_config(tmp_path, config)
    assert load_config(tmp_path / CONFIG) == config
    assert load_config(tmp_path / CONFIG, ["optim.lr=1e-3"]).optim.lr == 1e-3
    assert yaml.safe_load((tmp_path / CONFIG).read_text()) == plain(config)
