"""Graphs for OpenVINO give what the network gives, and are refused where they are not the network's."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("openvino")

from export import to_openvino
from export.runner import open_runner
from tarvis.structures import InputError
from tests.export.support import edit_manifest


@pytest.fixture(scope="module")
def folders(weights, made_once, traced):
    """Makes graphs by the command line, for 2 frames of 60 x 100 unless `options` say otherwise."""

    def make(task, *options):
        def run(folder):
            argv = ["--weights", weights, "--task", task, "--size", "60x100", "--frames", "2", *options]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(to_openvino.openvino.onnx, "write_graph", traced)
                assert to_openvino.main([*map(str, argv), "--out", str(folder / "graphs")]) == 0

        return made_once(("openvino", task, *options), run) / "graphs"

    return make


@pytest.mark.parametrize(
    "task", ["vis", *(pytest.param(t, marks=pytest.mark.slow) for t in ("vps", "vos", "pet"))]
)
@pytest.mark.parametrize("dynamic", [(), pytest.param(("--dynamic", "frames,size"), marks=pytest.mark.slow)])
def test_graphs_give_the_features_answers_and_masks_of_the_network(folders, compared, task, dynamic):
    status, found = compared(folders(task, *dynamic))
    assert status == 0
    rows = {name: row["largest"] for name, row in found.items()}
    assert rows.pop("masks, 1 - IoU") <= 1e-3
    assert rows.pop("stuff, pixels", 0) <= 1e-3
    assert rows.keys() >= {"memory_32", "memory_16", "memory_8", "mask_features", "tensors (encoder)"}
    assert max(rows.values()) <= 1e-4


def test_a_number_that_is_not_the_weights_is_found(folders, compared, tmp_path):
    folder = shutil.copytree(folders("vis"), tmp_path / "graphs")
    path = folder / "decoder.bin"
    numbers = np.fromfile(path, np.float32)
    at = np.flatnonzero(np.isfinite(numbers) & (np.abs(numbers) > 1e-3) & (np.abs(numbers) < 10))[100]
    numbers[at] += 1e-2
    numbers.tofile(path)
    edit_manifest(folder)
    status, rows = compared(folder)
    assert status == 1
    assert rows["tensors (decoder)"]["largest"] == pytest.approx(1e-2, rel=0.1)


def test_what_openvino_does_not_do_is_refused(asked, folders, capsys):
    assert to_openvino.main(asked(precision="fp16")) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1] == "error: --precision fp16: graphs for OpenVINO hold fp32"
    )
    with pytest.raises(InputError, match="on a CPU, not on meta"):
        to_openvino.openvino.open(
            folders("vis"), open_runner(folders("vis"), device="cpu").manifest, torch.device("meta")
        )


def test_a_damaged_graph_is_an_error_in_one_line(folders, tmp_path):
    folder = shutil.copytree(folders("vis"), tmp_path / "graphs")
    path = folder / "encoder.xml"
    path.write_bytes(path.read_bytes()[:2000])
    edit_manifest(folder)
    with pytest.raises(InputError, match=r"encoder\.xml: OpenVINO cannot run it") as refused:
        open_runner(folder, device="cpu")
    assert "\n" not in str(refused.value)


def test_signals_are_handled_after_graphs_are_closed(folders):
    code = f"""if True:
        import gc, signal
        from export.runner import open_runner

        first, second = (open_runner({str(folders("vis"))!r}, device="cpu") for _ in range(2))
        del first
        gc.collect()
        del second
        gc.collect()
        signal.signal(signal.SIGTERM, lambda *_: print("handled"))
        signal.raise_signal(signal.SIGTERM)
    """
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
