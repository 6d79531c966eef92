"""JSON from outside, whose every fault is an InputError that names the file and the entry."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tarvis.files import rle
from tarvis.structures import LONGEST_SIDE, RLE, InputError, Size

LARGEST = 2**53
"""Bound of integers, so that NumPy holds them."""

Key = TypeVar("Key", bound=Hashable)


class Entry:
    """A value of a JSON file and its place in it. Every access checks what it finds."""

    __slots__ = ("_key", "_parent", "value")

    def __init__(self, value: Any, parent: Entry | Path, key: str | int | None = None) -> None:
        self.value = value
        self._parent = parent
        self._key = key

    def __getitem__(self, key: str) -> Entry:
        """The value of a required key."""
        entry = self.get(key)
        if entry is None:
            raise self.error(f"has no {key!r}")
        return entry

    def get(self, key: str) -> Entry | None:
        """The value of an optional key, None if it is missing."""
        if not isinstance(self.value, dict):
            raise self.expected("an object")
        return Entry(self.value[key], self, key) if key in self.value else None

    def items(self) -> Iterator[tuple[str, Entry]]:
        """Keys and values of an object."""
        if not isinstance(self.value, dict):
            raise self.expected("an object")
        return ((key, Entry(value, self, key)) for key, value in self.value.items())

    def by_number(self) -> dict[int, Entry]:
        """The values of an object whose keys are numbers, such as the ids of tracks."""
        found: dict[int, Entry] = {}
        for key, value in self.items():
            if not (key.isascii() and key.isdecimal() and len(key) <= 15 and str(int(key)) == key):
                raise self.error(f"expected keys to be numbers, got {key[:60]!r}")
            found[int(key)] = value
        return found

    def entries(self, length: int | None = None, of: str = "entries") -> list[Entry]:
        """The entries of a list, of a certain length if one is given."""
        if not isinstance(self.value, list):
            raise self.expected("a list")
        if length is not None and len(self.value) != length:
            raise self.error(f"expected {length} {of}, got {len(self.value)}")
        return [Entry(value, self, k) for k, value in enumerate(self.value)]

    def by(self, key: str, read: Callable[[Entry], Key], what: str = "id") -> dict[Key, Entry]:
        """The entries of a list by the value of a key that no two of them share.

        Args:
            read: checks the value, such as `Entry.integer`.
            what: the value's name in the error about one that two share.
        """
        found: dict[Key, Entry] = {}
        for entry in self.entries():
            value = read(entry[key])
            if value in found:
                raise entry[key].error(f"{what} {value!r} appears twice")
            found[value] = entry
        return found

    def size(self) -> Size:
        """The `height` and `width` of this object."""
        return self["height"].integer(1, LONGEST_SIDE), self["width"].integer(1, LONGEST_SIDE)

    def integer(self, low: int = 0, high: int = LARGEST) -> int:
        if type(self.value) is not int or not low <= self.value <= high:
            bounds = (
                f"an integer of at least {low}" if high == LARGEST else f"an integer from {low} to {high}"
            )
            raise self.expected(bounds)
        return self.value

    def number(self) -> float:
        is_number = type(self.value) is float or (type(self.value) is int and abs(self.value) <= LARGEST)
        if not is_number or not math.isfinite(self.value):
            raise self.expected("a finite number")
        return float(self.value)

    def flag(self) -> bool:
        """true, false, 1 or 0."""
        if not isinstance(self.value, int) or self.value not in (0, 1):
            raise self.expected("0 or 1")
        return bool(self.value)

    def is_set(self, key: str) -> bool:
        """A flag of this object; false where it is missing."""
        entry = self.get(key)
        return entry is not None and entry.flag()

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.expected("a string")
        return self.value

    def path(self) -> str:
        """A relative path that stays below its folder."""
        try:
            return checked_path(self.text())
        except ValueError as error:
            raise self.error(str(error)) from None

    def expected(self, what: str) -> InputError:
        shown = repr(self.value)
        return self.error(f"expected {what}, got {shown if len(shown) <= 60 else shown[:57] + '...'}")

    def error(self, message: str) -> InputError:
        """An error about this entry, to be raised."""
        steps: list[str] = []
        entry: Entry = self
        while isinstance(entry._parent, Entry):
            steps.append(f"[{entry._key}]" if isinstance(entry._key, int) else f".{entry._key}")
            entry = entry._parent
        where = "".join(reversed(steps)).lstrip(".")
        return InputError(f"{entry._parent}: {where + ': ' if where else ''}{message}")


def read_json(path: Path) -> Entry:
    """The content of a JSON file.

    Raises:
        InputError: the file cannot be read, or is not JSON.
    """
    try:
        return Entry(json.loads(path.read_bytes()), path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else error
        raise InputError(f"{path}: is not a JSON file ({reason})") from None


def read_masks(codes: Sequence[Entry], size: Size) -> list[RLE]:
    """Masks of one size from their run-length codes, compressed or not, checked in one go."""
    for code in codes:
        if not isinstance(code.value, str | list):
            raise code.expected(f"a run-length code of {size}")
    masks = rle.from_file([code.value for code in codes], size)
    for code, mask in zip(codes, masks, strict=True):
        if mask is None:
            raise code.expected(f"a run-length code of {size}")
    return [mask for mask in masks if mask is not None]


def checked_path(name: str) -> str:
    """The name itself, if it is a relative path that stays below its folder.

    Raises:
        ValueError: it is absolute, empty, has `..`, or cannot be a path.
    """
    parts = name.replace("\\", "/").split("/")
    if any(part in ("", ".", "..") for part in parts) or not name.isprintable() or ":" in parts[0]:
        raise ValueError(f"{name!r} is not a path below its folder")
    return name
