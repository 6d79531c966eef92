"""Scores results again that official evaluators scored: every folder given by `--goldens-eval`.

Each benchmark's folder holds results, truth and `official_scores.json`, whose numbers must come out to 1e-6.
With `--real-davis DIR` real results of DAVIS are scored too.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from tarvis.datasets import burst
from tarvis.datasets.registry import BENCHMARKS

TOLERANCE = 1e-6
Numbers = dict[str, float]

needs_trackeval = pytest.mark.skipif(
    not importlib.util.find_spec("trackeval"), reason="BURST needs the trackeval package"
)


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """The folder of a benchmark, or a skip where the given set has none."""

    def of(name: str) -> Path:
        path: Path = request.config.getoption("--goldens-eval") / name
        if not path.is_dir():
            pytest.skip(f"no {path}")
        return path

    return of


def score(name: str, results: Path, truth: Path, videos: Collection[str] | None = None) -> Numbers:
    benchmark = BENCHMARKS[name]
    return benchmark.score(results, truth, benchmark.splits[0], videos)


def official(folder: Path) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((folder / "official_scores.json").read_text())
    return {key: value for key, value in scores.items() if key != "evaluator"}


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flat(value, f"{prefix}{key}/")
    else:
        yield prefix[:-1], tree


def assert_equal(found: Numbers, expected: Any) -> None:
    """Every expected number is among the found ones, under the same name."""
    numbers = dict(flat(expected))
    assert numbers
    assert not numbers.keys() - found.keys()
    wrong = {
        name: (found[name], value) for name, value in numbers.items() if abs(found[name] - value) > TOLERANCE
    }
    assert not wrong


def with_sequences(scores: dict[str, Any]) -> dict[str, Any]:
    """Scores of STQ with lists by sequence as dicts by name."""
    names = [str(name) for name in scores["ID_per_seq"]]
    apart = {
        name: {key: scores[f"{key}_per_seq"][k] for key in ("STQ", "AQ", "IoU", "Length")}
        for k, name in enumerate(names)
    }
    return {**{key: scores[key] for key in ("STQ", "AQ", "IoU")}, "per_sequence": apart}


@pytest.mark.parametrize("name", ["youtube_vis_2021", "youtube_vis_2019", "ovis"])
def test_track_ap(folder: Callable[[str], Path], name: str) -> None:
    path = folder(name)
    scores = official(path)
    found = score(name, path / "results.json", path / "instances_gt.json")
    assert_equal(found, scores.pop("stats") | scores)


def test_cityscapes_vps(folder: Callable[[str], Path]) -> None:
    path = folder("cityscapes_vps")
    assert_equal(score("cityscapes_vps", path / "pred", path / "gt"), official(path))


@pytest.mark.parametrize("results", ["pred", "pred_with_void"])
def test_kitti_step(folder: Callable[[str], Path], results: str) -> None:
    path = folder("kitti_step")
    assert_equal(score("kitti_step", path / results, path / "gt"), with_sequences(official(path)[results]))


def test_vipseg(folder: Callable[[str], Path]) -> None:
    path = folder("vipseg")
    scores = official(path)
    (annotations,) = path.glob("gt/panoptic_gt_VIPSeg_*.json")
    videos = [video["video_id"] for video in json.loads(annotations.read_text())["videos"]]
    stq = {**scores["STQ"], "ID_per_seq": [videos[k] for k in scores["STQ"]["ID_per_seq"]]}  # named by number
    found = score("vipseg", path / "pred", path / "gt")
    assert_equal(found, scores["VPQ_nframes"] | with_sequences(stq))
    assert_equal(
        found, {"VPQ": scores["VPQ_paper_mean_1_2_4_6"], "VPQ_with_8": scores["VPQ_script_mean_1_2_4_6_8"]}
    )


def test_davis(folder: Callable[[str], Path]) -> None:
    path = folder("davis2017")
    assert_equal(score("davis", path / "results", path / "davis_root"), official(path))


@needs_trackeval
@pytest.mark.parametrize(
    ("mode", "results"),
    [
        ("exemplar_guided", "exemplar_guided"),
        ("class_guided", "class_guided"),
        ("open_world", "class_guided"),
    ],
)
def test_burst(folder: Callable[[str], Path], mode: burst.Mode, results: str) -> None:
    path = folder("burst")
    assert_equal(burst.score(path / f"results_{results}.json", path / "gt", mode), official(path)[mode])


@pytest.fixture
def real(request: pytest.FixtureRequest) -> Path:
    path: Path | None = request.config.getoption("--real-davis")
    if path is None:
        pytest.skip("no --real-davis")
    return path


@pytest.mark.parametrize("case", ["single/stm", "single/osvos", "multi_derived/stm", "multi_derived/osvos"])
def test_real_results_of_davis(real: Path, case: str) -> None:
    kind, method = case.split("/")
    scores = official(real)[case]
    sequences = scores.pop("sequences")
    truth = real / f"Annotations_{kind}" / "480p"
    found = score("davis", real / f"predictions_{method}", truth, sequences)
    assert_equal(found, scores)


def test_published_numbers_of_stm(real: Path) -> None:
    sequences = ["car-shadow", "libby"]
    found = score("davis", real / "predictions_stm", real / "Annotations_single/480p", sequences)
    with (real / "predictions_stm/published_per-sequence_results-val.csv").open() as file:
        published = {row["Sequence"]: row for row in csv.DictReader(file)}
    for sequence in sequences:
        for measure in "JF":
            number = found[f"per_object/{sequence}_1/{measure}"]
            assert f"{number:.3f}" == published[f"{sequence}_1"][f"{measure}-Mean"]
