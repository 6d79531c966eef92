"""The published training files of codes: what is read, errors that name the entry, fuzz."""

import numpy as np
import pytest

from tarvis.datasets.coded_videos import read_coded_videos
from tarvis.files import rle
from tarvis.structures import VOID, InputError
from tests.tarvis.datasets.support import coded_sequence, write_coded
from tests.tarvis.fuzz import edit, only_our_errors

H, W = 8, 12
CAR = 13
OBJECT = 13007


def maps(t):
    """A car on road (class 0) under sky (class 10) and void."""
    ids, semantic = np.zeros((H, W), np.uint16), np.zeros((H, W), np.uint8)
    semantic[:3], semantic[:, 0] = 10, VOID
    ids[3:6, 2 + t : 6 + t] = OBJECT
    semantic[ids > 0] = CAR
    return ids, semantic


def sequence(name="0001", frames=2):
    paths = [f"{name}/{t:06d}.png" for t in range(frames)]
    return coded_sequence(name, paths, map(maps, range(frames)))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a/kitti_step.json"
    write_coded(path, [sequence(name) for name in ("0001", "0003")])
    return path


def read(path, class_set="kitti_step"):
    return read_coded_videos(path, path.parent / "images", class_set)


def edited(path, keys, value):
    edit(path, keys, value)
    return path


def test_what_is_read_is_what_was_written(path):
    first, second = read(path)
    assert (first.name, second.name, first.size) == ("0001", "0003", (H, W))
    assert first.images[1] == path.parent / "images/0001/000001.png"
    assert first.frame_names == ("000000", "000001")
    assert first.truth.labels == {OBJECT: CAR}
    assert first.truth.visible == ((OBJECT,), (OBJECT,))
    for t in range(2):
        ids, semantic = maps(t)
        truth = first.truth.read(t)
        assert (rle.decode(truth.masks[OBJECT]) == (ids == OBJECT)).all()
        assert truth.ids is None
        assert (truth.semantic == semantic).all()


FIRST = ("sequences", 0)


def test_pixels_of_no_class_are_void_not_road(path):
    def without_sky(codes):
        return {key: code for key, code in codes.items() if key != "10"}

    changed = edited(path, (*FIRST, "semantic_segmentations", 0), without_sky)
    assert (read(changed)[0].truth.read(0).semantic[:3] == VOID).all()


def test_void_wins_over_classes(path):
    whole = rle.encode(np.ones((1, H, W), bool))[0]["counts"].decode()
    changed = edited(path, (*FIRST, "semantic_segmentations", 0, "0"), lambda _: whole)
    assert (read(changed)[0].truth.read(0).semantic[:, 0] == VOID).all()


def test_objects_need_no_classes(path):
    def without_classes(sequences):
        return [{key: v for key, v in each.items() if key != "semantic_segmentations"} for each in sequences]

    video = read(edited(path, ("sequences",), without_classes), None)[0]
    assert video.truth.labels == {OBJECT: None}
    assert video.truth.read(1).semantic is None
    with pytest.raises(InputError, match=r"sequences\[0\]: has no 'semantic_segmentations'"):
        read(path)


def test_uncompressed_codes_are_read(path):
    changed = edited(path, (*FIRST, "segmentations", 0, str(OBJECT)), [3, 5, H * W - 8])
    assert rle.area(read(changed)[0].truth.read(0).masks[OBJECT]) == 5


WRONG = [
    (("sequences",), [], "kitti_step.json: has no sequences"),
    ((*FIRST, "id"), "0003", r"sequences\[1\].id: sequence '0003' appears twice"),
    ((*FIRST, "id"), "../0003", "'../0003' is not a path below its folder"),
    ((*FIRST, "height"), 0, r"\[0\].height: expected an integer from 1 to"),
    ((*FIRST, "image_paths", 1), "/etc/x", r"image_paths\[1\]: '/etc/x' is not a path"),
    ((*FIRST, "image_paths", 1), "b/000000.png", "image_paths: a frame '000000' appears twice"),
    ((*FIRST, "segmentations"), [{}], "segmentations: expected 2 segmentations, one an image, got 1"),
    ((*FIRST, "semantic_segmentations"), [{}], "expected 2 segmentations, one an image, got 1"),
    ((*FIRST, "categories"), {}, f"categories: lacks object {OBJECT}, which is shown"),
    ((*FIRST, "categories", "5"), 13, "categories: has object 5, which no frame shows"),
    ((*FIRST, "categories", "x"), 13, "expected keys to be numbers, got 'x'"),
    ((*FIRST, "categories", str(OBJECT)), 2, "expected a class of things of kitti_step: 11, 13, got 2"),
]


@pytest.mark.parametrize(("keys", "value", "message"), WRONG)
def test_wrong_entries_are_named(path, keys, value, message):
    with pytest.raises(InputError, match=message):
        read(edited(path, keys, value))


WRONG_MASKS = [
    ((*FIRST, "segmentations", 0, str(OBJECT)), None, r"segmentations\[0\].13007: expected a run-length"),
    ((*FIRST, "segmentations", 0, str(OBJECT)), "52N2", r"expected a run-length code of \(8, 12\)"),
    ((*FIRST, "semantic_segmentations", 0, "10"), [[1.5]], r"semantic_segmentations\[0\].10\[0\]: expected"),
    ((*FIRST, "semantic_segmentations", 0, "33"), [H * W], r"\[0\]: class 33 is unknown"),
]


@pytest.mark.parametrize(("keys", "value", "message"), WRONG_MASKS)
def test_wrong_masks_are_named_when_their_frame_is_read(path, keys, value, message):
    video = read(edited(path, keys, value))[0]
    video.truth.read(1)
    with pytest.raises(InputError, match=message):
        video.truth.read(0)


@pytest.mark.parametrize("class_set", ["kitti_step", None])
def test_reading_raises_our_errors_alone(path, class_set):
    def use():
        for video in read(path, class_set):
            for t in range(len(video.images)):
                truth = video.truth.read(t)
                assert set(truth.masks) == set(video.truth.visible[t]) <= set(video.truth.labels)
                assert class_set is None or set(np.unique(truth.semantic)) <= {*range(19), VOID}

    only_our_errors(use, [path], path, 255, "²", max_examples=100)
