"""Pictures in files: photographs, object ids in PNGs, and numbers in the colours of PNGs.

Photographs are decoded by OpenCV, PNGs of numbers by Pillow, which leaves palette indices and grey levels as
they are. A file that cannot be used raises an `InputError` that names it.

Photographs and videos are turned as their orientation says (of EXIF, of the container). Masks, points and
annotations belong to the turned picture: masks have no orientation, and a tag of theirs is ignored.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from tarvis.structures import MOST_PIXELS, InputError, Size

Picture = NDArray[np.uint8]
"""RGB uint8 [H, W, 3]."""
IdMap = NDArray[np.uint8] | NDArray[np.uint16]
"""[H, W] ids."""
Array = TypeVar("Array", bound=NDArray[Any])

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB, _INDEXED = 0, 2, 3
"""Colour types of PNG."""
_END = b"IEND\xaeB\x60\x82"
_LOG_LEVEL = threading.Lock()
_DAMAGED = "truncated or damaged PNG file"
ORIENTATION = 0x0112
"""The tag of EXIF."""
_TURNS = {
    2: "mirrored",
    3: "turned by 180 degrees",
    4: "flipped",
    5: "turned by 90 degrees and mirrored",
    6: "turned by 90 degrees",
    7: "turned by 270 degrees and mirrored",
    8: "turned by 270 degrees",
}
_JPEG = b"\xff\xd8"
_READERS: dict[bytes, type[ImageFile]] = {  # by class, since Image.open warns of large pictures
    _JPEG: JpegImageFile,
    _SIGNATURE: PngImageFile,
    b"BM": BmpImageFile,
    b"RIFF": WebPImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
}
_REDUCED = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}


class Window(NamedTuple):
    """A part of a picture."""

    top: int
    left: int
    height: int
    width: int

    @property
    def box(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    def aligned(self, target: Size, size: Size) -> Window:
        """The window, a little larger if `read_window` can then decode the picture at a part of its size."""
        factor = _reduction((self.height, self.width), target)
        top, left = self.top // factor * factor, self.left // factor * factor
        bottom = min(-(-(self.top + self.height) // factor) * factor, size[0])
        right = min(-(-(self.left + self.width) // factor) * factor, size[1])
        return Window(top, left, bottom - top, right - left)


def read_image(path: Path) -> Picture:
    """A photograph.

    Raises:
        InputError: the file is missing, truncated or no image.
    """
    return _rgb(_decoded(path, _bytes(path)))


def image_size(path: Path) -> Size:
    """(height, width) of a photograph with labels, as `read_image` gives it. Warns if it is turned.

    Raises:
        InputError: as `read_image`.
    """
    image = read_image(path)
    warn_if_turned(path, _bytes(path))
    return image.shape[0], image.shape[1]


def orientation(data: bytes) -> int:
    """The orientation in a photograph's EXIF: 1, where it stays as it is, to 8."""
    marks = ((b"Exif\0\0", 6), (b"eXIf", 4), (b"EXIF", 8))  # of JPEG, PNG, WebP
    places = [at + size for mark, size in marks if (at := data.find(mark)) >= 0]
    exif = data if data[:4] in (b"II*\0", b"MM\0*") else data[places[0] :] if places else b""
    order = "<" if exif[:2] == b"II" else ">"
    try:
        start = struct.unpack_from(f"{order}I", exif, 4)[0]
        for k in range(struct.unpack_from(f"{order}H", exif, start)[0]):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * k)
            if tag == ORIENTATION and 1 <= value <= 8:
                return int(value)
    except struct.error:
        pass
    return 1


def how_turned(path: Path, data: bytes | None = None) -> str:
    """For messages about a photograph with labels: how its EXIF turns it; empty where it does not."""
    tag = orientation(_bytes(path) if data is None else data)
    return "" if tag == 1 else f"; its EXIF orientation is {tag}: labels must be of the picture {_TURNS[tag]}"


def warn_if_turned(path: Path, data: bytes | None = None) -> None:
    """Say once for a folder that a photograph with labels is turned, which its labels do not show."""
    if how := how_turned(path, data):
        warnings.warn(f"{path.parent}: an image is turned{how}", stacklevel=3)


def read_window(path: Path, window: Window, target: Size, size: Size | None) -> Picture:
    """A window of a photograph with labels, at `target` size or above, never enlarged. Warns if it is turned.

    A JPEG of which half the pixels a side suffice is decoded at a half, or less: see `Window.aligned`.

    Args:
        size: (height, width) of the whole photograph, where it is known.

    Raises:
        InputError: the file is missing, damaged, or of another size.
    """
    data = _bytes(path)
    factor = 1 if size is None else _reduction((window.height, window.width), target)
    if window.top % factor or window.left % factor or not data.startswith(_JPEG):
        factor = 1  # other formats would be decoded in full, then resized
    bgr = _decoded(path, data, _REDUCED.get(factor, cv2.IMREAD_COLOR))
    if size is not None and bgr.shape[:2] != (-(-size[0] // factor), -(-size[1] // factor)):
        how = how_turned(path, data)
        raise InputError(
            f"{path}: expected an image of {size}, as its annotations say, got {bgr.shape[:2]}{how}"
        )
    warn_if_turned(path, data)
    bottom, right = window.top + window.height, window.left + window.width
    rows = slice(window.top // factor, -(-bottom // factor))
    columns = slice(window.left // factor, -(-right // factor))
    return _rgb(bgr[rows, columns])


def read_ids(path: Path, size: Size | None = None) -> IdMap:
    """`decode_ids` of a file.

    Raises:
        InputError: the file cannot be read or decoded, or its (height, width) is not `size`.
    """
    return _read(path, decode_ids, size)


def read_objects(path: Path, size: Size | None = None) -> IdMap:
    """Ids of objects in a mask that was drawn, not smoothed: see `_is_smoothed`.

    Raises:
        InputError: as `read_ids`, or the ids look like grey levels.
    """
    ids = read_ids(path, size)
    if _is_smoothed(ids):
        raise InputError(
            f"{path}: looks like grey levels, not ids: values line borders, as in a mask that was smoothed "
            "or resized; resize masks to the nearest pixel (cv2.INTER_NEAREST), or threshold them"
        )
    return ids


def read_rgb(path: Path, size: Size | None = None) -> Picture:
    """`decode_rgb` of a file.

    Raises:
        InputError: the file cannot be read or decoded, or its (height, width) is not `size`.
    """
    return _read(path, decode_rgb, size)


def decode_ids(data: bytes) -> IdMap:
    """Ids [H, W] of an indexed or grey PNG: uint16 where it is grey of 16 bits, else uint8.

    Raises:
        InputError: not a PNG, a damaged one, or one of colours (RGB, alpha).
    """
    image, bits, colour_type = _opened(data)
    if colour_type not in (_GREY, _INDEXED):
        raise InputError(
            "an RGB picture; expected a PNG of palette indices or grey levels, one number an object"
        )
    ids = np.asarray(image)
    if bits == 16:
        return ids.astype(np.uint16)
    if colour_type == _GREY and 1 < bits < 8:  # Pillow spreads the levels over 0 .. 255
        ids = ids // (255 // (2**bits - 1))
    return ids.astype(np.uint8)


def decode_rgb(data: bytes) -> Picture:
    """Colours [H, W, 3] of an RGB PNG of 8 bits, which stand for numbers: ids, classes and instances.

    Raises:
        InputError: not a PNG, a damaged one, or one of another kind, whose colours would mean something else.
    """
    image, bits, colour_type = _opened(data)
    if (bits, colour_type) != (8, _RGB) or "transparency" in image.info:
        raise InputError("expected an RGB picture of 8 bits, without palette or transparency")
    return np.array(image, np.uint8)


def encode_ids(ids: IdMap, palette: NDArray[np.uint8]) -> bytes:
    """PNG of ids [H, W]: indexed with `palette` [256, 3] RGB where they are uint8, grey where uint16."""
    assert ids.ndim == 2, ids.shape
    assert ids.dtype in (np.uint8, np.uint16), ids.dtype
    image = Image.fromarray(ids)
    if ids.dtype == np.uint8:
        assert palette.shape == (256, 3), palette.shape
        image.putpalette(palette.astype(np.uint8).tobytes())
    return _png(image)


def encode_rgb(picture: Picture) -> bytes:
    """PNG of a picture [H, W, 3]."""
    return _png(Image.fromarray(picture))


def voc_palette() -> NDArray[np.uint8]:
    """Colours [256, 3] of DAVIS and Pascal VOC. Bits 3k, 3k + 1, 3k + 2 of i are bits 7 - k of R, G, B."""
    index = np.arange(256)
    bits = index[:, None] >> np.arange(8) & 1  # [256, 8]
    high = np.array([128, 64, 32])
    return np.stack([bits[:, c::3] @ high[: len(range(c, 8, 3))] for c in range(3)], 1).astype(np.uint8)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps OpenCV's warnings off stderr; what fails is raised. The level is global, hence the lock."""
    with _LOG_LEVEL:
        level = cv2.utils.logging.getLogLevel()
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            yield
        finally:
            cv2.utils.logging.setLogLevel(level)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _decoded(path: Path, data: bytes, how: int = cv2.IMREAD_COLOR) -> NDArray[Any]:
    """A photograph as BGR."""
    try:
        _expect_pixels(*_announced_size(data))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    try:
        with _quiet():
            bgr = cv2.imdecode(np.frombuffer(data, np.uint8), how)
    except cv2.error:  # an empty file, or larger than OpenCV accepts
        bgr = None
    if bgr is None:
        raise InputError(f"{path}: not an image that can be read (truncated, or another kind of file)")
    return bgr


def _announced_size(data: bytes) -> tuple[int, int]:
    """Width and height that a photograph says it has, before any pixel is decoded; else zeros."""
    reader = next((reader for mark, reader in _READERS.items() if data.startswith(mark)), None)
    if reader is not None:
        with suppress(Exception):  # Pillow raises many; OpenCV then decides whether it can be read
            return reader(io.BytesIO(data)).size
    return 0, 0


def _expect_pixels(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise InputError(f"expected a picture of at most {MOST_PIXELS} pixels, got {width} x {height}")


def _rgb(bgr: NDArray[Any]) -> Picture:
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)


def _reduction(size: Size, target: Size) -> int:
    """By how much sides may be divided (1, 2, 4 or 8) so that they stay as large as `target`."""
    return next((f for f in _REDUCED if f * target[0] <= size[0] and f * target[1] <= size[1]), 1)


def _read(path: Path, decode: Callable[[bytes], Array], size: Size | None) -> Array:
    data = _bytes(path)
    try:
        picture = decode(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if size is not None and picture.shape[:2] != size:
        raise InputError(f"{path}: expected a picture of {size}, got {picture.shape[:2]}")
    return picture


def _opened(data: bytes) -> tuple[PngImageFile, int, int]:
    """A PNG whose checksums are right and whose pixels are decoded, its bits a sample and its colour type."""
    if not data.startswith(_SIGNATURE):
        raise InputError("not a PNG file")
    if _END not in data:
        raise InputError(_DAMAGED)
    try:
        # by its class, since Image.open warns of large pictures, once for the whole process
        PngImageFile(io.BytesIO(data)).verify()
        image = PngImageFile(io.BytesIO(data))
        _expect_pixels(*image.size)
        image.load()
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, MemoryError, EOFError):
        raise InputError(_DAMAGED) from None
    return image, data[24], data[25]  # of the header chunk, which comes first


def _is_smoothed(ids: IdMap) -> bool:
    """Whether pieces of ids line the borders between lower and higher ones, as in a picture of grey levels.

    Smoothing and resizing make 8 to 90 of 100 border pixels such; crowded masks have at most 2.
    """
    near = np.ones((5, 5), np.uint8)
    is_between = (cv2.erode(ids, near) < ids) & (ids < cv2.dilate(ids, near))
    num_border = np.count_nonzero(cv2.dilate(ids, near[:3, :3]) != cv2.erode(ids, near[:3, :3]))
    least = max(8, 0.06 * num_border)
    if np.count_nonzero(is_between) < least:
        return False
    num_rim = 0
    for id_ in np.unique(ids[is_between]):
        _, pieces = cv2.connectedComponents((ids == id_).view(np.uint8))
        pixels = np.bincount(pieces.ravel())
        between = np.bincount(pieces[is_between & (ids == id_)], minlength=len(pixels))
        num_rim += int(between[between >= 0.8 * pixels].sum())
    return num_rim >= least


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)  # level 6 takes three times as long
    return file.getvalue()
