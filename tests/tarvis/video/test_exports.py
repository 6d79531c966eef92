"""Files for other tools hold the masks that were followed, frame by frame."""

import json
import zipfile

import av
import cv2
import numpy as np
import pytest
from pycocotools import mask as coco

from tarvis.data.synthetic import synthetic_clip
from tarvis.files import rle
from tarvis.files.pictures import read_ids
from tarvis.structures import InputError, Track, VideoResult
from tarvis.video.exports import FORMATS, Export, write_export

FRAMES, SIZE = 5, (47, 64)


@pytest.fixture(scope="module")
def clip():
    return synthetic_clip(2, FRAMES, SIZE, 2, come_and_go=False)


@pytest.fixture(scope="module")
def export(clip):
    """Objects 3 and 7; the second is not there in the last frame."""
    tracks = []
    for id, number in ((3, 1), (7, 2)):
        masks = [rle.encode(clip.instance[frame][None] == number)[0] for frame in range(FRAMES)]
        tracks.append(Track(id, {k: mask for k, mask in enumerate(masks) if id == 3 or k < FRAMES - 1}))
    result = VideoResult("vos", SIZE, FRAMES, tuple(tracks))
    names = [f"{k:05d}" for k in range(FRAMES)]
    return Export(result, names, lambda: iter(clip.frames), {3: "dog"}, 5.0)


@pytest.fixture
def written(export, tmp_path):
    def write(kind):
        path = tmp_path / f"out{FORMATS[kind].suffix}"
        write_export(export, kind, path)
        return path

    return write


def shown(clip, frame):
    """Ids of the export in a frame."""
    ids = np.where(clip.instance[frame] == 1, 3, 0)
    return np.where((clip.instance[frame] == 2) & (frame < FRAMES - 1), 7, ids)


def test_coco_has_a_mask_for_each_object_and_frame(written, clip):
    tree = json.loads(written("coco").read_text())
    assert len(tree["images"]) == FRAMES
    assert [each["name"] for each in tree["categories"]] == ["dog", "object 7"]
    assert len(tree["annotations"]) == 2 * FRAMES - 1
    for each in tree["annotations"]:
        mask = coco.decode(each["segmentation"]) > 0
        assert np.array_equal(mask, shown(clip, each["image_id"] - 1) == each["track_id"])
        assert each["area"] == mask.sum()
        assert each["bbox"] == coco.toBbox(each["segmentation"]).tolist()


def test_youtube_vis_has_an_annotation_for_each_object(written, clip):
    tree = json.loads(written("youtube_vis").read_text())
    assert tree["videos"][0]["length"] == FRAMES
    for each in tree["annotations"]:
        for frame, code in enumerate(each["segmentations"]):
            wanted = shown(clip, frame) == each["track_id"]
            assert (code is not None) == wanted.any()
            assert code is None or np.array_equal(coco.decode(code) > 0, wanted)


def test_pngs_hold_the_ids(written, clip, tmp_path):
    with zipfile.ZipFile(written("png")) as archive:
        archive.extractall(tmp_path / "masks")
    for frame in range(FRAMES):
        assert np.array_equal(read_ids(tmp_path / "masks" / f"{frame:05d}.png"), shown(clip, frame))


def test_yolo_has_the_outline_of_every_part(written, clip):
    with zipfile.ZipFile(written("yolo")) as archive:
        for frame in range(FRAMES):
            drawn = np.zeros(SIZE, np.uint8)
            for line in archive.read(f"labels/{frame:05d}.txt").decode().splitlines():
                number, *places = line.split()
                corners = np.array(places, float).reshape(-1, 2) * SIZE[::-1]
                cv2.fillPoly(drawn, [corners.round().astype(np.int32)], [3, 7][int(number)])
            wanted = shown(clip, frame)
            assert (drawn == wanted).mean() > 0.95  # outlines have no holes
        assert 'names:\n  0: "dog"\n' in archive.read("data.yaml").decode()


def test_mots_has_a_line_for_each_mask(written, clip):
    lines = [line.split() for line in written("mots").read_text().splitlines()]
    assert len(lines) == 2 * FRAMES - 1
    for frame, id, _, height, width, code in lines:
        mask = coco.decode({"size": [int(height), int(width)], "counts": code.encode()}) > 0
        assert np.array_equal(mask, shown(clip, int(frame)) == int(id))


def test_overlays_are_h264_with_all_frames(written):
    with av.open(str(written("overlay"))) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert (stream.codec_context.name, len(frames), float(stream.average_rate)) == ("h264", FRAMES, 5.0)
    assert frames[0].shape == (48, 64, 3)


def test_overlays_keep_the_sound(export, tmp_path):
    source = tmp_path / "source.mp4"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for k in range(10):
            samples = np.sin(np.arange(1024 * k, 1024 * (k + 1)) / 5)[None].astype(np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    path = tmp_path / "overlay.mp4"
    write_export(Export(**(vars(export) | {"sound": source})), "overlay", path)
    with av.open(str(path)) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) >= 10 * 1024


def test_cutouts_are_the_objects_on_nothing(written, clip):
    with zipfile.ZipFile(written("cutout")) as archive:
        for frame in range(FRAMES):
            data = np.frombuffer(archive.read(f"{frame:05d}.png"), np.uint8)
            pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
            assert np.array_equal(pixels[..., 3] > 0, shown(clip, frame) > 0)
            assert np.array_equal(pixels[..., 2::-1], clip.frames[frame])


def test_what_is_not_known_leaves_nothing(export, tmp_path):
    with pytest.raises(InputError, match="unknown format 'gif'; known: coco"):
        write_export(export, "gif", tmp_path / "x.gif")
    many = VideoResult("vos", SIZE, FRAMES, (Track(300, export.tracks[0].masks),))
    with pytest.raises(InputError, match="objects 1 to 254"):
        write_export(Export(**(vars(export) | {"result": many})), "png", tmp_path / "x.zip")
    assert [*tmp_path.iterdir()] == []
