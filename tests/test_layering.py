"""Who may import whom, read from the source."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("kernels", "tarvis", "export", "bench", "tests")

# a module may import those of its own layer's group and of lower ones; longest prefix wins
LAYERS = [
    {"kernels"},
    {"tarvis.structures", "tarvis.config", "tarvis"},
    {"tarvis.rle", "tarvis.png", "tarvis.resize", "tarvis.schedule"},
    {"tarvis.model", "tarvis.datasets", "tarvis.metrics", "tarvis.losses", "tarvis.matching"},
    {"tarvis.tracking", "tarvis.panoptic", "tarvis.propagation"},
    {"tarvis.tasks", "tarvis.data"},
    {"tarvis.segmenter", "tarvis.visualize", "tarvis.results", "tarvis.overlays"},
    {"tarvis.api"},
    {"tarvis.infer", "tarvis.convert", "tarvis.train", "tarvis.evaluate"},
    {"tarvis.demo"},
    {"export"},
    {"bench"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SIBLINGS_APART = ("tarvis.model", "tarvis.datasets", "tarvis.metrics", "tarvis.losses", "tarvis.matching")
ALLOWED_OUTSIDE = {
    "kernels": {"torch", "triton"},
    "tarvis.metrics": {"numpy", "scipy", "trackeval"},
}


def modules():
    found = []
    for package in OURS[:-1]:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found.append(pytest.param(name, path, id=name))
    return found


def imports(path):
    """(module, whether at the top level of the file) of every import."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in tree.body
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, node in tree.body


def layer_of(name):
    while name not in LEVEL:
        assert "." in name, f"{name} has no place in LAYERS"
        name = name.rpartition(".")[0]
    return name


@pytest.mark.parametrize(("name", "path"), modules())
def test_imports_point_downwards(name, path):
    own = layer_of(name) if name != "tarvis" else "tarvis.api"  # tarvis/__init__ offers the API lazily
    for imported, _ in imports(path):
        if imported.split(".")[0] not in OURS:
            continue
        other = layer_of(imported)
        assert LEVEL[other] <= LEVEL[own], f"{name} imports {imported}, which is above it"
        if own in SIBLINGS_APART and other in SIBLINGS_APART:
            assert own == other, f"{name} imports {imported}: {SIBLINGS_APART} are independent of one another"


@pytest.mark.parametrize(("name", "path"), modules())
def test_third_party_imports_are_the_ones_a_layer_may_have(name, path):
    for prefix, allowed in ALLOWED_OUTSIDE.items():
        if name == prefix or name.startswith(prefix + "."):
            outside = {imported.split(".")[0] for imported, _ in imports(path)}
            assert outside - set(sys.stdlib_module_names) - set(OURS) <= allowed


@pytest.mark.parametrize(("name", "path"), modules())
def test_triton_is_imported_late(name, path):
    if "_triton" not in name:
        assert "triton" not in {imported.split(".")[0] for imported, top in imports(path) if top}
