"""Where things lie that come with the package, or that it keeps for its user; needs Python alone.

In a checkout the packages `kernels` and `export` and the folder `configs` lie beside `tarvis` and keep their
names. A wheel has them inside it (`tarvis.kernels`, `tarvis.export`, `tarvis/configs`), since those names are
also other projects': `kernels` is Hugging Face's.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
"""The folder in which Python finds this package."""
BUNDLED = HERE / "assets" / "small.safetensors"
"""The weights that come with the package, by name `small`; configs/small.yaml made them."""
PUBLISHED = tuple(
    f"{backbone}_{stage}"
    for backbone in ("resnet50", "swin-tiny", "swin-large")
    for stage in ("finetune", "pretrain")
)
"""Names of the published weights, as `tarvis download` takes them."""


def package(name: str) -> str:
    """The import name of the package `kernels` or `export`: its own where Python finds ours under it.

    It does in a checkout. Everywhere else ours is `tarvis.NAME`: wheels and editable installs say so.
    """
    if (HERE / name).is_dir():
        return f"tarvis.{name}"
    try:
        spec = find_spec(name)
    except ValueError:  # a module that was made by hand
        spec = None
    ours = ROOT / name / "__init__.py"
    is_ours = spec is not None and spec.origin is not None and Path(spec.origin).resolve() == ours.resolve()
    return name if is_ours else f"tarvis.{name}"


def own_version() -> str:
    try:
        return version("tarvis")
    except PackageNotFoundError:
        return "of a checkout that is not installed"


def kept() -> Path:
    """The folder of what is kept for the user of this process: $XDG_DATA_HOME/tarvis."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "tarvis"


def weights(name: str | Path) -> Path:
    """The file at a path; where there is none, `small` of the package, or what `tarvis download` fetched."""
    path = Path(name)
    if os.path.lexists(path):
        return path
    if str(path) == BUNDLED.stem:
        return BUNDLED
    fetched = sorted((kept() / "weights" / path).glob("*.pth")) if str(path) in PUBLISHED else []
    return fetched[-1] if fetched else path


def settings(name: str | Path) -> Path:
    """The file at a path; where there is none, the package's: `tiny` and `configs/tiny.yaml` are the same."""
    path = Path(name)
    parts = path.parts[path.parts[:1] == ("configs",) :]
    if os.path.lexists(path) or not parts or path.is_absolute() or ".." in parts:
        return path
    folder = HERE / "configs" if (HERE / "configs").is_dir() else ROOT / "configs"
    found = folder.joinpath(*parts)
    found = found if found.suffix == ".yaml" else found.with_name(f"{found.name}.yaml")
    return found if found.is_file() else path
