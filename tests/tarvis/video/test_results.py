import json

import cv2
import numpy as np
import pytest

from tarvis.data.synthetic import synthetic_clip
from tarvis.datasets.classes import class_table
from tarvis.files import rle
from tarvis.files.pictures import read_ids
from tarvis.stitch.panoptic import encode_labels
from tarvis.structures import Track, VideoResult
from tarvis.video.frames import InputError
from tarvis.video.results import ResultFiles, read_results

CLASSES = class_table("synthetic")
CLIP = synthetic_clip(0, num_frames=5, size=(48, 64))
NAMES = [f"img_{i}" for i in range(5)]


def write_results(result, out, **options):
    with ResultFiles(result, out, **options) as files:
        for frame in range(result.num_frames):
            files.add(frame)


def masks_of(instance, id_):
    return {t: rle.encode((m == id_)[None])[0] for t, m in enumerate(instance) if (m == id_).any()}


def make_result(task, ids=(1, 2, 3)):
    """The objects of the clip as a result, under the ids given."""
    scored = task in ("vis", "vps")
    tracks = tuple(
        Track(
            ids[i - 1],
            masks_of(CLIP.instance, i),
            CLIP.classes[i] if scored else None,
            0.5 + 0.1 * i if scored else None,
        )
        for i in CLIP.classes
    )
    stuff = {}
    if task == "vps":
        stuff = {
            t: encode_labels(np.where(s < 3, s, 0).astype(np.uint8)) for t, s in enumerate(CLIP.semantic)
        }
    return VideoResult(task, (48, 64), 5, tracks, stuff)


def same_tracks(a, b):
    return sorted(a.tracks, key=lambda t: t.id) == sorted(b.tracks, key=lambda t: t.id)


@pytest.mark.parametrize("task", ["vis", "vos", "pet"])
def test_masks_are_read_back(task, tmp_path):
    result = make_result(task)
    write_results(result, tmp_path, names=NAMES, classes=CLASSES if task == "vis" else None)
    saved = read_results(tmp_path)
    assert same_tracks(saved.result, result)
    assert (saved.result.task, saved.result.size, saved.result.num_frames) == (task, (48, 64), 5)
    assert saved.names == tuple(NAMES)
    assert saved.dataset == ("synthetic" if task == "vis" else None)
    for name, instance in zip(NAMES, CLIP.instance, strict=True):
        np.testing.assert_array_equal(read_ids(tmp_path / "masks" / f"{name}.png"), instance)


def test_panoptic_pictures_hold_class_and_id(tmp_path):
    result = make_result("vps", ids=(1, 300, 7))
    write_results(result, tmp_path, names=NAMES, classes=CLASSES)
    ids = np.array([0, 1, 300, 7])[CLIP.instance]
    for t, name in enumerate(NAMES):
        b, g, r = cv2.split(cv2.imread(str(tmp_path / "panoptic" / f"{name}.png")))
        np.testing.assert_array_equal(r, CLIP.semantic[t])
        np.testing.assert_array_equal(g.astype(int) * 256 + b, ids[t])
    saved = read_results(tmp_path)
    assert same_tracks(saved.result, result)
    assert sorted(saved.result.stuff) == list(range(5))
    tree = json.loads((tmp_path / "tracks.json").read_text())
    assert [entry["category"] for entry in tree["stuff"]] == ["sky", "grass", "bricks"]


def test_tracks_json_speaks_for_itself(tmp_path):
    write_results(make_result("vis"), tmp_path, names=NAMES, classes=CLASSES)
    tree = json.loads((tmp_path / "tracks.json").read_text())
    assert (tree["task"], tree["dataset"], tree["size"], tree["num_frames"]) == (
        "vis",
        "synthetic",
        [48, 64],
        5,
    )
    assert tree["frame_names"] == NAMES
    track = tree["tracks"][0]
    assert track["category"] == CLASSES.names[track["category_id"]]
    assert track["score"] == pytest.approx(0.6)
    assert len(track["segmentations"]) == 5
    assert track["segmentations"][0]["size"] == [48, 64]
    assert isinstance(track["segmentations"][0]["counts"], str)


def test_a_frame_without_the_object_is_null(tmp_path):
    there, empty = masks_of(CLIP.instance, 1)[0], rle.empty((48, 64))
    result = VideoResult("vos", (48, 64), 3, (Track(1, {0: there, 1: empty}),))
    write_results(result, tmp_path, names=NAMES[:3])
    codes = json.loads((tmp_path / "tracks.json").read_text())["tracks"][0]["segmentations"]
    assert [code is None for code in codes] == [False, True, True]
    assert list(read_results(tmp_path).result.tracks[0].masks) == [0]


@pytest.mark.parametrize(("top", "dtype"), [(254, np.uint8), (255, np.uint16), (1000, np.uint16)])
def test_ids_above_254_need_16_bits(top, dtype, tmp_path):
    result = make_result("vos", ids=(1, 2, top))
    write_results(result, tmp_path, names=NAMES)
    ids = read_ids(tmp_path / "masks" / "img_4.png")
    assert ids.dtype == dtype
    np.testing.assert_array_equal(ids, np.array([0, 1, 2, top])[CLIP.instance[4]])
    assert same_tracks(read_results(tmp_path).result, result)


def box(y0, y1):
    mask = np.zeros((1, 8, 8), bool)
    mask[:, y0:y1] = True
    return rle.encode(mask)[0]


def test_the_best_score_is_painted_on_top_and_objects_in_their_order(tmp_path):
    masks = {0: box(0, 5)}, {0: box(4, 8)}, {0: box(7, 8)}
    scored = [Track(i, m, 0, s) for i, m, s in zip((1, 2, 3), masks, (0.9, 0.5, 0.1), strict=True)]
    write_results(VideoResult("vis", (8, 8), 1, tuple(scored)), tmp_path, names=["a"], min_score=0.3)
    assert read_ids(tmp_path / "masks" / "a.png")[:, 0].tolist() == [1, 1, 1, 1, 1, 2, 2, 2]
    assert len(read_results(tmp_path).result.tracks) == 3
    given = [Track(i, m) for i, m in zip((1, 2, 3), masks, strict=True)]
    (tmp_path / "vos").mkdir()
    write_results(VideoResult("vos", (8, 8), 1, tuple(given)), tmp_path / "vos", names=["a"])
    assert read_ids(tmp_path / "vos" / "masks" / "a.png")[:, 0].tolist() == [1, 1, 1, 1, 2, 2, 2, 3]


def test_a_video_without_tracks_is_a_result(tmp_path):
    write_results(VideoResult("vis", (4, 6), 2, ()), tmp_path, names=["a", "b"], classes=CLASSES)
    assert read_results(tmp_path).result.tracks == ()
    assert not read_ids(tmp_path / "masks" / "b.png").any()


def test_contradictions_are_found(tmp_path):
    write_results(make_result("vos"), tmp_path, names=NAMES)
    path = tmp_path / "tracks.json"
    text = path.read_text()
    tree = json.loads(text)

    def broken(change, message):
        changed = json.loads(text)
        change(changed)
        path.write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            read_results(tmp_path)

    broken(lambda t: t["tracks"].pop(), r"img_0\.png: shows ids that tracks\.json does not have: \[3\]")
    broken(lambda t: t["tracks"][0]["segmentations"].pop(), "expected 5 segmentations, one a frame, got 4")
    broken(lambda t: t["tracks"].append(t["tracks"][0]), "contradict")
    broken(lambda t: t.pop("size"), "has no 'size'")
    broken(lambda t: t.update(size=[48, 63]), r"expected \[48, 63\], the size of the picture")
    broken(lambda t: t.update(frame_names=["x", *NAMES[1:]]), r"x\.png: cannot be read")
    path.write_text(text[:-9])
    with pytest.raises(InputError, match=r"tracks\.json: is not a JSON file"):
        read_results(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"tracks\.json: cannot be read"):
        read_results(tmp_path)
    path.write_text(json.dumps(tree | {"tracks": []}))
    with pytest.raises(InputError, match="shows ids"):
        read_results(tmp_path)


@pytest.mark.parametrize("name", ["../x", "a/b", "", "x" * 300, "a\x1b[31m", 3])
def test_names_of_frames_in_a_file_of_tracks_stay_in_its_folder(tmp_path, name):
    write_results(make_result("vos"), tmp_path, names=NAMES)
    tree = json.loads((tmp_path / "tracks.json").read_text())
    tree["frame_names"][1] = name
    (tmp_path / "tracks.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match=r"tracks\.json: frame_names\[1\]: expected"):
        read_results(tmp_path)


def test_codes_of_a_file_of_tracks_are_checked(tmp_path):
    write_results(make_result("vos"), tmp_path, names=NAMES)
    before, tree = read_results(tmp_path), json.loads((tmp_path / "tracks.json").read_text())
    code = tree["tracks"][0]["segmentations"][0]
    code["counts"] = [48 * 64 + 1]
    (tmp_path / "tracks.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match=r"segmentations\[0\]\.counts: expected a run-length code"):
        read_results(tmp_path)
    flat = rle.decode(before.result.tracks[0].masks[0]).T.ravel()
    code["counts"] = [run for bit in flat.tolist() for run in ((0, 1) if bit else (1, 0))]
    (tmp_path / "tracks.json").write_text(json.dumps(tree))
    assert same_tracks(read_results(tmp_path).result, before.result)
