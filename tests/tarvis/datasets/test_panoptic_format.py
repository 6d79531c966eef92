"""How frames are written in COCO's panoptic format: colours, and the segments that describe a picture."""

import numpy as np

from tarvis.datasets.panoptic_format import assign_colours, coco_encoding
from tarvis.structures import Track

PALETTE = [(128, 64, 128), (244, 35, 232), (70, 70, 70), (0, 0, 10)]


def test_coco_segments_describe_the_picture():
    semantic = np.tile(np.uint8([2, 2, 2, 2, 3, 3, 1, 3]), (4, 1))
    instance = np.tile(np.uint16([1, 1, 1, 1, 300, 300, 0, 7]), (4, 1))
    tracks = (Track(1, {}, 2, 0.9), Track(300, {}, 3, 0.6), Track(7, {}, 3, 0.8))
    image, segments = coco_encoding(semantic, instance, PALETTE, assign_colours(tracks, PALETTE))
    packed = image.astype(int) @ [1, 256, 65536]
    assert {s.id for s in segments} == set(np.unique(packed))
    assert [(s.track, s.category, s.area) for s in segments] == [
        (0, 1, 4),
        (1, 2, 16),
        (7, 3, 4),
        (300, 3, 8),
    ]
    assert all((packed == s.id).sum() == s.area for s in segments)
    assert segments[0].id == 244 + 256 * 35 + 65536 * 232


def test_colours_are_unique_near_their_class_and_the_same_in_every_run():
    tracks = [Track(i, {}, i % 4, 1.0) for i in range(1, 400)]
    colours = assign_colours(tracks, PALETTE)
    assert colours == assign_colours(tracks, PALETTE)
    assert len(set(colours.values())) == len(tracks)
    assert [colours[i] for i in (1, 2, 3, 4)] == [PALETTE[i % 4] for i in (1, 2, 3, 4)]
    assert (0, 0, 0) not in colours.values()
    for track in tracks:
        assert track.label is not None
        near = zip(colours[track.id], PALETTE[track.label], strict=True)
        assert all(abs(a - b) <= 30 for a, b in near)


def test_a_colour_that_a_stuff_class_shares_is_not_given_to_a_track():
    colours = assign_colours([Track(1, {}, 1, 1.0)], [(9, 9, 9), (9, 9, 9)])
    assert colours[1] != (9, 9, 9)
