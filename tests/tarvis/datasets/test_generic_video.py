"""The JSON of converted training splits: it reads as it was written, errors name the entry, fuzz."""

import json
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tarvis.datasets.benchmark import VOID
from tarvis.datasets.generic_video import coded_sequence, read_generic, write_generic
from tarvis.files import rle
from tarvis.structures import InputError
from tests.tarvis.fuzz import junk, mutated

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
    return coded_sequence(name, paths, [maps(t) for t in range(frames)], lambda id_: id_ // 1000)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a/kitti_step.json"
    meta = {"category_labels": {"13": "car"}}
    write_generic(path, (sequence(name) for name in ("0001", "0003")), meta)
    return path


def read(path, class_set="kitti_step"):
    return read_generic(path, path.parent / "images", class_set)


def edited(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
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


def test_pixels_of_no_class_are_void_not_road(path):
    def forget_sky(tree):
        del tree["sequences"][0]["semantic_segmentations"][0]["10"]

    semantic = read(edited(path, forget_sky))[0].truth.read(0).semantic
    assert (semantic[:3] == VOID).all()


def test_void_wins_over_classes(path):
    def all_road(tree):
        whole = rle.encode(np.ones((1, H, W), bool))[0]["counts"].decode()
        tree["sequences"][0]["semantic_segmentations"][0]["0"] = whole

    semantic = read(edited(path, all_road))[0].truth.read(0).semantic
    assert (semantic[:, 0] == VOID).all()


def test_objects_need_no_classes(path):
    def without_classes(tree):
        for each in tree["sequences"]:
            del each["semantic_segmentations"]

    video = read(edited(path, without_classes), None)[0]
    assert video.truth.labels == {OBJECT: None}
    assert video.truth.read(1).semantic is None
    with pytest.raises(InputError, match=r"sequences\[0\]: has no 'semantic_segmentations'"):
        read(path)


def test_uncompressed_codes_are_read(path):
    def uncompressed(tree):
        tree["sequences"][0]["segmentations"][0][str(OBJECT)] = [3, 5, H * W - 8]

    assert rle.area(read(edited(path, uncompressed))[0].truth.read(0).masks[OBJECT]) == 5


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    def breaks():
        yield sequence()
        raise InputError("0003/000001.png is missing")

    with pytest.raises(InputError, match="is missing"):
        write_generic(tmp_path / "a.json", breaks(), {})
    assert not list(tmp_path.iterdir())


def test_labels_of_a_sequence_have_one_size():
    with pytest.raises(InputError, match=r"labels of b.png: expected a size of \(8, 12\), .* got \(4, 12\)"):
        coded_sequence("dog", ["a.png", "b.png"], [maps(0), tuple(m[:4] for m in maps(1))], int)


def at(*keys, value):
    def change(tree):
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return change


FIRST = ("sequences", 0)
WRONG = [
    (at("sequences", value=[]), "kitti_step.json: has no sequences"),
    (at(*FIRST, "id", value="0003"), r"sequences\[1\].id: sequence '0003' comes twice"),
    (at(*FIRST, "id", value="../0003"), "'../0003' is not a path below its folder"),
    (at(*FIRST, "height", value=0), r"\[0\].height: expected an integer from 1 to"),
    (at(*FIRST, "image_paths", 1, value="/etc/x"), r"image_paths\[1\]: '/etc/x' is not a path"),
    (at(*FIRST, "image_paths", 1, value="b/000000.png"), "image_paths: a frame '000000' comes twice"),
    (at(*FIRST, "segmentations", value=[{}]), "segmentations: expected 2 segmentations, one an image, got 1"),
    (at(*FIRST, "semantic_segmentations", value=[{}]), "expected 2 segmentations, one an image, got 1"),
    (at(*FIRST, "categories", value={}), f"categories: lacks object {OBJECT}, which is shown"),
    (at(*FIRST, "categories", "5", value=13), "categories: has object 5, which no frame shows"),
    (at(*FIRST, "categories", "x", value=13), "expected keys to be numbers, got 'x'"),
    (
        at(*FIRST, "categories", str(OBJECT), value=2),
        "expected a class of things of kitti_step: 11, 13, got 2",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_entries_are_named(path, change, message):
    with pytest.raises(InputError, match=message):
        read(edited(path, change))


WRONG_MASKS = [
    (
        at(*FIRST, "segmentations", 0, str(OBJECT), value=None),
        r"segmentations\[0\].13007: expected a run-length",
    ),
    (at(*FIRST, "segmentations", 0, str(OBJECT), value="52N2"), r"expected a run-length code of \(8, 12\)"),
    (
        at(*FIRST, "semantic_segmentations", 0, "10", value=[[1.5]]),
        r"semantic_segmentations\[0\].10: expected",
    ),
    (at(*FIRST, "semantic_segmentations", 0, "33", value=[H * W]), r"\[0\]: class 33 is unknown"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_MASKS)
def test_wrong_masks_are_named_when_their_frame_is_read(path, change, message):
    video = read(edited(path, change))[0]
    video.truth.read(1)
    with pytest.raises(InputError, match=message):
        video.truth.read(0)


JUNK = junk(255, "²")


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32 - 1), JUNK, st.sampled_from(["kitti_step", None]))
def test_reading_raises_our_errors_alone(tmp_path_factory, seed, junk, class_set):
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    tree = json.loads(json.dumps({"meta": {}, "sequences": [sequence("0001"), sequence("0003")]}))
    path.write_text(json.dumps(mutated(tree, random.Random(seed), junk)))
    message = "fuzz.json: "
    try:
        for video in read(path, class_set):
            for t in range(len(video.images)):
                truth = video.truth.read(t)
                assert set(truth.masks) == set(video.truth.visible[t]) <= set(video.truth.labels)
                assert class_set is None or set(np.unique(truth.semantic)) <= {*range(19), VOID}
    except InputError as error:
        message = str(error)
    assert "fuzz.json: " in message
