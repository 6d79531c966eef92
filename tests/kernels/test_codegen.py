"""Machine code of every kernel, compiled without a GPU, against the committed table.

What changed for a reason is committed with `python -m bench.codegen --out bench/results/codegen.json`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

pytest.importorskip("triton")
import triton

from bench import codegen
from bench.variants import variants

COMMITTED = json.loads((Path(codegen.__file__).parent / "results/codegen.json").read_text())
COMMITTED = COMMITTED.get(triton.__version__, {})


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """All targets, compiled in a process that does not interpret: once, by one of the workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    out = folder / "codegen.json"
    with FileLock(folder / "codegen.lock"):
        if not out.exists():
            command = [sys.executable, "-m", "bench.codegen", "--out", str(out)]
            environment = {**os.environ, "TRITON_INTERPRET": "0"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())[triton.__version__]


@pytest.mark.slow
@pytest.mark.parametrize("name", codegen.targets())
def test_kernels_compile_to_what_they_promise(name, compiled):
    variant, arch = codegen.targets()[name]
    found = compiled[name]
    assert found["stack"] == found["local"] == 0, "registers are spilled"
    if arch == codegen.MAIN:
        for kind, least in variant.expect.items():
            count = codegen.count(found, kind)
            assert count >= least, f"{count} x {kind}, promised {least}: {found['kinds']}"
    if COMMITTED:
        assert found["registers"] <= COMMITTED[name]["registers"]
        assert found["instructions"] <= COMMITTED[name]["instructions"]


def test_the_table_has_these_variants_and_no_others():
    if not COMMITTED:
        pytest.skip(f"the table has no column for Triton {triton.__version__}")
    assert set(COMMITTED) == set(codegen.targets())


def test_names_are_unique():
    names = [variant.name for variant in variants()]
    assert len(set(names)) == len(names)
