"""Which frames a clip is made of."""

from __future__ import annotations


class ClipSchedule:
    """Cuts a video of unknown length into overlapping clips while its frames arrive.

    A clip starts every `length - overlap` frames from frame `first` on and has `length` frames; the last
    one may be shorter. The video ends with the first clip that reaches its last frame, so that every clip
    has at least one frame that no other clip before it has.
    """

    def __init__(self, length: int, overlap: int, first: int = 0) -> None:
        if length < 1 or not 0 <= overlap < length or first < 0:
            raise ValueError(
                f"expected 0 <= overlap < length and first >= 0, got {overlap=}, {length=}, {first=}"
            )
        self._length = length
        self._step = length - overlap
        self._next = first  # where the next clip starts
        self._covered = first  # frames before this one are in some clip

    @property
    def next_start(self) -> int:
        """First frame of the next clip: no frame before it is needed again."""
        return self._next

    def advance(self, num_frames: int) -> list[range]:
        """The clips that became complete, given that `num_frames` frames of the video have arrived."""
        clips = []
        while self._next + self._length <= num_frames:
            clips.append(self._clip(self._next + self._length))
        return clips

    def finish(self, num_frames: int) -> list[range]:
        """The remaining clips of a video that ended after `num_frames` frames; the last may be short."""
        clips = self.advance(num_frames)
        if self._covered < num_frames:
            clips.append(self._clip(num_frames))
        return clips

    def _clip(self, end: int) -> range:
        clip = range(self._next, end)
        self._next += self._step
        self._covered = end
        return clip


def clip_frames(num_frames: int, length: int, overlap: int, first: int = 0) -> list[range]:
    """All clips of a video of known length; none if it ends before `first`."""
    return ClipSchedule(length, overlap, first).finish(num_frames)
