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
    {"tarvis.structures", "tarvis.config"},
    {"tarvis.files", "tarvis.distributed", "tarvis.cli"},
    {"tarvis.model", "tarvis.metrics", "tarvis.stitch"},
    {"tarvis.datasets"},
    {"tarvis.tasks", "tarvis.data"},
    {"tarvis.video"},
    {"tarvis.api", "tarvis"},  # the package itself offers the API
    {"tarvis.training", "tarvis.benchmark_run"},
    {"export"},
    {"tarvis.infer", "tarvis.convert", "tarvis.train", "tarvis.evaluate"},
    {"tarvis.demo", "tarvis.web"},
    {"bench"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SIBLINGS_APART = ("tarvis.model", "tarvis.metrics", "tarvis.stitch")
VERBS = ("tarvis.infer", "tarvis.convert", "tarvis.train", "tarvis.evaluate")
ALLOWED_OUTSIDE = {
    "kernels": {"torch", "triton", "filelock"},  # the last comes with torch
    "tarvis.metrics": {"numpy", "scipy", "trackeval"},
}
NOTHING_OF_OURS = ("tarvis.metrics",)  # but its own modules


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in OURS[:-1]
    for path in sorted((ROOT / package).rglob("*.py"))
}
every_module = pytest.mark.parametrize(
    ("name", "path"), [pytest.param(name, path, id=name) for name, path in MODULES.items()]
)


def imports(path):
    """(module, whether it is imported as soon as the file is) of every import."""
    tree = ast.parse(path.read_text())
    late = {
        node for block in ast.walk(tree) if runs_late(block) for part in block.body for node in ast.walk(part)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in late
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                # what is imported from a package may be a module of it
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module, node not in late


def runs_late(node):
    """Whether what a block holds does not run with the file: functions, and what only type checkers read."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def layer_of(name):
    """The longest prefix of a module that stands in LAYERS; for `tarvis` every module needs a place."""
    prefix = name
    while prefix not in LEVEL or (prefix == "tarvis" != name):
        assert "." in prefix, f"{name} has no place in LAYERS"
        prefix = prefix.rpartition(".")[0]
    return prefix


@every_module
def test_imports_point_downwards(name, path):
    own = layer_of(name)
    for imported, _ in imports(path):
        if imported.split(".")[0] not in OURS:
            continue
        other = layer_of(imported)
        assert LEVEL[other] <= LEVEL[own], f"{name} imports {imported}, which is above it"
        if own in SIBLINGS_APART and other in SIBLINGS_APART:
            assert own == other, f"{name} imports {imported}: {SIBLINGS_APART} are independent of one another"


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_import_no_verb(verb):
    assert not {imported for imported, _ in imports(MODULES[verb])} & set(VERBS)


@pytest.mark.parametrize("package", NOTHING_OF_OURS)
def test_some_packages_import_nothing_of_ours(package):
    for name, path in MODULES.items():
        if name.startswith(package):
            ours = {imported for imported, _ in imports(path) if imported.split(".")[0] in OURS}
            assert all(imported.startswith(package) for imported in ours), f"{name} imports {ours}"


def test_the_package_itself_imports_nothing_before_it_is_asked_for():
    assert not [
        imported for imported, early in imports(MODULES["tarvis"]) if early and imported.split(".")[0] in OURS
    ]


@every_module
def test_third_party_imports_are_the_ones_a_layer_may_have(name, path):
    for prefix, allowed in ALLOWED_OUTSIDE.items():
        if name == prefix or name.startswith(prefix + "."):
            outside = {imported.split(".")[0] for imported, _ in imports(path)}
            assert outside - set(sys.stdlib_module_names) - set(OURS) <= allowed


@every_module
def test_triton_is_imported_late(name, path):
    if "_triton" not in name:
        assert "triton" not in {imported.split(".")[0] for imported, early in imports(path) if early}
