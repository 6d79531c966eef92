"""Image sets for pre-training: both layouts, maps of objects and classes, bad files."""

import copy
import pickle
import random
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tarvis.datasets.benchmark import Roots
from tarvis.datasets.classes import class_table
from tarvis.datasets.image_sets import IMAGE_SETS, ImageSet
from tarvis.structures import InputError
from tests.tarvis.datasets.support import colours, write
from tests.tarvis.fuzz import junk, mutated, put

H, W = 8, 12
VOID = 255
every_set = pytest.mark.parametrize("images", IMAGE_SETS.values(), ids=IMAGE_SETS)

FIRST, SECOND, GROUND, NOBODY = 70_000, 300, 16_777_215, 9
"""Numbers in the pictures: two things, stuff, and one that no segment has."""


def drawing():
    """[H, W] numbers: ground with both things and a hole."""
    numbers = np.full((H, W), GROUND)
    numbers[1:4, 1:5] = FIRST
    numbers[3:7, 6:9] = SECOND
    numbers[0] = 0
    numbers[7, :2] = NOBODY
    return numbers


def classes(images: ImageSet):
    """Labels of two thing classes and one of stuff."""
    table = class_table(images.name)
    return (*table.things[:2], table.stuff[-1])


def tree_of(images: ImageSet):
    """Image x shows two things, image y only stuff."""
    table = class_table(images.name)
    first, second, ground = (table.ids[label] for label in classes(images))
    of_both = [{"id": GROUND, "category_id": ground, "iscrowd": 0, "area": 50, "bbox": [0, 0, 1, 1]}]
    names = {"x": "aachen_000_x", "y": "aachen_000_y"}
    ending = "_gtFine_leftImg8bit.png" if images.name == "cityscapes" else ".jpg"
    listed = [{"id": FIRST, "category_id": first}, *of_both, {"id": SECOND, "category_id": second}]
    return {
        "images": [
            {"id": image, "file_name": f"{name}{ending}", "height": H, "width": W}
            for image, name in names.items()
        ],
        "annotations": [
            {"image_id": "x", "file_name": "x.png", "segments_info": listed},
            {"image_id": "y", "file_name": "y.png", "segments_info": of_both},
        ],
        "categories": [{"id": k, "name": n} for k, n in zip(table.ids, table.names, strict=True)],
    }


@pytest.fixture
def make(tmp_path):
    """Writes an image set; gives it as `Roots`."""

    def of(images, tree=None):
        write(tmp_path / "segments.json", tree or tree_of(images))
        write(tmp_path / "maps/x.png", colours(drawing()))
        return Roots(tmp_path / "images", tmp_path / "segments.json", tmp_path / "maps")

    return of


LAYOUTS = [
    (
        name,
        "train",
        f"dataset_images/training/{name}",
        f"dataset_annotations/training/{name}_panoptic/segments.json",
        f"dataset_annotations/training/{name}_panoptic/pan_maps",
    )
    for name in IMAGE_SETS
] + [
    ("coco", "train", "train2017", "annotations/panoptic_train2017.json", "annotations/panoptic_train2017"),
    ("coco", "val", "val2017", "annotations/panoptic_val2017.json", "annotations/panoptic_val2017"),
    ("ade20k", "train", "images/training", "ade20k_panoptic_train.json", "ade20k_panoptic_train"),
    ("ade20k", "val", "images/validation", "ade20k_panoptic_val.json", "ade20k_panoptic_val"),
    (
        "cityscapes",
        "train",
        "leftImg8bit/train",
        "gtFine/cityscapes_panoptic_train.json",
        "gtFine/cityscapes_panoptic_train",
    ),
    ("mapillary", "train", "training/images", "training/panoptic/panoptic_2018.json", "training/panoptic"),
]


@pytest.mark.parametrize(("name", "split", "folder", "annotations", "maps"), LAYOUTS)
def test_workspaces_and_official_downloads_are_read(tmp_path, name, split, folder, annotations, maps):
    (tmp_path / folder).mkdir(parents=True)
    write(tmp_path / annotations, tree_of(IMAGE_SETS[name]))
    write(tmp_path / maps / "x.png", colours(drawing()))
    roots = IMAGE_SETS[name].find(tmp_path, split)
    assert roots == Roots(tmp_path / folder, tmp_path / annotations, tmp_path / maps)
    (sample,) = IMAGE_SETS[name].read(roots)
    file = "aachen/aachen_000_x_leftImg8bit.png" if name == "cityscapes" else "aachen_000_x.jpg"
    assert sample.image == tmp_path / folder / file
    assert sample.map == tmp_path / maps / "x.png"
    assert sample.size == (H, W)
    assert sample.read_map().ids.any()


def test_what_was_looked_for_is_said(tmp_path):
    with pytest.raises(InputError, match=r"images of coco train not found; looked for .*/coco, .*train2017"):
        IMAGE_SETS["coco"].find(tmp_path)
    (tmp_path / "val2017").mkdir()
    with pytest.raises(InputError, match=r"annotations of coco val not found; .*panoptic_val2017\.json"):
        IMAGE_SETS["coco"].find(tmp_path, "val")
    with pytest.raises(InputError, match="coco has no split 'test'; known: train, val"):
        IMAGE_SETS["coco"].find(tmp_path, "test")


@every_set
def test_maps_hold_objects_and_classes(make, images):
    (sample,) = images.read(make(images))
    sample = pickle.loads(pickle.dumps(sample))  # as it reaches workers
    numbers = drawing()
    first, second, ground = classes(images)
    truth = sample.read_map()
    assert truth.masks is None
    assert truth.ids.dtype == np.uint16
    assert truth.semantic.dtype == np.uint8
    assert sample.labels == {1: first, 2: second}
    np.testing.assert_array_equal(truth.ids, np.select([numbers == FIRST, numbers == SECOND], [1, 2]))
    expected = np.select([numbers == n for n in (FIRST, SECOND, GROUND)], classes(images), VOID)
    np.testing.assert_array_equal(truth.semantic, expected)


@every_set
def test_a_crowd_has_a_class_but_is_no_object(make, images):
    """The original takes it for one."""
    tree = tree_of(images)
    tree["annotations"][0]["segments_info"][0]["iscrowd"] = 1
    (sample,) = images.read(make(images, tree))
    first, second, _ = classes(images)
    truth = sample.read_map()
    assert sample.labels == {1: second}
    np.testing.assert_array_equal(truth.ids, drawing() == SECOND)
    assert (truth.semantic[drawing() == FIRST] == first).all()


def test_an_image_of_crowds_alone_is_left_out(make):
    coco = IMAGE_SETS["coco"]
    tree = tree_of(coco)
    tree["annotations"].append(copy.deepcopy(tree["annotations"][0]) | {"image_id": "z"})
    tree["images"].append(tree["images"][0] | {"id": "z"})
    for segment in tree["annotations"][2]["segments_info"]:
        segment["iscrowd"] = 1
    assert [sample.num_things for sample in coco.read(make(coco, tree))] == [2]


@every_set
def test_images_without_things_are_left_out_if_asked(make, images):
    roots = make(images)
    assert [sample.map_name for sample in images.read(roots)] == ["x.png"]
    everything = images.read(roots, with_things=False)
    assert [(sample.map_name, sample.num_things) for sample in everything] == [("x.png", 2), ("y.png", 0)]
    assert everything[1].labels == {}


def test_only_stuff_is_an_error_if_things_are_wanted(make):
    tree = tree_of(IMAGE_SETS["coco"])
    del tree["annotations"][0]
    with pytest.raises(InputError, match=r"segments\.json: annotations: no image shows a thing"):
        IMAGE_SETS["coco"].read(make(IMAGE_SETS["coco"], tree))


def test_ignored_categories_are_void_and_no_things(make):
    cityscapes = IMAGE_SETS["cityscapes"]
    tree = tree_of(cityscapes)
    listed = tree["annotations"][0]["segments_info"]
    listed[0]["category_id"], listed[1]["category_id"] = -1, 0
    (sample,) = cityscapes.read(make(cityscapes, tree))
    assert sample.num_things == 1
    truth = sample.read_map()
    np.testing.assert_array_equal(truth.ids, drawing() == SECOND)
    np.testing.assert_array_equal(truth.semantic != VOID, drawing() == SECOND)


def test_train_ids_of_cityscapes_are_refused(make):
    cityscapes = IMAGE_SETS["cityscapes"]
    tree = tree_of(cityscapes) | {"categories": [{"id": 0, "name": "road"}, {"id": 1, "name": "sidewalk"}]}
    with pytest.raises(InputError, match=r"categories\[0\]\.id: 'road' is category 0, but 7 in cityscapes"):
        cityscapes.read(make(cityscapes, tree))


def test_classes_are_ranks_where_ids_have_gaps(make):
    coco = IMAGE_SETS["coco"]
    tree = tree_of(coco)
    tree["annotations"][0]["segments_info"][0]["category_id"] = 90  # the toothbrush, last of 80 things
    (sample,) = coco.read(make(coco, tree))
    assert sample.labels[1] == 79


def test_many_images_take_little_memory(make):
    coco = IMAGE_SETS["coco"]
    tree = tree_of(coco)
    image, annotation = tree["images"][0], tree["annotations"][0]
    tree["images"] = [image | {"id": k} for k in range(2000)]
    tree["annotations"] = [annotation | {"image_id": k, "file_name": f"{k}.png"} for k in range(2000)]
    samples = coco.read(make(coco, tree))
    assert not hasattr(samples[0], "__dict__")
    assert len(pickle.dumps(samples)) < 500 * 2000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "cannot be read"),
        (b"GIF", "not a PNG file"),
        (cv2.imencode(".png", np.zeros((H, W), np.uint8))[1].tobytes(), "expected an RGB picture of 8 bits"),
        (
            cv2.imencode(".png", np.zeros((H, H, 3), np.uint8))[1].tobytes(),
            r"expected a picture of \(8, 12\), got",
        ),
    ],
)
def test_wrong_maps_are_named(make, tmp_path, data, message):
    (sample,) = IMAGE_SETS["coco"].read(make(IMAGE_SETS["coco"]))
    path = tmp_path / "maps/x.png"
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(InputError, match=rf"x\.png: {message}"):
        sample.read_map()


WRONG = [
    (["images", 1, "id"], "x", r"images\[1\]\.id: image 'x' comes twice"),
    (["images", 0, "id"], 1.5, r"images\[0\]\.id: expected an integer"),
    (["images", 0, "file_name"], "../x.jpg", r"images\[0\]\.file_name: '\.\./x\.jpg' is not a path below"),
    (["images", 0, "height"], "8", r"images\[0\]\.height: expected an integer"),
    (["images", 0], {"id": "x"}, r"images\[0\]: has no 'file_name'"),
    (["annotations", 1, "image_id"], "x", r"annotations\[1\]\.image_id: image 'x' comes twice"),
    (["annotations", 1, "image_id"], "z", r"annotations\[1\]\.image_id: image 'z' is unknown"),
    (["annotations", 0, "file_name"], "/x.png", "is not a path below"),
    (["annotations", 0, "segments_info"], None, "expected a list"),
    (["annotations", 0, "segments_info", 1, "id"], FIRST, r"segments_info\[1\]\.id: id 70000 comes twice"),
    (["annotations", 0, "segments_info", 1, "id"], 2**24, "expected an integer from 1 to 16777215"),
    (["annotations", 0, "segments_info", 1, "id"], 0, "expected an integer from 1 to"),
    (["annotations", 0, "segments_info", 0, "iscrowd"], "no", r"iscrowd: expected 0 or 1"),
    (["annotations", 0, "segments_info", 1, "category_id"], 12, "category_id: category 12 is unknown"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG)
def test_wrong_annotations_are_named(make, path, value, message):
    coco = IMAGE_SETS["coco"]
    tree = tree_of(coco)
    put(tree, path, value)
    with pytest.raises(InputError, match=rf"segments\.json: .*{message}"):
        coco.read(make(coco, tree))


JUNK = junk(2**24, FIRST, NOBODY, GROUND, "x.png", "road")


def use(images: ImageSet, roots: Roots):
    samples = images.read(roots)
    for sample in samples:
        truth = sample.read_map()
        assert truth.ids.shape == truth.semantic.shape == sample.size
        assert set(np.unique(truth.ids).tolist()) <= {0, *sample.labels}
        assert set(np.unique(truth.semantic).tolist()) <= {*range(34), VOID}
    return len(samples)


def test_readers_only_raise_our_errors(tmp_path_factory):
    root: Path = tmp_path_factory.mktemp("fuzz")
    cityscapes = IMAGE_SETS["cityscapes"]
    tree = tree_of(cityscapes)
    tree["categories"] = tree["categories"][5:9]
    roots = Roots(root, root / "segments.json", root)
    write(root / "x.png", colours(drawing()))
    picture = (root / "x.png").read_bytes()
    write(roots.annotations, tree)
    assert use(cityscapes, roots) == 1

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32 - 1), JUNK, st.booleans())
    def fuzz(seed, junk, is_picture):
        rng = random.Random(seed)
        write(roots.annotations, tree if is_picture else mutated(tree, rng, junk))
        at = rng.randrange(len(picture))
        damaged = rng.choice([picture[:at], picture[:at] + bytes([rng.randrange(256)]) + picture[at + 1 :]])
        (root / "x.png").write_bytes(damaged if is_picture else picture)
        message, count = "", 0
        try:
            count = use(cityscapes, roots)
        except InputError as error:
            message = str(error)
        assert count or str(root) in message

    fuzz()
