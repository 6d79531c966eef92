"""Work is shared out evenly, and without torchrun there is one process."""

from hypothesis import given
from hypothesis import strategies as st

from tarvis.distributed import World, spread, world


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 8))
def test_every_piece_belongs_to_one_part_and_parts_are_even(lengths, parts):
    of_part = spread(lengths, parts)
    assert len(of_part) == parts
    assert sorted(k for part in of_part for k in part) == list(range(len(lengths)))
    totals = [sum(lengths[k] for k in part) for part in of_part]
    assert max(totals) - min(totals) <= max(lengths, default=0)


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with world() as here:
        assert here == World()
        assert here.is_main
        here.wait()
        assert here.from_main([1]) == [1]
