"""The CUDA extension: compiled with nvcc on first use, or ahead of time, and kept.

    python -m kernels.build                   # for the GPUs of this machine
    python -m kernels.build --arch 80,90      # for others (compute capabilities without the point)
    python -m kernels.build --check           # only compile; prints registers and spills, needs no GPU

nvcc is taken from CUDA_HOME, CUDA_PATH, the PATH or /usr/local/cuda. The library is kept in
TORCH_EXTENSIONS_DIR (~/.cache/torch_extensions where that is not set) under a name made from its sources, the
machine, the release of CUDA that PyTorch has, that of nvcc, and architectures. It uses PyTorch's stable ABI:
versions from 2.11 on, for one release of CUDA, can share it. (torch.utils.cpp_extension does not serve: it
needs ninja and PyTorch's own headers, and builds one library for each version of PyTorch and Python.)
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")  # that the kernels are checked for

# code for one of these embedded GPUs runs on that one only, and no other code runs there
TEGRA = ("53", "62", "72", "87", "101", "110")

_TORCH = Path(torch.__file__).parent
_SUFFIX = ".dll" if os.name == "nt" else ".so"
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-DUSE_CUDA",  # declares the access to PyTorch's stream
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # 2.11
    *("-Xcompiler", "/MD" if os.name == "nt" else "-fPIC"),
)
_LINK = ("-ltorch_cuda", "-ltorch_cpu")
_log = logging.getLogger(__name__)


@lru_cache(maxsize=64)  # asked for with every call of an operator
def missing(device: str | None = None) -> str:
    """Why the extension cannot be had on a GPU, or on any here; empty where it is or can be compiled."""
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        return f"the CUDA kernels need PyTorch 2.11 or later, this is {torch.__version__}"
    wanted = _capabilities() if device is None else [_capability(device)]
    names = f"sm_{' or sm_'.join(wanted)}"
    compiler = nvcc()
    if compiler:
        if not wanted or any(_target(name) for name in wanted):
            return ""
        return f"{compiler} of CUDA {_about(compiler)[0]} does not compile for {names}"
    library = _built(_capabilities())
    if library is None:
        return (
            f"the CUDA kernels are not compiled yet and {_no_nvcc()}; install the CUDA toolkit (version "
            f"{torch.version.cuda} as PyTorch, or a later one that the driver supports) and set CUDA_HOME, "
            "or compile elsewhere by `python -m kernels.build --arch ..` and set TORCH_EXTENSIONS_DIR"
        )
    served = any(_serves(library, name) for name in wanted)
    return "" if served else f"{library} has no code for {names}, and {_no_nvcc()}"


def library() -> Path:
    """The library for the GPUs of this machine, compiled first if need be.

    Raises:
        RuntimeError: it cannot be compiled; the message says what is missing or where the log is.
    """
    found = _library()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


@lru_cache(maxsize=1)  # a failure, too: compiling takes long
def _library() -> Path | str:
    """The library, or why there is none."""
    try:
        return missing() or _built(_capabilities()) or build(_targets())
    except RuntimeError as error:
        return str(error)


def build(architectures: Iterable[str]) -> Path:
    """Compile and link the library for the architectures, unless it exists, and return its path.

    Raises:
        RuntimeError: nvcc or something to link with is missing, the folder cannot be written, or nvcc failed;
            then its log is kept.
    """
    from filelock import FileLock  # PyTorch depends on it

    names = sorted(set(architectures), key=int)
    if not names:
        raise RuntimeError("no GPU that nvcc knows is visible: name architectures, as in --arch 80,90")
    if torch.version.cuda is None:
        raise RuntimeError("this PyTorch was built without CUDA: there is nothing to link with")
    release = _about(_compiler())[0]
    library = _folder() / f"{_stem()}_cuda{release}_sm{'_'.join(names)}{_SUFFIX}"
    try:
        make_private(library.parent)
        with FileLock(library.with_suffix(".lock")):  # of several processes one compiles
            if library.exists():
                require_private(library)
                return library
            shown = ", sm_".join(names)
            _log.warning("compiling the CUDA kernels for sm_%s, once; it may take minutes", shown)
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                made = Path(folder) / library.name
                link = ["-shared", *_sources(), f"-L{_TORCH / 'lib'}", *_LINK, "-o", str(made)]
                _run_nvcc([*_gencode(names), *link], library.with_suffix(".log"))
                made.replace(library)  # at once, so that no one loads half a file
    except OSError as error:
        raise RuntimeError(f"cannot write {library}: {error}; set TORCH_EXTENSIONS_DIR") from error
    missing.cache_clear()
    return library


def check(architectures: Sequence[str] = ARCHITECTURES) -> str:
    """Compile without linking, so without a GPU or a PyTorch for CUDA, and return what ptxas reports.

    Raises:
        RuntimeError: nvcc is missing or failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = ["-Xptxas", "-v", "-c", *_sources(), "-odir", folder]
        return _run_nvcc([*_gencode(architectures), *output], _folder() / "check.log")


def usage(report: str) -> list[dict[str, str | int]]:
    """Name, architecture, registers and spilled bytes of every kernel in the report of ptxas."""
    entry = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    return [
        {
            "kernel": _readable(symbol),
            "arch": arch,
            "registers": int(registers),
            "spilled": sum(map(int, spilled)),
        }
        for symbol, arch, *spilled, registers in entry.findall(report)
    ]


def _readable(symbol: str) -> str:
    """forward[bfloat16, float32] from the symbol of that kernel."""
    match = re.search(r"_cu_[0-9a-f]{8}\d+([a-z_]+)I(\w+?)EEv", symbol)
    if match is None:
        return symbol
    names = {"13__nv_bfloat16": "bfloat16", "6__half": "float16", "f": "float32"}
    types: list[str] = []
    for code in re.findall("|".join((*names, r"S\d*_")), match[2]):
        types.append(names.get(code) or types[-1])  # S2_ and the like: the same again
    return f"{match[1]}[{', '.join(types)}]"


def nvcc() -> str | None:
    """The compiler, if there is one; where CUDA_HOME or CUDA_PATH is set, the one there and no other."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _no_nvcc() -> str:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            return f"nvcc was not found in {Path(home) / 'bin'}, which {name} names"
    return "nvcc was not found"


def _compiler() -> str:
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError(f"{_no_nvcc()}: install the CUDA toolkit and set CUDA_HOME")
    return compiler


@lru_cache(maxsize=8)
def _about(compiler: str) -> tuple[str, list[str]]:
    """The release of CUDA ("13.0") that an nvcc is of, and the architectures that it compiles for."""

    def answer(question: str) -> str:
        try:
            return subprocess.run([compiler, question], capture_output=True, text=True, check=False).stdout
        except OSError:
            return ""

    release = re.search(r"release (\d+\.\d+)", answer("--version"))
    return release[1] if release else "unknown", re.findall(r"compute_(\d+)\b", answer("--list-gpu-arch"))


def _run_nvcc(arguments: Sequence[str], log: Path) -> str:
    include = [f"-I{_TORCH / 'include'}", f"-I{SOURCES}"]
    command = [_compiler(), *_FLAGS, "--threads", "0", *include, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == 0:
        return done.stdout
    make_private(log.parent)
    log.write_text(" ".join(command) + "\n\n" + done.stdout)
    last = "\n".join(done.stdout.strip().splitlines()[-5:])
    raise RuntimeError(
        f"nvcc could not compile the CUDA kernels; the log is {log}, and it ends with\n{last}\n"
        "(TARVIS_KERNELS=reference does without them)"
    )


def _sources() -> list[str]:
    return [str(path) for path in sorted(SOURCES.iterdir()) if path.suffix in (".cu", ".cpp")]


def _gencode(architectures: Iterable[str]) -> list[str]:
    """Flags; code of one generation is translated once, as the kernels differ between generations only."""
    generations: dict[str, list[str]] = {}
    for name in architectures:
        generations.setdefault(name[:-1], []).append(name)
    flags = []
    for names in generations.values():
        codes = ",".join(f"sm_{name}" for name in names)
        flags += ["-gencode", f"arch=compute_{min(names, key=int)},code=[{codes}]"]
    return flags


def _capabilities() -> list[str]:
    """Architectures of the GPUs that are visible."""
    return sorted({_capability(f"cuda:{device}") for device in range(torch.cuda.device_count())}, key=int)


def _capability(device: str) -> str:
    return "{}{}".format(*torch.cuda.get_device_capability(torch.device(device)))


def _target(capability: str) -> str | None:
    """The nearest architecture known to nvcc whose code this GPU can run."""
    compiler = nvcc()
    known = _about(compiler)[1] if compiler else []
    if not known:
        return capability
    return max((name for name in known if _runs(name, capability)), key=int, default=None)


def _targets() -> set[str]:
    """Architectures for all visible GPUs, except those that nvcc does not know."""
    return {name for name in map(_target, _capabilities()) if name}


def _built(capabilities: Sequence[str]) -> Path | None:
    """An existing library: with nvcc, one that runs on all these GPUs that it compiles for; without nvcc, the
    one that runs on most of them."""
    compiler = nvcc()
    if compiler:
        capabilities = [name for name in capabilities if _target(name)]
    release = _about(compiler)[0] if compiler else "*"
    libraries = sorted(_folder().glob(f"{_stem()}_cuda{release}_sm*{_SUFFIX}"))
    served = {library: sum(_serves(library, name) for name in capabilities) for library in libraries}
    best = max(libraries, key=served.__getitem__, default=None)
    if best is None or served[best] < max(1, len(capabilities) if compiler else 1):
        return None
    return best


def _serves(library: Path, capability: str) -> bool:
    """Whether a library has code that a GPU runs."""
    return any(_runs(name, capability) for name in library.stem.rpartition("_sm")[2].split("_"))


def _runs(code: str, on: str) -> bool:
    """Code for a GPU runs on those of the same generation that are not older."""
    if code in TEGRA or on in TEGRA:
        return code == on
    return code[:-1] == on[:-1] and int(code) <= int(on)


def require_private(path: Path) -> None:
    """Refuse a file or folder, of which code is loaded, that somebody else owns or can write, as ssh does.

    Folders above it count, too: who can write there can put another in its place, unless the folder lets only
    owners do that (/tmp). There is nothing to check on Windows, or where nothing is yet.

    Raises:
        RuntimeError: naming the path, and the command that mends it.
    """
    if os.name == "nt" or not path.exists():
        return
    path = path.resolve()
    for place in (path, *path.parents):
        found = place.stat()
        is_shared = bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
        if place in (path, path.parent) and found.st_uid not in (0, os.getuid()):
            raise RuntimeError(f"{place}: belongs to another user, so that code there may be anybody's")
        if is_shared and (place == path or not found.st_mode & stat.S_ISVTX):
            raise RuntimeError(
                f"{place}: others can write there, so that code may be anybody's: chmod go-w it"
            )


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for their owner alone; see `require_private`."""
    for place in (*reversed(folder.parents), folder):
        place.mkdir(mode=0o700, exist_ok=True)
    require_private(folder)


def _folder() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root) / "tarvis_cuda"


@lru_cache(maxsize=1)
def _stem() -> str:
    made_for = (_FLAGS, _LINK, sys.platform, platform.machine(), torch.version.cuda)
    digest = hashlib.sha256(repr(made_for).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return f"tarvis_cuda_{digest.hexdigest()[:16]}"


def _architecture(name: str) -> str:
    match = re.fullmatch(r"(?:sm_)?(\d{2,3})|(\d{1,2})\.(\d)", name)
    if match is None:
        raise RuntimeError(f"--arch {name}: expected compute capabilities such as 80, sm_80 or 8.0")
    return match[1] or match[2] + match[3]


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m kernels.build", description=__doc__, formatter_class=raw)
    parser.add_argument("--arch", default="", help="as 80,90; without it, the GPUs of this machine")
    parser.add_argument("--check", action="store_true", help="compile without linking")
    args = parser.parse_args(argv)
    try:
        names = [_architecture(name.strip()) for name in args.arch.split(",") if name.strip()]
        if args.check:
            for row in usage(check(names or ARCHITECTURES)):
                print("sm_{arch}: {registers} registers, {spilled} bytes spilled: {kernel}".format(**row))
        else:
            print(build(names or _targets()))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
