"""Folders of results: locked while a run writes them, replaced only where a record proves them ours.

The record of a folder, `.tarvis.json`, has path and SHA-256 of every file that a run wrote there. What it
lacks, or has with another digest, is not ours: a run stops where it would have to remove that.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tarvis.files.atomic import PART, fresh, leftovers, short, write_json
from tarvis.files.records import read_json
from tarvis.structures import InputError

RECORD = ".tarvis.json"
RECORDS = ".tarvis"
"""Folder of the records of a `GrowingFolder`."""
LOCK = ".lock"
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
"""Flag of `os.open`: no symbolic links. Windows has none such."""
OLD = ".old"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, which name no file."""

_held: set[str] = set()
"""Locks of this process: the system does not keep holders within one process apart."""


@dataclass(frozen=True)
class Record:
    """The files that runs wrote into a folder: digests by relative path.

    `is_complete` is False where a run had to stop before its end.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    is_complete: bool = True

    @classmethod
    def of(cls, folder: Path, *, is_complete: bool = True) -> Record:
        """The record of all files that now lie in a folder."""
        return cls({name: digest_of_file(folder / name) for name in _tree(folder)[0]}, is_complete)

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """A record that was written before; None where there is none.

        Raises:
            InputError: it is damaged.
        """
        if not path.is_file() or path.is_symlink():
            return None
        root = read_json(path)
        return cls({name: each.text() for name, each in root["files"].items()}, root["complete"].flag())

    def tree(self) -> dict[str, Any]:
        """The record as JSON."""
        return {"complete": self.is_complete, "files": dict(self.files)}

    def require_ours(self, folder: Path, *, shown: Path | None = None) -> None:
        """Check that a folder holds what the record has, and nothing else; `shown` is its name in messages.

        Raises:
            InputError: something else is there; the message names the first such thing.
        """
        files, folders = _tree(folder)
        ours = {str(parent) for name in self.files for parent in Path(name).parents}
        for name in sorted({*files, *folders}):
            is_ours = name in ours if name in folders else self.is_file_ours(folder, name)
            if not is_ours:
                why = "has changed since" if name in self.files else "is not ours"
                shown = shown or folder
                raise InputError(f"{shown}: will not be overwritten, {name!r} in it {why}; move it away")

    def remove(self, folder: Path) -> None:
        """Remove the files of the record, as far as they are as they were, then all empty folders."""
        files, folders = _tree(folder)
        for name in files:
            if self.is_file_ours(folder, name):
                (folder / name).unlink()
        for name in sorted(folders, reverse=True):  # the deepest first
            with suppress(OSError):  # not empty
                (folder / name).rmdir()

    def is_file_ours(self, folder: Path, name: str) -> bool:
        """Whether a file is as the record has it, and not elsewhere, by a link or by its name."""
        path = folder / name
        if name == RECORD:
            return True
        if name not in self.files or os.path.realpath(path) != f"{os.path.realpath(folder)}{os.sep}{name}":
            return False
        return path.is_file() and digest_of_file(path) == self.files[name]


def digest_of_file(path: Path) -> str:
    """SHA-256; that of nothing readable is empty."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


@contextmanager
def whole_folder(
    out: str | Path,
    *,
    overwrite: bool = False,
    inputs: Iterable[str | Path] = (),
    is_complete: Callable[[], bool] = lambda: True,
) -> Iterator[Path]:
    """A new folder that becomes `out` when the block ends well, and vanishes when it does not.

    A folder that an earlier run has made is replaced if that is asked for, or if that run was stopped before
    its end. No other file is ever removed, and no other run can write into `out` meanwhile.

    Args:
        overwrite: replace a result that is complete, too.
        inputs: files and folders that the run reads, which are not to be replaced.
        is_complete: asked at the end of the block: whether the run came to its end.

    Raises:
        InputError: `out` is in use, holds what is not ours, or cannot be written.
    """
    out = Path(os.path.realpath(out))
    if not out.name:
        raise InputError(f"{out}: is no folder of results; name a folder below it")
    staging, lock = fresh(out), out.with_name(f".{short(out)}{LOCK}")
    try:
        with made(out.parent), locked(lock, out) as handle:
            _clean_up(out, os.pread(handle, 1000, 0).decode(errors="replace"))
            os.truncate(handle, 0)
            os.pwrite(handle, staging.name.encode(), 0)
            record = _replaceable(out, overwrite)
            for path in (Path(os.path.realpath(each)) for each in inputs):
                if path == out or out in path.parents:
                    raise InputError(f"{path}: is read by this run, and would be replaced with {out}")
            try:
                staging.mkdir()
                yield staging
                _seal(staging, is_complete=is_complete())
                _replace(staging, out, record)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        at = Path(str(error.filename))
        is_ours = at in (lock, out, staging, *staging.parents) or staging in at.parents
        if not is_ours and error.errno not in FULL:
            raise
        raise InputError(f"{out}: cannot be written ({error.strerror})") from error


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """A folder that exists within the block; folders that were made for it go if they are then empty."""
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]  # the deepest first
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for each in missing:
            with suppress(OSError):  # not empty
                each.rmdir()


@contextmanager
def locked(lock: Path, what: Path, *, shared: bool = False) -> Iterator[int]:
    """Hold a lock, a file that exists as long as somebody holds it and is free when its holder has ended.

    Gives the open file; to open it once more and close that would free it.

    A process that is forked does not hold it. Where a file system has no locks, a warning says so.

    Args:
        what: the folder that it is of, for messages.
        shared: others may hold it too, if it is shared for them as well.

    Raises:
        InputError: another run holds it.
    """
    name = os.path.realpath(lock)
    taken = InputError(f"{what}: another run is writing there; wait for its end, or name another folder")
    if name in _held:
        raise taken
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | NO_LINKS, 0o666)
        try:
            if not _lock(handle, shared=shared):
                raise taken
            if _is_still(handle, lock):  # its holder may just have removed it
                break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    _held.add(name)
    try:
        yield handle
    finally:
        _held.discard(name)
        if not shared or _lock(handle, shared=False):
            with suppress(PermissionError):  # Windows removes no file that is open
                lock.unlink(missing_ok=True)
        os.close(handle)


def _lock(handle: int, *, shared: bool) -> bool:
    """Whether the lock of an open file is ours now."""
    try:
        import fcntl

        fcntl.lockf(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError) as error:
        warnings.warn(f"two runs could write into one folder here, without locks ({error})", stacklevel=2)
    return True


def _is_still(handle: int, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    return False


def _tree(folder: Path) -> tuple[list[str], set[str]]:
    """Relative paths of all files of a folder, links and other things among them, and of all folders."""
    files, folders = [], set()
    for root, below, names in os.walk(folder):
        at = Path(root).relative_to(folder)
        links = [name for name in below if os.path.islink(os.path.join(root, name))]
        folders |= {str(at / name) for name in below if name not in links}
        files += [str(at / name) for name in (*names, *links)]
    return sorted(files), folders


def _remove(folder: Path, name: str) -> None:
    """Remove a file, and the folders above it that are then empty."""
    (folder / name).unlink()
    with suppress(OSError):  # not empty
        for parent in Path(name).parents:
            if parent.name:
                (folder / parent).rmdir()


def _replaceable(out: Path, overwrite: bool) -> Record:
    """The record of what may be replaced in `out`, which may be absent or empty."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return Record()
    record = Record.read(out / RECORD) if out.is_dir() else None
    if not overwrite and (record is None or record.is_complete):
        raise InputError(f"{out}: already exists; name another folder, or ask to overwrite it")
    if record is None:
        raise InputError(f"{out}: will not be overwritten, no record ({RECORD}) says what a run wrote there")
    record.require_ours(out)
    return record


def _seal(folder: Path, *, is_complete: bool) -> None:
    """Write the record of a new folder. All files get the mode that the user's umask gives to new ones."""
    record = folder / RECORD
    write_json(record, Record.of(folder, is_complete=is_complete).tree())
    mode = record.stat().st_mode & 0o777
    for name in _tree(folder)[0]:
        if not os.path.islink(folder / name):
            os.chmod(folder / name, mode | ((folder / name).stat().st_mode & 0o111))


def _replace(staging: Path, out: Path, record: Record) -> None:
    """Rename `staging` to `out`, whose old content is moved aside before and removed after.

    Raises:
        InputError: something has appeared in `out` that is not of the record. It stays, and `staging` becomes
            a folder beside it, which the message names.
    """
    old = staging.with_name(f"{staging.name}{OLD}")
    if os.path.lexists(out):
        out.rename(old)
    try:
        if old.exists():
            record.require_ours(old, shown=out)
        staging.rename(out)
    except (OSError, InputError) as error:
        if old.exists():
            old.rename(out)
        if isinstance(error, OSError):
            raise
        beside = out.with_name(f"{short(out)}{staging.name[-9:]}")
        staging.rename(beside)
        raise InputError(f"the results are in {beside}, since {error}") from None
    if old.exists():
        record.remove(old)
        old.rmdir()


def _clean_up(out: Path, staging: str) -> None:
    """Remove what a killed run into `out` left beside it: the folder `staging`, which its lock names.

    What it had moved aside comes back.
    """
    for old in leftovers(out.parent, OLD, of=out):
        record = Record.read(old / RECORD)
        if not os.path.lexists(out):
            old.rename(out)
        elif record is not None:
            record.remove(old)
            with suppress(OSError):
                old.rmdir()
    for left in leftovers(out.parent, "", of=out):
        if not left.is_symlink() and left.name == staging:
            shutil.rmtree(left, ignore_errors=True)


class GrowingFolder:
    """A folder to which runs add pieces, groups of files, each with a record of its own in `.tarvis/`.

    A piece replaces the one of its name. A run that is killed leaves whole files, and records of all of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records = folder / RECORDS

    @contextmanager
    def lock(self, part: str = "") -> Iterator[None]:
        """Write alone, or together with the other `part`s; a folder that is then empty does not stay.

        Raises:
            InputError: another run is writing the folder, or this part of it.
        """
        with made(self.folder), ExitStack() as stack:
            stack.enter_context(locked(self.folder / LOCK, self.folder, shared=bool(part)))
            if part:
                stack.enter_context(locked(self.folder / f"{LOCK}.{part}", self.folder))
            else:
                for at, *_ in os.walk(self._records):
                    for left in leftovers(Path(at)):
                        shutil.rmtree(left) if left.is_dir() else left.unlink()
            try:
                yield
            finally:
                with suppress(OSError):  # not empty
                    self._records.rmdir()

    @contextmanager
    def piece(self, name: str, last: str = "") -> Iterator[Path]:
        """An empty folder whose files take their places when the block ends well: the file `last` at last.

        Raises:
            InputError: a file has the name of one, and is not of this piece.
        """
        path = self._records / f"{name}.json"
        staging = fresh(self._records / "piece", PART)
        staging.mkdir(parents=True)
        try:
            yield staging
            old, new = Record.read(path) or Record(), Record.of(staging)
            for each, digest in new.files.items():
                self._require_free(each, digest, old)
            for each in sorted(old.files, key=lambda each: each != last):
                if old.is_file_ours(self.folder, each) and old.files[each] != new.files.get(each):
                    _remove(self.folder, each)
            write_json(path, new.tree())
            for each in sorted(new.files, key=lambda each: each == last):
                (self.folder / each).parent.mkdir(parents=True, exist_ok=True)
                (staging / each).replace(self.folder / each)
        except InputError as error:  # of where the file is to be
            raise type(error)(str(error).replace(str(staging), str(self.folder))) from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def has(self, name: str) -> bool:
        """Whether there is a piece of this name."""
        return (self._records / f"{name}.json").is_file()

    def clear(self) -> None:
        """Remove all pieces.

        Raises:
            InputError: something in the folder belongs to none; nothing is removed.
        """
        records = [self._records / name for name in _tree(self._records)[0]]
        found = [record for each in records if (record := Record.read(each)) is not None]
        ours = {name: digest for record in found for name, digest in record.files.items()}
        ours |= {str(each.relative_to(self.folder)): digest_of_file(each) for each in records}
        locks = {each.name: digest_of_file(each) for each in self.folder.glob(f"{LOCK}*")}
        Record(ours | locks).require_ours(self.folder)
        Record(ours).remove(self.folder)

    def _require_free(self, name: str, digest: str, old: Record) -> None:
        path = self.folder / name
        links = [each for each in (path, *path.parents) if each.is_symlink() and self.folder in each.parents]
        if links:
            raise InputError(f"{links[0]}: is a link, which results do not follow; remove it")
        if (
            os.path.lexists(path)
            and not old.is_file_ours(self.folder, name)
            and digest_of_file(path) != digest
        ):
            raise InputError(f"{path}: will not be overwritten, no run wrote it; move it away")
