"""Videos that people work on: each is a folder with the video, what was given, and the masks that were found.

ROOT/PERSON/SESSION/
    video.mp4, or frames/      what was uploaded
    session.json               names, colours, what was given, prompts
    masks/00003.json           masks of frames 768 to 1023
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tarvis.files import rle
from tarvis.files.atomic import write_json
from tarvis.files.folders import output_name
from tarvis.files.records import Entry, read_json, read_masks
from tarvis.structures import LONGEST_SIDE, RLE, InputError, Size, VideoResult
from tarvis.video.tracker import Given, Targets
from tarvis.video.visualize import track_color

CHUNK = 256
"""Frames of a file of masks."""
MOST_UNDONE = 50
"""Steps that can be taken back."""
MOST_OBJECTS = 128
STATE, MASKS, FRAMES = "session.json", "masks", "frames"
LONGEST_TITLE = 80


@dataclass(frozen=True)
class Thing:
    """An object as the page shows it."""

    id: int
    name: str
    color: str
    is_hidden: bool = False


class State(NamedTuple):
    """All that can be undone; what it holds is never changed."""

    things: dict[int, Thing]
    prompts: dict[int, dict[int, dict[str, Any]]]
    targets: Targets


@dataclass
class Session:
    """A video and the objects in it. `lock` is held by whoever changes it.

    Attributes:
        things: by id.
        prompts: by object, then by frame: what the page shows there to be changed.
    """

    folder: Path
    name: str
    video: str
    size: Size
    fps: float | None
    num_frames: int
    things: dict[int, Thing] = field(default_factory=dict)
    prompts: dict[int, dict[int, dict[str, Any]]] = field(default_factory=dict)
    targets: Targets = field(default_factory=Targets)
    next_id: int = 1
    """Of a new object; ids are not used again, also after undo."""

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.is_deleted = False
        self._past: list[State] = []
        self._future: list[State] = []
        self._saved: dict[int, dict[int, RLE]] = dict(self.targets.masks)

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def path(self) -> str:
        """The video."""
        return str(self.folder / self.video)

    @property
    def state(self) -> State:
        return State(dict(self.things), dict(self.prompts), self.targets.copy())

    @contextmanager
    def step(self) -> Iterator[None]:
        """What the block changes is saved, and can be undone as one step; nothing is changed if it fails."""
        with self.lock:
            before = self.state
            try:
                yield
                self.save()
            except BaseException:
                self.things, self.prompts, self.targets = before
                raise
            self._past = [*self._past, before][-MOST_UNDONE:]
            self._future = []

    def undo(self, *, redo: bool = False) -> None:
        """Take the last step back, or again, if there is one."""
        with self.lock:
            source, target = (self._future, self._past) if redo else (self._past, self._future)
            if source:
                target.append(self.state)
                self.things, self.prompts, self.targets = source.pop()
                self.save()

    def add(self, name: str = "") -> Thing:
        """A new object."""
        if len(self.things) >= MOST_OBJECTS:
            raise InputError(f"a session holds at most {MOST_OBJECTS} objects")
        number, self.next_id = self.next_id, self.next_id + 1
        thing = Thing(number, name or f"object {number}", "#{:02x}{:02x}{:02x}".format(*track_color(number)))
        self.things[number] = thing
        return thing

    def take(self, name: str, masks: dict[int, RLE]) -> None:
        """A new object with its masks by frame; it counts as given where it is first seen."""
        shown = {frame: mask for frame, mask in masks.items() if rle.area(mask)}
        if shown:
            thing = self.add(name)
            self.targets.give(thing.id, min(shown), shown[min(shown)])
            for frame, mask in shown.items():
                self.targets.masks[frame] = {**self.targets.masks.get(frame, {}), thing.id: mask}

    def remove(self, number: int, frame: int | None) -> None:
        """Remove an object, or what it is from a frame on."""
        if number in self.targets.given:
            self.targets.remove(number, frame)
        elif frame is not None:
            raise InputError(f"object {number} was never given")
        if frame is None:
            del self.things[number]
            self.prompts.pop(number, None)

    def thing(self, number: Any) -> Thing:
        if type(number) is not int or number not in self.things:
            raise InputError(f"no object {number}; there are: {', '.join(map(str, self.things)) or 'none'}")
        return self.things[number]

    def result(self) -> VideoResult:
        """The masks of the objects that are not hidden."""
        tracks = tuple(
            track
            for track in self.targets.tracks()
            if track.id in self.things and not self.things[track.id].is_hidden
        )
        return VideoResult("vos", self.size, self.num_frames, tracks)

    def tree(self) -> dict[str, Any]:
        """What the page wants to know; masks come by `masks_of`."""
        with self.lock:
            return self._tree()

    def _tree(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "name": self.name,
            "size": list(self.size),
            "fps": self.fps,
            "num_frames": self.num_frames,
            "things": [asdict(thing) for thing in self.things.values()],
            "prompts": self.prompts,
            "given": {
                number: {frame: entry.mask is not None for frame, entry in each.items()}
                for number, each in self.targets.given.items()
            },
            "known": self._known(),
            "can_undo": bool(self._past),
            "can_redo": bool(self._future),
        }

    def _known(self) -> dict[str, Any]:
        """Frames that were followed, and those that show each object, as lists of [first, last]."""
        frames = sorted(self.targets.masks)
        shown: dict[int, list[int]] = {number: [] for number in self.things}
        for frame in frames:
            for number, mask in self.targets.masks[frame].items():
                if number in shown and rle.area(mask):
                    shown[number].append(frame)
        return {"frames": _ranges(frames), "shown": {number: _ranges(each) for number, each in shown.items()}}

    def masks_of(self, first: int, last: int) -> dict[int, dict[int, str]]:
        """Run-length codes of the masks of a range, by frame and object."""
        frames = (frame for frame in range(first, last + 1) if frame in self.targets.masks)
        return {frame: codes(self.targets.masks[frame]) for frame in frames}

    def save(self) -> None:
        """Write what has changed."""
        if self.is_deleted:
            return
        given = {
            number: {frame: [_text(entry.mask), _text(entry.before)] for frame, entry in each.items()}
            for number, each in self.targets.given.items()
        }
        tree = {
            "name": self.name,
            "video": self.video,
            "size": list(self.size),
            "fps": self.fps,
            "num_frames": self.num_frames,
            "things": [asdict(thing) for thing in self.things.values()],
            "prompts": self.prompts,
            "given": given,
            "next_id": self.next_id,
        }
        masks = self.targets.masks
        changed = {
            frame // CHUNK
            for frame in {*masks, *self._saved}
            if masks.get(frame) is not self._saved.get(frame)
        }
        for chunk in sorted(changed):
            frames = range(chunk * CHUNK, (chunk + 1) * CHUNK)
            entries = {frame: codes(masks[frame]) for frame in frames if frame in masks}
            write_json(self.folder / MASKS / f"{chunk:05d}.json", entries)
        write_json(self.folder / STATE, tree)
        self._saved = dict(masks)

    @classmethod
    def read(cls, folder: Path) -> Session:
        """A session that was saved.

        Raises:
            InputError: its files are damaged.
        """
        root = read_json(folder / STATE)
        size = _size(root["size"])
        video = root["video"].text()
        if video != output_name(video) or not (folder / video).exists():
            raise root["video"].expected("the name of a file of the session")
        targets = Targets()
        for number, each in root["given"].by_number().items():
            of_frames = each.by_number()
            targets.given[number] = {
                frame: Given(*(_code(code, size) for code in entry.entries(2, "masks")))
                for frame, entry in of_frames.items()
            }
        for path in sorted((folder / MASKS).glob("*.json")):
            for frame, entry in read_json(path).by_number().items():
                found = entry.by_number()
                masks = read_masks([*found.values()], size)
                targets.masks[frame] = dict(zip(found, masks, strict=True))
        prompts = {
            number: {frame: entry.value for frame, entry in each.by_number().items()}
            for number, each in root["prompts"].by_number().items()
        }
        things = [
            Thing(
                each["id"].integer(1),
                each["name"].text(),
                color(each["color"].value),
                each["is_hidden"].flag(),
            )
            for each in root["things"].entries()
        ]
        count, last = root["num_frames"].integer(1), root["next_id"].integer(1)
        ids = {thing.id for thing in things}
        known = {id for masks in targets.masks.values() for id in masks}
        frames = {*targets.masks, *(frame for each in targets.given.values() for frame in each)}
        is_sound = known <= targets.given.keys() <= ids and len(ids) <= MOST_OBJECTS
        if not is_sound or max(ids, default=0) >= last or max(frames, default=0) >= count:
            raise root.error("objects, masks and frames contradict each other")
        fps = root.get("fps")
        return cls(
            folder,
            root["name"].text(),
            video,
            size,
            None if fps is None or fps.value is None else fps.number(),
            count,
            {thing.id: thing for thing in things},
            prompts,
            targets,
            last,
        )


def codes(masks: dict[int, RLE]) -> dict[int, str]:
    return {number: mask["counts"].decode("ascii") for number, mask in masks.items()}


def color(value: Any) -> str:
    """A colour as #rrggbb.

    Raises:
        InputError: it is none.
    """
    text = str(value)
    if len(text) != 7 or text[0] != "#" or any(c not in "0123456789abcdefABCDEF" for c in text[1:]):
        raise InputError(f"expected a colour #rrggbb, got {text[:20]!r}")
    return text


def title(value: Any) -> str:
    """A name that people read."""
    text = "".join(c for c in str(value) if c.isprintable()).strip()
    return text[:LONGEST_TITLE]


def _text(mask: RLE | None) -> str | None:
    return None if mask is None else mask["counts"].decode("ascii")


def _code(entry: Entry, size: Size) -> RLE | None:
    return None if entry.value is None else read_masks([entry], size)[0]


def _size(entry: Entry) -> Size:
    height, width = (side.integer(1, LONGEST_SIDE) for side in entry.entries(2, "sides"))
    return height, width


def _ranges(numbers: list[int]) -> list[list[int]]:
    """Rising numbers as [first, last] of each run."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found
