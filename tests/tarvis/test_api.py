"""The Python interface: five lines from a video to masks, and what it refuses."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tarvis
from tarvis.files import rle
from tarvis.files.pictures import encode_ids, voc_palette
from tarvis.model.weights import WeightsError, save_weights
from tarvis.structures import Reference
from tarvis.video.frames import InputError, open_frames
from tarvis.video.segmenter import VideoSegmenter

ROOT = Path(__file__).parents[2]
SIZE = (64, 96)
FRAMES = 6
SHORT = {"clip_length": 4, "overlap": 2}


@pytest.fixture(scope="module")
def model(weights):
    return tarvis.load(weights, device="cpu")


@pytest.fixture(scope="session")
def references(clip):
    masks = [Reference(i, 0, mask=torch.from_numpy(clip.instance[0] == i)) for i in (1, 2)]
    return [*masks, Reference(7, 0, point=(40.0, 30.0))]


def test_loading_and_segmenting_leave_random_numbers_alone(weights, video):
    before = torch.get_rng_state()
    list(tarvis.load(weights, device="cpu").segment(video, "vis", **SHORT))
    assert torch.equal(torch.get_rng_state(), before)


def test_five_lines_lead_from_a_video_to_masks(weights, video):
    model = tarvis.load(str(weights))
    seen = []
    for result in model.segment(str(video), task="vis"):
        seen.append(result.frame)
        for track, mask in result.masks.items():
            assert track > 0
            assert rle.decode(mask).shape == SIZE
    assert seen == list(range(FRAMES))


def test_without_a_path_comes_the_network_of_the_package(folder):
    model = tarvis.load(device="cpu")
    assert model.config.class_sets == {"synthetic": 8}
    running = model.segment(folder, "pet", references=[Reference(1, 0, point=(40.0, 30.0))])
    assert running.settings.min_size == 240
    assert len(list(running)) == FRAMES


def test_settings_that_suit_weights_take_the_place_of_published_ones(model, folder, references):
    own = {"clip_length": 3, "overlap": 1, "min_size": 64}
    suited = tarvis.Model(model.network, dataclasses.replace(model.config, inference=own), device="cpu")
    running = suited.segment(folder, "vos", references=references[:1])
    assert {name: getattr(running.settings, name) for name in own} == own
    running = suited.segment(folder, "vos", references=references[:1], clip_length=5)
    assert (running.settings.clip_length, running.settings.overlap) == (5, 1)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"clips": 3}, "unknown key model.inference.clips; known: clip_length"),
        ({"min_size": -1}, "model.inference: expected a number from 0"),
        ({"overlap": 12}, "overlap must be 0 .. clip length - 1 = 11"),
    ],
)
def test_settings_that_weights_cannot_have_are_named(model, own, message):
    with pytest.raises(InputError, match=re.escape(message)):
        dataclasses.replace(model.config, inference=own)


def test_frames_come_while_the_video_is_still_read(model, folder):
    running = model.segment(folder, "vis", **SHORT)
    next(iter(running))
    assert running.num_read == 6  # the second clip decides on the first frames
    running = model.segment(folder, "vis", clip_length=2, overlap=1)
    next(iter(running))
    assert running.num_read == 3


def test_results_hold_whole_tracks_with_class_and_score(model, folder):
    running = model.segment(folder, "vis", **SHORT)
    for _ in running:
        pass
    assert list(running.results) == ["vis"]
    found = running.results["vis"]
    assert (found.num_frames, found.size) == (FRAMES, SIZE)
    assert found.tracks
    for track in found.tracks:
        assert running.classes.names[track.label]
        assert 0 <= track.score <= 1


def test_objects_are_given_as_files_or_as_values(model, folder, references, clip, tmp_path):
    ids = np.where(clip.instance[0] <= 2, clip.instance[0], 0).astype(np.uint8)
    mask, points = tmp_path / "mask.png", tmp_path / "points.json"
    mask.write_bytes(encode_ids(ids, voc_palette()))
    points.write_text(json.dumps([{"id": 7, "frame": 0, "x": 40, "y": 30}]))
    tasks = ("vos", "pet")
    as_files = model.segment(folder, tasks, masks=mask, points=points, **SHORT)
    as_text = model.segment(str(folder), tasks, masks=[str(mask)], points=str(points), **SHORT)
    as_values = model.segment(open_frames(folder), tasks, references=references, **SHORT)
    assert list(as_files) == list(as_text) == list(as_values)
    assert list(as_values.results) == ["vos", "pet"]
    assert [track.id for track in as_values.results["vos"].tracks] == [1, 2]
    assert [track.id for track in as_values.results["pet"].tracks] == [7]


def test_settings_are_those_of_the_classes_unless_changed(model, folder, references):
    assert model.segment(folder, "vis").settings.clip_length == 6  # of "synthetic", the only set there is
    assert model.segment(folder, "vos", references=references).settings.clip_length == 12  # of "davis"
    named = model.segment(folder, "vos", references=references, dataset="burst", overlap=1).settings
    assert (named.clip_length, named.overlap, named.min_size) == (8, 1, 512)


def test_classes_of_images_that_have_no_published_settings_can_be_used(folder, state, config, tmp_path):
    rows = torch.randn(1 + 133, config.hidden_dim, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "image_model.safetensors"
    save_weights(
        path, state | {"queries.semantic": rows}, dataclasses.replace(config, class_sets={"coco": 133})
    )
    model = tarvis.load(path)
    for dataset in (None, "coco"):
        running = model.segment(folder, "vps", dataset=dataset, min_size=None, **SHORT)
        assert len(list(running)) == FRAMES
        assert running.classes.name == "coco"
        assert running.settings.score_threshold == 0.5  # as for any panoptic set


def test_what_cannot_be_segmented_is_refused(model, folder, tmp_path):
    with pytest.raises(InputError, match="unknown task sam; known: vis, vps, vos, pet"):
        model.segment(folder, "sam")
    with pytest.raises(InputError, match=r"unknown task \(none\)"):
        model.segment(folder, [])
    with pytest.raises(InputError, match="unknown setting clip_size; known: clip_length, "):
        model.segment(folder, "vis", clip_size=3)
    with pytest.raises(InputError, match="no classes of 'ovis'; they have: synthetic"):
        model.segment(folder, "vis", dataset="ovis")
    with pytest.raises(InputError, match="no such file or folder"):
        model.segment("absent.mp4")
    with pytest.raises(ValueError, match="overlap must be 0"):
        model.segment(folder, "vis", clip_length=3, overlap=3)
    points = tmp_path / "points.json"
    points.write_text(json.dumps([{"id": 7, "frame": 0, "x": 40, "y": 30}]))
    with pytest.raises(InputError, match="points were given, but vis does not follow any"):
        model.segment(folder, "vis", points=points)
    outside = Reference(1, 0, point=(96.0, 3.0))
    with pytest.raises(ValueError, match=r"object 1, frame 0: point \(96.0, 3.0\) is outside the frame"):
        list(model.segment(folder, "pet", references=[outside]))


def test_weights_with_classes_that_no_table_names_are_refused(folder, state, config, tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, state, dataclasses.replace(config, class_sets={"my_classes": 8}))
    with pytest.raises(InputError, match="the class set 'my_classes' of these weights has no matching table"):
        tarvis.load(path).segment(folder, "vis")


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor, lambda values: np.asarray(values).tolist()])
def test_masks_points_and_frames_are_arrays_of_any_kind(model, folder, clip, make, references):
    masks = [Reference(i, 0, mask=make((clip.instance[0] == i).astype(np.uint8))) for i in (1, 2)]
    given = [*masks, Reference(7, 0, point=make(np.array([40.0, 30.0])))]
    for one, other in zip(given, references, strict=True):
        assert one.point == other.point
        assert one.mask is None or torch.equal(one.mask, other.mask)
    expected = list(model.segment(folder, ("vos", "pet"), references=references, **SHORT))
    frames = make(clip.frames)
    assert list(model.segment(frames, ("vos", "pet"), references=given, **SHORT)) == expected
    segmenter = VideoSegmenter(model.network, ["vis"], classes=model.classes("vis"))
    assert segmenter.step(make(clip.frames[:2])) == segmenter.step([make(clip.frames[2])]) == []


def test_points_and_ids_are_taken_as_values(model, folder, clip, references):
    points = [{"id": np.int64(7), "frame": 0, "x": 40, "y": np.float32(30)}]
    expected = list(model.segment(folder, "pet", references=references[2:], **SHORT))
    assert list(model.segment(folder, "pet", points=points, **SHORT)) == expected
    expected = list(model.segment(folder, "vos", references=references[:2], **SHORT))
    ids = np.where(clip.instance[0] <= 2, clip.instance[0], 0)
    assert list(model.segment(folder, "vos", masks=ids, **SHORT)) == expected
    assert (
        list(model.segment(folder, "vos", masks=torch.from_numpy(ids.astype(np.int64)), **SHORT)) == expected
    )


def test_values_that_are_no_masks_points_or_frames_are_named(model, folder):
    for value, message in (([1, 2], r"expected a mask \[H, W\], got \[2\]"), ([[1], [1, 2]], "mask")):
        with pytest.raises(InputError, match=f"object 1, frame 0: .*{message}"):
            Reference(1, 0, mask=value)
    for point in ([1.0], "ab", [[1, 2]], [1, None], 3):
        with pytest.raises(InputError, match=r"object 1, frame 0: expected a point \(x, y\)"):
            Reference(1, 0, point=point)
    with pytest.raises(InputError, match="object one, frame 0: expected integers"):
        Reference("one", 0, point=(1, 2))
    for frames in ([], [3], np.zeros((2, 8, 8), np.uint8), [[["x"]]], iter([])):
        with pytest.raises(InputError, match=r"expected (RGB|a path|at least one)"):
            model.segment(frames, "vis")
    with pytest.raises(InputError, match=r"points: \[0\]: expected an object, got \(40, 30\)"):
        model.segment(folder, "pet", points=[(40, 30)])
    with pytest.raises(InputError, match=r"masks: expected integer ids \[64, 96\], got float64 \[64, 9\]"):
        model.segment(folder, "vos", masks=np.zeros((64, 9)))


def test_classes_are_those_of_tasks(model):
    assert model.classes("vis").name == model.classes(["vis"], "synthetic").name == "synthetic"
    with pytest.raises(InputError, match="unknown task synthetic; known: vis, vps, vos, pet"):
        model.classes("synthetic")


def test_classes_that_nobody_named_are_not_asked_for(state, config, tmp_path):
    path = tmp_path / "two.safetensors"
    rows = torch.randn(1 + 8 + 25, config.hidden_dim, generator=torch.Generator().manual_seed(0))
    sets = dataclasses.replace(config, class_sets={"synthetic": 8, "ovis": 25})
    save_weights(path, state | {"queries.semantic": rows}, sets)
    with pytest.raises(
        InputError, match="vis: name the class set of these weights, which have: synthetic, ovis"
    ):
        tarvis.load(path).classes("vis")


@pytest.mark.parametrize(
    "snippet", re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
)
def test_the_snippets_of_the_readme_run_as_they_are(snippet, weights, video, clip, monkeypatch, capsys):
    load = tarvis.load
    monkeypatch.setattr(tarvis, "load", lambda *_: load(weights), raising=False)
    monkeypatch.chdir(video.parent)
    Path("points.json").write_text(json.dumps([{"id": 1, "frame": 0, "x": 40, "y": 30}]))
    video.rename("video.mp4")
    exec(snippet, found := {"camera": clip.frames, "mask": clip.instance[0] == 1})
    shown = [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert sorted({*shown}) == list(range(FRAMES))
    assert "segmenter" not in found or [track.id for track in found["tracks"]] == [1]


def test_results_are_not_known_before_the_end(model, folder):
    running = model.segment(folder, "vis", **SHORT)
    with pytest.raises(InputError, match="iterate over all frames first"):
        _ = running.results
    frames = iter(running)
    next(frames)
    with pytest.raises(InputError, match="iterate over all frames first"):
        _ = running.results
    assert len(list(frames)) == FRAMES - 1  # asking too early did no harm
    assert running.results["vis"].num_frames == FRAMES


def test_a_video_is_segmented_once(model, folder):
    running = model.segment(folder, "vis", **SHORT)
    for _ in running:
        break
    with pytest.raises(InputError, match="call segment again"):
        list(running)


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "meta", "", "mps", "cuda:x"])
def test_devices_that_are_not_there_are_refused(device, weights):
    with pytest.raises(
        InputError, match=rf"^device '{device}' cannot be used on this machine, which has cpu[\w:, ]*$"
    ):
        tarvis.load(weights, device=device)


def test_weights_that_do_not_fit_are_refused_by_the_name_of_their_file(weights, config, state, tmp_path):
    with pytest.raises(WeightsError, match=r"tiny.safetensors: .*expected"):
        tarvis.load(weights, config=dataclasses.replace(config, decoder_ffn_dim=64))
    bare = tmp_path / "bare.pth"
    torch.save(state, bare)
    with pytest.raises(WeightsError, match=r"bare.pth: no configuration"):
        tarvis.load(bare)
    assert tarvis.load(bare, config=config).config == config


def test_importing_the_package_alone_imports_no_torch_and_no_compiler():
    code = """if True:
        import sys, tarvis
        assert 'torch' not in sys.modules
        assert all(hasattr(tarvis, name) for name in tarvis.__all__)
        assert callable(tarvis.rle.decode) and callable(tarvis.load)
        assert not hasattr(tarvis, 'absent')
        assert 'torch._dynamo' not in sys.modules  # the compiler takes longer than torch itself
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
