"""Every benchmark in files, tiny: perfect predictions, errors that name the culprit, fuzz of the readers."""

import importlib.util
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tarvis.datasets.benchmarks import BENCHMARKS
from tarvis.files import rle
from tarvis.files.pictures import encode_ids
from tarvis.scoring import burst
from tarvis.structures import InputError
from tests.tarvis.fuzz import junk, mutated

HAS_TRACKEVAL = importlib.util.find_spec("trackeval") is not None
H, W = 10, 14
PALETTE = np.arange(768, dtype=np.uint8).reshape(256, 3)


def id_maps(frames, shift=0):
    """Two objects, 1 and 2, that move apart on background 0."""
    maps = np.zeros((frames, H, W), np.uint8)
    for t in range(frames):
        maps[t, 1 + shift : 6 + shift, 1 + t % 4 : 5 + t % 4] = 1
        maps[t, 4 + shift : 9, 8:12] = 2
    return maps


def codes(maps, k):
    return [mask["counts"].decode() for mask in rle.encode(maps == k)]


def write_json(path, tree):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))


def write_rgb(path, rgb):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", np.ascontiguousarray(rgb[..., ::-1]))[1].tobytes())


def panoptic(ids):
    """Picture of ids 10, 11, 12 for labels 0, 1, 2, with a column of void."""
    rgb = np.zeros((H, W, 3), np.uint8)
    rgb[..., 0] = ids + 10
    rgb[:, 0] = 0
    return rgb


def segments(ids, *, has_area):
    """Background is stuff of class 0, objects are things of class 1."""
    inside = np.where(np.arange(W) == 0, 255, ids)
    found = []
    for k in range(3):
        area = int((inside == k).sum())
        found.append(
            {"id": k + 10, "category_id": int(k > 0), "iscrowd": 0} | ({"area": area} if has_area else {})
        )
    return found


CLASSES = [{"id": 0, "name": "ground", "isthing": 0}, {"id": 1, "name": "car", "isthing": 1}]


def make_youtube_vis(root, frames=3):
    maps = id_maps(frames)
    annotations, results = [], []
    for video in (1, 2):
        for k in (1, 2):
            masks = [{"size": [H, W], "counts": code} for code in codes(maps, k)]
            track = {"video_id": video, "category_id": k, "segmentations": masks}
            areas = [int((frame == k).sum()) for frame in maps]
            occlusion = ["no_occlusion", None, "severe_occlusion"]
            extra = {"id": 2 * video + k, "iscrowd": 0, "areas": areas, "occlusion": occlusion}
            annotations.append(track | extra)
            results.append(track | {"score": 0.5})
    videos = [
        {"id": v, "height": H, "width": W, "file_names": [f"{v}/{t}.jpg" for t in range(frames)]}
        for v in (1, 2)
    ]
    categories = [{"id": k, "name": str(k)} for k in (1, 2, 3)]
    write_json(root / "results.json", results)
    write_json(root / "truth.json", {"videos": videos, "categories": categories, "annotations": annotations})
    return root / "results.json", root / "truth.json"


def make_cityscapes_vps(root):
    images, annotations, predictions = [], [], []
    for k, ids in enumerate(id_maps(6)):
        name = f"0001_{k}_synth"
        images.append({"id": name, "file_name": f"{name}_newImg8bit.png"})
        annotations.append({"image_id": name, "segments_info": segments(ids, has_area=True)})
        predictions.append({"segments_info": segments(ids, has_area=False)})
        write_rgb(root / f"gt/panoptic_video/{name}_final_mask.png", panoptic(ids))
        write_rgb(root / f"pred/pan_pred/{name}.png", panoptic(ids))
    tree = {"images": images, "annotations": annotations, "categories": CLASSES}
    write_json(root / "gt/panpotic_gt_val_city_vps.json", tree)
    write_json(root / "pred/pred.json", {"annotations": predictions})
    return root / "pred", root / "gt"


def make_vipseg(root):
    videos, annotations, predictions = [], [], []
    for video in ("a", "b"):
        names = [f"{t}.png" for t in range(8)]
        videos.append({"video_id": video, "images": [{"id": name[0], "file_name": name} for name in names]})
        true, predicted = [], []
        for name, ids in zip(names, id_maps(8), strict=True):
            true.append({"file_name": name, "segments_info": segments(ids, has_area=True)})
            predicted.append({"segments_info": segments(ids, has_area=False)})
            write_rgb(root / f"gt/panomasksRGB/{video}/{name}", panoptic(ids))
            write_rgb(root / f"pred/pan_pred/{video}/{name}", panoptic(ids))
        annotations.append({"video_id": video, "annotations": true})
        predictions.append({"video_id": video, "annotations": predicted})
    tree = {"videos": videos, "annotations": annotations, "categories": CLASSES}
    write_json(root / "gt/panoptic_gt_VIPSeg_val.json", tree)
    write_json(root / "pred/pred.json", {"annotations": predictions})
    return root / "pred", root / "gt"


def make_kitti_step(root):
    for t, ids in enumerate(id_maps(3)):
        rgb = np.stack([np.where(ids > 0, 13, 2), np.zeros_like(ids), ids], axis=-1).astype(np.uint8)
        for side in ("gt", "pred"):
            write_rgb(root / f"{side}/0002/{t:06d}.png", rgb)
    return root / "pred", root / "gt"


def make_davis(root):
    for t, ids in enumerate(id_maps(4)):
        for folder in ("results", "davis/Annotations/480p"):
            path = root / folder / "dog" / f"{t:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_ids(ids, PALETTE))
    names = root / "davis/ImageSets/2017/val.txt"
    names.parent.mkdir(parents=True)
    names.write_text("dog\n")
    return root / "results", root / "davis"


def make_burst(root):
    sequences = []
    for k in (1, 2):
        maps = id_maps(3)
        tracks = {str(track): codes(maps, track) for track in (1, 2)}
        sequences.append(
            {
                "id": k,
                "dataset": "BDD",
                "seq_name": f"s{k}",
                "height": H,
                "width": W,
                "annotated_image_paths": [f"frame{t}.jpg" for t in range(3)],
                "track_category_ids": {"1": 4, "2": 5},
                "neg_category_ids": [7],
                "not_exhaustive_category_ids": [],
                "segmentations": [
                    {t: {"rle": masks[f], "score": 0.5} for t, masks in tracks.items()} for f in range(3)
                ],
            }
        )
    tree = {"split": "val", "sequences": sequences}
    write_json(root / "results.json", tree)
    write_json(root / "gt/all_classes.json", tree)
    return root / "results.json", root / "gt"


BUILDERS = {
    "youtube_vis_2021": make_youtube_vis,
    "ovis": make_youtube_vis,
    "cityscapes_vps": make_cityscapes_vps,
    "kitti_step": make_kitti_step,
    "vipseg": make_vipseg,
    "davis": make_davis,
    "burst": make_burst,
}
every_benchmark = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.skipif(name == "burst" and not HAS_TRACKEVAL, reason="no trackeval")
        )
        for name in BUILDERS
    ],
)


@dataclass(frozen=True)
class Example:
    """A benchmark on disk, and how to score it."""

    root: Path
    score: Callable[[], dict]

    def edit(self, file, change):
        path = self.root / file
        tree = json.loads(path.read_text())
        change(tree)
        path.write_text(json.dumps(tree))


def make(name, root):
    root.mkdir(parents=True)
    results, truth = BUILDERS[name](root)
    return Example(root, partial(BENCHMARKS[name].evaluate, results, truth, "val"))


@pytest.fixture
def example(tmp_path):
    return lambda name: make(name, tmp_path / name)


@every_benchmark
def test_perfect_predictions_score_best(example, name):
    numbers = example(name).score()
    best = 100 if name in ("cityscapes_vps", "vipseg", "burst") else 1
    assert numbers[BENCHMARKS[name].headline] == pytest.approx(best)
    if name == "vipseg":
        assert numbers["STQ"] == pytest.approx(1)
    if name == "burst":
        assert numbers["AP/common"] == pytest.approx(100)
        assert numbers["HOTA/uncommon"] == pytest.approx(100)


@pytest.mark.skipif(not HAS_TRACKEVAL, reason="no trackeval")
@pytest.mark.parametrize("mode", ["class_guided", "open_world"])
def test_other_modes_of_burst(tmp_path, mode):
    results, truth = make_burst(tmp_path)
    for group in ("common", "uncommon"):
        shutil.copy(truth / "all_classes.json", truth / f"{group}_classes.json")
    numbers = burst.evaluate(results, truth, mode)
    assert numbers["HOTA/all" if mode == "class_guided" else "OWTA/uncommon"] == pytest.approx(100)


def test_areas_that_results_claim_are_not_believed(example):
    ovis = example("ovis")

    pixel = {"size": [H, W], "counts": [0, 1, H * W - 1]}
    wrong = {"video_id": 1, "category_id": 1, "score": 0.9, "segmentations": [pixel] * 3}
    ovis.edit("results.json", lambda results: results.insert(0, wrong))
    honest = ovis.score()
    assert honest["AP_small"] < 1
    ovis.edit("results.json", lambda results: results[0].update(areas=[300**2] * 3))
    assert ovis.score() == honest


def test_swapping_ids_between_frames_lowers_vpq_and_stq(example):
    vipseg = example("vipseg")
    path = vipseg.root / "pred/pan_pred/a/4.png"
    rgb = cv2.imread(str(path))
    swapped = np.arange(256, dtype=np.uint8)
    swapped[[11, 12]] = 12, 11
    rgb[..., 2] = swapped[rgb[..., 2]]
    path.write_bytes(cv2.imencode(".png", rgb)[1].tobytes())
    numbers = vipseg.score()
    assert numbers["1/all/pq"] == pytest.approx(100)
    assert numbers["VPQ/all"] < 99
    assert numbers["STQ"] < 0.99


NOT_JSON = ["", "{", "\xff", "[" * 10**5, '{"annotations": 1' + "0" * 5000 + "}"]
LONG = "1" * 10


def change(path, value):
    """An edit that puts a value at the end of a path of keys; a function makes it of what was there."""

    def edit(tree):
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = value(tree[path[-1]]) if callable(value) else value

    return edit


WRONG = [
    (
        "youtube_vis_2021",
        "results.json",
        [0, "video_id"],
        77,
        r"results.json: \[0\].video_id: video 77 is unknown",
    ),
    ("youtube_vis_2021", "results.json", [1, "category_id"], 9, r"\[1\].category_id: category 9 is unknown"),
    (
        "youtube_vis_2021",
        "results.json",
        [1, "score"],
        float("nan"),
        r"\[1\].score: expected a finite number, got nan",
    ),
    ("youtube_vis_2021", "results.json", [1, "score"], 10**400, "expected a finite number"),
    (
        "youtube_vis_2021",
        "results.json",
        [1, "segmentations"],
        lambda s: s[:2],
        "expected 3 segmentations, one a frame, got 2",
    ),
    ("youtube_vis_2021", "results.json", [1, "segmentations"], None, "expected a list, got None"),
    (
        "youtube_vis_2021",
        "results.json",
        [0, "segmentations", 2, "size"],
        [H, H],
        r"segmentations\[2\].size: expected \[10, 14\]",
    ),
    (
        "youtube_vis_2021",
        "results.json",
        [0, "segmentations", 2, "counts"],
        "0",
        r"segmentations\[2\].counts: expected a run-l",
    ),
    (
        "youtube_vis_2021",
        "results.json",
        [0, "segmentations", 2, "counts"],
        "Xé",
        "expected a run-length code",
    ),
    (
        "youtube_vis_2021",
        "results.json",
        [0, "segmentations", 0, "counts"],
        [1, 2],
        "expected a run-length code",
    ),
    ("youtube_vis_2021", "truth.json", [], {}, "has no 'annotations': the truth of this split is not public"),
    ("youtube_vis_2021", "truth.json", ["annotations", 0, "id"], 4, r"annotations\[1\].id: id 4 comes twice"),
    ("youtube_vis_2021", "truth.json", ["videos", 0, "height"], -5, "height: expected an integer from 1 to"),
    ("ovis", "truth.json", ["annotations", 0, "occlusion", 0], "dark", "expected no_occlusion or"),
    (
        "cityscapes_vps",
        "pred/pred.json",
        ["annotations"],
        lambda a: a[:5],
        "expected 6 annotations, one an image, got 5",
    ),
    (
        "cityscapes_vps",
        "gt/panpotic_gt_val_city_vps.json",
        ["images", 0, "id"],
        "../x",
        "is not a path below its folder",
    ),
    (
        "cityscapes_vps",
        "pred/pred.json",
        ["annotations", 1, "segments_info", 0, "category_id"],
        5,
        "category 5 is unknown",
    ),
    (
        "cityscapes_vps",
        "pred/pred.json",
        ["annotations", 1, "segments_info", 0, "id"],
        99,
        "lacks id 10, which has pixels",
    ),
    (
        "cityscapes_vps",
        "pred/pred.json",
        ["annotations", 1, "segments_info", 1, "id"],
        10,
        "id 10 comes twice",
    ),
    ("vipseg", "pred/pred.json", ["annotations", 0, "video_id"], "b", "video 'b' comes twice"),
    ("vipseg", "pred/pred.json", ["annotations"], lambda a: a[:1], "lacks video 'b'"),
    (
        "vipseg",
        "gt/panoptic_gt_VIPSeg_val.json",
        ["annotations", 0, "annotations", 0, "file_name"],
        "/etc/x",
        "not a path",
    ),
    ("burst", "results.json", ["split"], "test", "expected 'val', the split of the truth, got 'test'"),
    (
        "burst",
        "results.json",
        ["sequences", 0, "segmentations", 1, "1", "rle"],
        LONG,
        r"\[1\].1.rle: expected a run-length",
    ),
    (
        "burst",
        "results.json",
        ["sequences", 0, "segmentations", 1, "1", "score"],
        "high",
        "expected a finite number",
    ),
    ("burst", "results.json", ["sequences", 0, "seq_name"], "s2", "sequence 'BDD/s2' comes twice"),
    (
        "burst",
        "results.json",
        ["sequences", 0, "annotated_image_paths", 0],
        "frame1.jpg",
        "'frame1.jpg' comes twice",
    ),
]


@pytest.mark.parametrize(("name", "file", "path", "value", "message"), WRONG)
def test_wrong_entries_are_named(example, name, file, path, value, message):
    if name == "burst" and not HAS_TRACKEVAL:
        pytest.skip("no trackeval")
    wrong = example(name)
    wrong.edit(file, change(path, value) if path else dict.clear)
    with pytest.raises(InputError, match=message):
        wrong.score()


@pytest.mark.parametrize("content", NOT_JSON)
def test_files_that_are_no_json_are_named(example, content):
    wrong = example("youtube_vis_2021")
    (wrong.root / "results.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"results\.json: "):
        wrong.score()


def indexed():
    return encode_ids(id_maps(1)[0], PALETTE)


def coloured():
    return cv2.imencode(".png", 3 * panoptic(id_maps(1)[0])[..., ::-1])[1].tobytes()


PICTURES = [
    ("davis", "results/dog/00001.png", coloured(), "00001.png: an RGB picture"),
    ("davis", "results/dog/00001.png", indexed()[:60], "00001.png: truncated or damaged"),
    ("davis", "results/dog/00001.png", b"", "00001.png: not a PNG file"),
    ("davis", "results/dog/00001.png", encode_ids(id_maps(1)[0] * 2, PALETTE), "expected ids up to 2, got 4"),
    (
        "davis",
        "results/dog/00001.png",
        encode_ids(id_maps(1)[0][:5], PALETTE),
        r"expected a picture of \(10, 14\)",
    ),
    ("davis", "results/dog/00001.png", None, "00001.png: cannot be read"),
    ("davis", "davis/ImageSets/2017/val.txt", b"../dog", r"val.txt: '../dog' is not a path below its folder"),
    ("davis", "davis/ImageSets/2017/val.txt", b"dog dog", "dog comes twice"),
    ("kitti_step", "pred/0002/000001.png", indexed(), "000001.png: expected an RGB picture of 8 bits"),
    ("kitti_step", "pred/0002/000001.png", coloured(), "expected classes below 19 or 255 in red"),
    ("kitti_step", "pred/0002/000001.png", None, "lacks 000001.png; expected 3 frames, got 2"),
    ("vipseg", "pred/pan_pred/a/3.png", indexed(), "3.png: expected an RGB picture"),
    ("vipseg", "pred/pan_pred/a/3.png", None, "3.png: cannot be read"),
    ("cityscapes_vps", "gt/panoptic_video/0001_2_synth_final_mask.png", b"GIF", "mask.png: not a PNG file"),
]


@pytest.mark.parametrize(("name", "file", "data", "message"), PICTURES)
def test_wrong_pictures_are_named(example, name, file, data, message):
    wrong = example(name)
    path = wrong.root / file
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        wrong.score()


# what fuzz puts in the place of a value
JUNK = junk()


def mutated_bytes(data, rng):
    at = rng.randrange(len(data))
    return rng.choice(
        [
            data[:at],
            data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
            data[:at] + data[at + rng.randrange(1, 9) :],
            indexed(),
            coloured(),
            cv2.imencode(".png", np.zeros((H, W, 4), np.uint8))[1].tobytes(),
            cv2.imencode(".png", np.zeros((H, W, 3), np.uint16))[1].tobytes(),
            cv2.imencode(".png", np.zeros((H, W), np.uint8))[1].tobytes(),
            cv2.imencode(".jpg", np.zeros((H, W, 3), np.uint8))[1].tobytes(),
        ]
    )


def only_our_errors(example):
    message, numbers = "", {}
    try:
        numbers = example.score()
    except InputError as error:
        message = str(error)
    assert numbers or str(example.root) in message
    assert all(isinstance(value, int | float) and np.isfinite(value) for value in numbers.values())


@every_benchmark
def test_readers_only_raise_our_errors(tmp_path_factory, name):
    whole = make(name, tmp_path_factory.mktemp("fuzz") / name)
    files = sorted(path for path in whole.root.rglob("*") if path.suffix in (".json", ".png", ".txt"))
    texts = [path for path in files if path.suffix == ".json"]

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32 - 1), JUNK, st.integers(1, 2))
    def fuzz(seed, junk, times):
        rng = random.Random(seed)
        path = rng.choice(texts) if texts and rng.random() < 0.8 else rng.choice(files)
        data = path.read_bytes()
        try:
            if path.suffix == ".json" and rng.random() < 0.95:
                tree = json.loads(data)
                for _ in range(times):
                    tree = mutated(tree, rng, junk)
                path.write_text(json.dumps(tree))
            else:
                path.write_bytes(mutated_bytes(data, rng))
            only_our_errors(whole)
        finally:
            path.write_bytes(data)

    fuzz()
