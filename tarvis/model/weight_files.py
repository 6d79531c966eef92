"""Weight files on disk: read without running any code in them, written whole or not at all."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tarvis.files.atomic import is_as_sealed, whole_file
from tarvis.places import PUBLISHED
from tarvis.structures import InputError

State = dict[str, Tensor]

DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
"""Types of tensors in weights."""


class WeightsError(InputError):
    """Weights that cannot be read, or do not fit; the message names the file and what is wrong with it.

    Every key is named, so messages may be long; the command line cuts them.
    """

    longest = 2**20


def read_file(path: Path, *, trust: bool = False) -> Any:
    """The content of a `.safetensors`, `.pkl` or PyTorch file; of a safetensors file `{"model", "config"}`.

    Raises:
        WeightsError: no such file, damaged, or with objects other than tensors, arrays and plain values,
            which only `trust` loads (it lets the file run any code).
    """
    if not path.is_file():
        fetch = f"; fetch it: tarvis download {path}" if str(path) in PUBLISHED else ""
        raise WeightsError(f"{path}: no such file{fetch}")
    try:
        if not is_as_sealed(path):
            raise WeightsError(f"{path}: damaged, its checksum is another than when it was written")
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if path.suffix == ".pkl":
            return _read_pickle(path, trust)
        # mapped, not read: a checkpoint's optimizer state, twice its weights, then costs nothing
        with _in_utf8(path) as name:
            return torch.load(name, map_location="cpu", weights_only=not trust, mmap=zipfile.is_zipfile(path))
    except WeightsError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        refused = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error))
        name = _named(*refused[1].rpartition(".")[::2]) if refused else _foreign(path)
        if name and path.suffix != ".pkl":
            raise _refused(path, name) from None
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
                # `save_file` makes the file anew, for its owner alone, and wants a name in UTF-8
                file.write(save(tensors, {"format": "pt", "config": json.dumps(config)}))
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
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "fiub":
            value = torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(f"{path}: expected tensors by name, got {_kind(value)} at {name!r}")
        if value.is_meta or value.is_nested or value.layout != torch.strided or value.dtype not in DTYPES:
            raise WeightsError(f"{path}: expected plain tensors of numbers, got {_kind(value)} at {name!r}")
        state[name] = value.detach()
    return state


def _kind(value: Any) -> str:
    """What a value is, in a message."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    if not isinstance(value, Tensor):
        return type(value).__name__
    layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
    where = "without content (on the meta device)" if value.is_meta else f"({layout})"
    return f"a tensor of {value.dtype} {where}".replace("torch.", "").replace(" (strided)", "")


@contextmanager
def _in_utf8(path: Path) -> Iterator[str]:
    """A name of a file that is UTF-8, since libraries take no other; of use within the block."""
    name = str(path)
    if not any("\udc80" <= c <= "\udcff" for c in name):
        yield name
        return
    with path.open("rb") as file:
        yield f"/dev/fd/{file.fileno()}"


def _read_safetensors(path: Path) -> dict[str, Any]:
    with _in_utf8(path) as name, safe_open(name, framework="pt") as file:
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


class _ArrayUnpickler(pickle._Unpickler):
    """Knows NumPy arrays, tensors and plain values; refuses to import anything else.

    A file may set attributes on a function that it calls. Each allowed function is therefore wrapped in one
    that this unpickler alone has. (The unpickler of Python, since a few bytes can make that of C allocate any
    amount of memory.)
    """

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
            raise _refused(self.path, _named(module, name))
        found = super().find_class(module, name)
        return found if name in ("ndarray", "OrderedDict") else lambda *args: found(*args)


def _foreign(path: Path) -> str:
    """The first name that the pickles of a PyTorch file import from elsewhere; "" where there is none.

    PyTorch does not always say it, and a `.pkl` is not its.
    """
    with suppress(Exception):
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                return next(filter(None, (_first_foreign(file) for _ in range(PICKLES))), "")
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    with archive.open(name) as file:
                        return _first_foreign(file)
    return ""


PICKLES = 4
"""In a file of PyTorch's older kind: two numbers, a description of the machine, the content."""


def _first_foreign(file: IO[bytes]) -> str:
    strings: list[str] = []
    memo: dict[Any, str] = {}
    for code, value, _ in pickletools.genops(file):
        module, name = "torch", ""
        if code.name == "GLOBAL":
            module, _, name = str(value).partition(" ")
        elif code.name == "STACK_GLOBAL":
            module, name = strings[-2:]
        elif code.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if value is None else value] = "".join(strings[-1:])
        elif code.name in ("BINGET", "LONG_BINGET"):
            strings.append(memo.get(value, ""))
        elif isinstance(value, str):
            strings.append(value)
        if module.split(".")[0] not in ("torch", "numpy", "collections", "_codecs"):
            return _named(module, name)
    return ""


def _named(module: str, name: str) -> str:
    """The name in Python 3 of what older pickles call by its name in Python 2."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module or 'builtins'}.{name}"


def _refused(path: Path, name: str) -> WeightsError:
    return WeightsError(
        f"{path}: holds a pickled {name}, which is not loaded because such objects can run any code; "
        f"if you trust the file, load it with --trust (trust=True)"
    )
