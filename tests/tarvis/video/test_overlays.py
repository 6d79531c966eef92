import os

import av
import cv2
import numpy as np
import pytest

from tarvis.data.synthetic import synthetic_clip
from tarvis.datasets.classes import class_table
from tarvis.files import rle
from tarvis.stitch.panoptic import encode_labels
from tarvis.structures import Reference, Track, VideoResult
from tarvis.video.frames import open_frames, read_image
from tarvis.video.overlays import write_overlays
from tarvis.video.visualize import track_color

CLASSES = class_table("synthetic")
CLIP = synthetic_clip(0, num_frames=15, size=(47, 65))


def make_result(task):
    tracks = tuple(
        Track(i, {t: rle.encode((m == i)[None])[0] for t, m in enumerate(CLIP.instance)}, label, 0.9)
        for i, label in CLIP.classes.items()
    )
    stuff = {t: encode_labels(np.where(s < 3, s, 0).astype(np.uint8)) for t, s in enumerate(CLIP.semantic)}
    return VideoResult(task, (47, 65), 15, tracks, stuff if task == "vps" else {})


@pytest.mark.parametrize("task", ["vis", "vps", "vos"])
def test_a_video_and_a_sheet_are_written(task, tmp_path):
    write_overlays(make_result(task), iter(CLIP.frames), tmp_path, fps=12, classes=CLASSES)
    video = open_frames(tmp_path / "overlay.mp4")
    assert len(list(video)) == 15
    assert video.fps == pytest.approx(12)
    assert video.size == (6 * 47, 6 * 65)  # enlarged to at least 240
    sheet = read_image(tmp_path / "contact_sheet.png")
    assert 4 * 300 < sheet.shape[1] <= 1600
    first = next(iter(video)).astype(int)
    scaled = cv2.resize(CLIP.frames[0], video.size[::-1]).astype(int)
    object_ = cv2.resize(CLIP.instance[0], video.size[::-1], interpolation=cv2.INTER_NEAREST) == 1
    assert abs(first - scaled)[object_].mean() > 20
    closer = abs(first - track_color(1))[object_].mean()
    assert closer < abs(scaled - track_color(1))[object_].mean()


def test_points_are_marked_on_their_frame_only(tmp_path):
    nothing = VideoResult("pet", (47, 65), 15, ())
    point = Reference(1, 2, point=(30.0, 20.0))
    write_overlays(nothing, CLIP.frames, tmp_path, references=[point])
    frames = list(open_frames(tmp_path / "overlay.mp4"))
    x, y = 6 * 30 + 3, 6 * 20 + 3
    assert abs(frames[2][y, x].astype(int) - track_color(1)).max() < 60
    assert abs(frames[3][y, x].astype(int) - CLIP.frames[3][20, 30]).max() < 60


@pytest.mark.parametrize("starts", [0.0, 0.5])
def test_browsers_play_the_video_with_the_sound_of_the_source(starts, tmp_path):
    """From where the first picture is shown in the source, as long as there are pictures."""
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for k in range(32):  # two seconds
            loud = np.full((1, 1024), 0.5 if k >= 16 else 0, np.float32) * np.sin(np.arange(1024) / 3)
            frame = av.AudioFrame.from_ndarray(loud.astype(np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    sound = tmp_path / "sound.mp4"
    write_overlays(make_result("vos"), CLIP.frames, tmp_path, fps=12, sound=sound, starts=starts)
    with av.open(str(tmp_path / "overlay.mp4")) as container:
        video = container.streams.video[0]
        assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
        heard = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    assert len(heard) / 16000 == pytest.approx(15 / 12, abs=0.13)
    onset = np.flatnonzero(abs(heard) > 0.2)[0] / 16000
    assert onset == pytest.approx(1.024 - starts, abs=0.13)


def test_odd_sizes_and_single_frames_work(tmp_path):
    frame = np.full((251, 333, 3), 90, np.uint8)
    write_overlays(VideoResult("vos", (251, 333), 1, ()), [frame], tmp_path)
    assert open_frames(tmp_path / "overlay.mp4").size == (252, 334)


def test_too_few_or_too_many_frames_are_an_error(tmp_path):
    for frames in (CLIP.frames[:9], [*CLIP.frames, CLIP.frames[0]]):
        with pytest.raises(ValueError, match="zip"):
            write_overlays(make_result("vis"), frames, tmp_path)


def test_a_panoptic_result_needs_its_classes(tmp_path):
    with pytest.raises(ValueError, match="class table"):
        write_overlays(make_result("vps"), CLIP.frames, tmp_path)


@pytest.mark.parametrize("name", [b"a\xff", "\u00e4".encode(), b"a:b", b"%05d"])
def test_the_folder_may_have_any_name(tmp_path, name):
    folder = tmp_path / os.fsdecode(name)
    folder.mkdir()
    write_overlays(VideoResult("vos", (47, 65), 2, ()), CLIP.frames[:2], folder)
    assert len(list(open_frames(folder / "overlay.mp4"))) == 2
    assert {path.name for path in folder.iterdir()} == {"overlay.mp4", "contact_sheet.png"}
