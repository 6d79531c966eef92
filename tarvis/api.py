"""Five lines from a video to masks.

import tarvis
model = tarvis.load("weights.pth")
for result in model.segment("video.mp4", task="vis"):
    for track, mask in result.masks.items():
        ...  # mask: COCO run-length code; tarvis.files.rle.decode(mask) is the bool [H, W] array
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from tarvis.config import InferenceConfig, ModelConfig
from tarvis.datasets.classes import TABLES, ClassTable, class_table, named_classes
from tarvis.datasets.registry import INFERENCE
from tarvis.files.pictures import Picture
from tarvis.model.weights import BUNDLED, WeightsError, load_weights, network_with
from tarvis.structures import FrameResult, InputError, Network, Reference, VideoResult
from tarvis.tasks import FOLLOW, TASKS
from tarvis.video.frames import ArrayFrames, FrameSource, open_frames, prefetch
from tarvis.video.references import masks_of_ids, read_masks, read_points
from tarvis.video.segmenter import VideoSegmenter
from tarvis.video.tracker import Tracker


def load(
    path: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    config: ModelConfig | None = None,
    trust: bool = False,
    compile: bool = False,
) -> Model:
    """Load weights: a published `.pth` with its `config.yaml` beside it, our checkpoints, or `.safetensors`.

    Args:
        path: the file; without one, the small network that comes with the package.
        device: "auto" is the GPU where there is one.
        config: for files that come without one.
        trust: allow pickled objects other than tensors; only for files whose origin you trust.
        compile: compile the network with torch.compile; the first clips are slow, later ones fast.

    Raises:
        InputError: what is wrong with the file, or a device this machine does not have.
    """
    path = BUNDLED if path is None else Path(path)
    state, config = load_weights(path, config=config, trust=trust)
    try:
        network = network_with(state, config)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    return Model(network, config, device=device, compile=compile)


class Model:
    """A network ready to segment videos. `network` is the module, `config` its shape."""

    def __init__(
        self,
        network: Network,
        config: ModelConfig,
        *,
        device: str | torch.device = "auto",
        compile: bool = False,
    ) -> None:
        self.config = config
        self.network = network.eval().requires_grad_(False).to(pick_device(device))
        if compile:
            self.network = copy.copy(self.network)  # the caller's module stays as it was
            for part in ("extract", "fuse", "decode"):
                setattr(self.network, part, torch.compile(getattr(self.network, part)))

    @property
    def device(self) -> torch.device:
        return self.network.device

    def segment(
        self,
        source: str | Path | FrameSource | Sequence[Any] | NDArray[Any] | Tensor,
        task: str | Sequence[str] = "vis",
        *,
        dataset: str | None = None,
        masks: str | Path | Sequence[str | Path] | NDArray[Any] | Tensor = (),
        points: str | Path | Sequence[Mapping[str, Any]] | None = None,
        references: Sequence[Reference] = (),
        amp: torch.dtype | None = None,
        **settings: Any,
    ) -> Segmentation:
        """Segment a video; iterate over the answer to get its frames while they are made.

        Args:
            source: a video file, a folder of images, a glob pattern, or frames, RGB uint8 [n, H, W, 3].
            task: "vis", "vps", "vos", "pet", or several of them, for one pass over the video.
            dataset: whose classes VIS and VPS look for and whose published settings are used.
            masks: for VOS, PNGs as in `tarvis.video.references.read_masks`; or ids [H, W] of frame 0.
            points: for PET, a JSON file as in `tarvis.video.references.read_points`; or its list.
            references: given objects as values, besides those in files.
            amp: torch.bfloat16 or torch.float16 for mixed precision.
            settings: fields of `tarvis.config.InferenceConfig` that differ from the dataset's.

        Raises:
            InputError: input that cannot be used; the message says what and why.
        """
        tasks = _known_tasks(task)
        frames = _source(source)
        given: list[Reference] = []
        if isinstance(masks, np.ndarray | Tensor):
            given += masks_of_ids(masks, frames)
        elif masks:
            given += read_masks([masks] if isinstance(masks, str | Path) else masks, frames)
        if points is not None:
            given += read_points(points, frames)
        followed = {id(r) for name in tasks for r in TASKS[name].targets(given)}
        if unused := [r for r in given if id(r) not in followed]:
            kind = "masks" if unused[0].point is None else "points"
            raise InputError(f"{kind} were given, but {', '.join(tasks)} does not follow any")
        given += references
        classes = self.classes(tasks, dataset)
        chosen = self._settings(settings_name(tasks, dataset, classes), settings)
        segmenter = VideoSegmenter(
            self.network,
            tasks,
            classes=classes,
            references=given,
            settings=chosen,
            amp=amp,
            size=frames.size,
        )
        return Segmentation(segmenter, frames, classes, tuple(given), chosen)

    def track(
        self,
        source: str | Path | FrameSource | Sequence[Any] | NDArray[Any] | Tensor,
        *,
        amp: torch.dtype | None = None,
        **settings: Any,
    ) -> Tracker:
        """Follow objects that are given, corrected and removed while the work goes on: see `Tracker`.

        Args:
            source: as in `segment`.
            amp: torch.bfloat16 or torch.float16 for mixed precision.
            settings: fields of `tarvis.config.InferenceConfig` that differ from those of DAVIS.

        Raises:
            InputError: input that cannot be used; the message says what and why.
        """
        return Tracker(self.network, _source(source), self._settings(FOLLOW.default_dataset, settings), amp)

    def _settings(self, dataset: str, changes: Mapping[str, Any]) -> InferenceConfig:
        """Settings of a dataset that suit the network, with changes."""
        known = {field.name for field in dataclasses.fields(InferenceConfig)}
        if extra := changes.keys() - known:
            raise InputError(f"unknown setting {', '.join(sorted(extra))}; known: {', '.join(sorted(known))}")
        return dataclasses.replace(self.config.suited(INFERENCE[dataset]), **changes)

    def classes(self, tasks: str | Sequence[str], dataset: str | None = None) -> ClassTable | None:
        """The class table the tasks will use; None if they need none.

        Raises:
            InputError: the weights have not learned these classes.
        """
        tasks = _known_tasks(tasks)
        finding = [name for name in tasks if TASKS[name].finds_classes]
        if not finding:
            return None
        sets = self.config.class_sets
        choosy = max(finding, key=lambda task: TASKS[task].needs_stuff)  # its classes suit the others too
        name, have = dataset or TASKS[choosy].default_dataset, ", ".join(sets) or "none"
        if dataset is None and name not in sets:
            if len(sets) != 1:
                raise InputError(f"{finding[0]}: name the class set of these weights, which have: {have}")
            name = next(iter(sets))
        if name not in sets:
            raise InputError(f"{finding[0]}: these weights have no classes of {name!r}; they have: {have}")
        own = self.config.own_classes.get(name)
        if own is not None:
            return named_classes(name, own.names, own.is_thing)
        if name not in TABLES or class_table(name).num_classes != sets[name]:
            raise InputError(f"{finding[0]}: the class set {name!r} of these weights has no matching table")
        return class_table(name)


@dataclasses.dataclass
class Segmentation:
    """A video being segmented. Iterating runs it, once; `results` are known at its end."""

    segmenter: VideoSegmenter
    source: FrameSource
    classes: ClassTable | None
    references: tuple[Reference, ...]
    settings: InferenceConfig
    num_read: int = 0
    """Frames fed to the network so far."""
    has_ended: bool = False
    damage: InputError | None = None
    """Why `run` ended before the video's end, where its file gave out."""

    def __iter__(self) -> Iterator[FrameResult]:
        return self._segment(None)

    def run(self, bar: tqdm[Any], should_stop: Callable[[], bool] | None = None) -> bool:
        """Segment the whole video; `bar` counts its frames.

        With `should_stop`, asked after every frame, a video that is damaged after some frames ends there.

        Returns:
            Whether all of it was segmented; `results` are those of the frames that were.
        """
        before = bar.n
        for _ in self._segment(should_stop):
            bar.update(before + self.num_read - bar.n)
        bar.update(before + self.num_read - bar.n)
        return not self.segmenter.is_cut

    def _segment(self, should_stop: Callable[[], bool] | None) -> Iterator[FrameResult]:
        if self.num_read:
            raise InputError(f"{self.source.path}: segmented once already; call segment again")
        frames = prefetch(self.source, depth=2 * self.settings.clip_length)
        with closing(frames):
            is_kept = should_stop is not None
            while (frame := self.next_frame(frames, is_kept=is_kept and self.num_read > 0)) is not None:
                found = self.segmenter.step([frame])
                self.num_read += 1
                yield from found
                if should_stop is not None and should_stop():
                    self.segmenter.is_cut = self.source.num_frames != self.num_read
                    break
        last = self.segmenter.flush()
        self.has_ended = True
        yield from last

    def next_frame(self, frames: Iterator[Picture], *, is_kept: bool) -> Picture | None:
        """The next frame; None at the end, and where the source fails and what came before it `is_kept`."""
        try:
            return next(frames, None)
        except InputError as error:
            if not is_kept:
                raise
            self.damage, self.segmenter.is_cut = error, True
            return None

    @property
    def results(self) -> dict[str, VideoResult]:
        """What each task found in the whole video.

        Raises:
            InputError: the iteration has not come to the end.
        """
        if not self.has_ended:
            raise InputError(
                f"{self.source.path}: results are known at the end; iterate over all frames first"
            )
        return self.segmenter.finish()


def _known_tasks(task: str | Sequence[str]) -> tuple[str, ...]:
    tasks = (task,) if isinstance(task, str) else tuple(task)
    unknown = [str(name) for name in tasks if name not in TASKS]
    if unknown or not tasks:
        raise InputError(f"unknown task {', '.join(unknown) or '(none)'}; known: {', '.join(TASKS)}")
    return tasks


def _source(source: Any) -> FrameSource:
    if isinstance(source, str | Path):
        return open_frames(source)
    if isinstance(source, np.ndarray | Tensor | list | tuple):
        return ArrayFrames(source)
    if not hasattr(source, "size") or not hasattr(source, "num_frames"):
        what = type(source).__name__
        raise InputError(f"expected a path or frames, got {what}; a VideoSegmenter takes frames one by one")
    frames: FrameSource = source
    return frames


def settings_name(tasks: Sequence[str], dataset: str | None, classes: ClassTable | None) -> str:
    """Whose published settings apply: the named dataset's or that of the classes, else the first task's."""
    first = TASKS[tasks[0]]
    name = dataset
    if name is None and first.finds_classes and classes is not None:
        name = classes.name
    is_class_set = name in TABLES or (classes is not None and name == classes.name)
    if name is None or (is_class_set and name not in INFERENCE):  # classes of images come without settings
        return first.default_dataset
    if name not in INFERENCE:
        known = ", ".join(INFERENCE | TABLES)
        raise InputError(f"no settings for dataset {name!r}; known: {known}")
    return name


def pick_device(device: str | torch.device) -> torch.device:
    """A device of this machine; "auto" prefers the GPU.

    Raises:
        InputError: this machine has no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).tolist()  # "meta" fails no sooner
    except (RuntimeError, AssertionError, NotImplementedError):
        have = ["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
        have += ["mps"] * torch.backends.mps.is_available()
        raise InputError(
            f"device {str(device)!r} cannot be used on this machine, which has {', '.join(have)}"
        ) from None
    return chosen
