"""`python -m tarvis.infer`: what it writes for every task; bad input ends in one line and leaves no files."""

import dataclasses
import filecmp
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tarvis.files import rle
from tarvis.files.pictures import encode_ids, read_ids, voc_palette
from tarvis.infer import main
from tarvis.model.weights import save_weights
from tarvis.stitch.panoptic import paint
from tarvis.video.frames import VideoFrames
from tarvis.video.overlays import painting_order
from tarvis.video.results import read_results

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
        shown = painting_order(result, 0.3)  # what --min-score is by default
        if task != "vps":
            np.testing.assert_array_equal(
                read_ids(pictures / f"{name}.png"), paint(result.size, shown, frame)
            )

    assert sorted(path.name for path in out.iterdir()) == sorted(
        [pictures.name, "tracks.json", "overlay.mp4", "contact_sheet.png"]
    )
    assert count_frames(out / "overlay.mp4") == len(names)
    assert cv2.imread(str(out / "contact_sheet.png")) is not None
    return result


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
    assert sorted(path.name for path in out.iterdir()) == sorted(TASKS)
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
        assert len(files) == FRAMES + 3
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


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--start", 2], range(2, 6)),
        (["--limit", 3], range(3)),
        (["--start", 1, "--limit", 2], range(1, 3)),
        (["--start", 4, "--limit", 50], range(4, 6)),
    ],
)
def test_frames_can_be_left_out(options, kept, folder, given, infer):
    assert_whole(infer(folder, "vis", *given["vis"], *options), "vis", image_names(*kept))


def test_points_of_a_shortened_video_count_from_its_first_frame(video, tmp_path, infer):
    points = write_points(tmp_path / "p.json", [point(1, 1)])
    out = infer(video, "pet", "--points", points, "--start", 2, "--limit", 3, "--min-size", 0)
    result = assert_whole(out, "pet", ["00000", "00001", "00002"])
    assert 0 not in result.tracks[0].masks


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


def test_a_video_shorter_than_the_overlap_works(folder, given, infer):
    options = ["--clip-length", 12, "--overlap", 10, "--limit", 3]
    assert_whole(infer(folder, "vis", *given["vis"], *options), "vis", image_names(0, 1, 2))


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


# Input that cannot be used


def test_what_is_no_video_is_refused(tmp_path, refused):
    (tmp_path / "text.mp4").write_text("not a video, but long enough to be looked at " * 100)
    assert "text.mp4: not a video" in refused(tmp_path / "text.mp4")
    (tmp_path / "nothing.mp4").touch()
    assert "nothing.mp4: not a video" in refused(tmp_path / "nothing.mp4")
    assert "absent.mp4: no such file or folder" in refused(tmp_path / "absent.mp4")
    assert "File name too long" in refused(tmp_path / ("long" * 100))  # as other errors of the system


@pytest.mark.parametrize("name", ["empty.mp4", "empty.avi"])
def test_a_video_without_frames_is_refused(name, tmp_path, refused, write_video):
    video = write_video(tmp_path / name, [], "MJPG" if name.endswith("avi") else "mp4v")
    assert re.search(f"{name}: (not a video|a video without frames)", refused(video))


def test_a_truncated_video_is_refused(tmp_path, refused, write_video):
    noise = list(np.random.default_rng(0).integers(0, 256, (FRAMES, *SIZE, 3), np.uint8))  # of many bytes
    mp4 = write_video(tmp_path / "cut.mp4", noise)
    mp4.write_bytes(mp4.read_bytes()[: mp4.stat().st_size // 2])  # its index stood at the end
    assert re.search("cut.mp4: (not a video that can be read|damaged video)", refused(mp4))
    avi = write_video(tmp_path / "cut.avi", noise, "MJPG")
    avi.write_bytes(avi.read_bytes()[: avi.stat().st_size * 2 // 3])  # some frames can be read
    found = refused(avi, "vis", "--dataset", "synthetic", "--clip-length", 2, "--overlap", 0)
    assert re.search("cut.avi: damaged video, the file is cut off: read [2-5] frames of 6", found), found


def test_a_folder_or_pattern_without_images_is_refused(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    assert "empty: no images in this folder; looked for .jpg" in refused(tmp_path / "empty")
    assert "*.jpg: no image matches this pattern" in refused(tmp_path / "*.jpg")


def test_damaged_images_and_frames_of_other_sizes_are_refused(folder, refused):
    last = folder / "img_05.png"
    cv2.imwrite(str(last), np.zeros((50, 96, 3), np.uint8))
    assert "img_05.png: frames must have one size, got 96x50 after 96x64 in img_00.png" in refused(
        folder, "vis", "--dataset", "synthetic", *SHORT
    )
    last.write_bytes(b"\x89PNG, but nothing else")
    assert "img_05.png: not an image that can be read" in refused(folder, "vis", "--dataset", "synthetic")


def test_frames_that_do_not_exist_are_refused(folder, video, refused):
    assert "cannot start at frame 6, there are only 6" in refused(folder, "vis", "--start", 6)
    assert "cannot start at frame 9, there are only 6" in refused(video, "vis", "--start", 9)
    assert "limit >= 1, got start 0 and limit 0" in refused(folder, "vis", "--limit", 0)
    assert "start >= 0 and limit >= 1, got start -1" in refused(folder, "vis", "--start", -1)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros(SIZE, np.uint8), "m.png: empty mask"),
        (np.full(SIZE, 255, np.uint8), "m.png: empty mask"),
        (np.ones((96, 64), np.uint8), "m.png: the mask is 64x96, the video 96x64"),
        (np.full(SIZE, 300, np.uint16), "m.png: object ids must be 1 .. 254, got 300"),
    ],
    ids=["empty", "void", "other size", "id over 255"],
)
def test_masks_that_do_not_fit_are_refused(ids, message, folder, tmp_path, refused):
    assert message in refused(folder, "vos", "--masks", write_mask(tmp_path / "m.png", ids))


def test_files_that_are_no_masks_are_refused(folder, clip, tmp_path, mask, refused):
    colours = tmp_path / "colours.png"
    cv2.imwrite(str(colours), clip.frames[0])
    assert "colours.png: an RGB picture" in refused(folder, "vos", "--masks", colours)
    assert "absent.png: cannot be read" in refused(folder, "vos", "--masks", tmp_path / "absent.png")
    mask.write_bytes(mask.read_bytes()[:-20])
    assert "mask.png: truncated or damaged PNG" in refused(folder, "vos", "--masks", mask)
    (tmp_path / "none").mkdir()
    assert "none: no masks in this folder" in refused(folder, "vos", "--masks", tmp_path / "none")


def test_masks_at_frames_that_do_not_exist_are_refused(folder, video, mask, refused):
    past = refused(folder, "vos", "--masks", f"1@6={mask}")
    assert f"no frame 6 among those of {folder}: img_00 .. img_05" in past
    assert f"no frame 6 among those of {video}" in refused(video, "vos", "--masks", f"1@6={mask}")
    assert "id must be an integer 1 .. 255, got 256" in refused(folder, "vos", "--masks", f"256@0={mask}")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([point(1, 0, 96, 0)], r"point 0: \(96, 0\) is outside the frame; x must be 0 .. 95, y 0 .. 63"),
        ([point(1, 0), point(2, 0, 3, -1)], r"point 1: \(3, -1\) is outside the frame"),
        ([point(1, 6)], "point 0: frame 6 is past the end, .* has 6 frames"),
        ([point(1, "img_09")], "point 0: no frame img_09 among those of"),
        ([point(256, 0)], "point 0: id must be an integer 1 .. 255, got 256"),
        ([point(1, 0), point(1, 0, 4, 4)], "object 1 is given twice at frame 0"),
        ([{"id": 1, "x": 2, "y": 3}], 'point 0: expected {"id", "frame", "x", "y"}'),
        ([], "expected a list of points"),
        ([point(1, 0, float("nan"))], "point 0: x must be a number, got NaN"),
    ],
    ids=["right", "above", "frame", "frame name", "id", "twice", "no frame", "none", "nan"],
)
def test_points_that_do_not_fit_are_refused(points, message, folder, tmp_path, refused):
    found = refused(folder, "pet", "--points", write_points(tmp_path / "p.json", points))
    assert re.search(message, found), found


def test_files_that_are_no_points_are_refused(folder, tmp_path, refused):
    path = tmp_path / "p.json"
    path.write_text("[{\n  'id': 1}]")
    assert "p.json: is not a JSON file" in refused(folder, "pet", "--points", path)
    assert "absent.json: cannot be read" in refused(folder, "pet", "--points", tmp_path / "absent.json")
    assert "cannot be read" in refused(folder, "pet", "--points", folder)


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


def test_objects_to_follow_must_be_given(folder, given, refused):
    assert "vos follows objects given by masks: no mask was given" in refused(folder, "vos")
    assert "pet follows objects given by points: no point was given" in refused(folder, "pet")
    assert "no point was given" in refused(folder, "vos,pet", *given["vos"])


@pytest.mark.parametrize("task", ["sam", "", "vis,sam", "vis,,vos", "VIS", "vis,vis"])
def test_unknown_tasks_are_refused(task, folder, refused):
    assert "vis, vps, vos, pet" in refused(folder, task, "--dataset", "synthetic")


def test_class_sets_that_do_not_fit_are_refused(folder, given, refused):
    have = "they have: synthetic, youtube_vis_2021"
    assert f"no classes of 'ovis'; {have}" in refused(folder, "vis", "--dataset", "ovis")
    assert f"no classes of 'davis'; {have}" in refused(folder, "vis", "--dataset", "davis")
    assert f"no classes of 'vipseg'; {have}" in refused(folder, "vps")  # its default
    assert "no classes of 'imagenet'" in refused(folder, "vis", "--dataset", "imagenet")
    assert "'imagenet'; known: " in refused(folder, "vos", *given["vos"], "--dataset", "imagenet")
    assert "vps needs a class set with stuff, and youtube_vis_2021 has things only" in refused(
        folder, "vps", "--dataset", "youtube_vis_2021"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clip-length", 4, "--overlap", 4], "overlap must be 0 .. clip length - 1 = 3, got 4"),
        (["--clip-length", 2], "overlap must be 0 .. clip length - 1 = 1, got 3"),  # 3 is the data set's
        (["--overlap", -1], "inference.overlap: expected a number from 0, got -1"),
        (["--clip-length", 0], "inference.clip_length: expected a number from 1, got 0"),
        (["--min-size", -3], "inference.min_size: expected a number from 1, got -3"),
        (["--device", "abacus"], "device 'abacus' cannot be used on this machine"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used on this machine"),
        (["--device", "meta"], "device 'meta' cannot be used on this machine"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_settings_that_make_no_sense_are_refused(options, message, folder, refused):
    assert message in refused(folder, "vis", "--dataset", "synthetic", *options)


# Weights that cannot be used


def test_weights_of_another_network_are_refused(folder, tmp_path, state, config, refused):
    def saved(name, state, **changes):
        path = tmp_path / f"{name}.safetensors"
        save_weights(path, state, dataclasses.replace(config, **changes))
        return path

    backbone = refused(folder, weights=saved("other_backbone", state, backbone="resnet50"))
    assert "other_backbone.safetensors: holds a convnext_zepto network" in backbone
    assert "says resnet50" in backbone
    width = refused(folder, weights=saved("other_width", state, hidden_dim=64))
    assert re.search(r"other_width.safetensors: .* is \[.*\], expected \[", width)
    classes = refused(folder, weights=saved("other_classes", state, class_sets={"synthetic": 8}))
    assert "other_classes.safetensors: queries.semantic has 49 rows" in classes
    less = {key: value for key, value in state.items() if key != "queries.vos"}
    assert "missing queries.vos [1, 128]" in refused(folder, weights=saved("less", less))
    more = state | {"surprise": torch.zeros(3)}
    assert "unexpected surprise [3]" in refused(folder, weights=saved("more", more))


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


def test_files_that_are_no_weights_are_refused(folder, tmp_path, weights, refused):
    assert "absent.pth: no such file" in refused(folder, weights=tmp_path / "absent.pth")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:-100])
    assert "cut.safetensors: truncated, or not a file of weights" in refused(folder, weights=cut)
    text = tmp_path / "text.pth"
    text.write_text("no weights")
    assert "text.pth: truncated, or not a file of weights" in refused(folder, weights=text)
    picture = tmp_path / "frames" / "img_00.png"
    assert "img_00.png: truncated, or not a file of weights" in refused(folder, weights=picture)


def test_pickled_objects_are_refused_by_name_unless_trusted(
    folder, given, tmp_path, state, config, infer, refused
):
    path = tmp_path / "trainer.pth"
    torch.save({"model": state, "config": dataclasses.asdict(config), "where": Path("/")}, path)
    assert re.search(r"trainer.pth: holds a pickled pathlib\S*Path.* --trust", refused(folder, weights=path))
    # the last of two --weights counts
    infer(folder, "vos", *given["vos"], "--weights", path, "--trust")


# Places where results cannot be written


def test_folders_that_cannot_be_written_are_refused(folder, given, tmp_path, refused):
    file = tmp_path / "file"
    file.write_text("mine")
    assert f"{file}/out: cannot be written" in refused(folder, "vos", *given["vos"], out=file / "out")
    assert f"{file}/a/out: cannot be written" in refused(folder, "vos", *given["vos"], out=file / "a" / "out")
    assert f"{file}: already exists" in refused(folder, "vos", *given["vos"], out=file)
    assert f"{file}: will not be overwritten" in refused(folder, "vos", "--overwrite", out=file)
    assert f"{folder}: already exists" in refused(folder, "vos", *given["vos"], out=folder)
    assert f"{folder}: will not be overwritten" in refused(folder, "vos", "--overwrite", out=folder)
    assert "cannot be written" in refused(folder, "vos", *given["vos"], out="/dev/null/out")


def test_folders_made_on_the_way_vanish_with_a_failed_run(tmp_path, refused):
    refused(tmp_path / "absent.mp4", out=tmp_path / "some" / "new" / "out")


def test_an_interrupted_run_leaves_nothing_behind(folder, given, tmp_path, weights, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tarvis.infer.ResultFiles.add", interrupt)  # after the other files are written
    given = given["vos"]
    before = everything(tmp_path)
    args = [folder, "--task", "vos", "--weights", weights, "--out", tmp_path / "new" / "out", *given]
    with pytest.raises(KeyboardInterrupt):
        main([str(arg) for arg in args])
    assert everything(tmp_path) == before


def test_the_command_by_itself_says_no_more_than_that(tmp_path, weights, video):
    """OpenCV, FFmpeg and PyTorch write past sys.stderr, so this needs a process of its own."""
    video.write_bytes(video.read_bytes()[:-500])
    args = [video, "--task", "vis", "--weights", weights, "--out", tmp_path / "out"]
    command = [sys.executable, "-m", "tarvis.infer", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: \S+clip.mp4: .*video.*\n", done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == [video]
