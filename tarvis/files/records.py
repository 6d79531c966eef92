"""JSON from outside, whose every fault is an InputError that names the file and the entry."""

from __future__ import annotations

import json
import math
import reprlib
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from tarvis.files import rle
from tarvis.structures import LONGEST_SIDE, MOST_PIXELS, RLE, InputError, Size

LARGEST = 2**53
"""Bound of integers, so that NumPy holds them."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 200
_SHORT.maxlist = _SHORT.maxdict = 20

LONGEST_PART, LONGEST_PATH = 255, 1024
"""Bytes of a name in a path, and of a path below its folder: longer ones are errors of the file system."""

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Value = TypeVar("Value")

_FAULTS: ContextVar[list[str] | None] = ContextVar("faults", default=None)


class Entry:
    """A value of a JSON file and its place in it. Every access checks what it finds."""

    __slots__ = ("_key", "_parent", "value")

    def __init__(self, value: Any, parent: Entry | Path, key: str | int | None = None) -> None:
        self.value = value
        self._parent = parent
        self._key = key

    def __getitem__(self, key: str) -> Entry:
        """The value of a required key."""
        if not isinstance(self.value, dict):
            raise self.expected("an object")
        if key not in self.value:
            raise self.error(f"has no {key!r}")
        return Entry(self.value[key], self, key)

    def get(self, key: str) -> Entry | None:
        """The value of an optional key; None if it is missing or null."""
        if not isinstance(self.value, dict):
            raise self.expected("an object")
        return None if self.value.get(key) is None else Entry(self.value[key], self, key)

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
            try:
                value = read(entry[key])
                if value in found:
                    raise entry[key].error(f"{what} {value!r} appears twice")
                found[value] = entry
            except InputError as error:
                note(error)
        return found

    def size(self) -> Size:
        """The `height` and `width` of this object."""
        height, width = (self[key].integer(1, LONGEST_SIDE) for key in ("height", "width"))
        if height * width > MOST_PIXELS:
            raise self.error(f"expected at most {MOST_PIXELS} pixels, got {height} x {width}")
        return height, width

    def integer(self, low: int = 0, high: int = LARGEST) -> int:
        """An integer, which may be written as 96.0."""
        value = self.value
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            bounds = (
                f"an integer of at least {low}" if high == LARGEST else f"an integer from {low} to {high}"
            )
            raise self.expected(bounds)
        return value

    def number(self) -> float:
        is_number = type(self.value) is float or (type(self.value) is int and abs(self.value) <= LARGEST)
        if not is_number or not math.isfinite(self.value):
            raise self.expected("a finite number")
        return float(self.value)

    def flag(self) -> bool:
        """true, false, 1 or 0."""
        if not isinstance(self.value, int | float) or self.value not in (0, 1):
            raise self.expected("0 or 1")
        return bool(self.value)

    def is_set(self, key: str) -> bool:
        """A flag of this object; false where it is missing or null."""
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
        shown = _SHORT.repr(self.value)
        return self.error(f"expected {what}, got {shown if len(shown) <= 60 else shown[:57] + '...'}")

    def error(self, message: str) -> InputError:
        """An error about this entry, to be raised."""
        where = self.place
        return InputError(f"{self.file}: {where + ': ' if where else ''}{message}")

    @property
    def place(self) -> str:
        """Where the entry stands in its file, such as images[3].height."""
        before = self._parent.place if isinstance(self._parent, Entry) else ""
        if isinstance(self._key, int):
            return f"{before}[{self._key}]"
        return ".".join(filter(None, (before, self._key)))

    @property
    def file(self) -> Path:
        """The file."""
        return self._parent.file if isinstance(self._parent, Entry) else self._parent


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
        known = {ValueError: "a number of too many digits", RecursionError: "too deep"}
        reason = known.get(type(error), error)
        raise InputError(f"{path}: is not a JSON file ({reason})") from None


@contextmanager
def noted_faults() -> Iterator[list[str]]:
    """In this block, faults of single entries are listed, and the entries left out; else they are raised."""
    faults: list[str] = []
    token = _FAULTS.set(faults)
    try:
        yield faults
    finally:
        _FAULTS.reset(token)


def note(fault: InputError) -> None:
    """Raise the fault of one entry of many, or list it where `noted_faults` asks for it."""
    faults = _FAULTS.get()
    if faults is None:
        raise fault
    faults.append(str(fault))


def read_each(items: Iterable[Item], read: Callable[[Item], Value]) -> list[Value]:
    """What `read` makes of every item; see `noted_faults` for items with a fault."""
    found = []
    for item in items:
        try:
            found.append(read(item))
        except InputError as error:
            note(error)
    return found


def read_masks(masks: Sequence[Entry], size: Size) -> list[RLE]:
    """Masks of one size in any of COCO's forms, checked in one go; see `drop_parts`.

    A mask is {"size": [H, W], "counts": code}; the code alone, compressed or as a list of runs; or polygons.
    """
    codes: dict[int, Entry] = {}
    found = [rle.empty(size)] * len(masks)
    for k, is_left in enumerate(drop_parts(masks)):
        mask = masks[k]
        try:
            if not is_left:
                continue
            if _has_polygons(mask):
                polygons = [[x.number() for x in polygon.entries()] for polygon in mask.entries()]
                found[k] = rle.from_polygons(polygons, size)
                continue
            if isinstance(mask.value, dict):
                if mask["size"].value != list(size):
                    raise mask["size"].expected(f"{list(size)}, the size of the picture")
                mask = mask["counts"]
            if not isinstance(mask.value, str | list):
                raise mask.expected(f"a run-length code of {size}")
            codes[k] = mask
        except InputError as error:
            note(error)
    made = rle.from_file([code.value for code in codes.values()], size)
    for (k, code), mask_of_code in zip(codes.items(), made, strict=True):
        if mask_of_code is None:
            note(code.expected(f"a run-length code of {size}"))
        else:
            found[k] = mask_of_code
    return found


def drop_parts(masks: Sequence[Entry]) -> list[bool]:
    """Take polygons of fewer than three points out of masks, with a warning; whether any part is left.

    Raises:
        InputError: what stands in the place of a mask cannot be one.
    """
    dropped: list[Entry] = []
    is_left = [False] * len(masks)
    for k, mask in enumerate(masks):
        try:
            if _has_polygons(mask):
                parts = mask.entries()
                if odd := next((part for part in parts if len(part.entries()) % 2), None):
                    raise odd.expected("x and y of every point, [x, y, x, y, ...]")
                mask.value = [part.value for part in parts if len(part.value) >= 6]
                dropped += [part for part in parts if len(part.value) < 6]
            elif not isinstance(mask.value, dict | str | list) or mask.value == []:
                raise mask.expected("a run-length code, or polygons [[x, y, x, y, ...], ...]")
            is_left[k] = mask.value != []
        except InputError as error:
            note(error)
    if dropped:
        places = ", ".join(part.place for part in dropped[:5])
        more = f" and {len(dropped) - 5} more" if len(dropped) > 5 else ""
        message = f"{dropped[0].file}: left out polygons of fewer than three points: {places}{more}"
        warnings.warn(message, stacklevel=2)
    return is_left


def _has_polygons(mask: Entry) -> bool:
    return isinstance(mask.value, list) and mask.value != [] and isinstance(mask.value[0], list)


def checked_path(name: str) -> str:
    """The name itself, if it is a relative path that stays below its folder.

    Raises:
        ValueError: it is absolute, empty, has `..`, or cannot be a path.
    """
    parts = name.replace("\\", "/").split("/")
    if any(part in ("", ".", "..") for part in parts) or not name.isprintable() or ":" in parts[0]:
        raise ValueError(f"{name[:200]!r} is not a path below its folder")
    if max(len(part.encode()) for part in parts) > LONGEST_PART or len(name.encode()) > LONGEST_PATH:
        raise ValueError(f"{name[:60] + '...'!r} is longer than a path can be")
    return name
