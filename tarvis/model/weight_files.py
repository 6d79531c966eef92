"""Weight files on disk: read without running any code in them, written whole or not at all."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tarvis.files.atomic import is_as_sealed, whole_file
from tarvis.structures import InputError

State = dict[str, Tensor]


class WeightsError(InputError):
    """Weights that cannot be read, or do not fit; the message names the file and what is wrong with it."""


def read_file(path: Path, *, trust: bool = False) -> Any:
    """The content of a `.safetensors`, `.pkl` or PyTorch file; of a safetensors file `{"model", "config"}`.

    Raises:
        WeightsError: no such file, damaged, or with objects other than tensors, arrays and plain values,
            which only `trust` loads (it lets the file run any code).
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        if not is_as_sealed(path):
            raise WeightsError(f"{path}: damaged, its checksum is another than when it was written")
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if path.suffix == ".pkl":
            return _read_pickle(path, trust)
        # mapped, not read: a checkpoint's optimizer state, twice its weights, then costs nothing
        return torch.load(path, map_location="cpu", weights_only=not trust, mmap=zipfile.is_zipfile(path))
    except WeightsError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if refused:
            raise _refused(path, refused[1]) from None
        reason = type(error).__name__
        if not isinstance(error, pickle.UnpicklingError):  # torch then advises to load it unsafely
            reason = f"{reason}: {error}".splitlines()[0]
        raise WeightsError(f"{path}: truncated, or not a file of weights ({reason})") from None


def write_file(path: Path, state: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    """`state` and `config` as `.safetensors` (config: JSON in the metadata) or as PyTorch file.

    The file appears under its name when it is complete; an older one stays until then.

    Raises:
        WeightsError: an unknown suffix, or a folder that does not exist or cannot be written.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise WeightsError(f"{path}: expected a name that ends in .safetensors, .pth or .pt")
    if not path.parent.is_dir():
        raise WeightsError(f"{path}: no folder {path.parent}")
    try:
        with whole_file(path) as file:
            if path.suffix == ".safetensors":
                metadata = {"format": "pt", "config": json.dumps(config)}
                save_file(tensors, Path(file.name), metadata=metadata)
                # safetensors makes the file anew, for its owner alone
                os.chmod(file.name, os.fstat(file.fileno()).st_mode)
            else:
                torch.save({"model": tensors, "config": config}, file)
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: a full disk, in torch.save
        raise WeightsError(f"{path}: cannot be written ({error})") from None


def as_state(path: Path, content: Any) -> State:
    """The tensors by name in what `read_file` gave: its key "model", or all of it. Arrays become tensors."""
    model = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(model, dict) or not model:
        raise WeightsError(f"{path}: expected tensors by name, got {type(model).__name__}")
    state = {}
    for name, value in model.items():
        if isinstance(value, np.ndarray | np.generic):
            value = torch.from_numpy(np.array(value))
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(f"{path}: expected tensors by name, got {type(value).__name__} at {name!r}")
        state[name] = value.detach()
    return state


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        content: dict[str, Any] = {"model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
    if "config" in metadata:
        content["config"] = json.loads(metadata["config"])
    return content


def _read_pickle(path: Path, trust: bool) -> Any:
    # latin1: how NumPy arrays pickled by Python 2 are read, as the oldest backbone files were
    with path.open("rb") as file:
        if trust:
            return pickle.load(file, encoding="latin1")
        return _ArrayUnpickler(file, path).load()


class _ArrayUnpickler(pickle.Unpickler):
    """Knows NumPy arrays, tensors and plain values; refuses to import anything else."""

    ALLOWED = frozenset(
        {
            ("_codecs", "encode"),
            ("collections", "OrderedDict"),
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "scalar"),
            ("numpy._core.numeric", "_frombuffer"),
            ("torch._utils", "_rebuild_parameter"),
            ("torch._utils", "_rebuild_tensor_v2"),
        }
    )

    def __init__(self, file: io.BufferedReader, path: Path) -> None:
        super().__init__(file, encoding="latin1")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # its name before NumPy 2
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            # torch's own would unpickle without restriction
            return lambda data: torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if (module, name) not in self.ALLOWED:
            raise _refused(self.path, f"{module}.{name}")
        return super().find_class(module, name)


def _refused(path: Path, name: str) -> WeightsError:
    return WeightsError(
        f"{path}: holds a pickled {name}, which is not loaded because such objects can run any code; "
        f"if you trust the file, load it with --trust (trust=True)"
    )
