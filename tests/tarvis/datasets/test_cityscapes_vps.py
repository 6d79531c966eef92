"""Cityscapes-VPS in its layouts: names of results, writing, scoring, and what is wrong with files."""

import json
from pathlib import Path

import numpy as np
import pytest

from tarvis.datasets.benchmark import Roots
from tarvis.datasets.cityscapes_vps import CityscapesVPS
from tarvis.structures import VOID, InputError
from tests.tarvis.datasets.support import colours, perfect, submit, write
from tests.tarvis.fuzz import edit

H, W = 12, 20
ROAD, SKY, PERSON, CAR = 0, 10, 11, 13
IDS = {"road": 8405120, "sky": 11829830, "car": 9306112, "other": 9306113, "crowd": 3937500}
CATEGORIES = [{"id": k, "name": str(k), "isthing": int(k >= PERSON)} for k in (ROAD, SKY, PERSON, CAR)]
VIDEOS = (5, 15)


def stem(video, frame):
    """What Cityscapes calls a frame, from 1."""
    return f"frankfurt_000000_{1000 * video + frame:06d}"


def true_id(video, frame):
    return f"{video:04d}_{6 * (video - 1) + frame // 5:04d}_{stem(video, frame)}"


def true_frame(frame):
    """Picture of ids and segments: two cars that move on road under sky, a crowd, void at the left border."""
    ids = np.full((H, W), IDS["road"], np.int32)
    ids[:3] = IDS["sky"]
    ids[4:7, 2 + frame // 5 : 8 + frame // 5] = IDS["car"]
    ids[8:11, 10:14] = IDS["other"]
    ids[3:6, 17:] = IDS["crowd"]
    ids[:, 0] = 0
    classes = {"road": ROAD, "sky": SKY, "car": CAR, "other": CAR, "crowd": PERSON}
    listed = [
        {
            "id": IDS[k],
            "category_id": classes[k],
            "iscrowd": int(k == "crowd"),
            "area": int((ids == IDS[k]).sum()),
        }
        for k in classes
    ]
    return ids, listed


def make_truth(pictures, path, videos, kind):
    images, annotations = [], []
    for video in videos:
        for frame in range(5, 31, 5):
            name = true_id(video, frame)
            end, true_end = ("left", "gtFine_color") if frame == 20 else ("new", "final_mask")
            images.append({"id": name, "height": H, "width": W, "file_name": f"{name}_{end}Img8bit.png"})
            ids, listed = true_frame(frame)
            annotations.append({"image_id": name, "segments_info": listed})
            write(pictures / f"{name}_{true_end}.png", colours(ids))
    tree = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    if kind == "names":
        tree.pop("annotations")
    write(path, tree)


def make_info(path, videos=VIDEOS, name=lambda v, k: f"{stem(v, k)}_leftImg8bit.png", number=lambda v: v):
    images = [
        {"id": 10_000 * number(v) + k, "file_name": name(v, k), "height": H, "width": W}
        for v in videos
        for k in range(1, 31)
    ]
    write(path, {"images": images})


def make_download(root, *, with_truth=True):
    (root / "val/img_all").mkdir(parents=True)
    make_info(root / "im_all_info_val_city_vps.json")
    if with_truth:
        make_truth(root / "val/panoptic_video", root / "panpotic_gt_val_city_vps.json", VIDEOS, "truth")
    return root


def read(root, split="val", dense=False):
    benchmark = CityscapesVPS(dense)
    return benchmark.read(benchmark.find(root, split), split)


@pytest.fixture
def download(tmp_path):
    return make_download(tmp_path / "download")


@pytest.fixture
def results(download, tmp_path):
    return submit(CityscapesVPS(), read(download), tmp_path / "results")


def test_every_fifth_frame_is_run_and_called_by_the_truth(download):
    first, second = read(download)
    assert (first.name, second.name) == ("0005", "0015")
    assert first.scored == tuple(range(6))
    assert first.size == (H, W)
    assert first.images[0] == download / "val/img_all" / f"{stem(5, 5)}_leftImg8bit.png"
    assert first.frame_names == tuple(true_id(5, k) for k in range(5, 31, 5))
    assert first.frame_names[0].startswith("0005_0025_frankfurt_")
    assert second.frame_names[5].startswith("0015_0090_")


def test_dense_videos_have_all_frames_of_which_the_fifth_ones_are_scored(download):
    sparse, dense = read(download)[0], read(download, dense=True)[0]
    assert len(dense.images) == 30
    assert dense.scored == (4, 9, 14, 19, 24, 29)
    assert [dense.frame_names[k] for k in dense.scored] == list(sparse.frame_names)
    assert [dense.images[k] for k in dense.scored] == list(sparse.images)
    assert dense.truth is None


def in_workspace(root, folder="val"):
    (root / f"dataset_images/inference/cityscapes_vps_{folder}").mkdir(parents=True)
    return root / "dataset_annotations/inference/cityscapes_vps"


@pytest.mark.parametrize("split", ["val", "test"])
def test_names_come_from_the_list_of_annotated_images(tmp_path, split):
    """Even where the annotations number the videos otherwise."""
    folder = in_workspace(tmp_path, split)
    make_info(folder / f"im_all_info_{split}_city_vps.json", number=lambda v: v // 10 + 1)
    make_truth(tmp_path / "x", folder / f"panoptic_im_{split}_city_vps.json", VIDEOS, "names")
    videos = read(tmp_path, split)
    assert [video.name for video in videos] == ["0005", "0015"]
    assert videos[1].frame_names[1] == true_id(15, 10)
    assert videos[0].truth is None
    assert CityscapesVPS().find(tmp_path, split).truth is None


def test_without_any_list_ids_stand_in_file_names(tmp_path):
    def name(v, k):
        return f"{true_id(v, k) if k % 5 == 0 else stem(v, k)}_newImg8bit.png"

    make_info(in_workspace(tmp_path) / "im_all_info_val_city_vps.json", name=name)
    assert [list(video.frame_names) for video in read(tmp_path)] == [
        [true_id(v, k) for k in range(5, 31, 5)] for v in VIDEOS
    ]


def test_ids_are_not_guessed(tmp_path):
    folder = in_workspace(tmp_path)
    make_info(folder / "im_all_info_val_city_vps.json", name=lambda v, k: f"{stem(v, k)}_leftImg8bit.png")
    message = r"images\[4\].file_name: no file gives the id of .frankfurt.*panoptic_im_val_city_vps.json"
    with pytest.raises(InputError, match=message):
        read(tmp_path)


def test_truth_numbers_tracks_and_knows_crowd_and_void(download):
    truth = read(download)[0].truth
    assert truth.labels == {1: CAR, 2: CAR}
    assert truth.visible == ((1, 2),) * 6
    labels = truth.read(1)
    assert labels.masks is None
    assert labels.ids[5, 4:10].tolist() == [1] * 6
    assert labels.ids[9, 10:14].tolist() == [2] * 4
    assert (labels.semantic[:, 0] == VOID).all()
    assert (labels.semantic[3:6, 17:] == VOID).all()
    assert (labels.semantic[labels.ids > 0] == CAR).all()
    assert labels.semantic[0, 1] == SKY
    assert labels.semantic[11, 1] == ROAD


def test_dense_and_sparse_runs_write_the_same_files(download, results, tmp_path):
    videos = read(download, dense=True)
    found = [perfect(video, sparse.truth) for video, sparse in zip(videos, read(download), strict=True)]
    dense = submit(CityscapesVPS(dense=True), videos, tmp_path / "dense", found)
    for path in results.rglob("*.*"):
        assert (dense / path.relative_to(results)).read_bytes() == path.read_bytes()


def test_stuff_is_listed_first_and_keeps_its_class_colour(results):
    frames = json.loads((results / "pred.json").read_text())["annotations"]
    assert len(frames) == 12
    for frame in frames:
        assert [s["category_id"] for s in frame["segments_info"]] == [ROAD, SKY, CAR, CAR]
        assert frame["segments_info"][0]["id"] == 128 + 256 * 64 + 65536 * 128  # purple, as Cityscapes has it


def test_some_videos_are_scored_on_results_of_all(download, results):
    benchmark = CityscapesVPS()
    (results / "pan_pred" / f"{true_id(5, 5)}.png").write_bytes(b"")
    with pytest.raises(InputError, match="not a PNG file"):
        benchmark.score(results, download, "val")
    assert benchmark.score(results, download, "val", ["0015"])["VPQ/all"] == pytest.approx(100)


INFO, TRUTH = "im_all_info_val_city_vps.json", "panpotic_gt_val_city_vps.json"
SEGMENT = ["annotations", 1, "segments_info", 2]


@pytest.mark.parametrize(
    ("file", "path", "value", "message"),
    [
        (INFO, ["images"], [], "has no images"),
        (INFO, ["images", 3, "id"], 50_003, r"images\[3\].id: id 50003 appears twice"),
        (INFO, ["images", 3, "id"], 50_000, r"images\[3\].id: expected video \* 10000 \+ frame"),
        (INFO, ["images", 4, "id"], 50_031, "video 5 lacks frame 5"),
        (INFO, ["images", 4, "file_name"], "../x.png", "is not a path below its folder"),
        (INFO, ["images", 4, "file_name"], "x.png", "expected a name such as frankfurt_000000_001736"),
        (INFO, ["images", 4, "file_name"], "bonn_0_1.png", r"images\[4\].file_name: 'bonn_0_1.png'.*got 0"),
        (INFO, ["images", 9, "height"], 7, r"images\[9\]: is of another size"),
        (INFO, ["images", 4, "file_name"], f"{stem(5, 10)}.png", "video 5: expected one video"),
        (INFO, ["images", 4, "file_name"], f"{stem(15, 10)}.png", "video 5: expected one video"),
        (TRUTH, ["images", 4, "id"], true_id(5, 5), "appears twice"),
        (
            TRUTH,
            ["annotations", 4, "image_id"],
            true_id(5, 5),
            r"annotations\[4\].image_id: .* appears twice",
        ),
        (TRUTH, ["annotations", 4, "image_id"], "x", "has no annotation"),
        (TRUTH, [*SEGMENT, "category_id"], 19, "category 19 is unknown"),
        (TRUTH, [*SEGMENT, "category_id"], PERSON, "was of another category before"),
        (TRUTH, [*SEGMENT, "id"], IDS["road"], "appears twice"),
    ],
)
def test_wrong_entries_are_named(download, file, path, value, message):
    edit(download / file, path, value)
    with pytest.raises(InputError, match=message) as error:
        read(download)
    assert file in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["annotations"], lambda a: a[:-1], "expected 12 annotations, one a"),
        ([*SEGMENT, "category_id"], 40, "category 40 is unknown"),
        ([*SEGMENT, "id"], 77, "which has pixels in"),
        ([*SEGMENT, "id"], 0, "expected an integer from 1"),
        ([*SEGMENT, "id"], IDS["road"], "id 8405120 appears twice"),
        (["annotations", 0, "segments_info"], lambda s: [*s, s[0] | {"id": 5}], "which has no pixels in"),
    ],
)
def test_damage_of_results_is_found(download, results, path, value, message):
    edit(results / "pred.json", path, value)
    with pytest.raises(InputError, match=rf"pred\.json: annotations.*{message}"):
        CityscapesVPS().check(results, read(download), "val")
    with pytest.raises(InputError, match=rf"pred\.json: annotations.*{message}"):
        CityscapesVPS().score(results, download, "val")


def test_a_truth_of_half_a_video_is_refused(download, results):
    edit(download / TRUTH, ["images"], lambda images: images[:-1])
    with pytest.raises(InputError, match=r"images: expected 6 for each video, got 11 in all"):
        CityscapesVPS().score(results, download, "val")
    (download / TRUTH).unlink()
    with pytest.raises(InputError, match=f"has no {TRUTH}"):
        CityscapesVPS().score(results, download, "val")


def test_other_roots_can_be_given(download):
    roots = Roots(Path("frames"), download / INFO, None)
    video = CityscapesVPS().read(roots, "val")[0]
    assert video.images[0].parent == Path("frames")
    assert video.truth is None


@pytest.mark.parametrize("key", ["image_id", "file_name"])
def test_entries_of_results_that_name_their_images_are_paired_by_name(download, results, key):
    benchmark, names = CityscapesVPS(), [true_id(v, k) for v in VIDEOS for k in range(5, 31, 5)]
    end = "" if key == "image_id" else "_newImg8bit.png"
    truth = benchmark.find(download, "val").truth

    def named(entries):
        listed = [entry | {key: name + end} for entry, name in zip(entries, names, strict=True)]
        return listed[::-1]

    before = benchmark.score(results, truth, "val")
    edit(results / "pred.json", ["annotations"], named)
    assert benchmark.score(results, truth, "val") == before
    benchmark.check(results, read(download), "val")
    edit(results / "pred.json", ["annotations", 1, key], "x.png")
    for use in (
        lambda: benchmark.score(results, truth, "val"),
        lambda: benchmark.check(results, read(download), "val"),
    ):
        with pytest.raises(InputError, match=r"annotations\[1\]: expected a frame such as 0005_"):
            use()


def test_truth_whose_videos_are_mingled_is_refused(download, results):
    swap = lambda images: [images[-1], *images[1:-1], images[0]]  # noqa: E731
    edit(download / "panpotic_gt_val_city_vps.json", ["images"], swap)
    with pytest.raises(InputError, match=r"images\[1\]\.id: is among the frames of video '0015'"):
        CityscapesVPS().score(results, CityscapesVPS().find(download, "val").truth, "val")
