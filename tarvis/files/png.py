"""Indexed PNG files of object ids. OpenCV neither writes them nor reads their indices: it makes RGB of both.

A PNG of palette indices differs from one of grey levels in one byte of its header and in the palette chunk,
so OpenCV still does the coding: the bytes are relabelled before it reads and after it writes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from tarvis.structures import InputError

IdMap = NDArray[np.uint8] | NDArray[np.uint16]
"""[H, W] ids."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB, _INDEXED = 0, 2, 3  # colour types of PNG
DAMAGED = "truncated or damaged PNG file"

Picture = TypeVar("Picture")


def encode_ids(ids: IdMap, palette: NDArray[np.uint8]) -> bytes:
    """PNG of ids [H, W]: indexed with `palette` [256, 3] RGB where they are uint8, grey where uint16."""
    assert ids.ndim == 2, ids.shape
    assert ids.dtype in (np.uint8, np.uint16), ids.dtype
    ok, coded = cv2.imencode(".png", ids)
    assert ok
    if ids.dtype == np.uint16:
        return coded.tobytes()
    assert palette.shape == (256, 3), palette.shape
    assert palette.dtype == np.uint8, palette.dtype
    chunks = []
    for kind, body in _chunks(coded.tobytes()):
        if kind == b"IHDR":
            chunks += [_chunk(kind, _with_colour_type(body, _INDEXED)), _chunk(b"PLTE", palette.tobytes())]
        else:
            chunks.append(_chunk(kind, body))
    return _SIGNATURE + b"".join(chunks)


def decode_ids(data: bytes) -> IdMap:
    """Ids [H, W] of an indexed or grey PNG: uint16 where it is grey of 16 bits, else uint8.

    Raises:
        ValueError: not a PNG, a damaged one, or one of colours (RGB, alpha).
    """
    if not data.startswith(_SIGNATURE):
        raise ValueError("not a PNG file")
    chunks = list(_chunks(data))
    header = _header(chunks)
    bits, colour_type = header[8], header[9]
    if colour_type not in (_GREY, _INDEXED):
        raise ValueError(
            "an RGB picture; expected a PNG of palette indices or grey levels, one number an object"
        )
    kept = [(kind, body) for kind, body in chunks[1:] if kind in (b"IDAT", b"IEND")]  # no palette, no gamma
    grey = [(b"IHDR", _with_colour_type(header, _GREY)), *kept]
    coded = _SIGNATURE + b"".join(_chunk(kind, body) for kind, body in grey)
    ids = _decode(coded)
    if ids.ndim != 2:
        raise ValueError(DAMAGED)
    if bits < 8:  # libpng spreads the levels over 0 .. 255
        ids = ids // (255 // (2**bits - 1))
    return ids.astype(np.uint16) if bits == 16 else ids.astype(np.uint8)


def decode_rgb(data: bytes) -> NDArray[np.uint8]:
    """Colours [H, W, 3] of an RGB PNG of 8 bits, which stand for numbers: ids, classes and instances.

    Raises:
        ValueError: not a PNG, a damaged one, or one of another kind, whose colours would mean something else.
    """
    if not data.startswith(_SIGNATURE):
        raise ValueError("not a PNG file")
    header = _header(list(_chunks(data)))
    if (header[8], header[9]) != (8, _RGB):
        raise ValueError("expected an RGB picture of 8 bits, without palette or transparency")
    bgr = _decode(data)
    if bgr.ndim != 3:
        raise ValueError(DAMAGED)
    return np.ascontiguousarray(bgr[..., ::-1], np.uint8)


def read_ids(path: Path) -> IdMap:
    """`decode_ids` of a file.

    Raises:
        InputError: as there, or the file cannot be read; the message names it.
    """
    return _read(path, decode_ids)


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """`decode_rgb` of a file.

    Raises:
        InputError: as there, or the file cannot be read; the message names it.
    """
    return _read(path, decode_rgb)


def _read(path: Path, decode: Callable[[bytes], Picture]) -> Picture:
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def _decode(data: bytes) -> NDArray[Any]:
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # larger than OpenCV accepts
        picture = None
    if picture is None:
        raise ValueError(DAMAGED)
    return picture


def _header(chunks: list[tuple[bytes, bytes]]) -> bytes:
    if not chunks or chunks[0][0] != b"IHDR" or len(chunks[0][1]) != 13 or chunks[-1][0] != b"IEND":
        raise ValueError(DAMAGED)
    return chunks[0][1]


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and body of each chunk, up to the first that is damaged: length, kind, body, checksum."""
    at = len(_SIGNATURE)
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        kind, body = data[at + 4 : at + 8], data[at + 8 : end]
        if data[at : end + 4] != _chunk(kind, body):
            return
        yield kind, body
        at = end + 4


def _chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def _with_colour_type(header: bytes, colour_type: int) -> bytes:
    return header[:9] + bytes([colour_type]) + header[10:]


def encode_rgb(rgb: NDArray[np.uint8]) -> bytes:
    """PNG of colours [H, W, 3]."""
    return cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].tobytes()


def voc_palette() -> NDArray[np.uint8]:
    """Colours [256, 3] of DAVIS and Pascal VOC. Bits 3k, 3k + 1, 3k + 2 of i are bits 7 - k of R, G, B."""
    index = np.arange(256)
    bits = index[:, None] >> np.arange(8) & 1  # [256, 8]
    high = np.array([128, 64, 32])
    return np.stack([bits[:, c::3] @ high[: len(range(c, 8, 3))] for c in range(3)], 1).astype(np.uint8)
