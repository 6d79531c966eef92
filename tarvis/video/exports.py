"""Masks of followed objects as the files that other tools read.

coco         JSON of COCO: a picture a frame, an annotation a mask, its run-length code; `track_id` joins them
youtube_vis  JSON of YouTube-VIS: a video, an annotation an object
png          indexed PNGs as DAVIS has them, in a zip
yolo         a text file a frame, a polygon a line, as YOLO's segmentation has them, in a zip
mots         a text file, a line a mask: frame, id, class (1), height, width, code
overlay      MP4 (H.264) of the frames with the masks over them, with the sound of the source
cutout       PNGs of the objects on nothing, in a zip
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from tarvis.files import rle
from tarvis.files.atomic import whole_file
from tarvis.files.pictures import Picture, encode_ids, voc_palette
from tarvis.structures import RLE, InputError, Track, VideoResult
from tarvis.video.overlays import painted, shown_tracks
from tarvis.video.visualize import overlay

LEAST_CORNERS = 3


@dataclass(frozen=True)
class Export:
    """A result to write.

    Args:
        result: of VOS or PET, that is without stuff.
        frame_names: of its frames, without suffix.
        frames: makes a pass over the frames, RGB uint8.
        names: of the objects, by id; others are called "object ID".
        fps: of the source.
        sound: a file whose sound an overlay takes, if it has any.
    """

    result: VideoResult
    frame_names: Sequence[str]
    frames: Callable[[], Iterable[Picture]]
    names: Mapping[int, str] = field(default_factory=dict)
    fps: float | None = None
    sound: Path | None = None

    def name(self, track: Track) -> str:
        return self.names.get(track.id) or f"object {track.id}"

    @property
    def tracks(self) -> tuple[Track, ...]:
        return self.result.tracks

    def masks(self, frame: int) -> Iterator[tuple[int, Track, RLE]]:
        """Number from 1, track and mask of the objects that a frame shows."""
        for number, track in enumerate(self.tracks, 1):
            if frame in track.masks and rle.area(track.masks[frame]):
                yield number, track, track.masks[frame]


def write_export(export: Export, kind: str, path: Path) -> None:
    """Write one of `FORMATS` at `path`, whole or not at all.

    Raises:
        InputError: a format that is not known; a frame that cannot be read.
    """
    if kind not in FORMATS:
        raise InputError(f"unknown format {kind!r}; known: {', '.join(FORMATS)}")
    with whole_file(path) as file:
        FORMATS[kind].write(export, file)


def _coco(export: Export, file: IO[bytes]) -> None:
    height, width = export.result.size
    images = [
        {"id": frame + 1, "file_name": f"{name}.jpg", "height": height, "width": width, "frame": frame}
        for frame, name in enumerate(export.frame_names)
    ]
    annotations = [
        {
            "id": 0,
            "image_id": frame + 1,
            "category_id": number,
            "track_id": track.id,
            **_measured(mask),
            "segmentation": rle.to_json(mask),
            "iscrowd": 0,
        }
        for frame in range(export.result.num_frames)
        for number, track, mask in export.masks(frame)
    ]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    tree = {"images": images, "annotations": annotations, "categories": _categories(export)}
    file.write(json.dumps(tree).encode())


def _youtube_vis(export: Export, file: IO[bytes]) -> None:
    (height, width), frames = export.result.size, range(export.result.num_frames)
    video = {"id": 1, "height": height, "width": width, "length": len(frames)}
    video["file_names"] = [f"video/{name}.jpg" for name in export.frame_names]  # type: ignore[assignment]
    annotations = []
    for number, track in enumerate(export.tracks, 1):
        found = [track.masks.get(frame) for frame in frames]
        found = [mask if mask is not None and rle.area(mask) else None for mask in found]
        measured = [None if mask is None else _measured(mask) for mask in found]
        annotations.append(
            {
                "id": number,
                "video_id": 1,
                "category_id": number,
                "track_id": track.id,
                "segmentations": [rle.to_json(mask) for mask in found],
                "areas": [None if each is None else each["area"] for each in measured],
                "bboxes": [None if each is None else each["bbox"] for each in measured],
                "iscrowd": 0,
                "height": height,
                "width": width,
            }
        )
    tree = {"videos": [video], "annotations": annotations, "categories": _categories(export)}
    file.write(json.dumps(tree).encode())


def _png(export: Export, file: IO[bytes]) -> None:
    tracks, palette = shown_tracks(export.result), voc_palette()
    if any(track.id > 254 for track in tracks):
        raise InputError("indexed PNGs have room for objects 1 to 254; take another format")
    with zipfile.ZipFile(file, "w") as archive:
        for frame, name in enumerate(export.frame_names):
            ids = painted(export.result, tracks, frame).ids.astype(np.uint8)
            archive.writestr(f"{name}.png", encode_ids(ids, palette))


def _yolo(export: Export, file: IO[bytes]) -> None:
    height, width = export.result.size
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for frame, name in enumerate(export.frame_names):
            lines = []
            for number, _, mask in export.masks(frame):
                corners = _outline(rle.decode(mask))
                if len(corners):
                    places = (f"{x / width:.6f} {y / height:.6f}" for x, y in corners)
                    lines.append(" ".join((str(number - 1), *places)))
            archive.writestr(f"labels/{name}.txt", "".join(f"{line}\n" for line in lines))
        names = "".join(f"  {k}: {json.dumps(export.name(t))}\n" for k, t in enumerate(export.tracks))
        archive.writestr("data.yaml", f"names:\n{names}")


def _mots(export: Export, file: IO[bytes]) -> None:
    (height, width), tracks = export.result.size, shown_tracks(export.result)
    for frame in range(export.result.num_frames):
        ids = painted(export.result, tracks, frame).ids  # masks of a frame may not overlap
        for track in tracks:
            if (mask := ids == track.id).any():
                code = rle.encode(mask[None])[0]["counts"].decode("ascii")
                file.write(f"{frame} {track.id} 1 {height} {width} {code}\n".encode())


def _overlay(export: Export, file: IO[bytes]) -> None:
    height, width = (side + side % 2 for side in export.result.size)
    tracks = shown_tracks(export.result)
    labels = {track.id: export.name(track) for track in tracks}
    with av.open(file, "w", format="mp4") as container:
        rate = Fraction(export.fps or 10.0).limit_denominator(1001)
        video = container.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "veryfast"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        with _sound(export.sound) as source:
            sound = None if source is None else container.add_stream_from_template(source.streams.audio[0])
            for frame, picture in zip(range(export.result.num_frames), export.frames(), strict=False):
                ids = painted(export.result, tracks, frame).ids
                shown = {track.id: ids == track.id for track in tracks if frame in track.masks}
                drawn = overlay(picture, shown, labels=labels)
                h, w = drawn.shape[:2]
                even = cv2.copyMakeBorder(drawn, 0, height - h, 0, width - w, cv2.BORDER_REPLICATE)
                encoded = av.VideoFrame.from_ndarray(np.asarray(even, np.uint8), format="rgb24")
                container.mux(video.encode(encoded))
            container.mux(video.encode())
            if source is not None:
                for packet in source.demux(audio=0):
                    if packet.dts is not None:
                        packet.stream = sound
                        container.mux(packet)


class _sound:
    """The source opened for its sound; None where it has none that an MP4 takes."""

    def __init__(self, path: Path | None) -> None:
        self._container = None
        if path is not None and path.is_file():
            try:
                self._container = av.open(str(path.absolute()))
            except (av.FFmpegError, OSError, ValueError):
                return
            streams = self._container.streams.audio
            if not streams or streams[0].codec_context.name not in ("aac", "mp3", "ac3", "opus", "flac"):
                self.__exit__()

    def __enter__(self) -> Any:
        return self._container

    def __exit__(self, *_: object) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None


def _cutout(export: Export, file: IO[bytes]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        names = zip(export.frame_names, export.frames(), strict=False)
        for frame, (name, picture) in enumerate(names):
            opacity = np.zeros(picture.shape[:2], np.uint8)
            for _, _, mask in export.masks(frame):
                opacity[rle.decode(mask)] = 255
            pixels = np.dstack((picture[..., ::-1], opacity))
            archive.writestr(f"{name}.png", cv2.imencode(".png", pixels)[1].tobytes())


def _categories(export: Export) -> list[dict[str, Any]]:
    return [{"id": number, "name": export.name(track)} for number, track in enumerate(export.tracks, 1)]


def _measured(mask: RLE) -> dict[str, Any]:
    """Area and box (left, top, width, height) of a mask in pixels."""
    rows, columns = (np.flatnonzero(rle.decode(mask).any(axis)) for axis in (1, 0))
    left, top = int(columns[0]), int(rows[0])
    box = [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
    return {"area": rle.area(mask), "bbox": box}


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """One polygon [N, 2] around all parts of a mask, (x, y) in pixels: from the first to each and back."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    parts = [each[:, 0] for each in contours if len(each) >= LEAST_CORNERS]
    if not parts:
        return np.zeros((0, 2), np.int32)
    home = parts[0][:1]
    corners = [parts[0], *(np.concatenate((home, part, part[:1], home)) for part in parts[1:])]
    return np.asarray(np.concatenate(corners), np.int32)


@dataclass(frozen=True)
class Format:
    """How a result is written; `suffix` of the file, `title` for people."""

    suffix: str
    title: str
    write: Callable[[Export, IO[bytes]], None]


FORMATS = {
    "coco": Format(".json", "COCO JSON (run-length codes)", _coco),
    "youtube_vis": Format(".json", "YouTube-VIS JSON", _youtube_vis),
    "png": Format(".zip", "Indexed PNGs (DAVIS)", _png),
    "yolo": Format(".zip", "YOLO segmentation", _yolo),
    "mots": Format(".txt", "MOTS text", _mots),
    "overlay": Format(".mp4", "Video with masks (MP4)", _overlay),
    "cutout": Format(".zip", "Cut-outs with alpha (PNG)", _cutout),
}
