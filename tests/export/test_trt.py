"""Engines are built without a GPU, by TensorRT-RTX, and whatever is wrong is one sentence."""

import argparse
import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

import numpy as np
import onnx
import torch

from export import trt
from export.manifest import FILE, read_manifest, write_manifest
from export.runner import open_runner
from export.runtimes import RefusalError, tensorrt, tensorrt_build
from export.runtimes.tensorrt import TensorRTGraph, require_target
from tarvis.files.outputs import RECORD, digest_of_file
from tarvis.structures import InputError
from tests.export.support import edit_manifest

try:
    LIBRARY = tensorrt.installed("tensorrt_rtx")
except InputError:
    LIBRARY = ""
needs_rtx = pytest.mark.skipif(not LIBRARY, reason="TensorRT-RTX is not installed")


@pytest.fixture(scope="module")
def built_before(made_once):
    """`tensorrt.run_build`, but graphs that tasks share are built once."""
    run_build = tensorrt.run_build

    def run(name, argv, variables, log, timeout):
        graph, engine = Path(argv[0]), Path(argv[argv.index("--engine") + 1])
        files = [digest_of_file(path) for path in (graph, graph.with_suffix(".onnx.data"))]
        options = [part for part in argv[1:] if part != str(engine)]

        def make(folder):
            moved = [str(folder / "engine") if part == str(engine) else part for part in argv]
            result = run_build(name, moved, variables, log, timeout)
            (folder / "result.json").write_text(json.dumps(result))

        made = made_once((*files, *options), make)
        shutil.copy(made / "engine", engine)
        log.touch()
        return json.loads((made / "result.json").read_text())

    return run


@pytest.fixture
def build(built_before, tmp_path, monkeypatch, capsys):
    """Runs the command line on a folder of graphs; returns exit code, summary, stderr and the folder."""
    monkeypatch.setattr(tensorrt, "run_build", built_before)

    def run(graphs, *options):
        out = tmp_path / "made" / "engines"
        capsys.readouterr()
        code = trt.main(["--onnx", str(graphs), "--out", str(out), *map(str, options)])
        printed = capsys.readouterr()
        return code, json.loads(printed.out or "{}"), printed.err, out

    return run


STATIC, FREE = {}, {"size": "128x64", "frames": 3, "dynamic": "frames"}


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "precision", "setting"),
    [
        ("vis", "fp32", STATIC),
        ("vps", "fp32", FREE),
        ("vos", "fp32", STATIC),
        ("pet", "fp32", STATIC),
        ("vis", "fp16", STATIC),
        ("vps", "fp16", STATIC),
        ("vos", "fp16", STATIC),
        ("pet", "fp16", STATIC),
    ],
)
def test_engines_with_the_plugin_are_built_without_a_gpu(graphs, build, config, task, precision, setting):
    source = graphs(task, precision=precision, **setting)
    code, summary, _, out = build(source)
    assert code == 0
    about = summary["graphs"]
    assert sum(graph["plugins"] for graph in about.values()) == config.neck_layers
    assert not any(graph["grid_samples"] for graph in about.values())
    manifest = read_manifest(out)  # all files are there, and as their digests say
    assert (manifest.backend, manifest.task, manifest.precision) == ("tensorrt_rtx", task, precision)
    assert set(manifest.graphs) == set(read_manifest(source).graphs)
    assert manifest.weights == read_manifest(source).weights
    assert {path.name for path in out.iterdir()} == {*manifest.files, FILE, RECORD, "build.log"}


@needs_rtx
def test_a_dry_run_parses_and_writes_nothing(graphs, tmp_path, capsys):
    source = graphs("vis")
    capsys.readouterr()
    assert trt.main(["--onnx", str(source), "--plugin", "none", "--dry-run"]) == 0
    about = json.loads(capsys.readouterr().out)["graphs"]
    assert about["encoder"]["plugins"] == about["encoder"]["grid_samples"] == 0
    assert about["encoder"]["layers"] > 100
    assert not list(tmp_path.iterdir())


@needs_rtx
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--arch", "9.0"], "does not build for SM90; it does for SM75"),
        (["--plugin", "aot"], "--plugin aot: tensorrt_rtx"),
    ],
)
def test_what_this_tensorrt_cannot_do_is_refused(graphs, build, options, said):
    code, _, err, out = build(graphs("vis"), *options)
    assert code == 2
    assert said in err
    assert [path.name for path in out.parent.iterdir()] == ["engines.log"]


@pytest.mark.parametrize("plugin", ["triton", "none"])
def test_tensorrt_never_sees_a_gridsample(graphs, plugin):
    model = tensorrt_build.parser_form(graphs("vis") / "encoder.onnx", plugin)
    kinds = {node.op_type for nodes in (model.graph, *model.functions) for node in nodes.node}
    assert "GridSample" not in kinds
    assert bool(model.functions) == (plugin == "none")


def test_a_plugin_takes_four_tensors_and_the_sizes_as_attribute(graphs):
    model = tensorrt_build.parser_form(graphs("vis") / "encoder.onnx", "triton")
    (node,) = (node for node in model.graph.node if node.op_type == "MSDeformAttn")
    assert len(node.input) == 4
    assert {a.name: list(a.ints) for a in node.attribute} == {"sizes": [2, 4, 4, 8, 8, 16]}  # of 64 x 128


def test_a_plugin_for_frames_of_any_size_is_refused(graphs, tmp_path):
    model = onnx.load(graphs("vis") / "encoder.onnx")
    (node,) = (node for node in model.graph.node if node.op_type == "MSDeformAttn")
    node.input[4] = "not_a_constant"
    onnx.save(model, tmp_path / "encoder.onnx")
    with pytest.raises(RefusalError, match="--plugin none"):
        tensorrt_build.parser_form(tmp_path / "encoder.onnx", "triton")


@pytest.mark.parametrize(
    ("task", "setting"), [("vps", FREE), pytest.param("pet", STATIC, marks=pytest.mark.slow)]
)
def test_every_free_dimension_has_a_range(graphs, task, setting):
    folder = graphs(task, **setting)
    manifest = read_manifest(folder)
    with pytest.raises(InputError, match="--max-size"):
        tensorrt.profile(manifest, frames=7, size=(50, 100), objects=5)
    ranges = tensorrt.profile(manifest, frames=7, objects=5)
    for name, file in manifest.graphs.items():
        for value in onnx.load(folder / file, load_external_data=False).graph.input:
            free = [i for i, n in enumerate(value.type.tensor_type.shape.dim) if n.dim_param]
            for i in free:
                least, usual, most = ranges[name][value.name][i]
                assert 1 <= least <= usual <= most
    assert ranges["encoder"]["frames"][1] == (1, manifest.frames, 7)
    if task == "pet":
        parts = 2 * manifest.model.num_queries_per_object
        assert ranges["decoder"]["content"][1] == (17, 16 + 4 * parts, 16 + 5 * parts + 5)
        assert ranges["object_encoder"]["masks"][0] == (1, 4, 5)


def fake_library(tmp_path, monkeypatch, text):
    """A package called tensorrt, for this process and its children."""
    (tmp_path / "lib" / "tensorrt").mkdir(parents=True)
    (tmp_path / "lib" / "tensorrt" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'lib'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise OSError('libnvinfer.so.11: cannot open shared object file')", "libnvinfer.so.11"),
        ("import os; os.abort()", "SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "want of memory"),
        ("import sys; print('noise'); print('the last word', file=sys.stderr); sys.exit(3)", "status 3"),
        ("import time; time.sleep(60)", "--timeout"),
        ("__version__ = '10.9.0.34'", "tensorrt 10.9.0.34 is too old, 10.16 or later"),
        ("__version__ = '10.16.1.11'", "encoder: AttributeError: module 'tensorrt' has no attribute"),
    ],
    ids=["library missing", "abort", "killed", "exit", "slow", "old", "raises"],
)
def test_whatever_happens_to_a_build_is_said_and_nothing_is_left(
    graphs, tmp_path, monkeypatch, capsys, text, said
):
    fake_library(tmp_path, monkeypatch, text)
    monkeypatch.setattr(trt, "target", lambda *_, **__: "SM90")
    out = tmp_path / "made" / "engines"
    argv = ["--onnx", str(graphs("vis")), "--out", str(out), "--backend", "tensorrt", "--timeout", "500"]
    if said == "--timeout":
        argv[-1] = "6"
    assert trt.main(argv) == 2
    err = capsys.readouterr().err
    assert said in err.splitlines()[-1]
    assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["engines.log"]
    if "AttributeError" in said:
        assert "Traceback" in out.with_name("engines.log").read_text()


def test_the_process_that_builds_does_without_torch():
    program = f"import sys, {tensorrt_build.__name__}, export.plugins.msda; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=tensorrt.ROOT, check=True)


def test_a_builder_that_cannot_start_points_to_the_one_that_needs_no_gpu():
    def null(_):
        raise TypeError("pybind11::init(): factory function returned nullptr")

    library = argparse.Namespace(__version__="10.16.1", Builder=null)
    logger = argparse.Namespace(errors=["CUDA initialization failure with error: 35"])
    with pytest.raises(RefusalError, match=r"error: 35; no usable GPU\? --backend tensorrt_rtx"):
        tensorrt_build.make_builder(library, "tensorrt", logger)


def no_export(*_):
    raise AssertionError("exported in vain")


@pytest.mark.parametrize(
    ("options", "said"), [([], "finds none: --backend tensorrt_rtx"), (["--arch", "8.9"], "--arch is for")]
)
def test_what_tensorrt_cannot_build_is_refused_before_the_export(
    asked, tmp_path, monkeypatch, capsys, options, said
):
    monkeypatch.setattr(tensorrt, "installed", lambda _: "tensorrt")
    monkeypatch.setattr("export.folder.from_weights", no_export)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert trt.main([*asked(), *options]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused_before_the_export(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tensorrt, "installed", lambda _: "tensorrt_rtx")
    monkeypatch.setattr("export.folder.from_weights", no_export)
    (tmp_path / "thesis").touch()
    assert trt.main(asked(out=tmp_path)) == 2
    assert "already exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


def test_without_tensorrt_the_packages_are_named(graphs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tensorrt, "find_spec", lambda _: None)
    assert trt.main(["--onnx", str(graphs("vis")), "--out", str(tmp_path / "out")]) == 2
    assert "tarvis[export]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--out"),
        (["--out", "OUT"], "give --task"),
        (["--out", "OUT", "--onnx", "nowhere"], "manifest.json"),
        (["--out", "OUT", "--onnx", "GRAPHS", "--arch", "hopper"], "--arch hopper"),
        (["--out", "OUT", "--onnx", "GRAPHS", "--max-objects", "0"], "--max-objects"),
    ],
)
def test_options_that_do_not_fit_are_refused(graphs, tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.setattr(tensorrt, "installed", lambda _: "tensorrt_rtx")
    places = {"OUT": str(tmp_path / "out"), "GRAPHS": str(graphs("vis"))}
    if not options:
        options = ["--onnx", "GRAPHS"]
    assert trt.main([places.get(option, option) for option in options]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_missing_link_of_the_wheel_is_mended_for_the_build_alone(tmp_path, monkeypatch):
    package = tmp_path / "lib" / "tensorrt_rtx_libs"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / tensorrt.LINKED).write_bytes(b"library")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    sys.modules.pop("tensorrt_rtx_libs", None)
    work = tmp_path / "work"
    work.mkdir()
    variables = tensorrt.environment(work)
    assert variables["LD_LIBRARY_PATH"].split(os.pathsep)[0] == str(work)
    assert (work / tensorrt.LINK).read_bytes() == b"library"
    assert not (package / tensorrt.LINK).exists()
    with pytest.raises(InputError, match="a link cannot be made there"):
        tensorrt.environment(work / "nowhere")
    (package / tensorrt.LINK).symlink_to(package / tensorrt.LINKED)
    assert "nowhere" not in tensorrt.environment(work / "nowhere").get("LD_LIBRARY_PATH", "")


def engines(graphs, folder, backend="tensorrt_rtx"):
    """A folder that says it holds engines."""
    shutil.copytree(graphs("vis"), folder)
    edit_manifest(folder, backend=backend, versions={backend: "0.0"}, target={"plugin": "triton"})
    write_manifest(folder, read_manifest(folder))  # by us
    return folder


def test_engines_do_not_run_on_a_cpu(graphs, tmp_path, monkeypatch):
    monkeypatch.setattr("export.runtimes.tensorrt.installed", lambda _: "tensorrt_rtx")
    with pytest.raises(InputError, match="run on an NVIDIA GPU, not on cpu"):
        open_runner(engines(graphs, tmp_path / "engines"), device="cpu")


def test_engines_need_the_library_they_were_built_by(graphs, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="TensorRT is not installed"):
        open_runner(engines(graphs, tmp_path / "engines", "tensorrt"), device="cpu")


def test_engines_are_no_graphs_to_build_from(graphs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tensorrt, "installed", lambda _: "tensorrt_rtx")
    folder = engines(graphs, tmp_path / "engines")
    assert trt.main(["--onnx", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "not ONNX graphs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("backend", "capabilities", "version", "said"),
    [
        ("tensorrt", "SM90", "10.15.1", "built by tensorrt 10.16.1, here is 10.15.1"),
        ("tensorrt", "SM89", "10.16.1", "built for SM89, this GPU is SM90: .* on this machine"),
        ("tensorrt_rtx", "SM89,SM120", "10.16.1", "built for SM89,SM120, .* without --arch"),
        ("tensorrt_rtx", "SM89,SM90", "10.16.1", ""),
        ("tensorrt_rtx", "portable", "10.16.1", ""),
    ],
)
def test_engines_of_another_version_or_gpu_are_refused(graphs, backend, capabilities, version, said):
    made = dataclasses.replace(read_manifest(graphs("vis")), backend=backend)
    made = dataclasses.replace(made, versions={backend: "10.16.1"}, target={"capabilities": capabilities})
    with pytest.raises(InputError, match=f"{said}.*export.trt") if said else nullcontext():
        require_target(Path("engines"), made, version, (9, 0))


def test_an_engine_that_cannot_be_opened_is_to_be_built_again(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "a toaster")
    (tmp_path / "encoder.engine").write_bytes(b"something else")
    library = argparse.Namespace(__name__="tensorrt", __version__="11.0")
    runtime = argparse.Namespace(deserialize_cuda_engine=lambda _: None)
    with pytest.raises(
        InputError, match=r"encoder.engine: tensorrt 11.0 cannot open it on a toaster, .* build it again"
    ):
        TensorRTGraph(library, runtime, tmp_path / "encoder.engine", torch.device("cuda"))


@needs_rtx
def test_a_plugin_keeps_what_it_gives_to_be_written():
    from export.plugins import msda

    library = tensorrt_build.load(LIBRARY)
    sizes = np.arange(1, 7, dtype=np.int32)
    field = library.PluginField("sizes", sizes, library.PluginFieldType.INT32)
    creator = msda._classes(library)()
    plugin = creator.create_plugin("layer", library.PluginFieldCollection([field]), None)
    fields = plugin.get_fields_to_serialize()
    gc.collect()
    others = [np.full(6, 99, np.int32) for _ in range(100)]  # where the sizes were, were they not kept
    assert list(fields[0].data) == list(sizes), others[0]


@needs_rtx
def test_a_launch_that_fails_is_raised(monkeypatch):
    from export.plugins import msda

    def fail(*_):
        raise ValueError("no such level")

    library = tensorrt_build.load(LIBRARY)
    monkeypatch.setattr(msda, "enqueue", fail)
    tensor = argparse.Namespace(dims=(1, 2), type=library.float32)
    plugin = msda._classes(library)().create_plugin(
        "layer",
        [argparse.Namespace(name="sizes", data=np.array([2, 2], np.int32))],
        None,
    )
    with pytest.raises(ValueError, match="no such level"):
        plugin.enqueue([tensor] * 4, [tensor], [1, 2, 3, 4], [5], 0, 0)


def test_a_build_that_lacks_memory_says_what_needs_less():
    errors = ["Requested amount of GPU memory (9 GB) could not be allocated", "Could not find any tactic"]
    assert tensorrt_build.reason(errors).startswith("Could not find any tactic (a smaller --size")
    assert tensorrt_build.reason(["no such layer"]) == "no such layer"
    assert tensorrt_build.reason(["no such layer"], 1.0) == "no such layer"


@pytest.mark.parametrize(
    ("errors", "workspace"),
    [
        (
            ["too little memory, available workspace size 9", "Could not find any implementation"],
            None,
        ),
        (["Try increasing the workspace size with setMemoryPoolLimit()"], None),
        (["Device memory is insufficient to use tactic."], 0.1),
        (["Could not find any implementation for node {conv}"], 0.1),
    ],
)
def test_a_workspace_that_is_too_small_is_to_be_larger(errors, workspace):
    said = tensorrt_build.reason(errors, workspace)
    assert "a larger --workspace" in said


AOT_WITHOUT_PLUGINS = """
__version__ = "10.16.1"
class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 1
    __members__ = {"STRONGLY_TYPED": 1}
class ILogger:
    pass
"""


def test_a_plugin_refuses_the_program_in_one_line(graphs, tmp_path, monkeypatch):
    fake_library(tmp_path, monkeypatch, AOT_WITHOUT_PLUGINS)
    argv = ["-m", tensorrt_build.__name__, str(graphs("vis") / "encoder.onnx"), "--library", "tensorrt"]
    done = subprocess.run(
        [sys.executable, *argv, "--plugin", "aot"], cwd=tensorrt.ROOT, capture_output=True, text=True
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("error: --plugin aot: tensorrt 10.16.1 has no quick-deployable")


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_the_process_that_builds_ends_with_the_one_that_started_it(graphs, tmp_path, monkeypatch, number):
    mark = tmp_path / "builder"
    text = (
        f"import os, pathlib, time; pathlib.Path({str(mark)!r}).write_text(str(os.getpid())); time.sleep(600)"
    )
    fake_library(tmp_path, monkeypatch, text)
    argv = ["--onnx", graphs("vis"), "--dry-run", "--backend", "tensorrt"]
    program = subprocess.Popen(
        [sys.executable, "-m", "export.trt", *map(str, argv)], cwd=tensorrt.ROOT, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: mark.exists() and mark.read_text())
        program.send_signal(number)
        program.wait(60)
        builder = Path("/proc") / mark.read_text()
        wait_for(lambda: not builder.exists() or "(zombie)" in (builder / "status").read_text())
    finally:
        program.kill()


def wait_for(happened, seconds=120):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("task", "vps", "are of vis"),
        ("size", "64x64", "are of 60x100"),
        ("frames", "12", "are of 2"),
        ("precision", "fp16", "are of fp32"),
        ("dataset", "ovis", "are of synthetic"),
        ("dynamic", "frames", "are of none"),
        ("weights", "x.pth", "nothing is exported"),
        ("config", "x.yaml", "nothing is exported"),
        ("max-frames", "12", "--dynamic frames"),
        ("max-size", "640x640", "--dynamic size"),
        ("max-objects", "3", "vos and pet"),
    ],
)
def test_graphs_are_what_they_are_whatever_the_options(
    graphs, tmp_path, monkeypatch, capsys, option, value, said
):
    monkeypatch.setattr(tensorrt, "installed", lambda _: "tensorrt_rtx")
    monkeypatch.setattr(tensorrt, "write", no_export)
    argv = ["--onnx", str(graphs("vis")), "--out", str(tmp_path / "out"), f"--{option}", value]
    assert trt.main(argv) == 2
    line = capsys.readouterr().err
    assert f"--{option}" in line
    assert said in line
    assert not list(tmp_path.iterdir())


def test_options_that_say_what_graphs_are_do_not_matter(graphs, monkeypatch, capsys):
    monkeypatch.setattr(tensorrt, "installed", lambda _: "tensorrt_rtx")
    monkeypatch.setattr(tensorrt, "write", lambda *_: {})
    said = {"task": "vis", "size": "060x100", "frames": "2", "precision": "fp32", "dataset": "synthetic"}
    argv = [part for name, value in said.items() for part in (f"--{name}", value)]
    assert trt.main(["--onnx", str(graphs("vis")), "--dry-run", *argv]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "vis"


@pytest.mark.parametrize(
    ("option", "value"),
    [("level", v) for v in ("9", "-1", "6", "x")]
    + [(name, v) for name in ("workspace", "timeout") for v in ("0", "-1", "nan", "inf", "1e300", "x")],
)
def test_numbers_out_of_range_are_refused(tmp_path, capsys, option, value):
    with pytest.raises(SystemExit) as ended:
        trt.main(["--onnx", "x", "--out", str(tmp_path / "out"), f"--{option}={value}"])
    assert ended.value.code == 2
    assert f"--{option}" in capsys.readouterr().err.splitlines()[-1]
