"""A benchmark from outside, of one class: inferred, written, checked, scored and trained on as any other."""

# ruff: noqa: ARG002 (methods take what some benchmark needs)

import json

import cv2
import numpy as np
import pytest
import torch

from tarvis.config import InferenceConfig
from tarvis.data.sets import open_set
from tarvis.data.settings import DataSettings
from tarvis.datasets.benchmark import FrameTruth, Roots, Truth, VideoSample
from tarvis.datasets.registry import BENCHMARKS
from tarvis.datasets.track_format import tube_iou
from tarvis.evaluate import main
from tarvis.files import rle
from tarvis.files.atomic import write_json
from tarvis.files.records import read_json, read_masks
from tarvis.structures import InputError, Reference

SIZE = (64, 96)


def disc(t):
    return cv2.circle(np.zeros(SIZE, np.uint8), (30 + 4 * t, 30), 12, 1, -1)


class Toy:
    """A disc that moves, in each folder of frames; its IoU is scored."""

    name = "toy"
    tasks = ("vos",)
    splits = ("all",)
    headline = "IoU"
    classes = None
    inference = InferenceConfig(3, 1)
    training = {"tasks": ("vos",), "min_sizes": (64,), "crop": (1, 1)}  # noqa: RUF012

    def find(self, root, split):
        return Roots(root, root, root)

    def read(self, roots, split):
        return [self._video(folder) for folder in sorted(roots.images.iterdir()) if folder.is_dir()]

    def _video(self, folder):
        images = tuple(sorted(folder.iterdir()))
        truth = Truth({1: None}, ((1,),) * len(images), lambda t: FrameTruth(ids=disc(t).astype(np.uint16)))
        given = [Reference(1, 0, torch.from_numpy(disc(0) > 0))]
        names = tuple(path.stem for path in images)
        return VideoSample(folder.name, images, names, size=SIZE, references=lambda: given, truth=truth)

    def write(self, result, video, folder):
        masks = result.tracks[0].masks
        empty = rle.empty(SIZE)
        return {video.name: [masks.get(t, empty)["counts"].decode() for t in range(result.num_frames)]}

    def join(self, shares, videos, split, folder):
        write_json(folder / "toy.json", {name: codes for share in shares for name, codes in share.items()})

    def check(self, results, videos, split):
        self._tubes(results, [video.name for video in videos])
        return {"toy.json": results / "toy.json"}

    def score(self, results, truth, split, videos=None):
        tubes = self._tubes(
            results, videos or [video.name for video in self.read(Roots(truth, truth), split)]
        )
        ious = [
            tube_iou([tube], [rle.encode(np.stack([disc(t) for t in range(len(tube))]))])[0, 0]
            for tube in tubes
        ]
        return {"IoU": float(np.mean(ious))}

    def _tubes(self, results, names):
        root = read_json(results / "toy.json")
        return [read_masks(root[name].entries(), SIZE) for name in names]


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "toy", Toy())
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        for t in range(5):
            frame = np.full((*SIZE, 3), 90, np.uint8) + 100 * disc(t)[..., None]
            cv2.imwrite(str(tmp_path / f"data/{name}/{t:05d}.png"), frame)
    return tmp_path / "data"


def test_a_benchmark_from_outside_goes_from_data_to_number(data, weights, tmp_path, capsys):
    run = ["toy", "--data", str(data), "--weights", str(weights), "--out", str(tmp_path / "out")]
    assert main([*run, "--submission"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert 0 <= summary["scores"]["IoU"] <= 1
    assert json.loads((tmp_path / "out/run.json").read_text())["settings"]["clip_length"] == 3
    results = tmp_path / "out/results"
    perfect = {name: [rle.encode(disc(t)[None])[0]["counts"].decode() for t in range(5)] for name in "ab"}
    write_json(results / "toy.json", perfect)
    assert main(["toy", "--results", str(results), "--truth", str(data)]) == 0
    assert json.loads(capsys.readouterr().out)["scores"] == {"IoU": 1.0}
    write_json(results / "toy.json", perfect | {"b": ["52N2"]})
    with pytest.raises(InputError, match=r"toy\.json: b\[0\]: expected a run-length code of \(64, 96\)"):
        BENCHMARKS["toy"].check(results, Toy().read(Roots(data, data), "all"), "all")


def test_a_benchmark_from_outside_is_trained_on(data):
    clips = open_set("toy", DataSettings(root=str(data), split="all", clip_length=2)).clips
    (kind,) = clips.kinds()
    sample = clips.draw(kind, 0, np.random.default_rng(0))
    assert sample.frames.shape == (2, 64, 96, 3)
    assert (sample.layers == 1).any()
