"""Folders of frames, one a video: their files, and lists of their names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from tarvis.files.records import checked_path
from tarvis.structures import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
VIDEO_SUFFIXES: tuple[str, ...] = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts")
VIDEO_SUFFIXES += (".m2ts", ".mts", ".wmv", ".flv", ".ogv", ".3gp", ".y4m")
"""Endings by which videos are found in folders; a file that is named may end otherwise."""


LONGEST_NAME = 200
"""Bytes of a name that we give, to which an ending can be added: file systems take 255."""


def folders(root: Path) -> list[str]:
    """Names of the folders in `root`, sorted; at least one."""
    return _listed(root, Path.is_dir, "folders of sequences")


def files(root: Path, ending: str) -> list[str]:
    """Names of the files in `root` that end so, sorted; at least one."""
    return _listed(root, lambda path: path.suffix == ending, f"{ending} files")


def same_names(folder: Path, expected: list[str], found: list[str]) -> None:
    """Check that a folder has the expected frames, no more and no less."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which should not be there"
        raise InputError(f"{folder}: {what}; expected {len(expected)} frames, got {len(found)}")


def no_other_folders(root: Path, expected: Iterable[str]) -> None:
    """Check that all folders in `root` are of the expected videos, whose names may be paths."""
    if extra := sorted(set(folders(root)) - {name.split("/")[0] for name in expected}):
        raise InputError(f"{root / extra[0]}: belongs to no video of these results")


def chosen(names: list[str], videos: Collection[str] | None, truth: Path) -> list[str]:
    """The names that are in `videos`, in their own order; all names if it is None."""
    if videos is None:
        return names
    if not videos:
        raise InputError(f"{truth}: no video is named; it has {', '.join(names[:10])}")
    if unknown := sorted(set(videos) - set(names)):
        raise InputError(f"{truth}: has no video {unknown[0]!r}; it has {', '.join(names[:10])}")
    wanted = set(videos)
    return [name for name in names if name in wanted]


def images_among(paths: Iterable[Path], suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[Path]:
    """The visible image files among `paths`, in natural order."""
    found = [p for p in paths if p.suffix.lower() in suffixes and p.name[0] != "." and p.is_file()]
    return sorted(found, key=lambda p: (_natural(str(p)), p))


def output_name(name: str) -> str:
    """A file name of ours for a name from outside: printable, of at most 200 bytes, as unique as the name.

    A name that is so already stays as it is; another one is escaped, shortened, and ends with its digest.
    """
    plain = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in name)
    if plain == name and len(name.encode()) <= LONGEST_NAME and name not in ("", ".", ".."):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{plain.encode()[: LONGEST_NAME - 13].decode(errors='ignore')}~{digest}"


def _natural(name: str) -> list[str | int]:
    """Text and numbers of a name, alternating, text first."""
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", name)]


def _listed(root: Path, is_wanted: Callable[[Path], bool], what: str) -> list[str]:
    try:
        names = sorted(path.name for path in root.iterdir() if path.name[0] != "." and is_wanted(path))
    except OSError as error:
        raise InputError(f"{root}: cannot be read ({error.strerror})") from None
    if not names:
        raise InputError(f"{root}: has no {what}")
    return names


def read_names(path: Path) -> list[str]:
    """Names of videos in a text file; at least one."""
    try:
        names = path.read_text(encoding="utf-8-sig").split()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    for k, name in enumerate(names):
        try:
            checked_path(name)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
        if name in names[:k]:
            raise InputError(f"{path}: {name} appears twice")
    if not names:
        raise InputError(f"{path}: is empty")
    return names
