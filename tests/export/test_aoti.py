"""AOTInductor's packages give what the network gives, and are refused where they do not fit."""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
import torch._inductor

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from bench.timing import missing
from export import aoti
from export.graphs import graphs
from export.manifest import read_manifest, write_manifest
from export.runner import open_runner
from export.runtimes import aoti as runtime
from kernels import dispatch
from tarvis.files.outputs import digest_of_file
from tarvis.structures import InputError
from tests.export.support import edit_manifest

QUICK = {"aot_inductor.debug_compile": True, "cpp.simdlen": 1}
"""The same code without optimisation: it compiles in a third of the time."""
TASKS = ("vis", "vps", "vos", "pet")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def packages(weights, made_once):
    """Makes packages by the command line, for 2 frames of 60 x 100; shared parts are compiled once."""
    if reason := missing("compiled", "cpu"):
        pytest.skip(reason)
    compile, parts = runtime.write_package, {}

    def compile_once(graph, path, device):
        groups = getattr(graph.module, "groups", None)
        key = (path.name, repr(groups), *graph.inputs)
        if key not in parts:
            compile(graph, path, device)
            parts[key] = path.read_bytes()
        path.write_bytes(parts[key])

    def make(task):
        def run(folder):
            argv = ["--weights", weights, "--task", task, "--size", "60x100", "--frames", "2"]
            with torch._inductor.config.patch(QUICK), pytest.MonkeyPatch.context() as patch:
                patch.setattr(runtime, "write_package", compile_once)
                out = str(folder / "packages")
                assert aoti.main([*map(str, argv), "--device", "cpu", "--out", out]) == 0

        return made_once(("aoti", task), run) / "packages"

    return make


@pytest.fixture
def folder(packages, tmp_path):
    return shutil.copytree(packages("vis"), tmp_path / "packages")


@pytest.mark.parametrize("task", TASKS)
def test_packages_give_the_features_answers_and_masks_of_the_network(packages, compared, task):
    status, found = compared(packages(task))
    assert status == 0
    rows = {name: row["largest"] for name, row in found.items()}
    assert rows.pop("masks, 1 - IoU") <= 1e-3
    assert rows.pop("stuff, pixels", 0) <= 1e-3
    has_classes = task in ("vis", "vps")
    wanted = ("class_logits", "mask_logits (instance)") if has_classes else ("objects", "mask_logits (vos)")
    assert rows.keys() >= {"memory_32", "memory_16", "memory_8", "mask_features", *wanted}
    assert max(rows.values()) <= 1e-4


def test_on_a_gpu_the_kernels_stay_nodes_of_the_graph(model):
    queries = model.queries.classes("synthetic")
    parts = graphs(model, groups=queries.groups, size=(64, 64), frames=2, dynamic=(), points=False)
    found = set()
    for graph in parts.values():
        program = graph.trace()
        found |= {str(node.target) for node in program.graph.nodes if "tarvis." in str(node.target)}
    assert found == {f"tarvis.{name}.default" for name in ("ms_deform_attn", "mask_bits", "masked_attention")}


COMPILED_FOR_A_GPU = """
import sys
from contextlib import nullcontext

import torch
from torch._export.utils import _compiling_state_context
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor import compile_fx, config
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import dispatch, mask_bits, masked_attention, ms_deform_attn

# a PyTorch without CUDA has fake tensors of a GPU; but not the GPU, nor all ways to index them
dispatch.triton_missing = lambda _: ""
torch.cuda.device_of = lambda _: nullcontext()
index = torch.Tensor.__getitem__
torch.Tensor.__getitem__ = lambda x, i: x.unsqueeze(0) if i is None else index(x, i)


class Operators(torch.nn.Module):
    def forward(self, value, offset, logit, query, features, q, k):
        bits, seen = mask_bits(query, features)
        return ms_deform_attn(value, offset, logit, [(4, 6), (2, 3)]), masked_attention(q, k, k, bits, seen)


class Done(BaseException):
    pass


def keep(module, *_, **__):
    for node in module.graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            while not hasattr(kernel, "__name__"):
                kernel = kernel.fn
            print("kernel", kernel.__module__, kernel.__name__)
    raise Done


sizes = {
    "value": (2, 30, 2, 16), "offset": (2, 30, 2, 2, 4, 2), "logit": (2, 30, 2, 2, 4),
    "query": (1, 3, 16), "features": (1, 16, 40), "q": (1, 2, 3, 16), "k": (1, 2, 40, 16),
}
with FakeTensorMode():
    inputs = {name: torch.empty(size, device="cuda:0") for name, size in sizes.items()}
clips, keys = torch.export.Dim("clips"), torch.export.Dim("keys")
free = {name: {0: clips} for name in ("value", "offset", "logit")} | {"features": {2: keys}, "k": {2: keys}}
shapes = {name: free.get(name) for name in sizes}
with torch.no_grad():
    program = torch.export.export(Operators(), (), inputs, dynamic_shapes=shapes, strict=False)
print(*(node.target for node in program.graph.nodes if "tarvis." in str(node.target)))
patched = config.patch(use_joint_graph_passes=False)  # they compute on the GPU
try:  # what aoti_compile_and_package does, up to code for a GPU
    with dispatch.compiled() as operators, _compiling_state_context(), patched:
        module = program.module(check_guards=False)
        flat, options = compile_fx._aoti_flatten_inputs(module, *program.example_inputs)
        compile_fx.compile_fx_aot(module, flat, inner_compile=keep, config_patches=options)
except Done:
    print(operators)
"""


def test_what_is_compiled_for_a_gpu_are_the_triton_kernels():
    """In the process Triton is not interpreted: operators are registered in another way than in this one."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", COMPILED_FOR_A_GPU],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    nodes, *kernels, operators = done.stdout.splitlines()
    names = {"ms_deform_attn", "mask_bits", "masked_attention"}
    assert {*nodes.split()} == {f"tarvis.{name}.default" for name in names}
    assert ast.literal_eval(operators) == {name: {"triton"} for name in names}
    assert {line.split()[1] for line in kernels} == {f"kernels._triton.{name}" for name in names}


def test_the_manifest_says_what_became_of_the_operators(packages):
    target = json.loads((packages("vis") / "manifest.json").read_text())["target"]
    assert target["device"] == "cpu"
    # interpreted, as in these tests, operators stay what they are, and are called back
    assert target["kernels"] == (
        "" if dispatch.INTERPRETED or not dispatch.HAS_TRITON else "ms_deform_attn reference"
    )


def test_interpreted_kernels_are_not_packaged_for_a_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    with pytest.raises(InputError, match="unset TRITON_INTERPRET"):
        runtime.require_compiler(torch.device("cuda"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"versions": {"torch": "1.0"}}, r"compiled for torch 1\.0"),
        ({"target": {"device": "cuda", "capability": "9.0", "cuda": "13.0"}}, "compiled for device cuda"),
        ({"target": {"device": "cpu", "machine": "toaster", "instructions": "AVX2"}}, "toaster"),
    ],
)
def test_packages_for_something_else_are_refused(folder, changes, said):
    edit_manifest(folder, **changes)
    with pytest.raises(InputError, match=said) as refused:
        open_runner(folder, device="cpu", trust=True)
    assert "python -m export.aoti" in str(refused.value)


def test_one_number_that_is_not_the_weights_differs(folder, model, compared):
    weight = model.decoder.layers[0].linear1.weight
    with zipfile.ZipFile(folder / "decoder.pt2") as archive:
        files = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    (library,) = (name for name in files if name.endswith(".so"))
    held = weight.numpy().tobytes()
    assert files[library].count(held) == 1
    at = files[library].index(held)
    nudged = (weight.view(-1)[:1] + 1e-2).numpy().tobytes()
    files[library] = files[library][:at] + nudged + files[library][at + len(nudged) :]
    with zipfile.ZipFile(folder / "decoder.pt2", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    edit_manifest(folder)
    with pytest.raises(InputError, match="not built on this machine"):
        open_runner(folder, device="cpu")
    write_manifest(folder, read_manifest(folder))
    status, rows = compared(folder)
    assert status == 1
    assert rows["tensors (decoder)"]["largest"] == pytest.approx(1e-2, rel=1e-3)


def test_a_file_that_is_no_package_is_refused_though_its_digest_fits(folder):
    (folder / "encoder.pt2").write_bytes(b"something else")
    manifest = read_manifest(folder, check_files=False)
    manifest.files["encoder.pt2"] = digest_of_file(folder / "encoder.pt2")
    write_manifest(folder, manifest)
    with pytest.raises(InputError, match=r"encoder\.pt2: cannot be loaded"):
        open_runner(folder, device="cpu")


def test_without_a_compiler_the_error_says_so_and_nothing_is_left(asked, tmp_path, capsys):
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert aoti.main(asked(frames=1, device="cpu")) == 2
    assert "compiler" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("option", "value"), [("task", "walk"), ("device", "toaster"), ("size", "1x0")])
def test_options_that_do_not_fit_are_refused(asked, tmp_path, capsys, option, value):
    assert aoti.main(asked(**{option: value})) == 2
    assert value in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
