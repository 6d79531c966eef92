"""Fetch published weights.

    python -m tarvis.download resnet50_finetune
    python -m tarvis.download tarvis_workspace_dir --out DIR

The zips are those of the authors. Weights are kept for you under the name that every command then takes:
--weights resnet50_finetune. A download that broke off goes on where it was. Nobody publishes checksums: size
and SHA-256 of what came are recorded beside it, in download.json. The server may be gone, and this was only
tested against a local one.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import stat
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import IO, Any

from tqdm import tqdm

from tarvis import cli, places
from tarvis.files.atomic import PART, write_json
from tarvis.files.outputs import digest_of_file, locked
from tarvis.model.weights import CONFIG, load_weights
from tarvis.structures import DamagedError, InputError

SERVER = "https://omnomnom.vision.rwth-aachen.de/data/TarViS"
WORKSPACE = "tarvis_workspace_dir"
"""What the published code reads besides weights: lists and annotations of the benchmarks."""
RECORD = "download.json"
WAIT = 30
"""Seconds without an answer after which a server counts as silent."""
MOST = 100
"""Times its own size that an archive may unpack to: weights and annotations do not come near it."""


def main(argv: Sequence[str] | None = None) -> int:
    p = cli.command("tarvis.download", __doc__)
    names = (*places.PUBLISHED, WORKSPACE)
    p.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    where = f"folder to make (default: {places.kept() / 'weights' / 'NAME'}; of {WORKSPACE}: here)"
    p.add_argument("--out", type=Path, metavar="DIR", help=where)
    p.add_argument("--server", default=SERVER, metavar="URL", help=f"of NAME.zip (default: {SERVER})")
    args = p.parse_args(argv)
    stopped = "stopped; the same command goes on"
    return cli.run(lambda: download(args.name, args.out, args.server), stopped=stopped)


def download(name: str, out: Path | None = None, server: str = SERVER) -> dict[str, Any]:
    """Fetch and unpack NAME.zip, unless that was done before; returns the summary.

    Raises:
        DamagedError: it broke off, and goes on when it is asked for again.
        InputError: the server has no such file or does not answer, or the archive is not what it should be.
    """
    if not server.startswith(("https://", "http://")):
        raise InputError(f"--server {server}: expected https:// or http://")
    kept = Path() if name == WORKSPACE else places.kept() / "weights"
    out, url = out or kept / name, f"{server.rstrip('/')}/{name}.zip"
    out.parent.mkdir(parents=True, exist_ok=True)
    archive = out.with_name(f"{out.name}.zip{PART}")
    with locked(out.with_name(f".{out.name}.lock"), out):
        if (out / RECORD).is_file():
            print(f"{out} is there already; remove it to fetch it again", file=sys.stderr)
            return {"out": str(out), **json.loads((out / RECORD).read_text())}
        if out.exists():
            raise InputError(f"{out}: is there already, and was not fetched by this command")
        fetch(url, archive)
        about = {"url": url, "bytes": archive.stat().st_size, "sha256": digest_of_file(archive)}
        try:
            with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as staging:
                unpack(archive, url, Path(staging) / name, is_weights=name != WORKSPACE)
                write_json(Path(staging) / name / RECORD, about)
                (Path(staging) / name).rename(out)
        except InputError:
            archive.unlink()  # the next time it is fetched anew
            raise
        archive.unlink()
    return {"out": str(out), **about}


def fetch(url: str, path: Path) -> None:
    """Add to a file what it lacks of the one at `url`.

    Raises:
        DamagedError: the connection broke off; what came is kept.
        InputError: the server has no such file, or does not answer.
    """
    have = path.stat().st_size if path.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=WAIT)
    except urllib.error.HTTPError as error:
        if have and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # all of it has come; unpacking shows whether it is right
        why = f"the server says {error.code} {error.reason}; it may no longer have it"
        raise InputError(f"{url}: {why}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(f"{url}: no answer ({reason}); the server may be gone") from None
    with answer:
        is_rest = answer.status == http.client.PARTIAL_CONTENT
        if is_rest and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise InputError(f"{url}: the server sends another part than it was asked for")
        with path.open("ab" if is_rest else "wb") as file:
            _copy(answer, file, url, have if is_rest else 0)


def _copy(answer: Any, file: IO[bytes], url: str, done: int) -> None:
    """Append what a server sends to a file that has `done` bytes of it."""
    length = answer.headers.get("Content-Length", "")
    total = done + int(length) if length.isdecimal() else None
    name = url.rpartition("/")[2]
    with tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=name, file=sys.stderr) as bar:
        while True:
            try:
                block = answer.read(2**20)
            except (OSError, http.client.HTTPException):
                block, is_whole = b"", False
            else:
                is_whole = total is None or done + len(block) >= total
            if not block:
                break
            file.write(block)
            done += len(block)
            bar.update(len(block))
    if not is_whole:
        of = "" if total is None else f" of {total}"
        raise DamagedError(f"{url}: broke off after {done}{of} bytes; the same command goes on from there")


def unpack(archive: Path, url: str, folder: Path, *, is_weights: bool) -> None:
    """Unpack an archive into a new folder; of weights, a checkpoint and its configuration side by side.

    Raises:
        InputError: it is damaged, holds something else, or would write elsewhere or too much.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            targets = _targets(opened, archive.stat().st_size)
            if is_weights:
                targets = _only_weights(targets)
            for entry, name in targets.items():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(entry) as source, target.open("xb") as file:
                    shutil.copyfileobj(source, file, 2**20)
        if is_weights:
            load_weights(next(folder.glob("*.pth")))
    except InputError as error:
        why = str(error).replace(f"{folder}{os.sep}", "").partition("; if you trust")[0]
        raise InputError(f"{url}: {why}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        why = f"what came is no whole zip ({error}); the same command fetches it anew"
        raise InputError(f"{url}: {why}") from None


def _targets(opened: zipfile.ZipFile, size: int) -> dict[zipfile.ZipInfo, str]:
    """The files of an archive by their paths below a folder, which are such on every system."""
    files = [entry for entry in opened.infolist() if not entry.is_dir()]
    seen: set[str] = set()
    for entry in files:
        path = PureWindowsPath(entry.filename)  # knows drives and both slashes
        mode = entry.external_attr >> 16
        is_plain = stat.S_IFMT(mode) in (0, stat.S_IFREG)
        if path.anchor or ".." in path.parts or ":" in entry.filename or not path.name or not is_plain:
            raise InputError(f"refused, it holds {entry.filename[:80]!r}, which is no file below a folder")
        if entry.flag_bits & 1:
            raise InputError(f"refused, {entry.filename[:80]!r} in it is encrypted")
        if (key := path.as_posix().casefold()) in seen:
            raise InputError(f"refused, it holds {entry.filename[:80]!r} twice")
        seen.add(key)
    if sum(entry.file_size for entry in files) > MOST * size:
        raise InputError(f"refused, it unpacks to more than {MOST} times its size")
    return {entry: PureWindowsPath(entry.filename).as_posix() for entry in files}


def _only_weights(targets: Mapping[zipfile.ZipInfo, str]) -> dict[zipfile.ZipInfo, str]:
    found = {entry: Path(path).name for entry, path in targets.items()}
    checkpoints = [name for name in found.values() if name.endswith(".pth")]
    if len(checkpoints) != 1 or sorted(found.values()) != sorted((*checkpoints, CONFIG)):
        names = cli.some(targets.values()) or "nothing"
        raise InputError(f"expected one .pth and {CONFIG} in it, found {names[:120]}")
    return found


if __name__ == "__main__":
    sys.exit(main())
