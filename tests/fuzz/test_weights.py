"""Damaged weights, checkpoints, manifests and packages: read rightly, or refused in one line, soon.

Cases follow from seed, target and number: `--fuzz-seed`, `--fuzz-cases`, where there are such options.
"""

import dataclasses
import json
import math
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch

from export.folder import QUERIES
from export.manifest import FILE, Manifest, digest_of_tree, read_manifest, write_manifest
from export.runtimes.aoti import AotiGraph
from tarvis.files.outputs import digest_of_file
from tarvis.model import TarVis
from tarvis.model.weights import load_backbone, load_weights, network_with, save_weights
from tarvis.structures import InputError
from tarvis.training.checkpoint import read_checkpoint
from tests.tarvis.fuzz import damaged, mutated, read_or_refused
from tests.tarvis.networks import SMALLEST

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

JUNK = [
    *(
        None,
        True,
        -1,
        0,
        1,
        2**31,
        10**30,
        1e9,
        float("nan"),
        "",
        "x",
        "\x1b[31m",
        "../x",
        "a\0b",
        "x" * 5000,
    ),
    *([], [1, 2], {}, {"model": 1}, "vps", "fp16", "aoti"),
]
TENSORS = [
    lambda: torch.empty(2, device="meta"),
    lambda: torch.eye(3).to_sparse(),
    lambda: torch.ones(3, dtype=torch.int64),
    lambda: torch.ones(3, dtype=torch.bool),
    lambda: torch.ones(3, dtype=torch.complex64),
    lambda: torch.zeros(1).expand(2**40),
    lambda: np.array(["x"]),
    lambda: np.ones(3, ">f4"),
    lambda: np.ones(3, complex),
]


def state():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return dict(TarVis(SMALLEST).state_dict())


def changed(tree, rng):
    """A tree of plain values and tensors with one entry that is another, at any depth."""
    value = rng.choice(TENSORS)() if rng.random() < 0.5 else rng.choice(JUNK)
    flat = dict(tree)
    name = rng.choice(list(flat))
    if isinstance(flat[name], dict) and flat[name] and rng.random() < 0.8:
        flat[name] = changed(flat[name], rng)
    elif rng.random() < 0.2:
        del flat[name]
    else:
        flat[name] = value
    return flat


class Files:
    """A target: `path` is the file to damage, `use` reads it."""

    def __init__(self, path, use, rewrite=None):
        self.path, self.use, self.rewrite = path, use, rewrite
        self.sound = path.read_bytes()


def pickled(path, content, use):
    """A file that torch.save or pickle writes."""

    def write(tree):
        if path.suffix == ".pkl":
            path.write_bytes(pickle.dumps(tree))
        else:
            torch.save(tree, path)

    write(content)
    return Files(path, use, lambda rng: write(changed(content, rng)))


def published(root):
    content = {"model": state(), "config": {"model": json_of(SMALLEST)}}
    path = root / "x.pth"
    return pickled(path, content, lambda: network_with(*load_weights(path)))


def averaged(root):
    content = {"model": state(), "config": json_of(SMALLEST)}
    content["ema"] = {f"module.{name}": x for name, x in content["model"].items()}
    path = root / "x.pth"
    return pickled(path, content, lambda: load_weights(path, average=True))


def backbone(root):
    path = root / "x.pkl"
    arrays = {name.removeprefix("backbone."): x.numpy() for name, x in state().items() if "backbone." in name}
    return pickled(path, {"model": arrays}, lambda: load_backbone("convnext_zepto", path))


def safetensors(root):
    path = root / "x.safetensors"
    save_weights(path, state(), SMALLEST)

    def rewrite(rng):
        data = bytearray(path.read_bytes())
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        config = json.loads(header["__metadata__"]["config"])
        if rng.random() < 0.5:
            header["__metadata__"]["config"] = json.dumps(mutated(config, rng, rng.choice(JUNK)))
        else:
            header = mutated(header, rng, rng.choice(JUNK))
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return Files(path, lambda: network_with(*load_weights(path)), rewrite)


def checkpoint(root):
    weights = state()
    moments = {i: {"step": torch.ones(()), "exp_avg": x.float()} for i, x in enumerate(weights.values())}
    optimizer = {"state": moments, "param_groups": [{"params": list(moments), "lr": 1e-4}]}
    content = {"model": weights, "config": {"model": json_of(SMALLEST)}, "optimizer": optimizer, "step": 7}
    path = root / "000007.pth"
    return pickled(path, content, lambda: read_checkpoint(path))


def manifest(root):
    for name in ("encoder.onnx", "decoder.onnx", QUERIES):
        (root / name).write_bytes(name.encode())
    files = {path.name: digest_of_file(path) for path in root.iterdir()}
    graphs = {"encoder": "encoder.onnx", "decoder": "decoder.onnx"}
    groups = {"semantic": 25, "instance": 5, "background": 16}
    made = Manifest(
        1,
        "vis",
        "ovis",
        (60, 100),
        2,
        (),
        "fp32",
        groups,
        SMALLEST,
        "0" * 64,
        graphs,
        files,
        {"torch": "2.13"},
    )
    write_manifest(root, made)
    path = root / FILE

    def rewrite(rng):
        tree = mutated(json.loads(path.read_text()), rng, rng.choice(JUNK))
        if rng.random() < 0.7 and isinstance(tree, dict):
            tree.pop("digest", None)
            tree["digest"] = digest_of_tree(tree)
        path.write_text(json.dumps(tree))

    def use():
        found = read_manifest(root, trust=False)
        assert found.padded
        assert found.settings is not None

    return Files(path, use, rewrite)


def package(root):
    """Its library is none, so that no case gets as far as to run it."""
    path = root / "encoder.pt2"
    names = ["x.so", "x.json", "../x.so", "a/x.so", "", "..", "x.so", "\x1b.so", "y" * 300]

    def write(chosen):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("encoder/archive_version", "0")
            for name in chosen:
                archive.writestr(f"encoder/data/aotinductor/model/{name}", "no library")

    write(["x.so", "x.json"])

    def use():
        with pytest.raises(InputError) as refused:
            AotiGraph(path, (), torch.device("cpu"))
        raise refused.value

    return Files(path, use, lambda rng: write(rng.choices(names, k=rng.randrange(4))))


def json_of(config):
    return json.loads(json.dumps(dataclasses.asdict(config)))


TARGETS = (published, averaged, backbone, safetensors, checkpoint, manifest, package)


@pytest.mark.parametrize("make", TARGETS)
def test_damage_is_read_rightly_or_refused_in_one_line(make, tmp_path, pytestconfig):
    (tmp_path / "files").mkdir()
    seed = pytestconfig.getoption("--fuzz-seed", default=0)
    target = make(tmp_path / "files")
    for number in range(pytestconfig.getoption("--fuzz-cases", default=100)):
        rng = random.Random(f"{seed} {make.__name__} {number}")
        target.path.write_bytes(target.sound)
        if rng.random() < 0.6:
            target.rewrite(rng)
        else:
            target.path.write_bytes(damaged(target.sound, rng))
        what = f"{make.__name__}, seed {seed}, case {number}"
        read_or_refused(target.use, what, longest=math.inf)  # names every tensor; commands cut it
    assert {path.name for path in tmp_path.iterdir()} == {"files"}
