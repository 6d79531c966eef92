"""Files that are either whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PART = ".part"
"""How names of files end that are being written."""

SEAL = b"sha256="
SEAL_LENGTH = len(SEAL) + 64

LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""The earliest date of a zip, so that the same files make the same archive."""


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes its name when the block ends well, and vanishes when it does not.

    Until then it has a name that cannot be foreseen, so no link to another place can wait there. `leftovers`
    finds the files of processes that were killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = fresh(path, PART)
    try:
        with staging.open("x+b") as file:
            yield file
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def fresh(path: Path, ending: str = "") -> Path:
    """A hidden name beside `path` that did not exist before."""
    return path.with_name(f".{short(path)}.{secrets.token_hex(4)}{ending}")


def leftovers(folder: Path, ending: str = PART, *, of: Path | None = None) -> list[Path]:
    """What lies in a folder under names that `fresh` gave; of one path alone if it is named.

    They are of processes that were killed, if no other one can be writing there now.
    """
    name = ".+" if of is None else re.escape(short(of))
    pattern = re.compile(rf"\.{name}\.[0-9a-f]{{8}}{re.escape(ending)}", re.DOTALL)
    try:
        return sorted(folder / name for name in os.listdir(folder) if pattern.fullmatch(name))
    except OSError:
        return []


def short(path: Path) -> str:
    """The path's name, cut so that something can be added to one of the full 255 bytes."""
    return os.fsencode(path.name)[:200].decode(errors="ignore")


def seal(file: IO[bytes]) -> None:
    """End a zip, open for reading and writing, with a comment that has the SHA-256 of all before it."""
    file.seek(0)
    comment = SEAL + hashlib.file_digest(file, "sha256").hexdigest().encode()  # type: ignore[arg-type]
    file.seek(-2, os.SEEK_END)  # the length of the comment, which is empty so far
    file.write(len(comment).to_bytes(2, "little") + comment)


def is_sealed(path: Path) -> bool:
    """Whether a file ends as `seal` ends one."""
    try:
        with path.open("rb") as file:
            file.seek(-SEAL_LENGTH, os.SEEK_END)
            return file.read(len(SEAL)) == SEAL
    except OSError:  # too short, or cannot be read
        return False


def is_as_sealed(path: Path) -> bool:
    """Whether a file is what it was as it was sealed; true of one that was not."""
    if not is_sealed(path):
        return True
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = path.stat().st_size - SEAL_LENGTH - 2
        while left and (block := file.read(min(left, 2**22))):
            digest.update(block)
            left -= len(block)
        file.seek(-SEAL_LENGTH, os.SEEK_END)
        found = file.read()[len(SEAL) :]
    digest.update(b"\0\0")
    return digest.hexdigest().encode() == found


def write_json(path: Path, tree: Any) -> None:
    """A JSON file, whole or not at all."""
    with whole_file(path) as file:
        file.write(json.dumps(tree).encode())


def write_json_list(path: Path, items: Iterable[Any], *, before: str = "", after: str = "") -> None:
    """A JSON file with a list of `items`, one in memory at a time, between two pieces of JSON text."""
    with whole_file(path) as file:
        file.write(f"{before}[".encode())
        for k, item in enumerate(items):
            file.write(b",\n" * bool(k) + json.dumps(item).encode())
        file.write(f"]{after}".encode())


def zip_files(files: Mapping[str, Path], path: Path) -> None:
    """Files by their names in the archive, in a zip at `path`; pictures are not packed again."""
    with whole_file(path) as target, zipfile.ZipFile(target, "w") as archive:
        for name, file in sorted(files.items()):
            entry = zipfile.ZipInfo(name, LONG_AGO)
            entry.compress_type = zipfile.ZIP_STORED if name.endswith(".png") else zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            with file.open("rb") as source, archive.open(entry, "w", force_zip64=True) as sink:
                while block := source.read(2**20):
                    sink.write(block)
