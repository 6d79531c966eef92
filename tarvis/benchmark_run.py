"""The videos of a benchmark, inferred into a folder that remembers which are finished.

    run.json       what was run: weights, classes, settings
    videos/        a file for each finished video: its share of the benchmark's JSON file
    results/       what the benchmark's server and scorer want
    viz/           pictures to look at

The files of a video are a piece of the folder (`tarvis.files.outputs.GrowingFolder`): its own file is written
last, so that a killed run leaves only whole results behind. In run.json, "complete" says whether all videos
are finished, and "frames" how many frames the finished ones have.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tarvis import cli
from tarvis.api import Model
from tarvis.datasets.benchmark import Benchmark, Roots, VideoSample
from tarvis.datasets.classmap import ClassMap
from tarvis.files.atomic import write_json
from tarvis.files.folders import output_name
from tarvis.files.outputs import GrowingFolder, digest_of_file
from tarvis.files.records import read_json
from tarvis.structures import DamagedError, InputError, VideoResult
from tarvis.tasks import TASKS
from tarvis.video.frames import ImageFrames, prefetch
from tarvis.video.overlays import write_overlays

LEAST_SCORE_DRAWN = 0.3
RECORD = "run.json"
PROGRESS = ("complete", "frames")
"""Keys of the record that change as the run goes on."""


@dataclass(frozen=True)
class BenchmarkRun:
    """A benchmark's split under one set of settings, in the folder `out`.

    `settings` are fields of `tarvis.config.InferenceConfig`; `classes` says which of the weights' classes are
    the benchmark's, None where the weights know its own; `amp` is a key of `tarvis.cli.AMP`.
    """

    benchmark: Benchmark
    split: str
    task: str
    out: Path
    settings: dict[str, Any]
    classes: ClassMap | None = None
    amp: str = "off"

    @property
    def folder(self) -> GrowingFolder:
        return GrowingFolder(self.out)

    def claim(self, weights: Path, data: Roots, *, overwrite: bool, is_alone: bool) -> None:
        """Begin in the folder, which must be locked, or go on in it if it is of the same run.

        Args:
            overwrite: the results of another run may be removed, provided that
            is_alone: no other process writes into the folder now.

        Raises:
            InputError: the folder holds something else.
        """
        record = {
            "benchmark": self.benchmark.name,
            "split": self.split,
            "task": self.task,
            "images": str(data.images.resolve()),
            "annotations": str(data.annotations.resolve()),
            "weights_sha256": digest_of_file(weights),
            "classes": None if self.classes is None else dataclasses.asdict(self.classes),
            "amp": self.amp,
            "settings": self.settings,
        }
        record = json.loads(json.dumps(record))
        path = self.out / RECORD
        if path.is_file():
            other = read_json(path).value
            if isinstance(other, dict):
                other = {key: value for key, value in other.items() if key not in PROGRESS}
            if other == record:
                return
            if not (overwrite and is_alone):
                how = "ask to --overwrite" if is_alone else "remove them"
                raise InputError(
                    f"{self.out}: has results of another run ({_difference(other, record)}); "
                    f"name another --out, or {how}"
                )
            self.folder.clear()
        elif self.out.exists() and (
            not self.out.is_dir() or any(each.name[0] != "." for each in self.out.iterdir())
        ):
            raise InputError(f"{self.out}: is in use and holds no run; name another --out")
        self._write_record(record | dict.fromkeys(PROGRESS, 0) | {"complete": False})

    def note(self, videos: Sequence[VideoSample]) -> None:
        """Note in `run.json` how much of the videos is finished."""
        finished = [video for video in videos if self.is_finished(video)]
        frames = sum(len(video.images) for video in finished)
        record = read_json(self.out / RECORD).value
        self._write_record(record | {"complete": len(finished) == len(videos), "frames": frames})

    def _write_record(self, record: dict[str, Any]) -> None:
        with self.folder.piece("run") as piece:
            write_json(piece / RECORD, record)

    def is_finished(self, video: VideoSample, *, viz: bool = False) -> bool:
        """Whether nothing of a video is left to do; with `viz`, its pictures are part of that."""
        return self._file(video).is_file() and (not viz or (self.out / "viz" / _name(video)).is_dir())

    def share(self, video: VideoSample) -> Any:
        """A finished video's share of the benchmark's JSON file."""
        return read_json(self._file(video)).value

    def infer(
        self, model: Model, videos: Sequence[VideoSample], *, viz: bool = False, is_shown: bool = True
    ) -> None:
        """Infer the videos; the files of one are written while the network runs on the next.

        Args:
            viz: also draw overlays.
            is_shown: behind a progress bar on stderr.

        Raises:
            DamagedError: a video cannot be used, and some before it are finished.
        """
        total = sum(len(video.images) for video in videos)
        with (
            tqdm(total=total, unit="frame", file=sys.stderr, disable=not is_shown) as bar,
            ThreadPoolExecutor(1) as writer,
        ):
            writing: Future[None] | None = None
            for k, video in enumerate(videos):
                bar.set_description(f"{video.name} ({k + 1} of {len(videos)})")
                try:
                    result = self._segment(model, video, bar)
                except InputError as error:
                    if writing is None:
                        raise
                    writing.result()
                    raise DamagedError(f"{error}; the {k} videos before are finished") from None
                if writing is not None:
                    writing.result()
                writing = writer.submit(self._write, result, video, viz)
            if writing is not None:
                writing.result()

    def _segment(self, model: Model, video: VideoSample, bar: tqdm[Any]) -> VideoResult:
        source = ImageFrames(video.name, video.images)
        if video.size is not None and source.size != video.size:
            raise InputError(
                f"{video.images[0]}: expected a picture of {video.size}, as the annotations say, "
                f"got {source.size} (height, width)"
            )
        task = TASKS[self.task]
        references = task.targets(video.references())
        if not references and not task.finds_classes:  # in some videos of BURST
            bar.update(len(video.images))
            return VideoResult(self.task, source.size, len(video.images), ())
        segmentation = model.segment(
            source,
            self.task,
            dataset=self._class_set if task.finds_classes else None,
            references=references,
            amp=cli.AMP[self.amp],
            **self.settings,
        )
        segmentation.run(bar)
        result = segmentation.results[self.task]
        return result if self.classes is None else self.classes.apply(result)

    @property
    def _class_set(self) -> str:
        return self.benchmark.name if self.classes is None else self.classes.class_set

    def _write(self, result: VideoResult, video: VideoSample, viz: bool) -> None:
        file = str(self._file(video).relative_to(self.out))
        with self.folder.piece(file.removesuffix(".json"), last=file) as piece:
            share = self.benchmark.write(result, video, piece / "results")
            if viz:
                self._draw(result, video, piece / "viz" / _name(video))
            write_json(piece / file, share)

    def _draw(self, result: VideoResult, video: VideoSample, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        task = TASKS[self.task]
        write_overlays(
            result,
            prefetch(ImageFrames(video.name, video.images)),
            folder,
            classes=self.benchmark.classes if task.finds_classes else None,
            min_score=LEAST_SCORE_DRAWN,
            references=task.targets(video.references()),
        )

    def _file(self, video: VideoSample) -> Path:
        return self.out / "videos" / f"{_name(video)}.json"


def _name(video: VideoSample) -> str:
    """Of files of a video, below a folder."""
    return "/".join(map(output_name, video.name.split("/")))


def _difference(other: Any, record: dict[str, Any]) -> str:
    """The first thing in which two records differ."""
    if not isinstance(other, dict):
        return "run.json is damaged"
    return next(
        (
            f"{key} {other.get(key)!r} instead of {record[key]!r}"
            for key in record
            if other.get(key) != record[key]
        ),
        "run.json has other keys",
    )
