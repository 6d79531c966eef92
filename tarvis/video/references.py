"""Objects that the user gives: masks in PNG files (VOS) and points in a JSON file (PET)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarvis.files.folders import images_among
from tarvis.files.pictures import how_turned, read_objects, warn_if_turned
from tarvis.files.records import Entry, read_json
from tarvis.structures import VOID, InputError, Reference
from tarvis.video.frames import FrameSource, ImageFrames, Part, index_of, number_of

MAX_ID = 255
"""Largest id of a given object."""

_ONE_OBJECT = re.compile(r"(\d+)@([^=]+)=(.+)")


def read_masks(items: Sequence[str | Path], source: FrameSource) -> list[Reference]:
    """Masks of the objects to follow in the video `source`, in order of frames, then ids.

    Each item is one of
        PATH           a PNG of palette indices or grey levels: a pixel's value is the id of its object, 0 is
                       background, 255 is void. The file's name says the frame (see `FrameSource.find`); a
                       single file may be called otherwise and then belongs to frame 0.
        FOLDER         such files; those of frames that the video does not have are left out.
        ID@FRAME=PATH  a PNG of this one object, wherever it is not 0. FRAME is named in the same way.
    An object that several PATHs show is taken from the first of these frames only, so that a folder with
    the annotation of every frame does not give away the answer.

    Raises:
        InputError: a file that is missing, damaged, of colours or grey levels, of another size than the
            video, or without an object; ids over 255; a frame that the video does not have; an object given
            twice at a frame.
    """
    references: list[Reference] = []
    labelled: list[tuple[int, Path, bool]] = []  # frame, file of several objects, whether named by the user
    for item in items:
        if match := _ONE_OBJECT.fullmatch(str(item)):
            id_, frame, path = int(match[1][:20]), match[2], Path(match[3])
            if not 1 <= id_ <= MAX_ID:
                raise InputError(f"{item}: id must be an integer 1 .. {MAX_ID}, got {match[1][:40]}")
            ids = _read(path, source)
            values = np.unique(ids[ids > 0]).tolist()
            if not values:
                raise InputError(f"{path}: empty mask, no pixel shows object {id_}")
            if len(values) > 1:
                warnings.warn(
                    f"{path}: object {id_} is wherever the mask is not 0, from {values[0]} to {values[-1]}; "
                    "threshold a mask of grey levels, and give a mask of several objects without ID@FRAME=",
                    stacklevel=2,
                )
            references.append(Reference(id_, _find(frame, str(item), source), torch.from_numpy(ids > 0)))
        else:
            labelled += _labelled_files(Path(item), source, alone=len(items) == 1)

    seen: set[int] = set()
    for frame_index, path, is_named in sorted(labelled):
        ids = _read(path, source)
        shown = sorted({int(i) for i in np.unique(ids)} - {0, VOID})
        if is_named and not shown:
            hint = f"; a black and white mask of one object is given as 1@FRAME={path}" if ids.any() else ""
            raise InputError(f"{path}: empty mask, all pixels are background (0) or void ({VOID}){hint}")
        if shown and shown[-1] > MAX_ID:
            raise InputError(f"{path}: object ids must be 1 .. {VOID - 1}, got {shown[-1]}")
        new = [id_ for id_ in shown if id_ not in seen]
        references += [Reference(id_, frame_index, torch.from_numpy(ids == id_)) for id_ in new]
        seen.update(new)
    if not references:
        raise InputError(f"{', '.join(map(str, items))}: empty masks, no pixel shows an object")
    return _checked(references, ", ".join(map(str, items)), source)


def read_points(path: str | Path | Sequence[Mapping[str, Any]], source: FrameSource) -> list[Reference]:
    """Points on the objects to follow in the video `source`, in order of frames, then ids.

    The JSON file, or the value, is a list of {"id": 1, "frame": 0, "x": 320, "y": 200}, or {"points": list}.
    `frame` counts from 0, in all of the source where a part of it is read, or is a string that names a frame;
    (x, y) is the pixel's column and row, fractions allowed.

    Raises:
        InputError: unreadable file, bad JSON, missing keys, wrong types, a point outside the frame, a frame
            that the video does not have, or an object given twice at a frame.
    """
    if isinstance(path, str | Path):
        root = read_json(Path(path))
    else:
        plain = [{k: _plain(v) for k, v in p.items()} if isinstance(p, Mapping) else p for p in path]
        root = Entry(plain, Path("points"))
    tree = root["points"] if isinstance(root.value, dict) and "points" in root.value else root
    if not isinstance(tree.value, list) or not tree.value:
        raise root.error('expected a list of points, or {"points": [...]}, with at least one')
    return _checked([_point(point, source) for point in tree.entries()], str(root.file), source)


def _plain(value: Any) -> Any:
    """A number of NumPy or torch as Python's own."""
    is_number = isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0
    return value.item() if is_number else value


def masks_of_ids(ids: NDArray[Any] | Tensor, source: FrameSource) -> list[Reference]:
    """The objects of an array of ids [H, W] at frame 0; 0 is background, 255 is void.

    Raises:
        InputError: an array of another shape or type, or without an object.
    """
    array = ids.cpu().numpy() if isinstance(ids, Tensor) else ids
    if array.shape != source.size or array.dtype.kind not in "bui":
        raise InputError(
            f"masks: expected integer ids {list(source.size)}, got {array.dtype} {list(array.shape)}"
        )
    shown = [int(id_) for id_ in np.unique(array) if id_ not in (0, VOID)]
    if not shown or shown[0] < 1 or shown[-1] > MAX_ID:
        raise InputError(f"masks: expected ids 1 .. {VOID - 1}, got {shown[-1] if shown else 'none'}")
    return _checked([Reference(id_, 0, torch.from_numpy(array == id_)) for id_ in shown], "masks", source)


def _labelled_files(path: Path, source: FrameSource, *, alone: bool) -> list[tuple[int, Path, bool]]:
    """Mask files of an item of `read_masks`: each with its frame, and whether the item is the file itself."""
    if path.is_dir():
        files = images_among(path.iterdir(), (".png",))
        if not files:
            raise InputError(f"{path}: no masks in this folder; looked for .png")
        found = [(source.find(file.stem), file) for file in files]
        named = [(frame, file, False) for frame, file in found if frame is not None]
        if not named:
            _find(files[0].stem, str(files[0]), source)  # raises
        return named
    if alone and source.find(path.stem) is None:
        series, own = source.name(0).rstrip("0123456789"), path.stem.rstrip("0123456789")
        if own and own != series:  # not called as a frame is, so not a frame that is missing
            return [(0, path, True)]
    return [(_find(path.stem, str(path), source), path, True)]


def _find(name: str, where: str, source: FrameSource) -> int:
    frame = source.find(name)
    if frame is None:
        known = f": {source.name(0)} .. {source.name(source.num_frames - 1)}" if source.num_frames else ""
        raise InputError(f"{where}: no frame {name} among those of {source.path}{known}")
    return frame


def _read(path: Path, source: FrameSource) -> NDArray[Any]:
    ids = read_objects(path)
    if ids.shape != source.size:
        (h, w), (frame_h, frame_w) = ids.shape, source.size
        how = how_turned(source.files[0]) if isinstance(source, ImageFrames) else ""
        raise InputError(f"{path}: the mask is {w}x{h}, the video {frame_w}x{frame_h}{how}")
    return ids


def _point(point: Entry, source: FrameSource) -> Reference:
    id_, frame, x, y = (point[key] for key in ("id", "frame", "x", "y"))
    if isinstance(frame.value, str):
        index = _find(frame.value, f"{frame.file}: {frame.place}", source)
    else:
        number = frame.integer()
        found = index_of(source, number)
        if found is None:
            raise frame.error(_unread(number, source))
        index = found
    height, width = source.size
    column, row = x.number(), y.number()
    if not (0 <= column <= width - 1 and 0 <= row <= height - 1):
        raise point.error(
            f"({x.value}, {y.value}) is outside the frame; x must be 0 .. {width - 1}, y 0 .. {height - 1}"
        )
    return Reference(id_.integer(1, MAX_ID), index, point=(column, row))


def _unread(number: int, source: FrameSource) -> str:
    part: Part = getattr(source, "part", Part())
    if part == Part():
        return f"frame {number} is past the end, {source.path} has {source.num_frames} frames"
    step = f", every {part.stride} frames" if part.stride > 1 else ""
    known = source.num_frames or 1
    last = number_of(source, known - 1)
    return f"frame {number} is not read of {source.path}, only {part.start} to {last}{step}"


def _checked(references: Sequence[Reference], where: str, source: FrameSource) -> list[Reference]:
    """The references in order; an object given twice at a frame is an error. Warns of turned frames."""
    if isinstance(source, ImageFrames):
        for frame in sorted({reference.frame for reference in references}):
            warn_if_turned(source.files[frame])
    ordered = sorted(references, key=lambda reference: (reference.frame, reference.id))
    for a, b in pairwise(ordered):
        if (a.frame, a.id) == (b.frame, b.id):
            raise InputError(f"{where}: object {a.id} is given twice at frame {a.frame}")
    return ordered
