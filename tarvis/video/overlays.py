"""A result to look at: `overlay.mp4` and `contact_sheet.png`, drawn frame by frame."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import av
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
"""A larger video is shrunk to this in pictures: browsers play little more."""

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
        fps, sound, starts: as `VideoFile` takes them.
        classes: of the labels (vis, vps); gives names, and colours of stuff.
        references: objects given by the user; their points are marked on their frames.

    Raises:
        ValueError: without `classes` for a panoptic result.
        InputError: this PyAV cannot write H.264.
    """

    def __init__(
        self,
        result: VideoResult,
        tracks: Sequence[Track],
        out: Path,
        *,
        fps: float | None = None,
        sound: Path | None = None,
        starts: float = 0.0,
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
        self._opened = ExitStack()
        self._video_of = partial(VideoFile, fps=fps, sound=sound, starts=starts)

    def __enter__(self) -> Overlay:
        with self._opened as stack:
            file = stack.enter_context((self._out / "overlay.mp4").open("wb"))
            self._video = stack.enter_context(self._video_of(file))
            self._opened = stack.pop_all()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._opened.close()
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


class VideoFile:
    """An MP4 (H.264) with the sound of the source, opened with the first picture [H, W, 3], RGB uint8.

    Args:
        file: open for writing, able to seek.
        fps: of the pictures.
        sound: a file whose sound is taken, if it has any that an MP4 takes.
        starts: when the first picture is shown in `sound`, in seconds.

    Raises:
        InputError: this PyAV cannot write H.264.
    """

    def __init__(
        self, file: IO[bytes], fps: float | None, *, sound: Path | None = None, starts: float = 0.0
    ) -> None:
        self._container = av.open(file, "w", format="mp4")
        self._rate = max(Fraction(fps or 10.0).limit_denominator(1001), Fraction(1, 1001))
        self._sound, self._starts = sound, starts
        self._stream: Any = None
        self._source: Any = None
        self._pictures = 0

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._stream is not None:
                self._container.mux(self._stream.encode())
            if self._source is not None:
                self._copy_sound()
            self._container.close()
        finally:
            if self._source is not None:
                self._source.close()

    def write(self, picture: Picture) -> None:
        h, w = picture.shape[:2]
        # players want even sides
        even = cv2.copyMakeBorder(picture, 0, h % 2, 0, w % 2, cv2.BORDER_REPLICATE)
        if self._stream is None:
            self._open(even.shape[0], even.shape[1])
        frame = av.VideoFrame.from_ndarray(np.asarray(even, np.uint8), format="rgb24")
        self._container.mux(self._stream.encode(frame))
        self._pictures += 1

    def _open(self, height: int, width: int) -> None:
        options = {"crf": "20", "preset": "veryfast"}
        try:
            self._stream = self._container.add_stream("libx264", rate=self._rate, options=options)
        except (av.FFmpegError, ValueError):
            raise InputError("this PyAV build cannot write MP4 videos (codec libx264)") from None
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._source = _sound_of(self._sound)
        if self._source is not None:
            self._track = self._container.add_stream_from_template(self._source.streams.audio[0])

    def _copy_sound(self) -> None:
        """The sound while the pictures are shown; of a source that breaks off, what comes before."""
        end = self._starts + float(self._pictures / self._rate)
        packets = self._source.demux(audio=0)
        while (packet := _next_packet(packets)) is not None:
            if packet.dts is None or not self._starts <= packet.pts * packet.time_base < end:
                continue
            shift = round(self._starts / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = self._track
            self._container.mux(packet)


def _next_packet(packets: Iterator[Any]) -> Any:
    try:
        return next(packets, None)
    except av.FFmpegError:
        return None


def _sound_of(path: Path | None) -> Any:
    """The source opened for its sound; None where it has none that an MP4 takes."""
    if path is None or not path.is_file():
        return None
    try:
        container = av.open(str(path.absolute()))
    except (av.FFmpegError, OSError, ValueError):
        return None
    streams = container.streams.audio
    if streams and streams[0].codec_context.name in ("aac", "mp3", "ac3", "opus", "flac"):
        return container
    container.close()
    return None
