"""What a folder of graphs says about itself: `manifest.json`.

Everything a runner must know to refuse what does not fit: task and classes, sizes, precision, versions, and
digests of the weights and of every file, external data included. The manifest has a digest of itself, too,
and where the files are machine code a seal: made with a key that only this user has on this machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import math
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from export.runtimes import DATA, RUNTIMES
from kernels.build import make_private, require_private
from tarvis.config import ModelConfig, build
from tarvis.files.outputs import digest_of_file
from tarvis.structures import STRIDE, Geometry, InputError, Size
from tarvis.tasks import TASKS

FILE = "manifest.json"
FORMAT = 1
PORTABLE = "portable"
"""In place of compute capabilities: engines for all that their library runs on."""

Precision = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Free = Literal["frames", "size"]
MOST_PIXELS = 512 * STRIDE
"""On a side of the frames."""


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

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise InputError(f"unknown task {self.task!r}; known: {', '.join(TASKS)}")
        has_classes = TASKS[self.task].finds_classes
        graphs = {"encoder", "decoder"} | (set() if has_classes else {"object_encoder"})
        groups = {"semantic"} if has_classes else {"background_vos", "vos"}
        if (self.class_set is not None) != has_classes or (
            has_classes and self.class_set not in self.model.class_sets
        ):
            raise InputError(f"class_set {self.class_set!r} is none of a network for {self.task}")
        if self.graphs.keys() != graphs or not groups <= self.groups.keys():
            raise InputError(
                f"graphs for {self.task} are {', '.join(sorted(graphs))}, with their query groups"
            )
        if min(self.frames, *self.size, *self.groups.values()) < 1 or max(self.size) > MOST_PIXELS:
            raise InputError("frames, size and groups are numbers from 1, and the size has a limit")

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

    def require_weights(self, state: Mapping[str, Tensor], config: ModelConfig) -> None:
        """Raise InputError unless the graphs were made from these weights of that network."""
        if digest_of_weights(state) != self.weights or config != self.model:
            raise InputError("these graphs were made from other weights: export again from the ones you have")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    tree = json.loads(json.dumps(dataclasses.asdict(manifest)))
    tree["digest"] = digest_of_tree(tree)
    if manifest.backend not in DATA:
        with suppress(OSError, RuntimeError):  # no home to keep a key in: --trust opens it
            tree["seal"] = seal_of(tree["digest"], own_key(make=True))
    (folder / FILE).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path, *, check_files: bool = True, trust: bool = True) -> Manifest:
    """The manifest of a folder whose files are all there and as they were written.

    Without `trust` machine code must have been made here, by this user.

    Raises:
        InputError: no such folder, not a folder of graphs, one of another version, a damaged file, or a
            manifest that was edited.
    """
    path = folder / FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder}: no {FILE} in it; make one with python -m export.to_onnx") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise InputError(f"{path}: not a manifest of format {FORMAT}: export again with this version")
    digest, seal = tree.pop("digest", None), tree.pop("seal", None)
    if digest != digest_of_tree(tree):
        raise InputError(f"{path}: is damaged or was changed, its digest differs: export again")
    try:
        manifest = build(Manifest, tree)
    except (InputError, TypeError) as error:  # TypeError: a key is missing
        raise InputError(f"{path}: {error}") from None
    assert isinstance(manifest, Manifest)
    if manifest.backend not in RUNTIMES:
        raise InputError(f"{folder}: made for {manifest.backend!r}; this version runs {', '.join(RUNTIMES)}")
    if not trust and manifest.backend not in DATA:
        require_seal(folder, digest, seal)
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


def digest_of_tree(tree: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, however it is laid out in its file."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def own_key(*, make: bool = False) -> bytes:
    """A random key that this user alone can read.

    Raises:
        OSError, RuntimeError: there is none, none can be made, or others can write where it lies.
    """
    home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    path = home / "tarvis" / "export.key"
    if make and not path.exists():
        make_private(path.parent)
        staging = path.with_name(secrets.token_hex(8))
        with open(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
        with suppress(FileExistsError):  # another process has made one meanwhile
            os.link(staging, path)
        staging.unlink()
    require_private(path)
    return path.read_bytes()


def seal_of(digest: str, key: bytes) -> str:
    return hmac.new(key, digest.encode(), "sha256").hexdigest()


def require_seal(folder: Path, digest: str, seal: Any) -> None:
    """Raise InputError unless this user has written a manifest on this machine."""
    why = ""
    try:
        if str(seal) == seal_of(digest, own_key()):
            return
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError) as error:
        why = f" ({error})"
    raise InputError(
        f"{folder}: holds machine code that you have not built on this machine{why}; build it here, or load "
        "it with --trust (trust=True) if you trust who built it"
    )


def digest_of_weights(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, whatever file they came in."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def difference(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> tuple[float, str]:
    """How far tensors are apart that must be equal bit for bit, and which are not, in words; or (0, "")."""
    largest, names = 0.0, []
    for name in {**expected, **got}:
        a, b = (x[name].cpu().contiguous() if name in x else None for x in (expected, got))
        if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
            apart = math.inf
        elif torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b))):
            continue
        else:
            apart = (a.double() - b.double()).abs().nan_to_num(math.inf).max().item()
        largest = max(largest, apart)
        names.append(name)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return largest, f"{', '.join(names[:3])}{more}: not the weights'" if names else ""


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
    found = re.fullmatch(r"0*([1-9]\d{0,9})[xX]0*([1-9]\d{0,9})", text, re.ASCII)
    if found is None:
        raise InputError(f"--size {text[:40]}: expected HEIGHTxWIDTH in pixels, as 480x864")
    height, width = int(found[1]), int(found[2])
    if max(height, width) > MOST_PIXELS:
        raise InputError(f"--size {text}: more than {MOST_PIXELS} pixels on a side")
    return height, width
