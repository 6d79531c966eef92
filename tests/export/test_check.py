"""`export.check` finds whatever is not as the weights say, however little it changes the outputs."""

import shutil

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from export import check
from tests.export.support import edit_manifest


@pytest.fixture(scope="module")
def folder_of(graphs, tmp_path_factory):
    """A copy of a folder of graphs, and whether `export.check` passes it after a change."""

    def copy(task):
        return shutil.copytree(graphs(task), tmp_path_factory.mktemp("check") / task)

    return copy


def rewrite(path, change):
    """Change a graph, external tensors included, and write it again in one file."""
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


def nudge(kind):
    """Adds 1e-2 to one number of the first tensor whose name starts so."""

    def change(model):
        entry = next(x for x in model.graph.initializer if x.name.startswith(kind) and x.data_type == 1)
        array = numpy_helper.to_array(entry).copy()
        array.reshape(-1)[0] += 1e-2
        entry.CopyFrom(numpy_helper.from_array(array, entry.name))

    return change


CHANGES = {
    "a weight of the decoder": ("decoder", nudge("model."), "tensors (decoder)"),
    "a constant of the decoder": ("decoder", nudge("val_"), "tensors (decoder)"),
    "a weight of the object encoder": ("object_encoder", nudge("model."), "tensors (object_encoder)"),
    "a constant of the object encoder": ("object_encoder", nudge("expand"), "tensors (object_encoder)"),
    "a weight of the encoder": ("encoder", nudge("model."), "tensors (encoder)"),
}


@pytest.mark.parametrize(
    ("part", "change", "row"),
    [
        pytest.param(*what, id=name, marks=[] if name == "a constant of the decoder" else [pytest.mark.slow])
        for name, what in CHANGES.items()
    ],
)
def test_one_number_that_is_not_the_weights_differs(folder_of, compared, part, change, row):
    folder = folder_of("vos")
    rewrite(folder / f"{part}.onnx", change)
    edit_manifest(folder)
    status, rows = compared(folder)
    assert status == 1
    assert not rows[row]["is_within"]
    assert rows[row]["largest"] == pytest.approx(1e-2, rel=0.1)


@pytest.mark.parametrize("task", ["vis", pytest.param("vos", marks=pytest.mark.slow)])
def test_a_constant_of_the_queries_that_is_not_the_weights_differs(folder_of, compared, task):
    folder = folder_of(task)
    constants = load_file(folder / "queries.safetensors")
    next(iter(constants.values())).view(-1)[-1] += 1e-2
    save_file(constants, folder / "queries.safetensors")
    edit_manifest(folder)
    status, rows = compared(folder)
    assert status == 1
    assert not rows["constants"]["is_within"]


def test_a_node_that_is_not_the_networks_differs(folder_of, compared):
    folder = folder_of("vos")
    rewrite(folder / "decoder.onnx", lambda model: setattr(model.graph.node[-1], "name", "another"))
    edit_manifest(folder)
    status, rows = compared(folder)
    assert status == 1
    assert [name for name, found in rows.items() if not found["is_within"]] == ["nodes (decoder)"]


def test_a_graph_written_by_another_version_has_the_weights_tensors(folder_of, compared):
    folder = folder_of("vos")

    def rename(model):
        for entry in model.graph.initializer:
            if entry.name.startswith("val_"):
                for node in model.graph.node:
                    node.input[:] = [f"x_{name}" if name == entry.name else name for name in node.input]
                entry.name = f"x_{entry.name}"

    rewrite(folder / "decoder.onnx", rename)
    edit_manifest(folder, versions={"torch": "2.11"})
    status, rows = compared(folder)
    assert (status, rows["tensors (decoder)"]["largest"]) == (0, 0)
    rewrite(folder / "decoder.onnx", nudge("x_val_"))
    edit_manifest(folder)
    status, rows = compared(folder)
    assert status == 1
    assert not rows["tensors (decoder)"]["is_within"]


@pytest.mark.slow
@pytest.mark.usefixtures("traced_writes")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("frames", 3),
        ("dynamic", ["frames"]),
        ("precision", "fp16"),
    ],
)
def test_a_manifest_that_is_not_the_graphs_fails(folder_of, weights, key, value):
    folder = folder_of("vis")
    edit_manifest(folder, **{key: value})
    assert check.main([str(folder), "--weights", str(weights), "--device", "cpu"])


def test_a_check_that_is_stopped_says_so_in_one_line(graphs, weights, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "check", stop)
    folder = graphs("vis")
    capsys.readouterr()
    assert check.main([str(folder), "--weights", str(weights)]) == 130
    assert capsys.readouterr().err == "error: stopped\n"
