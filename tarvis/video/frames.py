"""Frames of a video file, of a folder of images or of a glob pattern, decoded ahead of whoever eats them.

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
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from tarvis.files.folders import IMAGE_SUFFIXES, images_among
from tarvis.structures import InputError, Size
from tarvis.video.containers import is_cut_off

Frame = NDArray[np.uint8]
"""RGB uint8 [H, W, 3]."""


T = TypeVar("T")


class FrameSource(Protocol):
    """The frames of one video, decoded anew at every pass.

    `path` is what the user asked for, `size` the (H, W) of every frame, `fps` None for images. `num_frames`
    is None where a video does not say; what a container says may be wrong, and is put right once the
    video has been read to its end.
    """

    path: str
    size: Size
    fps: float | None
    num_frames: int | None

    def __iter__(self) -> Iterator[Frame]:
        """One pass over the frames.

        Raises:
            InputError: a frame cannot be decoded or has another size than the first, or a video file was
                cut off before its end.
        """
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


def open_frames(source: str | Path, *, limit: int | None = None, start: int = 0) -> FrameSource:
    """Open a video file, a folder of images, one image, or a glob pattern of images.

    Images (jpg, jpeg, png, bmp, webp) come in the natural order of their names: frame_2 before frame_10.
    The first frame is decoded at once, so that what cannot be read fails here.

    Args:
        limit: read at most this many frames.
        start: leave out this many frames at the beginning; the next one is frame 0 of the source.

    Raises:
        InputError: nothing there, no images, not a video, no frames, or an unreadable first frame.
    """
    if start < 0 or (limit is not None and limit < 1):
        raise InputError(f"expected start >= 0 and limit >= 1, got start {start} and limit {limit}")
    path = Path(source)
    if path.is_dir():
        files = images_among(path.iterdir())
        missing = f"{source}: no images in this folder; looked for {', '.join(IMAGE_SUFFIXES)}"
    elif path.is_file():
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            return VideoFrames(path, limit=limit, start=start)
        files, missing = [path], ""
    elif any(c in str(source) for c in "*?["):
        files = images_among(Path(match) for match in glob.glob(str(source), recursive=True))
        missing = f"{source}: no image matches this pattern; looked for {', '.join(IMAGE_SUFFIXES)}"
    else:
        raise InputError(f"{source}: no such file or folder")
    if not files:
        raise InputError(missing)
    if start >= len(files):
        raise InputError(f"{source}: cannot start at frame {start}, there are only {len(files)}")
    return ImageFrames(str(source), files[start:][:limit])


class ImageFrames:
    """Frames in image files, one each."""

    fps: float | None = None

    def __init__(self, path: str, files: Sequence[Path]) -> None:
        self.path = path
        self.files = tuple(files)
        self.num_frames: int | None = len(self.files)
        self._index: dict[str, int] = {}
        for index, file in enumerate(self.files):
            if file.stem in self._index:
                first = self.files[self._index[file.stem]]
                raise InputError(f"{path}: {first} and {file} would be the same frame, {file.stem}")
            self._index[file.stem] = index
        self.size: Size = read_image(self.files[0]).shape[:2]

    def __iter__(self) -> Iterator[Frame]:
        for file in self.files:
            frame = read_image(file)
            if frame.shape[:2] != self.size:
                raise InputError(
                    f"{file}: frames must have one size, got {_wxh(frame.shape[:2])} "
                    f"after {_wxh(self.size)} in {self.files[0].name}"
                )
            yield frame

    def name(self, frame: int) -> str:
        return self.files[frame].stem

    def find(self, name: str) -> int | None:
        if name in self._index or not name.isdecimal():
            return self._index.get(name)
        numbers = [_last_number(stem) for stem in self._index]
        if any(number is not None for number in numbers):
            return numbers.index(int(name)) if numbers.count(int(name)) == 1 else None
        return int(name) if int(name) < len(self.files) else None


class VideoFrames:
    """Frames of a video file, through OpenCV."""

    def __init__(self, path: Path, *, limit: int | None = None, start: int = 0) -> None:
        self.path = str(path)
        self.start = start
        self.limit = limit
        capture = self._open()
        fps = capture.get(cv2.CAP_PROP_FPS)
        self.fps: float | None = fps if 0 < fps < 1000 else None  # what is unknown comes as 0, NaN or 90000
        announced = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self._announced = int(announced) if 0 < announced < 2**31 else None
        capture.release()
        self.num_frames: int | None = None
        if self._announced is not None:
            self.num_frames = max(1, min(self._announced - start, limit or self._announced))
        self.size: Size = next(iter(self)).shape[:2]

    def __iter__(self) -> Iterator[Frame]:
        capture = self._open()
        try:
            skipped = count = 0
            while skipped < self.start and capture.grab():  # seeking is inexact in many containers
                skipped += 1
            while count != self.limit:
                ok, bgr = capture.read()
                if not ok:
                    self._check_end(skipped, count)
                    break
                frame = _rgb(bgr)
                if count and frame.shape[:2] != self.size:
                    raise InputError(
                        f"{self.path}: frames must have one size, got {_wxh(frame.shape[:2])} at frame "
                        f"{skipped + count} after {_wxh(self.size)}"
                    )
                count += 1
                yield frame
            self.num_frames = count
        finally:
            capture.release()

    def name(self, frame: int) -> str:
        return f"{frame:05d}"

    def find(self, name: str) -> int | None:
        if not name.isdecimal() or (self.num_frames is not None and int(name) >= self.num_frames):
            return None
        return int(name)

    def _open(self) -> cv2.VideoCapture:
        with _quiet():  # errors are reported below
            capture = cv2.VideoCapture(self.path)
        # FFmpeg would play a text file as the screen of a terminal
        if not capture.isOpened() or int(capture.get(cv2.CAP_PROP_FOURCC)) == cv2.VideoWriter.fourcc(*"ansi"):
            raise InputError(f"{self.path}: not a video that can be read (damaged, or another kind of file)")
        return capture

    def _check_end(self, skipped: int, count: int) -> None:
        read = skipped + count
        if read < (self._announced or 0) and is_cut_off(Path(self.path)):
            raise InputError(
                f"{self.path}: damaged video, the file is cut off: read {read} frames of {self._announced}"
            )
        if read == 0:
            raise InputError(f"{self.path}: a video without frames")
        if count == 0:
            raise InputError(f"{self.path}: cannot start at frame {self.start}, there are only {read}")


def read_image(path: Path) -> Frame:
    """An image as RGB uint8 [H, W, 3].

    Raises:
        InputError: the file is missing, truncated or no image.
    """
    try:
        data = np.fromfile(path, np.uint8)  # not cv2.imread: it cannot open every name on Windows
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    with _quiet():
        bgr = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    if bgr is None:
        raise InputError(f"{path}: not an image that can be read (truncated, or another kind of file)")
    return _rgb(bgr)


def prefetch(items: Iterable[T], depth: int = 8) -> Generator[T, None, None]:
    """The same items, made by a thread that runs up to `depth` items ahead.

    An exception in `items` is raised here, after the items before it. The thread ends with the last item, or
    when the consumer closes or drops the generator.
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


_LOG_LEVEL = threading.Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps OpenCV's warnings off stderr; what fails is raised. The level is global, hence the lock."""
    with _LOG_LEVEL:
        level = cv2.utils.logging.getLogLevel()
        # FFmpeg reads its own level from the environment when first used
        has_own = "OPENCV_FFMPEG_LOGLEVEL" in os.environ
        if not has_own:
            os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            yield
        finally:
            cv2.utils.logging.setLogLevel(level)
            if not has_own:
                del os.environ["OPENCV_FFMPEG_LOGLEVEL"]


def _rgb(bgr: cv2.typing.MatLike) -> Frame:
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)


def _last_number(stem: str) -> int | None:
    match = re.search(r"\d+$", stem)
    return int(match[0]) if match else None


def _wxh(size: Sequence[int]) -> str:
    return f"{size[1]}x{size[0]}"
