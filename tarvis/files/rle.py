"""Masks as COCO run-length codes, the form in which masks of finished frames are kept."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco
from torch import Tensor

from tarvis.structures import RLE, Size

_GROUPS = bytes(range(ord("0"), ord("0") + 64))
"""Characters of a code: five bits each; from "P" on more of the same number follow."""


def encode(masks: Tensor | NDArray[np.bool_]) -> list[RLE]:
    """Masks [N, H, W] (bool, or numbers where non-zero is inside; any device) -> N codes.

    The codes of pycocotools, whose own encoder wants a transposed copy of each mask and takes four to eight
    times as long with it. This one spends its time where NumPy lets other threads run.
    """
    array = masks.cpu().numpy() if isinstance(masks, Tensor) else masks
    if array.ndim != 3:
        raise ValueError(f"expected masks [N, H, W], got {list(array.shape)}")
    N, H, W = array.shape
    if array.size == 0:
        return [RLE(size=[H, W], counts=b"0") for _ in range(N)]
    starts = []  # of the runs after the first, columns first
    differs = np.empty((H, W), bool)  # from the pixel before it in its column
    for mask in array:
        inside = mask if mask.dtype == bool else mask != 0
        np.not_equal(inside[1:], inside[:-1], out=differs[1:])
        np.not_equal(inside[0, 1:], inside[-1, :-1], out=differs[0, 1:])  # the end of the column before
        differs[0, 0] = inside[0, 0]
        row, column = np.divmod(np.flatnonzero(differs), W)
        starts.append(np.sort(column * H + row))
    return [RLE(size=[H, W], counts=code) for code in _codes(starts, H * W)]


def encode_bits(bits: NDArray[np.uint8], width: int) -> list[RLE]:
    """Masks as `kernels.mask_upsample` packs them, [N, H, 4 * ceil(width / 32)] -> N codes."""
    masks = (np.unpackbits(each, axis=-1, count=width, bitorder="little") for each in bits)
    return [code for mask in masks for code in encode(mask.view(np.bool_)[None])]


def decode(rle: RLE) -> NDArray[np.bool_]:
    """The mask [H, W]."""
    mask: NDArray[np.uint8] = coco.decode(rle)
    return mask.view(np.bool_)


def from_file(counts: Sequence[str | list[int]], size: Size) -> list[RLE | None]:
    """Codes of masks of one size as they stand in files: compressed strings, or lists of run lengths.

    pycocotools does not check its input: wrong counts make it read and write beyond its memory, and runs of
    no pixels make it stop early when it compares masks. So codes from outside reach it only through this
    function, which checks all codes of a video at once and gives each mask the code of `encode`.

    Returns:
        The codes; None in the place of each whose runs do not make up the size.
    """
    pixels = size[0] * size[1]
    codes: list[bytes | None] = [None] * len(counts)
    starts: dict[int, NDArray[np.int64]] = {}  # of the runs of codes that are written anew
    written: dict[int, bytes] = {}
    for k, each in enumerate(counts):
        if isinstance(each, str):
            code = each.encode("utf-8", "surrogatepass")  # never an ASCII character of another one
            if code != b"" and code[-1:] < b"P" and not code.translate(None, _GROUPS):
                written[k] = code
        elif all(type(run) is int and run >= 0 for run in each) and sum(each) == pixels:
            starts[k] = _starts(np.array(each, np.int64), pixels)
    if written:
        numbers, groups, first, last = _numbers([*written.values()])
        runs = _lengths(numbers, first, last)
        is_sound = np.maximum.reduceat(groups, first) <= 6  # beyond, numbers have more than 32 bits
        is_sound &= np.minimum.reduceat(runs, first) >= 0
        is_sound &= np.maximum.reduceat(runs, first) <= pixels
        is_sound &= np.add.reduceat(runs, first) == pixels
        shorter = 5 * np.clip(groups - 1, 1, 6) - 1  # bits of a number that needs a group less
        is_odd = (groups > 1) & (np.where(numbers < 0, ~numbers, numbers) >> shorter == 0)
        is_empty = runs == 0
        is_empty[first] = False  # masks may begin with a pixel inside
        is_normal = ~np.logical_or.reduceat(is_odd | is_empty, first)
        for place, (k, code) in enumerate(written.items()):
            if is_sound[place] and is_normal[place]:
                codes[k] = code
            elif is_sound[place]:
                starts[k] = _starts(runs[first[place] : last[place] + 1], pixels)
    if starts:
        for k, code in zip(starts, _codes([*starts.values()], pixels), strict=True):
            codes[k] = code
    return [None if code is None else RLE(size=list(size), counts=code) for code in codes]


def from_polygons(polygons: Sequence[Sequence[float]], size: Size) -> RLE:
    """The pixels inside any of the polygons [x, y, x, y, ...], each of three points or more."""
    reach = 2 * max(size)  # pycocotools walks along every edge, pixel by pixel
    within = [[min(max(x, -reach), reach) for x in polygon] for polygon in polygons]
    merged: RLE = coco.merge(coco.frPyObjects(within, *size))
    return merged


def to_json(mask: RLE | None) -> dict[str, Any] | None:
    """A mask as files hold it; null where it has no pixels."""
    if mask is None or not area(mask):
        return None
    return {"size": list(mask["size"]), "counts": mask["counts"].decode("ascii")}


def runs(
    masks: Sequence[RLE],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Runs of pixels inside masks of one size: their first pixels, those behind the last, and whose they are.

    Pixels are counted column by column; runs come mask by mask, in order. Decoding a mask takes ten times as
    long.
    """
    numbers, _, first, last = _numbers([mask["counts"] for mask in masks])
    lengths = _lengths(numbers, first, last)
    mask = np.repeat(np.arange(len(masks)), last - first + 1)
    height, width = masks[0]["size"]
    ends = np.cumsum(lengths) - mask * (height * width)  # the runs of every mask make up its size
    inside = np.flatnonzero((np.arange(len(numbers)) - first[mask]) & 1)
    return ends[inside - 1], ends[inside], mask[inside]


def shared_pixels(masks: Sequence[RLE], others: Sequence[RLE]) -> NDArray[np.float64]:
    """Number of pixels that masks and others share [len(masks), len(others)]; all are of the same size."""
    if not masks or not others:
        return np.zeros((len(masks), len(others)))
    # with "crowd" set, pycocotools divides by the first mask's area alone; undone, the quotient is exact
    shares = coco.iou(list(masks), list(others), [1] * len(others))
    return np.rint(shares * coco.area(list(masks)).astype(float)[:, None])


def box_iou(masks: Sequence[RLE], others: Sequence[RLE]) -> NDArray[np.float64]:
    """IoU of the bounding boxes of masks and others [len(masks), len(others)]; 0 for empty masks."""
    if not masks or not others:
        return np.zeros((len(masks), len(others)))
    boxes, other_boxes = coco.toBbox(list(masks)), coco.toBbox(list(others))  # [N, 4]
    return coco.iou(boxes, other_boxes, [0] * len(others))


def area(rle: RLE) -> int:
    """Number of pixels."""
    return int(coco.area(rle))


def box(rle: RLE) -> list[int]:
    """(left, top, width, height) of a mask in pixels; four zeros where it has none."""
    return [int(side) for side in coco.toBbox(rle)]


def empty(size: Size) -> RLE:
    """The mask without pixels."""
    return encode(np.zeros((1, *size), bool))[0]


def union(masks: Sequence[RLE]) -> RLE:
    """Pixels of any of the masks (at least one, all of the same size)."""
    return coco.merge(list(masks))


def subtract(mask: RLE, taken: RLE) -> RLE:
    """Pixels of `mask` outside `taken`."""
    if not area(coco.merge([mask, taken], intersect=True)):
        return mask
    return encode((decode(mask) & ~decode(taken))[None])[0]


class FrameLog:
    """Finished frames of a video, packed, until its end decides what becomes of them.

    A frame costs the bytes of its codes and no objects: 5 000 frames of ten masks at 480p are a few
    megabytes. Iterating gives back (frame, {track id: code}) in the order of `append`.
    """

    def __init__(self) -> None:
        self._frames: list[bytes] = []
        self._size: list[int] = []

    def append(self, frame: int, masks: dict[int, RLE]) -> None:
        for mask in masks.values():
            self._size = mask["size"]  # the same for all
        packed = pickle.dumps((frame, {track: mask["counts"] for track, mask in masks.items()}))
        self._frames.append(zlib.compress(packed))

    def __iter__(self) -> Iterator[tuple[int, dict[int, RLE]]]:
        for packed in self._frames:
            frame, counts = pickle.loads(zlib.decompress(packed))
            yield frame, {track: RLE(size=self._size, counts=c) for track, c in counts.items()}


def _codes(starts: Sequence[NDArray[np.int64]], pixels: int) -> list[bytes]:
    """The codes of masks whose runs after the first start at these pixels (`_numbers` tells the format)."""
    ends = np.concatenate([part for each in starts for part in (each, [pixels])])
    last = np.cumsum([len(each) + 1 for each in starts]) - 1
    first = np.concatenate([[0], last[:-1] + 1])
    runs = np.diff(ends, prepend=0)
    runs[first] = ends[first]
    numbers = runs.copy()
    numbers[2:] -= runs[:-2]
    for k in range(3):  # the first three of each mask stand as they are
        those = (first + k)[first + k <= last]
        numbers[those] = runs[those]

    length = np.ones(len(numbers), np.int64)  # characters: five bits each, the last one's highest is the sign
    size = np.where(numbers < 0, ~numbers, numbers)
    for bits in range(4, int(size.max()).bit_length(), 5):
        length += size >> bits > 0
    stop = np.cumsum(length)
    text = np.empty(stop[-1], np.uint8)
    for k in range(length.max()):
        has = np.flatnonzero(length > k)
        more = (length[has] > k + 1) << 5
        text[stop[has] - length[has] + k] = (numbers[has] >> 5 * k & 31 | more) + 48
    whole = text.tobytes()
    return [whole[stop[a] - length[a] : stop[b]] for a, b in zip(first, last, strict=True)]


def _starts(runs: NDArray[np.int64], pixels: int) -> NDArray[np.int64]:
    """Where the runs after the first start, once those of no pixels are gone, which join their neighbours."""
    starts, times = np.unique(np.cumsum(runs)[:-1], return_counts=True)
    return starts[(times % 2 == 1) & (starts < pixels)]


def _numbers(
    codes: Sequence[bytes],
) -> tuple[NDArray[np.int64], NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """The numbers of codes, how many groups each has, and the first and last number of each code.

    COCO's code: a run is written in groups of five bits, lowest first, a character each, whose bit 5 says
    that more follow and whose bit 4, in the last, that the number is negative. From the fourth on, a run is
    given as the difference to the one two before it.
    """
    data = np.frombuffer(b"".join(codes), np.uint8) - np.uint8(48)  # one group a character
    stops = np.flatnonzero(data < 32)  # last groups of the numbers
    lengths = np.diff(stops, prepend=-1)
    numbers = data[stops].astype(np.int64)
    numbers[numbers > 15] -= 32  # bit 4 of the last group is the sign
    for k in range(1, min(lengths.max(), 7)):  # the groups before, from the last to the first
        more = np.flatnonzero(lengths > k)
        numbers[more] = (numbers[more] << 5) | (data[stops[more] - k] & 31)
    last = np.searchsorted(stops, np.cumsum([len(code) for code in codes]) - 1)
    return numbers, lengths, np.concatenate([[0], last[:-1] + 1]), last


def _lengths(
    numbers: NDArray[np.int64], first: NDArray[np.intp], last: NDArray[np.intp]
) -> NDArray[np.int64]:
    """The lengths of runs, from the numbers of `_numbers`.

    Runs at odd places are sums of the numbers there, as are those at even places from the third run on.
    """
    lengths = numbers.copy()
    for parity in (0, 1):
        sums, at = _running_sums(numbers, first + 2 - parity, last + 1)
        lengths[at] = sums
    return lengths


def _running_sums(
    numbers: NDArray[np.int64], begins: NDArray[np.intp], ends: NDArray[np.intp]
) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """Running sums of every second number within each range, and where each sum ends."""
    counts = np.maximum((ends - begins + 1) // 2, 0)
    of_sum = np.repeat(np.arange(len(begins)), counts)
    place = np.arange(of_sum.size) - np.repeat(np.cumsum(counts) - counts, counts)
    at = begins[of_sum] + 2 * place
    sums = np.concatenate([[0], np.cumsum(numbers[at])])
    return sums[1:] - np.repeat(sums[np.cumsum(counts) - counts], counts), at
