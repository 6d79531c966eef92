"""Recipes, weights and the two implementations that replay the original's tensors."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tarvis.distributed import threads

HERE = Path(__file__).parent
OURS = HERE.parent / "goldens"
Weights = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As recorded: another number of threads sums in another order."""
    with threads(1):
        yield


@pytest.fixture(scope="session")
def goldens_dir(pytestconfig: pytest.Config) -> Path:
    """Folder of network cases (`--goldens`)."""
    return pytestconfig.getoption("goldens")


@pytest.fixture(scope="session")
def goldens_stitch_dir(pytestconfig: pytest.Config) -> Path:
    """Folder of stitching cases (`--goldens-stitch`)."""
    return pytestconfig.getoption("goldens_stitch")


@pytest.fixture(scope="session")
def recipes(goldens_dir: Path) -> SimpleNamespace:
    """How weights (`fill_weights`) and inputs (`make_inputs`) are made: the folder's own recipes, or ours."""
    weights = load("fill_weights", (goldens_dir, HERE))
    return SimpleNamespace(fill_weights=weights, make_inputs=load("make_inputs", (goldens_dir, HERE)))


@pytest.fixture(scope="session")
def manifests(goldens_dir: Path) -> dict[str, list[tuple[str, list[int], str]]]:
    """Rows (name, shape, dtype) of published weights by backbone."""
    found = {}
    for folder in (OURS, goldens_dir):
        for path in sorted((folder / "state_dict").glob("*.json")):
            found[path.stem] = [(name, shape, dtype) for name, shape, dtype in json.loads(path.read_text())]
    return found


@pytest.fixture(scope="session")
def published_weights(recipes: SimpleNamespace, manifests: dict[str, Any]) -> Weights:
    """Weights under their published names by backbone, seed and attention ("hard" or "soft")."""

    @functools.cache
    def fill(variant: str, seed: int, attention: str = "hard") -> dict[str, torch.Tensor]:
        if variant not in manifests:
            pytest.fail(f"no manifest state_dict/{variant}.json among {', '.join(manifests)}")
        rows = list(manifests[variant])
        if attention == "soft":  # the manifests are those of hard attention
            prefix = "decoder.transformer_cross_attention_layers"
            rows += [(f"{prefix}.{i}.multihead_attn.scaling_factors", [8], "float32") for i in range(9)]
        return {name: recipes.fill_weights.fill(name, shape, dtype, seed) for name, shape, dtype in rows}

    return fill


@pytest.fixture(scope="session", params=["tarvis", pytest.param("transcription", marks=pytest.mark.slow)])
def subject(request: pytest.FixtureRequest, published_weights: Weights) -> Any:
    """The implementation under test."""
    subjects = load("subjects", (HERE,))
    make = {"tarvis": subjects.TarvisSubject, "transcription": subjects.TranscriptionSubject}[request.param]
    return make(published_weights)


def load(name: str, folders: Iterable[Path]) -> ModuleType:
    """The module `name`.py of the first folder that has it. Test folders are no packages, hence by path."""
    path = next(folder / f"{name}.py" for folder in folders if (folder / f"{name}.py").exists())
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # make_inputs imports fill_weights by its plain name
    spec.loader.exec_module(module)
    return module
