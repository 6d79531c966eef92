"""The network on a GPU gives what it gives on a CPU."""

import numpy as np
import pytest
import torch

from tarvis.config import InferenceConfig
from tarvis.data.synthetic import synthetic_clip
from tarvis.datasets.classes import class_table
from tarvis.structures import Reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]
SIZE = (64, 96)


@pytest.fixture
def exact():
    """Full float32: TensorFloat-32 keeps ten bits of the factors."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("backbone", ["convnext_zepto", "resnet50", "swin_tiny"])
def test_features_are_those_of_the_cpu(tiny_model, backbone):
    model = tiny_model(backbone=backbone)
    frames = torch.randint(0, 256, (1, 3, 3, 100, 150), dtype=torch.uint8)
    expected = model.encode(frames)
    got = model.cuda().encode(frames.cuda())
    for a, b in zip(
        (*got.memory, got.mask_features), (*expected.memory, expected.mask_features), strict=True
    ):
        torch.testing.assert_close(a.cpu(), b, atol=2e-3, rtol=2e-3)


def stream(model, task, amp=None):
    pytest.importorskip("pycocotools")  # machines with a GPU and little else run the rest of this file
    from tarvis.video.segmenter import VideoSegmenter

    clip = synthetic_clip(0, num_frames=9, size=SIZE, come_and_go=False)
    mask = torch.from_numpy(clip.instance[0] == 1)
    segmenter = VideoSegmenter(
        model,
        [task],
        classes=class_table("synthetic"),
        references=[Reference(1, 0, mask=mask), Reference(2, 0, point=(20.0, 30.0))],
        # room for every query, so that rounding cannot change which of them are kept
        settings=InferenceConfig(clip_length=4, overlap=2, max_tracks_per_clip=20),
        amp=amp,
    )
    return segmenter.step(clip.frames) + segmenter.flush()


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("task", ["vis", "vps", "vos", "pet"])
def test_every_task_finds_in_half_precision_what_it_finds_in_single(tiny_model, task, amp):
    model = tiny_model().cuda()
    single, half = stream(model, task), stream(model, task, amp)
    from tarvis.files import rle
    from tarvis.stitch.panoptic import decode_labels

    assert [result.frame for result in single] == [result.frame for result in half] == list(range(9))
    empty = rle.empty(SIZE)
    both, either = 0, 0
    for a, b in zip(single, half, strict=True):
        for track in a.masks.keys() | b.masks.keys():
            mask_a, mask_b = (rle.decode(result.masks.get(track, empty)) for result in (a, b))
            both += (mask_a & mask_b).sum()
            either += (mask_a | mask_b).sum()
        if task == "vps":
            assert np.mean(decode_labels(a.stuff) == decode_labels(b.stuff)) > 0.9
    # masks of NaN are empty: few pixels would differ where masks are small, but none would be in both
    assert both > 0.8 * either > 0


@pytest.mark.parametrize("task", ["vis", "vos"])
def test_nothing_synchronises_with_the_device_in_encode_and_decode(tiny_model, task):
    model = tiny_model().cuda()
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
