import os
import threading

import av
import cv2
import numpy as np
import pytest

from tarvis.video.frames import InputError, index_of, number_of, open_frames, prefetch

H, W = 48, 64


def picture(i):
    """A flat grey picture whose level says which it is, robust to lossy coding."""
    return np.full((H, W, 3), 20 + 10 * i, np.uint8)


def index(frame):
    return round((float(frame.mean()) - 20) / 10)


def write_video(path, count, fourcc="mp4v", fps=12.5):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*fourcc), fps, (W, H))
    assert writer.isOpened()
    for i in range(count):
        writer.write(picture(i % 20))
    writer.release()
    return path


@pytest.fixture
def folder(tmp_path):
    """Frames img_1 .. img_12, whose names sort differently as text."""
    path = tmp_path / "clip"
    path.mkdir()
    for i in range(12):
        cv2.imwrite(str(path / f"img_{i + 1}.png"), picture(i))
    (path / "notes.txt").write_text("not a frame")
    (path / "._img_1.png").write_text("what a Mac leaves behind")
    return path


def test_a_folder_gives_its_images_in_natural_order(folder):
    source = open_frames(folder)
    frames = list(source)
    assert [index(frame) for frame in frames] == list(range(12))
    assert frames[0].shape == (*source.size, 3) == (H, W, 3)
    assert frames[0].dtype == np.uint8
    assert (source.num_frames, source.fps) == (12, None)
    assert [source.name(0), source.name(9)] == ["img_1", "img_10"]


def test_colours_are_rgb(tmp_path):
    red = np.zeros((H, W, 3), np.uint8)
    red[..., 2] = 255  # OpenCV's order is BGR
    cv2.imwrite(str(tmp_path / "red.png"), red)
    assert next(iter(open_frames(tmp_path)))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "bmp", "webp"])
def test_every_kind_of_image_is_read(suffix, tmp_path):
    (tmp_path / f"a.{suffix}").write_bytes(cv2.imencode(f".{suffix.lower()}", picture(3))[1].tobytes())
    assert [index(frame) for frame in open_frames(tmp_path)] == [3]
    assert [index(frame) for frame in open_frames(tmp_path / f"a.{suffix}")] == [3]


def test_a_pattern_gives_what_it_matches(folder):
    source = open_frames(f"{folder}/img_?.png")
    assert [source.name(i) for i in range(source.num_frames)] == [f"img_{i}" for i in range(1, 10)]


def test_start_and_limit_cut_a_window(folder, tmp_path):
    assert [index(frame) for frame in open_frames(folder, start=3, limit=2)] == [3, 4]
    video = write_video(tmp_path / "a.mp4", 10)
    source = open_frames(video, start=3, limit=2)
    assert [index(frame) for frame in source] == [3, 4]
    assert source.num_frames == 2
    assert open_frames(video, start=8).num_frames == 2
    for path in (folder, video):
        with pytest.raises(InputError, match="cannot start at frame 12"):
            open_frames(path, start=12)
        with pytest.raises(InputError, match="start >= 0 and limit >= 1, got start 0 and limit 0"):
            open_frames(path, limit=0)


@pytest.mark.parametrize(
    ("part", "numbers"),
    [
        ({"start": 3, "end": 7}, [3, 4, 5, 6, 7]),
        ({"end": 0}, [0]),
        ({"start": 9, "end": 9}, [9]),
        ({"stride": 4}, [0, 4, 8]),
        ({"start": 1, "end": 8, "stride": 3}, [1, 4, 7]),
        ({"start": 2, "end": 100, "stride": 3}, [2, 5, 8]),
        ({"start": 1, "stride": 2, "limit": 2}, [1, 3]),
        ({"start": 1, "end": 3, "stride": 2, "limit": 5}, [1, 3]),
    ],
)
@pytest.mark.parametrize("kind", ["images", "mp4", "avi"])
def test_a_part_keeps_the_numbers_of_the_whole(kind, part, numbers, tmp_path):
    if kind == "images":
        for number in range(10):
            cv2.imwrite(str(tmp_path / f"f_{number:02d}.png"), picture(number))
        source = open_frames(tmp_path, **part)
        names = [f"f_{number:02d}" for number in numbers]
    else:
        fourcc = {"mp4": "mp4v", "avi": "MJPG"}[kind]
        source = open_frames(write_video(tmp_path / f"a.{kind}", 10, fourcc), **part)
        names = [f"{number:05d}" for number in numbers]
        assert source.fps == pytest.approx(12.5 / part.get("stride", 1))
    frames = range(len(numbers))
    assert source.num_frames == len(numbers)
    for _ in range(2):
        assert [index(frame) for frame in source] == numbers
        assert source.num_frames == len(numbers)
    for start in frames:
        assert [index(frame) for frame in source.read(start, start + 2)] == numbers[start : start + 2]
    assert [source.name(frame) for frame in frames] == names
    for number in range(12):
        place = numbers.index(number) if number in numbers else None
        assert source.find(str(number)) == index_of(source, number) == place
    assert [number_of(source, frame) for frame in frames] == numbers


@pytest.mark.parametrize("count", [1, 15])
def test_a_video_can_be_read_twice(count, tmp_path):
    source = open_frames(write_video(tmp_path / "a.mp4", count))
    assert source.size == (H, W)
    assert source.fps == pytest.approx(12.5)
    assert source.num_frames == count
    for _ in range(2):
        assert [index(frame) for frame in source] == list(range(count))
    assert source.name(7) == "00007"


def test_names_are_found_by_number(folder, tmp_path):
    images = open_frames(folder)
    assert [images.find(name) for name in ("img_3", "3", "003", "12")] == [2, 2, 2, 11]
    assert [images.find(name) for name in ("0", "13", "img_13", "")] == [None] * 4
    video = open_frames(write_video(tmp_path / "a.mp4", 5))
    assert [video.find(name) for name in ("00004", "4", "5", "x")] == [4, 4, None, None]
    for i, name in enumerate("abc"):
        (folder / f"img_{i + 1}.png").rename(tmp_path / f"{name}.png")
    letters = open_frames(f"{tmp_path}/*.png")
    assert [letters.find(name) for name in ("b", "1", "3")] == [1, 1, None]


def test_a_number_that_two_names_share_means_neither(folder):
    (folder / "img_3.png").rename(folder / "other_2.png")
    assert open_frames(folder).find("2") is None


def test_bad_folders_say_what_is_wrong(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=r"empty: no images in this folder; looked for \.jpg"):
        open_frames(empty)
    with pytest.raises(InputError, match=r"gone: no such file or folder"):
        open_frames(tmp_path / "gone")
    with pytest.raises(InputError, match=r"no image matches this pattern"):
        open_frames(f"{folder}/*.jpg")
    cv2.imwrite(str(folder / "img_3.png"), np.zeros((10, 20, 3), np.uint8))
    with pytest.raises(InputError, match=r"img_3\.png: .* one size, got 20x10 after 64x48 in img_1\.png"):
        list(open_frames(folder))
    cv2.imwrite(str(folder / "img_1.jpg"), picture(0))
    with pytest.raises(InputError, match=r"img_1\.jpg and .*img_1\.png would be the same frame"):
        open_frames(folder)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
@pytest.mark.parametrize("cut", [0, 20, -40])
def test_truncated_images_are_named(suffix, cut, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    (tmp_path / f"a.{suffix}").write_bytes(cv2.imencode(f".{suffix}", noise)[1].tobytes()[:cut])
    with pytest.raises(InputError, match=rf"a\.{suffix}: not an image that can be read"):
        open_frames(tmp_path)


def test_what_is_no_video_is_refused(tmp_path):
    for name, content in {"a.mp4": b"", "b.mp4": b"junk" * 500, "c.txt": b"hello\n" * 99}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: not a video that can be read"):
            open_frames(tmp_path / name)
    whole = write_video(tmp_path / "d.mp4", 20).read_bytes()
    (tmp_path / "d.mp4").write_bytes(whole[: len(whole) // 2])  # the index stood at the end
    with pytest.raises(InputError, match=r"d\.mp4: not a video"):
        open_frames(tmp_path / "d.mp4")


@pytest.mark.parametrize(("suffix", "fourcc"), [("avi", "MJPG"), ("mkv", "mp4v")])
def test_a_video_cut_off_says_how_much_was_read(suffix, fourcc, tmp_path):
    path = write_video(tmp_path / f"a.{suffix}", 40, fourcc)
    assert len(list(open_frames(path))) == 40
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    source = open_frames(path)
    with pytest.raises(InputError, match=r"damaged video, the file is cut off: read \d+ frames of 40"):
        list(source)
    assert len(list(open_frames(path, limit=3))) == 3


def test_an_mp4_with_its_index_in_front_shows_that_it_is_cut_off(tmp_path):
    path = write_video(tmp_path / "a.mp4", 60)
    path.write_bytes(index_first(path.read_bytes())[:-2000])
    with pytest.raises(InputError, match=r"cut off: read \d+ frames of 60"):
        list(open_frames(path))


def test_a_video_without_frames_is_refused(tmp_path):
    for name, fourcc in (("b.mp4", "mp4v"), ("b.avi", "MJPG")):
        with pytest.raises(InputError, match=rf"{name}: (not a video|a video without frames)"):
            open_frames(write_video(tmp_path / name, 0, fourcc))
    path = write_video(tmp_path / "a.avi", 30, "MJPG")
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"movi") + 4])
    with pytest.raises(InputError, match=r"a\.avi: "):
        open_frames(path)


def index_first(data):
    """An MP4 file with the index moved before the frames, as web servers want it."""
    boxes, at = {}, 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        boxes[data[at + 4 : at + 8]] = data[at : at + size]
        at += size
    moov, before = bytearray(boxes[b"moov"]), data.index(b"mdat") - 4
    at = moov.index(b"stco") + 8
    shift = len(moov) + len(boxes[b"ftyp"]) - before
    for i in range(int.from_bytes(moov[at : at + 4], "big")):
        where = slice(at + 4 + 4 * i, at + 8 + 4 * i)
        moov[where] = (int.from_bytes(moov[where], "big") + shift).to_bytes(4, "big")
    return boxes[b"ftyp"] + bytes(moov) + boxes[b"mdat"]


def prefetchers():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetch_keeps_the_order():
    assert list(prefetch(range(100), depth=3)) == list(range(100))
    assert list(prefetch([])) == []
    assert prefetchers() == []


def test_prefetch_runs_ahead_but_only_so_far():
    made, is_full = [], threading.Event()

    def items():
        for i in range(100):
            made.append(i)
            if len(made) == 6:  # one is taken, four wait, and one is on its way
                is_full.set()
            yield i

    ahead = prefetch(items(), depth=4)
    assert next(ahead) == 0
    assert is_full.wait(120)
    assert len(made) == 6
    ahead.close()


def test_prefetch_raises_the_error_after_the_items_before_it():
    def items():
        yield 1
        raise InputError("broken")

    ahead = prefetch(items())
    assert next(ahead) == 1
    with pytest.raises(InputError, match="broken"):
        next(ahead)
    assert prefetchers() == []


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_prefetch_leaves_no_thread_when_the_consumer_stops(taken):
    ahead = prefetch(iter(range(10**9)), depth=2)
    for _ in range(taken):
        next(ahead)
    ahead.close()
    assert prefetchers() == []


def test_a_glob_may_lie_below_a_folder_whose_name_looks_like_one(tmp_path):
    folder = tmp_path / "[x] a*b?" / "frames"
    folder.mkdir(parents=True)
    for i in range(3):
        cv2.imwrite(str(folder / f"img_{i}.png"), picture(i))
    for pattern in ("frames/*.png", "*/img_[01].png", "**/*.png"):
        source = open_frames(folder.parent / pattern)
        assert source.num_frames == (2 if "01" in pattern else 3)


@pytest.mark.parametrize("suffix", ["tif", "TIFF"])
def test_tiffs_are_images(tmp_path, suffix):
    folder = tmp_path / "frames"
    folder.mkdir()
    cv2.imwrite(str(folder / f"a.{suffix}"), picture(1)[..., ::-1])
    (frame,) = open_frames(folder)
    assert (frame == picture(1)).all()


@pytest.mark.parametrize(
    "name", [b"a\xff.mp4", "ä.mp4".encode(), b"a:b.mp4", b"http:x.mp4", b"%05d.mp4", b"\x1b[31m.mp4"]
)
def test_videos_of_any_name_are_read(tmp_path, name, monkeypatch):
    path = write_video(tmp_path / "plain.mp4", 3).rename(tmp_path / os.fsdecode(name))
    assert len(list(open_frames(path))) == 3
    monkeypatch.chdir(tmp_path)
    assert len(list(open_frames(os.fsdecode(name)))) == 3
    path.write_bytes(b"no video")
    with pytest.raises(InputError, match="not a video that can be read") as error:
        open_frames(os.fsdecode(name))
    assert str(error.value).isprintable()


def test_a_frame_of_many_digits_is_no_frame(folder):
    assert open_frames(folder).find("9" * 5000) is None


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        *(("mp4", "h264"), ("mp4", "mpeg4"), ("mkv", "vp9"), ("avi", "mjpeg")),
        *(("ts", "h264"), ("flv", "h264"), ("mpg", "mpeg2video")),
    ],
)
def test_a_range_of_frames_is_that_of_all_frames(tmp_path, suffix, codec):
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = W, H
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = 7
        for i in range(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i % 20), format="rgb24")))
        container.mux(stream.encode())
    every = list(open_frames(path))
    assert open_frames(path).count() == len(every) == 40
    for source, shift in ((open_frames(path), 0), (open_frames(path, start=5, limit=20), 5)):
        for start, stop in ((0, 3), (6, 9), (7, 8), (13, 20), (0, 0)):
            got = list(source.read(start, stop))
            assert len(got) == stop - start
            assert all(np.array_equal(a, b) for a, b in zip(got, every[start + shift :], strict=False))
    assert len(list(open_frames(path).read(38, 50))) == 2
    assert len(list(open_frames(path, limit=20).read(18, 50))) == 2


def test_a_range_of_images_is_that_of_all_images(folder):
    source = open_frames(folder)
    assert [index(frame) for frame in source.read(3, 6)] == [3, 4, 5]
