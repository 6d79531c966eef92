"""A result to look at: `overlay.mp4` and `contact_sheet.png`, drawn frame by frame."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from tarvis.datasets.classes import ClassTable
from tarvis.files.pictures import IdMap, Picture, encode_rgb
from tarvis.stitch.panoptic import decode_labels, paint, paint_over, painting_order
from tarvis.structures import InputError, Reference, Track, VideoResult
from tarvis.video.visualize import contact_sheet, overlay, panoptic_overlay

LEAST_SIDE, MOST_SIDE = 240, 1920
"""Videos whose shorter side is smaller are enlarged so that names can be read, up to MOST_SIDE."""

HUGE_SIDE = 4096
"""A larger video is shrunk to this in pictures: the MP4 codec takes little more."""

CELL_WIDTH = 400
"""Of a picture on the contact sheet."""

SHEET_FRAMES = 12
"""How many frames, evenly spread, the contact sheet shows."""


class Painted(NamedTuple):
    """A frame of a result as maps [H, W]: track ids (0 is background), and classes where there is stuff."""

    ids: IdMap
    semantic: NDArray[np.uint8] | None


def shown_tracks(result: VideoResult, min_score: float = 0.0) -> list[Track]:
    """The tracks with a score of at least `min_score` or without one, in `painting_order`."""
    return painting_order(t for t in result.tracks if t.score is None or t.score >= min_score)


def painted(result: VideoResult, tracks: Sequence[Track], frame: int) -> Painted:
    """A frame with the masks of `tracks`, later ones on top."""
    if result.stuff:
        semantic, ids = paint_over(decode_labels(result.stuff[frame]), tracks, frame)
        return Painted(ids, semantic)
    return Painted(paint(result.size, tracks, frame), None)


class Overlay:
    """`overlay.mp4` and `contact_sheet.png` in the folder `out`; they are whole once the block has ended.

    Args:
        tracks: those to show; of overlapping masks the upper one is seen.
        classes: of the labels (vis, vps); gives names, and colours of stuff.
        references: objects given by the user; their points are marked on their frames.

    Raises:
        ValueError: without `classes` for a panoptic result.
        InputError: this OpenCV cannot write MP4 files.
    """

    def __init__(
        self,
        result: VideoResult,
        tracks: Sequence[Track],
        out: Path,
        *,
        fps: float = 10.0,
        classes: ClassTable | None = None,
        references: Sequence[Reference] = (),
    ) -> None:
        if result.stuff and classes is None:
            raise ValueError("a panoptic result needs its class table for names and colours")
        self._tracks = tracks
        self._out = out
        self._classes = classes
        self._references = references
        self._labels = {track.id: _title(track, classes) for track in tracks}
        shown = np.linspace(0, result.num_frames - 1, min(SHEET_FRAMES, result.num_frames))
        self._on_sheet = set(shown.round().astype(int).tolist())
        self._sheet: dict[str, Picture] = {}
        self._video = _Video(out / "overlay.mp4", fps)

    def __enter__(self) -> Overlay:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._video.close()
        if kind is None and self._sheet:
            sheet = contact_sheet(list(self._sheet.values()), titles=list(self._sheet))
            (self._out / "contact_sheet.png").write_bytes(encode_rgb(sheet))

    def add(self, frame: int, image: Picture, shown: Painted) -> None:
        """Draw the next frame, of which `image` is the picture at the original size."""
        points = {r.id: r.point for r in self._references if r.frame == frame and r.point is not None}
        picture = self._picture(image, shown, points)
        self._video.write(picture)
        if frame in self._on_sheet:
            self._sheet[str(frame)] = _at_most(picture, CELL_WIDTH)

    def _picture(self, image: Picture, shown: Painted, points: Mapping[int, tuple[float, float]]) -> Picture:
        """The frame with the tracks over it, resized if small or huge."""
        height, width = image.shape[:2]
        factor: float = max(1, min(-(-LEAST_SIDE // min(height, width)), MOST_SIDE // max(height, width)))
        factor = min(factor, HUGE_SIDE / max(height, width))
        size = max(1, round(factor * width)), max(1, round(factor * height))

        def resized(x: NDArray[Any], how: int = cv2.INTER_NEAREST) -> NDArray[Any]:
            return x if factor == 1 else cv2.resize(x, size, interpolation=how)

        image = resized(image, cv2.INTER_LINEAR if factor > 1 else cv2.INTER_AREA)
        ids = resized(shown.ids)
        present = set(np.unique(ids).tolist())
        masks = {track.id: ids == track.id for track in self._tracks if track.id in present}
        if shown.semantic is not None:
            assert self._classes is not None
            colors, names = self._classes.colors, self._classes.names
            semantic = resized(shown.semantic)
            return panoptic_overlay(image, semantic, masks, colors=colors, names=names, labels=self._labels)
        # pixel centres: (x, y) is the middle of a pixel, in the enlarged picture of a block of pixels
        points = {k: (factor * (x + 0.5) - 0.5, factor * (y + 0.5) - 0.5) for k, (x, y) in points.items()}
        return overlay(image, masks, labels=self._labels, points=points)


def write_overlays(
    result: VideoResult, frames: Iterable[Picture], out: Path, *, min_score: float = 0.0, **options: Any
) -> None:
    """An `Overlay` of a whole video.

    Args:
        frames: all of the video's, RGB uint8 at the original size.
        min_score: tracks below are not shown.
        options: those of `Overlay`.

    Raises:
        ValueError: more or fewer frames than the result has; also as `Overlay`.
    """
    tracks = shown_tracks(result, min_score)
    with Overlay(result, tracks, out, **options) as pictures:
        for frame, image in zip(range(result.num_frames), frames, strict=True):
            pictures.add(frame, image, painted(result, tracks, frame))


def _title(track: Track, classes: ClassTable | None) -> str:
    """The id of an object that the user gave; class and score of one that was found."""
    if track.label is None:
        return str(track.id)
    name = str(track.label) if classes is None else classes.names[track.label]
    return name if track.score is None else f"{name} {track.score:.2f}"


def _at_most(picture: Picture, width: int) -> Picture:
    h, w = picture.shape[:2]
    if w <= width:
        return picture
    size = width, max(1, h * width // w)
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


class _Video:
    """An MP4 file, opened with the first picture."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path = path
        self.fps = fps
        self._writer: cv2.VideoWriter | None = None
        # OpenCV crashes on some names, and takes ASCII ones everywhere
        self._private = None if str(path).isascii() else TemporaryDirectory()
        self._file = path if self._private is None else Path(self._private.name, "video.mp4")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.release()
        if self._private is not None:
            if self._file.exists():
                shutil.move(self._file, self.path)
            self._private.cleanup()

    def write(self, picture: Picture) -> None:
        h, w = picture.shape[:2]
        # most players want even sides
        even = cv2.copyMakeBorder(picture, 0, h % 2, 0, w % 2, cv2.BORDER_REPLICATE)
        if self._writer is None:
            size = even.shape[1], even.shape[0]
            self._writer = cv2.VideoWriter(str(self._file), cv2.VideoWriter.fourcc(*"mp4v"), self.fps, size)
            if not self._writer.isOpened():
                raise InputError(f"{self.path.name}: this OpenCV build cannot write MP4 videos (codec mp4v)")
        self._writer.write(cv2.cvtColor(even, cv2.COLOR_RGB2BGR))
