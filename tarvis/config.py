"""Schema and defaults of the network, of inference and of losses; how YAML files become values.

load(Config, Path("configs/tiny.yaml"), ["model.backbone=swin_tiny"])
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from tarvis import places
from tarvis.structures import InputError

Attention = Literal["hard", "soft"]

BOUNDS = {
    "least": ("from", operator.ge),
    "over": ("over", operator.gt),
    "most": ("up to", operator.le),
    "below": ("below", operator.lt),
}
"""Bounds that the metadata of a field may set for its numbers: their word in messages, and the comparison."""


LARGEST = 2**53
"""Bound of integers, so that a float holds them."""
LONGEST_YAML = 2**20
MOST_NODES = 20_000
DEEPEST = 50
"""Brackets within brackets."""


def bounded(default: Any, **bounds: float) -> Any:
    """A field with this default whose numbers keep within `BOUNDS`, such as `bounded(3, least=1)`."""
    return field(default=default, metadata=bounds)


VIDEO_CLASS_SETS = {"cityscapes_vps": 19, "kitti_step": 19, "ovis": 25, "vipseg": 124, "youtube_vis_2021": 40}
"""Number of classes of the sets in the published video models, in the order of their query rows."""


@dataclass(frozen=True)
class OwnClasses:
    """A class set that comes with training data instead of with this package."""

    names: tuple[str, ...]
    is_thing: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.is_thing) or not self.names:
            raise ConfigError("model.own_classes: expected names, and is_thing for each")


@dataclass(frozen=True)
class InferenceConfig:
    """How a video is cut into clips and how clips are joined.

    Sizes in pixels. `min_size` is the shorter side fed to the network (None: native size), `max_size` the
    longest the other side may get. Named choices keep the published behaviour as default.
    """

    clip_length: int = bounded(12, least=1)
    overlap: int = 6
    min_size: int | None = bounded(None, least=1)
    max_size: int = bounded(1333, least=1)
    max_tracks_per_clip: int = 10  # best scoring queries kept per clip
    score_threshold: float = bounded(0.0, least=0, most=1)  # per clip, over foreground classes (>=)
    track_score_threshold: float = bounded(0.5, least=0, most=1)  # per video, panoptic only (>)
    top_k: int = 10  # (track, class) pairs of a video, vis only
    link_iou: float = bounded(0.5, least=0, most=1)  # tracks join above this overlap
    link_empty: bool = True  # two masks empty on all shared frames count as the same object (published)
    shared_masks: Literal["earliest", "mean"] = "earliest"  # instance masks on frames of two clips
    shared_objects: Literal["latest", "mean"] = "latest"  # vos and pet masks on frames of two clips

    def __post_init__(self) -> None:
        check(self, "inference", least=0)
        if self.overlap >= self.clip_length:
            raise ConfigError(
                f"overlap must be 0 .. clip length - 1 = {self.clip_length - 1}, got {self.overlap}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """The network. Defaults are those of the published models.

    `inference` holds settings that suit these weights; they take the place of the published ones.
    """

    backbone: str = "swin_tiny"  # one of `tarvis.model.backbone.BACKBONES`
    hidden_dim: int = bounded(256, least=1, most=1024)
    num_heads: int = 8
    num_points: int = 4
    neck_layers: int = bounded(6, least=1, most=64)
    neck_ffn_dim: int = bounded(1024, least=1, most=8192)
    decoder_layers: int = bounded(9, least=1, most=64)
    decoder_ffn_dim: int = bounded(2048, least=1, most=8192)
    attention: Attention = "hard"
    object_encoder_layers: int = bounded(4, least=1, most=64)
    num_instance_queries: int = bounded(128, least=1, most=8192)
    num_queries_per_object: int = 4  # in training; twice as many at inference, as published
    background_grid: tuple[int, int] = (4, 4)
    class_sets: dict[str, int] = field(
        default_factory=lambda: dict(VIDEO_CLASS_SETS), metadata={"least": 1, "most": 8192}
    )
    own_classes: dict[str, OwnClasses] = field(default_factory=dict)  # names of sets without a table
    inference: Annotated[dict[str, Any], InferenceConfig] = field(default_factory=dict, metadata={"least": 0})

    def __post_init__(self) -> None:
        check(self, "model", least=1, most=256)
        self.suited(InferenceConfig())
        if self.hidden_dim % self.num_heads or self.hidden_dim % 64:
            raise ConfigError(
                f"model.hidden_dim must be a multiple of 64 and of num_heads, got {self.hidden_dim}"
            )
        if self.decoder_layers % 3:
            raise ConfigError(
                f"model.decoder_layers must be a multiple of 3 (one a scale), got {self.decoder_layers}"
            )
        for name, own in self.own_classes.items():
            if self.class_sets.get(name) != len(own.names):
                raise ConfigError(f"model.own_classes: {name} has other classes than model.class_sets says")

    def suited(self, published: InferenceConfig) -> InferenceConfig:
        """The settings of a benchmark, with those that suit these weights in their place."""
        return dataclasses.replace(published, **self.inference)


@dataclass(frozen=True)
class LossConfig:
    """Settings of the losses (`tarvis.tasks.losses`): numbers of points, and the weights that were varied.

    Args:
        points: of a mask, and of matching.
        semantic_points: of a frame, in the semantic loss of VPS.
        vis_semantic, vps_semantic: weights of the cross-entropy of classes.
        vps_dice: weight of the dice loss of classes.
        regularize: also keep the logits of classes short.
        drop_absent: classes that are neither true nor guessed in any point leave the softmax.
    """

    points: int = bounded(12544, least=4)
    semantic_points: int = bounded(25088, least=4)
    vis_semantic: float = 2.0
    vps_semantic: float = 2.0
    vps_dice: float = 0.0
    regularize: bool = False
    drop_absent: bool = False

    def __post_init__(self) -> None:
        check(self, "loss", least=0)


class ConfigError(InputError):
    """A configuration that names an unknown key, a wrong type or a choice that does not exist."""


def load(
    schema: type,
    path: Path | None = None,
    overrides: Sequence[str] = (),
    base: Mapping[str, dict[str, Any]] | None = None,
) -> Any:
    """A `schema` (a dataclass of dataclasses): its defaults, then `base`, the YAML file, `key.path=value`.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, unknown choice; the message names the key.
    """
    tree: Any = {}
    if path is not None:
        tree = read_yaml(path) or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(tree).__name__}")
    for name, group in (base or {}).items():
        own = tree.get(name) or {}
        tree[name] = group | own if isinstance(own, dict) else own
    for item in overrides:
        key, sep, value = item.partition("=")
        if not sep:
            raise ConfigError(f"expected key=value, got {item!r}")
        *parents, leaf = key.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: {name} is a value, not a group of keys")
        try:
            node[leaf] = parse_yaml(value)
        except ValueError:
            raise ConfigError(f"{key}: {value!r} is not a YAML value") from None
    return build(schema, tree)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, or of the package's own of this name: see `tarvis.places.settings`.

    Raises:
        ConfigError: the file cannot be read, or is not YAML.
    """
    try:
        return parse_yaml(places.settings(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not a readable YAML file ({error})") from None


def parse_yaml(text: str) -> Any:
    """A YAML value of plain types, whose aliases, written out, have at most `MOST_NODES` nodes.

    Raises:
        ValueError: it is none, or too large.
    """
    if len(text) > LONGEST_YAML:
        raise ValueError(f"expected at most {LONGEST_YAML} characters, got {len(text)}")
    steps = (1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", text))
    if max(accumulate(steps), default=0) > DEEPEST:  # PyYAML takes seconds to find out
        raise ValueError("too deep")
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is None:
            return None
        _num_nodes(node, {})
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("too deep") from None
    except (yaml.YAMLError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise ValueError(str(error) or type(error).__name__) from None


def _num_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes there are with all aliases written out."""
    if id(node) not in known:
        known[id(node)] = MOST_NODES  # met again before its end: it contains itself
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        if node.tag.endswith(":int") and len(node.value) > 40:
            raise ValueError("a number of too many digits")
        if isinstance(node, yaml.MappingNode):
            inner = [each for pair in node.value for each in pair]
        known[id(node)] = 1 + sum(_num_nodes(each, known) for each in inner)
    if known[id(node)] > MOST_NODES:
        raise ValueError(f"expected at most {MOST_NODES} values")
    return known[id(node)]


def build(annotation: Any, value: Any, key: str = "") -> Any:
    """`value` (as YAML gives it) checked and coerced to `annotation`, recursively."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation):
        if isinstance(annotation, type) and isinstance(value, annotation):
            return value
        make: Any = annotation
        return make(**_build_fields(make, value, key))
    if origin is Annotated:  # some fields of a dataclass
        return {name: v for name, v in _build_fields(args[1], value, key).items() if v is not None}
    if origin is Literal:
        if value is False and "off" in args:  # YAML's word for it
            return "off"
        if value in args:
            return value
        raise ConfigError(f"{key}: expected one of {', '.join(map(str, args))}, got {value!r}")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return build(next(a for a in args if a is not type(None)), value, key)
    if origin is dict and isinstance(value, dict):
        if packed := [name for name, v in value.items() if v is None and ":" in str(name)]:
            raise ConfigError(f"{key}: expected a space after the colon in {packed[0]!r}")
        return {build(args[0], k, key): build(args[1], v, f"{key}.{k}") for k, v in value.items()}
    if origin is tuple:
        is_list, is_open = isinstance(value, list | tuple), args[1:] == (...,)
        if not is_list or not (is_open or len(value) == len(args)):
            one = value if isinstance(value, str) else _shown(value)
            example = f", such as [{one}]" if isinstance(value, str | int | float) else ""
            wanted = f"a list{example}" if is_open else f"a list of {len(args)}"
            raise ConfigError(f"{key}: expected {wanted}, got {_shown(value)}")
        kinds = args[:1] * len(value) if is_open else args
        return tuple(
            build(kind, v, f"{key}[{i}]") for i, (kind, v) in enumerate(zip(kinds, value, strict=True))
        )
    if annotation is float and not isinstance(value, bool):
        try:
            return float(value)  # PyYAML reads 5e-5 as a string
        except (TypeError, ValueError, OverflowError):
            pass
    elif (
        isinstance(annotation, type)
        and isinstance(value, annotation)
        and (annotation is bool or not isinstance(value, bool))
        and (not isinstance(value, int) or abs(value) <= LARGEST)
    ):
        return value
    raise ConfigError(f"{key}: expected {getattr(annotation, '__name__', annotation)}, got {_shown(value)}")


def _shown(value: Any) -> str:
    """A value in a message."""
    return "a very large number" if isinstance(value, int) and abs(value) > LARGEST else repr(value)


def _build_fields(schema: Any, value: Any, key: str) -> dict[str, Any]:
    """Values of some fields of a dataclass, each checked and coerced to its field's annotation."""
    if not isinstance(value, dict):
        raise ConfigError(f"{key or 'config'}: expected keys and values, got {value!r}")
    hints = typing.get_type_hints(schema, include_extras=True)
    unknown = [str(name) for name in value if name not in hints]
    if unknown:
        raise ConfigError(f"unknown key {_join(key, unknown[0])}; known: {', '.join(hints)}")
    return {name: build(hints[name], v, _join(key, name)) for name, v in value.items()}


def check(config: Any, key: str = "", **bounds: float) -> None:
    """Check types and choices of values given in Python, and that all numbers are finite and within bounds.

    `bounds` hold for every field, except where its own metadata says otherwise; see `BOUNDS`.
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), _join(key, item.name)
        build(hints[item.name], value, name)
        limits = dict(item.metadata) or bounds
        for number in _numbers(value):
            if not math.isfinite(number) or not all(BOUNDS[k][1](number, x) for k, x in limits.items()):
                wanted = " and ".join(f"{BOUNDS[k][0]} {x}" for k, x in limits.items())
                raise ConfigError(f"{name}: expected a number {wanted}, got {number}")


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in a value of a field."""
    if type(value) in (int, float):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, dict):
        yield from (each for each in value.values() if type(each) in (int, float))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
