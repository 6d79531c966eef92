"""Memory over a very long video."""

import gc

import psutil
import pytest
import torch

from tarvis.config import InferenceConfig
from tarvis.data.synthetic import synthetic_frames
from tarvis.datasets.classes import class_table
from tarvis.structures import Reference
from tarvis.video.segmenter import VideoSegmenter


@pytest.mark.slow
def test_resident_memory_after_5000_frames_is_that_after_500(tiny_model):
    size = (64, 64)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[20:40, 20:40] = True
    segmenter = VideoSegmenter(
        tiny_model(),
        ["vis", "vps", "vos"],
        classes=class_table("synthetic"),
        references=[Reference(i, 1000 * (i - 1), mask=mask) for i in range(1, 6)],
        settings=InferenceConfig(clip_length=20, overlap=5),
    )
    resident = {}
    for t, frame in enumerate(synthetic_frames(0, 5000, size), 1):
        segmenter.step([frame.frame])
        if t in (500, 5000):
            gc.collect()
            resident[t] = psutil.Process().memory_info().rss
    assert abs(resident[5000] - resident[500]) < 0.05 * resident[500]
    assert segmenter.finish()["vos"].num_frames == 5000
