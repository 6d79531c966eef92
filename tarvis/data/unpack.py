"""Make a folder of a packed one.

    python -m tarvis.data.unpack dataset_images/training/davis.fpack

The published code reads a folder of images from such a file too, which its own tool packs; here they are read
from the folder alone. A pack is a version (one byte, 1), the number of files (uint64), the folder's path (256
bytes), the name of each file (128 bytes), its size (uint64), and their contents; names end in spaces.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from tarvis.files.records import checked_path
from tarvis.structures import InputError

VERSION = 1
FOLDER, NAME, NUMBER = 256, 128, 8
"""Bytes of the parts of a header."""


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        "python -m tarvis.data.unpack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("pack", type=Path, metavar="PACK")
    p.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="(default: PACK without .fpack)")
    args = p.parse_args(argv)
    folder = args.folder or args.pack.with_suffix("")
    try:
        count = unpack(args.pack, folder)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"folder": str(folder), "files": count}))
    return 0


def unpack(pack: Path, folder: Path) -> int:
    """Write the files of a pack; the folder appears under its name once it is whole. Returns their number.

    Raises:
        InputError: no pack, a damaged one, or the folder is there already.
    """
    if folder.exists():
        raise InputError(f"{folder}: is there already")
    part = folder.with_name(f".{folder.name}.part")
    try:
        with pack.open("rb") as file:
            listed = _read_header(file, pack)
            for name, size in tqdm(listed, pack.name, disable=not sys.stderr.isatty()):
                target = part / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read(size))
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return len(listed)


def _read_header(file: BinaryIO, pack: Path) -> list[tuple[str, int]]:
    """Names and sizes of the files; leaves the file where their contents begin."""
    total = pack.stat().st_size
    start = file.read(1 + NUMBER + FOLDER)
    count = int.from_bytes(start[1 : 1 + NUMBER], sys.byteorder)
    if start[:1] != bytes([VERSION]) or not 1 <= count <= (total - len(start)) // (NAME + NUMBER):
        raise InputError(f"{pack}: is no pack of version {VERSION}, or is cut off")
    names = np.frombuffer(file.read(NAME * count), f"S{NAME}")
    sizes = np.frombuffer(file.read(NUMBER * count), np.uint64).tolist()
    expected = file.tell() + sum(sizes)
    if total != expected:
        raise InputError(f"{pack}: expected {expected} bytes, as its header says, got {total}")
    try:
        return [(checked_path(name.decode().rstrip()), size) for name, size in zip(names, sizes, strict=True)]
    except ValueError as error:
        raise InputError(f"{pack}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
