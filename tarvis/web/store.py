"""The sessions of all people, in a folder: ROOT/PERSON/SESSION. Uploads become sessions here."""

from __future__ import annotations

import os
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tarvis.files.folders import IMAGE_SUFFIXES, output_name
from tarvis.files.records import read_json
from tarvis.structures import InputError
from tarvis.web.sessions import FRAMES, MASKS, STATE, Session, title


@dataclass(frozen=True)
class Limits:
    """What a person may use."""

    upload: int = 2 * 2**30
    """Bytes of an upload, also unpacked."""
    pixels: int = 3840 * 2160
    """Of a frame."""
    seconds: float = 3600.0
    sessions: int = 20
    """Of a person."""
    days: float = 14.0
    """A session is removed this long after it was last opened."""


class Store:
    """The sessions of all people, in a folder.

    Args:
        look: opens a video in a process of its own, and says what it is.
    """

    def __init__(self, root: Path, limits: Limits, look: Callable[[str], dict[str, Any]]) -> None:
        self.root, self.limits, self._look = root, limits, look
        self._open: dict[Path, Session] = {}
        self._lock = threading.Lock()
        root.mkdir(parents=True, exist_ok=True)
        root.chmod(0o700)
        self.expire()

    def expire(self) -> None:
        """Remove sessions that nobody has opened for `Limits.days`, and uploads that broke off."""
        oldest = time.time() - self.limits.days * 86400
        for folder in self.root.glob("*/*"):
            state = folder / STATE
            is_old = state.exists() and state.stat().st_mtime < oldest
            is_left = not state.exists() and folder.stat().st_mtime < time.time() - 86400
            if folder not in self._open and (is_old or is_left):
                shutil.rmtree(folder, ignore_errors=True)

    def names(self, person: str) -> list[dict[str, str]]:
        """Sessions of a person, the newest first."""
        self.expire()
        found = list((self.root / person).glob(f"*/{STATE}"))
        found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        names = []
        for path in found:
            with suppress(InputError):
                names.append({"id": path.parent.name, "name": read_json(path)["name"].text()})
        return names

    def new(self, person: str, number: str) -> Path:
        """A folder to upload to."""
        self.expire()
        if len([*(self.root / person).glob("*")]) >= self.limits.sessions:
            raise InputError(f"you have {self.limits.sessions} sessions; delete one first")
        folder = self.root / person / number
        folder.mkdir(parents=True)
        return folder

    def open(self, folder: Path, name: str) -> Session:
        """The session of what was uploaded to a folder.

        Raises:
            InputError: it is no video, or more than is allowed.
        """
        archive = next(iter(sorted(folder.glob("*.zip"))), None)
        if archive is not None:
            _unpack(archive, folder, self.limits.upload)
            archive.unlink()
        is_saved = (folder / STATE).exists()
        names = sorted(path.name for path in folder.iterdir() if path.name not in (STATE, MASKS))
        video = FRAMES if FRAMES in names else next(iter(names), "")
        facts = self._look(str(folder / video))
        count = facts["num_frames"]
        if count is None:
            raise InputError(f"{name}: does not say how many frames it has; convert it to MP4")
        if facts["fps"] and count / facts["fps"] > self.limits.seconds:
            raise InputError(
                f"{name}: {count / facts['fps']:.0f} s long, at most {self.limits.seconds:.0f} s are taken"
            )
        if is_saved:
            root, holds = read_json(folder / STATE), (video, [*facts["size"]], count)
            if tuple(root[key].value for key in ("video", "size", "num_frames")) != holds:
                raise InputError(f"{name}: is of another video than it holds")
            return self.get(folder)
        session = Session(folder, title(name) or "video", video, tuple(facts["size"]), facts["fps"], count)
        session.save()
        with self._lock:
            self._open[folder] = session
        return session

    def get(self, folder: Path) -> Session:
        """A session, as it was left.

        Raises:
            InputError: there is none; its files are damaged.
        """
        with self._lock:
            if folder not in self._open:
                if not (folder / STATE).is_file():
                    raise InputError("there is no such session")
                self._open[folder] = Session.read(folder)
            os.utime(folder / STATE)  # it is opened: it does not expire
            return self._open[folder]

    def delete(self, folder: Path) -> None:
        with self._lock:
            session = self._open.pop(folder, None)
        if session is not None:
            with session.lock:
                session.is_deleted = True
        shutil.rmtree(folder, ignore_errors=True)


def _unpack(archive: Path, folder: Path, most: int) -> None:
    """Unpack images, or a saved session, below a folder: names are ours, and nothing else is taken."""
    try:
        with zipfile.ZipFile(archive) as packed:
            entries = [each for each in packed.infolist() if not each.is_dir()]
            if sum(each.file_size for each in entries) > most:
                raise InputError(f"{archive.name}: unpacks to more than {most} bytes")
            names = {PurePosixPath(each.filename) for each in entries}
            is_session = PurePosixPath(STATE) in names
            for each in entries:
                name = PurePosixPath(each.filename)
                if is_session:
                    target = _place_of_session(name)
                else:
                    is_image = name.suffix.lower() in IMAGE_SUFFIXES and not name.name.startswith(".")
                    target = Path(FRAMES, output_name(name.name)) if is_image else None
                if target is not None and "__MACOSX" not in name.parts:
                    _extract(packed, each, folder / target)
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, EOFError) as error:
        raise InputError(f"{archive.name}: cannot be unpacked ({str(error)[:80]})") from None
    if not is_session and not (folder / FRAMES).exists():
        raise InputError(f"{archive.name}: has no images; expected {', '.join(IMAGE_SUFFIXES)}")


def _place_of_session(name: PurePosixPath) -> Path | None:
    """Where a file of a saved session belongs; None if it is none."""
    plain = all(part == output_name(part) for part in name.parts)
    known = len(name.parts) == 1 or (len(name.parts) == 2 and name.parts[0] in (MASKS, FRAMES))
    return Path(*name.parts) if plain and known else None


def _extract(packed: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    if target.exists():
        raise InputError(f"{target.name}: is in the archive twice")
    target.parent.mkdir(parents=True, exist_ok=True)
    with packed.open(entry) as source, target.open("xb") as file:
        shutil.copyfileobj(source, file)  # no more than the archive says


def files_of(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names and paths of all files of a session."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            yield str(path.relative_to(folder)), path
