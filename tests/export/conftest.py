"""A tiny network and its graphs; whatever graphs have in common is traced once a session."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from export.manifest import digest_of_weights
from tarvis.model import build_model
from tarvis.model.weights import read_config, save_weights

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@pytest.fixture(scope="session")
def config():
    return dataclasses.replace(read_config(TINY), neck_layers=1, decoder_layers=3, object_encoder_layers=1)


@pytest.fixture(scope="session")
def model(config):
    """A random network whose deformable attention really looks about."""
    torch.manual_seed(0)
    model = build_model(config).eval().requires_grad_(False)
    for layer in model.neck.spatial:
        layer.sampling_offsets.weight.normal_(std=0.2)
        layer.attention_weights.weight.normal_(std=0.1)
    for name, parameter in model.backbone.named_parameters():
        if name.endswith("gamma"):
            parameter.fill_(0.3)
    return model


@pytest.fixture(scope="session")
def weights(tmp_path_factory, model, config):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, model.state_dict(), config)
    return path


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """`made_once(key, make)` is a folder that `make` has filled, once for all of pytest's workers."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    root = root / "made"
    root.mkdir(exist_ok=True)

    def folder_of(key, make):
        folder = root / hashlib.sha256(repr(key).encode()).hexdigest()
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                with tempfile.TemporaryDirectory(dir=root) as work:
                    make(Path(work))
                    shutil.copytree(work, folder)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def traced(made_once):
    """`export.runtimes.onnx.write_graph`, but a graph that was written before, in any process, is copied."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from export.runtimes import onnx

    write = onnx.write_graph

    def write_once(graph, path, opset):
        weights = digest_of_weights(graph.module.state_dict())
        sizes = [(name, *value.shape, value.dtype) for name, value in graph.inputs.items()]
        free = {name: sorted(shape) for name, shape in graph.dynamic.items() if shape}
        groups = getattr(graph.module, "groups", None)
        key = (path.name, opset, weights, sizes, free, groups)
        for file in made_once(key, lambda folder: write(graph, folder / path.name, opset)).iterdir():
            shutil.copy(file, path.parent)

    return write_once


@pytest.fixture(scope="session")
def graphs(tmp_path_factory, traced, weights):
    """Makes a folder of graphs by the command line, or takes the one made before."""
    from export import to_onnx
    from export.runtimes import onnx

    made = {}

    def make(task, size="60x100", frames=2, dynamic="", precision="fp32", weights=weights):
        key = (task, size, frames, dynamic, precision, weights)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("export") / task
            options = {"weights": weights, "task": task, "size": size, "frames": frames, "out": made[key]}
            options |= {"dynamic": dynamic, "precision": precision}
            argv = [part for name, value in options.items() for part in (f"--{name}", str(value))]
            with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
                patch.setattr(onnx, "write_graph", traced)
                assert to_onnx.main(argv) == 0
        return made[key]

    return make


@pytest.fixture
def traced_writes(traced, monkeypatch):
    """What the test writes is copied where the same was written before."""
    from export.runtimes import onnx

    monkeypatch.setattr(onnx, "write_graph", traced)


@pytest.fixture
def compared(weights, traced_writes, capsys):  # noqa: ARG001
    """Runs `export.check` on a folder; returns its exit status, and its rows by output."""
    from export import check

    def compare(folder, weights=weights):
        capsys.readouterr()
        status = check.main([str(folder), "--weights", str(weights), "--device", "cpu"])
        rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
        return status, {row["output"]: row for row in rows}

    return compare


@pytest.fixture
def asked(weights, tmp_path):
    """Arguments of a command that exports `weights` to `tmp_path / "out"`, with other options."""

    def arguments(**others):
        options = {"weights": weights, "task": "vis", "size": "64x64", "out": tmp_path / "out"} | others
        return [part for name, value in options.items() for part in (f"--{name}", str(value))]

    return arguments
