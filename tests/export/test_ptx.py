"""The kernel compiles, without a GPU, to PTX with the parameters that TensorRT passes."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("triton")

from export.plugins.ptx import ARCHITECTURES, VERSION, with_parameters

INPUTS = ["value_ptr", "offset_ptr", "logit_ptr", "ref_ptr"]
PTX = """
.version 8.7
.visible .entry run(
\t.param .u64 .ptr .global .align 1 run_param_0,
\t.param .u32 run_param_1,
\t.param .u64 .ptr .global .align 1 run_param_2
)
.reqntid 128
{
\tld.param.b32 %r1, [run_param_1];
\tld.param.b64 %rd1, [run_param_0];
}
"""


def compiled(points, architectures):
    """PTX of every architecture and what ptxas says of it, made in a process that compiles."""
    program = f"""
        import dataclasses, json, subprocess, tempfile, torch
        from pathlib import Path
        from triton import knobs
        from export.plugins.launch import Launch
        from export.plugins.ptx import compile_ptx

        shapes = (2, 168, 8, 16), (2, 168, 8, 3, {points}), (1, 168, 1, 2)
        launch = Launch.of(torch.float16, *shapes, [2, 4, 4, 8, 8, 16])
        assert list(launch.numbers) == [n for n, t in launch.variant.types.items() if t == "i32"]
        for architecture in {list(architectures)}:
            kernel = compile_ptx(launch.variant, architecture)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "kernel.ptx"
                file.write_text(kernel.text)
                target = kernel.text.partition(".target ")[2].split()[0].rstrip(",")
                command = [knobs.nvidia.ptxas.path, f"-arch={{target}}", file, "-o", "/dev/null"]
                done = subprocess.run(command, capture_output=True, text=True)
            errors = done.stderr if done.returncode else ""
            print(json.dumps(dataclasses.asdict(kernel) | {{"ptxas": errors}}))
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(architectures, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(
    ("points", "architectures"), [pytest.param(1, ARCHITECTURES, marks=pytest.mark.slow), (4, (90,))]
)
def test_the_kernel_becomes_ptx_that_takes_inputs_then_integers_then_outputs(points, architectures):
    for architecture, kernel in compiled(points, architectures).items():
        names = kernel["parameters"]
        assert names[:4] == INPUTS
        assert names[-1] == "out_ptr"
        rows = re.search(r"\.entry\s+\w+\((.*?)\n\)", kernel["text"], re.DOTALL)[1].split(",")
        kinds = [row.split()[1] for row in rows]
        assert kinds == [".u64"] * 4 + [".u32"] * (len(names) - 5) + [".u64"]  # and no hidden pointers
        major, minor = divmod(VERSION, 10)
        assert f".version {major}.{minor}" in kernel["text"]
        assert f".target sm_{architecture}" in kernel["text"]
        assert (kernel["threads"], kernel["shared"], kernel["ptxas"]) == (128, 0, "")


def test_parameters_are_put_in_order_and_hidden_ones_dropped():
    text = with_parameters(PTX, [1, 0])
    rows = re.search(r"run\((.*?)\n\)", text, re.DOTALL)[1].split(",")
    assert [row.split()[-1] for row in rows] == ["run_param_1", "run_param_0"]
    assert text.partition("{")[2] == PTX.partition("{")[2]


def test_a_hidden_parameter_that_is_read_cannot_be_dropped():
    with pytest.raises(RuntimeError, match="run_param_1 is read"):
        with_parameters(PTX, [0])
