"""The benchmarks by name: adding one is a file beside these and a line below."""

from tarvis.datasets.benchmark import Benchmark, Converter
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
    "cityscapes_vps": CityscapesVPS(),
    "kitti_step": KittiStep(),
    "vipseg": VIPSeg(),
    "davis": Davis(),
    "burst": Burst(),
}

CONVERTERS: dict[str, Converter] = {
    name: benchmark for name, benchmark in BENCHMARKS.items() if isinstance(benchmark, Converter)
}
"""Those whose official download training cannot read as it is."""
