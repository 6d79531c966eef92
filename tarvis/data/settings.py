"""Settings of the training data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tarvis.config import ConfigError, bounded, check
from tarvis.tasks import TASKS, TRAINED


@dataclass(frozen=True)
class SetSettings:
    """How clips are cut from one training set.

    Args:
        tasks: the tasks that its clips train; of several, `DataSettings.task_weights` gives the shares.
        window: how far in time a clip reaches, in clip lengths, from the frame that is drawn first.
        consecutive: take consecutive frames instead.
        min_sizes, max_size: as `InferenceConfig`; one of the sizes is drawn for each clip. None: native size.
        crop: of videos: (height, width) of the part that is cut out, as shares of the frame.
        colour: how far colours change.
        image_size: (height, width) of the clips that images become.
        same_crop: whether all frames of an image's clip are cut out at the same place.
        reduce_to: shorter side to which images are first reduced; None keeps their size.
    """

    tasks: tuple[str, ...] = ("vis",)
    window: float = bounded(7.5, over=0)
    consecutive: bool = False
    min_sizes: tuple[int, ...] | None = (448, 512)
    max_size: int = 1333
    crop: tuple[float, float] = bounded((0.75, 0.75), over=0, most=1)
    colour: Literal["wide", "narrow", "none"] = "wide"
    flip: bool = True
    image_size: tuple[int, int] = (512, 512)
    same_crop: bool = False
    reduce_to: int | None = None

    def __post_init__(self) -> None:
        check(self, least=1)
        if not self.tasks or any(task not in TRAINED for task in self.tasks):
            raise ConfigError(f"tasks: expected some of {_known(self.tasks)}, got {list(self.tasks)}")
        if self.min_sizes == ():
            raise ConfigError("min_sizes: expected numbers from 1, got []")


SetChanges = Annotated[dict[str, Any], SetSettings]
"""Some of the settings of a set, by name; None keeps what was published."""


@dataclass(frozen=True)
class SyntheticSettings:
    """Generated videos: number k is the scene of seed `first_seed` + k."""

    num_videos: int = 1000
    num_frames: int = 24
    size: tuple[int, int] = (128, 192)
    least_objects: int = 1
    most_objects: int = bounded(4, least=1, most=254)
    first_seed: int = bounded(0, least=0)

    def __post_init__(self) -> None:
        check(self, "data.synthetic", least=1)
        if self.least_objects > self.most_objects:
            raise ConfigError(f"data.synthetic: numbers out of range: {self}")


@dataclass(frozen=True)
class MovingSettings:
    """The set "moving": clips made of photographs, see `tarvis.data.moving`.

    Args:
        objects: files of own data whose objects are cut out, below `DataSettings.root` if that is set.
        scenes: files whose photographs lie behind; by default the same.
        clip_lengths: fewest and most frames of a clip.
        sizes: (height, width) of the frames; one is drawn for each clip.
        most_objects: cut out for a clip, at most.
        in_place: how likely an object of the scene itself moves.
        twins: how likely a further object looks like the one before.
        held_out: of every so many photographs one is not trained on; 0 keeps all. `validate` takes those.
    """

    objects: tuple[str, ...] = ()
    scenes: tuple[str, ...] = ()
    clip_lengths: tuple[int, int] = (3, 6)
    sizes: tuple[tuple[int, int], ...] = ((192, 256),)
    most_objects: int = 3
    in_place: float = bounded(0.5, least=0, most=1)
    twins: float = bounded(0.25, least=0, most=1)
    held_out: int = bounded(0, least=0)
    validate: bool = False

    def __post_init__(self) -> None:
        check(self, "data.moving", least=1)
        if self.clip_lengths[0] > self.clip_lengths[1]:
            raise ConfigError(f"data.moving: numbers out of range: {self}")
        if not self.sizes:
            raise ConfigError("data.moving.sizes: expected sizes from 1, got []")


@dataclass(frozen=True)
class DataSettings:
    """The training data of a run.

    Args:
        train: sets by name; or files and folders of own data, see `tarvis.datasets.own`.
        weights: share of each set; all the same by default.
        root: where the sets' files are: a workspace in the published layout, or a download.
        split: which split of the sets that have a name.
        task_weights: share of the tasks among the clips of a set that serves several.
        chunk: steps in a row that share set, task and number of objects.
        point_share: how likely an object is given by a point instead of a mask.
        max_objects: of a vos clip; of clips that images become, `max_image_objects`.
        pad_to: padded sides are multiples of this. Larger ones make fewer shapes for torch.compile.
        num_workers: processes of each rank that make clips, or one for each core it may use where these are
            fewer; 0 makes clips in the training process.
        timeout_s: how long training waits for a clip before it gives up.
        sets: overrides of the published settings, keyed by set.
        synthetic, moving: what the sets of these names are made of.
    """

    train: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    root: str | None = None
    split: str = "train"
    clip_length: int = bounded(3, least=1, most=1000)
    task_weights: dict[str, float] = field(default_factory=lambda: {"vis": 0.3, "vps": 0.3, "vos": 0.4})
    chunk: int = bounded(8, least=1)
    point_share: float = bounded(0.3, least=0, most=1)
    max_objects: int = bounded(4, least=1)
    max_image_objects: int = bounded(8, least=1)
    pad_to: int = bounded(64, least=1)
    num_workers: int = 4
    timeout_s: float = bounded(600.0, over=0)
    sets: dict[str, SetChanges] = field(default_factory=dict)
    synthetic: SyntheticSettings = field(default_factory=SyntheticSettings)
    moving: MovingSettings = field(default_factory=MovingSettings)

    def __post_init__(self) -> None:
        check(self, "data", least=0)
        if self.weights and len(self.weights) != len(self.train):
            raise ConfigError(
                f"data.weights: expected a number from 0 for each set, got {list(self.weights)}"
            )
        if any(task not in TRAINED for task in self.task_weights):
            raise ConfigError(
                f"data.task_weights: expected numbers from 0 for {_known(self.task_weights)}, "
                f"got {self.task_weights}"
            )
        if self.pad_to % 64:
            raise ConfigError(f"data.pad_to: expected a multiple of 64, got {self.pad_to}")
        for name in self.sets:
            self.of_set(name, SetSettings())

    def of_set(self, name: str, default: SetSettings) -> SetSettings:
        """The settings of a set whose published ones are `default`.

        Raises:
            ConfigError: a change is out of range; the message names its key.
        """
        changes = {key: value for key, value in self.sets.get(name, {}).items() if value is not None}
        try:
            return dataclasses.replace(default, **changes)
        except ConfigError as error:
            raise ConfigError(f"data.sets.{name}.{error}") from None


def _known(tasks: Iterable[str]) -> str:
    """The tasks that clips are made for, in a message about `tasks`."""
    others = [task for task in tasks if task in TASKS and task not in TRAINED]
    hint = f" (which trains {others[0]} too, see data.point_share)" if others else ""
    return ", ".join(TRAINED) + hint
