"""Own videos: files like those of YouTube-VIS, and folders of frames and masks like those of DAVIS."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from tarvis.datasets.benchmark import VOID, FrameTruth, Truth, VideoSample
from tarvis.datasets.own_entries import IMAGE_FOLDERS, folder_with, label_of, size_of
from tarvis.files import rle
from tarvis.files.folders import images_among
from tarvis.files.pictures import read_ids
from tarvis.files.records import Entry
from tarvis.scoring.youtube_vis import read_tubes, video_name
from tarvis.structures import RLE, InputError, Size

FRAMES_AND_MASKS = (
    ("JPEGImages", "Annotations"),
    ("JPEGImages/480p", "Annotations/480p"),
    ("frames", "masks"),
    ("images", "masks"),
)


def read_videos(root: Entry, path: Path, labels: dict[int, int]) -> Iterable[VideoSample]:
    """The videos that have tracks. Crowds are none."""
    tracks: dict[int, list[Entry]] = {}
    for entry in root["annotations"].entries():
        tracks.setdefault(entry["video_id"].integer(), []).append(entry)
    folder: Path | None = None
    seen: set[int] = set()
    for entry in root["videos"].entries():
        number = entry["id"].integer()
        if number in seen:
            raise entry["id"].error(f"video {number} comes twice")
        seen.add(number)
        name, size, files = (
            video_name(entry),
            size_of(entry),
            [f.path() for f in entry["file_names"].entries()],
        )
        own = [track for track in tracks.pop(number, []) if not track.is_set("iscrowd")]
        folder = folder or folder_with(files[0], path, IMAGE_FOLDERS)
        of_track: dict[int, int | None] = {k: label_of(track, labels) for k, track in enumerate(own, 1)}
        tubes = read_tubes(own, size, len(files))
        frames = [_shown([tube[t] for tube in tubes]) for t in range(len(files))]
        if own:
            yield VideoSample(
                name=name,
                images=tuple(folder / file for file in files),
                frame_names=tuple(Path(file).stem for file in files),
                size=size,
                truth=Truth(of_track, tuple(tuple(frame) for frame in frames), partial(_tube_frame, frames)),
            )
    if tracks:
        raise root["annotations"].error(f"video {min(tracks)} is unknown")


def _shown(masks: Sequence[RLE | None]) -> dict[int, RLE]:
    """Masks that are not empty, by track."""
    return {k: mask for k, mask in enumerate(masks, 1) if mask is not None and rle.area(mask)}


def _tube_frame(frames: Sequence[dict[int, RLE]], t: int) -> FrameTruth:
    return FrameTruth(frames[t])


def read_folder(root: Path) -> Iterable[VideoSample]:
    """Videos of the frames that have a mask. All masks are read, to know what they show."""
    frames, masks = frames_and_masks(root)
    is_one = bool(_masks_in(masks))
    found: set[int] = set()
    for folder in [masks] if is_one else sorted(p for p in masks.iterdir() if p.is_dir()):
        of_video = frames if is_one else frames / folder.name
        names = {p.stem: p for p in images_among(of_video.glob("*"))}
        files = _masks_in(folder)
        if not files:
            continue
        if orphan := next((file for file in files if file.stem not in names), None):
            raise InputError(f"{orphan}: there is no frame of this name in {of_video}")
        with ThreadPoolExecutor() as pool:
            shown = list(pool.map(_ids_of, files))
        (usual, _), *_ = Counter(size for size, _ in shown).most_common()
        for file, (size, _) in zip(files, shown, strict=True):
            if size != usual:
                raise InputError(
                    f"{file}: expected a mask of {usual}, as others of the video are, got {size}"
                )
        visible = tuple(tuple(id_ for id_ in ids if id_ != VOID) for _, ids in shown)
        found.update(*(ids for _, ids in shown))
        yield VideoSample(
            name=folder.name if not is_one else root.name,
            images=tuple(names[file.stem] for file in files),
            frame_names=tuple(file.stem for file in files),
            size=usual,
            truth=Truth(
                dict.fromkeys(sorted({id_ for ids in visible for id_ in ids})),
                visible,
                partial(_mask_frame, files),
            ),
        )
    if not found - {VOID}:
        hint = f", only {VOID}, which is void: number objects from 1" if found else ""
        raise InputError(f"{masks}: no mask shows an object{hint}")


def count_videos(root: Path) -> int:
    """How many videos there are, those without masks included."""
    frames, masks = frames_and_masks(root)
    return 1 if _masks_in(masks) else sum(p.is_dir() for p in frames.iterdir())


def frames_and_masks(root: Path) -> tuple[Path, Path]:
    """Where a folder has its frames, and where their masks."""
    pairs = [(root / frames, root / masks) for frames, masks in FRAMES_AND_MASKS]
    for frames, masks in pairs:
        has_masks = frames.is_dir() and any(p.suffix.lower() == ".png" for p in masks.rglob("*"))
        # JPEGImages of the official download holds folders of resolutions, not of videos
        if has_masks and not (masks / "480p").is_dir():
            return frames, masks
    looked = ", ".join(f"{f} with {m}" for f, m in pairs)
    raise InputError(f"{root}: no frames and masks (.png files); looked for {looked}")


def _masks_in(folder: Path) -> list[Path]:
    return images_among(folder.iterdir(), (".png",))


def _ids_of(file: Path) -> tuple[Size, tuple[int, ...]]:
    """Size of a mask and the numbers in it, but for the background's."""
    try:
        ids = read_ids(file)
    except ValueError as error:
        raise InputError(str(error)) from None
    shown = np.flatnonzero(np.bincount(ids.ravel())).tolist()
    return (ids.shape[0], ids.shape[1]), tuple(id_ for id_ in shown if id_)


def _mask_frame(files: Sequence[Path], t: int) -> FrameTruth:
    try:
        return FrameTruth(ids=read_ids(files[t]).astype(np.uint16))
    except ValueError as error:
        raise InputError(str(error)) from None
