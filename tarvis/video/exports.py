"""Masks of objects as the files that other tools read.

Categories are the objects, or where classes were found those classes, under the ids of their benchmark.

coco         JSON of COCO: a picture a frame, an annotation a mask, its run-length code; `track_id` joins them
youtube_vis  JSON of YouTube-VIS: a video, an annotation an object
png          indexed PNGs as DAVIS has them, in a zip
yolo         a text file a frame, a polygon a line, as YOLO's segmentation has them, in a zip
mots         a text file, a line a mask: frame, id, class (1 for objects), height, width, code
overlay      MP4 (H.264) of the frames with the masks over them, with the sound of the source
cutout       PNGs of the objects on nothing, in a zip
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tarvis.datasets.classes import ClassTable
from tarvis.files import rle
from tarvis.files.atomic import whole_file
from tarvis.files.pictures import Picture, encode_ids, voc_palette
from tarvis.structures import RLE, InputError, Track, VideoResult
from tarvis.video.overlays import VideoFile, painted, shown_tracks
from tarvis.video.visualize import overlay

LEAST_CORNERS = 3


@dataclass(frozen=True)
class Export:
    """A result to write.

    Args:
        result: its stuff, if any, is left out.
        frame_names: of its frames, without suffix.
        frames: makes a pass over the frames, RGB uint8.
        names: of the objects, by id; others are called "object ID".
        fps: of the source.
        sound: a file whose sound an overlay takes, if it has any.
        classes: of the labels (vis, vps).
        numbers: of the frames in the source; by default they count from 0.
    """

    result: VideoResult
    frame_names: Sequence[str]
    frames: Callable[[], Iterable[Picture]]
    names: Mapping[int, str] = field(default_factory=dict)
    fps: float | None = None
    sound: Path | None = None
    classes: ClassTable | None = None
    numbers: Sequence[int] | None = None

    def name(self, track: Track) -> str:
        return self.names.get(track.id) or f"object {track.id}"

    def number(self, frame: int) -> int:
        """What the source calls a frame."""
        return frame if self.numbers is None else self.numbers[frame]

    @property
    def categories(self) -> dict[int, str]:
        """Names by id."""
        if self.classes is None:
            return {number: self.name(track) for number, track in enumerate(self.tracks, 1)}
        return dict(zip(self.classes.ids, self.classes.names, strict=True))

    def category(self, number: int, track: Track) -> int:
        """The category of the track of a number from 1."""
        return number if self.classes is None or track.label is None else self.classes.ids[track.label]

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
        {
            "id": frame + 1,
            "file_name": f"{name}.jpg",
            "height": height,
            "width": width,
            "frame": export.number(frame),
        }
        for frame, name in enumerate(export.frame_names)
    ]
    annotations = [
        {
            "id": 0,
            "image_id": frame + 1,
            "category_id": export.category(number, track),
            "track_id": track.id,
            **_scored(track),
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
                "category_id": export.category(number, track),
                "track_id": track.id,
                **_scored(track),
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
    (height, width), categories = export.result.size, export.categories
    places = {category: place for place, category in enumerate(categories)}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for frame, name in enumerate(export.frame_names):
            lines = []
            for number, track, mask in export.masks(frame):
                corners = _outline(rle.decode(mask))
                if len(corners):
                    outline = (f"{x / width:.6f} {y / height:.6f}" for x, y in corners)
                    lines.append(" ".join((str(places[export.category(number, track)]), *outline)))
            archive.writestr(f"labels/{name}.txt", "".join(f"{line}\n" for line in lines))
        names = "".join(f"  {k}: {json.dumps(name)}\n" for k, name in enumerate(categories.values()))
        archive.writestr("data.yaml", f"names:\n{names}")


def _mots(export: Export, file: IO[bytes]) -> None:
    (height, width), tracks = export.result.size, shown_tracks(export.result)
    for frame in range(export.result.num_frames):
        ids = painted(export.result, tracks, frame).ids  # masks of a frame may not overlap
        for track in tracks:
            if (mask := ids == track.id).any():
                code = rle.encode(mask[None])[0]["counts"].decode("ascii")
                kind = 1 if export.classes is None else export.category(1, track)
                line = f"{export.number(frame)} {track.id} {kind} {height} {width} {code}\n"
                file.write(line.encode())


def _overlay(export: Export, file: IO[bytes]) -> None:
    tracks = shown_tracks(export.result)
    labels = {track.id: export.name(track) for track in tracks}
    with VideoFile(file, export.fps, sound=export.sound) as video:
        for frame, picture in zip(range(export.result.num_frames), export.frames(), strict=False):
            ids = painted(export.result, tracks, frame).ids
            shown = {track.id: ids == track.id for track in tracks if frame in track.masks}
            video.write(overlay(picture, shown, labels=labels))


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
    return [{"id": id, "name": name} for id, name in export.categories.items()]


def _scored(track: Track) -> dict[str, float]:
    return {} if track.score is None else {"score": track.score}


def _measured(mask: RLE) -> dict[str, Any]:
    """Area and box (left, top, width, height) of a mask in pixels."""
    return {"area": rle.area(mask), "bbox": rle.box(mask)}


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
