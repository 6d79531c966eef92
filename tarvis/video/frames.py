"""Frames of a video file, of a folder of images or of a glob pattern, decoded ahead of their consumer.

source = open_frames("video.mp4")
for frame in prefetch(source):  # RGB uint8 [H, W, 3]
    ...
"""

from __future__ import annotations

import glob
import os
import queue
import re
import threading
from bisect import bisect_left
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import av
import numpy as np
from av.container import InputContainer
from numpy.typing import NDArray
from torch import Tensor

from tarvis.files.folders import IMAGE_SUFFIXES, images_among, output_name
from tarvis.files.pictures import Picture, how_turned, read_image
from tarvis.structures import MOST_PIXELS, InputError, Size

T = TypeVar("T")


class FrameSource(Protocol):
    """The frames of one video, decoded anew at every pass.

    Frames count from 0, as they are read; a `part` attribute says which ones of the whole those are.
    `path` is what the user asked for, `size` the (H, W) of every frame, `fps` None for images. `num_frames`
    is None where a video does not say; what a container says may be wrong, and is put right once the
    video has been read to its end.
    """

    path: str
    size: Size
    fps: float | None
    num_frames: int | None

    def __iter__(self) -> Iterator[Picture]:
        """One pass over the frames.

        Raises:
            InputError: a frame cannot be decoded or has another size than the first, or a video file was
                cut off before its end.
        """
        ...

    def read(self, start: int, stop: int) -> Iterator[Picture]:
        """The frames `start` .. `stop` - 1, as far as there are so many, without a pass over those before."""
        ...

    def name(self, frame: int) -> str:
        """Name of a frame for result files: an image's name without suffix, a video's 5-digit index."""
        ...

    def find(self, name: str) -> int | None:
        """Index of the frame that `name` means, None if there is none.

        That is the frame of this name; else the only one whose name ends with the same number, leading zeros
        aside ("7" for frame_0007); else, where names have no numbers, the frame counted from 0.
        """
        ...


@dataclass(frozen=True)
class Part:
    """Which frames are read: from `start` to `end`, both included, every `stride`-th, `limit` at most.

    A number counts all frames of the video, an index only those that are read; both from 0.

    Raises:
        InputError: numbers that leave nothing to read.
    """

    start: int = 0
    end: int | None = None
    stride: int = 1
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or (self.limit is not None and self.limit < 1):
            raise InputError(
                f"expected start >= 0 and limit >= 1, got start {self.start} and limit {self.limit}"
            )
        if self.stride < 1 or (self.end is not None and self.end < self.start):
            raise InputError(
                f"expected end >= start and stride >= 1, got {self.start} to {self.end}, stride {self.stride}"
            )

    def numbers(self, total: int | None) -> range:
        """The numbers that are read of a video of `total` frames; without a bound where None."""
        stop = UNKNOWN if total is None else total
        if self.end is not None:
            stop = min(stop, self.end + 1)
        if self.limit is not None:
            stop = min(stop, self.start + (self.limit - 1) * self.stride + 1)
        return range(self.start, stop, self.stride)

    def count(self, total: int | None) -> int | None:
        """How many frames are read of a video of `total`; None if that depends on an unknown total."""
        numbers = self.numbers(total)
        return None if numbers.stop == UNKNOWN else len(numbers)

    def index(self, number: int, total: int | None) -> int | None:
        """The index of the frame that the whole video calls `number`; None if it is not read."""
        numbers = self.numbers(total)
        return numbers.index(number) if number in numbers else None


UNKNOWN = 2**62
"""Stands for an unknown number of frames: more than any video has."""


def number_of(source: FrameSource, frame: int) -> int:
    """The number, in the whole video, of a frame that is read."""
    part: Part = getattr(source, "part", Part())
    return part.start + frame * part.stride


def index_of(source: FrameSource, number: int) -> int | None:
    """The index, among those read, of the frame that the whole video calls `number`; None if it is not read.

    A video that does not say its length may have any frame.
    """
    part: Part = getattr(source, "part", Part())
    index = part.index(number, None)
    is_past = index is not None and source.num_frames is not None and index >= source.num_frames
    return None if is_past else index


def open_frames(
    source: str | Path,
    *,
    start: int = 0,
    end: int | None = None,
    stride: int = 1,
    limit: int | None = None,
) -> FrameSource:
    """Open a video file, a folder of images, one image, or a glob pattern of images.

    Images (jpg, jpeg, png, bmp, webp, tif, tiff) come in the natural order of their names: frame_2 before
    frame_10.
    The first frame is decoded at once, so that an unreadable source fails at once.

    Args:
        start, end, stride, limit: see `Part`; names keep the numbers of the whole.

    Raises:
        InputError: the source does not exist, has no images or frames, or its first frame cannot be read;
            the numbers leave nothing to read.
    """
    part = Part(start, end, stride, limit)
    path = Path(source)
    if path.is_dir():
        files = images_among(path.iterdir())
        missing = f"{source}: no images in this folder; looked for {', '.join(IMAGE_SUFFIXES)}"
    elif path.is_file():
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            return VideoFrames(path, part)
        files, missing = [path], ""
    elif any(c in str(source) for c in "*?["):
        base = next(parent for parent in path.parents if parent.is_dir())  # its name may have brackets
        pattern = Path(glob.escape(str(base))) / path.relative_to(base)
        files = images_among(Path(match) for match in glob.glob(str(pattern), recursive=True))
        missing = f"{source}: no image matches this pattern; looked for {', '.join(IMAGE_SUFFIXES)}"
    else:
        raise InputError(f"{source}: no such file or folder")
    if not files:
        raise InputError(missing)
    if start >= len(files):
        raise InputError(f"{source}: cannot start at frame {start}, there are only {len(files)}")
    return ImageFrames(str(source), files, part)


class ArrayFrames:
    """Frames that lie in memory: RGB uint8, [n, H, W, 3] or a list of [H, W, 3], of NumPy, torch or lists."""

    path = "the frames"
    fps: float | None = None

    def __init__(self, frames: Sequence[Any] | NDArray[Any] | Tensor) -> None:
        self._frames = frames
        self.num_frames: int | None = len(frames)
        if not self.num_frames:
            raise InputError("expected at least one frame")
        self.size: Size = as_frame(frames[0]).shape[:2]

    def __iter__(self) -> Iterator[Picture]:
        return map(as_frame, self._frames)

    def read(self, start: int, stop: int) -> Iterator[Picture]:
        return map(as_frame, self._frames[start:stop])

    def name(self, frame: int) -> str:
        return f"{frame:05d}"

    def find(self, name: str) -> int | None:
        number = _number(name)
        return number if number is not None and number < len(self._frames) else None


def as_frame(frame: Any) -> Picture:
    """A frame [H, W, 3] of NumPy, torch or lists as an array.

    Raises:
        InputError: it has another shape or type.
    """
    array = frame.cpu().numpy() if isinstance(frame, Tensor) else frame
    if isinstance(frame, list | tuple):
        try:
            array = np.array(frame, np.uint8)
        except (ValueError, TypeError, OverflowError):
            array = None
    if (
        not isinstance(array, np.ndarray)
        or array.dtype != np.uint8
        or array.shape[2:] != (3,)
        or not array.size
    ):
        raise InputError("expected RGB frames as uint8 arrays [H, W, 3]")
    return array


class ImageFrames:
    """Frames in image files, one each."""

    fps: float | None = None

    def __init__(self, path: str, files: Sequence[Path], part: Part = Part()) -> None:
        self.path = path
        self.part = part
        self._total = len(files)
        self.files = tuple(files[number] for number in part.numbers(len(files)))
        self.num_frames: int | None = len(self.files)
        self._index: dict[str, int] = {}
        for index, file in enumerate(files):
            if file.stem in self._index:
                first = files[self._index[file.stem]]
                raise InputError(f"{path}: {first} and {file} would be the same frame, {file.stem}")
            self._index[file.stem] = index
        self.size: Size = read_image(self.files[0]).shape[:2]

    def __iter__(self) -> Iterator[Picture]:
        return self.read(0, len(self.files))

    def read(self, start: int, stop: int) -> Iterator[Picture]:
        for file in self.files[start:stop]:
            frame = read_image(file)
            if frame.shape[:2] != self.size:
                raise InputError(
                    f"{file}: frames must have one size, got {_wxh(frame.shape[:2])} "
                    f"after {_wxh(self.size)} in {self.files[0].name}{how_turned(file)}"
                )
            yield frame

    def name(self, frame: int) -> str:
        return output_name(self.files[frame].stem)

    def find(self, name: str) -> int | None:
        at = self._find(name)
        return None if at is None else self.part.index(at, self._total)

    def _find(self, name: str) -> int | None:
        """The number of a frame in the whole folder."""
        number = _number(name)
        if name in self._index or number is None:
            return self._index.get(name)
        numbers = [_last_number(stem) for stem in self._index]
        if any(known is not None for known in numbers):
            return numbers.index(number) if numbers.count(number) == 1 else None
        return number


class VideoFrames:
    """Frames of a video file, decoded by FFmpeg (PyAV) and turned as the file says."""

    def __init__(self, path: Path, part: Part = Part()) -> None:
        self.path = str(path)
        self.part = part
        with self._open() as container:
            stream = container.streams.video[0]
            fps = float(stream.guessed_rate or 0)
            self._rate = fps if 0 < fps < 1000 else None  # 90000 where it is unknown
            self.fps: float | None = self._rate and self._rate / part.stride
            seconds = (container.duration or 0) / av.time_base
            announced = stream.frames or round(seconds * fps)
            self._announced = announced if 0 < announced < 2**31 else None
        self.num_frames: int | None = None
        if self._announced is not None:
            self.num_frames = max(1, part.count(self._announced) or 0)
        self._shown: list[int] | None = None
        self.size: Size = next(iter(self)).shape[:2]

    def __iter__(self) -> Iterator[Picture]:
        read, start, wanted = 0, self.part.start, self.part.numbers(None)
        with self._open() as container:
            for frame in self._decode(container):
                read += 1
                if read - 1 not in wanted:  # seeking is inexact in many containers
                    continue
                picture = _upright(frame)
                if read > start + 1 and picture.shape[:2] != self.size:
                    raise InputError(
                        f"{self.path}: frames must have one size, got {_wxh(picture.shape[:2])} at frame "
                        f"{read - 1} after {_wxh(self.size)}"
                    )
                yield picture
                if read - 1 == wanted[-1]:
                    break
        if read == 0:
            raise InputError(f"{self.path}: a video without frames")
        if read <= start:
            raise InputError(f"{self.path}: cannot start at frame {start}, there are only {read}")
        self.num_frames = self.part.count(read)

    def read(self, start: int, stop: int) -> Iterator[Picture]:
        times, stride = self._times(), self.part.stride
        wanted = self.part.numbers(len(times))[start:stop]
        if start == 0 or not wanted:
            yield from islice(iter(self), start, stop)
            return
        expected = wanted[0]
        try:
            with self._open() as container:
                stream = container.streams.video[0]
                container.seek(times[expected], stream=stream)  # to the key frame before it
                for frame in container.decode(stream):
                    number = bisect_left(times, frame.pts or 0)
                    if expected > wanted[-1] or number > expected:
                        break
                    if number == expected:
                        yield _upright(frame)
                        expected += stride
        except av.FFmpegError:
            raise InputError(f"{self.path}: damaged video, frame {expected} cannot be read") from None
        if expected in wanted:  # seeking has not led there
            yield from islice(iter(self), start + wanted.index(expected), stop)

    def count(self) -> int:
        """How many frames there are, whatever the file announces; `num_frames` then says so, too."""
        left = len(self.part.numbers(len(self._times()))) or sum(1 for _ in self)
        self.num_frames = left
        return left

    def _times(self) -> list[int]:
        """When each frame is shown, in units of the file, rising; empty where the file does not say it."""
        if self._shown is None:
            with self._open() as container:
                packets = container.demux(container.streams.video[0])
                shown = [packet.pts for packet in packets if packet.size and not packet.is_discard]
            times = sorted(time for time in shown if time is not None)
            self._shown = times if len(set(times)) == len(shown) else []
        return self._shown

    def name(self, frame: int) -> str:
        return f"{number_of(self, frame):05d}"

    def find(self, name: str) -> int | None:
        number = _number(name)
        return None if number is None else index_of(self, number)

    def _open(self) -> InputContainer:
        try:
            # by its whole path, or FFmpeg would take what stands before a colon for a protocol
            container = av.open(os.path.abspath(self.path))
        except (av.FFmpegError, OSError, ValueError):
            raise self._unreadable() from None
        # FFmpeg would play a text file as the screen of a terminal
        if not container.streams.video or container.format.name == "tty":
            container.close()
            raise self._unreadable()
        stream = container.streams.video[0]
        size = (0, 0) if stream.codec_context is None else (stream.width, stream.height)
        if size[0] * size[1] > MOST_PIXELS:
            container.close()
            wanted = f"expected frames of at most {MOST_PIXELS} pixels"
            raise InputError(f"{self.path}: {wanted}, got {size[0]} x {size[1]}")
        stream.thread_type = "AUTO"
        return container

    def _unreadable(self) -> InputError:
        return InputError(f"{self.path}: not a video that can be read (damaged, or another kind of file)")

    def _decode(self, container: InputContainer) -> Iterator[av.VideoFrame]:
        """All frames; an InputError follows the last one where the file is cut off before its end."""
        stream, count, end = container.streams.video[0], 0, 0.0
        is_whole = True
        try:
            for packet in container.demux(stream):
                is_whole &= not packet.is_corrupt  # a part of a frame, at the end of the file
                for frame in packet.decode():
                    count += 1
                    end = max(end, frame.time or 0.0)
                    yield frame
        except av.FFmpegError:  # MP4 and MOV say where each frame lies
            is_whole = False
        if is_whole and "mp4" not in container.format.name:
            # others announce a length. MP4s do as well, but trimming with an edit list, as phones do, plays
            # fewer frames than the file holds
            seconds, step = (container.duration or 0) / av.time_base, 1 / (self._rate or 10.0)
            is_whole = count >= stream.frames and (stream.frames > 0 or end + 2 * step >= seconds)
        if count and not is_whole:
            raise InputError(
                f"{self.path}: damaged video, the file is cut off: read {count} frames of {self._announced}"
            )


def _upright(frame: av.VideoFrame) -> Picture:
    """A frame as RGB, turned by the quarter turns that a phone has noted."""
    picture = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90)))


def prefetch(items: Iterable[T], depth: int = 8) -> Generator[T, None, None]:
    """The same items, made by a thread that runs up to `depth` items ahead.

    An exception in `items` is raised by this generator, after the items before it. The thread ends with the
    last item, or when the consumer closes or drops the generator.
    """
    items_ahead: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(depth)  # None: the end
    stop = threading.Event()

    def work() -> None:
        end: BaseException | None = None
        try:
            for item in items:
                if stop.is_set():
                    break
                items_ahead.put((item,))
        except BaseException as error:  # also KeyboardInterrupt: the consumer must hear of the end
            end = error
        items_ahead.put(end)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while isinstance(ahead := items_ahead.get(), tuple):
            yield ahead[0]
    finally:
        stop.set()
        while thread.is_alive():  # it may wait for room in the queue
            try:
                items_ahead.get(timeout=0.01)
            except queue.Empty:
                thread.join(0.01)
    if ahead is not None:
        raise ahead


def _number(name: str) -> int | None:
    """The number that a frame is called by; None for other names, and for those of too many digits."""
    return int(name) if name.isdecimal() and len(name) < 256 else None


def _last_number(stem: str) -> int | None:
    match = re.search(r"\d+$", stem)
    return int(match[0]) if match else None


def _wxh(size: Sequence[int]) -> str:
    return f"{size[1]}x{size[0]}"
