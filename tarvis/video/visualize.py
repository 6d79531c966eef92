"""Pictures of results: masks, outlines, names and points over frames, and contact sheets of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from tarvis.datasets.classes import RGB, distinct_colors
from tarvis.files.pictures import Picture

Mask = NDArray[np.bool_]
"""[H, W]."""

TRACK_COLORS = tuple(distinct_colors(256))

FONT = cv2.FONT_HERSHEY_SIMPLEX


def track_color(id_: int) -> RGB:
    """Colour of a track; the same in all frames and videos."""
    return TRACK_COLORS[id_ % len(TRACK_COLORS)]


def overlay(
    frame: Picture,
    masks: Mapping[int, Mask],
    *,
    labels: Mapping[int, str] | None = None,
    points: Mapping[int, tuple[float, float]] | None = None,
    opacity: float = 0.45,
) -> Picture:
    """The frame with each track's mask in its colour, outlined, later ones on top.

    Args:
        masks: track id -> mask.
        labels: track id -> text, written on the track.
        points: track id -> (x, y) in pixels, drawn as a marker in the track's colour.
        opacity: of the masks' colour, 0 .. 1.
    """
    picture = frame.copy()
    for id_, mask in masks.items():
        _tint(picture, mask, track_color(id_), opacity)
        _outline(picture, mask, track_color(id_))
    for id_, mask in masks.items():
        if labels and id_ in labels and mask.any():
            _label(picture, mask, labels[id_], track_color(id_))
    for id_, (x, y) in (points or {}).items():
        _marker(picture, x, y, track_color(id_))
    return picture


def panoptic_overlay(
    frame: Picture,
    semantic: NDArray[np.uint8],
    masks: Mapping[int, Mask],
    *,
    colors: Sequence[RGB],
    names: Sequence[str] | None = None,
    labels: Mapping[int, str] | None = None,
) -> Picture:
    """The frame with stuff in the pale colours of its classes, and tracks over it as in `overlay`.

    Args:
        semantic: [H, W] class index of every pixel, 255 is void.
        masks: track id -> mask of the things.
        colors: by class.
        names: by class, written into each larger region of stuff.
    """
    picture = frame.copy()
    things = np.zeros(semantic.shape, bool)
    for mask in masks.values():
        things |= mask
    stuff = np.where(things, 255, semantic).astype(np.uint8)
    regions = {int(k): stuff == k for k in np.unique(stuff) if k < len(colors)}
    for k, region in regions.items():
        _tint(picture, region, colors[k], 0.3)
    edges = np.zeros(stuff.shape, bool)
    edges[1:] |= stuff[1:] != stuff[:-1]
    edges[:, 1:] |= stuff[:, 1:] != stuff[:, :-1]
    _tint(picture, edges & ~things, (255, 255, 255), 0.35)
    for k, region in regions.items():
        if names is not None and region.mean() > 0.03:
            _text(picture, names[k], _middle(region), 0.8 * _text_height(picture), _paler(colors[k], 0.6))
    return overlay(picture, masks, labels=labels, opacity=0.55)


def contact_sheet(
    pictures: Sequence[Picture],
    columns: int = 4,
    *,
    titles: Sequence[str] | None = None,
    max_width: int = 1600,
) -> Picture:
    """Pictures of one size in rows, on a dark ground, shrunk so that the sheet is at most `max_width` wide.

    Args:
        titles: written in the corner of each picture; without them, its number from 0.

    Raises:
        ValueError: no pictures, or pictures of different sizes.
    """
    sizes = {picture.shape for picture in pictures}
    if len(sizes) != 1:
        raise ValueError(f"a contact sheet needs pictures of one size, got {sorted(sizes) or 'none'}")
    height, width = next(iter(sizes))[:2]
    columns = min(columns, len(pictures))
    gap = max(2, min(max_width, columns * width) // 300)
    scale = min(1.0, (max_width - gap * (columns + 1)) / (columns * width))
    w, h = max(1, int(width * scale)), max(1, int(height * scale))
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 24, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        cell = sheet[y : y + h, x : x + w]
        cell[:] = cv2.resize(picture, (w, h), interpolation=cv2.INTER_AREA)
        size = _text_height(cell)
        _text(
            cell,
            str(i) if titles is None else titles[i],
            (0.8 * size, 1.1 * size),
            size,
            (255, 255, 255),
            left=True,
        )
    return sheet


def _tint(picture: Picture, mask: Mask, color: RGB, opacity: float) -> None:
    picture[mask] = ((1 - opacity) * picture[mask] + opacity * np.array(color)).astype(np.uint8)


def _outline(picture: Picture, mask: Mask, color: RGB) -> None:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    width = max(1, round(min(mask.shape) / 300))
    cv2.drawContours(picture, contours, -1, _paler(color, 0.35), width, cv2.LINE_AA)


def _label(picture: Picture, mask: Mask, text: str, color: RGB) -> None:
    _text(picture, text, _middle(mask), _text_height(picture), _paler(color, 0.75))


def _marker(picture: Picture, x: float, y: float, color: RGB) -> None:
    """A disc with a white and a dark ring, centred to a quarter of a pixel."""
    radius = max(3.0, min(picture.shape[:2]) / 70)
    center = round(4 * x), round(4 * y)
    for r, c in ((radius + 1.8, (20, 20, 20)), (radius + 0.8, (255, 255, 255)), (radius - 0.8, color)):
        cv2.circle(picture, center, round(4 * r), c, cv2.FILLED, cv2.LINE_AA, shift=2)


def _text(
    picture: Picture,
    text: str,
    center: tuple[float, float],
    height: float,
    color: RGB,
    *,
    left: bool = False,
) -> None:
    """Text of capitals `height` pixels tall with a dark rim, moved to be inside the picture.

    `center` is (x, y) of the middle of the text, with `left` of the middle of its left end.
    """
    fine = 4  # drawn this much larger, then shrunk: small letters keep their shapes and distances
    (_, unit), _ = cv2.getTextSize("X", FONT, 1, 1)
    scale, thickness, rim = (
        fine * height / unit,
        max(1, round(fine * height / 8)),
        fine * max(1, round(height / 7)),
    )
    (w, h), below = cv2.getTextSize(text, FONT, scale, thickness)
    w, h = w // fine + 1 + 2 * rim // fine, (h + below) // fine + 1 + 2 * rim // fine
    ink = np.zeros((fine * h, fine * w), np.uint8)
    cv2.putText(ink, text, (rim, fine * h - below - rim), FONT, scale, 255, thickness, cv2.LINE_AA)
    halo = cv2.dilate(ink, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * rim + 1, 2 * rim + 1)))
    shrunk = [cv2.resize(layer, (w, h), interpolation=cv2.INTER_AREA) for layer in (halo, ink)]

    H, W = picture.shape[:2]
    x = round(center[0] - (0 if left else w / 2))
    y = round(center[1] - (h - below / fine) / 2)
    x, y = max(0, min(x, W - w)), max(0, min(y, H - h))
    box = picture[y : y + h, x : x + w]
    for layer, c, strength in zip(shrunk, ((16, 16, 16), color), (0.75, 1.0), strict=True):
        alpha = strength / 255 * layer[: box.shape[0], : box.shape[1], None]
        box[:] = np.round((1 - alpha) * box + alpha * np.array(c))


def _text_height(picture: Picture) -> float:
    return max(8.0, min(picture.shape[:2]) / 34)


def _middle(mask: Mask) -> tuple[float, float]:
    """(x, y) of the pixel deepest inside the mask."""
    step = max(1, min(mask.shape) // 160)  # coarse is enough, and fast
    coarse = np.pad(mask[::step, ::step].astype(np.uint8), 1)
    if not coarse.any():
        y, x = np.argwhere(mask)[0]
        return float(x), float(y)
    depth = cv2.distanceTransform(coarse, cv2.DIST_L2, 3)
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return float((x - 1) * step), float((y - 1) * step)


def _paler(color: RGB, by: float) -> RGB:
    r, g, b = (round(c + by * (255 - c)) for c in color)
    return r, g, b
