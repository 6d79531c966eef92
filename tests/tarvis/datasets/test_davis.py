"""DAVIS: reading, writing, scoring, training, and what is wrong with files."""

import pickle

import cv2
import numpy as np
import pytest
import torch

from tarvis.datasets.benchmark import Roots
from tarvis.datasets.davis import Davis
from tarvis.files import rle
from tarvis.files.pictures import encode_ids, read_ids, voc_palette
from tarvis.structures import InputError, Track, VideoResult
from tests.tarvis.datasets.support import write

H, W, FRAMES = 12, 20, 5
SEQUENCES = ("cat", "dog")
IDS = (1, 2)
davis = Davis()


def truth_ids(t):
    """Two objects that move apart, and a void pixel."""
    ids = np.zeros((H, W), np.uint8)
    ids[2:6, 1 + t : 6 + t] = 1
    ids[6:11, 9:14] = 2
    ids[0, 0] = 255
    return ids


def image():
    return cv2.imencode(".jpg", np.full((H, W, 3), 90, np.uint8))[1].tobytes()


def make(images, masks, frames=FRAMES):
    for name in SEQUENCES:
        for t in range(FRAMES):
            write(images / name / f"{t:05d}.jpg", image())
        for t in range(frames):
            write(masks / name / f"{t:05d}.png", encode_ids(truth_ids(t), voc_palette()))


def make_official(root, frames=FRAMES):
    make(root / "JPEGImages/480p", root / "Annotations/480p", frames)
    for split in ("val", "test-dev", "train"):
        write(root / f"ImageSets/2017/{split}.txt", b"cat\ndog\n")
    return root


@pytest.fixture
def official(tmp_path):
    return make_official(tmp_path / "DAVIS")


def read(root, split="val"):
    return davis.read(davis.find(root, split), split)


def result(maps, ids=IDS, size=(H, W)):
    """What a network would hand over that sees these maps."""
    codes = {k: {t: rle.encode((m == k)[None])[0] for t, m in enumerate(maps)} for k in ids}
    return VideoResult("vos", size, len(maps), tuple(Track(k, masks) for k, masks in codes.items()))


def write_perfect(root, out, split="val"):
    videos = read(root, split)
    for video in videos:
        davis.write(result([truth_ids(t) for t in range(FRAMES)]), video, out)
    davis.join([None] * len(videos), videos, split, out)
    return videos


@pytest.mark.parametrize("split", ["val", "test-dev"])
def test_objects_are_those_of_the_first_mask(official, split):
    videos = read(official, split)
    assert [video.name for video in videos] == ["cat", "dog"]
    for video in videos:
        assert video.frame_names == tuple(f"{t:05d}" for t in range(FRAMES))
        assert all(path.is_file() for path in video.images)
        assert video.truth is None
        references = video.references()
        assert [(r.id, r.frame) for r in references] == [(1, 0), (2, 0)]
        assert all((r.mask == torch.from_numpy(truth_ids(0) == r.id)).all() for r in references)


def test_first_masks_alone_are_no_truth(tmp_path):
    assert davis.find(make_official(tmp_path / "a", frames=1), "test-dev").truth is None
    assert davis.find(make_official(tmp_path / "c"), "val").truth == tmp_path / "c"


def test_results_are_indexed_and_later_objects_lie_on_top(official, tmp_path):
    video = read(official)[0]
    whole = np.ones((1, H, W), bool)
    tracks = (Track(2, {0: rle.encode(whole)[0]}), Track(1, {0: rle.encode(whole & (np.arange(W) < 3))[0]}))
    for out in ("a", "b"):
        davis.write(VideoResult("vos", (H, W), FRAMES, tracks), video, tmp_path / out)
    path = tmp_path / "a/cat/00000.png"
    ids = read_ids(path)
    assert (ids[:, :3] == 1).all()
    assert (ids[:, 3:] == 2).all()
    assert not read_ids(tmp_path / "a/cat/00004.png").any()
    assert voc_palette()[:3].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    assert voc_palette().tobytes() in path.read_bytes()
    assert path.read_bytes() == (tmp_path / "b/cat/00000.png").read_bytes()


def grey():
    return cv2.imencode(".png", truth_ids(1) % 255)[1].tobytes()


def coloured():
    return cv2.imencode(".png", np.zeros((H, W, 3), np.uint8))[1].tobytes()


def indexed(ids):
    return encode_ids(np.ascontiguousarray(ids), voc_palette())


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("dog/00002.png", None, "dog: lacks 00002.png; expected 5 frames, got 4"),
        ("dog/00002.png", grey(), "dog/00002.png: expected a picture of 8 bits with a palette"),
        ("dog/00002.png", indexed(truth_ids(1)[:9] % 255), r"of \(12, 20\), got \(9, 20\)"),
        ("dog/00002.png", indexed(truth_ids(1) % 255 * 2), "shows id 4, which the first mask does not"),
        ("dog/00002.png", indexed(truth_ids(1)), "shows id 255, which the first mask does not"),
    ],
)
def test_damaged_results_are_not_accepted(official, tmp_path, file, data, message):
    out = tmp_path / "out"
    videos = write_perfect(official, out)
    davis.check(out, videos, "val")
    (out / file).unlink() if data is None else write(out / file, data)
    with pytest.raises(InputError, match=message):
        davis.check(out, videos, "val")


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("ImageSets/2017/val.txt", b"../dog", "val.txt: '../dog' is not a path below its folder"),
        ("ImageSets/2017/val.txt", b"dog dog", "val.txt: dog comes twice"),
        ("ImageSets/2017/val.txt", b"", "val.txt: is empty"),
        ("ImageSets/2017/val.txt", b"bird dog", "Annotations/480p/bird: cannot be read"),
        ("Annotations/480p/dog/00000.png", None, "00001.png: expected ids from 1 to 254, got no object"),
        ("Annotations/480p/dog/00000.png", coloured(), "00000.png: an RGB picture"),
        ("Annotations/480p/dog/00000.png", b"x", "00000.png: not a PNG file"),
        ("Annotations/480p/dog/00000.png", indexed(truth_ids(0)[:5]), r"as .*00000.jpg, got \(5, 20\)"),
        (
            "Annotations/480p/dog/00000.png",
            encode_ids(np.full((H, W), 300, np.uint16), voc_palette()),
            "id 300",
        ),
        ("Annotations/480p/dog/0000.png", indexed(truth_ids(0)), "0000.png: .*dog has no frame '0000'"),
        ("JPEGImages/480p/dog/00000.jpg", b"x", "00000.jpg: not an image that can be read"),
        ("JPEGImages/480p/dog/00000.jpg", b"", "00000.jpg: not an image that can be read"),
    ],
)
def test_wrong_input_is_named(official, file, data, message):
    if data is None:
        (official / file).unlink()
        write((official / file).with_name("00001.png"), indexed(truth_ids(1) * 0))
    else:
        write(official / file, data)
    with pytest.raises(InputError, match=message):
        [video.references() for video in read(official)]


def test_folders_may_lie_anywhere(official):
    roots = Roots(official / "JPEGImages/480p", official)
    assert [video.name for video in davis.read(roots, "train")] == ["cat", "dog"]


def test_the_palette_is_that_of_davis():
    palette = voc_palette()
    assert palette.shape == (256, 3)
    assert palette[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert palette[[8, 20, 255]].tolist() == [[64, 0, 0], [0, 64, 128], [224, 224, 192]]
    assert len({tuple(color) for color in palette.tolist()}) == 256


@pytest.mark.parametrize("truth", [".", "Annotations/480p"])
def test_all_objects_are_scored(official, tmp_path, truth):
    write_perfect(official, tmp_path / "out")
    numbers = davis.score(tmp_path / "out", official / truth, "val")
    assert numbers["J&F-Mean"] == 1
    assert sum(name.startswith("per_object/") for name in numbers) == 8


def test_the_official_masks_are_trained_on(official):
    (official / "Annotations/480p/dog/00002.png").unlink()
    cat, dog = read(official, "train")
    assert len(cat.images) == FRAMES
    assert dog.frame_names == ("00000", "00001", "00003", "00004")
    for video in (cat, dog):
        assert video.truth.labels == {1: None, 2: None}
        assert video.truth.visible == (IDS,) * len(video.images)
        for t, name in enumerate(video.frame_names):
            ids = pickle.loads(pickle.dumps(video.truth)).read(t).ids  # as it reaches workers
            assert all(((ids == k) == (truth_ids(int(name)) == k)).all() for k in IDS)
        assert [r.id for r in video.references()] == [1, 2]
    assert [video.truth for video in read(official, "val")] == [None, None]
    (official / "JPEGImages/480p/dog/00003.jpg").unlink()
    with pytest.raises(InputError, match=r"dog/00003\.png: there is no frame of this name in .*dog"):
        read(official, "train")
