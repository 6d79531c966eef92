"""Batches: the same however they are made, shared out, or begun; and errors that say where."""

import dataclasses
import errno
import multiprocessing
import os
import signal
import time
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tarvis.config import ConfigError, build
from tarvis.config import load as load_config
from tarvis.data import loader as loading
from tarvis.data.batch import Batch
from tarvis.data.clips import VideoClips
from tarvis.data.loader import TrainingLoader, WaitEndedError
from tarvis.data.sets import open_set, open_sets
from tarvis.data.settings import DataSettings, SetSettings, SyntheticSettings
from tarvis.data.synthetic import DEFAULTS, synthetic_clips
from tarvis.datasets.benchmark import FrameTruth, Truth, VideoSample
from tarvis.distributed import World
from tarvis.structures import InputError

DATA = DataSettings(
    train=("synthetic",),
    num_workers=0,
    chunk=4,
    synthetic=SyntheticSettings(num_videos=6, num_frames=8, size=(64, 64), least_objects=2, most_objects=3),
)


@pytest.fixture(scope="module")
def clips():
    return synthetic_clips(DATA.synthetic, DEFAULTS, clip_length=3, max_objects=4)


def load(clips, start=0, stop=6, *, workers=0, world=None, batch_size=4, micro_batch=1, seed=0):
    data = dataclasses.replace(DATA, num_workers=workers)
    loader = TrainingLoader(
        [clips], data, seed=seed, batch_size=batch_size, micro_batch=micro_batch, world=world
    )
    return list(loader.steps(start, stop))


def fields(batch):
    return [getattr(batch, f.name) for f in dataclasses.fields(batch)]


def same(one, other):
    pairs = zip(fields(one), fields(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_batches_do_not_depend_on_the_number_of_workers(clips):
    alone, many = load(clips), load(clips, workers=2)
    assert all(same(a, b) for x, y in zip(alone, many, strict=True) for a, b in zip(x, y, strict=True))


def test_ranks_share_the_batches_of_one_process(clips):
    alone = load(clips)
    ranks = [load(clips, world=World(rank=r, size=2)) for r in (0, 1)]
    for step, batches in enumerate(alone):
        shared = [ranks[k % 2][step][k // 2] for k in range(4)]
        assert all(same(a, b) for a, b in zip(batches, shared, strict=True))


def test_a_run_goes_on_in_the_middle_of_a_chunk(clips):
    whole, rest = load(clips, 0, 12), load(clips, 5, 12)
    assert all(same(a, b) for x, y in zip(whole[5:], rest, strict=True) for a, b in zip(x, y, strict=True))


def test_the_clips_of_a_step_do_not_depend_on_how_many_are_trained_on_at_once(clips):
    ones, pairs = load(clips), load(clips, micro_batch=2)
    for a, b in zip(ones, pairs, strict=True):
        assert [name for batch in a for name in batch.names] == [name for batch in b for name in batch.names]


def test_a_chunk_has_one_set_task_and_split_of_points_a_step(clips):
    steps = load(clips, 0, 64, batch_size=2)
    tasks = []
    for chunk in range(16):
        kinds = {(b.set_name, b.task) for step in steps[4 * chunk : 4 * chunk + 4] for b in step}
        assert len(kinds) == 1
        tasks.append(kinds.pop()[1])
        for step in steps[4 * chunk : 4 * chunk + 4]:
            if tasks[-1] == "vos" and len({b.counts for b in step}) == 1:
                assert len({b.num_points for b in step}) == 1
    assert set(tasks) == {"vis", "vps", "vos"}
    assert {b.num_points for step in steps for b in step if b.task == "vos"} > {0, 1}


def test_other_seeds_give_other_clips(clips):
    assert load(clips, 0, 1)[0][0].names != load(clips, 0, 1, seed=1)[0][0].names


def test_samples_of_a_step_differ(clips):
    """The original gave the workers of a rank the same random numbers."""
    batches = [batch for step in load(clips, 0, 4, workers=2) for batch in step]
    assert len({batch.names for batch in batches}) > 8


def test_the_last_steps_of_a_long_run_need_none_before_them(clips):
    """The original lists 16 million clips first, and drops a last chunk that is not whole."""
    tracemalloc.start()
    steps = load(clips, 499_997, 500_000)
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()
    assert len(steps) == 3


def test_a_batch_that_does_not_divide_is_refused(clips):
    with pytest.raises(
        InputError,
        match=r"optim.batch_size, optim.micro_batch: a batch of 4 .* by 3 processes that take 1 at once",
    ):
        load(clips, world=World(size=3))


def files(folder, *, broken=None, empty=()):
    """A video of 6 frames; frame `broken` is cut off, those in `empty` show nothing."""
    paths = []
    for t in range(6):
        coded = cv2.imencode(".jpg", np.full((64, 96, 3), 20 * t, np.uint8))[1].tobytes()
        paths.append(folder / f"{t}.jpg")
        paths[-1].write_bytes(coded[:20] if t == broken else coded)

    def read(t):
        ids = np.zeros((64, 96), np.uint16)
        if t not in empty:
            ids[10:30, 10:40] = 1
        return FrameTruth(ids=ids)

    truth = Truth({1: 0}, ((1,),) * 6, read)
    return VideoSample("street/7", tuple(paths), tuple(p.stem for p in paths), size=(64, 96), truth=truth)


def test_a_worker_that_is_killed_ends_the_run_with_a_hint(clips, monkeypatch):
    monkeypatch.setattr(clips, "draw", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(InputError, match=r"try data.num_workers=0"):
        load(clips, workers=1)


def stuck(*_):
    time.sleep(600)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ending", ["asked", "timeout"])
def test_a_loader_that_hangs_holds_nobody_up(clips, monkeypatch, workers, ending):
    monkeypatch.setattr(clips, "draw", stuck)
    monkeypatch.setattr(loading, "GRACE_S", 0.2)
    data = dataclasses.replace(DATA, num_workers=workers, timeout_s=60.0 if ending == "asked" else 0.5)
    loader = TrainingLoader([clips], data, seed=0, batch_size=4)
    began = time.monotonic()
    expected = WaitEndedError if ending == "asked" else InputError
    with pytest.raises(
        expected, match="" if ending == "asked" else r"no clip came for 0.5 s \(data.timeout_s"
    ):
        next(loader.steps(0, 1, lambda: ending == "asked"))
    for process in multiprocessing.active_children():
        process.join(5)
    assert not multiprocessing.active_children()
    assert time.monotonic() - began < 30


def full(*_):
    raise RuntimeError(
        "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
    )


def unsendable(*_):
    raise OSError(24, "Too many open files")


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        (torch.Tensor, full, "does not fit into shared memory .*--shm-size"),
        (loading, unsendable, "a process that loads clips has gone .*data.num_workers=0, .*--shm-size"),
    ],
    ids=["memory", "queue"],
)
def test_what_a_worker_cannot_send_is_an_error_within_seconds(clips, monkeypatch, where, error, message):
    if where is torch.Tensor:
        monkeypatch.setattr(torch.Tensor, "share_memory_", error)
    else:
        monkeypatch.setattr(Batch, "__reduce__", error)  # in the thread of the queue
    with pytest.raises(InputError, match=message) as found:
        load(clips, workers=2)
    assert len(str(found.value)) <= 300


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ENOSYS, errno.EAGAIN, errno.EMFILE])
@pytest.mark.parametrize("where", ["Queue", "Process"])
def test_processes_that_cannot_start_are_one_error(clips, monkeypatch, where, number):
    def refused(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(multiprocessing.get_context("fork"), where, refused)
    with pytest.raises(InputError, match=r"clips cannot start .*data.num_workers=0, .*--shm-size"):
        load(clips, workers=1)
    assert load(clips, workers=0)


def test_processes_that_are_no_forks_make_the_same_batches(clips, monkeypatch):
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    for x, y in zip(load(clips), load(clips, workers=2), strict=True):
        assert all(same(a, b) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_ends_the_run_with_its_name_and_that_of_its_set(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(loading, "PAUSE_S", 0.0)
    video = files(tmp_path, broken=3)
    clips = VideoClips("my_set", [video], SetSettings(window=2, min_sizes=None))
    with pytest.raises(InputError, match=r"^my_set, 'street/7', step \d: .*3.jpg: not an image"):
        load(clips, 0, 40, workers=workers)


def test_a_file_that_can_be_read_the_second_time_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "PAUSE_S", 0.0)
    clips = VideoClips("my_set", [files(tmp_path)], SetSettings(window=2, min_sizes=None))
    calm = load(clips, 0, 2)
    draw, calls = clips.draw, []

    def moody(*args):
        calls.append(1)
        if len(calls) % 2:
            raise InputError("no route to host")
        return draw(*args)

    monkeypatch.setattr(clips, "draw", moody)
    assert all(
        same(a, b) for x, y in zip(calm, load(clips, 0, 2), strict=True) for a, b in zip(x, y, strict=True)
    )


def test_clips_without_objects_are_drawn_anew_but_not_for_ever(tmp_path):
    mostly = VideoClips("my_set", [files(tmp_path, empty=range(5))], SetSettings(window=2, min_sizes=None))
    assert all(batch.num_targets == 1 for step in load(mostly, 0, 4) for batch in step)
    never = VideoClips("my_set", [files(tmp_path, empty=range(6))], SetSettings(window=2, min_sizes=None))
    with pytest.raises(
        InputError, match=r"my_set: no object is left in any of 10 clips for vis, .*'street/7'"
    ):
        load(never)


def test_there_are_no_more_workers_than_cores(clips, monkeypatch):
    monkeypatch.setattr(loading, "_cores", lambda: 1)
    begun = []
    monkeypatch.setattr(loading, "DataLoader", lambda *_, num_workers, **__: begun.append(num_workers) or ())
    for workers in (0, 1, 50):
        load(clips, 0, 0, workers=workers)
    assert begun == [0, 1, 1]


def test_waiting_is_measured(clips):
    loader = TrainingLoader([clips], DATA, seed=0, batch_size=2)
    for _ in loader.steps(0, 2):
        pass
    assert loader.waited_s > 0


# Sets and settings


def test_sets_are_opened_by_name():
    (opened,) = open_sets(DATA)
    assert opened.name == "synthetic"
    assert opened.classes.num_classes == 8
    with pytest.raises(InputError, match=r"set data\.train"):
        open_sets(DataSettings())
    with pytest.raises(InputError, match=r"data\.sets changes sinthetic, which is not trained on: synthetic"):
        open_sets(dataclasses.replace(DATA, sets={"sinthetic": {"window": 1}}))
    with pytest.raises(
        InputError,
        match=rf"'coco2' is neither a file or folder nor known; known: .*, moving; looked in {Path.cwd()}$",
    ):
        open_set("coco2", DataSettings())
    with pytest.raises(InputError, match="'/no/coco2' is neither a file or folder nor known; known: "):
        open_set("/no/coco2", DataSettings())


def test_a_named_set_needs_a_place(monkeypatch, tmp_path):
    monkeypatch.delenv("TARVIS_WORKSPACE_DIR", raising=False)
    with pytest.raises(InputError, match=r"where is ovis\? Set data.root"):
        open_set("ovis", DataSettings())
    with pytest.raises(InputError, match=r"ovis train not found; looked for"):
        open_set("ovis", DataSettings(root=str(tmp_path)))


@pytest.mark.parametrize(("name", "task"), [("davis", "vis"), ("ovis", "vps")])
def test_a_task_that_a_set_has_no_labels_for_is_refused(tmp_path, name, task):
    data = DataSettings(root=str(tmp_path), sets={name: {"tasks": (task,)}})
    with pytest.raises(InputError, match=rf"{name} cannot train {task}; it can: .*vos"):
        open_set(name, data)


def test_changes_of_a_set_leave_the_rest_as_published():
    tree = {"train": ["ovis"], "sets": {"ovis": {"window": 10, "min_sizes": [360, 480]}}}
    data = build(DataSettings, tree)
    changed = data.of_set("ovis", SetSettings(max_size=1024))
    assert (changed.window, changed.min_sizes, changed.max_size) == (10, (360, 480), 1024)
    assert data.of_set("vipseg", SetSettings(("vps",))) == SetSettings(("vps",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": ("a", "b"), "weights": (1.0,)}, "data.weights"),
        (
            {"task_weights": {"pet": 1.0}},
            r"data.task_weights: .* vos \(which trains pet too, see data.point_share",
        ),
        ({"pad_to": 32}, "multiple of 64"),
        ({"chunk": 0}, "data.chunk"),
        ({"point_share": 1.5}, "point_share"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DataSettings(**settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tasks": ("pet",)},
            r"tasks: expected some of vis, vps, vos \(which trains pet too, see data.point_share",
        ),
        ({"tasks": ()}, r"tasks: expected some of vis, vps, vos, got \[\]"),
        ({"crop": (0.5, 1.5)}, "crop: expected"),
        ({"min_sizes": (480, 0)}, r"min_sizes: expected a number from 1, got 0"),
        ({"min_sizes": ()}, "min_sizes: expected"),
        ({"reduce_to": 0}, r"reduce_to: expected a number from 1, got 0"),
        ({"window": 0}, "window: expected"),
    ],
)
def test_settings_of_a_set_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=rf"^data\.sets\.a\.{message}"):
        DataSettings(sets={"a": changes}).of_set("a", SetSettings())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train=my.json", r"train: expected a list, such as \[my.json\], got 'my.json'"),
        ("sets={a: {crop: 0.5}}", "sets.a.crop: expected a list of 2, got 0.5"),
        ("sets={a: {crop: [1]}}", r"sets.a.crop: expected a list of 2, got \[1\]"),
        ("sets={a: {tasks: {vis: 1}}}", r"sets.a.tasks: expected a list, got \{'vis': 1\}"),
        ("task_weights={vis:1}", "task_weights: expected a space after the colon in 'vis:1'"),
        ("task_weights=vis", "task_weights: expected dict, got 'vis'"),
    ],
)
def test_slips_of_yaml_are_explained(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(DataSettings, None, [override])


def test_a_configuration_that_is_not_there_is_named_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        load_config(DataSettings, tmp_path / "no.yaml")
    assert str(error.value) == f"{tmp_path}/no.yaml: no such file"
    with pytest.raises(ConfigError, match=r": cannot be read \("):
        load_config(DataSettings, tmp_path)
