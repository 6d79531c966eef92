"""The result of one video as files: pictures of ids and `tracks.json`.

    with staged(Path("out")) as folder:
        write_results(result, folder, names=names, classes=class_table("ovis"))

A folder then holds
    masks/NAME.png     object ids (vis, vos, pet): indexed, 0 is background; grey of 16 bits if ids exceed 254
    panoptic/NAME.png  RGB (vps): R is the class index, the object id is 256 G + B, 0 for stuff
    tracks.json        every object: id, class, score, and its mask at each frame in COCO's code, or null
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tarvis.datasets.classes import ClassTable
from tarvis.datasets.kitti_step import step_encoding
from tarvis.files import rle
from tarvis.files.png import IdMap, encode_ids, read_ids, voc_palette
from tarvis.stitch.panoptic import decode_labels, encode_labels, fuse, paint
from tarvis.structures import RLE, InputError, Track, VideoResult
from tarvis.video.frames import read_image

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


@contextmanager
def staged(
    out: str | Path, *, overwrite: bool = False, marks: Sequence[str] = ("tracks.json", "*/tracks.json")
) -> Iterator[Path]:
    """A new folder that becomes `out` when the block ends well, and vanishes when it does not.

    Args:
        overwrite: replace `out` if it holds what an earlier run has made; nothing else is ever removed.
        marks: patterns of files; a folder with one of them was made by an earlier run.

    Raises:
        InputError: `out` is in use, or cannot be written.
    """
    out = Path(os.path.realpath(out))
    staging = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    missing = [parent for parent in out.parents if not os.path.exists(parent)]  # the deepest first
    try:
        if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
            if not overwrite:
                raise InputError(f"{out}: already exists; name another folder, or ask to overwrite it")
            if not any(found for mark in marks for found in out.glob(mark)):
                raise InputError(f"{out}: will not be overwritten, there is no {marks[0]} in it")
        staging.mkdir(parents=True)
        yield staging
        _replace(staging, out)
    except OSError as error:
        path = Path(str(error.filename))
        is_ours = path in (out, staging, *staging.parents) or staging in path.parents
        if not is_ours and error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a full disk names no file
            raise
        raise InputError(f"{out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # not made, or no longer empty
                parent.rmdir()


def write_results(
    result: VideoResult,
    out: Path,
    *,
    names: Sequence[str],
    classes: ClassTable | None = None,
    min_score: float = 0.0,
) -> None:
    """Write pictures of ids and `tracks.json` into the folder `out`; one frame is in memory at a time.

    Args:
        names: of the frames, for the pictures.
        classes: of the labels (vis, vps).
        min_score: tracks below stay out of the pictures; `tracks.json` has them all.
    """
    assert len(names) == result.num_frames, (len(names), result.num_frames)
    tracks = painting_order(result, min_score)
    if result.stuff:
        encoding = "panoptic"
    else:
        encoding = "grey" if any(track.id > 254 for track in tracks) else "indexed"  # 255 is void to readers
    folder = out / ("panoptic" if encoding == "panoptic" else "masks")
    folder.mkdir()
    for frame, name in enumerate(names):
        if encoding == "panoptic":
            semantic, instance = fuse(decode_labels(result.stuff[frame]), tracks, frame)
            rgb = step_encoding(semantic, instance)
            data = cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].tobytes()
        else:
            ids = paint(result.size, tracks, frame)
            data = encode_ids(ids if encoding == "grey" else ids.astype(np.uint8), voc_palette())
        (folder / f"{name}.png").write_bytes(data)

    tree: dict[str, Any] = {
        "task": result.task,
        "dataset": classes.name if classes else None,
        "size": list(result.size),
        "num_frames": result.num_frames,
        "encoding": encoding,
        "encoding_note": ENCODINGS[encoding],
        "frame_names": list(names),
    }
    if result.stuff and classes:
        tree["stuff"] = [{"category_id": k, "category": classes.names[k]} for k in classes.stuff]
    tree["tracks"] = [_entry(track, result.num_frames, classes) for track in result.tracks]
    with (out / "tracks.json").open("w", encoding="utf-8") as file:
        json.dump(tree, file)


def painting_order(result: VideoResult, min_score: float = 0.0) -> list[Track]:
    """The tracks to show, later ones on top: by rising score, or as they come where there are no scores."""
    shown = [track for track in result.tracks if track.score is None or track.score >= min_score]
    return sorted(shown, key=lambda track: track.score or 0.0)


def read_results(folder: Path) -> SavedResult:
    """Read what `write_results` wrote, checking pictures and tracks against each other.

    Raises:
        InputError: something is missing, damaged, or contradicts the rest; the message names the file.
    """
    path = folder / "tracks.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        (height, width), num_frames, names = tree["size"], tree["num_frames"], tuple(tree["frame_names"])
        tracks = tuple(_track(entry, (height, width), num_frames) for entry in tree["tracks"])
        task, dataset, encoding = tree["task"], tree["dataset"], tree["encoding"]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a file of tracks ({type(error).__name__}: {error})") from None
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
            try:
                shown = read_ids(picture)
            except ValueError as error:
                raise InputError(str(error)) from None
        if shown.shape != (height, width):
            raise InputError(f"{picture}: {shown.shape[1]}x{shown.shape[0]}, the result is {width}x{height}")
        if unknown := set(np.unique(shown).tolist()) - ids - {0}:
            raise InputError(f"{picture}: shows ids that tracks.json does not have: {sorted(unknown)}")
    return SavedResult(VideoResult(task, (height, width), num_frames, tracks, stuff), names, dataset)


def _entry(track: Track, num_frames: int, classes: ClassTable | None) -> dict[str, Any]:
    codes = (track.masks.get(frame) for frame in range(num_frames))
    return {
        "id": track.id,
        "category_id": track.label,
        "category": None if track.label is None or classes is None else classes.names[track.label],
        "score": track.score,
        "segmentations": [
            {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}
            if code is not None and rle.area(code)
            else None
            for code in codes
        ],
    }


def _track(entry: dict[str, Any], size: tuple[int, int], num_frames: int) -> Track:
    """The inverse of `_entry`."""
    masks: dict[int, RLE] = {}
    if len(entry["segmentations"]) != num_frames:
        raise ValueError(
            f"track {entry['id']} has {len(entry['segmentations'])} masks for {num_frames} frames"
        )
    for frame, code in enumerate(entry["segmentations"]):
        if code is not None:
            if tuple(code["size"]) != size:
                raise ValueError(f"track {entry['id']}, frame {frame}: mask of size {code['size']}")
            masks[frame] = RLE(size=list(size), counts=code["counts"].encode("ascii"))
    return Track(entry["id"], masks, entry["category_id"], entry["score"])


def _replace(staging: Path, out: Path) -> None:
    """Rename `staging` to `out`, whose old content is moved aside before and removed after."""
    old = staging.with_name(f"{staging.name}.old")
    if out.exists():
        out.rename(old)
    try:
        staging.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
