import numpy as np
import pytest
import torch
from torch import Tensor

from tarvis.files import rle
from tarvis.stitch.panoptic import (
    SemanticMaps,
    compact_ids,
    decode_labels,
    encode_labels,
    paint_over,
    painting_order,
    select_things,
)
from tarvis.stitch.schedule import clip_frames
from tarvis.structures import Geometry, Track

GEOMETRY = Geometry((64, 64), (64, 64))  # logits 16 x 16


def flat(frames: int, *values: float) -> Tensor:
    """Logits [K, T, 16, 16], one value a class."""
    return torch.tensor(values)[:, None, None, None].expand(-1, frames, 16, 16).clone()


def labels_of(maps: list[tuple[int, bytes]]) -> list[int]:
    return [int(decode_labels(png)[0, 0]) for _, png in maps]


def test_shared_frames_take_the_class_of_the_mean() -> None:
    maps = SemanticMaps(GEOMETRY, [3, 5])
    found = maps.add(range(4), flat(4, 1.0, 0.0)) + maps.add(range(2, 6), flat(4, 0.0, 3.0)) + maps.finish()
    assert [frame for frame, _ in found] == list(range(6))
    assert labels_of(found) == [3, 3, 5, 5, 5, 5]


def test_a_frame_of_three_clips_takes_the_mean_of_three() -> None:
    maps = SemanticMaps(GEOMETRY, [0, 1])
    found = []
    for start, lead in enumerate([1.0, 1.0, -1.9]):  # a running half would turn frame 2
        found += maps.add(range(start, start + 3), flat(3, lead, 0.0))
    assert labels_of(found + maps.finish()) == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(("length", "shared"), [(4, 0), (4, 2), (5, 4), (1, 0)])
def test_every_map_is_handed_out_once_and_before_the_next_clip(length: int, shared: int) -> None:
    maps = SemanticMaps(GEOMETRY, [0, 1])
    found = []
    for clip in clip_frames(11, length, shared):
        found += maps.add(clip, flat(len(clip), 0.0, 1.0))
        assert len(found) == clip.start
    found += maps.finish()
    assert [frame for frame, _ in found] == list(range(11))
    assert labels_of(found) == [1] * 11
    assert maps.finish() == []


def test_a_class_set_without_stuff_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one stuff class"):
        SemanticMaps(GEOMETRY, [])


def test_label_maps_survive_compression() -> None:
    labels = np.arange(60, dtype=np.uint8).reshape(6, 10)
    assert (decode_labels(encode_labels(labels)) == labels).all()
    with pytest.raises(ValueError, match="8-bit PNG"):
        decode_labels(b"nonsense")


def select(probabilities: list[list[float]], threshold: float, things: list[int]) -> dict[int, int | None]:
    ids = list(range(1, len(probabilities) + 1))
    tracks = select_things([], ids, np.log(probabilities), things, threshold)
    return {track.id: track.label for track in tracks}


def test_only_likely_things_are_shown() -> None:
    probabilities = [[0.1, 0.2, 0.7], [0.1, 0.7, 0.2], [0.45, 0.15, 0.4], [0.3, 0.3, 0.4]]
    assert select(probabilities, 0.5, [1]) == {1: 1}
    assert select(probabilities, 0.5, [0, 1]) == {1: 1, 2: 0}
    assert select(probabilities, 0.25, [0, 1]) == {1: 1, 2: 0, 4: 1}  # 3 is background
    assert select([], 0.5, [1]) == {}


def test_a_score_of_exactly_the_threshold_is_not_enough() -> None:
    assert select_things([], [1], np.array([[0.0, 0.0]]), [0], 0.5) == ()


def test_ids_stay_below_a_thousand() -> None:
    ids = list(range(1, 1201))
    logits = np.stack([np.zeros(1200), np.linspace(3, 5, 1200)], 1)
    tracks = select_things([], ids, logits, [0], 0.5)
    assert [track.id for track in tracks] == list(range(1, 1000))
    assert tracks[0].score == pytest.approx(1 / (1 + np.exp(-logits[201, 1])))  # the worst 201 are left out
    few = tuple(Track(i, {}, 0, 1.0) for i in (3, 999))
    assert compact_ids(few) == few
    assert [track.id for track in compact_ids((*few, Track(1000, {}, 0, 1.0)))] == [1, 2, 3]


def painted(i: int, label: int, score: float, columns: slice) -> Track:
    mask = np.zeros((1, 4, 8), bool)
    mask[..., columns] = True
    return Track(i, {0: rle.encode(mask)[0]}, label, score)


TRACKS = (painted(1, 2, 0.9, slice(0, 4)), painted(300, 3, 0.6, slice(2, 6)), painted(7, 3, 0.8, slice(7, 8)))


def test_better_tracks_cover_worse_ones_and_all_cover_stuff() -> None:
    stuff = np.ones((4, 8), np.uint8)
    semantic, instance = paint_over(stuff, painting_order(TRACKS), 0)
    assert semantic[0].tolist() == [2, 2, 2, 2, 3, 3, 1, 3]
    assert instance[0].tolist() == [1, 1, 1, 1, 300, 300, 0, 7]
    assert (stuff == 1).all()
    assert (paint_over(stuff, TRACKS, 5)[0] == 1).all()  # no track is visible at this frame
