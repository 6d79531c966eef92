"""The videos of a benchmark, inferred into a folder that remembers which are finished.

    run.json       what was run: weights, classes, settings
    videos/        a file for each finished video: its share of the benchmark's JSON file
    results/       what the benchmark's server and scorer want
    viz/           pictures to look at

A video's file is written atomically at the end and removed before a rerun, so that a killed run leaves only
whole results behind.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
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
from tarvis.files.records import read_json
from tarvis.structures import InputError, VideoResult
from tarvis.tasks import TASKS
from tarvis.video.frames import ImageFrames, prefetch
from tarvis.video.overlays import write_overlays

LEAST_SCORE_DRAWN = 0.3


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

    def claim(self, weights: Path, data: Roots, *, overwrite: bool, is_alone: bool) -> None:
        """Make the folder, or go on in it if it is of the same run.

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
            "weights_sha256": _sha256(weights),
            "classes": None if self.classes is None else dataclasses.asdict(self.classes),
            "amp": self.amp,
            "settings": self.settings,
        }
        record = json.loads(json.dumps(record))
        path = self.out / "run.json"
        if path.is_file():
            other = read_json(path).value
            if other == record:
                return
            if not (overwrite and is_alone):
                how = "ask to --overwrite" if is_alone else "remove them"
                raise InputError(
                    f"{self.out}: has results of another run ({_difference(other, record)}); "
                    f"name another --out, or {how}"
                )
            for name in ("videos", "results", "viz"):  # in this order: if killed now, the other run goes on
                if (self.out / name).exists():
                    shutil.rmtree(self.out / name)
        elif self.out.exists() and (
            not self.out.is_dir() or any(each.name[0] != "." for each in self.out.iterdir())
        ):
            raise InputError(f"{self.out}: is in use and holds no run; name another --out")
        try:
            write_json(path, record)
        except FileNotFoundError:  # another shard that starts now was faster
            if read_json(path).value != record:
                raise

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
        """
        total = sum(len(video.images) for video in videos)
        with (
            tqdm(total=total, unit="frame", file=sys.stderr, disable=not is_shown) as bar,
            ThreadPoolExecutor(1) as writer,
        ):
            writing: Future[None] | None = None
            for k, video in enumerate(videos):
                bar.set_description(f"{video.name} ({k + 1} of {len(videos)})")
                result = self._segment(model, video, bar)
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
        self._file(video).unlink(missing_ok=True)
        share = self.benchmark.write(result, video, self.out / "results")
        if viz:
            self._draw(result, video)
        write_json(self._file(video), share)

    def _draw(self, result: VideoResult, video: VideoSample) -> None:
        folder = self.out / "viz" / _name(video)
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


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


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
