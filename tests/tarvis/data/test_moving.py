"""Clips of photographs whose objects move: the same for the same numbers, and true to their labels."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from tarvis.data.clips import Kind
from tarvis.data.moving import MovingClips
from tarvis.data.settings import MovingSettings
from tarvis.data.synthetic import synthetic_clip
from tarvis.datasets.benchmark import FrameTruth
from tarvis.structures import InputError

SIZE = (64, 96)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Four pictures of two objects each."""
    folder = tmp_path_factory.mktemp("photographs")

    def made(seed):
        clip = synthetic_clip(seed, 1, (96, 128), 2, come_and_go=False)
        path = folder / f"{seed}.png"
        cv2.imwrite(str(path), clip.frames[0][..., ::-1])
        truth = FrameTruth(ids=clip.instance[0].astype(np.uint16))
        labels = {1: 0, 2: 0}
        return SimpleNamespace(
            name=str(seed), image=path, size=(96, 128), labels=labels, read_map=lambda: truth
        )

    return [made(seed) for seed in range(4)]


def clips_of(photographs, **settings):
    settings = MovingSettings(sizes=(SIZE,), clip_lengths=(2, 4), **settings)
    return MovingClips([photographs], photographs, settings, max_objects=3)


def test_there_is_a_kind_for_each_length_and_a_clip_for_each_scene(photographs):
    clips = clips_of(photographs)
    assert clips.kinds() == {Kind("vos", length=length): 4 for length in (2, 3, 4)}
    assert clips.origin(Kind("vos", length=2), 3) == "3"


@pytest.mark.parametrize("in_place", [0.0, 1.0])
def test_clips_follow_from_the_generator_and_show_what_they_give(photographs, in_place):
    clips = clips_of(photographs, in_place=in_place, twins=0.5)
    for seed in range(6):
        kind = Kind("vos", length=2 + seed % 3)
        one, other = (clips.draw(kind, seed % 4, np.random.default_rng(seed)) for _ in range(2))
        if one is None:
            assert other is None
            continue
        assert one.frames.shape == (kind.length, *SIZE, 3)
        assert np.array_equal(one.frames, other.frames)
        assert np.array_equal(one.layers, other.layers)
        assert 1 <= len(one.labels) <= 3
        assert set(one.labels) == {-1}
        assert all(one.mask(k + 1).sum() >= 24 for k in range(len(one.labels)))
        assert one.layers.max() <= len(one.labels)


def test_photographs_without_objects_are_refused():
    with pytest.raises(InputError, match=r"data\.moving\.objects names no photograph"):
        MovingClips([[]], [], MovingSettings())
