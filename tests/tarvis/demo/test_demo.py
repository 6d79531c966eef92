"""The demo from end to end, with the weights that come with the package and with ones that know nothing."""

import json

import pytest

from tarvis.demo.__main__ import REQUIRED, main


def run(out, capsys, *extra):
    code = main(["--out", str(out), *extra])
    printed = capsys.readouterr()
    return code, json.loads(printed.out)["scores"], printed.err


@pytest.mark.slow
def test_the_bundled_network_reaches_its_numbers_on_clips_it_has_not_seen(tmp_path, capsys):
    out = tmp_path / "demo"
    code, scores, err = run(out, capsys)
    assert code == 0, err
    assert scores.keys() == REQUIRED.keys()
    perfect = [float(line.split()[-1]) for line in err.splitlines() if " perfect " in line]
    assert len(perfect) == 7
    assert set(perfect) == {1, 100}
    for task in ("vis", "vps", "vos", "pet"):
        for clip in (0, 1):
            assert (out / f"{task}-{clip}" / "overlay.mp4").stat().st_size > 0
    assert (out / "tasks.png").is_file()


@pytest.mark.slow
def test_a_network_that_knows_nothing_fails(tmp_path, capsys, weights):
    code, scores, err = run(tmp_path / "demo", capsys, "--weights", str(weights))
    assert code == 1
    assert f"error: vos: {scores['vos']:.3f} is below 0.8" in err
