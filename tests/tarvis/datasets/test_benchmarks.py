"""What holds of every benchmark: from its files to its number and back, and whatever is wrong is named."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest

from tarvis.datasets.benchmark import Benchmark, Roots, VideoSample, find_below
from tarvis.datasets.registry import BENCHMARKS
from tarvis.demo.synthetic_benchmarks import make_benchmark, perfect_result
from tarvis.files import rle
from tarvis.files.pictures import encode_ids, voc_palette
from tarvis.structures import InputError, VideoResult
from tests.tarvis.datasets.support import coded_sequence, write_coded
from tests.tarvis.fuzz import only_our_errors

SIZE = (32, 48)
NUMBERS = {  # each benchmark's, of perfect results
    "youtube_vis_2019": {"AP": 1, "AR_1": 1},
    "youtube_vis_2021": {"AP": 1, "AR_1": 1},
    "ovis": {"AP": 1, "AP_occ_light": 1},
    "cityscapes_vps": {"VPQ/all": 100, "VPQ/thing": 100, "VPQ/stuff": 100},
    "kitti_step": {"STQ": 1, "AQ": 1, "IoU": 1},
    "vipseg": {"VPQ/all": 100, "STQ": 1},
    "davis": {"J&F-Mean": 1},
    "burst": {"HOTA/all": 100, "HOTA/common": 100, "HOTA/uncommon": 100, "AP/all": 100},
}
IN_ONE_FILE = ("youtube_vis_2019", "youtube_vis_2021", "ovis", "burst")
"""Their results are one JSON file; the others' have a picture a frame."""
needs_trackeval = pytest.mark.skipif(not importlib.util.find_spec("trackeval"), reason="no trackeval")


def each(names):
    marks = {"burst": needs_trackeval}
    return pytest.mark.parametrize("name", [pytest.param(k, marks=marks.get(k, ())) for k in names])


every_benchmark = each(BENCHMARKS)
every_one_of_pictures = each(sorted(BENCHMARKS.keys() - IN_ONE_FILE))


class Made(NamedTuple):
    """A synthetic benchmark on disk, and the truth as results."""

    root: Path
    benchmark: Benchmark
    roots: Roots
    videos: list[VideoSample]
    perfect: list[VideoResult]

    def write(self, out, results=None, videos=None):
        """Write results, by default the truth, of some videos, by default all."""
        videos = self.videos if videos is None else videos
        shares = [
            self.benchmark.write(result, video, out)
            for result, video in zip(results or self.perfect, videos, strict=False)
        ]
        self.benchmark.join(json.loads(json.dumps(shares)), videos, "val", out)
        return out

    def score(self, out, videos=None):
        return self.benchmark.score(out, self.roots.truth, "val", videos)[self.benchmark.headline]


def make(name, root):
    make_benchmark(name, root, size=SIZE)
    benchmark = BENCHMARKS[name]
    roots = benchmark.find(root, "val")
    videos = benchmark.read(roots, "val")
    return Made(root, benchmark, roots, videos, [perfect_result(name, root, video) for video in videos])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a benchmark, once; its files must be left alone."""
    found = {}

    def of(name):
        if name not in found:
            found[name] = make(name, tmp_path_factory.mktemp(name) / name)
        return found[name]

    return of


def swapped(result):
    """The first two tracks trade places half-way."""
    first, second, *others = result.tracks
    half = result.num_frames // 2

    def masks(early, late):
        return {t: early.masks[t] for t in early.masks if t < half} | {
            t: late.masks[t] for t in late.masks if t >= half
        }

    tracks = (
        dataclasses.replace(first, masks=masks(first, second)),
        dataclasses.replace(second, masks=masks(second, first)),
    )
    return dataclasses.replace(result, tracks=(*tracks, *others))


@every_benchmark
def test_the_truth_scores_best_and_ids_that_change_score_less(made, tmp_path, name):
    benchmark = made(name)
    assert len(benchmark.videos) == 2
    out = benchmark.write(tmp_path / "best")
    files = benchmark.benchmark.check(out, benchmark.videos, "val")
    assert {path.read_bytes() for path in files.values()} == {
        path.read_bytes() for path in out.rglob("*.*") if path.is_file()
    }
    best = benchmark.benchmark.score(out, benchmark.roots.truth, "val")
    assert {key: best[key] for key in NUMBERS[name]} == pytest.approx(NUMBERS[name])
    less = benchmark.write(tmp_path / "less", [swapped(result) for result in benchmark.perfect])
    assert benchmark.score(less) < 0.95 * benchmark.score(out)


@every_benchmark
def test_the_official_download_is_a_truth(made, tmp_path, name):
    out = made(name).write(tmp_path / "out")
    truth = made(name).roots.truth
    if name not in IN_ONE_FILE or name == "burst":
        truth = made(name).root
    numbers = BENCHMARKS[name].score(out, truth, "val")
    assert numbers[BENCHMARKS[name].headline] == made(name).score(out)


@every_benchmark
def test_only_the_named_videos_are_scored(made, tmp_path, name):
    benchmark = made(name)
    one, two = (video.name for video in benchmark.videos)
    mixed = benchmark.write(tmp_path / "mixed", [benchmark.perfect[0], swapped(benchmark.perfect[1])])
    best = benchmark.score(mixed, [one])
    assert best == pytest.approx(next(iter(NUMBERS[name].values())))
    assert benchmark.score(mixed, {two}) < best
    assert benchmark.score(mixed, [two, one]) == benchmark.score(mixed) < best
    with pytest.raises(InputError, match=r"has no (video|sequence) 'nobody'"):
        benchmark.score(mixed, [one, "nobody"])
    alone = benchmark.write(tmp_path / "alone", videos=benchmark.videos[:1])
    assert benchmark.score(alone, [one]) == best
    benchmark.benchmark.check(alone, benchmark.videos[:1], "val")
    if name not in IN_ONE_FILE:
        with pytest.raises(InputError, match=str(alone)):
            benchmark.score(alone)


@every_benchmark
def test_a_video_that_is_written_again_gives_the_same_bytes(made, tmp_path, name):
    once, again = (made(name).write(tmp_path / folder) for folder in "ab")
    made(name).write(again)
    files = [path.relative_to(once) for path in once.rglob("*") if path.is_file()]
    assert files
    assert all((once / file).read_bytes() == (again / file).read_bytes() for file in files)


@every_benchmark
def test_joining_holds_one_share_and_leaves_no_half_of_a_file(made, tmp_path, name):
    benchmark, videos = BENCHMARKS[name], made(name).videos

    def shares():
        yield benchmark.write(made(name).perfect[0], videos[0], tmp_path)
        raise KeyboardInterrupt

    if name in ("davis", "kitti_step"):
        pytest.skip("results are pictures alone")
    with pytest.raises(KeyboardInterrupt):
        benchmark.join(shares(), videos, "val", tmp_path)
    assert [path for path in tmp_path.rglob("*.json*") if path.is_file()] == []


IMAGES, TEXTS = "dataset_images/inference", "dataset_annotations/inference"
CITY = f"{TEXTS}/cityscapes_vps"
WORKSPACE = {  # where it has the parts of a download
    "youtube_vis_2019": {
        "valid/JPEGImages": f"{IMAGES}/youtube_vis_2019",
        "valid/instances.json": f"{TEXTS}/youtube_vis/valid_2019.json",
    },
    "youtube_vis_2021": {
        "valid/JPEGImages": f"{IMAGES}/youtube_vis_2021",
        "valid/instances.json": f"{TEXTS}/youtube_vis/valid_2021.json",
    },
    "ovis": {"valid": f"{IMAGES}/ovis", "annotations_valid.json": f"{TEXTS}/ovis/valid.json"},
    "cityscapes_vps": {
        "val/img_all": f"{IMAGES}/cityscapes_vps_val",
        "val/panoptic_video": f"{CITY}/panoptic_video",
        "im_all_info_val_city_vps.json": f"{CITY}/im_all_info_val_city_vps.json",
        "panoptic_gt_val_city_vps.json": f"{CITY}/panoptic_gt_val_city_vps.json",
    },
    "kitti_step": {
        "training/image_02": f"{IMAGES}/kitti_step_val",
        "panoptic_maps": f"{TEXTS}/kitti_step/panoptic_maps",
    },
    "vipseg": {
        "images": f"{IMAGES}/vipseg",
        "panoptic_gt_VIPSeg_val.json": f"{TEXTS}/vipseg/val.json",
        "panomasksRGB": f"{TEXTS}/vipseg/panomasksRGB",
    },
    "davis": {
        "JPEGImages/480p": f"{IMAGES}/davis",
        "Annotations/480p": f"{TEXTS}/davis/Annotations",
        "ImageSets/2017/val.txt": f"{TEXTS}/davis/ImageSet_val.txt",
    },
    "burst": {
        "frames/val": f"{IMAGES}/burst/val",
        "val/all_classes.json": f"{TEXTS}/burst/all_classes_val.json",
        "val/first_frame_annotations.json": f"{TEXTS}/burst/first_frame_annotations_val.json",
    },
}


def content(video):
    """What is known of a video except for where its files lie."""
    references = [(each.id, each.frame, each.point) for each in video.references()]
    truth = video.truth and (video.truth.labels, video.truth.visible)
    return video.name, video.frame_names, video.scored, video.size, references, truth


@every_benchmark
def test_the_published_workspace_is_read_and_scored_as_the_download(made, tmp_path, name):
    for part, place in WORKSPACE[name].items():
        target = tmp_path / "workspace" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(made(name).root / part)
    roots = BENCHMARKS[name].find(tmp_path / "workspace", "val")
    videos = BENCHMARKS[name].read(roots, "val")
    assert all(image.is_file() and tmp_path in image.parents for video in videos for image in video.images)
    assert list(map(content, videos)) == list(map(content, made(name).videos))
    out = made(name).write(tmp_path / "out", videos=videos)
    assert BENCHMARKS[name].score(out, roots.truth, "val") == BENCHMARKS[name].score(
        out, made(name).roots.truth, "val"
    )


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("davis", "davis_semisupervised.json"),
        ("kitti_step", "kitti_step.json"),
        ("cityscapes_vps", "cityscapes_vps.json"),
    ],
)
def test_published_training_files_are_read_as_the_download(tmp_path, name, file):
    """Their masks are run-length codes."""
    make_benchmark(name, tmp_path / "download", size=SIZE, num_frames=4, split="train")
    benchmark = BENCHMARKS[name]
    roots = benchmark.find(tmp_path / "download", "train")
    videos = benchmark.read(roots, "train")

    def category(label):
        return 1 if label is None else benchmark.classes.ids[label]

    coded = [
        coded_sequence(
            video.name,
            [path.relative_to(roots.images).as_posix() for path in video.images],
            [video.truth.read(t)[1:] for t in range(len(video.images))],
            lambda id_, labels=video.truth.labels: category(labels[id_]),
        )
        for video in videos
    ]
    write_coded(tmp_path / "workspace/dataset_annotations/training" / file, coded)
    target = tmp_path / "workspace/dataset_images/training" / name
    target.parent.mkdir(parents=True)
    target.symlink_to(roots.images)
    found = benchmark.read(benchmark.find(tmp_path / "workspace", "train"), "train")
    assert [video.name for video in found] == [video.name for video in videos]
    for one, other in zip(videos, found, strict=True):
        assert all(image.is_file() for image in other.images)
        assert (other.size, other.truth.labels) == (one.size, one.truth.labels)
        assert other.truth.visible == one.truth.visible
        assert [each.id for each in other.references()] == [each.id for each in one.references()]
        for t in range(len(one.images)):
            old, new = one.truth.read(t), other.truth.read(t)
            assert all((rle.decode(mask) == (old.ids == k)).all() for k, mask in new.masks.items())
            assert old.semantic is None or (old.semantic == new.semantic).all()


@every_benchmark
def test_downloads_may_lie_side_by_side(made, name):
    assert find_below(BENCHMARKS[name], made(name).root.parent, "val") == made(name).roots


@every_benchmark
def test_what_was_looked_for_is_said(tmp_path, name):
    with pytest.raises(InputError, match=r"not found; looked for .*, .*dataset_|dataset_.*, "):
        BENCHMARKS[name].find(tmp_path, "val")
    with pytest.raises(InputError, match=f"{name} has no split 'dev'; known: val, "):
        BENCHMARKS[name].find(tmp_path, "dev")


def png(*shape):
    return cv2.imencode(".png", np.zeros(shape, np.uint8))[1].tobytes()


WRONG_PICTURES = {
    "none": (None, "lacks|cannot be read"),
    "empty": (b"", "not a PNG file"),
    "no picture": (b"GIF", "not a PNG file"),
    "half": (lambda data: data[: len(data) // 2], "truncated or damaged"),
    "grey": (png(*SIZE), "expected an? (RGB picture of 8 bits|picture of 8 bits with a palette)"),
    "another size": (
        lambda data: encode_ids(np.zeros((9, 9), np.uint8), voc_palette()) if data[25] == 3 else png(9, 9, 3),
        r"expected a picture of \(32, 48\)",
    ),
    "of 16 bits": (
        cv2.imencode(".png", np.full((*SIZE, 3), 999, np.uint16))[1].tobytes(),
        "RGB picture|expected an RGB picture of 8 bits",
    ),
}


@pytest.mark.parametrize("damage", WRONG_PICTURES)
@every_one_of_pictures
def test_wrong_pictures_of_results_are_named(made, tmp_path, name, damage):
    out = made(name).write(tmp_path / "out")
    path = sorted(out.rglob("*.png"))[-3]  # neither the first nor the last of its video
    data, message = WRONG_PICTURES[damage]
    path.unlink() if data is None else path.write_bytes(data(path.read_bytes()) if callable(data) else data)
    with pytest.raises(InputError, match=f"{out}.*({message})"):
        BENCHMARKS[name].check(out, made(name).videos, "val")
    if damage != "grey" or name != "davis":  # DAVIS' evaluator reads grey levels, too
        with pytest.raises(InputError, match=f"{out}.*({message})"):
            made(name).score(out)


@pytest.mark.parametrize("place", ["beside", "elsewhere"])
@every_one_of_pictures
def test_pictures_of_no_video_are_named(made, tmp_path, name, place):
    out = made(name).write(tmp_path / "out")
    pictures = out / "pan_pred" if (out / "pan_pred").is_dir() else out
    folder = {"beside": sorted(out.rglob("*.png"))[0].parent, "elsewhere": pictures / "nobody"}[place]
    path = folder / "99999.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"(99999\.png|nobody).*(belongs to no|should not be there)"):
        BENCHMARKS[name].check(out, made(name).videos, "val")


NOT_JSON = ["", "{", "\xff", "[" * 10**5, '{"annotations": 1' + "0" * 5000 + "}"]


@pytest.mark.parametrize("content", NOT_JSON, ids=range(len(NOT_JSON)))
@each(["ovis", "cityscapes_vps", "vipseg", "burst"])
def test_results_that_are_no_json_are_named(made, tmp_path, name, content):
    out = made(name).write(tmp_path / "out")
    (file,) = out.glob("*.json")
    file.write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=rf"{file.name}: is not a JSON file"):
        BENCHMARKS[name].check(out, made(name).videos, "val")
    with pytest.raises(InputError, match=rf"{file.name}: is not a JSON file"):
        made(name).score(out)
    file.unlink()
    with pytest.raises(InputError, match=rf"{file.name}: cannot be read"):
        made(name).score(out)


def use(benchmark, root, split, out):
    """Do all that can be done with a split's files."""
    roots = benchmark.find(root, split)
    videos = benchmark.read(roots, split)
    for video in videos:
        assert all(each.mask is None or each.mask.any() for each in video.references())
        for t in range(len(video.images)) if video.truth else ():
            truth = video.truth.read(t)
            shown = set(truth.masks or np.unique(truth.ids).tolist()) - {0}
            assert shown <= video.truth.labels.keys()
            assert all(rle.decode(mask).shape == video.size for mask in (truth.masks or {}).values())
    if split == "train":
        return {}
    benchmark.check(out, videos, split)
    return benchmark.score(out, roots.truth, split, [videos[0].name]) if roots.truth else {}


@pytest.mark.parametrize("split", ["val", "train"])
@every_benchmark
def test_whatever_is_wrong_in_a_file_is_our_error_that_names_it(tmp_path_factory, name, split):
    root = tmp_path_factory.mktemp("fuzz")
    make_benchmark(name, root / "data", size=SIZE, num_objects=2, num_frames=4, split=split)
    (root / "data/synthetic.json").unlink()
    (root / "out").mkdir()
    if split == "val":
        make(name, root / "made").write(root / "out")
        shutil.rmtree(root / "data")
        (root / "made").rename(root / "data")
        (root / "data/synthetic.json").unlink()
    files = [path for path in sorted(root.rglob("*")) if path.suffix in (".json", ".png", ".txt")]

    def use_all():
        numbers = use(BENCHMARKS[name], root / "data", split, root / "out")
        assert all(np.isfinite(value) for value in numbers.values())

    only_our_errors(use_all, files, root, 1, 2, 5, 2021, "1", "0001", "x/1.jpg", "person", max_examples=50)
