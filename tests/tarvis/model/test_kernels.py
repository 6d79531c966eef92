"""The network with Triton's kernels in the place of plain PyTorch: the same clip, the same answer.

On a machine without a GPU the kernels are interpreted.
"""

import numpy as np
import pytest
import torch

from kernels import dispatch
from tarvis.config import InferenceConfig
from tarvis.data.synthetic import synthetic_clip
from tarvis.datasets.classes import class_table
from tarvis.structures import Reference

pytestmark = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = (64, 64)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(num_instance_queries=6).to(DEVICE)


@pytest.fixture(autouse=True)
def exact():
    """Full float32: TensorFloat-32 keeps ten bits of the factors."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


def with_each(run):
    """What `run` gives with plain PyTorch and with Triton."""
    results = []
    for impl in ("reference", "triton"):
        with dispatch.using(impl):
            results.append(run())
    return results


def test_features_and_predictions_are_those_of_plain_pytorch(model):
    frames = torch.randint(0, 256, (1, 2, 3, *SIZE), dtype=torch.uint8, device=DEVICE)
    features, ours = with_each(lambda: model.encode(frames))
    for a, b in zip(
        (*ours.memory, ours.mask_features), (*features.memory, features.mask_features), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    queries = model.queries.classes("synthetic")
    plain, got = with_each(lambda: model.decode(features, queries))
    torch.testing.assert_close(got.class_logits, plain.class_logits, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(
        got.mask_logits("instance"), plain.mask_logits("instance"), atol=5e-4, rtol=5e-4
    )


@pytest.mark.parametrize(
    "task", ["vos", *(pytest.param(task, marks=pytest.mark.slow) for task in ("vis", "vps", "pet"))]
)
def test_every_task_gives_the_same_masks(model, task):
    pytest.importorskip("pycocotools")  # machines with a GPU and little else run the rest of this file
    from tarvis.files import rle
    from tarvis.video.segmenter import VideoSegmenter

    clip = synthetic_clip(0, num_frames=2, size=SIZE, come_and_go=False)
    mask = torch.from_numpy(clip.instance[0] == 1)

    def run():
        segmenter = VideoSegmenter(
            model,
            [task],
            classes=class_table("synthetic"),
            references=[Reference(1, 0, mask=mask), Reference(2, 0, point=(20.0, 30.0))],
            settings=InferenceConfig(clip_length=2, overlap=1, max_tracks_per_clip=20),
        )
        return segmenter.step(clip.frames) + segmenter.flush()

    plain, ours = with_each(run)
    for a, b in zip(plain, ours, strict=True):
        assert a.masks.keys() == b.masks.keys()
        for track in a.masks:
            same = rle.decode(a.masks[track]) == rle.decode(b.masks[track])
            assert np.mean(same) > 0.999


@pytest.mark.slow
def test_it_compiles_without_graph_breaks(model):
    frames = torch.randint(0, 256, (1, 2, 3, *SIZE), dtype=torch.uint8, device=DEVICE)
    queries = model.queries.classes("synthetic")

    def run(frames):
        return model.decode(model.encode(frames), queries).class_logits

    with dispatch.using("triton"), torch.no_grad():
        expected = run(frames)
        torch._dynamo.reset()
        got = torch.compile(run, fullgraph=True, backend="aot_eager")(frames)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)


def test_an_exported_program_holds_the_operators_themselves(model):
    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, frames):
            return self.model.decode(self.model.encode(frames), self.model.queries.classes("synthetic"))

    frames = torch.randint(0, 256, (1, 2, 3, *SIZE), dtype=torch.uint8, device=DEVICE)
    program = torch.export.export(Whole(), (frames,))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    layers = len(model.neck.spatial), len(model.decoder.layers)
    assert names.count("tarvis.ms_deform_attn.default") == layers[0]
    assert names.count("tarvis.mask_bits.default") == layers[1]
    assert names.count("tarvis.masked_attention.default") == layers[1]
    assert not [name for name in names if "embedding_bag" in name or "grid_sample" in name]
    expected = Whole()(frames)
    torch.testing.assert_close(
        program.module()(frames).class_logits, expected.class_logits, atol=1e-4, rtol=1e-4
    )
