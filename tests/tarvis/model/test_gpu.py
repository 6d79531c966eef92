"""The network on a GPU gives what it gives on a CPU."""

import dataclasses
from pathlib import Path

import pytest
import torch

from tarvis.config import InferenceConfig, load_config
from tarvis.data.synthetic import synthetic_clip
from tarvis.datasets.classes import class_table
from tarvis.model import build_model
from tarvis.segmenter import VideoSegmenter
from tarvis.structures import Reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]
TINY = Path(__file__).parents[3] / "configs" / "tiny.yaml"


def tiny(backbone="convnext_atto"):
    torch.manual_seed(0)
    config = dataclasses.replace(load_config(TINY).model, backbone=backbone)
    return build_model(config).eval().requires_grad_(False)


@pytest.fixture
def exact():
    """Full float32: TensorFloat-32 keeps ten bits of the factors."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("backbone", ["convnext_atto", "resnet50", "swin_tiny"])
def test_features_are_those_of_the_cpu(backbone):
    model = tiny(backbone)
    frames = torch.randint(0, 256, (1, 3, 3, 100, 150), dtype=torch.uint8)
    expected = model.encode(frames)
    got = model.cuda().encode(frames.cuda())
    for a, b in zip(
        (*got.memory, got.mask_features), (*expected.memory, expected.mask_features), strict=True
    ):
        torch.testing.assert_close(a.cpu(), b, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("task", ["vis", "vps", "vos", "pet"])
def test_every_task_runs_on_the_gpu(task, amp):
    clip = synthetic_clip(0, num_frames=9, size=(64, 96), come_and_go=False)
    mask = torch.from_numpy(clip.instance[0] == 1)
    segmenter = VideoSegmenter(
        tiny().cuda(),
        [task],
        classes=class_table("synthetic"),
        references=[Reference(1, 0, mask=mask), Reference(2, 0, point=(20.0, 30.0))],
        settings=InferenceConfig(clip_length=4, overlap=2),
        amp=amp,
    )
    streamed = segmenter.step(clip.frames) + segmenter.flush()
    assert [result.frame for result in streamed] == list(range(9))


@pytest.mark.parametrize("task", ["vis", "vos"])
def test_nothing_synchronises_with_the_device_in_encode_and_decode(task):
    model = tiny().cuda()
    frames = torch.randint(0, 256, (1, 3, 3, 64, 128), dtype=torch.uint8, device="cuda")
    masks = torch.zeros(2, 1, 64, 128, dtype=torch.bool, device="cuda")
    masks[:, :, 10:30, 20:60] = True

    def run():
        features = model.encode(frames)
        queries = model.queries.classes("synthetic")
        if task == "vos":
            background, objects = model.object_encoder(features.mask_features[0, :1], masks)
            queries = model.queries.objects(background[None], objects[None])
        return model.decode(features, queries)

    run()  # libraries initialise themselves, which may synchronise
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
