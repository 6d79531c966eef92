"""With trained weights the masks of a generated clip are the same in ONNX Runtime."""

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from tarvis.model.weights import BUNDLED


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vis", "vps", "vos", "pet"])
def test_the_bundled_weights_give_the_masks_of_the_network(graphs, task, compared):
    folder = graphs(task, size="96x160", frames=3, weights=BUNDLED)
    status, rows = compared(folder, BUNDLED)
    masks = rows["masks, 1 - IoU"]
    assert status == 0
    assert masks["largest"] <= 1e-3
    num_tracks, _, _, num_pixels = masks["note"].split()[:4]
    assert int(num_tracks) > 0
    assert int(num_pixels) > 1000
