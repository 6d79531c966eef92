"""A result to look at: `overlay.mp4` and `contact_sheet.png`, made in one pass over the frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tarvis.datasets.classes import ClassTable
from tarvis.files.png import IdMap
from tarvis.stitch.panoptic import decode_labels, fuse, paint
from tarvis.structures import InputError, Reference, Track, VideoResult
from tarvis.video.frames import Frame
from tarvis.video.results import painting_order
from tarvis.video.visualize import contact_sheet, overlay, panoptic_overlay

LEAST_SIDE, MOST_SIDE = 240, 1920
"""A smaller video is enlarged to this in pictures, so that names can be read, if that makes it no larger."""

HUGE_SIDE = 4096
"""A larger video is shrunk to this in pictures: the MP4 codec takes little more."""

CELL_WIDTH = 400
"""Of a picture on the contact sheet."""


def write_overlays(
    result: VideoResult,
    frames: Iterable[Frame],
    out: Path,
    *,
    fps: float = 10.0,
    classes: ClassTable | None = None,
    min_score: float = 0.0,
    references: Sequence[Reference] = (),
    sheet_frames: int = 12,
) -> None:
    """Write `overlay.mp4` and `contact_sheet.png` into the folder `out`.

    Args:
        frames: all of the video's, RGB uint8 at the original size.
        classes: of the labels (vis, vps); gives names, and colours of stuff.
        min_score: tracks below are not shown.
        references: objects given by the user; their points are marked on their frames.
        sheet_frames: how many frames, evenly spread, the contact sheet shows.

    Raises:
        ValueError: more or fewer frames than the result has, or without `classes` for vps.
        InputError: this OpenCV cannot write MP4 files.
    """
    if result.stuff and classes is None:
        raise ValueError("a panoptic result needs its class table for names and colours")
    tracks = painting_order(result, min_score)
    on_sheet = set(
        np.linspace(0, result.num_frames - 1, min(sheet_frames, result.num_frames)).round().astype(int)
    )
    sheet: dict[str, Frame] = {}
    with _Video(out / "overlay.mp4", fps) as video:
        for frame, image in zip(range(result.num_frames), frames, strict=True):
            points = {r.id: r.point for r in references if r.frame == frame and r.point is not None}
            picture = _picture(result, tracks, frame, image, classes, points)
            video.write(picture)
            if frame in on_sheet:
                sheet[str(frame)] = _at_most(picture, CELL_WIDTH)
    picture = contact_sheet(list(sheet.values()), titles=list(sheet))
    data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
    (out / "contact_sheet.png").write_bytes(data)  # unlike imwrite it says so when the disk is full


def _picture(
    result: VideoResult,
    tracks: Sequence[Track],
    frame: int,
    image: Frame,
    classes: ClassTable | None,
    points: Mapping[int, tuple[float, float]],
) -> Frame:
    """The frame with the tracks over it, resized if small or huge. Of overlapping masks the upper shows."""
    height, width = image.shape[:2]
    factor: float = max(1, min(-(-LEAST_SIDE // min(height, width)), MOST_SIDE // max(height, width)))
    factor = min(factor, HUGE_SIDE / max(height, width))
    size = max(1, round(factor * width)), max(1, round(factor * height))

    def resized(x: NDArray[Any], how: int = cv2.INTER_NEAREST) -> NDArray[Any]:
        return x if factor == 1 else cv2.resize(x, size, interpolation=how)

    image = resized(image, cv2.INTER_LINEAR if factor > 1 else cv2.INTER_AREA)
    labels = {track.id: _title(track, classes) for track in tracks}
    if classes is not None and result.stuff:
        semantic, ids = fuse(decode_labels(result.stuff[frame]), tracks, frame)
        masks = _masks(resized(ids), tracks)
        return panoptic_overlay(
            image, resized(semantic), masks, colors=classes.colors, names=classes.names, labels=labels
        )
    masks = _masks(resized(paint(result.size, tracks, frame)), tracks)
    # pixel centres: (x, y) is the middle of a pixel, in the enlarged picture of a block of pixels
    points = {id_: (factor * (x + 0.5) - 0.5, factor * (y + 0.5) - 0.5) for id_, (x, y) in points.items()}
    return overlay(image, masks, labels=labels, points=points)


def _masks(ids: IdMap, tracks: Iterable[Track]) -> dict[int, NDArray[np.bool_]]:
    shown = set(np.unique(ids).tolist())
    return {track.id: ids == track.id for track in tracks if track.id in shown}


def _title(track: Track, classes: ClassTable | None) -> str:
    """The id of an object that the user gave; class and score of one that was found."""
    if track.label is None:
        return str(track.id)
    name = str(track.label) if classes is None else classes.names[track.label]
    return name if track.score is None else f"{name} {track.score:.2f}"


def _at_most(picture: Frame, width: int) -> Frame:
    h, w = picture.shape[:2]
    if w <= width:
        return picture
    return np.asarray(
        cv2.resize(picture, (width, max(1, h * width // w)), interpolation=cv2.INTER_AREA), np.uint8
    )


class _Video:
    """An MP4 file, opened with the first picture."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path = path
        self.fps = fps
        self._writer: cv2.VideoWriter | None = None

    def __enter__(self) -> _Video:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.release()

    def write(self, picture: Frame) -> None:
        h, w = picture.shape[:2]
        # most players want even sides
        even = cv2.copyMakeBorder(picture, 0, h % 2, 0, w % 2, cv2.BORDER_REPLICATE)
        if self._writer is None:
            size = even.shape[1], even.shape[0]
            self._writer = cv2.VideoWriter(str(self.path), cv2.VideoWriter.fourcc(*"mp4v"), self.fps, size)
            if not self._writer.isOpened():
                raise InputError(f"{self.path.name}: this OpenCV build cannot write MP4 videos (codec mp4v)")
        self._writer.write(cv2.cvtColor(even, cv2.COLOR_RGB2BGR))
