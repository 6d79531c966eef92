"""BURST's files: what is read of them, what is written, and what is said where they are wrong."""

import copy
import dataclasses
import importlib.util
import json

import numpy as np
import pytest

from tarvis.datasets import burst
from tarvis.datasets.benchmark import Roots
from tarvis.datasets.burst import Burst
from tarvis.files import rle
from tarvis.structures import InputError, Track, VideoResult
from tests.tarvis.datasets.support import code, submit, write
from tests.tarvis.fuzz import edit, put

BURST = Burst()
H, W = 20, 24
FILES = [f"frame{t:04d}.jpg" for t in range(9)]
ANNOTATED = FILES[::4]
needs_trackeval = pytest.mark.skipif(not importlib.util.find_spec("trackeval"), reason="no trackeval")


def masks(t):
    """Object 1 of 120 pixels at all times, object 2 of 64 from frame 4 on."""
    ids = np.zeros((H, W), np.uint8)
    ids[2:14, t : t + 10] = 1
    if t >= 4:
        ids[12:20, 14:22] = 2
    return {k: mask for k in (1, 2) if (mask := ids == k).any()}


def sequence(number, segmentations):
    return {
        "id": number,
        "dataset": "BDD",
        "seq_name": f"s{number}",
        "height": H,
        "width": W,
        "fps": 4,
        "all_image_paths": list(FILES),
        "annotated_image_paths": list(ANNOTATED),
        "neg_category_ids": [7],
        "not_exhaustive_category_ids": [],
        "track_category_ids": {"1": 805, "2": 12},
        "segmentations": copy.deepcopy(segmentations),
    }


def truth(split="val"):
    frames = [{str(k): {"rle": code(mask), "is_gt": True} for k, mask in masks(t).items()} for t in (0, 4, 8)]
    return {"split": split, "sequences": [sequence(k, frames) for k in (1, 2)]}


def first_frames(split="val"):
    """Object 2 is first seen in the second annotated frame."""
    points = {1: {"x": 4, "y": 6}, 2: {"x": 17, "y": 15}}
    frames = [{}, {}, {}]
    for k, t in ((1, 0), (2, 1)):
        frames[t][str(k)] = {"rle": code(masks(4 * t)[k]), "bbox": [0, 0, 9, 9], "point": points[k]}
    return {"split": split, "sequences": [sequence(k, frames) for k in (1, 2)]}


@pytest.fixture
def download(tmp_path):
    """The official folders."""
    root = tmp_path / "BURST"
    for split in ("val", "test"):
        write(root / split / "first_frame_annotations.json", first_frames(split))
        write(root / split / "all_classes.json", truth(split))
        (root / "frames" / split).mkdir(parents=True)
    write(root / "train/all_classes.json", truth("train"))
    (root / "frames/train").mkdir()
    return root


def read(root, split="val"):
    return BURST.read(BURST.find(root, split), split)


def perfect(video):
    """The truth of every frame that is run."""
    times = [FILES.index(name) for name in video.frame_names]
    tracks = []
    for k in (1, 2):
        found = {i: rle.encode(masks(t)[k][None])[0] for i, t in enumerate(times) if k in masks(t)}
        tracks.append(Track(k, found))
    return VideoResult("pet", (H, W), len(times), tuple(tracks))


def save(videos, folder):
    return submit(BURST, videos, folder, [perfect(video) for video in videos])


def test_videos_are_run_between_annotated_frames_and_scored_there(download):
    first, second = read(download)
    assert (first.name, second.name) == ("BDD/s1", "BDD/s2")
    assert first.frame_names == tuple(FILES[t] for t in (0, 1, 3, 4, 5, 7, 8))
    assert [first.frame_names[t] for t in first.scored] == ANNOTATED
    assert first.images[1] == download / "frames/val/BDD/s1/frame0001.jpg"
    assert first.size == (H, W)
    assert first.truth is None


def test_objects_are_given_by_mask_and_by_point_where_they_appear_first(download):
    references = read(download)[0].references()
    assert [(each.id, each.frame, each.point) for each in references] == [
        (1, 0, None),
        (1, 0, (4.0, 6.0)),
        (2, 3, None),
        (2, 3, (17.0, 15.0)),
    ]
    np.testing.assert_array_equal(references[0].mask.numpy(), masks(0)[1])
    np.testing.assert_array_equal(references[2].mask.numpy(), masks(4)[2])


def test_training_videos_are_the_annotated_frames_without_small_masks(download):
    video = read(download, "train")[0]
    assert video.frame_names == tuple(ANNOTATED)
    assert video.scored == (0, 1, 2)
    assert video.truth.labels == {1: None}
    assert video.truth.visible == ((1,), (1,), (1,))
    np.testing.assert_array_equal(rle.decode(video.truth.read(2).masks[1]), masks(8)[1])


def test_training_leaves_out_videos_without_objects(download):
    tree = truth("train")
    tree["sequences"][0]["segmentations"] = [{}, {}, {}]
    write(download / "train/all_classes.json", tree)
    assert [video.name for video in read(download, "train")] == ["BDD/s2"]


@pytest.mark.parametrize("layout", ["frames/{0}", "images/{0}", "dataset_images/inference/burst/{0}"])
@pytest.mark.parametrize("annotations", ["{0}", "annotations/{0}"])
def test_frames_and_annotations_are_found_in_several_places(tmp_path, layout, annotations):
    images, folder = tmp_path / layout.format("test"), tmp_path / annotations.format("test")
    images.mkdir(parents=True)
    write(folder / "first_frame_annotations.json", first_frames("test"))
    expected = Roots(images, folder / "first_frame_annotations.json")
    assert BURST.find(tmp_path, "test") == expected
    write(folder / "all_classes.json", truth("test"))
    assert BURST.find(tmp_path, "test").truth == folder / "all_classes.json"


@needs_trackeval
def test_classes_of_videos_that_are_not_named_do_not_count(download):
    tree = truth()
    tree["sequences"][1]["track_category_ids"] = {"1": 58, "2": 58}
    write(download / "val/all_classes.json", tree)
    write(download / "results.json", {"split": "val", "sequences": tree["sequences"][:1]})
    named = burst.score(download / "results.json", download / "val", videos=["BDD/s1"])
    assert named["HOTA/common"] == pytest.approx(100)
    assert burst.score(download / "results.json", download / "val")["HOTA/common"] == pytest.approx(50)


def test_results_keep_what_annotations_say_and_leave_out_empty_masks(download, tmp_path):
    videos = read(download)
    result = perfect(videos[0])
    result.tracks[0].masks[6] = rle.empty((H, W))
    share = BURST.write(result, videos[0], tmp_path)
    said = first_frames()["sequences"][0]
    assert {key: said[key] for key in said.keys() - {"segmentations"}} == {
        key: value for key, value in share.items() if key != "segmentations"
    }
    assert [list(frame) for frame in share["segmentations"]] == [["1"], ["1", "2"], ["2"]]
    assert share["segmentations"][0]["1"] == {"rle": code(masks(0)[1]), "is_gt": False}
    assert json.dumps(BURST.write(result, videos[0], tmp_path)) == json.dumps(share)
    assert not (tmp_path / "results.json").exists()


def test_tracks_without_a_class_get_one(download):
    tree = first_frames()
    tree["sequences"][0]["track_category_ids"] = {"2": 12}
    write(download / "val/first_frame_annotations.json", tree)
    assert read(download)[0].entry["track_category_ids"] == {"1": 1, "2": 12}


def test_results_of_another_size_are_refused(download, tmp_path):
    video = read(download)[0]
    with pytest.raises(InputError, match=r"BDD/s1: frames are of \(9, 9\), by its annotations \(20, 24\)"):
        BURST.write(dataclasses.replace(perfect(video), size=(9, 9)), video, tmp_path)


def test_shares_are_joined_as_they_come_and_in_order(download, tmp_path):
    videos = read(download)
    out = save(videos, tmp_path / "out")
    before = (out / "results.json").read_bytes()
    shares = [BURST.write(perfect(video), video, out) for video in videos]
    with pytest.raises(InputError, match=r"results\.json: expected the results of BDD/s1"):
        BURST.join(iter(shares[::-1]), videos, "val", out)
    assert (out / "results.json").read_bytes() == before
    BURST.join(iter(shares), videos, "val", out)
    assert (out / "results.json").read_bytes() == before
    assert [path.name for path in out.iterdir()] == ["results.json"]


FIRST = ["sequences", 0, "segmentations", 0]
WRONG = [
    (["split"], "test", "split: expected 'val', got 'test'"),
    (["sequences"], [], "sequences: has no sequence"),
    (["sequences", 1, "seq_name"], "s1", r"sequences\[1\]: sequence 'BDD/s1' appears twice"),
    (["sequences", 1, "seq_name"], "../s1", r"sequences\[1\]\.seq_name: '../s1' is not a path below"),
    (["sequences", 0, "fps"], 0, "fps: expected an integer from 1 to 1000, got 0"),
    (["sequences", 0, "fps"], 3, r"\[1\]: 'frame0004\.jpg' is not among the frames that are run, at 3"),
    (["sequences", 0, "height"], 21, r"1\.rle: expected a run-length code of \(21, 24\)"),
    (["sequences", 0, "all_image_paths", 1], FILES[0], "frame 'frame0000.jpg' appears twice"),
    (["sequences", 0, "annotated_image_paths"], [], "annotated_image_paths: expected at least one frame"),
    (["sequences", 0, "annotated_image_paths"], ANNOTATED[::-1], "in the order of all_image_paths"),
    (["sequences", 0, "annotated_image_paths", 1], "x.jpg", "'x.jpg' is not among the frames"),
    (["sequences", 0, "segmentations"], [{}], "expected 3 segmentations, one a frame, got 1"),
    (["sequences", 0, "track_category_ids"], {"a": 1}, "expected keys to be numbers, got 'a'"),
    ([*FIRST, "01"], {"rle": "0"}, "expected keys to be numbers, got '01'"),
    ([*FIRST, "1", "rle"], None, r"\[0\]\.1\.rle: expected a run-length code, or polygons"),
    ([*FIRST, "1", "rle"], code(np.zeros((H, W), bool)), "expected a mask that is not empty"),
    ([*FIRST, "1", "point"], {"x": 24, "y": 0}, r"point: expected a pixel of \(20, 24\)"),
    ([*FIRST, "1", "point"], {"x": 1}, "point: has no 'y'"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG)
def test_wrong_annotations_are_named(download, path, value, message):
    tree = first_frames()
    put(tree, path, value)
    write(download / "val/first_frame_annotations.json", tree)
    with pytest.raises(InputError, match=r"first_frame_annotations\.json: .*" + message):
        read(download)


DETECTION = ["sequences", 0, "segmentations", 0, "1"]
DAMAGE = [
    (["split"], "test", "split: expected 'val'"),
    (["sequences", 0, "seq_name"], "s3", r"sequences\[0\]: sequence 'BDD/s3' is not one of BURST val"),
    (["sequences"], [], "sequences: lacks sequence 'BDD/s1'"),
    (["sequences", 0, "id"], 2, "id: expected 1, as in the annotations of BDD/s1"),
    (["sequences", 0, "width"], 25, "width: expected 24"),
    (["sequences", 0, "annotated_image_paths", 2], "x.jpg", "annotated_image_paths: lacks 'frame0008.jpg'"),
    (["sequences", 0, "segmentations"], [{}, {}], "expected 3 segmentations, one a frame, got 2"),
    (
        ["sequences", 0, "segmentations", 0, "3"],
        {"rle": code(masks(0)[1])},
        r"\[0\]\.3: track 3 is not among those",
    ),
    (["sequences", 0, "track_category_ids"], {"1": 805}, "has no class of track 2"),
    ([*DETECTION, "rle"], "0", "expected a run-length code"),
    ([*DETECTION, "rle"], code(np.zeros((H, W), bool)), r"\[0\]\.1\.rle: is an empty mask"),
    ([*DETECTION, "score"], float("nan"), "score: expected a finite number"),
]


@pytest.mark.parametrize(("path", "value", "message"), DAMAGE)
def test_damaged_results_are_refused(download, tmp_path, path, value, message):
    videos = read(download)
    file = save(videos, tmp_path / "out") / "results.json"
    edit(file, path, value)
    with pytest.raises(InputError, match=r"results\.json: .*" + message):
        BURST.check(tmp_path / "out", videos, "val")


def test_results_at_more_frames_are_let_pass(download, tmp_path):
    videos = read(download)
    file = save(videos, tmp_path / "out") / "results.json"
    tree = json.loads(file.read_text())
    for entry in tree["sequences"]:
        entry["annotated_image_paths"].insert(1, FILES[1])
        entry["segmentations"].insert(1, {})
    write(file, tree)
    BURST.check(file, videos, "val")


@needs_trackeval
@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["split"], "test", "expected 'val', the split of the truth, got 'test'"),
        (["sequences", 0, "seq_name"], "s2", "sequence 'BDD/s2' appears twice"),
        (["sequences", 0, "seq_name"], "s3", "sequence 'BDD/s3' is unknown to the truth"),
        (["sequences", 0, "id"], 2, "id: expected 1, the id of BDD/s1 in the truth"),
        ([*DETECTION, "rle"], "1" * 10, r"\[0\]\.1\.rle: expected a run-length code"),
        ([*DETECTION, "score"], "high", "score: expected a finite number"),
        (["sequences", 0, "annotated_image_paths", 0], ANNOTATED[1], "'frame0004.jpg' appears twice"),
    ],
)
def test_damaged_results_are_named_when_they_are_scored(download, tmp_path, path, value, message):
    file = save(read(download), tmp_path / "out") / "results.json"
    edit(file, path, value)
    with pytest.raises(InputError, match=r"results\.json: .*" + message):
        BURST.score(file, download, "val")


@needs_trackeval
def test_ids_that_the_truth_lacks_are_dropped_and_missing_sequences_score_nothing(download, tmp_path):
    file = save(read(download), tmp_path / "out") / "results.json"
    edit(file, ["sequences", 0, "segmentations", 0, "9"], {"rle": code(masks(0)[1])})
    assert BURST.score(file, download, "val")["HOTA/all"] == pytest.approx(100)
    edit(file, ["sequences"], lambda sequences: sequences[:1])
    assert BURST.score(file, download, "val", ["BDD/s2"])["HOTA/all"] == 0


@needs_trackeval
@pytest.mark.parametrize("mode", ["class_guided", "open_world"])
def test_other_modes(tmp_path, mode):
    for group in ("all", "common", "uncommon"):
        write(tmp_path / f"gt/{group}_classes.json", truth())
    write(tmp_path / "results.json", truth())
    numbers = burst.score(tmp_path / "results.json", tmp_path / "gt", mode)
    assert numbers["HOTA/all" if mode == "class_guided" else "OWTA/uncommon"] == pytest.approx(100)
    with pytest.raises(InputError, match="unknown mode 'x'; known: exemplar_guided, "):
        burst.score(tmp_path / "results.json", tmp_path / "gt", "x")


def test_frames_that_are_run_are_spread_over_each_second():
    assert burst.interleaved_frames(31, 30) == [0, 3, 5, 8, 11, 14, 16, 19, 22, 25, 27, 30]
    assert burst.interleaved_frames(6, 2) == [0, 2, 4]
    assert burst.interleaved_frames(3, 1) == [0, 1, 2]
