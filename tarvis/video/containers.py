"""What the outermost boxes of a video file say about its length."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO


def is_cut_off(path: Path) -> bool:
    """Whether a video file ends before the length that its own container announces.

    Knows MP4/MOV, AVI and Matroska/WebM; False for anything else. A count of frames cannot tell: trimming
    with an edit list, as phones do, plays fewer frames than the file holds.
    """
    with path.open("rb") as file:
        head = file.read(64)
        if head[:4] == b"RIFF":
            end = 8 + int.from_bytes(head[4:8], "little")
        elif head[:4] == b"\x1a\x45\xdf\xa3":
            end = _matroska_end(file, head)
        elif head[4:8] == b"ftyp":
            end = _mp4_end(file, path.stat().st_size)
        else:
            return False
    return end > path.stat().st_size


def _mp4_end(file: BinaryIO, total: int) -> int:
    """Where the last top-level box ends. A box is its size, its type, maybe a 64-bit size, its body."""
    end = 0
    while end + 8 <= total:
        file.seek(end)
        box = file.read(16)
        size = int.from_bytes(box[:4], "big")
        if size == 1:
            size = int.from_bytes(box[8:16], "big")
        if size < 8:  # 0: up to the end of the file
            return total
        end += size
    return end


def _matroska_end(file: BinaryIO, head: bytes) -> int:
    """Where the segment ends: the one element behind the header, holding all else."""
    size, start = _ebml_size(head, 4)
    file.seek(start + size + 4)  # behind the segment's 4-byte id
    segment = file.read(8)
    length, width = _ebml_size(segment, 0) if segment else (0, 0)
    return start + size + 4 + width + length


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """The length coded at `at`, 0 if unknown (a live stream), and where its code ends.

    The zeros before the first 1 bit count the bytes that follow; all ones mean unknown.
    """
    width = 9 - data[at].bit_length()
    size = int.from_bytes(data[at : at + width], "big") - (1 << 7 * width)
    return (0 if size == (1 << 7 * width) - 1 else size), at + width
