"""Files and folders that are either whole or absent."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tarvis.structures import InputError

LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""The earliest date of a zip, so that the same files make the same archive."""


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes its name when the block ends well, and vanishes when it does not.

    What a killed process leaves behind is replaced by the next one that writes the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.part")
    try:
        with staging.open("wb") as file:
            yield file
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


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


@contextmanager
def whole_folder(
    out: str | Path, *, overwrite: bool = False, marks: Sequence[str] = ("tracks.json", "*/tracks.json")
) -> Iterator[Path]:
    """A new folder that becomes `out` when the block ends well, and vanishes when it does not.

    Args:
        overwrite: replace `out` if it holds what an earlier run has made; nothing else is ever removed.
        marks: patterns of files; a folder with one of them was made by an earlier run.

    Raises:
        InputError: `out` is in use, or cannot be written.
    """
    out = Path(os.path.realpath(out))
    staging = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    missing = [parent for parent in out.parents if not os.path.exists(parent)]  # the deepest first
    try:
        if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
            if not overwrite:
                raise InputError(f"{out}: already exists; name another folder, or ask to overwrite it")
            if not any(found for mark in marks for found in out.glob(mark)):
                raise InputError(f"{out}: will not be overwritten, there is no {marks[0]} in it")
        staging.mkdir(parents=True)
        yield staging
        _replace(staging, out)
    except OSError as error:
        path = Path(str(error.filename))
        is_ours = path in (out, staging, *staging.parents) or staging in path.parents
        if not is_ours and error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a full disk names no file
            raise
        raise InputError(f"{out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # not made, or no longer empty
                parent.rmdir()


def _replace(staging: Path, out: Path) -> None:
    """Rename `staging` to `out`, whose old content is moved aside before and removed after."""
    old = staging.with_name(f"{staging.name}.old")
    if out.exists():
        out.rename(old)
    try:
        staging.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
