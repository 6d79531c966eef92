"""`python -m tarvis.infer`: what it writes for every task; bad input ends in one line and leaves no files."""

import contextlib
import dataclasses
import filecmp
import hashlib
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tarvis.files import rle
from tarvis.files.pictures import encode_ids, read_ids, voc_palette
from tarvis.infer import main, short_name
from tarvis.stitch.panoptic import paint
from tarvis.video.frames import VideoFrames
from tarvis.video.overlays import shown_tracks
from tarvis.video.results import ResultFiles, read_results
from tarvis.video.segmenter import VideoSegmenter

ROOT = Path(__file__).parents[2]
SIZE = (64, 96)
FRAMES = 6
TASKS = ["vis", "vps", "vos", "pet"]
SHORT = ["--clip-length", "4", "--overlap", "2"]


@pytest.fixture(scope="module")
def config(config):
    return dataclasses.replace(config, class_sets={"synthetic": 8, "youtube_vis_2021": 40})


@pytest.fixture
def mask(tmp_path, clip):
    return write_mask(tmp_path / "mask.png", clip.instance[0])


@pytest.fixture
def points(tmp_path):
    return write_points(tmp_path / "points.json", [point(1, 0), point(5, 2)])


@pytest.fixture
def given(mask, points):
    """What each task needs besides a video."""
    classes = ["--dataset", "synthetic"]
    return {"vis": classes, "vps": classes, "vos": ["--masks", mask], "pet": ["--points", points]}


@pytest.fixture
def infer(tmp_path, weights):
    """Runs the command on an input, which must succeed; gives the folder of results."""

    def run(source, task, *options, out="out"):
        args = [source, "--task", task, "--weights", weights, "--out", tmp_path / out, *options]
        assert main([str(arg) for arg in args]) == 0
        return tmp_path / out

    return run


@pytest.fixture
def refused(tmp_path, weights, capsys):
    """Runs the command on what it must refuse with one line and without leaving anything behind.

    Gives the line, without "error: ".
    """

    def run(source, task="vis", *options, out=None, weights=weights):
        out = tmp_path / "out" if out is None else out
        before = everything(tmp_path)
        capsys.readouterr()
        args = [source, "--task", task, "--weights", weights, "--out", out, *options]
        code = main([str(arg) for arg in args])
        stdout, stderr = capsys.readouterr()
        lines = [line for line in re.split(r"[\r\n]+", stderr) if line.strip() and "frame/s" not in line]
        assert code == 2
        assert stdout == ""
        assert len(lines) == 1, stderr
        assert lines[0].startswith("error: ")
        assert everything(tmp_path) == before
        return lines[0].removeprefix("error: ")

    return run


def everything(folder):
    """Every file below a folder with its content."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def write_mask(path, ids):
    path.write_bytes(encode_ids(ids, voc_palette()))
    return path


def write_points(path, points):
    path.write_text(json.dumps(points))
    return path


def point(id_, frame, x=30, y=20):
    return {"id": id_, "frame": frame, "x": x, "y": y}


def assert_whole(out, task, names, size=SIZE):
    """All files of a task are there, can be read again, and agree; gives the result."""
    saved = read_results(out)
    result = saved.result
    assert (result.task, result.size, result.num_frames) == (task, size, len(names))
    assert list(saved.names) == names

    pictures = out / ("panoptic" if task == "vps" else "masks")
    assert sorted(path.name for path in pictures.iterdir()) == [f"{name}.png" for name in names]
    for track in result.tracks:
        for frame, mask in track.masks.items():
            assert 0 <= frame < len(names)
            assert mask["size"] == list(size)
            assert rle.encode(rle.decode(mask)[None])[0] == mask
    for frame, name in enumerate(names):
        shown = shown_tracks(result, 0.3)  # what --min-score is by default
        if task != "vps":
            np.testing.assert_array_equal(
                read_ids(pictures / f"{name}.png"), paint(result.size, shown, frame)
            )

    assert visible(out) == sorted([pictures.name, "tracks.json", "overlay.mp4", "contact_sheet.png"])
    assert count_frames(out / "overlay.mp4") == len(names)
    assert cv2.imread(str(out / "contact_sheet.png")) is not None
    return result


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")


def count_frames(path):
    capture = cv2.VideoCapture(str(path))
    count = 0
    while capture.read()[0]:
        count += 1
    return count


def image_names(*indices):
    return [f"img_{i:02d}" for i in indices]


# What is written


@pytest.mark.parametrize("kind", ["folder", "video", "glob"])
def test_every_task_runs_on_a_folder_a_video_and_a_glob(kind, folder, video, given, infer):
    source = {"folder": folder, "video": video, "glob": folder / "*.png"}[kind]
    names = [f"{i:05d}" for i in range(FRAMES)] if kind == "video" else image_names(*range(FRAMES))
    options = [option for needed in given.values() for option in needed]
    out = infer(source, "vis,vps,vos,pet", *options, *SHORT)
    assert visible(out) == sorted(TASKS)
    found = {task: assert_whole(out / task, task, names) for task in TASKS}
    assert found["vis"].tracks
    assert found["vps"].tracks
    assert [track.id for track in found["vos"].tracks] == [1, 2, 3]
    assert [track.id for track in found["pet"].tracks] == [1, 5]
    assert not found["pet"].tracks[1].masks.keys() & {0, 1}  # given at frame 2


def test_several_tasks_write_the_files_of_separate_runs(folder, given, infer):
    options = [option for needed in given.values() for option in needed]
    together = infer(folder, "vis,vps,vos,pet", *options, *SHORT, out="together")
    for task in TASKS:
        # settings come from the data set of the first task unless one is named
        alone = infer(folder, task, *given[task], "--dataset", "synthetic", *SHORT, out=task)
        files = [path.relative_to(alone) for path in alone.rglob("*") if path.is_file()]
        assert len(files) == FRAMES + 4
        files.remove(Path(".tarvis.json"))  # which several tasks share
        same, *_ = filecmp.cmpfiles(alone, together / task, files, shallow=False)
        assert same == files


def test_the_summary_is_one_json_line_and_progress_goes_to_stderr(folder, given, infer, capfd):
    out = infer(folder, "vos", *given["vos"])
    stdout, stderr = capfd.readouterr()
    assert stdout.count("\n") == 1
    summary = json.loads(stdout)
    assert summary["out"] == str(out)
    assert summary["frames"] == FRAMES
    assert summary["frames_per_second"] > 0
    assert summary["tracks"] == {"vos": 3}
    assert f"{FRAMES}/{FRAMES}" in stderr
    assert "frame/s" in stderr


@pytest.mark.parametrize(("limit", "kept"), [(2, (1, 2)), (50, (1, 2, 3, 4, 5))])
def test_frames_can_be_left_out(limit, kept, folder, given, infer):
    out = infer(folder, "vis", *given["vis"], "--start", 1, "--limit", limit)
    assert_whole(out, "vis", image_names(*kept))


@pytest.mark.parametrize("kind", ["folder", "video"])
def test_frames_of_a_part_keep_their_numbers(kind, folder, video, clip, tmp_path, infer):
    """In names, points, masks by number, and files for other tools."""
    numbers = [1, 3, 5]
    source = {"folder": folder, "video": video}[kind]
    names = image_names(*numbers) if kind == "folder" else [f"{number:05d}" for number in numbers]
    points = write_points(tmp_path / "p.json", [point(1, 3), point(2, names[2])])
    mask = write_mask(tmp_path / "any.png", (clip.instance[3] == 1).astype(np.uint8))
    part = ["--start", 1, "--end", 5, "--stride", 2, "--save", "overlay,masks,coco,mots", "--min-size", 0]
    out = infer(source, "pet,vos", "--points", points, "--masks", f"4@3={mask}", *part)
    for task, firsts in (("pet", [1, 2]), ("vos", [1])):
        result = read_results(out / task)
        assert list(result.names) == names
        assert count_frames(out / task / "overlay.mp4") == 3
        assert [min(track.masks, default=None) for track in result.result.tracks] == firsts
        images = json.loads((out / task / "coco.json").read_text())["images"]
        assert [(image["frame"], image["file_name"]) for image in images] == [
            (number, f"{name}.jpg") for number, name in zip(numbers, names, strict=True)
        ]
        lines = (out / task / "mots.txt").read_text().splitlines()
        assert {int(line.split()[0]) for line in lines} <= {3, 5}


def test_masks_of_a_folder_belong_to_the_frames_they_are_named_after(video, clip, tmp_path, infer):
    folder = tmp_path / "masks"
    folder.mkdir()
    for number in (1, 2, 4):
        write_mask(folder / f"{number:05d}.png", clip.instance[number])
    out = infer(video, "vos", "--masks", folder, "--start", 2, "--stride", 2, "--limit", 2, "--min-size", 0)
    result = assert_whole(out, "vos", ["00002", "00004"])
    assert all(0 in track.masks for track in result.tracks)


@pytest.mark.parametrize(
    "options",
    [
        ["--clip-length", 3, "--overlap", 0],
        ["--clip-length", 1, "--overlap", 0],
        ["--clip-length", 3, "--overlap", 2],
        ["--clip-length", 20, "--overlap", 19],
        ["--min-size", 32],
        ["--min-size", 100],
        ["--min-size", 0],
        ["--amp", "bf16"],
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_settings_of_clips_sizes_and_precision(options, folder, given, infer):
    out = infer(folder, "vps,vos", *given["vps"], *given["vos"], *options)
    assert_whole(out / "vps", "vps", image_names(*range(FRAMES)))
    assert_whole(out / "vos", "vos", image_names(*range(FRAMES)))


def test_results_are_replaced_only_where_asked(folder, given, infer, refused):
    out = infer(folder, "vos", *given["vos"])
    assert refused(folder, "vos", *given["vos"]).startswith(f"{out}: already exists")
    infer(folder, "vos", *given["vos"], "--limit", 2, "--overwrite")
    assert_whole(out, "vos", image_names(0, 1))


# Videos at the edge of what makes sense


@pytest.mark.parametrize("kind", ["folder", "video", "image"])
def test_a_video_of_one_frame_works_for_every_task(
    kind, clip, tmp_path, mask, infer, write_images, write_video
):
    if kind == "video":
        source, name = write_video(tmp_path / "one.mp4", clip.frames[:1]), "00000"
    else:
        source, name = write_images(tmp_path / "one", clip.frames[:1]), "img_00"
        source = source / "img_00.png" if kind == "image" else source
    points = write_points(tmp_path / "p.json", [point(1, 0)])
    given = ["--dataset", "synthetic", "--masks", mask, "--points", points]
    out = infer(source, "vis,vps,vos,pet", *given)
    for task in TASKS:
        assert_whole(out / task, task, [name])


@pytest.mark.parametrize("min_size", [0, 16])  # at 16 the pixel vanishes in the resized mask
def test_objects_of_one_pixel_work(min_size, folder, tmp_path, infer):
    ids = np.zeros(SIZE, np.uint8)
    ids[0, 0], ids[63, 95], ids[30, 41] = 1, 2, 254
    mask = write_mask(tmp_path / "m.png", ids)
    corners = write_points(tmp_path / "p.json", [point(1, 0, 0, 0), point(2, 0, 95, 63), point(255, 5, 1, 1)])
    given = ["--masks", mask, "--points", corners, "--min-size", min_size, *SHORT]
    out = infer(folder, "vos,pet", *given)
    vos = assert_whole(out / "vos", "vos", image_names(*range(FRAMES)))
    pet = assert_whole(out / "pet", "pet", image_names(*range(FRAMES)))
    assert [track.id for track in vos.tracks] == [1, 2, 254]
    assert [track.id for track in pet.tracks] == [1, 2, 255]


@pytest.mark.parametrize("size", [(1, 1), (3, 130), (65, 33)])
def test_frames_of_any_size_work(size, tmp_path, infer, write_images):
    frames = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    mask = write_mask(tmp_path / "m.png", np.ones(size, np.uint8))
    points = write_points(tmp_path / "p.json", [point(1, 0, 0, 0)])
    given = ["--dataset", "synthetic", "--masks", mask, "--points", points]
    out = infer(write_images(tmp_path / "small", frames), "vis,vps,vos,pet", *given)
    for task in TASKS:
        assert_whole(out / task, task, image_names(0, 1), size)


def test_objects_may_come_later_one_by_one(folder, clip, tmp_path, infer):
    first = write_mask(tmp_path / "a.png", (clip.instance[2] == 1).astype(np.uint8) * 200)
    second = write_mask(tmp_path / "b.png", clip.instance[5])
    out = infer(folder, "vos", "--masks", f"7@img_02={first}", f"9@5={second}", *SHORT)
    result = assert_whole(out, "vos", image_names(*range(FRAMES)))
    assert [track.id for track in result.tracks] == [7, 9]
    assert not result.tracks[0].masks.keys() & {0, 1}
    assert not result.tracks[1].masks.keys() & {0, 1, 2, 3, 4}


# Input that cannot be used: the tests of each reader have all that it refuses


@pytest.mark.usefixtures("folder", "mask")
@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("text.mp4", [], "text.mp4: not a video"),
        ("absent.mp4", [], "absent.mp4: no such file or folder"),
        ("long" * 100, [], "File name too long"),  # as other errors of the system
        ("empty", [], "empty: no images in this folder; looked for .jpg"),
        ("*.jpg", [], "*.jpg: no image matches this pattern"),
        ("frames", ["--start", 6], "cannot start at frame 6, there are only 6"),
        ("frames", ["--limit", 0], "limit >= 1, got start 0 and limit 0"),
        ("frames", ["--start", -1], "start >= 0 and limit >= 1, got start -1"),
        ("frames", ["--start", 3, "--end", 2], "expected end >= start and stride >= 1, got 3 to 2, stride 1"),
        ("frames", ["--stride", 0], "expected end >= start and stride >= 1, got 0 to None, stride 0"),
        (
            "frames",
            ["--start", 4, "--task", "vos", "--masks", "1@0=mask.png"],
            "no frame 0 among those of frames: img_04 .. img_05",
        ),
        (
            "frames",
            ["--stride", 2, "--task", "pet", "--points", "odd.json"],
            "frame 1 is not read of frames, only 0 to 4, every 2 frames",
        ),
        ("frames", ["--task", "vos", "--masks", "wide.png"], "wide.png: the mask is 64x96, the video 96x64"),
        (
            "frames",
            ["--task", "vos", "--masks", "1@6=mask.png"],
            "no frame 6 among those of frames: img_00 ..",
        ),
        ("frames", ["--task", "pet", "--points", "late.json"], "[0].frame: frame 6 is past the end"),
        ("frames", ["--task", "pet", "--points", "frames"], "frames: cannot be read"),
        ("frames", ["--task", "sam"], "vis, vps, vos, pet"),
        ("frames", ["--task", ""], "vis, vps, vos, pet"),
        ("frames", ["--task", "vis,,vos"], "vis, vps, vos, pet"),
        ("frames", ["--task", "VIS"], "vis, vps, vos, pet"),
        ("frames", ["--task", "vis,vis"], "vis, vps, vos, pet"),
        ("frames", ["--task", "vos"], "vos follows objects given by masks: no mask was given"),
        ("frames", ["--task", "pet"], "pet follows objects given by points: no point was given"),
        ("frames", ["--task", "vos,pet", "--masks", "mask.png"], "no point was given"),
        ("frames", ["--clip-length", 4, "--overlap", 4], "overlap must be 0 .. clip length - 1 = 3, got 4"),
        ("frames", ["--clip-length", 2], "overlap must be 0 .. clip length - 1 = 1, got 3"),  # 3: data set's
        ("frames", ["--overlap", -1], "inference.overlap: expected a number from 0, got -1"),
        ("frames", ["--clip-length", 0], "inference.clip_length: expected a number from 1, got 0"),
        ("frames", ["--min-size", -3], "inference.min_size: expected a number from 1, got -3"),
        ("frames", ["--min-score", "7"], "--min-score: expected a number from 0 to 1, got 7.0"),
        ("frames", ["--min-score", "nan"], "--min-score: expected a number from 0 to 1, got nan"),
        ("frames", ["--device", "abacus"], "device 'abacus' cannot be used on this machine"),
        ("frames", ["--weights", "absent.pth"], "absent.pth: no such file"),
        ("frames", ["--weights", "mask.png"], "mask.png: truncated, or not a file of weights"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line(source, options, message, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.mp4").write_text("not a video, but long enough to be looked at " * 100)
    (tmp_path / "empty").mkdir()
    write_mask(tmp_path / "wide.png", np.ones((96, 64), np.uint8))
    write_points(tmp_path / "late.json", [point(1, 6)])
    write_points(tmp_path / "odd.json", [point(1, 1)])
    assert message in refused(source, "vis", "--dataset", "synthetic", *options)


# Runs that end early keep what they have done


@pytest.fixture
def ended_early(tmp_path, weights, capsys):
    """Runs the command on what ends before its end; gives how many frames the result has, and the line."""

    def run(status, source, task, *options):
        out, before = tmp_path / "out", set(tmp_path.iterdir())
        args = [source, "--task", task, "--weights", weights, "--out", out, *options]
        assert main([str(arg) for arg in args]) == status
        stdout, stderr = capsys.readouterr()
        summary = json.loads(stdout)
        assert not summary["complete"]
        assert set(tmp_path.iterdir()) == before | {out}
        for folder in [out / name for name in task.split(",")] if "," in task else [out]:
            tree = json.loads((folder / "tracks.json").read_text())
            assert (tree["complete"], tree["num_frames"]) == (False, summary["frames"])
            pictures = folder / ("panoptic" if tree["task"] == "vps" else "masks")
            assert [f"{name}.png" for name in tree["frame_names"]] == visible(pictures)
            assert (
                count_frames(folder / "overlay.mp4") == len(read_results(folder).names) == summary["frames"]
            )
        return summary["frames"], stderr.splitlines()[-1]

    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["segmenting", "writing"])
def test_a_run_that_is_stopped_keeps_the_frames_so_far(
    number, moment, folder, given, ended_early, infer, monkeypatch
):
    where = {"segmenting": "tarvis.api.VideoSegmenter.step", "writing": "tarvis.infer.ResultFiles.add"}[
        moment
    ]
    owner, method = where.rsplit(".", 1)
    change, calls = getattr(pkgutil.resolve_name(owner), method), []

    def stopped(self, *args):
        calls.append(0)
        if len(calls) == 4:
            os.kill(os.getpid(), number)
        return change(self, *args)

    points = write_points(folder.parent / "late.json", [point(1, 0), point(2, 5)])
    options = [*given["vps"], "--points", points, "--clip-length", 3, "--overlap", 1]
    with monkeypatch.context() as patch:
        patch.setattr(where, stopped)
        frames, line = ended_early(128 + number, folder, "vps,pet", *options)
    assert frames == (4 if moment == "segmenting" else 2)  # two tasks are written at a time
    assert re.fullmatch(rf"error: stopped; the result in \S+out is of the first {frames} frames", line)
    out = infer(folder, "vps,pet", *options)  # the same command makes the rest
    assert_whole(out / "pet", "pet", image_names(*range(FRAMES)))
    assert json.loads((out / "pet" / "tracks.json").read_text())["complete"]


def test_a_video_that_turns_out_to_be_cut_off_keeps_the_frames_before(tmp_path, ended_early, write_video):
    noise = list(np.random.default_rng(0).integers(0, 256, (FRAMES, *SIZE, 3), np.uint8))  # of many bytes
    avi = write_video(tmp_path / "cut.avi", noise, "MJPG")
    avi.write_bytes(avi.read_bytes()[: avi.stat().st_size * 2 // 3])  # some frames can be read
    options = ["--dataset", "synthetic", "--clip-length", 2, "--overlap", 0]
    frames, line = ended_early(3, avi, "vis", *options)
    assert 2 <= frames <= 5
    assert f"cut.avi: damaged video, the file is cut off: read {frames} frames of 6; the result" in line


@pytest.mark.parametrize("kind", ["damaged", "gone", "other size", "gone later"])
def test_an_image_that_cannot_be_used_ends_the_result_before_it(
    kind, folder, clip, given, ended_early, monkeypatch
):
    path = folder / "img_04.png"
    if kind == "damaged":
        path.write_bytes(path.read_bytes()[:100])
    elif kind == "gone":
        path.unlink()
        path.symlink_to("nowhere")
        monkeypatch.setattr(Path, "is_file", lambda self: self == path or os.path.isfile(self))
    elif kind == "other size":
        cv2.imwrite(str(path), clip.frames[4][:32])
    else:
        add, removed = ResultFiles.add, []

        def remove(self, *args):
            removed.append(path.unlink() if path.exists() else None)
            add(self, *args)

        monkeypatch.setattr("tarvis.infer.prefetch", iter)
        monkeypatch.setattr("tarvis.infer.ResultFiles.add", remove)
        monkeypatch.setattr("tarvis.infer.closing", contextlib.nullcontext)
    assert ended_early(3, folder, "vos", *given["vos"], "--clip-length", 3, "--overlap", 1)[0] == 4


def test_nothing_is_kept_where_nothing_was_done(folder, given, refused):
    path = folder / "img_00.png"
    path.write_bytes(path.read_bytes()[:100])
    refused(folder, "vis", *given["vis"])


def boast(init):
    """`VideoFrames.__init__` for a container that announces 20 frames, whatever it holds."""

    def init_boasting(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.num_frames = self._announced = 20

    return init_boasting


def test_a_reference_past_the_end_of_a_video_that_announces_too_many_frames_is_refused(
    video, tmp_path, mask, refused, monkeypatch
):
    monkeypatch.setattr(VideoFrames, "__init__", boast(VideoFrames.__init__))
    points = write_points(tmp_path / "p.json", [point(1, 0), point(2, 9)])
    late = r"object {} is given at frame {}, but the video has 6 frames \(0 to 5\)"
    assert re.search(late.format(2, 9), refused(video, "pet", "--points", points, "--min-size", 0))
    assert re.search(late.format(4, 12), refused(video, "vos", "--masks", f"4@12={mask}"))


def test_class_sets_that_do_not_fit_are_refused(folder, given, refused):
    have = "they have: synthetic, youtube_vis_2021"
    assert f"no classes of 'ovis'; {have}" in refused(folder, "vis", "--dataset", "ovis")
    assert f"no classes of 'davis'; {have}" in refused(folder, "vis", "--dataset", "davis")
    assert "vps: name the class set of these weights" in refused(folder, "vps")  # its default
    assert "no classes of 'imagenet'" in refused(folder, "vis", "--dataset", "imagenet")
    assert "'imagenet'; known: " in refused(folder, "vos", *given["vos"], "--dataset", "imagenet")
    assert "vps needs a class set with stuff, and youtube_vis_2021 has things only" in refused(
        folder, "vps", "--dataset", "youtube_vis_2021"
    )


# Weights that cannot be used


def test_weights_without_their_config_are_refused(folder, tmp_path, state, refused):
    path = tmp_path / "bare.pth"
    torch.save({"model": state}, path)
    assert "bare.pth: no configuration in it and no config.yaml beside it" in refused(folder, weights=path)
    beside = tmp_path / "config.yaml"
    beside.write_text("MODEL:\n  BACKBONE: [\nno yaml")
    assert "config.yaml: not a readable YAML file" in refused(folder, weights=path)
    beside.write_text("model: {backbone: vgg}")
    assert "config.yaml: model.backbone: expected one of resnet50" in refused(folder, weights=path)
    beside.write_text("MODEL: {BACKBONE: SwinTiny}")
    assert "config.yaml: missing key MODEL" in refused(folder, weights=path)


def test_pickled_objects_are_refused_by_name_unless_trusted(
    folder, given, tmp_path, state, config, infer, refused
):
    path = tmp_path / "trainer.pth"
    torch.save({"model": state, "config": dataclasses.asdict(config), "where": Path("/")}, path)
    assert re.search(r"trainer.pth: holds a pickled pathlib\S*Path.* --trust", refused(folder, weights=path))
    # the last of two --weights counts
    infer(folder, "vos", *given["vos"], "--weights", path, "--trust")


# Places where results cannot be written


def test_folders_that_cannot_be_written_are_refused(folder, given, refused):
    assert "cannot be written" in refused(folder, "vos", *given["vos"], out="/dev/null/out")
    assert f"{folder}: already exists" in refused(folder, "vos", *given["vos"], out=folder)
    assert f"{folder}: will not be overwritten" in refused(folder, "vos", "--overwrite", out=folder)


def test_folders_made_on_the_way_vanish_with_a_failed_run(tmp_path, refused):
    refused(tmp_path / "absent.mp4", out=tmp_path / "some" / "new" / "out")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_run_that_fails_as_it_writes_leaves_nothing_behind(
    error, folder, given, tmp_path, weights, monkeypatch
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("tarvis.infer.ResultFiles.add", fail)  # after the other files are written
    before = everything(tmp_path)
    args = [folder, "--task", "vos", "--weights", weights, "--out", tmp_path / "new" / "out", *given["vos"]]
    assert main([str(arg) for arg in args]) == (130 if error is KeyboardInterrupt else 2)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["input", "masks", "weights"])
def test_what_a_run_reads_is_never_replaced_by_it(name, folder, given, infer, refused, weights):
    out = infer(folder, "vos", *given["vos"])
    options = {"--weights": weights, "--masks": given["vos"][1]}
    source = out / "overlay.mp4" if name == "input" else folder
    if name != "input":
        options[f"--{name}"] = out / "masks" / "img_00.png"
    given = [each for option in options.items() for each in option]
    assert "is read by this run" in refused(source, "vos", *given, "--overwrite", out=out)


def test_a_parent_of_results_is_not_replaced(folder, given, infer, refused):
    infer(folder, "vos", *given["vos"], out="all/one")
    parent = folder.parent / "all"
    assert "no record" in refused(folder, "vos", *given["vos"], "--overwrite", out=parent)


def test_the_command_by_itself_says_no_more_than_that(tmp_path, weights, video):
    """OpenCV, FFmpeg and PyTorch write past sys.stderr, so this needs a process of its own."""
    video.write_bytes(video.read_bytes()[:-500])
    args = [video, "--task", "vis", "--weights", weights, "--out", tmp_path / "out"]
    command = [sys.executable, "-m", "tarvis.infer", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: \S+clip.mp4: .*video.*\n", done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == [video]


def test_without_weights_the_network_of_the_package_says_what_it_finds(folder, tmp_path, capsys):
    assert main([str(folder), "--task", "vis", "--min-size", "64", "--out", str(tmp_path / "out")]) == 0
    assert "finds the classes of generated clips alone (" in capsys.readouterr().err


def test_a_video_is_all_that_must_be_named(video, given, tmp_path, monkeypatch, capsys):
    """Default weights, a task for what is given, a folder of the video's name, a new one each time."""
    monkeypatch.chdir(tmp_path)
    small, out = ["--limit", "3", "--min-size", "64"], [f"runs/clip{end}" for end in ("", "-2", "-3", "-4")]
    options = [[], given["vos"], given["pet"], [*given["vos"], *given["pet"]]]
    for folder, asked, tasks in zip(out, options, ("vis", "vos", "pet", "vos pet"), strict=True):
        assert main([str(each) for each in (video, *small, *asked)]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert (summary["out"], " ".join(summary["tracks"])) == (folder, tasks)
        assert (tmp_path / folder).is_dir()
    before = (tmp_path / out[0] / "tracks.json").stat().st_mtime_ns
    assert main([str(video), *small, "--overwrite"]) == 0
    assert (tmp_path / out[0] / "tracks.json").stat().st_mtime_ns != before
    assert len([*(tmp_path / "runs").iterdir()]) == 4


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("clip.mp4", "clip"),
        ("a/clip.1.mp4", "clip.1"),
        ("frames/", "frames"),
        ("frames.d", "frames.d"),
        ("frames/*.jpg", "frames"),
        ("frames/**/[0-9]*.jpg", "frames"),
        (".", "here"),
        ("*.jpg", "here"),
        ("none.mp4", "none"),
        ("/", "video"),
    ],
)
def test_results_are_named_after_what_they_are_of(source, name, tmp_path, monkeypatch):
    for folder in ("a", "frames", "frames.d"):
        (tmp_path / "here" / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for file in ("clip.mp4", "a/clip.1.mp4"):
        Path(file).touch()
    assert short_name(source) == name


# What --save picks


def test_save_picks_what_is_written(folder, given, infer):
    out = infer(folder, "vis,vos", *given["vis"], *given["vos"], "--save", "coco,youtube_vis,mots,png,yolo")
    files = ["coco.json", "mots.txt", "png.zip", "tracks.json", "yolo.zip", "youtube_vis.json"]
    for task in ("vis", "vos"):
        assert visible(out / task) == files
        tracks = json.loads((out / task / "tracks.json").read_text())["tracks"]
        videos = json.loads((out / task / "youtube_vis.json").read_text())
        names = {each["id"]: each["name"] for each in videos["categories"]}
        shown = {t["id"]: t for t in tracks if t["score"] is None or t["score"] >= 0.3}
        assert {each["track_id"] for each in videos["annotations"]} == shown.keys()
        for each in videos["annotations"]:
            track = shown[each["track_id"]]
            assert each["segmentations"] == track["segmentations"]
            assert (each["bboxes"], each["areas"]) == (track["bboxes"], track["areas"])
            assert each.get("score") == track["score"]
            assert names[each["category_id"]] == (track["category"] or f"object {track['id']}")


@pytest.mark.parametrize("kind", ["overlay", "masks", "cutout"])
def test_a_kind_may_be_saved_alone(kind, folder, given, infer):
    files = {"overlay": ["contact_sheet.png", "overlay.mp4"], "masks": ["masks"], "cutout": ["cutout.zip"]}
    out = infer(folder, "vos", *given["vos"], "--save", kind)
    assert visible(out) == sorted([*files[kind], "tracks.json"])


@pytest.mark.parametrize("save", ["gif", "", "masks,,coco", "Masks"])
def test_unknown_kinds_are_refused(save, folder, refused):
    assert "; known: overlay, masks, coco, youtube_vis, png, yolo, mots, cutout" in refused(
        folder, "vis", "--save", save
    )


def test_a_kind_that_cannot_be_written_costs_a_line_alone(folder, tmp_path, weights, capsys):
    points = write_points(tmp_path / "p.json", [point(255, 0)])
    args = [folder, "--points", points, "--weights", weights, "--out", tmp_path / "out", "--save", "png,mots"]
    assert main([str(arg) for arg in args]) == 3
    assert "error: png was not written: indexed PNGs have room for" in capsys.readouterr().err
    assert visible(tmp_path / "out") == ["mots.txt", "tracks.json"]


def test_tracks_say_where_they_are_from(video, given, infer, weights):
    tree = json.loads((infer(video, "vos", *given["vos"]) / "tracks.json").read_text())
    assert (tree["input"], tree["fps"]) == (str(video), pytest.approx(12))
    assert tree["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert tree["version"]
    for track in tree["tracks"]:
        for code, box, area in zip(track["segmentations"], track["bboxes"], track["areas"], strict=True):
            assert (code is None) == (box is None) == (area is None)
            if code is not None:
                mask = rle.decode({"size": code["size"], "counts": code["counts"].encode()})
                left, top, width, height = box
                assert mask.sum() == area == mask[top : top + height, left : left + width].sum()
                sides = mask[top], mask[top + height - 1], mask[:, left], mask[:, left + width - 1]
                assert all(side.any() for side in sides)


# Several videos


@pytest.fixture
def several(video, tmp_path, weights, capsys):
    """Runs the command on videos; gives its exit status, the JSON lines on stdout, and stderr."""
    (tmp_path / "videos").mkdir()
    for name in ("b.mp4", "a.avi"):
        (tmp_path / "videos" / name).write_bytes(video.read_bytes())
    (tmp_path / "videos" / "notes.txt").write_text("not a video")

    def run(*args):
        status = main([str(arg) for arg in (*args, "--weights", weights, "--min-size", 0, "--limit", 2)])
        stdout, stderr = capsys.readouterr()
        return status, [json.loads(line) for line in stdout.splitlines()], stderr

    return run


VIS = ["--task", "vis", "--dataset", "synthetic"]


@pytest.mark.parametrize("kind", ["names", "folder", "glob"])
def test_every_video_has_its_folder(kind, several, tmp_path, video):
    folder, out = tmp_path / "videos", tmp_path / "all"
    named = [folder / "a.avi", folder / "b.mp4"]
    sources = {"names": named, "folder": [folder], "glob": [f"{folder}/*.*"]}[kind]
    status, lines, _ = several(*sources, video, "--json", "--out", out, *VIS)
    assert status == 0
    assert [line["out"] for line in lines] == [str(out / name) for name in ("a", "b", "clip")]
    assert [line["input"] for line in lines] == [str(path) for path in (*named, video)]
    for name in ("a", "b", "clip"):
        assert_whole(out / name, "vis", ["00000", "00001"])


def test_no_input_of_a_command_is_replaced_by_the_results_of_another(several, tmp_path):
    videos, out = tmp_path / "videos", tmp_path / "all"
    assert several(videos, "--out", out, *VIS)[0] == 0
    again = out / "a" / "overlay.mp4"
    before = again.read_bytes()
    status, _, stderr = several(videos, again, "--out", out, "--overwrite", *VIS)
    assert status == 3
    assert f"{again}: is read by this run" in stderr
    assert again.read_bytes() == before


def test_a_bad_video_costs_a_line_and_the_others_are_done(several, tmp_path, video):
    (tmp_path / "videos" / "aa.mp4").write_text("not a video")
    out = tmp_path / "all"
    status, [summary], stderr = several(tmp_path / "videos", tmp_path / "none.mp4", "--out", out, *VIS)
    assert (status, summary) == (3, {"videos": 4, "failed": 2})
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "aa.mp4: not a video" in errors[0]
    assert "none.mp4: no such file" in errors[1]
    assert visible(out) == ["a", "b"]
    status, lines, _ = several(tmp_path / "none.mp4", video, "--out", out, "--json", *VIS)
    assert status == 3
    assert [line.keys() & {"error", "frames"} for line in lines] == [{"error"}, {"frames"}]


def test_videos_of_one_name_stay_apart(several, tmp_path, video):
    sources = [tmp_path / name / "clip.mp4" for name in "xy"]
    for path in sources:
        path.parent.mkdir()
        path.write_bytes(video.read_bytes())
    status, lines, stderr = several(video, *sources, "--out", tmp_path / "all", "--json", "--quiet", *VIS)
    assert (status, stderr) == (0, "")
    assert visible(tmp_path / "all") == ["clip", "clip-2", "clip-3"]
    assert len(lines) == 3


def test_a_signal_ends_all(several, tmp_path, monkeypatch):
    step = VideoSegmenter.step

    def stopped(self, frames):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, frames)

    monkeypatch.setattr("tarvis.api.VideoSegmenter.step", stopped)
    status, lines, _ = several(tmp_path / "videos", "--out", tmp_path / "all", "--json", *VIS)
    assert (status, [line["complete"] for line in lines]) == (128 + signal.SIGTERM, [False])


def test_images_that_the_shell_has_listed_are_refused(folder, several):
    status, lines, stderr = several(*sorted(folder.iterdir()), *VIS)
    assert (status, lines) == (2, [])
    assert stderr.endswith("img_00.png and 5 more are images: name their folder, or quote the pattern\n")


# Classes that are kept


def test_other_classes_are_left_out(folder, given, infer):
    asked = [*given["vis"], "--min-score", 0]
    everything = infer(folder, "vis,vps", *asked, out="all")
    tree = json.loads((everything / "vps" / "tracks.json").read_text())
    thing = tree["tracks"][0]
    shown = {label for path in (everything / "vps/panoptic").iterdir() for label in np.unique(red(path))}
    stuff = next(each for each in tree["stuff"] if each["category_id"] in shown)
    out = infer(folder, "vis,vps", *asked, "--classes", f"{thing['category']}, {stuff['category']}")
    for task in ("vis", "vps"):
        before = json.loads((everything / task / "tracks.json").read_text())["tracks"]
        tracks = [track for track in before if track["category"] == thing["category"]]
        assert read_results(out / task).result.tracks
        assert json.loads((out / task / "tracks.json").read_text())["tracks"] == tracks
    for path in (out / "vps/panoptic").iterdir():
        assert set(np.unique(red(path))) <= {thing["category_id"], stuff["category_id"], 255}


def red(path):
    return cv2.imread(str(path))[..., 2]


def test_unknown_classes_are_refused(folder, given, refused):
    for names, unknown in (("zebra", "zebra"), ("disc,,disc", ""), ("", "")):
        line = refused(folder, "vis", *given["vis"], "--classes", names)
        assert re.match(rf"unknown class '{unknown}'; synthetic has: ", line), line
    assert refused(folder, "vos", *given["vos"], "--classes", "disc") == "--classes: vos finds no classes"
