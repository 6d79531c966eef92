"""What browsers send, as values; whatever else they send is refused in a line."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

import numpy as np
import torch
from starlette.requests import Request

from tarvis.files import rle
from tarvis.files.pictures import decode_ids
from tarvis.structures import RLE, InputError
from tarvis.web.sessions import Session

LONGEST_BODY = 32 * 2**20
"""Bytes of a request that is no upload; a mask as PNG is the longest."""


def read_frame(session: Session, value: Any) -> int:
    if type(value) is not int or not 0 <= value < session.num_frames:
        raise InputError(f"expected a frame from 0 to {session.num_frames - 1}, got {str(value)[:40]}")
    return value


def read_box(value: Any) -> tuple[float, ...] | None:
    try:
        box = None if value is None else tuple(map(float, value))
    except (TypeError, ValueError, OverflowError):
        box = ()
    if box is not None and len(box) != 4:
        raise InputError("expected a box as [left, top, right, bottom]")
    return box


def read_points(values: Any) -> tuple[tuple[float, float], ...]:
    try:
        points = tuple((float(x), float(y)) for x, y in values)
    except (TypeError, ValueError, OverflowError):
        raise InputError("expected points as a list of [x, y]") from None
    if len(points) > 100:
        raise InputError("at most 100 points are taken")
    return points


def read_mask(value: Any, session: Session) -> RLE:
    """A mask from the browser: [[first pixel, how many], ...] in rows, or a PNG in base64 by its data URL."""
    height, width = session.size
    flat = np.zeros(height * width, bool)
    if isinstance(value, str):
        try:
            ids = decode_ids(base64.b64decode(value.partition(",")[2], validate=True))
        except (binascii.Error, ValueError):
            raise InputError("expected a mask as PNG") from None
        if ids.shape != session.size:
            raise InputError(f"expected a mask of {width}x{height}, got {ids.shape[1]}x{ids.shape[0]}")
        flat = ids.reshape(-1) > 0
    else:
        try:
            first, count = np.asarray(value, np.int64).reshape(-1, 2).T
        except (TypeError, ValueError, OverflowError):
            raise InputError("expected a mask as runs [first pixel, how many]") from None
        bounds = np.stack((first, first + count), 1).reshape(-1)
        if len(bounds) and (bounds[0] < 0 or bounds[-1] > flat.size or (np.diff(bounds) < 0).any()):
            raise InputError("a run of the mask leaves the frame, or comes before the one before it")
        steps = np.zeros(flat.size + 1, np.int64)
        np.add.at(steps, first, 1)
        np.add.at(steps, first + count, -1)
        flat = steps.cumsum()[:-1] > 0
    if not flat.any():
        raise InputError("the mask is empty")
    return rle.encode(torch.from_numpy(flat.reshape(1, height, width)))[0]


async def read_body(request: Request) -> dict[str, Any]:
    data = bytearray()
    async for block in request.stream():
        data += block
        if len(data) > LONGEST_BODY:
            raise InputError("the request is too long")
    try:
        tree = json.loads(bytes(data) or b"{}")
    except (ValueError, RecursionError):
        raise InputError("expected JSON") from None
    if not isinstance(tree, dict):
        raise InputError("expected a JSON object")
    return tree
