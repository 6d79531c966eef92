"""With trained weights the masks of a generated clip are the same in ONNX Runtime."""

import json
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import tarvis
from export import check

BUNDLED = Path(tarvis.__file__).parent / "assets" / "tiny.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vis", "vps", "vos", "pet"])
def test_the_bundled_weights_give_the_masks_of_the_network(graphs, task, capsys):
    folder = graphs(task, size="96x160", frames=3, weights=BUNDLED)
    assert check.main([str(folder), "--weights", str(BUNDLED), "--device", "cpu"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    (masks,) = (row for row in rows if row["output"].startswith("masks"))
    assert masks["largest"] <= 1e-3
    num_tracks, _, _, num_pixels = masks["note"].split()[:4]
    assert int(num_tracks) > 0
    assert int(num_pixels) > 1000
