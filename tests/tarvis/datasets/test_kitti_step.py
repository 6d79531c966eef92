"""KITTI-STEP in its layouts: reading, writing, scoring, checking, converting; errors name the file; fuzz."""

import random
import shutil

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tarvis.datasets.benchmark import VOID
from tarvis.datasets.kitti_step import KittiStep
from tarvis.files import rle
from tarvis.files.pictures import read_rgb
from tarvis.stitch.panoptic import encode_labels
from tarvis.structures import InputError, Track, VideoResult

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


def png(rgb):
    return cv2.imencode(".png", np.ascontiguousarray(rgb[..., ::-1]))[1].tobytes()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def make(folder, names, picture=lambda _: np.full((H, W, 3), 90, np.uint8)):
    for name in names:
        for t in range(FRAMES):
            write(folder / name / f"{t:06d}.png", png(picture(t)))


def make_official(root):
    make(root / "training/image_02", ["0000", "0001", "0002", "0006"])
    make(root / "testing/image_02", ["0000", "0001"])
    make(root / "panoptic_maps/val", ["0002", "0006"], lambda t: step(*labels(t)))
    make(root / "panoptic_maps/train", ["0000", "0001"], lambda t: step(*labels(t)))
    return root


def make_workspace(root):
    make(root / "dataset_images/inference/kitti_step_val", ["0002", "0006"])
    maps = root / "dataset_annotations/inference/kitti_step/panoptic_maps/val"
    make(maps, ["0002", "0006"], lambda t: step(*labels(t)))
    return root


@pytest.fixture
def official(tmp_path):
    return make_official(tmp_path / "kitti")


def read(root, split="val"):
    return kitti.read(kitti.find(root, split), split)


def result(ids=(SAME_ID, SAME_ID + 1), flip_at=FRAMES):
    """What a network would hand over that sees everything; from `flip_at` on, ids change places."""
    tracks, stuff = {k: {} for k in ids}, {}
    for t in range(FRAMES):
        semantic, instances = labels(t)
        shown = reversed(ids) if t >= flip_at else ids
        for k, class_ in zip(shown, (PERSON, CAR), strict=True):
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


def test_workspaces_and_plain_folders_are_read(tmp_path):
    assert names(read(make_workspace(tmp_path / "workspace"))) == ["0002", "0006"]
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
    with pytest.raises(
        InputError, match=r"not found; .*image_02, .*kitti_step_val, .*<sequence>/<frame>.png"
    ):
        kitti.find(tmp_path, "val")
    make(tmp_path / "dataset_images/training/kitti_step", ["0000"])
    with pytest.raises(InputError, match=r"annotations of KITTI-STEP train not found; .*kitti_step.json"):
        kitti.find(tmp_path, "train")
    make(tmp_path / "own", ["b"])
    (tmp_path / "own/a").mkdir()
    with pytest.raises(InputError, match=r"own/a: has no \.png files"):
        read(tmp_path / "own")


@pytest.mark.parametrize("builder", [make_official, make_workspace])
def test_perfect_predictions_score_one(tmp_path, builder):
    root, out = builder(tmp_path / "in"), tmp_path / "out"
    videos = write_perfect(root, out)
    kitti.check(out, videos, "val")
    truth = kitti.find(root, "val").truth
    numbers = kitti.evaluate(out, truth, "val")
    assert numbers["STQ"] == pytest.approx(1)
    assert numbers["per_sequence/0006/AQ"] == pytest.approx(1)


def test_a_download_stands_for_its_maps(official, tmp_path):
    write_perfect(official, tmp_path / "out")
    assert kitti.evaluate(tmp_path / "out", official, "val")["STQ"] == pytest.approx(1)


def test_ids_that_change_places_lower_the_score(official, tmp_path):
    out = tmp_path / "out"
    for video in write_perfect(official, out):
        kitti.write(result(flip_at=2), video, out)
    assert kitti.evaluate(out, official, "val")["AQ"] < 0.9


def test_only_named_videos_are_scored(official, tmp_path):
    out = tmp_path / "out"
    write_perfect(official, out)
    shutil.rmtree(out / "0006")
    numbers = kitti.evaluate(out, official, "val", ["0002"])
    assert numbers["STQ"] == pytest.approx(1)
    assert "per_sequence/0006/STQ" not in numbers
    with pytest.raises(InputError, match="val: has no video '0007'; it has 0002, 0006"):
        kitti.evaluate(out, official, "val", ["0007"])
    with pytest.raises(InputError, match="val: no video is named"):
        kitti.evaluate(out, official, "val", [])
    with pytest.raises(InputError, match="0006: cannot be read"):
        kitti.evaluate(out, official, "val")


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
        ("0006/000009.png", b"", "0006: has 000009.png, which should not be there"),
        ("0007/000000.png", b"", "out/0007: belongs to no video of these results"),
        ("0006/000002.png", b"", "000002.png: not a PNG file"),
        ("0006/000002.png", png(np.zeros((H, W, 3)))[:50], "000002.png: truncated or damaged"),
        ("0006/000002.png", encode_labels(labels(0)[0]), "000002.png: expected an RGB picture of 8 bits"),
        ("0006/000002.png", png(step(*labels(1))[:9]), r"of \(12, 20\), as the video, got \(9, 20\)"),
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


def test_the_training_split_is_converted(official, tmp_path):
    workspace = tmp_path / "workspace"
    (path,) = kitti.convert(official, workspace)
    assert path == workspace / "dataset_annotations/training/kitti_step.json"
    shutil.copytree(official / "training/image_02", workspace / "dataset_images/training/kitti_step")
    videos = read(workspace, "train")
    assert names(videos) == ["0000", "0001"]
    person, car = PERSON * 1000 + SAME_ID, CAR * 1000 + SAME_ID
    for video in videos:
        assert all(path.is_file() for path in video.images)
        assert video.truth.labels == {person: PERSON, car: CAR}
        assert video.truth.visible == ((person, car),) * FRAMES
        for t in range(FRAMES):
            semantic, ids = labels(t)
            truth = video.truth.read(t)
            assert (truth.semantic == semantic).all()
            assert (rle.decode(truth.masks[car]) == ((semantic == CAR) & (ids > 0))).all()
    assert [video.truth for video in read(official, "train")] == [None, None]


def test_images_are_not_needed_for_converting(official, tmp_path):
    shutil.rmtree(official / "training")
    assert kitti.convert(official, tmp_path / "workspace")[0].is_file()


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("panoptic_maps/train/0001/000001.png", None, "panoptic_maps/train/0001: lacks 000001.png"),
        ("training/image_02/0001/000001.png", None, "has 000001.png, which should not be there"),
        ("panoptic_maps/train/0001/000001.png", edited(lambda _, i: put(i, 1000)), "ids up to 999, got 1000"),
        (
            "panoptic_maps/train/0001/000001.png",
            png(step(*labels(1))[:9]),
            r"labels of 0001/000001.png: .* got \(9, 20\)",
        ),
    ],
)
def test_nothing_is_skipped_while_converting(official, tmp_path, file, data, message):
    (official / file).unlink() if data is None else write(official / file, data)
    with pytest.raises(InputError, match=message):
        kitti.convert(official, tmp_path / "workspace")
    assert not [path for path in (tmp_path / "workspace").rglob("*") if path.is_file()]


def test_damaged_files_raise_our_errors_alone(tmp_path):
    official, out = make_official(tmp_path / "kitti"), tmp_path / "out"
    write_perfect(official, out)
    files = [*out.rglob("*.png"), *official.rglob("*.png")]
    swaps = [b"", encode_labels(labels(0)[0]), png(np.full((H, W, 3), 255)), png(np.full((H, W, 3), CAR))]

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32 - 1))
    def fuzz(seed):
        rng = random.Random(seed)
        path = rng.choice(files)
        data = path.read_bytes()
        k = rng.randrange(len(data))
        changed = data[:k] + bytes([rng.randrange(256)]) + data[k + 1 :]
        path.write_bytes(rng.choice([changed, data[:k], data[:k] + data[k + rng.randrange(9) :], *swaps]))
        message = str(tmp_path)
        try:
            kitti.check(out, read(official), "val")
            kitti.evaluate(out, official, "val")
            kitti.convert(official, tmp_path / "workspace")
        except InputError as error:
            message = str(error)
        finally:
            path.write_bytes(data)
        assert str(tmp_path) in message or "labels of 000" in message

    fuzz()
