"""The benchmarks by name: adding one is a file beside these and a line below."""

from tarvis.config import InferenceConfig
from tarvis.datasets.benchmark import Benchmark
from tarvis.datasets.burst import Burst
from tarvis.datasets.cityscapes_vps import CityscapesVPS
from tarvis.datasets.davis import Davis
from tarvis.datasets.kitti_step import KittiStep
from tarvis.datasets.vipseg import VIPSeg
from tarvis.datasets.youtube_vis import OVIS, YOUTUBE_VIS_2019, YOUTUBE_VIS_2021

BENCHMARKS: dict[str, Benchmark] = {
    "youtube_vis_2019": YOUTUBE_VIS_2019,
    "youtube_vis_2021": YOUTUBE_VIS_2021,
    "ovis": OVIS,
    "kitti_step": KittiStep(),
    "cityscapes_vps": CityscapesVPS(),
    "vipseg": VIPSeg(),
    "davis": Davis(),
    "burst": Burst(),
}

INFERENCE: dict[str, InferenceConfig] = {
    **{name: benchmark.inference for name, benchmark in BENCHMARKS.items()},
    "synthetic": InferenceConfig(6, 3, max_tracks_per_clip=20, score_threshold=0.5),
}
"""Published settings by class set or benchmark; "synthetic" serves the demo."""
