"""DAVIS in both layouts: reading, writing, scoring, checking, converting; errors name the file; fuzz."""

import random
import shutil

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tarvis.datasets.benchmark import Roots
from tarvis.datasets.davis import Davis
from tarvis.files import rle
from tarvis.files.pictures import encode_ids, read_ids, voc_palette
from tarvis.structures import InputError, Track, VideoResult

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


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


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


def make_workspace(root, frames=FRAMES):
    annotations = root / "dataset_annotations/inference/davis"
    make(root / "dataset_images/inference/davis", annotations / "Annotations", frames)
    for split in ("val", "testdev"):
        write(annotations / f"ImageSet_{split}.txt", b"dog\ncat\n")
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
@pytest.mark.parametrize("builder", [make_official, make_workspace])
def test_both_layouts_are_read(tmp_path, builder, split):
    root = builder(tmp_path)
    videos = read(root, split)
    assert [video.name for video in videos] == (
        ["cat", "dog"] if builder is make_official else ["dog", "cat"]
    )
    for video in videos:
        assert video.frame_names == tuple(f"{t:05d}" for t in range(FRAMES))
        assert all(path.is_file() for path in video.images)
        assert video.truth is None
        references = video.references()
        assert [(r.id, r.frame) for r in references] == [(1, 0), (2, 0)]
        assert all((r.mask == torch.from_numpy(truth_ids(0) == r.id)).all() for r in references)


def test_first_masks_alone_are_no_truth(tmp_path):
    assert davis.find(make_official(tmp_path / "a", frames=1), "test-dev").truth is None
    assert davis.find(make_workspace(tmp_path / "b", frames=1), "val").truth is None
    assert davis.find(make_official(tmp_path / "c"), "val").truth == tmp_path / "c"


def test_what_was_looked_for_is_said(tmp_path):
    with pytest.raises(InputError, match=r"images of DAVIS not found; .*JPEGImages/480p, .*inference/davis"):
        davis.find(tmp_path, "val")
    (tmp_path / "JPEGImages/480p").mkdir(parents=True)
    with pytest.raises(InputError, match=r"DAVIS train not found; .*davis_semisupervised.json, .*train.txt"):
        davis.find(tmp_path, "train")


@pytest.mark.parametrize("builder", [make_official, make_workspace])
def test_perfect_predictions_score_one(tmp_path, builder):
    root, out = builder(tmp_path / "in"), tmp_path / "out"
    videos = write_perfect(root, out)
    davis.check(out, videos, "val")
    numbers = davis.evaluate(out, davis.find(root, "val").truth, "val")
    assert numbers["J&F-Mean"] == 1
    assert sum(name.startswith("per_object/") for name in numbers) == 8


def test_swapped_ids_lower_the_score(official, tmp_path):
    for video in write_perfect(official, tmp_path / "out"):
        swapped = [
            truth_ids(t) if t < 3 else np.array([0, 2, 1, *[0] * 253])[truth_ids(t)] for t in range(FRAMES)
        ]
        davis.write(result(swapped), video, tmp_path / "out")
    assert davis.evaluate(tmp_path / "out", official, "val")["J&F-Mean"] < 0.9


def test_only_named_videos_are_scored(official, tmp_path):
    write_perfect(official, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/dog")
    assert davis.evaluate(tmp_path / "out", official, "val", ["cat"])["J&F-Mean"] == 1
    assert davis.evaluate(tmp_path / "out", official / "Annotations/480p", "val", {"cat"})["J&F-Mean"] == 1
    with pytest.raises(InputError, match="DAVIS: has no video 'bird'; it has cat, dog"):
        davis.evaluate(tmp_path / "out", official, "val", ["bird"])
    with pytest.raises(InputError, match=r"dog/00001.png: cannot be read"):
        davis.evaluate(tmp_path / "out", official, "val")


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
        ("dog/00009.png", b"", "dog: has 00009.png, which should not be there"),
        ("bird/00000.png", b"", "out/bird: belongs to no video of these results"),
        ("dog/00002.png", b"", "dog/00002.png: not a PNG file"),
        ("dog/00002.png", coloured(), "dog/00002.png: an RGB picture"),
        ("dog/00002.png", grey(), "dog/00002.png: expected a picture of 8 bits with a palette"),
        ("dog/00002.png", indexed(truth_ids(1)[:9] % 255), r"of \(12, 20\), as the video, got \(9, 20\)"),
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


def test_missing_sequences_are_not_accepted(official, tmp_path):
    videos = write_perfect(official, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/dog")
    with pytest.raises(InputError, match="out/dog: cannot be read"):
        davis.check(tmp_path / "out", videos, "val")


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
        ("JPEGImages/480p/dog/00000.jpg", b"x", "00000.jpg: is no image"),
        ("JPEGImages/480p/dog/00000.jpg", b"", "00000.jpg: is no image"),
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


def test_the_training_split_is_converted(official, tmp_path):
    workspace = tmp_path / "workspace"
    (path,) = davis.convert(official, workspace)
    assert path == workspace / "dataset_annotations/training/davis_semisupervised.json"
    shutil.copytree(official / "JPEGImages/480p", workspace / "dataset_images/training/davis")
    videos = read(workspace, "train")
    assert [video.name for video in videos] == ["cat", "dog"]
    for video in videos:
        assert all(path.is_file() for path in video.images)
        assert video.truth.labels == {1: None, 2: None}
        assert video.truth.visible == (IDS,) * FRAMES
        for t in range(FRAMES):
            masks = video.truth.read(t).masks
            assert all((rle.decode(masks[k]) == (truth_ids(t) == k)).all() for k in IDS)
        assert [r.id for r in video.references()] == [1, 2]
        assert (video.references()[1].mask == torch.from_numpy(truth_ids(0) == 2)).all()
    assert [video.truth for video in read(official, "train")] == [None, None]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("Annotations/480p/dog/00002.png", "Annotations/480p/dog: lacks 00002.png"),
        ("JPEGImages/480p/dog/00002.jpg", "Annotations/480p/dog: has 00002.png, which should not be there"),
        ("ImageSets/2017/train.txt", "list of the sequences of DAVIS train not found"),
    ],
)
def test_nothing_is_skipped_while_converting(official, tmp_path, file, message):
    (official / file).unlink()
    with pytest.raises(InputError, match=message):
        davis.convert(official, tmp_path / "workspace")
    assert not [path for path in (tmp_path / "workspace").rglob("*") if path.is_file()]


def test_folders_may_lie_anywhere(official):
    roots = Roots(official / "JPEGImages/480p", official)
    assert [video.name for video in davis.read(roots, "train")] == ["cat", "dog"]


def test_damaged_files_raise_our_errors_alone(tmp_path):
    official, out = make_official(tmp_path / "DAVIS"), tmp_path / "out"
    write_perfect(official, out)
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".png", ".txt", ".jpg")]
    swaps = [
        grey(),
        coloured(),
        image(),
        b"",
        encode_ids(truth_ids(0).astype(np.uint16) * 999, voc_palette()),
    ]

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
            videos = read(official)
            [video.references() for video in videos]
            davis.check(out, videos, "val")
            davis.evaluate(out, official, "val")
        except InputError as error:
            message = str(error)
        finally:
            path.write_bytes(data)
        assert str(tmp_path) in message

    fuzz()


def test_the_palette_is_that_of_davis():
    palette = voc_palette()
    assert palette.shape == (256, 3)
    assert palette[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert palette[[8, 20, 255]].tolist() == [[64, 0, 0], [0, 64, 128], [224, 224, 192]]
    assert len({tuple(color) for color in palette.tolist()}) == 256
