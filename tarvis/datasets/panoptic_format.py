"""COCO's panoptic format, of Cityscapes-VPS, VIPSeg and the image sets: pictures of ids, lists of segments.

picture    RGB: R + 256 G + 65536 B is the id of a segment, kept through a video; 0 is void
list       "segments_info": [{"id": 8405120, "category_id": 0, "iscrowd": 0, "area": 1200}], of an image
results    pan_pred/NAME.png, and pred.json: {"annotations": [...]}, which has the list of every frame
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from tarvis.datasets.benchmark import FrameTruth, Truth, VideoSample
from tarvis.datasets.classes import RGB, ClassTable
from tarvis.files.atomic import write_json_list
from tarvis.files.pictures import encode_rgb, read_rgb
from tarvis.files.records import Entry, note
from tarvis.metrics.overlaps import Overlaps, overlaps
from tarvis.metrics.vpq import VPQ, Segments, mean_over_windows
from tarvis.stitch.panoptic import Labels, decode_labels, paint_over, painting_order
from tarvis.structures import VOID, InputError, Size, Track, VideoResult

JSON = "pred.json"
PICTURES = "pan_pred"
COLOURS = 2**24
MOST_SEGMENTS = 2**16 - 1
"""Of an image or a video: their numbers fit in 16 bits."""


class Listed(NamedTuple):
    """A segment as files list it."""

    id: int
    category: int
    is_crowd: bool


class Frame(NamedTuple):
    """Truth and prediction of a frame. Predicted segments are those that have pixels."""

    shared: Overlaps
    truth: Segments
    predicted: Segments


def read_panoptic(path: Path, size: Size | None = None) -> NDArray[np.int32]:
    """Ids [H, W] of a picture.

    Raises:
        InputError: the picture cannot be used, or is not of the size that was expected.
    """
    rgb = read_rgb(path, size)
    # red is the lowest byte, and an alpha of 255 the highest
    ids: NDArray[np.int32] = cv2.cvtColor(rgb, cv2.COLOR_RGB2RGBA).view("<i4")[..., 0] & (COLOURS - 1)
    return ids


def read_segments(listed: Entry, categories: Collection[int]) -> list[Listed]:
    """The segments of a frame or an image, of a result or a truth.

    Raises:
        InputError: two segments have the same id, or a category is unknown.
    """
    entries = listed.entries()
    if len(entries) > MOST_SEGMENTS:
        raise listed.error(f"expected at most {MOST_SEGMENTS} segments, got {len(entries)}")
    found: dict[int, Listed] = {}
    for entry in entries:
        try:
            number, category = entry["id"].integer(1, COLOURS - 1), entry["category_id"].integer(-1)
            if category not in categories:
                raise entry["category_id"].error(f"category {category} is unknown")
            if number in found:
                raise entry["id"].error(f"id {number} appears twice")
            found[number] = Listed(number, category, entry.is_set("iscrowd"))
        except InputError as error:
            note(error)
    return list(found.values())


def frame_name(frame: Entry) -> str | None:
    """The name that the entry of a frame gives, without its suffix; None if it gives none."""
    name = frame.get("file_name")
    return None if name is None else os.path.splitext(name.text())[0]


def in_order(
    listed: Entry,
    names: Sequence[str],
    of: str = "frames",
    name_of: Callable[[Entry], str | None] = frame_name,
) -> list[Entry]:
    """The entries of a list of frames in the order of `names`; where no entry has a name, they must be in it.

    Raises:
        InputError: the list lacks a frame, has one twice, or has one of another name.
    """
    entries = listed.entries(len(names), of)
    given = [name_of(entry) for entry in entries]
    if not any(given):
        return entries
    found: dict[str, Entry] = {}
    known = set(names)
    for entry, name in zip(entries, given, strict=True):
        if name is None or name not in known:
            raise entry.error(f"expected a frame such as {names[0]}, got {name or 'one without a name'}")
        if name in found:
            raise entry.error(f"frame {name} appears twice")
        found[name] = entry
    return [found[name] for name in names]


def read_result(
    frame: Entry, present: NDArray[np.integer], picture: Path, categories: Collection[int]
) -> Segments:
    """The segments listed for a frame of a result, which must be those `present` in its picture."""
    listed = frame["segments_info"]
    segments = _arrays(read_segments(listed, categories))
    unlisted, unseen = np.setdiff1d(present, segments.ids), np.setdiff1d(segments.ids, present)
    if unlisted.size:
        raise listed.error(f"lacks id {unlisted[0]}, which has pixels in {picture}")
    if unseen.size:
        raise listed.error(f"lists id {unseen[0]}, which has no pixels in {picture}")
    return segments


def places_of(ids: NDArray[np.int32], listed: Sequence[int] | NDArray[np.integer]) -> NDArray[np.uint16]:
    """Place of each pixel's id in a list, counted from 1; 0 where the list lacks the id."""
    # the system allocates only the touched pages of these 32 MiB (a COCO map: 0.9 ms; comparing with each of
    # its 28 segments takes 3.2 ms)
    places = np.zeros(COLOURS, np.uint16)
    places[listed] = np.arange(1, len(listed) + 1)
    return places.take(ids)


def panoptic_truth(frames: Sequence[tuple[Entry, Path]], size: Size | None, classes: ClassTable) -> Truth:
    """The truth of a video. Tracks are numbered from 1 in the order of first listing; crowds are void.

    Args:
        frames: the entry with each frame's segments, and its picture, which is read on demand.
        size: of the pictures, where it is known.

    Raises:
        InputError: a category is unknown, or an id changes its own.
    """
    indices = {category: k for k, category in enumerate(classes.ids)}
    numbers: dict[int, int] = {}  # segment id -> track
    labels: dict[int, int | None] = {}
    visible = []
    for entry, _ in frames:
        shown = []
        for segment in read_segments(entry["segments_info"], indices):
            label = indices[segment.category]
            if classes.is_thing[label] and not segment.is_crowd:
                number = numbers.setdefault(segment.id, len(numbers) + 1)
                if labels.setdefault(number, label) != label or number > MOST_SEGMENTS:
                    raise entry["segments_info"].error(f"id {segment.id} was of another category before")
                shown.append(number)
        visible.append(tuple(sorted(shown)))
    return Truth(labels, tuple(visible), partial(_read_frame, tuple(frames), numbers, indices, size))


def _read_frame(
    frames: Sequence[tuple[Entry, Path]],
    numbers: dict[int, int],
    indices: dict[int, int],
    size: Size | None,
    frame: int,
) -> FrameTruth:
    entry, picture = frames[frame]
    segments = read_segments(entry["segments_info"], indices)
    places = places_of(read_panoptic(picture, size), [segment.id for segment in segments])
    tracks = [0 if segment.is_crowd else numbers.get(segment.id, 0) for segment in segments]
    labels = [VOID if segment.is_crowd else indices[segment.category] for segment in segments]
    return FrameTruth(
        ids=np.array([0, *tracks], np.uint16)[places], semantic=np.array([VOID, *labels], np.uint8)[places]
    )


def common_size(images: Iterable[Entry]) -> Size | None:
    """The size listed for the images of a video; None if one is listed without."""
    sizes = set()
    for image in images:
        if image.get("height") is None or image.get("width") is None:
            return None
        sizes.add(image.size())
        if len(sizes) > 1:
            raise image.error("is of another size than the video's images before it")
    return sizes.pop()


def write_pictures(
    result: VideoResult, video: VideoSample, folder: Path, names: Sequence[str], classes: ClassTable
) -> list[list[dict[str, int]]]:
    """Write the scored frames' pictures; returns the segments of each, stuff first.

    Args:
        folder: pictures become `folder/pan_pred/NAME`.
        names: for each scored frame.
    """
    assert result.num_frames == len(video.images), (video.name, result.num_frames, len(video.images))
    colours, tracks = assign_colours(result.tracks, classes.colors), painting_order(result.tracks)
    listed = []
    for frame, name in zip(video.scored, names, strict=True):
        semantic, instance = paint_over(decode_labels(result.stuff[frame]), tracks, frame)
        image, segments = coco_encoding(semantic, instance, classes.colors, colours)
        path = folder / PICTURES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_rgb(image))
        listed.append(list_segments(segments, classes))
    return listed


def list_segments(segments: Iterable[Segment], classes: ClassTable) -> list[dict[str, int]]:
    """Segments as files list them."""
    return [
        {"id": s.id, "category_id": classes.ids[s.category], "iscrowd": 0, "area": s.area} for s in segments
    ]


def write_annotations(folder: Path, entries: Iterable[Any]) -> None:
    """Write `pred.json`; one entry is in memory at a time."""
    write_json_list(folder / JSON, entries, before='{"annotations": ', after="}\n")


def check_pictures(
    results: Path, frames: Iterable[tuple[str, Size, Entry]], categories: Collection[int]
) -> dict[str, Path]:
    """Check that pictures have their videos' sizes and show the segments that are listed for them.

    Args:
        frames: each frame's name in `pan_pred`, where no other PNG may lie; its size; its list of segments.

    Returns:
        The files to submit by name.
    """
    found = {JSON: results / JSON}
    for name, size, entry in frames:
        picture = found[f"{PICTURES}/{name}"] = results / PICTURES / name
        seen = np.zeros(COLOURS, bool)
        seen[read_panoptic(picture, size)] = True
        seen[0] = False
        read_result(entry, np.flatnonzero(seen), picture, categories)
    for path in sorted((results / PICTURES).rglob("*.png")):
        if path.relative_to(results).as_posix() not in found:
            raise InputError(f"{path}: belongs to no frame that is scored")
    return found


def things_by_id(root: Entry) -> dict[int, bool]:
    """Whether a class is a thing, by its id, as the `categories` of a truth list them."""
    listed = root["categories"].by("id", lambda entry: entry.integer(0, COLOURS - 1))
    return {category: entry["isthing"].flag() for category, entry in listed.items()}


def compare(
    truth: Entry, true_picture: Path, found: Entry, picture: Path, categories: Collection[int]
) -> Frame:
    """One frame, for scoring. Truth pixels whose id is not listed count as nothing, not even as void.

    `truth` and `found` hold the lists of segments; areas of the truth are those of its list.
    """
    true_ids = read_panoptic(true_picture)
    shared = overlaps(true_ids, read_panoptic(picture, (true_ids.shape[0], true_ids.shape[1])))
    present = np.unique(shared.predicted[shared.predicted > 0])
    predicted = read_result(found, present, picture, categories)
    areas = [segment["area"].integer() for segment in truth["segments_info"].entries()]
    return Frame(shared, _arrays(read_segments(truth["segments_info"], categories), areas), predicted)


def vpq_numbers(vpq: VPQ, means: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """All numbers of VPQ: under each name the means over its windows, then those of every window."""
    windows = {n: vpq.summary(n) for n in vpq.windows}
    numbers = {
        f"{name}/{key}": value
        for name, of_mean in means.items()
        for key, value in mean_over_windows(windows, of_mean).items()
    }
    return numbers | {f"{n}/{key}": value for n in windows for key, value in windows[n].items()}


def _arrays(segments: Sequence[Listed], areas: Sequence[int] | None = None) -> Segments:
    ids, categories, crowd = zip(*segments, strict=True) if segments else ((), (), ())
    return Segments(
        np.array(ids, np.int64),
        np.array(categories, np.int64),
        np.array(crowd, bool),
        np.array(areas or [0] * len(segments), np.int64),
    )


@dataclass(frozen=True)
class Segment:
    """One segment of a frame that is written. `id` is red + 256 green + 65536 blue."""

    id: int
    category: int  # 0-based class
    area: int  # pixels
    track: int  # 0 for stuff


def assign_colours(tracks: Iterable[Track], palette: Sequence[RGB]) -> dict[int, RGB]:
    """An RGB colour for each track of a video, one to one, and the same in every run.

    Args:
        tracks: with labels.
        palette: the colour of every class. No track gets the colour of another class, which a frame may show
            as stuff.

    Returns:
        track id -> colour: the class's own for its first track (unless two classes share it: in VIPSeg a
        slide, which is stuff, has the colour of cars), one near it for the others.
    """
    used = {(0, 0, 0), *palette}  # black is void
    first: set[int] = set()
    colours: dict[int, RGB] = {}
    for track in tracks:
        assert track.label is not None
        colour = palette[track.label]
        if track.label in first or palette.count(colour) > 1:
            colour = _near(colour, used, random.Random(track.id))
        first.add(track.label)
        used.add(colour)
        colours[track.id] = colour
    return colours


def _near(colour: RGB, used: set[RGB], rng: random.Random, spread: int = 30) -> RGB:
    """An unused colour at most `spread` away in each channel; farther only after very many tries."""
    red, green, blue = colour
    for attempt in range(1_000_000):
        reach = spread + attempt // 1000
        near = tuple(min(255, max(0, c + rng.randint(-reach, reach))) for c in (red, green, blue))
        if near not in used:
            return near  # type: ignore[return-value]
    raise ValueError(f"no colour left near {colour}")


def coco_encoding(
    semantic: Labels, instance: NDArray[np.uint16], palette: Sequence[RGB], colours: Mapping[int, RGB]
) -> tuple[Labels, list[Segment]]:
    """The picture of a fused frame and its segments.

    Args:
        semantic: [H, W] uint8 labels; those that the palette does not have are void.
        instance: [H, W] uint16 track ids, 0 for stuff.
        palette: RGB colour of every class, for stuff.
        colours: RGB colour of every track, as `assign_colours` gives them.

    Returns:
        RGB image [H, W, 3] uint8, black where void; segments, stuff first, then tracks by rising id.
    """
    tracks = [0, *sorted(colours)]
    rank = np.full(2**16, len(tracks), np.int32)  # ids may be large, ranks are few
    rank[tracks] = np.arange(len(tracks))
    codes = rank[instance]
    codes <<= 8
    codes |= semantic
    areas = np.bincount(codes.ravel(), minlength=len(tracks) << 8)
    assert len(areas) == len(tracks) << 8, "every track has a colour"
    table = np.zeros((len(areas), 4), np.uint8)  # colour of each code, and a byte for speed
    segments = []
    for code in np.flatnonzero(areas).tolist():
        track, category = tracks[code >> 8], code & 255
        if track or category < len(palette):
            red, green, blue = table[code, :3] = colours[track] if track else palette[category]
            segment = red + 256 * green + 65536 * blue
            segments.append(Segment(segment, category, int(areas[code]), track))
    image = table.view(np.uint32)[:, 0][codes].view(np.uint8).reshape(*codes.shape, 4)
    return cv2.cvtColor(image, cv2.COLOR_RGBA2RGB), segments  # type: ignore[return-value]
