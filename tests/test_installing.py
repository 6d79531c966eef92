"""What an installation owns, and that it lives beside another project's `kernels`."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="the paths of environments here are those of POSIX"),
]

ROOT = Path(__file__).parents[1]
OUTSIDE = sysconfig.get_path("purelib")
LEFT_OUT = {
    ".git",
    ".venv",
    ".venv36",
    "build",
    "dist",
    "demo",
    "out",
    "runs",
    ".hypothesis",
    ".benchmarks",
}


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A copy of the repository, in which building leaves its traces."""
    copy = tmp_path_factory.mktemp("source") / "tarvis"

    def ignore(folder, names):
        made = {name for name in names if name.endswith((".pyc", ".egg-info", "_cache"))}
        return made | ({*names} & LEFT_OUT if Path(folder) == ROOT else set()) | ({"__pycache__"} & {*names})

    return shutil.copytree(ROOT, copy, ignore=ignore)


def pip(*args, python=sys.executable):
    command = [sys.executable, "-m", "pip", "--python", str(python), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def build_wheel(source, out):
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, source)
    return next(out.glob("tarvis-*.whl"))


@pytest.fixture(scope="session")
def wheel(source, tmp_path_factory):
    return build_wheel(source, tmp_path_factory.mktemp("dist"))


def build(kind, source, out):
    """What setuptools makes of the repository: "sdist", or "editable", a wheel that points at it."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True)
    return next(out.glob("tarvis-*"))


@pytest.fixture(scope="session")
def sdist(source, tmp_path_factory):
    return build("sdist", source, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="session")
def editable(source, tmp_path_factory):
    return build("editable", source, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="session")
def foreign(tmp_path_factory):
    """A wheel of another project, whose package is called `kernels`."""
    path = tmp_path_factory.mktemp("foreign") / "kernels-9.0-py3-none-any.whl"
    files = {
        "kernels/__init__.py": "from kernels.layer import get_kernel\n",
        "kernels/layer.py": "def get_kernel():\n    return 'theirs'\n",
        "kernels-9.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 9.0\n",
        "kernels-9.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, "kernels-9.0.dist-info/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (files | {"kernels-9.0.dist-info/RECORD": record}).items():
            archive.writestr(name, text)
    return path


@pytest.fixture
def environment(tmp_path):
    """A fresh environment; its packages go before ours, which serve for torch and the rest."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    return tmp_path / "venv" / "bin"


def run(environment, *command, status=0):
    """What a command of the environment prints, from a folder that has nothing of ours."""
    own = subprocess.run(
        [environment / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [environment / command[0], *command[1:]],
        cwd=environment,
        env=variables | {"PYTHONPATH": os.pathsep.join((own, OUTSIDE))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout


OURS = """
import tarvis, torch
from tarvis.operators import mask_bits
from tarvis.export.runtimes import RUNTIMES, tensorrt_build
from tarvis.places import settings
from tarvis.export.runner import open_runner
import tarvis.infer, tarvis.evaluate, tarvis.train, tarvis.convert, tarvis.data.check, tarvis.demo.__main__
import tarvis.export.check, tarvis.export.trt, tarvis.export.aoti
import tarvis.export.to_onnx, tarvis.export.to_openvino
assert tarvis.operators.dispatch.__name__ == "tarvis.kernels.dispatch"
assert tarvis.engines.open_runner is open_runner
assert all(name.startswith("tarvis.export") for name in RUNTIMES.values())
assert settings("tiny").is_file()
tarvis.load("small", device="cpu")
"""
THEIRS = "from kernels import get_kernel; assert get_kernel() == 'theirs'"


def test_a_wheel_owns_only_names_that_start_with_ours(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"tarvis"}
    for folder in ("tarvis", "kernels", "export", "configs"):
        inside = "tarvis" if folder == "tarvis" else f"tarvis/{folder}"
        for path in (ROOT / folder).rglob("*"):
            if (
                path.suffix in (".py", ".yaml", ".cu", ".cuh", ".json", ".mp4", ".html", ".js", ".css")
                and path.is_file()
            ):
                assert f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" in names


def test_a_source_distribution_is_complete(sdist, source, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    built = {path for path in files if path.parts[0] in ("build",) or ".egg-info" in str(path)}
    missing = {path for path in files - built if not (unpacked / path).exists()}
    assert not missing
    again = build_wheel(unpacked, tmp_path / "dist")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize("is_editable", [False, True], ids=["wheel", "editable"])
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_ours_and_theirs_work_side_by_side(source, wheel, editable, foreign, environment, is_editable, first):
    ours = editable if is_editable else wheel
    for package in (ours, foreign) if first == "ours" else (foreign, ours):
        pip("install", "--no-deps", "--no-index", package, python=environment / "python")
    assert run(environment, "tarvis", "--version").startswith("tarvis ")
    both = f"{OURS}\n{THEIRS}" if first == "ours" else f"{THEIRS}\n{OURS}"
    run(environment, "python", "-c", both)
    if is_editable:  # in the checkout `kernels` is ours, as ever
        inside = (
            "import os, sys; os.chdir(sys.argv[1]); sys.path.insert(0, ''); import kernels, tarvis.operators"
        )
        same = "assert kernels.dispatch is tarvis.operators.dispatch"
        run(environment, "python", "-c", f"{inside}; {same}", source)
    gone, code = ("kernels", OURS) if first == "ours" else ("tarvis", THEIRS)
    pip("uninstall", "-y", gone, python=environment / "python")
    run(environment, "python", "-c", code)
    left = "tarvis" if gone == "kernels" else "kernels"
    run(environment, "python", "-c", f"import {gone}", status=1)
    run(environment, "python", "-c", f"import {left}")
