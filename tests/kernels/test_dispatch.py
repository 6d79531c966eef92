"""Which implementation runs: what was asked for, the best there is, never another one silently."""

import json
import os
import subprocess
import sys
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

from kernels import __main__ as command
from kernels import dispatch, explain, mask_bits, mask_logits

CPU = torch.zeros(1)


def run(code, **environment):
    """Python code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_tensors_on_a_cpu_take_the_reference():
    assert dispatch.choose("op", "auto", [CPU]) == "reference"


def test_what_was_asked_for_runs_or_raises(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match=r"op: impl='triton' cannot run here: tensors are on cpu"):
        dispatch.choose("op", "triton", [CPU])
    with pytest.raises(RuntimeError, match=r"op: impl='cuda' cannot run here: tensors are on cpu"):
        dispatch.choose("op", "cuda", [CPU], no_cuda="")
    with pytest.raises(RuntimeError, match=r"impl='cuda' cannot run here: not in the CUDA extension"):
        dispatch.choose("op", "cuda", [CPU])
    with pytest.raises(RuntimeError, match="heads of 24 channels"):
        dispatch.choose("op", "triton", [CPU], unfit="heads of 24 channels")


def test_a_machine_without_triton_says_so(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        dispatch.choose("op", "triton", [CPU])


def test_double_precision_has_no_kernel():
    unfit = dispatch.unfit_dtype(CPU, None, CPU.double())
    assert unfit == "its kernels take float32, float16 and bfloat16, not float64"
    with pytest.raises(RuntimeError, match="take float32, float16 and bfloat16, not float64"):
        mask_bits(torch.zeros(1, 1, 4).double(), torch.zeros(1, 4, 1), impl="triton")


def test_unknown_implementations_are_refused():
    with pytest.raises(ValueError, match="impl='cudnn': expected one of auto, triton, cuda, reference"):
        dispatch.choose("op", "cudnn", [CPU])
    with pytest.raises(ValueError, match="impl='fast'"), dispatch.using("fast"):
        pass


def test_on_a_gpu_the_first_that_can_run_does(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_missing", lambda _: "")
    monkeypatch.setattr(dispatch, "cuda_missing", lambda _: "")
    assert dispatch.automatic("cuda:0")[0] == "triton"
    monkeypatch.setattr(dispatch, "triton_missing", lambda _: "too old")
    assert dispatch.automatic("cuda:0") == ("cuda", "triton: too old")
    assert dispatch.automatic("cuda:0", no_cuda=dispatch.NOT_IN_CUDA) == (
        "reference",
        "triton: too old; cuda: not in the CUDA extension",
    )
    assert dispatch.automatic("cuda:0", unfit="odd")[1] == "triton: odd; cuda: odd"


def test_an_exported_program_leaves_the_choice_to_the_operator_that_is_taken_apart(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_missing", lambda _: "")
    for flag in ("_is_exporting_flag", "_is_compiling_flag"):  # as torch.export and AOTInductor set them
        monkeypatch.setattr(torch.compiler, flag, True)
    gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cuda:0"))
    with dispatch.compiled() as operators:
        assert dispatch.choose("op", "auto", [gpu]) == dispatch.choose("op", "auto", [CPU]) == "auto"
        assert not operators
        assert dispatch.choose("op", "auto", [gpu], inside=True) == "triton"
        assert dispatch.choose("plain", "auto", [CPU], inside=True) == "reference"
        assert dispatch.choose("op", "auto", [gpu], unfit="odd", inside=True) == "reference"
    assert operators == {"op": {"triton", "reference"}, "plain": {"reference"}}


def test_plain_pytorch_on_a_gpu_is_announced(monkeypatch):
    monkeypatch.setattr(dispatch, "automatic", lambda *_, **__: ("reference", "no kernel takes this"))
    tensor = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cuda:0"))
    dispatch._say.cache_clear()
    with pytest.warns(UserWarning, match="op runs as plain PyTorch on cuda:0: no kernel takes this"):
        assert dispatch.choose("op", "auto", [tensor]) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the second time is silent
        assert dispatch.choose("op", "auto", [tensor]) == "reference"


@pytest.mark.parametrize("device", ["xpu:0", "mps:0"])
def test_plain_pytorch_on_another_device_is_announced(device):
    tensor = SimpleNamespace(dtype=torch.float32, device=torch.device(device))
    dispatch._say.cache_clear()
    with pytest.warns(
        UserWarning, match=f"op runs as plain PyTorch on {device}: the kernels are for GPUs of"
    ):
        assert dispatch.choose("op", "auto", [tensor]) == "reference"


def test_triton_on_rocm_is_announced(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_missing", lambda _: "")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    tensor = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda:0"))
    dispatch._say.cache_clear()
    with pytest.warns(UserWarning, match="op runs as triton on cuda:0, a ROCm device"):
        assert dispatch.choose("op", "auto", [tensor]) == "triton"


def test_auto_can_stand_for_one_implementation():
    query, features = torch.zeros(1, 1, 4), torch.zeros(1, 4, 1)
    with dispatch.using("cuda"):
        with pytest.raises(RuntimeError, match="mask_bits: impl='cuda'"):
            mask_bits(query.cpu(), features.cpu())
        mask_bits(query, features, impl="reference")  # an argument beats the preference
    mask_bits(query, features)


def test_a_preference_holds_in_its_thread_only():
    inside, leave, found = threading.Event(), threading.Event(), {}

    def prefer():
        with dispatch.using("cuda"):
            inside.set()
            leave.wait(10)
            found["there"] = dispatch.preferred()

    before = dispatch.preferred()
    thread = threading.Thread(target=prefer)
    thread.start()
    assert inside.wait(10)
    with dispatch.using("reference"):
        found["here"] = dispatch.preferred()
        leave.set()
        thread.join(10)
        found["after"] = dispatch.preferred()
    assert found == {"there": "cuda", "here": "reference", "after": "reference"}
    assert dispatch.preferred() == before


def test_compiled_functions_follow_the_preference(monkeypatch):
    def run(query, features):
        return mask_bits(query, features)[0]

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    args = torch.ones(1, 1, 4), torch.ones(1, 4, 40)
    expected = run(*args)
    assert torch.equal(compiled(*args), expected)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with dispatch.using("cuda"), pytest.raises(Exception, match="impl='cuda' cannot run here"):
        compiled(*args)
    assert torch.equal(compiled(*args), expected)


def test_explain_says_what_runs_and_why_nothing_else():
    args = torch.zeros(1, 1, 4), torch.zeros(1, 4, 1)
    choice = explain(mask_bits, *args)
    assert choice[:2] == ("mask_bits", "reference")
    assert choice.why_not["cuda"] == "tensors are on cpu"
    assert explain(mask_bits, *args, impl="cuda").impl is None
    assert "raises" in str(explain(mask_bits, *args, impl="cuda"))
    assert explain(mask_bits, *args, impl="reference").why_not["triton"]
    double = explain(mask_bits, *(x.double() for x in args)).why_not
    assert double == dict.fromkeys(
        dispatch.FAST, "its kernels take float32, float16 and bfloat16, not float64"
    )
    assert explain(mask_logits, args[0], args[1][:, None, :, None]).impl == "reference"
    with pytest.raises(ValueError, match="expected"):
        explain(mask_bits, *args[:1], args[0])
    assert mask_bits(*args)[1].item()  # nothing is left behind


@pytest.mark.slow
def test_the_environment_says_what_auto_stands_for():
    code = "import torch, kernels; kernels.mask_bits(torch.zeros(1, 1, 4), torch.zeros(1, 4, 1))"
    assert run(code, TARVIS_KERNELS="reference").returncode == 0
    failed = run(code, TARVIS_KERNELS="cuda")
    assert "RuntimeError: mask_bits: impl='cuda' cannot run here: tensors are on cpu" in failed.stderr
    assert "ValueError: TARVIS_KERNELS='quick'" in run(code, TARVIS_KERNELS="quick").stderr


def test_operators_work_where_triton_is_missing():
    code = """
import sys
sys.modules["triton"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch, kernels
from kernels.dispatch import HAS_TRITON
bits, seen = kernels.mask_bits(torch.ones(1, 1, 4), torch.ones(1, 4, 40))
assert not HAS_TRITON and seen.all() and bits.sum() == 5 * 255
class Bits(torch.nn.Module):
    def forward(self, query, features):
        return kernels.mask_bits(query, features)
program = torch.export.export(Bits(), (torch.ones(1, 1, 4), torch.ones(1, 4, 40)))
assert torch.equal(program.module()(torch.ones(1, 1, 4), torch.ones(1, 4, 40))[0], bits)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_the_command_reports_every_operator(capsys):
    import kernels

    without_kernels = {"explain", "mask_logits", "nearest_sample"}
    assert set(command.OPERATORS) == {*kernels.__all__} - without_kernels
    command.main([])
    text = capsys.readouterr().out
    assert all(f"{name}" in text for name in command.OPERATORS)
    command.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["devices"][0]["device"] == "cpu"
    assert {impl for impl, _ in found["devices"][0]["runs"].values()} == {"reference"}


def test_the_command_reports_what_the_environment_asks_for():
    with dispatch.using("cuda"):
        runs = command.report()["devices"][0]["runs"]
    assert runs["mask_bits"] == ("error", "cuda: tensors are on cpu")
    assert runs["mask_cost"] == ("error", "cuda: not in the CUDA extension")


def test_inputs_must_be_on_one_device():
    with pytest.raises(ValueError, match="op: tensors on cpu and on meta"):
        dispatch.choose("op", "auto", [CPU, torch.zeros(1, device="meta")])


@pytest.mark.slow
def test_operators_compile_and_export_where_triton_is_not_interpreted():
    """There the operators are registered in another way than in the other tests."""
    code = """
import torch
from torch.export import export
from kernels import ms_deform_attn

class Attention(torch.nn.Module):
    def forward(self, value, offset, logit):
        return ms_deform_attn(value, offset, logit, [(4, 6), (2, 3)])

inputs = torch.randn(1, 30, 2, 16), torch.randn(1, 30, 2, 2, 4, 2), torch.randn(1, 30, 2, 2, 4)
expected = Attention()(*inputs)
program = export(Attention(), inputs)
names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
assert names == ["tarvis.ms_deform_attn.default"], names
torch.testing.assert_close(program.module()(*inputs), expected)
torch.testing.assert_close(torch.compile(Attention(), fullgraph=True, backend="aot_eager")(*inputs), expected)
"""
    done = run(code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
