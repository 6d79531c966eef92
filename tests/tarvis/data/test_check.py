"""`python -m tarvis.data.check`: what is sound passes, and what is wrong is named."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest

from tarvis.data import check
from tarvis.data.check import main
from tarvis.demo.synthetic_benchmarks import make_benchmark
from tarvis.files import rle
from tests.tarvis.fuzz import edit


@pytest.fixture
def look(capsys):
    def run(*args):
        code = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return code, json.loads(out), err

    return run


@pytest.fixture
def videos(tmp_path):
    make_benchmark("vipseg", tmp_path, num_frames=4, num_objects=2)
    return tmp_path


@pytest.fixture
def images(tmp_path):
    make_benchmark("coco", tmp_path, num_videos=3)
    return tmp_path


def picture(root, pattern):
    return sorted(root.rglob(pattern))[0]


@pytest.mark.parametrize("options", [(), ("--quick",), ("--workers", "2")])
def test_a_sound_set_passes_with_a_summary(videos, look, options):
    code, summary, err = look("vipseg", "--data", videos, "--split", "val", *options)
    assert code == 0
    assert not err
    assert summary["ok"]
    assert (summary["videos"], summary["frames"], summary["wrong"]) == (2, 8, 0)
    assert sum(summary["objects_by_class"].values()) == summary["objects"]
    assert summary["clips_from"] == {"vps": 2}


def test_processes_that_are_no_forks_find_the_same(videos, look, monkeypatch):
    (videos / "a.png").write_bytes(picture(videos, "*.jpg").read_bytes())
    picture(videos, "*.jpg").write_bytes(b"no picture")
    options = "vipseg", "--data", videos, "--split", "val"
    alone = look(*options)
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    assert look(*options, "--workers", "2") == alone
    assert alone[1]["wrong"] == 1


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_ends_the_check_with_advice(images, look, monkeypatch):
    monkeypatch.setattr(check, "_look", killed)
    code, summary, err = look("coco", "--data", images, "--workers", "2")
    assert (code, summary["ok"]) == (1, False)
    assert err == f"wrong: a process has gone, most likely for want of memory: {check.FEWER}\n"


@pytest.mark.parametrize("kind", [OSError(28, "No space left on device"), BlockingIOError(11, "again")])
def test_processes_that_cannot_start_end_the_check_with_advice(images, look, monkeypatch, kind):
    def refused(*_):
        raise kind

    monkeypatch.setattr(check, "ProcessPoolExecutor", refused)
    _, _, err = look("coco", "--data", images, "--workers", "2")
    assert err == f"wrong: 2 processes cannot start ({kind}): {check.FEWER}\n"
    assert look("coco", "--data", images, "--workers", "1")[0] == 0


STUCK = """
import signal, sys, time
from tarvis.data import check
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
def stuck(*_):
    time.sleep(600)
check._look = stuck
sys.exit(check.main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("to_all", [True, False], ids=["all", "alone"])
def test_a_check_that_is_stopped_ends_in_one_line_with_its_processes(images, number, to_all):
    program = subprocess.Popen(
        [sys.executable, "-c", STUCK, "coco", "--data", images, "--workers", "2"],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(workers := psutil.Process(program.pid).children()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)
    (os.killpg if to_all else os.kill)(program.pid, number)
    assert program.communicate(timeout=60)[1] == "error: stopped\n"
    assert program.returncode == 128 + number
    assert not psutil.wait_procs(workers, timeout=10)[1]


def test_a_sound_image_set_passes(images, look):
    code, summary, _ = look("coco", "--data", images)
    assert code == 0
    assert summary["images"] == 3
    assert set(summary["clips_from"]) == {"vis", "vps", "vos"}


@pytest.mark.parametrize("quick", [True, False])
def test_a_missing_image_is_named(videos, look, quick):
    gone = sorted(videos.rglob("*.jpg"))[1]
    gone.unlink()
    code, summary, err = look("vipseg", "--data", videos, "--split", "val", *["--quick"] * quick)
    assert code == 1
    assert summary["wrong"] == 1
    assert not summary["ok"]
    assert str(gone) in err


def test_a_damaged_image_is_named(videos, look):
    image = picture(videos, "*.jpg")
    image.write_bytes(image.read_bytes()[:30])
    _, summary, err = look("vipseg", "--data", videos, "--split", "val")
    assert summary["wrong"] == 1
    assert f"{image}: not an image" in err


def test_an_image_of_another_size_is_named(images, look):
    image = picture(images, "*.jpg")
    cv2.imwrite(str(image), np.zeros((30, 40, 3), np.uint8))
    _, _, err = look("coco", "--data", images)
    assert f"{image}: expected an image of (64, 96)" in err


@pytest.mark.parametrize("part", [slice(None), slice(40)])
def test_labels_that_lack_listed_objects_are_named(images, look, part):
    labels = picture(images, "*.png")
    numbers = cv2.imread(str(labels))
    numbers[part] = 0
    cv2.imwrite(str(labels), numbers)
    _, summary, err = look("coco", "--data", images)
    assert summary["wrong"] == 1
    assert f"image {labels.stem}.jpg: " in err
    assert "of its 2 objects have no pixel in its labels" in err


def without_things(tree):
    for entry in tree["annotations"][:2]:
        entry["segments_info"] = []


def test_images_without_things_are_counted(images, look):
    file = next(images.rglob("panoptic_train2017.json"))
    tree = json.loads(file.read_text())
    without_things(tree)
    file.write_text(json.dumps(tree))
    code, summary, _ = look("coco", "--data", images)
    assert code == 0
    assert (summary["images"], summary["without_objects"], summary["frames"]) == (3, 2, 1)
    assert summary["clips_from"] == {"vis": 1, "vps": 1, "vos": 1}


@pytest.mark.parametrize("kind", ["instances", "panoptic", "tracks"])
def test_what_a_file_of_own_data_lists_without_objects_is_counted(tmp_path, look, kind):
    images = [{"id": k, "file_name": f"v{k}/0.png", "height": 40, "width": 60} for k in range(3)]
    square = [[5, 5, 30, 5, 30, 30, 5, 30]]
    instance = {"image_id": 1, "category_id": 1, "segmentation": square, "iscrowd": 0}
    tree = {"images": images, "annotations": [instance], "categories": [{"id": 1, "name": "square"}]}
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[5:30, 5:30] = 7
    for k in range(3):
        (tmp_path / f"v{k}").mkdir()
        cv2.imwrite(str(tmp_path / f"v{k}/0.png"), pixels)
    if kind == "panoptic":
        cv2.imwrite(str(tmp_path / "map.png"), pixels * np.array([0, 0, 1], np.uint8))
        segment = {"id": 7, "category_id": 1}
        tree["annotations"] = [
            {"image_id": 0, "file_name": "map.png", "segments_info": []},
            {"image_id": 1, "file_name": "map.png", "segments_info": [segment]},
        ]
    if kind == "tracks":
        del tree["images"]
        tree["videos"] = [
            {"id": k, "file_names": [f"v{k}/0.png"], "height": 40, "width": 60} for k in range(3)
        ]
        code = {"size": [40, 60], "counts": rle.encode(pixels[None, ..., 0] > 0)[0]["counts"].decode()}
        tree["annotations"] = [{"video_id": 1, "category_id": 1, "segmentations": [code]}]
    (tmp_path / "mine.json").write_text(json.dumps(tree))
    code, summary, err = look(tmp_path / "mine.json")
    assert (code, err) == (0, "")
    assert summary["videos" if kind == "tracks" else "images"] == 3
    assert (summary["without_objects"], summary["frames"]) == (2, 1)


def test_videos_of_a_folder_that_have_no_masks_are_counted(tmp_path, look):
    mask = np.zeros((40, 60), np.uint8)
    for k in range(3):
        for folder in (tmp_path / f"frames/{k}", tmp_path / f"masks/{k}")[: 1 if k == 2 else 2]:
            folder.mkdir(parents=True)
            cv2.imwrite(str(folder / "0.png"), mask)
        mask[5:30, 5:30] = 1
    code, summary, _ = look(tmp_path)
    assert code == 0
    assert (summary["videos"], summary["without_objects"], summary["clips_from"]) == (3, 2, {"vos 1": 1})


def test_generated_videos_have_no_files_to_look_at(look):
    code, _, err = look("synthetic")
    assert code == 1
    assert "made when they are asked for" in err


def test_an_unknown_category_is_named(images, look):
    file = next(images.rglob("panoptic_train2017.json"))
    tree = json.loads(file.read_text())
    tree["annotations"][0]["segments_info"][0]["category_id"] = 12345
    file.write_text(json.dumps(tree))
    code, summary, err = look("coco", "--data", images)
    assert code == 1
    assert (summary["wrong"], summary["ok"]) == (1, False)
    assert f"{file}: annotations[0].segments_info[0].category_id: category 12345 is unknown" in err


def test_only_some_of_many_faults_are_shown(videos, look):
    for image in videos.rglob("*.jpg"):
        image.unlink()
    _, summary, err = look("vipseg", "--data", videos, "--split", "val", "--show", 3)
    assert summary["wrong"] == 8
    assert err.count("wrong:") == 3
    assert "and 5 more" in err


def test_masks_without_pixels_are_named(videos, look):
    labels = sorted((videos / "panomasksRGB").rglob("*.png"))[2]
    listed = json.loads((videos / "panoptic_gt_VIPSeg_val.json").read_text())["annotations"][0]["annotations"]
    stuff = listed[2]["segments_info"][0]["id"]
    numbers = cv2.imread(str(labels))
    numbers[:] = [stuff >> 16, stuff >> 8 & 255, stuff & 255]
    cv2.imwrite(str(labels), numbers)
    code, summary, err = look("vipseg", "--data", videos, "--split", "val")
    assert (code, summary["wrong"]) == (1, 1)
    assert f"video {labels.parent.name}: frame {labels.stem}.jpg has no pixel of [1" in err


def test_videos_of_stuff_alone_are_counted_and_not_wrong(videos, look):
    for frame in range(4):
        path = ["annotations", 0, "annotations", frame, "segments_info"]
        edit(videos / "panoptic_gt_VIPSeg_val.json", path, lambda listed: listed[:1])
    code, summary, _ = look("vipseg", "--data", videos, "--split", "val")
    assert code == 0
    assert (summary["videos"], summary["without_objects"], summary["clips_from"]) == (2, 1, {"vps": 1})


def test_labels_of_another_size_are_named(tmp_path, look):
    make_benchmark("davis", tmp_path, split="train", num_videos=1)
    for mask in (tmp_path / "Annotations").rglob("*.png"):
        cv2.imwrite(str(mask), np.full((30, 40), 1, np.uint8))
    _, summary, err = look("davis", "--data", tmp_path)
    assert summary["wrong"] == 8
    assert "expected an image of (30, 40), as its annotations say, got (64, 96)" in err


def test_a_split_that_comes_without_masks_says_so(tmp_path, look):
    make_benchmark("davis", tmp_path)
    _, _, err = look("davis", "--data", tmp_path, "--split", "val")
    assert "cannot train on davis: video 'shapes-0' comes without masks" in err


@pytest.mark.parametrize("kind", ["instances", "tracks"])
def test_all_bad_entries_are_listed_in_one_run(tmp_path, look, kind):
    square, bad = [[5, 5, 30, 5, 30, 30, 5, 30]], [[["a"] * 6], [], {"size": [1, 2]}, 7]
    wrong = [{"segmentation": mask} for mask in bad] + [{"category_id": 9}, {"category_id": None}]
    wrong += [{"iscrowd": "no"}, {"image_id": 77, "video_id": 77}]
    entries = [
        {"image_id": 1, "video_id": 1, "category_id": 1, "segmentation": square} | w for w in [{}, *wrong]
    ]
    listed = [{"id": k, "height": 40, "width": 60, "file_name": "v/0.png"} for k in (1, 1, None)]
    cv2.imwrite(str(tmp_path / "0.png"), np.zeros((40, 60, 3), np.uint8))
    (tmp_path / "v").mkdir()
    (tmp_path / "0.png").rename(tmp_path / "v/0.png")
    if kind == "tracks":
        listed = [{**each, "file_names": [each["file_name"]]} for each in listed]
        entries = [{**each, "segmentations": [each["segmentation"]]} for each in entries]
    tree = {"images" if kind == "instances" else "videos": listed, "annotations": entries}
    tree["categories"] = [{"id": 1, "name": "square"}]
    (tmp_path / "mine.json").write_text(json.dumps(tree))
    code, summary, err = look(tmp_path / "mine.json")
    assert code == 1
    assert all(f": annotations[{k}]." in err for k in range(1, len(entries)))
    assert all(f": {'images' if kind == 'instances' else 'videos'}[{k}].id" in err for k in (1, 2))
    assert summary["wrong"] == len(wrong) + 2
    assert summary["objects"] >= 1


def test_all_bad_masks_of_a_folder_are_listed_in_one_run(tmp_path, look):
    mask = np.zeros((40, 60), np.uint8)
    mask[5:30, 5:30] = 1
    for folder in ("frames", "masks"):
        (tmp_path / folder).mkdir()
        for k in range(6):
            cv2.imwrite(str(tmp_path / folder / f"{k}.png"), mask)
    (tmp_path / "masks/1.png").write_bytes(b"no picture")
    cv2.imwrite(str(tmp_path / "masks/2.png"), mask[:20])
    cv2.imwrite(str(tmp_path / "masks/3.png"), np.stack([mask] * 3, -1))
    (tmp_path / "frames/4.png").unlink()
    _, summary, err = look(tmp_path)
    assert summary["wrong"] == 4
    assert all(f"masks/{k}.png: " in err for k in (1, 2, 3, 4))


def test_smoothed_masks_of_a_folder_are_listed(tmp_path, look):
    mask = np.zeros((40, 60), np.uint8)
    mask[5:30, 5:30] = 2
    for folder in ("frames", "masks"):
        (tmp_path / folder).mkdir()
        for k in range(4):
            cv2.imwrite(
                str(tmp_path / folder / f"{k}.png"), cv2.GaussianBlur(mask, (0, 0), 1) if k > 1 else mask
            )
    _, summary, err = look(tmp_path)
    assert summary["wrong"] == 2
    assert all(f"masks/{k}.png: looks like grey levels" in err for k in (2, 3))
