"""AOTInductor's packages give what the network gives, and are refused where they do not fit."""

import json
import shutil

import pytest
import torch
import torch._inductor

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from bench.timing import missing
from export import aoti, check
from export.graphs import graphs
from export.runner import open_runner
from tarvis.structures import InputError

QUICK = {"aot_inductor.debug_compile": True, "cpp.simdlen": 1}
"""The same code without optimisation: it compiles in a third of the time."""


@pytest.fixture(scope="module")
def packages(tmp_path_factory, weights):
    """VIS, 2 frames of 60 x 100, by the command line."""
    if reason := missing("compiled", "cpu"):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("aoti") / "packages"
    argv = ["--weights", str(weights), "--task", "vis", "--size", "60x100", "--frames", "2"]
    with torch._inductor.config.patch(QUICK):
        assert aoti.main([*argv, "--device", "cpu", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def folder(packages, tmp_path):
    return shutil.copytree(packages, tmp_path / "packages")


def refusal(folder):
    with pytest.raises(InputError) as refused:
        open_runner(folder, device="cpu")
    return str(refused.value)


def test_packages_give_the_features_answers_and_masks_of_the_network(packages, model, weights, capsys):
    runner = open_runner(packages, device="cpu")
    frames = torch.randint(0, 256, (1, 2, 3, 60, 100), dtype=torch.uint8)
    ours, theirs = model.encode(frames), runner.encode(frames)
    for a, b in zip((*theirs.memory, theirs.mask_features), (*ours.memory, ours.mask_features), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    expected = model.decode(ours, model.queries.classes("synthetic"))
    got = runner.decode(ours, runner.queries.classes("synthetic"))
    torch.testing.assert_close(got.class_logits, expected.class_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        got.mask_logits("instance"), expected.mask_logits("instance"), atol=1e-4, rtol=1e-4
    )
    assert check.main([str(packages), "--weights", str(weights), "--device", "cpu"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    (masks,) = (row for row in rows if row["output"].startswith("masks"))
    assert masks["largest"] <= 1e-3


def test_on_a_gpu_the_kernels_stay_nodes_of_the_graph(model):
    queries = model.queries.classes("synthetic")
    parts = graphs(model, groups=queries.groups, size=(64, 64), frames=2, dynamic=(), points=False)
    found = set()
    for graph in parts.values():
        program = aoti.trace(graph, torch.device("cpu"), plain=False)
        found |= {str(node.target) for node in program.graph.nodes if "tarvis." in str(node.target)}
    assert found == {f"tarvis.{name}.default" for name in ("ms_deform_attn", "mask_bits", "masked_attention")}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"versions": {"torch": "1.0"}}, r"compiled for torch 1\.0"),
        ({"target": {"device": "cuda", "capability": "9.0", "cuda": "13.0"}}, "compiled for device cuda"),
        ({"target": {"device": "cpu", "machine": "toaster", "instructions": "AVX2"}}, "toaster"),
    ],
)
def test_packages_for_something_else_are_refused(folder, changes, said):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=said) as refused:
        open_runner(folder, device="cpu")
    assert "python -m export.aoti" in str(refused.value)


def test_a_truncated_package_is_refused(folder):
    data = (folder / "encoder.pt2").read_bytes()
    (folder / "encoder.pt2").write_bytes(data[: len(data) // 2])
    assert "encoder.pt2" in refusal(folder)


def test_a_package_that_is_none_is_refused_though_its_digest_fits(folder):
    from export.manifest import digest_of_file

    (folder / "encoder.pt2").write_bytes(b"something else")
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["encoder.pt2"] = digest_of_file(folder / "encoder.pt2")
    path.write_text(json.dumps(manifest))
    assert "encoder.pt2: cannot be loaded" in refusal(folder)


def test_without_a_compiler_the_error_says_so_and_nothing_is_left(weights, tmp_path, capsys):
    argv = ["--weights", str(weights), "--task", "vis", "--size", "64x64", "--frames", "1"]
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert aoti.main([*argv, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert "compiler" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--task", "walk", "walk"), ("--device", "toaster", "toaster"), ("--size", "1", "--size")],
)
def test_options_that_do_not_fit_are_refused(weights, tmp_path, capsys, option, value, said):
    options = {"--weights": weights, "--task": "vis", "--size": "64x64", "--out": tmp_path / "out"}
    options[option] = value
    assert aoti.main([str(part) for pair in options.items() for part in pair]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
