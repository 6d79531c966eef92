"""YouTube-VIS 2019, YouTube-VIS 2021 and OVIS, in the format of `track_format`.

annotations: instances.json (2019: train.json, OVIS: annotations_train.json, ...)
results:     results.json
truth:       the annotations, where they have tracks
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tarvis.config import InferenceConfig
from tarvis.datasets.benchmark import Roots, expect_split, first_that_exists
from tarvis.datasets.classes import class_table
from tarvis.datasets.track_format import TrackBenchmark, has_tracks
from tarvis.files.records import Entry, read_json

SPELLINGS = {"train": ("train",), "val": ("valid", "val"), "test": ("test",)}
"""Names of the splits in paths, the official one first."""


class YouTubeVIS(TrackBenchmark):
    """An edition of the benchmark; a `Benchmark`."""

    def __init__(
        self,
        name: str,
        annotations: str,
        *,
        inference: InferenceConfig,
        training: Mapping[str, Any],
        years: tuple[int, ...] = (),
        has_occlusion: bool = False,
    ) -> None:
        """
        Args:
            name: also of the class table.
            annotations: the file of val and test in a workspace, with {} for the split.
            years: the years that the edition's files may name; empty accepts all.
            has_occlusion: tracks have levels of occlusion, which get numbers of their own.
        """
        self.name = name
        self.classes = class_table(name)
        self.inference = inference
        self.training = training
        self.has_occlusion = has_occlusion
        self._annotations = annotations
        self._years = years

    def find(self, root: Path, split: str) -> Roots:
        """See `Benchmark`. The truth is the annotation file itself, where it has tracks."""
        expect_split(self.name, self.splits, split)
        stage = "training" if split == "train" else "inference"
        pictures = root / "dataset_images" / stage
        folders = [pictures / f"{self.name}_test"] * (split == "test") + [pictures / self.name]
        for spelling in SPELLINGS[split]:
            folders += [root / spelling / "JPEGImages", root / spelling]
        images = first_that_exists(folders, f"images of {self.name} {split}")
        annotations = self.annotation_file(root, split)
        is_public = split == "train" or has_tracks(read_json(annotations))
        return Roots(images, annotations, annotations if is_public else None)

    def annotation_file(self, root: Path, split: str) -> Path:
        texts = root / "dataset_annotations"
        if split == "train":
            files = [texts / "training" / f"{self.name}.json"]
        else:
            files = [texts / "inference" / self._annotations.format(each) for each in SPELLINGS[split]]
        for spelling in SPELLINGS[split]:
            files += [
                root / spelling / "instances.json",
                root / f"{spelling}.json",
                root / f"annotations_{spelling}.json",
                root / f"annotations/instances_{spelling}_sub.json",
            ]
        return first_that_exists(files, f"annotations of {self.name} {split}")

    def expect_edition(self, root: Entry) -> None:
        info = root.get("info")
        year = info.get("year") if info else None
        if year is not None and self._years and str(year.value) not in map(str, self._years):
            years = " or ".join(map(str, self._years))
            raise year.expected(f"{years}, the years of {self.name}")


YOUTUBE_VIS_2019 = YouTubeVIS(
    "youtube_vis_2019",
    "youtube_vis/{}_2019.json",
    years=(2018, 2019),  # its files were made of YouTube-VOS 2018
    inference=InferenceConfig(min_size=448),
    training={"max_size": 1024},
)
YOUTUBE_VIS_2021 = YouTubeVIS(
    "youtube_vis_2021",
    "youtube_vis/{}_2021.json",
    years=(2021, 2022),
    inference=InferenceConfig(min_size=448),
    training={"max_size": 1024},
)
OVIS = YouTubeVIS(
    "ovis",
    "ovis/{}.json",
    has_occlusion=True,
    inference=InferenceConfig(min_size=576, top_k=20),
    training={"min_sizes": (512,), "max_size": 1024},
)
