"""Weights with one class set on a benchmark with another."""

import json

import numpy as np
import pytest

from tarvis.config import OwnClasses
from tarvis.datasets.classes import class_table, named_classes
from tarvis.datasets.classmap import ClassMap
from tarvis.stitch.panoptic import decode_labels, encode_labels
from tarvis.structures import InputError, Track, VideoResult

KITTI, SYNTHETIC = class_table("kitti_step"), class_table("synthetic")
NAMES = {"sky": "sky", "grass": "terrain", "bricks": "wall", "disc": "car", "square": "person", "star": "car"}


def write(folder, names, class_set="synthetic"):
    path = folder / "classes.json"
    path.write_text(json.dumps({"class_set": class_set, "names": names}))
    return path


def test_results_are_translated_by_name(tmp_path):
    classes = ClassMap.read(write(tmp_path, NAMES), KITTI, {})
    labels = np.array([[SYNTHETIC.names.index(name) for name in ("sky", "grass", "bricks")]], np.uint8)
    tracks = tuple(
        Track(i, {}, SYNTHETIC.names.index(name), 0.5) for i, name in enumerate(("disc", "ring", "star"), 1)
    )
    result = classes.apply(VideoResult("vps", (1, 3), 1, tracks, {0: encode_labels(labels)}))
    assert [(track.id, track.label) for track in result.tracks] == [
        (1, KITTI.names.index("car")),  # a ring has no name here
        (3, KITTI.names.index("car")),
    ]
    expected = [[KITTI.names.index(name) for name in ("sky", "terrain", "wall")]]
    assert decode_labels(result.stuff[0]).tolist() == expected


def test_given_objects_have_no_class_to_translate(tmp_path):
    classes = ClassMap.read(write(tmp_path, {}), class_table("ovis"), {})
    result = VideoResult("vos", (1, 3), 1, (Track(7, {}),))
    assert classes.apply(result) == result


@pytest.mark.parametrize(
    ("names", "class_set", "message"),
    [
        (NAMES, "nonsense", "class_set: expected one of"),
        (NAMES | {"cube": "car"}, "synthetic", "names: synthetic has no class 'cube'"),
        (NAMES | {"ring": "boat"}, "synthetic", r"names.ring: expected a class of kitti_step, got 'boat'"),
        (NAMES | {"ring": "sky"}, "synthetic", "names.ring: ring is a thing, sky is stuff"),
        (NAMES | {"ring": 3}, "synthetic", "names.ring: expected a string"),
        ({"disc": "car"}, "synthetic", "names: has no name for sky, which is stuff"),
    ],
)
def test_a_wrong_map_is_refused(tmp_path, names, class_set, message):
    with pytest.raises(InputError, match=message):
        ClassMap.read(write(tmp_path, names, class_set), KITTI, {})


def test_own_class_sets_are_known_by_what_comes_with_the_weights(tmp_path):
    own = {"mine": OwnClasses(("auto", "cat"), (True, True))}
    names = {"auto": "car"}
    table = named_classes("my_val", ("dog", "car"), (True, True))
    assert ClassMap.read(write(tmp_path, names, "mine"), table, own) == ClassMap("mine", (1, None))
    with pytest.raises(InputError, match="class_set: expected one of mine, youtube_vis_2021, "):
        ClassMap.read(write(tmp_path, names, "other"), table, own)
    with pytest.raises(InputError, match=r"names\.auto: expected a class of my_val, got 'cow'"):
        ClassMap.read(write(tmp_path, {"auto": "cow"}, "mine"), table, own)


def test_classes_are_matched_by_name():
    own = named_classes("mine", ("car", "sky", "cat"), (True, False, True))
    other = named_classes("my_val", ("sky", "cat", "dog"), (True, True, True))
    assert ClassMap.by_name(own, other) == ClassMap("mine", (None, None, 1))
    with pytest.raises(InputError, match=r"kitti_step and the class set 'mine' .* have no class in common"):
        ClassMap.by_name(named_classes("mine", ("cat",), (True,)), KITTI)
