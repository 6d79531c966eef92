import json

import cv2
import numpy as np
import pytest
from PIL import Image

from tarvis.files.pictures import encode_ids
from tarvis.video.frames import InputError, open_frames
from tarvis.video.references import read_masks, read_points

H, W, F = 24, 32, 5
PALETTE = np.arange(768, dtype=np.int64).reshape(256, 3).astype(np.uint8)


@pytest.fixture
def source(tmp_path):
    """Five frames, called 00010 .. 00014."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(F):
        cv2.imwrite(str(folder / f"{10 + i:05d}.png"), np.full((H, W, 3), 40 * i, np.uint8))
    return open_frames(folder)


@pytest.fixture
def write(tmp_path):
    """Writes a mask of boxes {id: (y0, y1, x0, x1)} under a name and gives its path."""

    def write_mask(name, boxes, dtype=np.uint8, size=(H, W)):
        ids = np.zeros(size, dtype)
        for id_, (y0, y1, x0, x1) in boxes.items():
            ids[y0:y1, x0:x1] = id_
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_ids(ids, PALETTE))
        return path

    return write_mask


def keys(references):
    return [(reference.frame, reference.id) for reference in references]


def test_each_palette_index_is_an_object_of_frame_0(source, write):
    first, second = read_masks([write("any_name.png", {1: (0, 4, 0, 4), 7: (5, 6, 8, 9)})], source)
    assert (first.id, first.frame, second.id, second.frame) == (1, 0, 7, 0)
    assert first.mask.shape == (H, W)
    assert first.mask.dtype.is_floating_point is False
    assert first.mask.sum() == 16
    assert second.mask.nonzero().tolist() == [[5, 8]]
    assert first.point is None


def test_void_is_no_object(source, write):
    assert keys(read_masks([write("m.png", {3: (0, 4, 0, 4), 255: (10, 20, 0, 4)})], source)) == [(0, 3)]


def test_a_file_belongs_to_the_frame_it_is_named_after(source, write):
    items = [write("00012.png", {2: (0, 4, 0, 4)}), write("10.png", {1: (0, 4, 9, 12)})]
    assert keys(read_masks(items, source)) == [(0, 1), (2, 2)]


def test_an_object_counts_from_the_first_mask_of_a_folder_that_shows_it(source, write):
    write("masks/00010.png", {1: (0, 4, 0, 4)})
    write("masks/00011.png", {})
    folder = write("masks/00013.png", {1: (2, 6, 0, 4), 2: (0, 4, 9, 12)}).parent
    references = read_masks([folder], source)
    assert keys(references) == [(0, 1), (3, 2)]
    assert references[0].mask[:4, :4].all()


def test_one_binary_mask_for_one_object(source, write):
    path = write("white.png", {255: (0, 4, 0, 4)})
    references = read_masks(
        [f"5@00012={path}", f"4@10={path}", write("00010.png", {1: (8, 9, 8, 9)})], source
    )
    assert keys(references) == [(0, 1), (0, 4), (2, 5)]
    assert references[1].mask.sum() == 16


def test_ids_of_16_bit_files_up_to_254_are_fine(source, write):
    assert keys(read_masks([write("m.png", {254: (0, 4, 0, 4)}, np.uint16)], source)) == [(0, 254)]


def test_a_single_mask_called_as_no_frame_is_belongs_to_frame_0_but_not_one_of_a_missing_frame(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(3):
        cv2.imwrite(str(folder / f"frame_{i:04d}.png"), np.zeros((H, W, 3), np.uint8))
    source = open_frames(folder)
    mask = np.zeros((H, W), np.uint8)
    mask[:4, :4] = 1
    for name, frame in (("dog.png", 0), ("mask-7.png", 0), ("frame_0002.png", 2), ("1.png", 1)):
        cv2.imwrite(str(tmp_path / name), mask)
        assert [r.frame for r in read_masks([tmp_path / name], source)] == [frame]
    cv2.imwrite(str(tmp_path / "frame_0012.png"), mask)
    with pytest.raises(InputError, match="no frame frame_0012 among"):
        read_masks([tmp_path / "frame_0012.png"], source)


def test_a_folder_may_annotate_more_frames_than_are_read(source, write):
    folder = write("masks/00010.png", {1: (0, 4, 0, 4)}).parent
    write("masks/00077.png", {2: (0, 4, 0, 4)})
    assert [(r.id, r.frame) for r in read_masks([folder], source)] == [(1, 0)]
    (folder / "00010.png").unlink()
    with pytest.raises(InputError, match=r"00077\.png: no frame 00077 among"):
        read_masks([folder], source)


def test_bad_masks_say_what_is_wrong(source, write, tmp_path):
    box = (0, 4, 0, 4)
    rgb = tmp_path / "rgb.png"
    cv2.imwrite(str(rgb), np.zeros((H, W, 3), np.uint8))
    cut = tmp_path / "cut.png"
    cut.write_bytes(write("m.png", {1: box}).read_bytes()[:-20])
    (tmp_path / "nothing").mkdir()
    cases = {
        r"big\.png: the mask is 40x30, the video 32x24": [write("big.png", {1: box}, size=(30, 40))],
        r"void\.png: empty mask, .*given as 1@FRAME=": [write("void.png", {255: box})],
        r"blank: empty masks": [write("blank/00010.png", {}).parent],
        r"zero\.png: empty mask, no pixel shows object 3": [f"3@00010={write('zero.png', {})}"],
        r"ids must be 1 \.\. 254, got 300": [write("wide.png", {300: box}, np.uint16)],
        r"rgb\.png: an RGB picture; expected": [rgb],
        r"cut\.png: truncated": [cut],
        r"gone\.png: cannot be read": [tmp_path / "gone.png"],
        r"nothing: no masks in this folder": [tmp_path / "nothing"],
        r"no frame 00099 among those of .*00010 \.\. 00014": [write("00099.png", {1: box})],
        r"no frame other among": [write("00010.png", {1: box}), write("other.png", {2: box})],
        r"object 2 is given twice at frame 1": [f"2@11={tmp_path / 'm.png'}"] * 2,
        r"id must be an integer 1 \.\. 255, got 256": [f"256@11={tmp_path / 'm.png'}"],
    }
    for message, items in cases.items():
        with pytest.raises(InputError, match=message):
            read_masks(items, source)


@pytest.mark.parametrize("wrap", [list, lambda points: {"points": points}])
def test_points_are_read(wrap, source, tmp_path):
    points = [
        {"id": 2, "frame": 3, "x": 31, "y": 0.5},
        {"id": 1, "frame": "00010", "x": 0, "y": 23, "note": "a"},
    ]
    path = tmp_path / "points.json"
    path.write_text(json.dumps(wrap(points)))
    first, second = read_points(path, source)
    assert (first.id, first.frame, first.point, first.mask) == (1, 0, (0.0, 23.0), None)
    assert (second.id, second.frame, second.point) == (2, 3, (31.0, 0.5))


GOOD = {"id": 1, "frame": 0, "x": 1, "y": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "expected a list of points"),
        ('{"point": []}', "expected a list of points"),
        ("3", "expected a list of points"),
        ("[3]", r"\[0\]: expected an object, got 3"),
        (json.dumps([{"id": 1, "frame": 0, "x": 1}]), r"\[0\]: has no 'y'"),
        (json.dumps([GOOD, GOOD | {"id": 0}]), r"\[1\]\.id: expected an integer from 1 to 255, got 0"),
        (json.dumps([GOOD | {"id": 256}]), r"\[0\]\.id: expected"),
        (json.dumps([GOOD | {"id": True}]), r"\[0\]\.id: expected"),
        (json.dumps([GOOD | {"x": "1"}]), r"\[0\]\.x: expected a finite number, got '1'"),
        ('[{"id": 1, "frame": 0, "x": NaN, "y": 1}]', r"\[0\]\.x: expected a finite number, got nan"),
        (json.dumps([GOOD | {"x": 32}]), r"\(32, 1\) is outside the frame; x must be 0 \.\. 31, y 0 \.\. 23"),
        (json.dumps([GOOD | {"y": -1}]), "outside the frame"),
        (json.dumps([GOOD | {"frame": 5}]), "frame 5 is past the end, .* has 5 frames"),
        (json.dumps([GOOD | {"frame": -1}]), r"\[0\]\.frame: expected an integer of at least 0, got -1"),
        (json.dumps([GOOD | {"frame": 1.5}]), r"\[0\]\.frame: expected an integer"),
        (json.dumps([GOOD | {"frame": "00009"}]), "no frame 00009 among"),
        (json.dumps([GOOD, GOOD | {"x": 2}]), "object 1 is given twice at frame 0"),
    ],
)
def test_bad_points_say_what_is_wrong(text, message, source, tmp_path):
    path = tmp_path / "points.json"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"points\.json: .*{message}"):
        read_points(path, source)


def test_a_missing_file_of_points_is_named(source, tmp_path):
    with pytest.raises(InputError, match=r"gone\.json: cannot be read"):
        read_points(tmp_path / "gone.json", source)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not a JSON file"):
        read_points(tmp_path / "binary.json", source)


@pytest.mark.parametrize("form", ["{}", "3@00010={}"])
def test_smoothed_masks_are_refused(source, tmp_path, form):
    mask = np.zeros((H, W), np.uint8)
    mask[6:18, 8:24] = 200
    cv2.imwrite(str(tmp_path / "00010.png"), cv2.GaussianBlur(mask, (0, 0), 1))
    with pytest.raises(InputError, match=r"00010\.png: looks like grey levels"):
        read_masks([form.format(tmp_path / "00010.png")], source)


@pytest.mark.parametrize("other", [2, 255])
def test_a_mask_of_one_object_with_two_values_gets_a_warning(source, write, other):
    path = write("00010.png", {1: (0, 6, 0, 6), other: (12, 18, 10, 20)})
    with pytest.warns(UserWarning, match=rf"object 3 is .* not 0, from 1 to {other}; threshold"):
        read_masks([f"3@00010={path}"], source)


@pytest.mark.parametrize(
    ("tag", "message"), [(1, None), (3, "turned by 180"), (6, "the mask is 32x24, .* turned by 90")]
)
def test_masks_of_turned_photographs_are_not_taken_silently(tmp_path, write, tag, message):
    exif = Image.Exif()
    exif[0x0112] = tag
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(tmp_path / "photos/a.jpg", exif=exif)
    source, mask = open_frames(tmp_path / "photos"), write("m.png", {1: (0, 4, 0, 4)})
    if tag == 6:
        with pytest.raises(InputError, match=message):
            read_masks([mask], source)
    elif tag == 3:
        with pytest.warns(UserWarning, match=message):
            read_masks([mask], source)
    else:
        read_masks([mask], source)
