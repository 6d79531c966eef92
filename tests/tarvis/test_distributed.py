"""Work is shared out evenly, and without torchrun there is one process."""

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tarvis import evaluate, train
from tarvis.distributed import World, join, spread, world

VERBS = {
    train: ["--model_dir", "run"],
    evaluate: ["davis", "--data", "davis"],
}


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 8))
def test_every_piece_belongs_to_one_part_and_parts_are_even(lengths, parts):
    of_part = spread(lengths, parts)
    assert len(of_part) == parts
    assert sorted(k for part in of_part for k in part) == list(range(len(lengths)))
    totals = [sum(lengths[k] for k in part) for part in of_part]
    assert max(totals) - min(totals) <= max(lengths, default=0)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are not seen here")
def test_a_joined_thread_is_gone_for_the_system_so_that_forks_inherit_no_lock_of_it():
    for _ in range(100):
        thread = threading.Thread(target=lambda: None)
        thread.start()
        join(thread)
        assert not Path(f"/proc/self/task/{thread.native_id}").exists()


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with world() as here:
        assert here == World()
        assert here.is_main
        here.wait()
        assert here.from_main([1]) == [1]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "LOCAL_RANK is not set"),
        ({"RANK": "", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "x", "LOCAL_RANK": "0"}, "WORLD_SIZE is 'x'"),
        ({"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK is '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0"}, "RANK 0 is beyond WORLD_SIZE 0"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK 2 is beyond WORLD_SIZE 2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "the processes of the run do not meet"),
    ],
)
def test_half_of_what_torchrun_sets_is_refused_in_one_line(verb, given, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert verb.main(VERBS[verb]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert said in err
    assert "start with torchrun" in err
    assert not list(tmp_path.iterdir())
