"""Which TensorRT is here, and what a process needs that is to use it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from export import trt_build
from export.trt_build import INSTALL, LIBRARIES
from tarvis.structures import InputError

LINK, LINKED = "libtensorrt_rtx.so", "libtensorrt_rtx.so.1"


def installed(backend: str | None = None) -> str:
    """The module of the best TensorRT that is installed, or of one backend; it is not imported.

    Raises:
        InputError: there is none.
    """
    for module, name in LIBRARIES.items():
        if backend in (None, name) and find_spec(module) is not None:
            return module
    wanted = {None: "neither TensorRT nor TensorRT-RTX is", "tensorrt": "TensorRT is not"}
    raise InputError(f"{wanted.get(backend, 'TensorRT-RTX is not')} installed: {INSTALL}")


def load(module: str) -> Any:
    """The module.

    Raises:
        InputError: it is installed and cannot be imported.
    """
    try:
        return trt_build.load(module)
    except trt_build.RefusalError as error:
        raise InputError(str(error)) from None


def environment(folder: Path) -> dict[str, str]:
    """Variables for a process that parses graphs with plugins.

    TensorRT-RTX opens libtensorrt_rtx.so when its parser meets a plugin, but its wheel (1.7.1) has that
    library as libtensorrt_rtx.so.1 alone, and the process is aborted then. A link in `folder`, on the path of
    libraries, mends it; what is installed stays as it is.

    Raises:
        InputError: the link cannot be made.
    """
    variables = dict(os.environ)
    spec = find_spec("tensorrt_rtx_libs")
    for place in spec.submodule_search_locations or () if spec is not None else ():
        library = Path(place) / LINKED
        if library.is_file() and not (Path(place) / LINK).exists():
            try:
                (folder / LINK).symlink_to(library)
            except OSError as error:
                raise InputError(
                    f"TensorRT-RTX would abort at the first plugin: there is no {LINK} beside {library}, and "
                    f"a link cannot be made in {folder} ({error.strerror}); make one beside it"
                ) from None
            paths = (str(folder), variables.get("LD_LIBRARY_PATH", ""))
            variables["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    return variables
