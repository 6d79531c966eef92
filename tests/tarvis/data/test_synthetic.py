import itertools

import numpy as np
import pytest

from tarvis.data.synthetic import SyntheticScene, synthetic_clip, synthetic_frames
from tarvis.datasets.classes import class_table

SEEDS = range(12)
SUMS = [615345, 729, 3188]


@pytest.fixture(scope="module")
def clips():
    return {seed: synthetic_clip(seed, num_frames=24) for seed in SEEDS}


def test_a_clip_is_what_it_says(clips):
    table = class_table("synthetic")
    for clip in clips.values():
        assert clip.frames.shape == (24, 128, 192, 3)
        assert clip.instance.shape == clip.semantic.shape == (24, 128, 192)
        assert clip.frames.dtype == clip.instance.dtype == clip.semantic.dtype == np.uint8
        assert list(clip.classes) == [1, 2, 3]
        assert len(set(clip.classes.values())) == 3
        labels = np.array([0, *clip.classes.values()])[clip.instance]
        is_object = clip.instance > 0
        np.testing.assert_array_equal(clip.semantic[is_object], labels[is_object])
        assert set(np.unique(clip.semantic[~is_object])) == set(table.stuff)
        assert set(clip.classes.values()) <= set(table.things)


def test_a_seed_gives_the_same_pixels_every_time_and_others_differ(clips):
    again = synthetic_clip(3, num_frames=24)
    np.testing.assert_array_equal(again.frames, clips[3].frames)
    np.testing.assert_array_equal(again.instance, clips[3].instance)
    assert not np.array_equal(clips[4].frames, clips[3].frames)


def test_pixels_are_those_that_other_machines_make():
    clip = synthetic_clip(7, num_frames=40, size=(32, 48))
    assert [int(maps[30].sum(dtype=np.int64)) for maps in (clip.frames, clip.instance, clip.semantic)] == SUMS


def test_a_stream_begins_with_the_frames_of_the_clip(clips):
    stream = synthetic_frames(5, 5000)
    for t, (frame, instance, semantic) in enumerate(itertools.islice(stream, 5)):
        np.testing.assert_array_equal(frame, clips[5].frames[t])
        np.testing.assert_array_equal(instance, clips[5].instance[t])
        np.testing.assert_array_equal(semantic, clips[5].semantic[t])
    late = SyntheticScene(5, (128, 192)).render(4999)
    assert late.instance.any()


def test_objects_move_smoothly(clips):
    for clip in clips.values():
        centers = np.array([np.argwhere(instance == 1).mean(0) for instance in clip.instance])
        step = np.hypot(*np.diff(centers, axis=0).T)
        assert 0.2 < step.mean() < 6
        areas = (clip.instance == 1).sum((1, 2))
        assert areas.min() > 0


def test_some_objects_hide_others_come_late_or_leave(clips):
    seen = np.array([[(clip.instance == id_).any((1, 2)) for id_ in (1, 2, 3)] for clip in clips.values()])
    assert seen[:, 0].all()
    assert (~seen[:, :, 0] & seen.any(2)).any()
    assert (seen[:, :, 0] & ~seen[:, :, -1]).any()
    alone = [synthetic_clip(seed, 24, num_objects=1) for seed in SEEDS]
    assert all((clip.instance == 1).any((1, 2)).all() for clip in alone)
    together = [synthetic_clip(seed, 24, come_and_go=False) for seed in SEEDS]
    assert all((clip.instance[0] == id_).sum() > 100 for clip in together for id_ in (1, 2, 3))


def test_nothing_hides_the_nearest_object():
    """Its area changes slowly as long as it stays off the border; that of a farther one may jump."""
    changes = []
    for seed in SEEDS:
        area = np.array(
            [(f.instance[3:-3, 3:-3] == 3).sum() for f in synthetic_frames(seed, 12, come_and_go=False)]
        )
        whole = [(f.instance == 3).sum() for f in synthetic_frames(seed, 12, come_and_go=False)]
        inside = area == whole
        changes += list(abs(np.diff(area) / area[1:])[inside[1:] & inside[:-1]])
    assert len(changes) > 30
    assert max(changes) < 0.1


def test_classes_differ_in_colour():
    """The mean colours of the classes, over many clips, lie far apart."""
    colors = {}
    for seed in SEEDS:
        clip = synthetic_clip(seed, num_frames=1)
        for k in np.unique(clip.semantic):
            colors.setdefault(int(k), []).append(clip.frames[clip.semantic == k].mean(0))
    means = {k: np.mean(values, axis=0) for k, values in colors.items()}
    assert len(means) == 8
    assert min(np.linalg.norm(means[a] - means[b]) for a, b in itertools.combinations(means, 2)) > 40


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 200), (256, 64)])
def test_any_size_and_number_of_objects(size):
    clip = synthetic_clip(0, num_frames=2, size=size, num_objects=9)
    assert clip.frames.shape == (2, *size, 3)
    assert synthetic_clip(0, 1, size, num_objects=0).instance.max() == 0


def test_bad_arguments_are_named():
    for arguments in ({"seed": -1}, {"seed": 0, "size": (0, 4)}, {"seed": 0, "num_objects": 255}):
        with pytest.raises(ValueError, match="expected seed"):
            synthetic_clip(**arguments)
