from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tarvis.config import InferenceConfig
from tarvis.files import rle
from tarvis.stitch import tracking
from tarvis.stitch.schedule import clip_frames
from tarvis.stitch.tracking import FrameMasks, InstanceTracker, overlap, select_queries, select_results
from tarvis.structures import Geometry

GEOMETRY = Geometry((64, 64), (64, 64))  # logits 16 x 16
CONFIG = InferenceConfig(clip_length=4, overlap=2)
CLASSES = torch.tensor([[0.0, 2.0, 1.0]])


def square(left: int, frames: int, width: int = 6) -> Tensor:
    """Logits [1, T, 16, 16] of an object at columns left .. left + width."""
    logits = torch.full((1, frames, 16, 16), -4.0)
    logits[..., 4:12, left : left + width] = 4.0
    return logits


def track(clips: dict[range, list[Tensor]], config: InferenceConfig = CONFIG) -> list[FrameMasks]:
    tracker = InstanceTracker(GEOMETRY, config)
    finished = []
    for frames, objects in clips.items():
        logits = torch.cat([torch.empty(0, len(frames), 16, 16), *objects])
        finished += tracker.add(frames, logits, CLASSES.repeat(len(objects), 1))
    return finished + tracker.finish()


def ids(found: list[FrameMasks]) -> list[list[int]]:
    return [list(masks) for _, masks in found]


def test_queries_are_kept_in_order_above_the_threshold() -> None:
    logits = torch.tensor([[0.0, 3, 0], [5, 0, 0], [0, 0, 4], [0, 9, 0]])
    assert select_queries(logits, 0.5, 10).tolist() == [0, 2, 3]
    assert select_queries(logits, 0.0, 10).tolist() == [0, 1, 2, 3]
    assert select_queries(logits[1:2], 0.5, 10).tolist() == []


def test_the_best_queries_come_first_where_some_are_cut() -> None:
    logits = torch.tensor([[0.0, 3, 0], [5, 0, 0], [0, 0, 4], [0, 9, 0], [0, 0, 4]])
    assert select_queries(logits, 0.0, 3).tolist() == [3, 2, 4]  # of equal scores the first


def test_an_object_keeps_its_id_from_clip_to_clip() -> None:
    found = track({range(4): [square(0, 4), square(9, 4)], range(2, 6): [square(9, 4), square(1, 4)]})
    assert [frame for frame, _ in found] == list(range(6))
    assert ids(found)[:4] == [[1, 2]] * 4
    assert ids(found)[4:] == [[2, 1]] * 2


def test_shared_frames_show_the_first_clips_masks() -> None:
    found = track({range(4): [square(0, 4)], range(2, 6): [square(2, 4)]})
    columns = [rle.decode(masks[1]).any(0).nonzero()[0].min() for _, masks in found]
    assert columns == [0, 0, 0, 0, 8, 8]


def test_shared_frames_can_show_the_mean_instead() -> None:
    found = track(
        {range(4): [square(0, 4)], range(2, 6): [square(2, 4) * 3]}, replace(CONFIG, shared_masks="mean")
    )
    columns = [rle.decode(masks[1]).any(0).nonzero()[0].min() for _, masks in found]
    assert columns == [0, 0, 7, 7, 8, 8]  # the mean of both edges


def test_overlap_of_exactly_the_limit_does_not_link() -> None:
    a, b = square(0, 4), square(0, 4)
    iou = overlap(a[:, 2:] > 0, b[:, :2] > 0)[0, 0]
    assert iou == 1
    assert ids(track({range(4): [a], range(2, 6): [b]}, replace(CONFIG, link_iou=1.0)))[-1] == [2]


def test_iou_counts_one_more_pixel() -> None:
    a, b = torch.zeros(2, 1, 4, 4, dtype=torch.bool), torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    a[0, 0, :2] = True
    b[0, 0, 1:3] = True
    np.testing.assert_allclose(overlap(a, b), [[5 / 13], [1 / 9]])


def test_empty_masks_link_only_if_asked_to() -> None:
    empty = square(0, 4, width=0)
    clips = {range(4): [empty], range(2, 6): [empty]}
    assert ids(track(clips))[-1] == [1]
    assert ids(track(clips, replace(CONFIG, link_empty=False)))[-1] == [2]


def test_a_clip_without_objects_ends_all_tracks_and_keeps_its_frames() -> None:
    found = track({range(4): [square(0, 4)], range(2, 6): [], range(4, 8): [square(0, 4)]})
    assert ids(found) == [[1]] * 4 + [[]] * 2 + [[2]] * 2


def test_a_video_without_any_object_has_frames_without_masks() -> None:
    assert track({range(4): [], range(2, 6): []}) == [(frame, {}) for frame in range(6)]
    tracker = InstanceTracker(GEOMETRY, CONFIG)
    assert tracker.finish() == []
    assert tracker.class_logits()[0] == []


@pytest.mark.parametrize("shared_masks", ["earliest", "mean"])
@pytest.mark.parametrize(("length", "shared"), [(4, 0), (4, 2), (5, 3), (5, 4), (3, 2), (1, 0)])
def test_every_frame_is_handed_out_once_and_before_the_next_clip(
    length: int, shared: int, shared_masks: str
) -> None:
    config = InferenceConfig(clip_length=length, overlap=shared, shared_masks=shared_masks)
    tracker = InstanceTracker(GEOMETRY, config)
    found: list[FrameMasks] = []
    for clip in clip_frames(17, length, shared):
        found += tracker.add(clip, square(3, len(clip)), CLASSES)
        assert len(found) == clip.start
        assert sum(owner.logits.shape[1] for owner in tracker._pending) <= 2 * length
    found += tracker.finish()
    assert [frame for frame, _ in found] == list(range(17))
    if shared:
        assert ids(found) == [[1]] * 17
        assert tracker.class_logits()[0] == [1]


def test_mean_over_many_clips_is_a_mean() -> None:
    config = InferenceConfig(clip_length=3, overlap=2, shared_masks="mean")
    tracker = InstanceTracker(GEOMETRY, config)
    base = square(3, 3)
    for start, weight in enumerate([1.0, 2.0, 9.0]):
        tracker.add(range(start, start + 3), base * weight, CLASSES)
    owner = tracker._pending[0]  # frame 2 belongs to the first clip, and all three have it
    torch.testing.assert_close(owner.logits[:, 2], base[:, 2] * 4)


def test_tracking_works_in_inference_mode_and_half_precision() -> None:
    tracker = InstanceTracker(GEOMETRY, replace(CONFIG, shared_masks="mean"))
    for frames in (range(4), range(2, 6)):
        with torch.inference_mode():
            logits, classes = square(3, 4).half() * 1, CLASSES.half() * 1
        tracker.add(frames, logits, classes)
    assert ids(tracker.finish()) == [[1]] * 4


def test_class_evidence_is_the_mean_over_clips() -> None:
    tracker = InstanceTracker(GEOMETRY, CONFIG)
    tracker.add(range(4), square(0, 4), torch.tensor([[0.0, 1.0, 2.0]]))
    tracker.add(range(2, 6), square(0, 4), torch.tensor([[1.0, 1.0, 4.0]]))
    track_ids, logits = tracker.class_logits()
    assert track_ids == [1]
    np.testing.assert_allclose(logits, [[0.5, 1, 3]])


def video(*masks: np.ndarray) -> list[FrameMasks]:
    """One frame with tracks 1, 2, .."""
    return [(0, dict(enumerate(rle.encode(np.stack(masks)), 1)))]


LEFT, RIGHT = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
LEFT[:, :4], RIGHT[:, 2:] = True, True


def test_pairs_are_ranked_and_a_track_may_appear_as_several_classes() -> None:
    logits = np.log([[0.1, 0.6, 0.3], [0.05, 0.05, 0.9]])
    found = select_results(video(LEFT, RIGHT), [1, 2], logits, top_k=3)
    assert [track.source for track in found] == [2, 1, 1]
    assert [(t.id, t.label) for t in found] == [(1, 1), (2, 0), (3, 1)]
    assert [t.score for t in found] == pytest.approx([0.9, 0.6, 0.3])


def test_shared_pixels_of_a_class_go_to_the_better_entry() -> None:
    logits = np.log([[0.1, 0.6, 0.3], [0.05, 0.05, 0.9]])
    better, other_class, worse = select_results(video(LEFT, RIGHT), [1, 2], logits, top_k=3)
    assert (rle.decode(better.masks[0]) == RIGHT).all()
    assert (rle.decode(other_class.masks[0]) == LEFT).all()
    assert (rle.decode(worse.masks[0]) == LEFT & ~RIGHT).all()


def test_equal_scores_are_ranked_by_track_then_class() -> None:
    found = select_results(video(LEFT, RIGHT), [1, 2], np.zeros((2, 3)), top_k=10)
    assert [track.source for track in found] == [1, 1, 2, 2]
    assert [t.label for t in found] == [0, 1, 0, 1]


def test_entries_live_only_where_their_track_does() -> None:
    (_, masks), nothing = video(LEFT)[0], np.zeros((4, 6), bool)
    frames = [(0, {}), (1, masks), (2, dict(enumerate(rle.encode(nothing[None]), 1)))]
    (entry,) = select_results(frames, [1], np.zeros((1, 2)), top_k=10)
    assert list(entry.masks) == [1, 2]
    assert rle.area(entry.masks[2]) == 0


def test_no_tracks_give_no_entries() -> None:
    assert select_results([(0, {})], [], np.zeros((0, 0)), top_k=10) == ()


MOVING = {range(4): [square(0, 4), square(9, 4)], range(2, 6): [square(9, 4)], range(4, 7): []}


@pytest.mark.parametrize("shared_masks", ["earliest", "mean"])
def test_encoding_behind_the_network_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, shared_masks: str
) -> None:
    config = replace(CONFIG, shared_masks=shared_masks)
    expected = track(MOVING, config)
    monkeypatch.setattr(tracking, "_leaves_cpu_idle", lambda _: True)
    assert track(MOVING, config) == expected


def test_what_fails_behind_the_network_is_raised_with_the_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_leaves_cpu_idle", lambda _: True)
    monkeypatch.setattr(rle, "encode_bits", lambda *_: 1 / 0)
    tracker = InstanceTracker(GEOMETRY, CONFIG)
    assert tracker.add(range(4), square(0, 4), CLASSES) == []
    with pytest.raises(ZeroDivisionError):
        tracker.add(range(2, 6), square(0, 4), CLASSES)
