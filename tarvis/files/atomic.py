"""Files that are either whole or not there."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

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
