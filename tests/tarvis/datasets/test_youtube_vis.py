"""YouTube-VIS and OVIS: both layouts, tracks as truth, results, and what is wrong with either."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from tarvis.datasets.benchmark import Roots
from tarvis.datasets.classes import class_table
from tarvis.datasets.youtube_vis import OVIS, YOUTUBE_VIS_2019, YOUTUBE_VIS_2021
from tarvis.files import rle
from tarvis.structures import InputError, VideoResult
from tests.tarvis.datasets.support import perfect, submit, write
from tests.tarvis.fuzz import edit, put

H, W, FRAMES = 10, 14, 3
EDITIONS = (YOUTUBE_VIS_2019, YOUTUBE_VIS_2021, OVIS)
every_edition = pytest.mark.parametrize("edition", EDITIONS, ids=lambda edition: edition.name)


def masks_of(track):
    """Masks of object 1 or 2; the second is not seen in the last frame."""
    masks = np.zeros((FRAMES, H, W), bool)
    for t in range(FRAMES):
        if track == 1:
            masks[t, 1:6, 1 + t : 5 + t] = True
        elif t < 2:
            masks[t, 4:9, 8:12] = True
    return masks


def runs(mask):
    """Uncompressed counts: run lengths down the columns, zeros first."""
    flat = np.concatenate([[0], mask.ravel(order="F").view(np.int8)])
    turns = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], turns, [mask.size]])).tolist()


def code(mask, *, is_compressed=True):
    if not mask.any():
        return None
    counts = rle.encode(mask[None])[0]["counts"].decode() if is_compressed else runs(mask)
    return {"size": [H, W], "counts": counts}


def tree_of(edition, *, is_compressed=True, has_tracks=True):
    """Videos 4 and 7 with objects of classes 1 and 2."""
    table = class_table(edition.name)
    annotations = []
    for video in (4, 7):
        for track in (1, 2):
            masks = masks_of(track)
            annotations.append(
                {
                    "id": 10 * video + track,
                    "video_id": video,
                    "category_id": table.ids[track],
                    "iscrowd": 0,
                    "segmentations": [code(mask, is_compressed=is_compressed) for mask in masks],
                    "areas": [int(mask.sum()) or None for mask in masks],
                    "occlusion": ["no_occlusion", "slight_occlusion", None],
                }
            )
    tree = {
        "info": {"year": int(edition.name[-4:])} if "20" in edition.name else {},
        "categories": [{"id": k, "name": n} for k, n in zip(table.ids, table.names, strict=True)],
        "videos": [
            {
                "id": video,
                "height": H,
                "width": W,
                "length": FRAMES,
                "file_names": [f"v{video}/{5 * t:05d}.jpg" for t in range(FRAMES)],
            }
            for video in (4, 7)
        ],
    }
    return tree | ({"annotations": annotations} if has_tracks else {})


@pytest.fixture
def make(tmp_path):
    """Writes annotations; gives them as `Roots`."""

    def of(tree, name="truth.json"):
        path = write(tmp_path / name, tree)
        return Roots(tmp_path / "images", path, path)

    return of


TEXTS = "dataset_annotations"
LAYOUTS = [  # besides those of `test_benchmarks`
    (
        YOUTUBE_VIS_2021,
        "train",
        "dataset_images/training/youtube_vis_2021",
        f"{TEXTS}/training/youtube_vis_2021.json",
    ),
    (
        YOUTUBE_VIS_2021,
        "test",
        "dataset_images/inference/youtube_vis_2021_test",
        f"{TEXTS}/inference/youtube_vis/test_2021.json",
    ),
    (OVIS, "train", "dataset_images/training/ovis", f"{TEXTS}/training/ovis.json"),
    (YOUTUBE_VIS_2021, "train", "train/JPEGImages", "train/instances.json"),
    (YOUTUBE_VIS_2019, "val", "valid/JPEGImages", "valid.json"),
    (YOUTUBE_VIS_2019, "val", "val/JPEGImages", "annotations/instances_val_sub.json"),
    (OVIS, "test", "test", "annotations_test.json"),
]


@pytest.mark.parametrize(("edition", "split", "images", "annotations"), LAYOUTS)
def test_workspaces_and_official_downloads_are_read(tmp_path, edition, split, images, annotations):
    (tmp_path / images).mkdir(parents=True)
    write(tmp_path / annotations, tree_of(edition))
    roots = edition.find(tmp_path, split)
    assert roots == Roots(tmp_path / images, tmp_path / annotations, tmp_path / annotations)
    first, second = edition.read(roots, split)
    assert (first.name, second.name) == ("v4", "v7")
    assert first.images[1] == tmp_path / images / "v4/00005.jpg"
    assert first.frame_names == ("00000", "00005", "00010")
    assert first.scored == (0, 1, 2)
    assert first.size == (H, W)
    assert first.references() == []


@pytest.mark.parametrize("nothing", [{}, {"annotations": None}, {"annotations": []}])
def test_without_tracks_there_is_no_truth(tmp_path, nothing):
    (tmp_path / "valid").mkdir()
    write(tmp_path / "annotations_valid.json", tree_of(OVIS, has_tracks=False) | nothing)
    roots = OVIS.find(tmp_path, "val")
    assert roots.truth is None
    assert [video.truth for video in OVIS.read(roots, "val")] == [None, None]


@pytest.mark.parametrize("is_compressed", [True, False])
@every_edition
def test_tracks_are_the_truth_in_either_code(make, edition, is_compressed):
    for video in edition.read(make(tree_of(edition, is_compressed=is_compressed)), "train"):
        truth = pickle.loads(pickle.dumps(video.truth))  # as it reaches workers
        assert truth.labels == {1: 1, 2: 2}
        assert truth.visible == ((1, 2), (1, 2), (1,))
        for t in range(FRAMES):
            frame = truth.read(t)
            assert frame.ids is None
            assert frame.semantic is None
            assert tuple(frame.masks) == truth.visible[t]
            for track, mask in frame.masks.items():
                np.testing.assert_array_equal(rle.decode(mask), masks_of(track)[t])


def test_masks_without_pixels_are_not_visible(make):
    tree = tree_of(OVIS)
    empty = {"size": [H, W], "counts": [H * W]}
    tree["annotations"][0]["segmentations"][1] = empty
    video = OVIS.read(make(tree), "train")[0]
    assert video.truth.visible == ((1, 2), (2,), (1,))


def test_crowds_are_no_tracks(make):
    tree = tree_of(OVIS)
    tree["annotations"][1]["iscrowd"] = 1
    truth = OVIS.read(make(tree), "train")[0].truth
    assert truth.labels == {1: 1}
    assert truth.visible == ((1,), (1,), (1,))


def test_videos_without_tracks_stay(make):
    tree = tree_of(OVIS)
    tree["annotations"] = tree["annotations"][:2]
    truth = OVIS.read(make(tree), "train")[1].truth
    assert truth.labels == {}
    assert truth.visible == ((), (), ())
    assert truth.read(0).masks == {}


def test_classes_are_written_as_the_benchmark_counts_them(make, tmp_path):
    videos = YOUTUBE_VIS_2021.read(make(tree_of(YOUTUBE_VIS_2021)), "val")
    entries = json.loads((submit(YOUTUBE_VIS_2021, videos, tmp_path) / "results.json").read_text())
    assert [(entry["video_id"], entry["category_id"]) for entry in entries] == [
        (4, 2),
        (4, 3),
        (7, 2),
        (7, 3),
    ]
    assert entries[1]["score"] == 0.9
    assert entries[1]["segmentations"] == [code(mask) for mask in masks_of(2)]


def test_masks_without_pixels_are_written_as_null(make, tmp_path):
    video = OVIS.read(make(tree_of(OVIS)), "val")[0]
    result = perfect(video)
    second = replace(result.tracks[1], masks={**result.tracks[1].masks, 2: rle.empty((H, W))})
    share = OVIS.write(replace(result, tracks=(second,)), video, tmp_path)
    assert share[0]["segmentations"][2] is None


def test_results_without_any_track_are_whole(make, tmp_path):
    roots = make(tree_of(OVIS))
    videos = OVIS.read(roots, "val")
    OVIS.join([[], []], videos, "val", tmp_path)
    OVIS.check(tmp_path, videos, "val")
    assert OVIS.score(tmp_path, roots.truth, "val")["AP"] == 0


@pytest.mark.parametrize("path", [["videos", 0, "id"], ["videos", 0, "file_names"]])
def test_results_of_a_video_whose_annotations_have_changed_are_not_joined(make, tmp_path, path):
    shares = [OVIS.write(perfect(video), video, tmp_path) for video in OVIS.read(make(tree_of(OVIS)), "val")]
    tree = tree_of(OVIS, has_tracks=False)
    put(tree, path, 5 if path[-1] == "id" else ["v4/00000.jpg"])
    tree["videos"][0].pop("length", None)
    with pytest.raises(InputError, match=r"results\.json: the annotations of v4 have changed .* --overwrite"):
        OVIS.join(shares, OVIS.read(make(tree), "val"), "val", tmp_path)


def test_frames_of_another_size_than_annotated_are_named(make, tmp_path):
    video = OVIS.read(make(tree_of(OVIS)), "val")[0]
    with pytest.raises(InputError, match=r"v4: frames are of \(5, 7\), its annotations say \(10, 14\)"):
        OVIS.write(VideoResult("vis", (5, 7), FRAMES, ()), video, tmp_path)


def test_editions_are_not_mistaken_for_one_another(make):
    tree = tree_of(YOUTUBE_VIS_2019)
    with pytest.raises(InputError, match=r"info\.year: expected 2021 or 2022, the years of youtube_vis_2021"):
        YOUTUBE_VIS_2021.read(make(tree), "val")
    del tree["info"]
    with pytest.raises(InputError, match=r"categories\[0\]\.id: 'person' is category 1, but 26 in youtube"):
        YOUTUBE_VIS_2021.read(make(tree), "val")
    tree = tree_of(YOUTUBE_VIS_2021)
    tree["info"]["year"] = 2022
    assert len(YOUTUBE_VIS_2021.read(make(tree), "val")) == 2


WRONG_ANNOTATIONS = [
    (["videos"], [], "videos: expected videos, got none"),
    (["videos", 1, "id"], 4, r"videos\[1\]\.id: id 4 appears twice"),
    (["videos", 1, "file_names"], [f"v4/{t}.jpg" for t in range(3)], "'v4' also belong to another video"),
    (["videos", 0, "file_names", 0], "../v4/0.jpg", r"file_names\[0\]: '\.\./v4/0\.jpg' is not a path below"),
    (["videos", 0, "file_names", 0], "v9/0.jpg", r"videos\[0\]\.file_names: expected frames of one folder"),
    (["videos", 0, "file_names"], ["a.jpg", "b.jpg", "c.jpg"], "expected frames of one folder"),
    (["videos", 0, "file_names"], [], "expected frames of one folder"),
    (["videos", 0, "file_names", 1], "v4/00000.jpg", "a frame appears twice"),
    (["videos", 0, "length"], 4, "length: expected 3, the number of file names, got 4"),
    (["videos", 0, "height"], 0, "height: expected an integer from 1"),
    (["annotations", 1, "id"], 41, r"annotations\[1\]\.id: id 41 appears twice"),
    (["annotations", 1, "video_id"], 5, r"annotations\[1\]\.video_id: video 5 is unknown"),
    (["annotations", 1, "category_id"], 41, "category 41 is unknown"),
    (["annotations", 0, "segmentations"], [None], "expected 3 segmentations, one a frame, got 1"),
    (["annotations", 0, "segmentations", 1, "size"], [W, H], r"size: expected \[10, 14\]"),
    (["annotations", 0, "segmentations", 1, "counts"], [H * W - 1], "expected a run-length code"),
    (["annotations", 0, "segmentations", 1, "counts"], "52N2", "expected a run-length code"),
    (["annotations", 0, "segmentations", 1], [[1, 2, 3]], r"segmentations\[1\]\[0\]: expected x and y"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG_ANNOTATIONS)
def test_wrong_annotations_are_named(make, path, value, message):
    tree = tree_of(OVIS)
    put(tree, path, value)
    with pytest.raises(InputError, match=rf"truth\.json: .*{message}"):
        OVIS.read(make(tree), "train")


WRONG_RESULTS = [
    ([0, "video_id"], 5, r"\[0\]\.video_id: video 5 is unknown"),
    ([0, "category_id"], 26, r"\[0\]\.category_id: category 26 is unknown"),
    ([0, "score"], float("nan"), r"\[0\]\.score: expected a finite number"),
    ([0, "score"], "0.5", r"\[0\]\.score: expected a finite number"),
    ([1, "segmentations"], [None] * 4, r"\[1\]\.segmentations: expected 3 segmentations, one a frame, got 4"),
    ([1, "segmentations", 0, "size"], [H, W + 1], r"\[1\]\.segmentations\[0\]\.size: expected"),
    (
        [1, "segmentations", 0, "counts"],
        "0",
        r"\[1\]\.segmentations\[0\]\.counts: expected a run-length code",
    ),
    ([1, "segmentations", 0], {}, r"\[1\]\.segmentations\[0\]: has no 'size'"),
    ([1], {"score": 1}, r"\[1\]: has no 'video_id'"),
    ([1, "score"], 10**400, r"\[1\]\.score: expected a finite number"),
    ([1, "segmentations"], None, r"\[1\]\.segmentations: expected a list, got None"),
    ([0, "segmentations", 0, "counts"], "Xé", r".*expected a run-length code"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG_RESULTS)
def test_damaged_results_are_refused(make, tmp_path, path, value, message):
    roots = make(tree_of(OVIS))
    videos = OVIS.read(roots, "val")
    results = submit(OVIS, videos, tmp_path) / "results.json"
    edit(results, path, value)
    with pytest.raises(InputError, match=rf"results\.json: {message}"):
        OVIS.check(tmp_path, videos, "val")
    with pytest.raises(InputError, match=rf"results\.json: {message}"):
        OVIS.score(tmp_path, roots.truth, "val")


def test_areas_that_results_claim_are_not_believed(make, tmp_path):
    roots = make(tree_of(OVIS))
    results = submit(OVIS, OVIS.read(roots, "val"), tmp_path) / "results.json"
    pixel = {"size": [H, W], "counts": [0, 1, H * W - 1]}
    wrong = {"video_id": 4, "category_id": 2, "score": 0.95, "segmentations": [pixel] * FRAMES}
    write(results, [wrong, *json.loads(results.read_text())])
    honest = OVIS.score(results, roots.truth, "val")
    assert honest["AP_small"] < 1
    edit(results, [0, "areas"], [300**2] * FRAMES)
    assert OVIS.score(results, roots.truth, "val") == honest


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["annotations"], lambda _: None, "has no 'annotations'"),
        (["annotations", 0, "id"], 42, r"annotations\[1\]\.id: id 42 appears twice"),
        (["annotations", 0, "occlusion", 0], "dark", "occlusion.*: expected no_occlusion or"),
        (["annotations", 0, "areas"], [1], "expected 3 areas, one a frame, got 1"),
        (["videos", 0, "height"], -5, "height: expected an integer from 1 to"),
        (["categories", 1, "id"], 1, r"categories\[1\]\.id: id 1 appears twice"),
    ],
)
def test_a_wrong_truth_is_named_when_results_are_scored(make, tmp_path, path, value, message):
    roots = make(tree_of(OVIS))
    results = submit(OVIS, OVIS.read(roots, "val"), tmp_path) / "results.json"
    edit(roots.truth, path, value)
    with pytest.raises(InputError, match=rf"truth\.json: .*({message})"):
        OVIS.score(results, roots.truth, "val")


def test_a_truth_without_tracks_cannot_score(make, tmp_path):
    results = submit(OVIS, OVIS.read(make(tree_of(OVIS)), "val"), tmp_path)
    truth = make(tree_of(OVIS, has_tracks=False)).truth
    with pytest.raises(InputError, match="has no 'annotations': the truth of this split is not public"):
        OVIS.score(results, truth, "val")


@pytest.mark.parametrize("is_odd", [(True, False), (False, True), (True, True)])
def test_scores_do_not_depend_on_how_masks_are_written(make, tmp_path, is_odd):
    def odd(entries):
        for entry in entries:
            for mask in filter(None, entry["segmentations"]):
                first, *rest = runs(rle.decode(rle.from_file([mask["counts"]], (H, W))[0]))
                mask["counts"] = [first - 1, 0, 1, *rest[:-1], 0, 0, rest[-1], 0]
        return entries

    roots = make(tree_of(YOUTUBE_VIS_2021))
    results = submit(YOUTUBE_VIS_2021, YOUTUBE_VIS_2021.read(roots, "val"), tmp_path) / "results.json"
    before = YOUTUBE_VIS_2021.score(results, roots.truth, "val")
    for file, path, is_written in zip((roots.truth, results), (["annotations"], []), is_odd, strict=True):
        if is_written:
            tree = json.loads(file.read_text())
            odd(tree[path[0]] if path else tree)
            file.write_text(json.dumps(tree))
    assert YOUTUBE_VIS_2021.score(results, roots.truth, "val") == before
    assert before["AP"] == pytest.approx(1)
