import pytest
import torch
from torch import Tensor

from tarvis.config import InferenceConfig
from tarvis.files import rle
from tarvis.stitch.propagation import (
    ABSENT,
    ObjectPropagation,
    check_reference,
    hide_before_given,
    reference_mask,
)
from tarvis.stitch.schedule import clip_frames
from tarvis.stitch.tracking import FrameMasks
from tarvis.structures import Geometry, Reference

GEOMETRY = Geometry((64, 64), (64, 64))  # logits 16 x 16
CONFIG = InferenceConfig(clip_length=4, overlap=2)


def square(left: int, frames: int, strength: float = 4.0, width: int = 6) -> Tensor:
    """Logits [1, T, 16, 16] of an object at columns left .. left + width."""
    logits = torch.full((1, frames, 16, 16), -4.0)
    logits[..., 4:12, left : left + width] = strength
    return logits


def box(left: int = 8, size: int = 20) -> Tensor:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[8 : 8 + size, left : left + size] = True
    return mask


def columns(found: FrameMasks, i: int) -> list[int]:
    """Which quarter-resolution columns a mask covers, edges aside."""
    mask = rle.decode(found[1][i])
    return [c for c in range(16) if mask[:, 4 * c + 1 : 4 * c + 3].any()]


def test_an_object_is_shown_by_its_reference_then_by_its_prediction() -> None:
    given = [Reference(3, 0, mask=box())]
    propagation = ObjectPropagation(GEOMETRY, CONFIG)
    first = propagation.references(range(4), given)
    assert first.ids == (3,)
    assert first.init_frames == (0,)
    assert first.first_frame == {3: 0}
    assert torch.equal(first.masks, box()[None, None])
    propagation.add(range(4), first.ids, square(5, 4))
    second = propagation.references(range(2, 6), given)
    assert second.ids == (3,)
    assert second.init_frames == (2, 3)
    assert second.first_frame == {}
    assert second.masks.shape == (1, 2, 64, 64)
    assert second.masks[0, 0, 32, 20:44].all()


def test_an_object_seen_nowhere_on_shared_frames_is_lost_for_good() -> None:
    propagation = ObjectPropagation(GEOMETRY, CONFIG)
    logits = torch.cat([square(0, 4), square(9, 4)])
    logits[1, 2:] = -4
    propagation.add(range(4), [1, 2], logits)
    found = propagation.references(range(2, 6), [])
    assert (found.ids, found.lost) == ((1,), (2,))
    propagation.add(range(2, 6), found.ids, square(0, 4))
    assert propagation.references(range(4, 8), []).lost == ()


def test_clips_that_share_no_frame_lose_every_object() -> None:
    propagation = ObjectPropagation(GEOMETRY, CONFIG)
    propagation.add(range(4), [1], square(0, 4))
    found = propagation.references(range(4, 8), [])
    assert (found.ids, found.lost) == ((), (1,))


def test_points_are_pixel_centres_in_units_of_the_original_size() -> None:
    geometry = Geometry((50, 200), (64, 256))
    propagation = ObjectPropagation(geometry, CONFIG)
    found = propagation.references(range(4), [Reference(1, 2, point=(199, 0))])
    assert found.point_ids == (1,)
    assert found.point_frames == (2,)
    torch.testing.assert_close(found.points, torch.tensor([[0.01, 0.9975]]))
    assert found.masks.shape == (0, 1, 64, 256)


def test_an_object_given_by_mask_and_point_is_followed_once() -> None:
    given = [
        Reference(1, 2, point=(5, 5)),
        Reference(2, 3, point=(5, 5)),
        Reference(2, 2, point=(9, 5)),
        Reference(4, 2, point=(5, 5)),
        Reference(4, 3, mask=box()),
        Reference(4, 2, mask=box(30)),
    ]
    propagation = ObjectPropagation(GEOMETRY, CONFIG)
    propagation.add(range(4), [1], square(0, 4))
    found = propagation.references(range(2, 6), given)
    assert found.mask_ids == (1, 4)
    assert found.point_ids == (2,)
    assert found.point_frames == (2,)
    assert found.masks[1].flatten(1).any(1).tolist() == [True, True]


def test_what_is_given_outside_the_clip_is_ignored() -> None:
    propagation = ObjectPropagation(GEOMETRY, CONFIG)
    assert propagation.references(range(4), [Reference(1, 4, mask=box())]).ids == ()


def test_masks_are_padded_and_a_tiny_one_survives_the_resize() -> None:
    geometry = Geometry((400, 600), (40, 60))
    mask = torch.zeros(400, 600, dtype=torch.bool)
    mask[399, 599] = True
    small = reference_mask(mask, geometry)
    assert small.shape == (64, 64)
    assert small.nonzero().tolist() == [[39, 59]]
    mask[:, :] = True
    full = reference_mask(mask, geometry)
    assert full[:40, :60].all()
    assert full.sum() == 40 * 60


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (Reference(0, 0, mask=box()), "ids count from 1"),
        (Reference(1, -1, mask=box()), "frames from 0"),
        (Reference(1, 0), "either a mask or a point"),
        (Reference(1, 0, mask=box(), point=(1, 1)), "either a mask or a point"),
        (Reference(1, 0, mask=box()[:10]), r"size \(64, 64\), got \(10, 64\)"),
        (Reference(1, 0, mask=box(size=0)), "object 1, frame 0: the mask is empty"),
        (Reference(1, 0, point=(64, 3)), "outside the frame"),
        (Reference(1, 0, point=(-1, 3)), "outside the frame"),
    ],
)
def test_references_that_do_not_fit_are_refused(reference: Reference, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_reference(reference, (64, 64))
    if reference.frame >= 0:
        with pytest.raises(ValueError, match=message):
            ObjectPropagation(GEOMETRY, CONFIG).references(range(4), [reference])


def test_objects_are_hidden_before_they_are_given() -> None:
    logits = hide_before_given(torch.ones(3, 4, 2, 2), [7, 1, 5], {1: 2, 5: 0})
    assert (logits == ABSENT).all((2, 3)).tolist() == [[False] * 4, [True, True, False, False], [False] * 4]
    assert hide_before_given(torch.ones(0, 4, 2, 2), [], {}).shape == (0, 4, 2, 2)


def test_a_video_of_one_clip_has_masks() -> None:
    propagation = ObjectPropagation(GEOMETRY, CONFIG)
    assert propagation.add(range(3), [5], square(2, 3)) == []
    found = propagation.finish(3)
    assert [frame for frame, _ in found] == [0, 1, 2]
    assert all(columns(f, 5) == [2, 3, 4, 5, 6, 7] for f in found)


def test_each_pixel_goes_to_the_strongest_object() -> None:
    propagation = ObjectPropagation(GEOMETRY, CONFIG)
    propagation.add(range(1), [9, 2], torch.cat([square(0, 1, 5.0), square(3, 1, 3.0)]))
    ((_, masks),) = propagation.finish(1)
    assert list(masks) == [9, 2]
    assert not (rle.decode(masks[9]) & rle.decode(masks[2])).any()
    assert columns((0, masks), 9) == [0, 1, 2, 3, 4, 5]


def test_later_clips_replace_shared_frames_but_the_last_one_does_not() -> None:
    propagation = ObjectPropagation(GEOMETRY, CONFIG)
    found = []
    for frames, left in ((range(4), 0), (range(2, 6), 4), (range(4, 8), 8)):
        found += propagation.add(frames, [1], square(left, 4))
    found += propagation.finish(8)
    assert [columns(f, 1)[0] for f in found] == [0, 0, 4, 4, 4, 4, 8, 8]


def test_an_object_that_a_later_clip_does_not_see_keeps_its_earlier_mask() -> None:
    propagation = ObjectPropagation(GEOMETRY, CONFIG)
    propagation.add(range(4), [1, 2], torch.cat([square(0, 4), square(9, 4)]))
    later = torch.cat([square(9, 4), square(9, 4, -4.0)])
    found = propagation.add(range(2, 6), [1, 2], later)
    found += propagation.add(range(4, 8), [1], square(9, 4)) + propagation.finish(8)
    assert [list(masks) for _, masks in found] == [[1, 2]] * 4 + [[1]] * 4
    masks = found[2][1]
    assert (rle.decode(masks[1]) & rle.decode(masks[2])).any()


def test_shared_frames_can_show_the_mean_of_all_clips() -> None:
    config = InferenceConfig(clip_length=3, overlap=2, shared_objects="mean")
    propagation = ObjectPropagation(GEOMETRY, config)
    found = []
    for start, strength in enumerate([4.0, -3.0, -2.0]):
        found += propagation.add(range(start, start + 3), [1], square(2, 3, strength))
    found += propagation.finish(5)
    assert [list(masks) for _, masks in found] == [[1], [1], [], [], []]  # means 4, 0.5, -1/3, -2.5, -2


def test_the_mean_leaves_out_clips_in_which_an_object_was_not_given_yet() -> None:
    config = InferenceConfig(clip_length=4, overlap=2, shared_objects="mean")
    propagation = ObjectPropagation(GEOMETRY, config)
    propagation.add(range(4), [1], square(0, 4))
    later = hide_before_given(torch.cat([square(0, 4), square(9, 4)]), [1, 2], {1: 1, 2: 1})
    propagation.add(range(2, 6), [1, 2], later)
    assert [list(masks) for _, masks in propagation.finish(6)] == [[1], [1, 2], [1, 2], [1, 2]]


def test_skipped_clips_and_frames_before_the_first_object_have_no_masks() -> None:
    propagation = ObjectPropagation(GEOMETRY, CONFIG)
    found = propagation.add(range(3, 7), [1], square(0, 4))
    assert found == [(0, {}), (1, {}), (2, {})]
    found += propagation.skip(range(5, 9)) + propagation.skip(range(7, 11))
    assert propagation.references(range(9, 13), []).ids == ()
    found += propagation.add(range(9, 13), [2], square(0, 4)) + propagation.finish(13)
    assert [frame for frame, _ in found] == list(range(13))
    assert [list(masks) for _, masks in found] == [[]] * 3 + [[1]] * 4 + [[]] * 2 + [[2]] * 4


def test_a_video_without_any_object_has_frames_without_masks() -> None:
    assert ObjectPropagation(GEOMETRY, CONFIG).finish(3) == [(0, {}), (1, {}), (2, {})]


@pytest.mark.parametrize("shared_objects", ["latest", "mean"])
@pytest.mark.parametrize(("length", "shared"), [(4, 0), (4, 2), (5, 4), (1, 0)])
def test_every_frame_is_handed_out_once_and_before_the_next_clip(
    length: int, shared: int, shared_objects: str
) -> None:
    config = InferenceConfig(clip_length=length, overlap=shared, shared_objects=shared_objects)
    propagation = ObjectPropagation(GEOMETRY, config)
    found: list[FrameMasks] = []
    for clip in clip_frames(13, length, shared):
        found += propagation.add(clip, [1], square(4, len(clip)))
        assert len(found) == clip.start
        assert len(propagation._pending) <= length
        assert len(propagation._means) <= length
    found += propagation.finish(13)
    assert [frame for frame, _ in found] == list(range(13))
    assert all(list(masks) == [1] for _, masks in found)


def test_logits_that_do_not_match_the_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="expected logits of 2 objects on 4 frames"):
        ObjectPropagation(GEOMETRY, CONFIG).add(range(4), [1, 2], square(0, 4))


def test_masks_have_the_original_size() -> None:
    propagation = ObjectPropagation(Geometry((31, 45), (60, 60)), CONFIG)
    propagation.add(range(1), [1], square(4, 1))
    ((_, masks),) = propagation.finish(1)
    assert rle.decode(masks[1]).shape == (31, 45)
