"""The result of one video as files: pictures of ids and `tracks.json`.

    with ResultFiles(result, Path("out"), names=names, classes=class_table("ovis")) as files:
        for frame in range(result.num_frames):
            files.add(frame)

A folder then holds
    masks/NAME.png     object ids (vis, vos, pet): indexed, 0 is background; grey of 16 bits if ids exceed 254
    panoptic/NAME.png  RGB (vps): R is the class index, the object id is 256 G + B, 0 for stuff
    tracks.json        every object: id, class, score, and at each frame its mask in COCO's code, its box
                       (left, top, width, height) and its area in pixels, or null three times;
                       "complete" is false where a run ended before the video did, after "num_frames" frames
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tarvis.datasets.classes import ClassTable
from tarvis.datasets.kitti_step import step_encoding
from tarvis.files import rle
from tarvis.files.atomic import write_json
from tarvis.files.folders import output_name
from tarvis.files.pictures import (
    IdMap,
    Picture,
    encode_ids,
    encode_rgb,
    read_ids,
    read_image,
    voc_palette,
)
from tarvis.files.records import Entry, read_json, read_masks
from tarvis.stitch.panoptic import encode_labels
from tarvis.structures import LONGEST_SIDE, InputError, Size, Track, VideoResult
from tarvis.video.overlays import Overlay, Painted, painted, shown_tracks

ENCODINGS = {
    "indexed": "palette index = id",
    "grey": "grey level of 16 bits = id",
    "panoptic": "R = category_id, 256 G + B = id, 0 for stuff",
}


@dataclass(frozen=True)
class SavedResult:
    """What `read_results` found. The `stuff` of a vps result is the whole class map, things included."""

    result: VideoResult
    names: tuple[str, ...]
    dataset: str | None


class ResultFiles:
    """The result files of one task in the folder `out`, written frame by frame.

    Masks are painted once a frame, for the picture of ids and for the overlay.

    Args:
        names: of the frames, for the pictures.
        classes: of the labels (vis, vps).
        min_score: tracks below stay out of the pictures; `tracks.json` has them all.
        is_complete: whether `result` is of all the video. It is not said either where the block ends before
            the last frame: files are then of the frames that were added.
        masks: whether to write the pictures of ids.
        about: what else `tracks.json` says of the run.
        overlay: options of `tarvis.video.overlays.Overlay`; None draws no overlay.
    """

    def __init__(
        self,
        result: VideoResult,
        out: Path,
        *,
        names: Sequence[str],
        classes: ClassTable | None = None,
        min_score: float = 0.0,
        is_complete: bool = True,
        masks: bool = True,
        about: Mapping[str, Any] | None = None,
        overlay: Mapping[str, Any] | None = None,
    ) -> None:
        assert len(names) == result.num_frames, (len(names), result.num_frames)
        self._result, self._out, self._names, self._classes = result, out, names, classes
        self._tracks = shown_tracks(result, min_score)
        if result.stuff:
            self._encoding = "panoptic"
        else:  # 255 is void to readers
            self._encoding = "grey" if any(track.id > 254 for track in self._tracks) else "indexed"
        self._folder = out / ("panoptic" if self._encoding == "panoptic" else "masks")
        self._palette = voc_palette()
        self._is_complete = is_complete
        self._has_masks, self._about = masks, about or {}
        self._written = 0
        self._overlay = None
        if overlay is not None:
            self._overlay = Overlay(result, self._tracks, out, classes=classes, **overlay)

    def __enter__(self) -> ResultFiles:
        (self._folder if self._has_masks else self._out).mkdir(parents=True, exist_ok=not self._has_masks)
        if self._overlay is not None:
            self._overlay.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._overlay is not None:
            self._overlay.__exit__(*raised)
        if raised[0] is None:
            self._write_tracks()

    def add(self, frame: int, image: Picture | None = None) -> None:
        """Write the next frame; `image` is its picture, which an overlay needs."""
        if self._has_masks or self._overlay is not None:
            shown = painted(self._result, self._tracks, frame)
            if self._has_masks:
                self._write_ids(frame, shown)
            if self._overlay is not None:
                assert image is not None
                self._overlay.add(frame, image, shown)
        self._written += 1

    def _write_ids(self, frame: int, shown: Painted) -> None:
        if shown.semantic is not None:
            data = encode_rgb(step_encoding(shown.semantic, shown.ids.astype(np.uint16)))
        else:
            ids: IdMap = (
                shown.ids.astype(np.uint16) if self._encoding == "grey" else shown.ids.astype(np.uint8)
            )
            data = encode_ids(ids, self._palette)
        (self._folder / f"{self._names[frame]}.png").write_bytes(data)

    def _write_tracks(self) -> None:
        result, classes, num_frames = self._result, self._classes, self._written
        tree: dict[str, Any] = {
            "task": result.task,
            "dataset": classes.name if classes else None,
            "size": list(result.size),
            "num_frames": num_frames,
            "complete": self._is_complete and num_frames == result.num_frames,
            "encoding": self._encoding,
            "encoding_note": ENCODINGS[self._encoding],
            "frame_names": list(self._names[:num_frames]),
            **self._about,
        }
        if result.stuff and classes:
            tree["stuff"] = [{"category_id": k, "category": classes.names[k]} for k in classes.stuff]
        tree["tracks"] = [_entry(track, num_frames, classes) for track in result.tracks]
        write_json(self._out / "tracks.json", tree)


def read_results(folder: Path) -> SavedResult:
    """Read what `ResultFiles` wrote, checking pictures and tracks against each other.

    Raises:
        InputError: something is missing, damaged, or contradicts the rest; the message names the file.
    """
    path = folder / "tracks.json"
    root = read_json(path)
    (height, width), num_frames, tracks = read_tracks(root)
    names = tuple(_frame_name(name) for name in root["frame_names"].entries())
    task, encoding, dataset = root["task"].text(), root["encoding"].text(), root.get("dataset")
    ids = {track.id for track in tracks}
    if len(ids) != len(tracks) or len(names) != num_frames or encoding not in ENCODINGS:
        raise InputError(f"{path}: ids, frame names or encoding contradict each other")

    stuff: dict[int, bytes] = {}
    for frame, name in enumerate(names):
        if encoding == "panoptic":
            picture = folder / "panoptic" / f"{name}.png"
            rgb = read_image(picture)
            shown: IdMap = np.asarray(256 * rgb[..., 1].astype(np.uint16) + rgb[..., 2], np.uint16)
            stuff[frame] = encode_labels(np.ascontiguousarray(rgb[..., 0]))
        else:
            picture = folder / "masks" / f"{name}.png"
            shown = read_ids(picture)
        if shown.shape != (height, width):
            raise InputError(f"{picture}: {shown.shape[1]}x{shown.shape[0]}, the result is {width}x{height}")
        if unknown := set(np.unique(shown).tolist()) - ids - {0}:
            raise InputError(f"{picture}: shows ids that tracks.json does not have: {sorted(unknown)}")
    result = VideoResult(task, (height, width), num_frames, tracks, stuff)
    return SavedResult(result, names, None if dataset is None else dataset.text())


def read_tracks(root: Entry) -> tuple[Size, int, tuple[Track, ...]]:
    """Size of the frames, their number, and the tracks of a `tracks.json`.

    Raises:
        InputError: it is no such file, or is damaged.
    """
    height, width = (side.integer(1, LONGEST_SIDE) for side in root["size"].entries(2, "sides"))
    num_frames = root["num_frames"].integer()
    tracks = tuple(_track(entry, (height, width), num_frames) for entry in root["tracks"].entries())
    return (height, width), num_frames, tracks


def _entry(track: Track, num_frames: int, classes: ClassTable | None) -> dict[str, Any]:
    masks = [track.masks.get(frame) for frame in range(num_frames)]
    seen = [mask if mask is not None and rle.area(mask) else None for mask in masks]
    return {
        "id": track.id,
        "category_id": track.label,
        "category": None if track.label is None or classes is None else classes.names[track.label],
        "score": track.score,
        "segmentations": [rle.to_json(mask) for mask in seen],
        "bboxes": [None if mask is None else rle.box(mask) for mask in seen],
        "areas": [None if mask is None else rle.area(mask) for mask in seen],
    }


def _frame_name(entry: Entry) -> str:
    if output_name(entry.text()) != entry.value:
        raise entry.expected("the name of a picture of ours")
    return entry.text()


def _track(entry: Entry, size: Size, num_frames: int) -> Track:
    """The inverse of `_entry`."""
    listed = entry["segmentations"].entries(num_frames, "segmentations, one a frame")
    shown = {frame: mask for frame, mask in enumerate(listed) if mask.value is not None}
    masks = dict(zip(shown, read_masks([*shown.values()], size), strict=True))
    label, score = entry.get("category_id"), entry.get("score")
    return Track(
        entry["id"].integer(),
        masks,
        None if label is None else label.integer(),
        None if score is None else score.number(),
    )
