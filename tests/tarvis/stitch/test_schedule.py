import pytest
from hypothesis import given
from hypothesis import strategies as st

from tarvis.stitch.schedule import ClipSchedule, clip_frames


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, int, int, int]:
    length = draw(st.integers(1, 12))
    return draw(st.integers(0, 60)), length, draw(st.integers(0, length - 1)), draw(st.integers(0, 8))


@given(schedules())
def test_clips_cover_every_frame_and_each_brings_a_new_one(schedule: tuple[int, int, int, int]) -> None:
    num_frames, length, overlap, first = schedule
    clips = clip_frames(*schedule)
    assert {f for clip in clips for f in clip} == set(range(first, num_frames))
    for i, clip in enumerate(clips):
        assert clip.start == first + i * (length - overlap)
        assert len(clip) == length or clip is clips[-1]
    ends = [clip.stop for clip in clips]
    assert ends == sorted(set(ends))


@given(schedules(), st.lists(st.integers(1, 9)))
def test_a_stream_is_cut_as_the_whole_video_is(schedule: tuple[int, int, int, int], steps: list[int]) -> None:
    num_frames, length, overlap, first = schedule
    stream = ClipSchedule(length, overlap, first)
    clips, arrived = [], 0
    for step in steps:
        arrived = min(num_frames, arrived + step)
        complete = stream.advance(arrived)
        assert all(clip.stop <= arrived for clip in complete)
        clips += complete
        assert arrived < stream.next_start + length  # nothing that could run is held back
    assert clips + stream.finish(num_frames) == clip_frames(*schedule)
    assert stream.finish(num_frames) == []


@pytest.mark.parametrize("schedule", [(0, 0, 0), (4, 4, 0), (4, -1, 0), (4, 2, -1)])
def test_impossible_schedules_are_refused(schedule: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected 0 <= overlap < length"):
        ClipSchedule(*schedule)
