"""Files of weights from anywhere: what is not weights is refused in one line, and nothing in them runs."""

import builtins
import dataclasses
import datetime
import functools
import os
import pickle
import shutil
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
import torch

from tarvis.model.tarvis import TarVis
from tarvis.model.weight_files import as_state, read_file
from tarvis.model.weights import WeightsError, load_into, load_weights, network_with, save_weights
from tests.tarvis.networks import SMALLEST


@pytest.fixture(scope="module")
def state():
    with torch.random.fork_rng([]):
        return TarVis(SMALLEST).state_dict()


def save(content, path, how):
    """Write a pickle as a file of weights may be: PyTorch's zip or older kind, or plain."""
    if how in ("zip", "older"):
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    else:
        path.write_bytes(pickle.dumps(content, int(how)))
    return path


class Calls:
    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


FOREIGN = {
    "posix.system": (os.system, "touch ran"),
    "subprocess.Popen": (subprocess.Popen, ["touch", "ran"]),
    "eval": (builtins.eval, "open('ran', 'w')"),
    "sys.exit": (sys.exit, 0),
    "functools.partial": (functools.partial, os.getcwd),
    "datetime.date": (datetime.date, 2000, 1, 1),
    "shutil.rmtree": (shutil.rmtree, "ran"),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["zip", "older", "0", "1", "2", "3", "4", "5"])
@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_pickled_object_is_refused_by_its_name(tmp_path, monkeypatch, name, how, suffix):
    if suffix == ".pkl" and how in ("zip", "older"):
        return
    monkeypatch.chdir(tmp_path)
    path = save({"model": {"x": Calls(*FOREIGN[name])}}, tmp_path / f"x{suffix}", how)
    with pytest.raises(WeightsError, match=rf"holds a pickled (builtins\.)?{name}, .*--trust") as refused:
        read_file(path)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


TARGETS = [
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "numpy dtype",
    "numpy ndarray",
]
TARGETS += ["_codecs encode", "collections OrderedDict", "numpy._core.multiarray _reconstruct"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("slots", [False, True])
def test_a_pickle_changes_nothing_that_it_imports(tmp_path, target, slots):
    module, name = target.split()
    found = getattr(sys.modules[module], name)
    before = (getattr(found, "__defaults__", None), dict(vars(found)) if hasattr(found, "__dict__") else None)
    change = b"}S'__defaults__'\n(I1\ntsS'hacked'\nI1\ns"
    state = b"(N" + change + b"t" if slots else change
    data = b"c" + target.replace(" ", "\n").encode() + b"\n" + state + b"b."
    (tmp_path / "x.pkl").write_bytes(data)
    with suppress(WeightsError):
        read_file(tmp_path / "x.pkl")
    after = (getattr(found, "__defaults__", None), dict(vars(found)) if hasattr(found, "__dict__") else None)
    assert after == before


def test_arrays_and_tensors_in_a_pickle_are_read(tmp_path):
    content = {
        "array": np.arange(6, dtype=">f4").reshape(2, 3),
        "scalar": np.float64(3),
        "tensor": torch.arange(3.0),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    for how in "2345":
        path = save(content, tmp_path / "x.pkl", how)
        found = as_state(path, read_file(path))
        assert torch.equal(found["array"], torch.arange(6.0).reshape(2, 3))
        assert found["scalar"].item() == 3
        assert torch.equal(found["tensor"], torch.arange(3.0))
        assert torch.equal(found["parameter"], torch.ones(2))


def test_a_small_pickle_cannot_ask_for_all_memory(tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f.")  # puts None at place 2^31 - 1
    began = time.monotonic()
    assert read_file(tmp_path / "x.pkl") is None
    assert time.monotonic() - began < 5


ODD = {
    "meta": lambda: torch.empty(2, device="meta"),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "csr": lambda: torch.eye(2).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "complex": lambda: torch.ones(2, dtype=torch.complex64),
    "float8": lambda: torch.ones(2).to(torch.float8_e4m3fn),
    "text": lambda: "x",
    "none": lambda: None,
    "list": lambda: [1.0],
    "objects": lambda: np.array([{}], dtype=object),
    "texts": lambda: np.array(["x"]),
    "times": lambda: np.array(["2000-01-01"], dtype="datetime64[D]"),
    "records": lambda: np.zeros(2, dtype=[("a", "f4")]),
    "complex array": lambda: np.ones(2, dtype=complex),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize")
@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_what_is_no_plain_tensor_is_refused_by_name_and_kind(tmp_path, make):
    with pytest.raises(WeightsError, match=r"x\.pth: expected .* got .* at 'weight'"):
        as_state(tmp_path / "x.pth", {"model": {"weight": make()}})


@pytest.mark.parametrize("kind", ["meta", "sparse", "complex"])
def test_files_of_such_tensors_are_refused(tmp_path, state, kind):
    path = save({"model": {**state, "pixel_mean": ODD[kind]()}}, tmp_path / "x.pth", "zip")
    with pytest.raises(WeightsError, match=r"x\.pth"):
        load_weights(path, config=SMALLEST)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_whole_numbers_are_no_weights(state, dtype):
    model = network_with(state, SMALLEST)
    with pytest.raises(WeightsError, match=rf"pixel_mean is {str(dtype)[6:]}, expected float32"):
        load_into(model, {**state, "pixel_mean": state["pixel_mean"].to(dtype)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_weights(state, dtype):
    network_with({name: x.to(dtype) if x.is_floating_point() else x for name, x in state.items()}, SMALLEST)


@pytest.mark.parametrize("ema", [None, 3, [], {}, {1: 2}, {"module": torch.ones(1)}, {"module.x": "y"}])
def test_a_malformed_average_is_refused(tmp_path, state, ema):
    path = save({"model": state, "ema": ema}, tmp_path / "x.pth", "zip")
    with pytest.raises(WeightsError, match=r"x\.pth: (its moving average|expected)"):
        load_weights(path, config=SMALLEST, average=True)


@pytest.mark.parametrize(
    "change",
    [
        {"neck_layers": 60},
        {"decoder_layers": 30},
        {"object_encoder_layers": 64},
        {"hidden_dim": 1024},
        {"num_instance_queries": 8000},
        {"class_sets": {"ovis": 8000}},
    ],
)
def test_a_network_that_is_not_the_weights_is_never_built(tmp_path, state, change):
    path = tmp_path / "x.safetensors"
    save_weights(path, state, dataclasses.replace(SMALLEST, **change))
    with pytest.raises(WeightsError, match=r"x\.safetensors: .*configuration says"):
        load_weights(path)


@pytest.mark.parametrize("name", ["neck_layers", "decoder_layers", "hidden_dim", "num_instance_queries"])
@pytest.mark.parametrize("value", [10**9, 1e9, 10**30, "1e9", -1, 0])
def test_a_configuration_out_of_bounds_is_refused_at_once(tmp_path, state, name, value):
    config = dataclasses.asdict(SMALLEST) | {name: value}
    path = save({"model": state, "config": config}, tmp_path / "x.pth", "zip")
    began = time.monotonic()
    with pytest.raises(WeightsError, match=rf"x\.pth: model\.{name}"):
        load_weights(path)
    assert time.monotonic() - began < 5
