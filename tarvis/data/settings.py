"""What can be set of the training data, and what was published."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from tarvis.config import ConfigError


@dataclass(frozen=True)
class Wants:
    """What a task wants of the clips that it is trained with.

    Args:
        given: objects of the first frame that are told, by mask or point; all clips of a batch have as many.
            Other tasks find all objects of all frames, by their class.
        stuff: labels of all pixels.
    """

    given: bool = False
    stuff: bool = False


WANTS = {"vis": Wants(), "vps": Wants(stuff=True), "vos": Wants(given=True)}
"""What a clip can be trained for; objects of vos clips are given by masks and points (PET) alike."""
TASKS = tuple(WANTS)


@dataclass(frozen=True)
class SetSettings:
    """How clips are cut of one training set.

    Args:
        tasks: what its clips are for; where there are several, `DataSettings.task_weights` decides.
        window: frames of a clip lie within round(window * clip length) frames of the first one chosen.
        consecutive: take consecutive frames instead.
        min_sizes, max_size: as `InferenceConfig`; one of the sizes is drawn for each clip. None: native size.
        crop: (height, width) of the part that is cut out, relative to the whole.
        colour: how far colours change.
        image_size: (height, width) of the clips that images become.
        same_crop: whether all frames of an image's clip are cut out at the same place.
        reduce_to: shorter side that images have first; None leaves them as they are.
    """

    tasks: tuple[str, ...] = ("vis",)
    window: float = 7.5
    consecutive: bool = False
    min_sizes: tuple[int, ...] | None = (448, 512)
    max_size: int = 1333
    crop: tuple[float, float] = (0.75, 0.75)
    colour: Literal["wide", "narrow", "none"] = "wide"
    flip: bool = True
    image_size: tuple[int, int] = (512, 512)
    same_crop: bool = False
    reduce_to: int | None = None

    def __post_init__(self) -> None:
        if not self.tasks or any(task not in TASKS for task in self.tasks):
            raise ConfigError(f"tasks: expected some of {_known(self.tasks)}, got {list(self.tasks)}")
        if not all(0 < part <= 1 for part in self.crop):
            raise ConfigError(f"crop: expected shares over 0 and up to 1, got {list(self.crop)}")
        if not 0 < self.window < math.inf:
            raise ConfigError(f"window: expected a number over 0, got {self.window}")
        for name in ("min_sizes", "max_size", "image_size", "reduce_to"):
            value = getattr(self, name)
            sizes = value if isinstance(value, tuple) else (value,)
            if value is not None and min(sizes, default=0) < 1:
                raise ConfigError(f"{name}: expected numbers from 1, got {list(sizes)}")


@dataclass(frozen=True)
class SetChanges:
    """Settings of a set that differ from what was published; None keeps it. See `SetSettings`."""

    tasks: tuple[str, ...] | None = None
    window: float | None = None
    consecutive: bool | None = None
    min_sizes: tuple[int, ...] | None = None
    max_size: int | None = None
    crop: tuple[float, float] | None = None
    colour: Literal["wide", "narrow", "none"] | None = None
    flip: bool | None = None
    image_size: tuple[int, int] | None = None
    same_crop: bool | None = None
    reduce_to: int | None = None


@dataclass(frozen=True)
class SyntheticSettings:
    """Generated videos: number k is the scene of seed `first_seed` + k."""

    num_videos: int = 1000
    num_frames: int = 24
    size: tuple[int, int] = (128, 192)
    least_objects: int = 1
    most_objects: int = 4
    first_seed: int = 0

    def __post_init__(self) -> None:
        numbers = (self.num_videos, self.num_frames, *self.size, self.least_objects)
        if min(numbers) < 1 or not self.least_objects <= self.most_objects <= 254 or self.first_seed < 0:
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
    in_place: float = 0.5
    twins: float = 0.25
    held_out: int = 0
    validate: bool = False

    def __post_init__(self) -> None:
        least, most = self.clip_lengths
        if not 1 <= least <= most or self.most_objects < 1 or self.held_out < 0:
            raise ConfigError(f"data.moving: numbers out of range: {self}")
        if not self.sizes or min(side for size in self.sizes for side in size) < 1:
            raise ConfigError(f"data.moving.sizes: expected sizes from 1, got {list(self.sizes)}")
        if not 0 <= self.in_place <= 1 or not 0 <= self.twins <= 1:
            raise ConfigError("data.moving: expected in_place and twins in 0..1")


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
        sets: what is set otherwise than published, by set.
        synthetic, moving: what the sets of these names are.
    """

    train: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    root: str | None = None
    split: str = "train"
    clip_length: int = 3
    task_weights: dict[str, float] = field(default_factory=lambda: {"vis": 0.3, "vps": 0.3, "vos": 0.4})
    chunk: int = 8
    point_share: float = 0.3
    max_objects: int = 4
    max_image_objects: int = 8
    pad_to: int = 64
    num_workers: int = 4
    sets: dict[str, SetChanges] = field(default_factory=dict)
    synthetic: SyntheticSettings = field(default_factory=SyntheticSettings)
    moving: MovingSettings = field(default_factory=MovingSettings)

    def __post_init__(self) -> None:
        if self.weights and (len(self.weights) != len(self.train) or min(self.weights) < 0):
            raise ConfigError(
                f"data.weights: expected a number from 0 for each set, got {list(self.weights)}"
            )
        if any(task not in TASKS or weight < 0 for task, weight in self.task_weights.items()):
            raise ConfigError(
                f"data.task_weights: expected numbers from 0 for {_known(self.task_weights)}, "
                f"got {self.task_weights}"
            )
        if self.pad_to < 1 or self.pad_to % 64:
            raise ConfigError(f"data.pad_to: expected a multiple of 64, got {self.pad_to}")
        for name in ("clip_length", "chunk", "max_objects", "max_image_objects"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name}: expected a number from 1, got {getattr(self, name)}")
        if self.num_workers < 0 or not 0 <= self.point_share <= 1:
            raise ConfigError("data: expected num_workers from 0 and point_share in 0..1")

    def of_set(self, name: str, default: SetSettings) -> SetSettings:
        """The settings of a set whose published ones are `default`.

        Raises:
            ConfigError: a change is out of range; the message names its key.
        """
        changes = dataclasses.asdict(self.sets.get(name, SetChanges()))
        try:
            return dataclasses.replace(default, **{key: v for key, v in changes.items() if v is not None})
        except ConfigError as error:
            raise ConfigError(f"data.sets.{name}.{error}") from None


def _known(tasks: Iterable[str]) -> str:
    """What can be trained, for who asked for `tasks`."""
    hint = " (which trains pet too, see data.point_share)" if "pet" in tasks else ""
    return ", ".join(TASKS) + hint


PUBLISHED: dict[str, SetSettings] = {
    "youtube_vis_2019": SetSettings(max_size=1024),
    "youtube_vis_2021": SetSettings(max_size=1024),
    "ovis": SetSettings(min_sizes=(512,), max_size=1024),
    "kitti_step": SetSettings(("vps",), 2, min_sizes=(320,), crop=(0.75, 0.5), colour="narrow"),
    "cityscapes_vps": SetSettings(
        ("vps",), consecutive=True, min_sizes=(448,), crop=(0.5, 0.5), colour="narrow"
    ),
    "vipseg": SetSettings(("vps",), 5, min_sizes=(512,), crop=(0.75, 0.5), colour="narrow"),
    "davis": SetSettings(("vos",), min_sizes=(512,)),
    "burst": SetSettings(("vos",), 3, min_sizes=(512,)),
    "coco": SetSettings(TASKS, min_sizes=(512, 544, 576)),
    "ade20k": SetSettings(TASKS, min_sizes=(512, 544, 576)),
    "cityscapes": SetSettings(TASKS, min_sizes=(512, 544, 576), same_crop=True),
    "mapillary": SetSettings(TASKS, min_sizes=(512, 544, 576), same_crop=True, reduce_to=800),
}
"""Of fine-tuning, and of pre-training for the image sets."""
