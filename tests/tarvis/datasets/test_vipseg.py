"""VIPSeg in its layouts: reading, writing, scoring, training, and what is wrong with files."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

from tarvis.datasets.classes import class_table
from tarvis.datasets.vipseg import VIPSeg
from tarvis.structures import VOID, InputError
from tests.tarvis.datasets.support import colours, perfect, submit, write
from tests.tarvis.fuzz import edit, only_our_errors

H, W, FRAMES = 12, 20, 8
WALL, SLIDE, CAR, PERSON = 0, 6, 48, 60
"""A slide, which is stuff, has the colour of cars."""
CLASSES = class_table("vipseg")
STEMS = [f"{5 * t + 1:08d}" for t in range(FRAMES)]
VIDEOS = ("0_wHveSGjXyDY", "12_1mWNahzcsAc")
vipseg = VIPSeg()


def mask(t):
    """Two cars and a person that comes later, on wall and slide, void at the left border."""
    values = np.full((H, W), WALL + 1, np.uint16)
    values[9:] = SLIDE + 1
    values[1:4, 1 + t : 6 + t] = (CAR + 1) * 100
    values[5:8, 8:13] = (CAR + 1) * 100 + 1
    if t > 2:
        values[4:11, 15:18] = (PERSON + 1) * 100 + 7
    values[:, 0] = 0
    return values


def panoptic(values):
    """Ids and segments of a mask: an id is seven times the value and one."""
    ids = np.where(values > 0, 7 * values.astype(np.int32) + 1, 0)
    shown = [value for value in np.unique(values).tolist() if value]
    return ids, [
        {
            "id": 7 * value + 1,
            "category_id": value - 1 if value < 125 else value // 100 - 1,
            "iscrowd": 0,
            "area": int((values == value).sum()),
        }
        for value in shown
    ]


def make_json(base, split, videos=VIDEOS, *, masks=True):
    listed, annotations = [], []
    for video in videos:
        images = [{"id": stem, "height": H, "width": W, "file_name": f"{stem}.png"} for stem in STEMS]
        listed.append({"video_id": video, "images": images})
        frames = []
        for t, stem in enumerate(STEMS):
            ids, segments = panoptic(mask(t))
            frames.append({"image_id": stem, "file_name": f"{stem}.png", "segments_info": segments})
            if masks:
                write(base / "panomasksRGB" / video / f"{stem}.png", colours(ids))
        annotations.append({"video_id": video, "annotations": frames})
    categories = [
        {"id": k, "name": name, "isthing": int(thing)}
        for k, (name, thing) in enumerate(zip(CLASSES.names, CLASSES.is_thing, strict=True))
    ]
    tree = {"videos": listed, "annotations": annotations, "categories": categories}
    write(base / f"panoptic_gt_VIPSeg_{split}.json", tree)


def make_download(root):
    base = root / "VIPSeg_720P"
    make_json(base, "val")
    make_json(base, "train", ["9_train"])
    for video in ("9_train", *VIDEOS):
        for stem in STEMS:
            write(base / "images" / video / f"{stem}.jpg", b"")
    write(root / "test.txt", b"\n".join(video.encode() for video in VIDEOS))
    return root


def read(root, split="val"):
    return vipseg.read(vipseg.find(root, split), split)


@pytest.fixture
def download(tmp_path):
    return make_download(tmp_path / "download")


@pytest.fixture
def results(download, tmp_path):
    return submit(vipseg, read(download), tmp_path / "results")


def test_the_download_is_read_from_its_own_folder_or_the_one_above(download):
    for root in (download, download / "VIPSeg_720P"):
        first, second = read(root)
        assert (first.name, second.name) == VIDEOS
        assert first.size == (H, W)
        assert first.frame_names == tuple(f"{stem}.jpg" for stem in STEMS)
        assert first.images[1] == download / "VIPSeg_720P/images" / VIDEOS[0] / f"{STEMS[1]}.jpg"
        assert [video.name for video in read(root, "train")] == ["9_train"]


def test_the_test_split_is_a_list_of_folders(download):
    videos = read(download, "test")
    assert [video.name for video in videos] == list(VIDEOS)
    assert videos[0].frame_names == tuple(f"{stem}.jpg" for stem in STEMS)
    assert videos[0].truth is None


def test_truth_may_be_given_as_its_folder(download):
    roots = vipseg.find(download, "val")
    video = vipseg.read(replace(roots, truth=roots.truth.parent), "val")[0]
    assert video.truth.read(0).ids.max() == 2


def test_truth_numbers_tracks_in_the_order_of_listing(download):
    truth = read(download)[0].truth
    assert truth.labels == {1: CAR, 2: CAR, 3: PERSON}
    assert truth.visible == ((1, 2),) * 3 + ((1, 2, 3),) * 5
    labels = truth.read(3)
    assert (labels.ids == 3).sum() == 21
    assert (labels.semantic[:, 0] == VOID).all()
    assert labels.semantic[11, 19] == SLIDE
    assert (labels.semantic[labels.ids == 3] == PERSON).all()


def test_stuff_is_listed_first_and_a_slide_is_told_from_a_car(results):
    video = json.loads((results / "pred.json").read_text())["annotations"][0]
    assert video["video_id"] == VIDEOS[0]
    assert [frame["file_name"] for frame in video["annotations"]] == [f"{stem}.jpg" for stem in STEMS]
    segments = video["annotations"][3]["segments_info"]
    assert [s["category_id"] for s in segments] == [WALL, SLIDE, CAR, CAR, PERSON]
    assert len({s["id"] for s in segments}) == 5
    assert {s["id"] for s in video["annotations"][0]["segments_info"]} < {s["id"] for s in segments}


def test_results_of_a_video_show_only_frames_that_are_scored(download, tmp_path):
    video = read(download)[0]
    object.__setattr__(video, "scored", (1, 3))
    share = vipseg.write(perfect(video), video, tmp_path / "out")
    assert [frame["file_name"] for frame in share["annotations"]] == [f"{STEMS[1]}.jpg", f"{STEMS[3]}.jpg"]
    assert len(list((tmp_path / "out").rglob("*.png"))) == 2


VAL = "panoptic_gt_VIPSeg_val.json"
SEGMENT = ["annotations", 1, "annotations", 2, "segments_info", 1]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["videos"], [], "has no videos"),
        (["videos", 1, "video_id"], VIDEOS[0], "video '0_wHveSGjXyDY' appears twice"),
        (["videos", 1, "video_id"], "../x", "is not a path below its folder"),
        (["videos", 1, "video_id"], "x", "video 'x' has no annotations"),
        (["videos", 1, "images"], [], r"videos\[1\].images: expected at least one image"),
        (["videos", 1, "images", 2, "file_name"], "00000001.jpg", r"videos\[1\].images: .*each image once"),
        (["videos", 1, "images", 2, "width"], 9, r"images\[2\]: is of another size"),
        (["videos", 1, "images", 2, "width"], "9", r"images\[2\].width: expected an integer"),
        (["annotations", 1, "annotations"], [], "expected 8 annotations, one an image, got 0"),
        ([*SEGMENT, "category_id"], 124, "category 124 is unknown"),
        ([*SEGMENT, "id"], 2**24, "expected an integer from 1 to 16777215"),
    ],
)
def test_wrong_entries_are_named(download, path, value, message):
    edit(download / "VIPSeg_720P" / VAL, path, value)
    with pytest.raises(InputError, match=message) as error:
        read(download)
    assert VAL in str(error.value)


def test_sizes_that_annotations_do_not_say_are_read_from_images(download, results):
    base = download / "VIPSeg_720P"
    for video in (0, 1):
        images = [{"id": stem, "height": H, "file_name": f"{stem}.png"} for stem in STEMS]
        edit(base / VAL, ["videos", video, "images"], images)
    videos = read(download)
    assert videos[0].size is None
    for size, message in ((H, W, 3), None), ((H, H, 3), r"expected a picture of \(12, 12\)"):
        for video in videos:
            write(video.images[0], cv2.imencode(".jpg", np.zeros(size, np.uint8))[1].tobytes())
        if message is None:
            vipseg.check(results, videos, "val")
        else:
            with pytest.raises(InputError, match=message):
                vipseg.check(results, videos, "val")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["annotations"], lambda a: a[:1], f"lacks video '{VIDEOS[1]}'"),
        (["annotations", 1, "video_id"], VIDEOS[0], f"video '{VIDEOS[0]}' appears twice"),
        (["annotations", 1, "annotations"], lambda a: a[:7], "expected 8 frames, got 7"),
        ([*SEGMENT, "id"], 5, "which has pixels in"),
        ([*SEGMENT, "category_id"], -1, "category -1 is unknown"),
        ([*SEGMENT[:4], "segments_info"], lambda s: [*s, s[0] | {"id": 5}], "which has no pixels in"),
        ([*SEGMENT[:4], "file_name"], "00000001.jpg", "frame 00000001 appears twice"),
        ([*SEGMENT[:4], "file_name"], "x.jpg", "expected a frame such as 00000001, got x"),
        (SEGMENT[:4], lambda frame: {"segments_info": frame["segments_info"]}, "one without a name"),
    ],
)
def test_damage_of_results_is_found(download, results, path, value, message):
    edit(results / "pred.json", path, value)
    with pytest.raises(InputError, match=rf"pred\.json: annotations.*{message}"):
        vipseg.check(results, read(download), "val")
    with pytest.raises(InputError, match=rf"pred\.json: annotations.*{message}"):
        vipseg.score(results, vipseg.find(download, "val").truth, "val")


def test_results_of_an_unknown_video_are_only_minded_by_a_server(download, results):
    edit(results / "pred.json", ["annotations"], lambda a: [*a, a[0] | {"video_id": "x"}])
    with pytest.raises(InputError, match=r"\[2\]\.video_id: video 'x' is unknown"):
        vipseg.check(results, read(download), "val")
    vipseg.score(results, vipseg.find(download, "val").truth, "val")


FRAMES_OF = ["annotations", 1, "annotations"]


def turned(frames):
    return frames[3:] + frames[:3]


@pytest.mark.parametrize(
    ("file", "path"),
    [("pred", FRAMES_OF), ("truth", FRAMES_OF), ("truth", ["videos", 1, "images"])],
)
def test_frames_are_paired_by_name_wherever_they_stand_in_a_list(download, results, file, path):
    truth = vipseg.find(download, "val").truth
    before, videos = vipseg.score(results, truth, "val"), read(download)
    shown = [[video.truth.read(t).ids for t in range(FRAMES)] for video in videos]
    edit({"pred": results / "pred.json", "truth": download / "VIPSeg_720P" / VAL}[file], path, turned)
    for video, maps in zip(read(download), shown, strict=True):
        places = [videos[0].frame_names.index(name) for name in video.frame_names]
        assert all((video.truth.read(t).ids == maps[k]).all() for t, k in enumerate(places))
    assert vipseg.score(results, truth, "val")["STQ"] == before["STQ"] == pytest.approx(1)
    vipseg.check(results, read(download), "val")


def test_frames_without_any_name_are_paired_in_their_order(download, results):
    edit(
        results / "pred.json",
        FRAMES_OF,
        lambda frames: [{"segments_info": f["segments_info"]} for f in frames],
    )
    assert vipseg.score(results, vipseg.find(download, "val").truth, "val")["STQ"] == pytest.approx(1)


def test_a_folder_with_truths_of_other_splits_has_to_be_told_which(download, results):
    base = download / "VIPSeg_720P"
    assert vipseg.score(results, base, "val")["STQ"] == pytest.approx(1)
    (base / VAL).rename(base / VAL.replace("val", "test"))
    with pytest.raises(InputError, match=r"VIPSeg_720P: has .*test\.json and .*train\.json; name the file"):
        vipseg.score(results, base, "val")
    (base / VAL.replace("val", "train")).unlink()
    assert vipseg.score(results, base, "val")["STQ"] == pytest.approx(1)
    with pytest.raises(InputError, match=r"has no panoptic_gt_VIPSeg_val\.json; name the file"):
        vipseg.score(results, results, "val")


@pytest.fixture
def workspace(tmp_path):
    """The published files of training."""
    root = tmp_path / "workspace"
    folder = root / "dataset_annotations/training/vipseg"
    things = [[4900, 4901] + [6107] * (t > 2) for t in range(FRAMES)]
    sequence = {
        "name": "9_train",
        "filenames": STEMS,
        "instance_ids": [4900, 4901, 6107],
        "stuff_classes": [WALL, SLIDE],
        "frame_instance_occupancy": things,
    }
    write(folder / "video_info.json", {"sequences": [sequence]})
    for t, stem in enumerate(STEMS):
        write(folder / "panoptic_masks/9_train" / f"{stem}.png", mask(t))
    (root / "dataset_images/training/vipseg").mkdir(parents=True)
    return root


def test_downloads_and_workspaces_are_trained_on_alike(download, workspace):
    (before,), (after,) = read(download, "train"), read(workspace, "train")
    assert after.name == "9_train"
    assert after.frame_names == before.frame_names
    assert after.truth.labels == {4900: CAR, 4901: CAR, 6107: PERSON}
    assert after.truth.visible == ((4900, 4901),) * 3 + ((4900, 4901, 6107),) * 5
    for t in range(FRAMES):
        old, new = before.truth.read(t), after.truth.read(t)
        assert (old.semantic == new.semantic).all()
        assert ((old.ids > 0) == (new.ids > 0)).all()
        assert new.ids.max() == (6107 if t > 2 else 4901)


INFO = "dataset_annotations/training/vipseg/video_info.json"


def test_values_that_are_not_listed_are_void(workspace):
    edit(workspace / INFO, ["sequences", 0, "stuff_classes"], [WALL])
    labels = read(workspace, "train")[0].truth.read(0)
    assert (labels.semantic[11] == VOID).all()
    assert labels.semantic[0, 19] == WALL


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", "/x", "is not a path below"),
        ("filenames", STEMS[:7] + STEMS[:1], "filenames: expected at least one frame, and each frame once"),
        ("instance_ids", [4900, 4900], r"instance_ids\[1\]: expected \(class \+ 1\) \* 100"),
        ("instance_ids", [100], r"instance_ids\[0\]: expected"),
        ("instance_ids", [12500], r"instance_ids\[0\]: expected"),
        ("instance_ids", [4900], r"frame_instance_occupancy\[0\]: shows instance 4901, which is not listed"),
        ("stuff_classes", [124], "expected an integer from 0 to 123"),
        ("frame_instance_occupancy", [], "expected 8 lists, one a frame, got 0"),
    ],
)
def test_wrong_entries_of_video_info_are_named(workspace, key, value, message):
    edit(workspace / INFO, ["sequences", 0, key], value)
    with pytest.raises(InputError, match=message) as error:
        read(workspace, "train")
    assert "video_info.json: sequences[0]" in str(error.value)


def test_damaged_files_of_a_workspace_raise_our_errors_alone(workspace):
    def use():
        for video in read(workspace, "train"):
            labels = video.truth.read(0)
            assert set(np.unique(labels.ids).tolist()) <= video.truth.labels.keys() | {0}

    files = [workspace / INFO, min(workspace.rglob("*.png"))]
    only_our_errors(use, files, workspace, "9_train")
