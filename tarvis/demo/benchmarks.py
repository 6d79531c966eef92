"""Seven benchmarks from files to numbers, on synthetic data in each one's own layout."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from tarvis.datasets.benchmarks import BENCHMARKS
from tarvis.datasets.classmap import write_class_map
from tarvis.demo.synthetic_benchmarks import class_map, make_benchmark, perfect_result
from tarvis.distributed import World
from tarvis.evaluate import evaluate, parser
from tarvis.structures import Size

CLASS_SET = "synthetic"
SEVEN = ("youtube_vis_2021", "ovis", "cityscapes_vps", "kitti_step", "vipseg", "davis", "burst")


def score_benchmarks(
    weights: Path, folder: Path, *, seed: int, num_videos: int, size: Size
) -> dict[str, tuple[float, float]]:
    """Make each benchmark in `folder`, infer and score it, score the truth itself: (found, perfect) by name.

    `weights` know the synthetic classes; their videos are those of the seeds from `seed` on.
    """
    found: dict[str, tuple[float, float]] = {}
    with tqdm(SEVEN, unit="benchmark", desc="scoring benchmarks") as bar:
        for name in bar:
            data = folder / name / "data"
            make_benchmark(name, data, seed=seed, num_videos=num_videos, size=size)
            argv = [name, "--data", str(data), "--out", str(folder / name / "run"), "--min-size", "0"]
            if names := class_map(name):
                write_class_map(data / "classes.json", CLASS_SET, names)
                argv += ["--classes", str(data / "classes.json")]
            summary = evaluate(parser().parse_args([*argv, "--weights", str(weights)]), World())
            found[name] = (
                summary["scores"][BENCHMARKS[name].headline],
                perfect_score(name, data, folder / name / "perfect"),
            )
    return found


def perfect_score(name: str, data: Path, folder: Path) -> float:
    """The headline of the truth, written and read back as a result."""
    benchmark = BENCHMARKS[name]
    split = benchmark.splits[0]
    roots = benchmark.find(data, split)
    videos = benchmark.read(roots, split)
    shares = [benchmark.write(perfect_result(name, data, video), video, folder) for video in videos]
    benchmark.join(shares, videos, split, folder)
    assert roots.truth is not None, name
    return benchmark.score(folder, roots.truth, split)[benchmark.headline]
