"""What a folder of graphs says about itself: `manifest.json`.

Everything a runner must know to refuse what does not fit: task and classes, sizes, precision, versions, and
digests of the weights and of every file, external data included.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tarvis.config import ConfigError, ModelConfig, build
from tarvis.structures import STRIDE, Geometry, InputError, Size

FILE = "manifest.json"
FORMAT = 1
PORTABLE = "portable"
"""In place of compute capabilities: engines for all that their library runs on."""

Precision = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Free = Literal["frames", "size"]


@dataclass(frozen=True)
class Manifest:
    """One task's graphs.

    `size` is (H, W) of the frames before padding, `frames` the clip length; `dynamic` names those of the two
    that may differ from it. `groups` are the query groups, in order; of the objects' group, "vos", the number
    varies. `files` gives the SHA-256 of every file, `graphs` which file holds which graph. `target` says what
    else a backend's files depend on (GPU, driver), by name.
    """

    format: int
    task: str
    class_set: str | None
    size: Size
    frames: int
    dynamic: tuple[Free, ...]
    precision: Precision
    groups: dict[str, int]
    model: ModelConfig
    weights: str
    graphs: dict[str, str]
    files: dict[str, str]
    versions: dict[str, str]
    backend: str = "onnx"
    target: dict[str, str] = field(default_factory=dict)

    @property
    def padded(self) -> Size:
        return Geometry(self.size, self.size).padded

    @property
    def settings(self) -> dict[str, int]:
        """Fields of `tarvis.config.InferenceConfig` that make clips as the graphs take them."""
        clips = {"clip_length": self.frames, "overlap": self.frames // 2}
        frames = {} if "frames" in self.dynamic else clips
        return frames if "size" in self.dynamic else frames | {"min_size": min(self.size)}

    def require_clip(self, num_frames: int, size: Size) -> None:
        """Raise InputError unless the graphs take a clip of that length and padded size."""
        padded = Geometry(size, size).padded
        differs = {"frames": num_frames != self.frames, "size": padded != self.padded}
        free = {name for name in differs if differs[name] and name not in self.dynamic}
        if free:
            made, asked = (
                f"{n} frames of {height}x{width}"
                for n, (height, width) in ((self.frames, self.padded), (num_frames, padded))
            )
            dynamic = "frames,size" if free | {*self.dynamic} != {"frames"} else "frames"
            raise InputError(
                f"these graphs take clips of {made} (height x width, padded), this one has {asked}: export "
                f"with --size {size[0]}x{size[1]} --frames {num_frames}, or with --dynamic {dynamic}"
            )

    def require_weights(self, state: Mapping[str, Tensor]) -> None:
        """Raise InputError unless the graphs were made from these weights."""
        if digest_of_weights(state) != self.weights:
            raise InputError("these graphs were made from other weights: export again from the ones you have")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    text = json.dumps(dataclasses.asdict(manifest), indent=2)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path, *, check_files: bool = True) -> Manifest:
    """The manifest of a folder whose files are all there and as they were written.

    Raises:
        InputError: no such folder, not a folder of graphs, one of another version, or a damaged file.
    """
    path = folder / FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder}: no {FILE} in it; make one with python -m export.to_onnx") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise InputError(f"{path}: not a manifest of format {FORMAT}: export again with this version")
    try:
        manifest = build(Manifest, tree)
    except (ConfigError, TypeError) as error:  # TypeError: a key is missing
        raise InputError(f"{path}: {error}") from None
    assert isinstance(manifest, Manifest)
    for name in manifest.graphs.values():
        if name not in manifest.files:
            raise InputError(f"{path}: {name} is not among its files")
    if check_files:
        for name, digest in manifest.files.items():
            if Path(name).name != name or not (folder / name).is_file():
                raise InputError(f"{folder}: {name} is missing: export again")
            if digest_of_file(folder / name) != digest:
                raise InputError(f"{folder}: {name} is damaged or was changed: export again")
    return manifest


def digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_weights(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, whatever file they came in."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def installed_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a copy that is not installed
        return "unknown"


def parse_size(text: str) -> Size:
    """HEIGHTxWIDTH.

    Raises:
        InputError: anything else, or no size at all.
    """
    height, sep, width = text.lower().partition("x")
    if not sep or not height.isdecimal() or not width.isdecimal() or not int(height) or not int(width):
        raise InputError(f"--size {text}: expected HEIGHTxWIDTH in pixels, as 480x864")
    if max(int(height), int(width)) > 512 * STRIDE:
        raise InputError(f"--size {text}: more than {512 * STRIDE} pixels on a side")
    return int(height), int(width)
