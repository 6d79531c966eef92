"""The demo from end to end, with too little time to fit anything."""

import json

from tarvis.demo.__main__ import main
from tarvis.demo.benchmarks import SEVEN


def test_the_demo_runs_every_task_and_says_that_a_network_that_has_learned_nothing_is_not_good(
    tmp_path, capsys
):
    out = tmp_path / "demo"
    assert main(["--out", str(out), "--steps", "1"]) == 1
    printed = capsys.readouterr()
    scores = json.loads(printed.out)["scores"]
    assert list(scores) == ["vis", "vps", "vos", "pet"]
    assert "below J = 0.5" in printed.err
    for task in scores:
        for clip in (0, 1):
            assert (out / f"{task}-{clip}" / "overlay.mp4").stat().st_size > 0
    assert (out / "tasks.png").is_file()
    assert list(json.loads(printed.out)["benchmarks"]) == list(SEVEN)
    for line in printed.err.splitlines():
        if " perfect " in line:
            assert float(line.split()[-1]) in (1, 100)
