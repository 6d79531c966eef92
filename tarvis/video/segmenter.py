"""VideoSegmenter: a video goes in frame by frame, masks come out one clip later, tracks at its end.

segmenter = VideoSegmenter(model, ["vis"], classes=class_table("ovis"), settings=INFERENCE["ovis"])
for frames in ...:  # uint8 RGB [n, H, W, 3], any n
    for result in segmenter.step(frames):
        ...
tracks = segmenter.finish()["vis"].tracks
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarvis.config import InferenceConfig
from tarvis.datasets.classes import ClassTable
from tarvis.stitch.resize import network_size, resize_frame
from tarvis.stitch.schedule import ClipSchedule
from tarvis.structures import (
    Features,
    FrameResult,
    Geometry,
    InputError,
    Network,
    Prediction,
    Queries,
    Reference,
    Size,
    VideoResult,
)
from tarvis.tasks import TASKS, Session, Task, Video
from tarvis.video.frames import as_frame


class VideoSegmenter:
    """Runs one or several tasks over one video in a single pass.

    A clip is encoded once and asked with the queries of every task; the result is that of separate runs.
    Frames that clips share pass the backbone once. Memory grows with the video only by what its
    final scores need: run-length codes, compressed label maps and sums of class logits.

    Args:
        model: the network, in eval mode.
        tasks: names from `tarvis.tasks.TASKS`, or tasks of the caller's own.
        classes: what VIS and VPS look for; the network must have that class set.
        references: what VOS (masks) and PET (points) follow; frames count from 0.
        settings: clips, sizes and thresholds; one set for all tasks of the pass.
        amp: run the network under autocast in bfloat16 or float16; logits are upsampled in float32.
        size: (H, W) of the frames, if known: what does not fit is then refused at once.

    Raises:
        InputError: at the first frame, or at once if `size` is given: a task misses its classes or
            references, or they do not fit.
    """

    def __init__(
        self,
        model: Network,
        tasks: Sequence[str | Task],
        *,
        classes: ClassTable | None = None,
        references: Sequence[Reference] = (),
        settings: InferenceConfig | None = None,
        amp: torch.dtype | None = None,
        size: Size | None = None,
    ) -> None:
        known = {name: TASKS.get(name) if isinstance(name, str) else name for name in tasks}
        if None in known.values() or len({*known}) < len(tasks) or not tasks:
            raise InputError(
                f"expected one or several of {', '.join(TASKS)}, got {', '.join(map(str, tasks)) or 'none'}"
            )
        if model.training:
            raise InputError("the network is in train mode, where it makes other queries: call .eval() first")
        self._model = model
        self._tasks = [task for task in known.values() if task is not None]
        self._classes = classes
        self._references = tuple(references)
        self._settings = settings or InferenceConfig()
        self._amp = amp
        self._geometry: Geometry | None = None
        self._passes: list[_Pass] = []
        self._frames: dict[int, Tensor] = {}  # frame -> uint8 [3, H, W] at network size, until extracted
        self._maps: dict[int, tuple[Tensor, ...]] = {}  # frame -> backbone maps [1, 1, C, h, w]
        self._num_frames = 0
        self._results: dict[str, VideoResult] | None = None
        self.is_cut = False
        """Set before `flush` where the video ends before its own end; see `tarvis.tasks.Session.is_cut`."""
        if size is not None:
            self._begin(size)

    def step(self, frames: NDArray[np.uint8] | Tensor | Sequence[Any]) -> list[FrameResult]:
        """Feed the next frames (RGB uint8, [n, H, W, 3] or a list of [H, W, 3], of NumPy, torch or lists).

        Returns:
            The frames that became final, per task in order of time.

        Raises:
            InputError: frames of another type, or of another size than those before.
        """
        if self._results is not None:
            raise InputError("the video has ended: make a new VideoSegmenter for the next one")
        finished: list[FrameResult] = []
        for frame in frames:
            frame = as_frame(frame)
            geometry = self._geometry or self._begin((frame.shape[0], frame.shape[1]))
            if frame.shape[:2] != geometry.original:
                raise InputError(
                    f"frame {self._num_frames} is {frame.shape[0]}x{frame.shape[1]}, "
                    f"those before {geometry.original[0]}x{geometry.original[1]} (height x width)"
                )
            resized = np.ascontiguousarray(resize_frame(frame, geometry.network).transpose(2, 0, 1))
            self._frames[self._num_frames] = torch.from_numpy(resized)
            self._num_frames += 1
            # frame by frame, so that a step of any length keeps no more than a clip
            finished += self._run([(p, p.schedule.advance(self._num_frames)) for p in self._passes])
        return finished

    def flush(self) -> list[FrameResult]:
        """End the video: run what is left of it and return the frames not returned yet."""
        if self._results is not None:
            return []
        if self._num_frames == 0:
            raise InputError("the video has no frames")
        finished = self._run([(p, p.schedule.finish(self._num_frames)) for p in self._passes])
        results = {}
        for shared in self._passes:
            for name, session in shared.sessions.items():
                session.is_cut = self.is_cut
                last, results[name] = session.finish(self._num_frames)
                finished += last
        self._results = {task.name: results[task.name] for task in self._tasks}
        self._frames, self._maps = {}, {}
        return finished

    def finish(self) -> dict[str, VideoResult]:
        """End the video if `flush` has not, and return what each task found in all of it."""
        self.flush()
        assert self._results is not None
        return self._results

    def _begin(self, size: tuple[int, int]) -> Geometry:
        settings = self._settings
        self._geometry = Geometry(size, network_size(size, settings.min_size, settings.max_size))
        video = Video(self._geometry, settings, self._classes, self._references)
        passes: dict[int, _Pass] = {}
        for task in self._tasks:
            session = task.start(video)
            # tasks that start at the same frame share their clips
            shared = passes.setdefault(session.first_frame, _Pass(settings, session.first_frame))
            shared.sessions[task.name] = session
        self._passes = list(passes.values())
        return self._geometry

    @torch.inference_mode()
    def _run(self, due: list[tuple[_Pass, list[range]]]) -> list[FrameResult]:
        finished: list[FrameResult] = []
        # clips in order of time, so that frames shared by passes are dropped as early as can be
        clips = sorted(((clip, p) for p, ready in due for clip in ready), key=lambda item: item[0].start)
        for clip, shared in clips:
            with self._autocast():
                features = self._model.fuse(self._backbone_maps(clip))
                answers: list[tuple[Queries, Prediction]] = []
                for session in shared.sessions.values():
                    queries = session.queries(self._model, features, clip)
                    prediction = None if queries is None else self._ask(clip, features, queries, answers)
                    finished += session.add(clip, prediction)
        needed = min((p.schedule.next_start for p in self._passes), default=0)
        # what stays is copied out of its batch, or it would keep all of that alive
        self._maps = {f: tuple(map(_own, maps)) for f, maps in self._maps.items() if f >= needed}
        for frame in [f for f in self._frames if f < needed]:
            del self._frames[frame]
        return finished

    def _ask(
        self, clip: range, features: Features, queries: Queries, answers: list[tuple[Queries, Prediction]]
    ) -> Prediction:
        """Decode; a task that asks what another has asked of this clip (VIS and VPS do) gets its answer."""
        for asked, answer in answers:
            if asked.groups == queries.groups and torch.equal(asked.content, queries.content):
                return answer
        prediction = self._model.decode(features, queries)
        if not prediction.mask_embedding.isfinite().all():
            raise InputError(
                f"frames {clip.start} to {clip.stop - 1}: the network's output is not finite; "
                f"the weights are damaged, or float16 is too narrow for them (try bfloat16)"
            )
        answers.append((queries, prediction))
        return prediction

    def _backbone_maps(self, clip: range) -> tuple[Tensor, ...]:
        """Maps [1, T, C, h, w] of a clip; frames seen in an earlier clip are not computed again."""
        new = [frame for frame in clip if frame not in self._maps]
        if new:
            device = self._model.device
            frames = torch.stack([self._frames.pop(frame) for frame in new])[None]  # [1, n, 3, H, W]
            maps = self._model.extract(frames.to(device, non_blocking=True))
            for t, frame in enumerate(new):
                self._maps[frame] = tuple(level[:, t : t + 1] for level in maps)
        levels = zip(*(self._maps[frame] for frame in clip), strict=True)
        return tuple(torch.cat(level, 1) for level in levels)

    def _autocast(self) -> AbstractContextManager[object]:
        if self._amp is None:
            return nullcontext()
        return torch.autocast(self._model.device.type, dtype=self._amp)


def _own(x: Tensor) -> Tensor:
    """`x` in memory of its own."""
    return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x


class _Pass:
    """Tasks whose clips begin at the same frame, with those clips."""

    def __init__(self, settings: InferenceConfig, first_frame: int) -> None:
        self.schedule = ClipSchedule(settings.clip_length, settings.overlap, first_frame)
        self.sessions: dict[str, Session] = {}
