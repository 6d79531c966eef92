"""Folders of frames, a folder a sequence: what lies in them, and whether two hold the same."""

from __future__ import annotations

from pathlib import Path

from tarvis.structures import InputError


def folders(root: Path) -> list[str]:
    """Names of the folders in `root`, sorted; at least one."""
    return _listed(root, [path.name for path in _entries(root) if path.is_dir()], "folders of sequences")


def files(root: Path, ending: str) -> list[str]:
    """Names of the files in `root` that end so, sorted; at least one."""
    return _listed(root, [path.name for path in _entries(root) if path.suffix == ending], f"{ending} files")


def same_names(folder: Path, expected: list[str], found: list[str]) -> None:
    """Frames of a result are those of the truth, no more and no less."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, of which there is no truth"
        raise InputError(f"{folder}: {what}; expected {len(expected)} frames, got {len(found)}")


def _entries(root: Path) -> list[Path]:
    try:
        return [path for path in root.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{root}: cannot be read ({error.strerror})") from None


def _listed(root: Path, names: list[str], what: str) -> list[str]:
    if not names:
        raise InputError(f"{root}: has no {what}")
    return sorted(names)
