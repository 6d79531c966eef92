"""The CUDA extension: compiled with nvcc on first use, or ahead of time, and kept.

    python -m kernels.build                   # for the GPUs of this machine
    python -m kernels.build --arch 80,90      # for others (compute capabilities without the point)
    python -m kernels.build --check           # only compile; prints registers and spills, needs no GPU

nvcc is taken from CUDA_HOME, CUDA_PATH, the PATH or /usr/local/cuda. The library is kept in
TORCH_EXTENSIONS_DIR (~/.cache/torch_extensions where that is not set) under a name made from its sources, the
machine, the release of CUDA that PyTorch has, that of nvcc, and architectures. It uses PyTorch's stable ABI:
versions from 2.11 on, for one release of CUDA, can share it.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

from kernels import _cuda

SOURCES = Path(__file__).parent / "csrc"
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")  # that the kernels are checked for

# code for one of these embedded GPUs runs on that one only, and no other code runs there
TEGRA = ("53", "62", "72", "87", "101", "110")

_TORCH = Path(torch.__file__).parent
_WINDOWS = os.name == "nt"
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-DUSE_CUDA",  # declares the access to PyTorch's stream
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # 2.11
    *(("-Xcompiler", "/MD") if _WINDOWS else ("-Xcompiler", "-fPIC")),
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
    compiler = nvcc()
    if compiler:
        if not wanted or any(_target(name) for name in wanted):
            return ""
        return f"{compiler} of CUDA {_release()} does not compile for sm_{' or sm_'.join(wanted)}"
    library = _built(_capabilities())
    if library is None:
        return (
            f"the CUDA kernels are not compiled yet and {_no_nvcc()}; install the CUDA toolkit (version "
            f"{torch.version.cuda} as PyTorch, or a later one that the driver supports) and set CUDA_HOME, "
            "or compile elsewhere by `python -m kernels.build --arch ..` and set TORCH_EXTENSIONS_DIR"
        )
    if any(_serves(library, name) for name in wanted):
        return ""
    return f"{library} has no code for sm_{' or sm_'.join(wanted)}, and {_no_nvcc()}"


def extension() -> ModuleType:
    """The operators of the extension, compiled first if need be.

    Raises:
        RuntimeError: it cannot be compiled or loaded; the message says what is missing or where the log is.
    """
    why_not = _failure()
    if why_not:
        raise RuntimeError(why_not)
    return _cuda


@lru_cache(maxsize=1)  # a failure, too: compiling takes long
def _failure() -> str:
    """Loads the extension; why it cannot, or nothing."""
    try:
        why_not = missing()
        if why_not:
            return why_not
        capabilities = _capabilities()
        library = _built(capabilities) or build(_targets())
    except RuntimeError as error:
        return str(error)
    try:
        _cuda.load(library)
    except (OSError, RuntimeError) as error:
        return f"{library} cannot be loaded: {error}\n(delete it, and it is compiled again in a new process)"
    return ""


def build(architectures: Iterable[str]) -> Path:
    """Compiles and links the library for the architectures, unless it is there; returns its path.

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
    if nvcc() is None:
        raise RuntimeError(f"{_no_nvcc()}: install the CUDA toolkit and set CUDA_HOME")
    library = _folder() / f"{_stem()}_cuda{_release()}_sm{'_'.join(names)}{'.dll' if _WINDOWS else '.so'}"
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(library.with_suffix(".lock")):  # of several processes one compiles
            if library.exists():
                return library
            _log.warning(
                "compiling the CUDA kernels for sm_%s, once; it may take minutes", ", sm_".join(names)
            )
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
    """Compiles without linking, so without a GPU or a PyTorch for CUDA, and returns what ptxas reports.

    Raises:
        RuntimeError: nvcc is missing or failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = ["-Xptxas", "-v", "-c", *_sources(), "-odir", folder]
        return _run_nvcc([*_gencode(architectures), *output], _folder() / "check.log")


def usage(report: str) -> list[dict[str, str | int]]:
    """Name, architecture, registers and spilled bytes of every kernel in the report of ptxas."""
    entry = re.compile(
        r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<arch>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    return [
        {
            "kernel": _readable(match["symbol"]),
            "arch": match["arch"],
            "registers": int(match["registers"]),
            "spilled": int(match["stack"]) + int(match["stores"]) + int(match["loads"]),
        }
        for match in entry.finditer(report)
    ]


def nvcc() -> str | None:
    """The compiler, if there is one; where CUDA_HOME or CUDA_PATH is set, the one there and no other."""
    home = _home()
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _home() -> str:
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or ""


def _no_nvcc() -> str:
    home = _home()
    if not home:
        return "nvcc was not found"
    name = "CUDA_HOME" if os.environ.get("CUDA_HOME") else "CUDA_PATH"
    return f"nvcc was not found in {Path(home) / 'bin'}, which {name} names"


@lru_cache(maxsize=8)
def _answer(compiler: str, question: str) -> str:
    """What nvcc says about itself."""
    try:
        return subprocess.run([compiler, question], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def _release() -> str:
    """Of nvcc, as 13.0."""
    compiler = nvcc()
    found = re.search(r"release (\d+\.\d+)", _answer(compiler, "--version")) if compiler else None
    return found[1] if found else "unknown"


def _target(capability: str) -> str | None:
    """The architecture to compile for, that a GPU may run its code: the nearest that nvcc knows."""
    compiler = nvcc()
    known = re.findall(r"compute_(\d+)\b", _answer(compiler, "--list-gpu-arch")) if compiler else []
    if not known:
        return capability
    return max((name for name in known if _runs(name, capability)), key=int, default=None)


def _targets() -> set[str]:
    """Those of all visible GPUs; one that nvcc does not know takes nothing from the others."""
    return {name for name in map(_target, _capabilities()) if name}


def _run_nvcc(arguments: Sequence[str], log: Path) -> str:
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError(f"{_no_nvcc()}: install the CUDA toolkit and set CUDA_HOME")
    include = [f"-I{_TORCH / 'include'}", f"-I{SOURCES}"]
    command = [compiler, *_FLAGS, "--threads", "0", *include, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(" ".join(command) + "\n\n" + done.stdout)
        last = "\n".join(done.stdout.strip().splitlines()[-5:])
        raise RuntimeError(
            f"nvcc could not compile the CUDA kernels; the log is {log}, and it ends with\n{last}\n"
            "(TARVIS_KERNELS=reference does without them)"
        )
    return done.stdout


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


def _readable(symbol: str) -> str:
    """forward[bfloat16, float32] from the symbol of that kernel."""
    match = re.search(r"_cu_[0-9a-f]{8}\d+([a-z_]+)I(\w+?)EEv", symbol)
    if match is None:
        return symbol
    types: list[str] = []
    for code in re.findall(r"13__nv_bfloat16|6__half|f|S\d*_", match[2]):
        names = {"13__nv_bfloat16": "bfloat16", "6__half": "float16", "f": "float32"}
        types.append(names.get(code) or types[-1])  # S2_ and the like: the same again
    return f"{match[1]}[{', '.join(types)}]"


def _built(capabilities: Sequence[str]) -> Path | None:
    """A library that is there and runs on all these GPUs that nvcc compiles for; where there is no nvcc, so
    that none can be made, on as many as there is one for."""
    compiler = nvcc()
    if compiler:
        capabilities = [name for name in capabilities if _target(name)]
    made_by = _release() if compiler else "*"
    libraries = [
        library
        for library in sorted(_folder().glob(f"{_stem()}_cuda{made_by}_sm*"))
        if library.suffix in (".so", ".dll")
    ]
    served = [sum(_serves(library, name) for name in capabilities) for library in libraries]
    most = max(served, default=0)
    if most == 0 or (compiler and most < len(capabilities)):
        return None
    return libraries[served.index(most)]


def _serves(library: Path, capability: str) -> bool:
    """Whether a library has code that a GPU runs."""
    return any(_runs(name, capability) for name in library.stem.rpartition("_sm")[2].split("_"))


def _runs(code: str, on: str) -> bool:
    """Code for a GPU runs on those of the same generation that are not older."""
    if code in TEGRA or on in TEGRA:
        return code == on
    return code[:-1] == on[:-1] and int(code) <= int(on)


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
