"""Synthetic benchmarks in their own layouts, as their readers and training read them."""

import dataclasses
import json

import cv2
import numpy as np
import pytest

from tarvis.data.sets import open_sets
from tarvis.data.settings import DataSettings
from tarvis.datasets.classes import class_table
from tarvis.datasets.classmap import ClassMap
from tarvis.datasets.image_sets import IMAGE_SETS
from tarvis.datasets.registry import BENCHMARKS
from tarvis.demo.synthetic_benchmarks import LAYOUTS, class_map, make_benchmark, perfect_result
from tarvis.files import rle
from tarvis.stitch.panoptic import decode_labels
from tarvis.structures import InputError


def read(name, root):
    """What the benchmark finds in synthetic data: its files, and its videos."""
    roots = BENCHMARKS[name].find(root, "val")
    return roots, BENCHMARKS[name].read(roots, "val")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_images_are_what_results_are_of(name, tmp_path):
    make_benchmark(name, tmp_path, num_videos=1, size=(48, 80), num_objects=2)
    (video,) = read(name, tmp_path)[1]
    result = perfect_result(name, tmp_path, video)
    assert result.num_frames == len(video.images)
    assert {cv2.imread(str(path)).shape for path in video.images} == {(48, 80, 3)}
    if class_map(name):
        table = class_table(name)
        assert all(track.label in table.things for track in result.tracks)
        for png in result.stuff.values():
            assert set(np.unique(decode_labels(png)).tolist()) <= set(table.stuff)
        if video.truth:
            labels = sorted(track.label for track in result.tracks)
            assert sorted(video.truth.labels.values()) == labels


@pytest.mark.parametrize("name", sorted(BENCHMARKS.keys() & LAYOUTS.keys()))
def test_clips_are_made_of_the_training_split(name, tmp_path):
    make_benchmark(name, tmp_path / name, split="train", size=(64, 96), num_objects=2)  # among others
    assert not list(tmp_path.rglob("*val*"))
    (opened,) = open_sets(DataSettings(train=(name,), root=str(tmp_path), clip_length=2))
    for kind, items in opened.clips.kinds().items():
        draws = (opened.clips.draw(kind, items - 1, np.random.default_rng(k)) for k in range(9))
        sample = next(filter(None, draws))
        assert sample.layers.shape[1:] == (2, *sample.size) == sample.frames.shape[:3]
        for number, label in enumerate(sample.labels, 1):
            assert (sample.layers == number).any()
            assert label in (opened.classes.things if opened.classes else {-1})
        if kind.task == "vps":
            names = {opened.classes.names[k] for k in np.unique(sample.semantic) if k != 255}
            assert names <= set(class_map(name).values())


@pytest.mark.parametrize("split", [None, "val"])
@pytest.mark.parametrize("name", IMAGE_SETS)
def test_image_sets_are_read(name, split, tmp_path):
    make_benchmark(name, tmp_path, num_videos=3, split=split)
    samples = IMAGE_SETS[name].read(IMAGE_SETS[name].find(tmp_path, split or "train"))
    table = class_table(name)
    assert len(samples) == 3
    for sample in samples:
        truth = sample.read_map()
        assert cv2.imread(str(sample.image)).shape[:2] == sample.size == truth.ids.shape
        assert sample.labels.keys() == set(np.unique(truth.ids).tolist()) - {0}
        names = {table.names[k] for k in np.unique(truth.semantic).tolist()}
        assert names <= set(class_map(name).values())


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_seed_gives_the_same_bytes_and_others_differ(name, tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_benchmark(name, tmp_path / folder, seed=seed, num_frames=3)
    files = {
        folder: {
            path.relative_to(tmp_path / folder): path.read_bytes()
            for path in sorted((tmp_path / folder).rglob("*.*"))
            if path.is_file()
        }
        for folder in "abc"
    }
    assert files["a"] == files["b"]
    assert files["a"].keys() == files["c"].keys()
    assert files["a"] != files["c"]


@pytest.mark.parametrize("name", [name for name in LAYOUTS if class_map(name)])
def test_class_maps_name_classes_of_the_benchmark(name, tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"class_set": "synthetic", "names": class_map(name)}))
    labels = ClassMap.read(path, class_table(name), {}).labels
    assert [k for k, label in enumerate(labels) if label is None] == (
        [] if class_table(name).stuff else list(class_table("synthetic").stuff)
    )


def test_davis_shows_every_object_at_the_first_frame(tmp_path):
    make_benchmark("davis", tmp_path, num_videos=4, num_frames=3)
    for video in read("davis", tmp_path)[1]:
        assert sorted(reference.id for reference in video.references()) == [1, 2, 3]


def test_objects_of_burst_may_come_late_and_are_given_by_mask_and_point(tmp_path):
    make_benchmark("burst", tmp_path, num_videos=8, num_objects=4)
    references = [each for video in read("burst", tmp_path)[1] for each in video.references()]
    assert {reference.frame for reference in references} > {0}
    for by_mask, by_point in zip(references[::2], references[1::2], strict=True):
        assert (by_mask.id, by_mask.frame) == (by_point.id, by_point.frame)
        x, y = (int(side) for side in by_point.point)
        assert by_mask.mask[y, x]


def test_levels_of_occlusion_follow_what_is_seen(tmp_path):
    make_benchmark("ovis", tmp_path, num_videos=4, num_objects=4, num_frames=12)
    annotations = json.loads((tmp_path / "annotations_valid.json").read_text())["annotations"]
    levels = set()
    for annotation in annotations:
        hidden = [mask is None for mask in annotation["segmentations"]]
        assert [level is None for level in annotation["occlusion"]] == hidden
        levels |= set(annotation["occlusion"])
    assert levels - {None} == {"no_occlusion", "slight_occlusion", "severe_occlusion"}


def test_a_result_is_of_the_frames_that_were_read(tmp_path):
    make_benchmark("davis", tmp_path, num_videos=1, num_frames=6)
    (video,) = read("davis", tmp_path)[1]
    whole = perfect_result("davis", tmp_path, video)
    part = dataclasses.replace(
        video, images=video.images[1::2], frame_names=video.frame_names[1::2], scored=()
    )
    for track, of_part in zip(whole.tracks, perfect_result("davis", tmp_path, part).tracks, strict=True):
        assert of_part.masks == {(t - 1) // 2: mask for t, mask in track.masks.items() if t % 2}
        assert all(rle.area(mask) for mask in of_part.masks.values())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("imagenet", {}, "no synthetic 'imagenet'; known: youtube_vis_2019"),
        ("kitti_step", {"num_videos": 10}, "kitti_step: expected 1 to 9 videos of at least 1 frames"),
        ("davis", {"num_frames": 2}, "davis: expected 1 to 999 videos of at least 3 frames"),
        ("davis", {"num_objects": 0}, "and an object"),
        ("davis", {"split": "test"}, "no synthetic split 'test' of davis; known: train, val"),
        ("davis", {"size": (4, 4), "num_frames": 3}, "no scene shows 3 objects at once"),
    ],
)
def test_what_cannot_be_made_is_said(name, arguments, message, tmp_path):
    with pytest.raises(InputError, match=message):
        make_benchmark(name, tmp_path, **arguments)


def test_results_of_other_data_are_refused(tmp_path):
    make_benchmark("davis", tmp_path / "davis", num_frames=3)
    video = read("davis", tmp_path / "davis")[1][0]
    make_benchmark("kitti_step", tmp_path / "kitti", num_frames=3)
    with pytest.raises(InputError, match=r"synthetic\.json: name: expected 'davis', got 'kitti_step'"):
        perfect_result("davis", tmp_path / "kitti", video)
    with pytest.raises(InputError, match="shapes-0: is no video of synthetic kitti_step"):
        perfect_result("kitti_step", tmp_path / "kitti", video)
    with pytest.raises(InputError, match=r"synthetic\.json: cannot be read"):
        perfect_result("davis", tmp_path, video)
