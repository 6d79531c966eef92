"""From files to numbers: results and truth in each benchmark's own format, scored by its official rules.

    from tarvis.scoring import score

    score("davis", Path("results"), Path("DAVIS"))["J&F-Mean"]

Every scorer takes two paths and gives numbers by name, in the units of the official evaluator: YouTube-VIS,
OVIS, DAVIS and STQ in [0, 1], VPQ and BURST in percent. Whatever is wrong with the files is an InputError
that names file and entry.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tarvis.scoring import burst, cityscapes_vps, davis, kitti_step, vipseg, youtube_vis
from tarvis.structures import InputError

SCORERS: dict[str, Callable[[Path, Path], dict[str, float]]] = {
    "youtube_vis": youtube_vis.evaluate,
    "ovis": youtube_vis.evaluate_ovis,
    "cityscapes_vps": cityscapes_vps.evaluate,
    "kitti_step": kitti_step.evaluate,
    "vipseg": vipseg.evaluate,
    "davis": davis.evaluate,
    "burst": burst.evaluate,
}

HEADLINES = {
    "youtube_vis": "AP",
    "ovis": "AP",
    "cityscapes_vps": "VPQ/all",
    "kitti_step": "STQ",
    "vipseg": "VPQ/all",
    "davis": "J&F-Mean",
    "burst": "HOTA/all",
}
"""The number that a benchmark ranks by."""


def score(benchmark: str, results: Path, truth: Path) -> dict[str, float]:
    """The numbers of a benchmark; what paths it wants and what numbers it gives, its module says.

    Raises:
        InputError: no such benchmark, or something is wrong with the files.
    """
    if benchmark not in SCORERS:
        raise InputError(f"unknown benchmark {benchmark!r}; known: {', '.join(SCORERS)}")
    return SCORERS[benchmark](results, truth)
