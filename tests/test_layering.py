"""Who may import whom, read from the source."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("kernels", "tarvis", "export", "bench", "tests")

VERBS = {f"tarvis.{verb}" for verb in ("infer", "convert", "train", "evaluate", "info", "download")}

# a module may import those of its own layer's group and of lower ones; longest prefix wins
LAYERS = [
    {"kernels"},
    {"tarvis.places", "tarvis.operators"},
    {"tarvis.structures", "tarvis.config"},
    {"tarvis.files", "tarvis.distributed", "tarvis.cli"},
    {"tarvis.model", "tarvis.metrics", "tarvis.stitch"},
    {"tarvis.datasets"},
    {"tarvis.tasks", "tarvis.data"},
    {"tarvis.video"},
    {"tarvis.api", "tarvis"},  # the package itself offers the API
    {"tarvis.training", "tarvis.benchmark_run"},
    {"export"},
    {"tarvis.engines"},
    VERBS,
    {"tarvis.demo", "tarvis.web", "tarvis.__main__"},
    {"bench"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SIBLINGS_APART = ("tarvis.model", "tarvis.metrics", "tarvis.stitch")
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
            module = absolute(node, path)
            for alias in node.names:
                # what is imported from a package may be a module of it
                inner = f"{module}.{alias.name}"
                yield inner if inner in MODULES else module, node not in late


def absolute(node, path):
    """The module that an import names, from within its own package by dots or not."""
    if not node.level:
        return node.module
    package = path.relative_to(ROOT).parent.parts
    return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])


def runs_late(node):
    """Whether what a block holds does not run with the file: functions, and what only type checkers read."""
    return is_for_type_checkers(node) or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def is_for_type_checkers(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


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


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_verbs_import_no_verb(verb):
    assert not {imported for imported, _ in imports(MODULES[verb])} & VERBS


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


@every_module
def test_folders_that_a_wheel_has_elsewhere_are_not_named_by_imports(name, path):
    """`kernels` and `export` are `tarvis.kernels` and `tarvis.export` there: `tarvis.places` finds them."""
    if name.startswith("bench"):  # is not in a wheel
        return
    tree = ast.parse(path.read_text())
    unread = {each for block in ast.walk(tree) if is_for_type_checkers(block) for each in ast.walk(block)}
    for node in set(ast.walk(tree)) - unread:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        assert not {each.split(".")[0] for each in names} & {"kernels", "export"}
