"""KITTI-STEP: reading, writing, training, and what is wrong with files."""

import pickle

import numpy as np
import pytest

from tarvis.datasets.kitti_step import KittiStep
from tarvis.files import rle
from tarvis.files.pictures import read_rgb
from tarvis.stitch.panoptic import encode_labels
from tarvis.structures import VOID, InputError, Track, VideoResult
from tests.tarvis.datasets.support import png, write

H, W, FRAMES = 12, 20, 3
ROAD, SKY, PERSON, CAR = 0, 10, 11, 13
SAME_ID = 300
"""Of a person and a car: ids are counted for each class. Above 255 it needs two channels."""
kitti = KittiStep()


def labels(t):
    """Classes and ids: a person and a car that move, a crowd of cars, void at the left border."""
    semantic, ids = np.full((H, W), ROAD, np.uint8), np.zeros((H, W), np.uint16)
    semantic[:3], semantic[3:5, 15:] = SKY, CAR
    for class_, rows in ((PERSON, slice(4, 7)), (CAR, slice(8, 11))):
        semantic[rows, 2 + t : 8 + t] = class_
        ids[rows, 2 + t : 8 + t] = SAME_ID
    semantic[:, 0], ids[:, 0] = VOID, 0
    return semantic, ids


def step(semantic, ids):
    return np.stack([semantic, ids >> 8, ids & 255], -1).astype(np.uint8)


def make(folder, names, picture=lambda _: np.full((H, W, 3), 90, np.uint8)):
    for name in names:
        for t in range(FRAMES):
            write(folder / name / f"{t:06d}.png", picture(t))


def make_official(root):
    make(root / "training/image_02", ["0000", "0001", "0002", "0006"])
    make(root / "testing/image_02", ["0000", "0001"])
    make(root / "panoptic_maps/val", ["0002", "0006"], lambda t: step(*labels(t)))
    make(root / "panoptic_maps/train", ["0000", "0001"], lambda t: step(*labels(t)))
    return root


@pytest.fixture
def official(tmp_path):
    return make_official(tmp_path / "kitti")


def read(root, split="val"):
    return kitti.read(kitti.find(root, split), split)


def result(ids=(SAME_ID, SAME_ID + 1)):
    """What a network would hand over that sees everything."""
    tracks, stuff = {k: {} for k in ids}, {}
    for t in range(FRAMES):
        semantic, instances = labels(t)
        for k, class_ in zip(ids, (PERSON, CAR), strict=True):
            tracks[k][t] = rle.encode(((semantic == class_) & (instances > 0))[None])[0]
        stuff[t] = encode_labels(np.where(instances > 0, ROAD, np.where(semantic == VOID, ROAD, semantic)))
    found = zip(ids, (PERSON, CAR), strict=True)
    things = tuple(Track(k, tracks[k], class_, 0.9) for k, class_ in found)
    return VideoResult("vps", (H, W), FRAMES, things, stuff)


def write_perfect(root, out, split="val"):
    videos = read(root, split)
    for video in videos:
        kitti.write(result(), video, out)
    kitti.join([None] * len(videos), videos, split, out)
    return videos


def names(videos):
    return [video.name for video in videos]


def test_splits_of_the_download_are_told_apart_by_their_lists(official):
    assert names(read(official, "val")) == ["0002", "0006"]
    assert names(read(official, "train")) == ["0000", "0001"]
    assert names(read(official, "test")) == ["0000", "0001"]
    video = read(official)[0]
    assert video.frame_names == ("000000", "000001", "000002")
    assert all(path.is_file() for path in video.images)
    assert kitti.find(official, "val").truth == official / "panoptic_maps/val"
    assert kitti.find(official, "test").truth is None


def test_plain_folders_are_read(tmp_path):
    make(tmp_path / "own", ["street_1", "street_2"])
    for split in kitti.splits:
        assert names(read(tmp_path / "own", split)) == ["street_1", "street_2"]
    assert kitti.find(tmp_path / "own", "val").truth is None


def test_sequences_of_another_split_are_not_taken_for_those_of_this(tmp_path):
    make(tmp_path / "training/image_02", ["0002", "0006"])
    assert names(read(tmp_path, "val")) == ["0002", "0006"]
    with pytest.raises(InputError, match="image_02: has no sequence of KITTI-STEP train"):
        read(tmp_path, "train")


def test_what_was_looked_for_is_said(tmp_path):
    make(tmp_path / "dataset_images/training/kitti_step", ["0000"])
    with pytest.raises(InputError, match=r"annotations of KITTI-STEP train not found; .*kitti_step.json"):
        kitti.find(tmp_path, "train")
    make(tmp_path / "own", ["b"])
    (tmp_path / "own/a").mkdir()
    with pytest.raises(InputError, match=r"own/a: has no \.png files"):
        read(tmp_path / "own")


def test_pixels_are_class_and_id_in_two_channels(official, tmp_path):
    video = read(official)[0]
    for out in ("a", "b"):
        kitti.write(result(), video, tmp_path / out)
    path = tmp_path / "a/0002/000000.png"
    rgb = read_rgb(path)
    assert rgb[4, 2].tolist() == [PERSON, 1, SAME_ID - 256]
    assert rgb[8, 2].tolist() == [CAR, 1, SAME_ID - 255]
    assert rgb[0, 5].tolist() == [SKY, 0, 0]
    assert path.read_bytes() == (tmp_path / "b/0002/000000.png").read_bytes()


def edited(change):
    semantic, ids = labels(1)
    ids[semantic == VOID] = 0
    change(semantic, ids)
    return png(step(semantic, ids))


def put(array, value):
    array[5, 5] = value


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("0006/000002.png", None, "0006: lacks 000002.png; expected 3 frames, got 2"),
        ("0006/000002.png", png(step(*labels(1))[:9]), r"of \(12, 20\), got \(9, 20\)"),
        (
            "0006/000002.png",
            edited(lambda s, _: put(s, 19)),
            "expected classes below 19 or 255 in red, got 19",
        ),
        ("0006/000002.png", edited(lambda _, i: put(i, 1000)), "expected ids up to 999, got 1000"),
        (
            "0006/000002.png",
            edited(lambda s, _: put(s, ROAD)),
            "shows id 300 of class 0, which has no instances",
        ),
    ],
)
def test_damaged_results_are_not_accepted(official, tmp_path, file, data, message):
    out = tmp_path / "out"
    videos = write_perfect(official, out)
    (out / file).unlink() if data is None else write(out / file, data)
    with pytest.raises(InputError, match=message):
        kitti.check(out, videos, "val")


def test_the_official_maps_are_trained_on(official):
    videos = read(official, "train")
    assert names(videos) == ["0000", "0001"]
    person, car = PERSON * 1000 + SAME_ID, CAR * 1000 + SAME_ID
    for video in videos:
        assert video.size == (H, W)
        assert video.truth.labels == {person: PERSON, car: CAR}
        assert video.truth.visible == ((person, car),) * FRAMES
        for t in range(FRAMES):
            semantic, ids = labels(t)
            truth = pickle.loads(pickle.dumps(video.truth)).read(t)  # as it reaches workers
            assert (truth.semantic == semantic).all()
            assert ((truth.ids == car) == ((semantic == CAR) & (ids > 0))).all()
    assert [video.truth for video in read(official, "val")] == [None, None]


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("panoptic_maps/train/0001/000001.png", None, "panoptic_maps/train/0001: lacks 000001.png"),
        ("training/image_02/0001/000001.png", None, "has 000001.png, which should not be there"),
        ("panoptic_maps/train/0001/000001.png", edited(lambda _, i: put(i, 1000)), "ids up to 999, got 1000"),
        ("panoptic_maps/train/0001/000001.png", png(step(*labels(1))[:9]), r"picture of .* got \(9, 20\)"),
    ],
)
def test_wrong_maps_are_named_before_training(official, file, data, message):
    (official / file).unlink() if data is None else write(official / file, data)
    with pytest.raises(InputError, match=message):
        read(official, "train")
