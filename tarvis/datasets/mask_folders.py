"""Folders of frames and of indexed masks, a folder a video, as DAVIS has them.

    frames     <video>/<frame>.jpg
    masks      <video>/<frame>.png, indexed: a pixel is an object's id, 0 background, 255 void
    results    like masks, one a frame

Numbers: J&F-Mean, {J,F}-{Mean,Recall,Decay} in [0, 1]; per_object/<video>_<id>/{J,F}. The first and last
mask of a video are not scored and need not be among the results. Objects are those of the first true mask: 1
up to its largest id.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tarvis.datasets.benchmark import FrameTruth, Truth, VideoSample, checked_pictures, shown_ids, size_of
from tarvis.files.folders import files, images_among
from tarvis.files.pictures import (
    IdMap,
    encode_ids,
    how_turned,
    image_size,
    read_ids,
    read_objects,
    voc_palette,
)
from tarvis.files.records import note, read_each
from tarvis.metrics.jf import Floats, jf_frame, summary
from tarvis.stitch.panoptic import paint
from tarvis.structures import VOID, InputError, Reference, Size, VideoResult

LARGEST_ID = 254
LEAST_MASKS = 3
"""Of a video that is scored: two are not."""
INDEXED_8_BIT = b"\x08\x03"
"""Depth and colour type in the header of a PNG, its bytes 24 and 25."""


def read_masked(name: str, images: Path, masks: Sequence[Path]) -> VideoSample:
    """A video of the frames that have a mask. All masks are read, to know what they show; 255 is void.

    Args:
        images: folder of all frames.
        masks: files, at least one, in order of time.

    Raises:
        InputError: a mask is damaged, lacks its frame or is of another size than the others.
    """
    frames = {path.stem: path for path in images_among(images.glob("*"))}
    for orphan in (mask for mask in masks if mask.stem not in frames):
        note(InputError(f"{orphan}: there is no frame of this name in {images}"))
    masks = [mask for mask in masks if mask.stem in frames]
    with ThreadPoolExecutor() as pool:
        looks = [pool.submit(_size_and_ids, mask) for mask in masks]
    found = read_each(zip(masks, looks, strict=True), lambda item: (item[0], *item[1].result()))
    (usual, _), *_ = Counter(size for _, size, _ in found).most_common() or [((0, 0), 0)]
    for mask, size, _ in found:
        if size != usual:
            note(InputError(f"{mask}: expected a mask of {usual}, as others of the video are, got {size}"))
    masks = [mask for mask, size, _ in found if size == usual]
    shown = [ids for _, size, ids in found if size == usual]
    visible = tuple(tuple(id_ for id_ in ids if id_ != VOID) for ids in shown)
    labels = dict.fromkeys(sorted({id_ for ids in visible for id_ in ids}))
    return VideoSample(
        name=name,
        images=tuple(frames[mask.stem] for mask in masks),
        frame_names=tuple(mask.stem for mask in masks),
        size=usual,
        truth=Truth(labels, visible, partial(_read_frame, tuple(masks))),
    )


def _size_and_ids(mask: Path) -> tuple[Size, tuple[int, ...]]:
    ids = read_objects(mask)
    return (ids.shape[0], ids.shape[1]), shown_ids(ids)


def _read_frame(masks: Sequence[Path], frame: int) -> FrameTruth:
    return FrameTruth(ids=read_ids(masks[frame]).astype(np.uint16))


def first_mask(masks: Path, images: Sequence[Path]) -> list[Reference]:
    """The objects of the first mask of a folder, by name, by rising id; `images` are the video's frames."""
    path = masks / files(masks, ".png")[0]
    names = [image.stem for image in images]
    if path.stem not in names:
        raise InputError(f"{path}: {images[0].parent} has no frame {path.stem!r}")
    frame = names.index(path.stem)
    ids = _without_void(read_objects(path))
    size = image_size(images[frame])
    if ids.shape != size:
        how = how_turned(images[frame])
        raise InputError(f"{path}: expected a picture of {size}, as {images[frame]}, got {ids.shape}{how}")
    shown = shown_ids(ids)
    if not shown or shown[-1] > LARGEST_ID:
        what = f"id {shown[-1]}" if shown else "no object"
        raise InputError(f"{path}: expected ids from 1 to {LARGEST_ID}, got {what}")
    return [Reference(id_, frame, torch.from_numpy(ids == id_)) for id_ in shown]


def write_masks(result: VideoResult, video: VideoSample, folder: Path) -> None:
    """Write the scored frames' masks; where objects overlap, the later one is on top."""
    assert all(0 < track.id <= LARGEST_ID for track in result.tracks), [t.id for t in result.tracks]
    out, palette = folder / video.name, voc_palette()
    out.mkdir(parents=True, exist_ok=True)
    for frame in video.scored:
        ids = paint(result.size, result.tracks, frame).astype(np.uint8)
        (out / f"{video.frame_names[frame]}.png").write_bytes(encode_ids(ids, palette))


def check_masks(results: Path, videos: Sequence[VideoSample]) -> dict[str, Path]:
    """Check that every scored frame has a mask, and its mode, size and ids; returns the files by name."""
    found: dict[str, Path] = {}
    for video, paths in checked_pictures(results, videos):
        known = {reference.id for reference in video.references()}
        size = size_of(video)
        for path in paths:
            found[f"{video.name}/{path.name}"] = path
            ids = read_ids(path, size)
            if path.read_bytes()[24:26] != INDEXED_8_BIT:
                raise InputError(f"{path}: expected a picture of 8 bits with a palette (mode P)")
            if unknown := sorted(set(shown_ids(ids)) - known):
                raise InputError(f"{path}: shows id {unknown[0]}, which the first mask does not")
    return found


def score_masks(results: Path, truth: Path, names: Iterable[str]) -> dict[str, float]:
    """The numbers of the named videos, whose true masks are in folders of `truth`."""
    objects: dict[str, tuple[Floats, Floats]] = {}
    for name in names:
        j, f = _score(results / name, truth / name)
        for k in range(j.shape[1]):
            objects[f"{name}_{k + 1}"] = j[:, k], f[:, k]
    return summary(objects)


def _score(results: Path, truth: Path) -> tuple[Floats, Floats]:
    """J and F [F, N] of a video."""
    names = files(truth, ".png")
    if len(names) < LEAST_MASKS:
        raise InputError(
            f"{truth}: expected at least {LEAST_MASKS} frames (the first and the last are not scored)"
        )
    num_objects = int(_without_void(read_ids(truth / names[0])).max())
    if not num_objects:
        raise InputError(f"{truth / names[0]}: shows no objects")
    scores = []
    for name in names[1:-1]:
        true_ids = _without_void(read_objects(truth / name))
        ids = read_ids(results / name, (true_ids.shape[0], true_ids.shape[1]))
        if ids.max() > num_objects:
            raise InputError(f"{results / name}: expected ids up to {num_objects}, got {ids.max()}")
        scores.append(jf_frame(np.where(true_ids > num_objects, 0, true_ids), ids, num_objects))
    j, f = np.array(scores).transpose(1, 0, 2)
    return j, f


def _without_void(ids: IdMap) -> IdMap:
    """The ids, with 0 in place of void."""
    ids = ids.copy()
    ids[ids == VOID] = 0
    return ids
