import struct
import zlib
from functools import partial

import cv2
import numpy as np
import pytest
from PIL import Image

from tarvis.files.pictures import (
    Window,
    decode_ids,
    decode_rgb,
    encode_ids,
    image_size,
    orientation,
    read_ids,
    read_image,
    read_objects,
    read_rgb,
    read_window,
)
from tarvis.structures import InputError

PALETTE = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)


def png(width, height, bits, colour_type, rows, *chunks):
    """A PNG file from first principles: every row is filter byte 0 and its packed samples."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    extra = b"".join(chunk(kind, data) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + extra + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("shape", [(1, 1), (37, 53), (480, 854)])
def test_indices_survive_and_other_readers_see_the_palette(shape):
    ids = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    coded = encode_ids(ids, PALETTE)
    assert decode_ids(coded).dtype == np.uint8
    np.testing.assert_array_equal(decode_ids(coded), ids)
    seen = cv2.cvtColor(cv2.imdecode(np.frombuffer(coded, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    np.testing.assert_array_equal(seen, PALETTE[ids])


def test_ids_of_16_bits_survive():
    ids = np.random.default_rng(2).integers(0, 2**16, (20, 30), dtype=np.uint16)
    again = decode_ids(encode_ids(ids, PALETTE))
    assert again.dtype == np.uint16
    np.testing.assert_array_equal(again, ids)


@pytest.mark.parametrize("colour_type", [0, 3])
@pytest.mark.parametrize(
    ("bits", "row", "ids"),
    [
        (1, b"\xa0", [1, 0, 1]),
        (2, b"\x6c", [1, 2, 3]),
        (4, b"\x5f\x10", [5, 15, 1]),
        (8, b"\0\x09\xff", [0, 9, 255]),
    ],
)
def test_samples_of_fewer_than_8_bits_are_ids_too(bits, row, ids, colour_type):
    chunks = [(b"PLTE", PALETTE[: 2**bits].tobytes())] if colour_type == 3 else []
    assert decode_ids(png(3, 1, bits, colour_type, [row], *chunks)).tolist() == [ids]


def test_gamma_and_transparency_change_no_id():
    chunks = (b"gAMA", struct.pack(">I", 45455)), (b"PLTE", PALETTE.tobytes()), (b"tRNS", b"\0")
    assert decode_ids(png(3, 1, 8, 3, [b"\0\x01\x02"], *chunks)).tolist() == [[0, 1, 2]]


def test_colours_are_refused():
    with pytest.raises(ValueError, match="RGB"):
        decode_ids(png(1, 1, 8, 2, [b"\1\2\3"]))


@pytest.mark.parametrize("cut", [4, 20, 60, -1])
def test_a_truncated_file_is_refused(cut, tmp_path):
    path = tmp_path / "mask.png"
    path.write_bytes(encode_ids(np.zeros((9, 9), np.uint8), PALETTE)[:cut])
    with pytest.raises(ValueError, match=r"mask\.png: .*PNG"):
        read_ids(path)


def test_a_flipped_bit_is_noticed():
    coded = bytearray(encode_ids(np.random.default_rng(0).integers(0, 9, (40, 40), dtype=np.uint8), PALETTE))
    coded[-30] ^= 4
    with pytest.raises(ValueError, match="damaged"):
        decode_ids(bytes(coded))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.png: cannot be read"):
        read_ids(tmp_path / "gone.png")


def test_colours_come_in_the_order_of_the_file(tmp_path):
    data = png(2, 1, 8, 2, [bytes([1, 2, 3, 255, 0, 7])])
    assert decode_rgb(data).tolist() == [[[1, 2, 3], [255, 0, 7]]]
    (tmp_path / "a.png").write_bytes(data)
    assert read_rgb(tmp_path / "a.png").shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(1, 1, 8, 3, [b"\0"], (b"PLTE", bytes(3))), "without palette"),
        (png(1, 1, 8, 0, [b"\0"]), "expected an RGB picture"),
        (png(1, 1, 8, 6, [bytes(4)]), "or transparency"),
        (png(1, 1, 16, 2, [bytes(6)]), "of 8 bits"),
        (png(1, 1, 8, 2, [bytes(3)])[:-1], "damaged"),
        (png(2**30, 2**30, 8, 2, [bytes(3)]), "expected a picture of at most"),
        (b"JFIF", "not a PNG"),
    ],
)
def test_other_pictures_are_refused(tmp_path, data, message):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match=f"a.png: .*{message}"):
        read_rgb(tmp_path / "a.png")


def drawn(ids, seed=0, size=(240, 320)):
    """A mask of ellipses of these ids, some of them large, some thin."""
    random, mask = np.random.default_rng(seed), np.zeros(size, np.uint8)
    for k in ids:
        centre, axes = random.integers(0, size[::-1], 2), random.integers(2, 60, 2)
        cv2.ellipse(mask, centre.tolist(), axes.tolist(), float(random.integers(180)), 0, 360, k, -1)
    return mask


SMOOTHING = {
    "blurred": partial(cv2.GaussianBlur, ksize=(0, 0), sigmaX=1.5),
    "enlarged": partial(cv2.resize, dsize=None, fx=3, fy=3),
    "reduced": partial(cv2.resize, dsize=None, fx=0.4, fy=0.4, interpolation=cv2.INTER_AREA),
    "compressed": lambda mask: cv2.imdecode(cv2.imencode(".jpg", mask)[1], cv2.IMREAD_GRAYSCALE),
}


@pytest.mark.parametrize("how", SMOOTHING)
@pytest.mark.parametrize("ids", [(255,), (2,), (1, 3), (5, 9, 30)])
def test_a_mask_that_was_smoothed_is_refused(tmp_path, how, ids):
    mask = SMOOTHING[how](drawn(ids, 3))
    if set(np.unique(mask)) <= {0, *ids}:
        pytest.skip("nothing between the ids")
    (tmp_path / "soft.png").write_bytes(encode_ids(mask, PALETTE))
    with pytest.raises(ValueError, match=r"soft\.png: looks like grey levels.*INTER_NEAREST") as error:
        read_objects(tmp_path / "soft.png")
    assert len(str(error.value)) - len(str(tmp_path)) < 250


@pytest.mark.parametrize("seed", range(20))
def test_crowded_masks_are_not_taken_for_smoothed_ones(tmp_path, seed):
    mask = drawn(np.random.default_rng(seed).permutation(30).tolist(), seed)
    for dtype in (np.uint8, np.uint16):
        (tmp_path / "hard.png").write_bytes(encode_ids(mask.astype(dtype), PALETTE))
        assert (read_objects(tmp_path / "hard.png") == mask).all()


def photograph(path, tag, size=(30, 40)):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "a maker", tag
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_the_orientation_of_a_photograph_is_what_turns_it(tmp_path, suffix, tag):
    path = photograph(tmp_path / f"a.{suffix}", tag)
    assert orientation(path.read_bytes()) == tag
    assert read_image(path).shape[:2] == ((40, 30) if tag > 4 else (30, 40))


@pytest.mark.parametrize(
    "data", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"]
)
def test_a_damaged_exif_turns_nothing(data):
    assert orientation(data) == 1


@pytest.mark.parametrize("tag", [1, 3, 6])
def test_a_photograph_with_labels_that_is_turned_is_named(tmp_path, tag, recwarn):
    path = photograph(tmp_path / "a.jpg", tag)
    size = image_size(path)
    read_window(path, Window(0, 0, *size), size, size)
    said = [str(warning.message) for warning in recwarn]
    assert all(f"EXIF orientation is {tag}: labels must be of the picture turned by" in text for text in said)
    assert bool(said) == (tag > 1)
    with pytest.raises(
        ValueError, match=r"got \(.., ..\)" + (f"; its EXIF orientation is {tag}" if tag > 1 else "$")
    ):
        read_window(path, Window(0, 0, 9, 9), (9, 9), (size[0], 99))


def test_pictures_of_too_many_pixels_are_refused_before_they_are_decoded(tmp_path):
    bomb = png(30_000, 30_000, 1, 0, [b"\0" * 3750] * 30_000)
    assert len(bomb) < 200_000
    (tmp_path / "a.png").write_bytes(bomb)
    window = Window(0, 0, 9, 9)
    for read in (read_image, read_ids, read_rgb, lambda path: read_window(path, window, (9, 9), None)):
        with pytest.raises(InputError, match=r"a\.png: expected a picture of at most .* got 30000 x 30000"):
            read(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["jpg", "bmp", "webp", "tif", "png"])
def test_the_size_that_a_header_announces_counts(tmp_path, suffix, monkeypatch):
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / f"a.{suffix}")
    assert read_image(tmp_path / f"a.{suffix}").shape == (30, 40, 3)
    monkeypatch.setattr("tarvis.files.pictures.MOST_PIXELS", 1199)
    with pytest.raises(InputError, match="got 40 x 30"):
        read_image(tmp_path / f"a.{suffix}")
