"""Objects given, corrected and removed at any frame, and followed from there in either direction."""

import numpy as np
import pytest
import torch

from tarvis.api import Model
from tarvis.config import InferenceConfig
from tarvis.data.synthetic import synthetic_clip
from tarvis.files import rle
from tarvis.model import build_model
from tarvis.structures import InputError, Reference
from tarvis.video.segmenter import VideoSegmenter
from tarvis.video.tracker import BLOCK
from tests.tarvis.networks import SMALLEST

FRAMES, SIZE = 21, (48, 64)
assert FRAMES > BLOCK + 2
SHORT = {"clip_length": 4, "overlap": 2, "min_size": 48}


@pytest.fixture(scope="module")
def clip():
    return synthetic_clip(3, FRAMES, SIZE, 3, come_and_go=False)


@pytest.fixture(scope="module")
def model():
    """A random network that sees something everywhere."""
    torch.manual_seed(0)
    network = build_model(SMALLEST)
    return Model(network, SMALLEST)


@pytest.fixture
def tracker(model, clip):
    return model.track(clip.frames, **SHORT)


def mask_of(clip, frame, id):
    return clip.instance[frame] == id


def followed(tracker, *where):
    return {result.frame: result.masks for result in tracker.follow(*where)}


def test_following_forwards_is_vos_of_the_masks_given(tracker, model, clip):
    for id in (1, 2):
        tracker.give(id, 0, mask=mask_of(clip, 0, id))
    references = [Reference(id, 0, mask=mask_of(clip, 0, id)) for id in (1, 2)]
    settings = InferenceConfig(**SHORT)
    segmenter = VideoSegmenter(model.network, ["vos"], references=references, settings=settings)
    expected = segmenter.step(clip.frames) + segmenter.flush()
    got = followed(tracker, 0)
    assert list(got) == list(range(FRAMES))
    assert [got[each.frame] for each in expected[1:]] == [each.masks for each in expected[1:]]
    assert np.array_equal(rle.decode(got[0][1]), mask_of(clip, 0, 1))  # as it was given
    assert {track.id: track.masks for track in tracker.result().tracks}[1] == {
        frame: masks[1] for frame, masks in got.items() if 1 in masks
    }


def test_following_backwards_is_following_the_reversed_video(tracker, model, clip):
    tracker.give(1, 20, mask=mask_of(clip, 20, 1))
    other = model.track(clip.frames[::-1], **SHORT)
    other.give(1, 0, mask=mask_of(clip, 20, 1))
    backwards, forwards = followed(tracker, 20, 0), followed(other, 0)
    assert list(backwards) == list(range(20, -1, -1))
    assert [*backwards.values()] == [*forwards.values()]


def test_a_correction_counts_from_its_frame_on_and_changes_nothing_before(tracker, clip):
    tracker.give(1, 0, mask=mask_of(clip, 0, 1))
    tracker.give(2, 0, mask=mask_of(clip, 0, 2))
    before = followed(tracker, 0)
    corrected = tracker.give(1, 9, mask=mask_of(clip, 9, 3))
    kept = {frame: dict(masks) for frame, masks in tracker.targets.masks.items()}
    after = followed(tracker, 9)
    assert list(after) == list(range(9, FRAMES))
    assert after[9] == {1: corrected, 2: before[9][2]}
    assert all(tracker.targets.masks[frame] == kept[frame] for frame in range(9))
    assert any(after[frame] != before[frame] for frame in range(10, FRAMES))
    assert followed(tracker, 0)[9][1] == corrected  # also when all is followed again


def test_objects_come_and_go_where_they_are_given_and_removed(tracker, clip):
    tracker.give(1, 3, mask=mask_of(clip, 3, 1))
    tracker.give(2, 8, mask=mask_of(clip, 8, 2))
    got = followed(tracker, 3, 12)
    assert all(2 not in got[frame] for frame in range(3, 8))
    assert 2 in got[8]
    tracker.remove(1, 6)
    assert all(1 not in tracker.targets.masks[frame] for frame in range(6, 13))
    got = followed(tracker, 3, 12)
    assert [frame for frame in got if 1 in got[frame]][-1] < 6
    tracker.remove(1)
    assert {track.id for track in tracker.result().tracks} == {2}
    with pytest.raises(InputError, match="object 1 was never given; known: 2"):
        tracker.remove(1)


def test_whoever_stops_keeps_what_is_done(tracker, clip):
    tracker.give(1, 0, mask=mask_of(clip, 0, 1))
    tracker.give(1, 15, mask=mask_of(clip, 15, 1))
    following = tracker.follow(0)
    done = [next(following) for _ in range(5)]
    following.close()
    assert sorted(tracker.targets.masks) == [0, 1, 2, 3, 4, 15]
    assert [tracker.targets.masks[each.frame] for each in done] == [each.masks for each in done]


def test_points_are_asked_together_and_each_pixel_goes_to_the_strongest(tracker):
    whole = rle.decode(tracker.give(1, 5, points=[(20, 20)]))
    both = rle.decode(tracker.give(1, 5, points=[(20, 20), (40, 30)]))
    less = rle.decode(tracker.give(1, 5, points=[(20, 20)], negative=[(40, 30)]))
    assert whole.any()
    assert not (less & ~whole).any()
    assert np.array_equal(both & ~less, both ^ less)
    assert tracker.targets.given[1][5].before is None  # points replace points, they do not add up


def test_points_change_what_following_found(tracker, clip):
    tracker.give(1, 0, mask=mask_of(clip, 0, 1))
    followed(tracker, 0, 6)
    found = tracker.targets.masks[6][1]
    first = tracker.give(1, 6, points=[(5, 5)])
    assert tracker.targets.given[1][6].before == found
    assert tracker.give(1, 6, points=[(5, 5)]) == first


def test_a_box_holds_what_it_gives(tracker):
    mask = rle.decode(tracker.give(4, 2, box=(10, 8, 40, 30)))
    rows, columns = np.nonzero(mask)
    assert (rows.min() >= 8, rows.max() < 30, columns.min() >= 10, columns.max() < 40) == (True,) * 4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "expected a mask, points, or a box"),
        ({"points": [(1, 1)], "box": (0, 0, 5, 5)}, "expected a mask, points, or a box"),
        ({"negative": [(1, 1)]}, "expected a point on the object"),
        ({"points": [(64, 1)]}, "outside the frame"),
        ({"box": (10, 10, 5, 20)}, "no box"),
        ({"mask": np.zeros(SIZE)}, "nothing was found"),
        ({"mask": np.ones((4, 4))}, r"expected a mask of the video's size \(48, 64\)"),
    ],
)
def test_what_gives_no_object_is_refused_and_changes_nothing(tracker, given, said):
    with pytest.raises(InputError, match=said):
        tracker.give(1, 0, **given)
    assert (tracker.targets.given, tracker.targets.masks) == ({}, {})


@pytest.mark.parametrize("where", [(0,), (21,), (0, 21), (3, -1)])
def test_ranges_without_frames_or_objects_are_refused(tracker, where):
    with pytest.raises(InputError, match=r"no object is known here|no frames"):
        list(tracker.follow(*where))


def test_other_objects_of_the_frame_are_rivals(tracker, clip, monkeypatch):
    asked = []
    ask = tracker._asked
    monkeypatch.setattr(tracker, "_asked", lambda references: asked.append(references) or ask(references))
    for id in (1, 3):
        tracker.give(id, 5, mask=mask_of(clip, 5, id))
    tracker.give(2, 5, points=[(20, 20)])
    (references,) = asked
    assert [each.point for each in references] == [(20, 20), None, None]
    shown = [each.mask.numpy() for each in references[1:]]
    assert all(np.array_equal(mask, mask_of(clip, 5, id)) for mask, id in zip(shown, (1, 3), strict=True))
    assert len({each.id for each in references}) == 3


def test_following_leaves_objects_alone_that_are_not_followed(tracker, clip):
    tracker.give(1, 0, mask=mask_of(clip, 0, 1))
    before = followed(tracker, 0, 12)
    tracker.remove(1, 8)
    tracker.give(2, 10, mask=mask_of(clip, 10, 2))
    got = followed(tracker, 10, 0)
    assert all(got[frame].get(1) == before[frame].get(1) for frame in range(8))
    assert all(1 not in got[frame] for frame in range(8, 11))
