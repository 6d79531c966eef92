"""Own data as a benchmark: the truth scores one, frames without masks are run, what cannot is refused."""

import json
import shutil

import numpy as np
import pytest
import torch

from tarvis.datasets.own import own_benchmark
from tarvis.demo.synthetic_benchmarks import make_benchmark
from tarvis.files import rle
from tarvis.files.pictures import encode_ids, read_ids, voc_palette
from tarvis.structures import InputError, Track, VideoResult
from tests.tarvis.datasets.support import submit
from tests.tarvis.fuzz import edit

FRAMES = 8


@pytest.fixture
def tracks(tmp_path):
    """A file of two videos and their tracks, with ids and an order of classes of its own; gives the file."""
    make_benchmark("ovis", tmp_path, num_videos=2, size=(48, 64), num_objects=2)
    (tmp_path / "valid").rename(tmp_path / "images")
    path = (tmp_path / "annotations_valid.json").rename(tmp_path / "my_val.json")
    tree = json.loads(path.read_text())
    used = sorted({entry["category_id"] for entry in tree["annotations"]})
    for entry in tree["annotations"]:
        entry["category_id"] = 70 - entry["category_id"]
    tree["categories"] = [{"id": 70 - k, "name": f"thing {k}"} for k in used]
    path.write_text(json.dumps(tree))
    return path


@pytest.fixture
def masks(tmp_path):
    """A folder of two videos, of which every second frame has a mask."""
    make_benchmark("davis", tmp_path, num_videos=2, size=(48, 64), num_objects=2)
    root = tmp_path / "my_val"
    root.mkdir()
    (tmp_path / "JPEGImages/480p").rename(root / "frames")
    (tmp_path / "Annotations/480p").rename(root / "masks")
    for path in root.glob("masks/*/*[1357].png"):
        path.unlink()
    return root


def opened(path):
    own = own_benchmark(path)
    roots = own.find(path, "all")
    return own, roots, own.read(roots, "all")


def perfect_masks(video, folder):
    """The masks, in frames that have none those of the frame before."""
    tracks = {1: {}, 2: {}}
    ids = np.zeros(video.size)
    for t, name in enumerate(video.frame_names):
        path = folder / video.name / f"{name}.png"
        ids = read_ids(path) if path.exists() else ids
        for k, mask in tracks.items():
            mask[t] = rle.encode((ids == k)[None])[0]
    found = tuple(Track(k, mask) for k, mask in tracks.items())
    return VideoResult("vos", video.size, len(video.images), found)


def test_the_truth_of_own_tracks_scores_one(tracks, tmp_path):
    own, roots, videos = opened(tracks)
    assert own.name == "my_val"
    assert all(image.is_file() for video in videos for image in video.images)
    submit(own, videos, tmp_path / "out")
    assert own.score(tmp_path / "out", roots.truth, "all")["AP"] == pytest.approx(1)
    only = own.score(tmp_path / "out", roots.truth, "all", [videos[1].name])
    assert only["AP"] == pytest.approx(1)
    ids = {entry["id"] for entry in json.loads(tracks.read_text())["categories"]}
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert {each["category_id"] for each in results} <= ids


def test_own_tracks_without_a_truth_can_be_inferred(tracks):
    edit(tracks, ["annotations"], lambda _: None)
    assert opened(tracks)[1].truth is None


def test_frames_of_own_tracks_may_be_elsewhere(tracks, tmp_path):
    elsewhere = shutil.move(tmp_path / "images", tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"my_val\.json: .* not found; looked in"):
        opened(tracks)
    own = own_benchmark(tracks, elsewhere)
    assert own.find(tracks, "all").images == elsewhere


def as_images(tree):
    tree["images"] = tree.pop("videos")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (as_images, "lists images; only videos are scored"),
        (lambda tree: tree.pop("categories"), "has no 'categories'"),
        (lambda tree: tree.pop("videos"), "has no 'videos'"),
        (lambda tree: tree.update(videos=[]), "videos: expected videos, got none"),
        (lambda tree: tree["categories"].append({"id": 99, "name": "thing 3"}), "two are called 'thing 3'"),
        (lambda tree: tree["annotations"][0].update(category_id=1), "category 1 is unknown"),
    ],
)
def test_files_that_cannot_be_scored_are_refused(tracks, change, message):
    edit(tracks, ["categories", 0, "name"], "thing 3")
    edit(tracks, [], change)
    with pytest.raises(InputError, match=rf"my_val\.json: .*{message}"):
        opened(tracks)


def test_a_folder_is_no_truth_of_own_tracks(tracks, tmp_path):
    with pytest.raises(InputError, match=r"expected a file such as my_val\.json, not a folder"):
        own_benchmark(tracks).score(tmp_path, tmp_path, "all")


def test_the_truth_of_own_masks_scores_one(masks, tmp_path):
    own, roots, videos = opened(masks)
    assert [video.name for video in videos] == ["shapes-0", "shapes-1"]
    for video in videos:
        assert len(video.images) == FRAMES  # not only those with masks
        own.write(perfect_masks(video, masks / "masks"), video, tmp_path / "out")
    assert own.score(tmp_path / "out", roots.truth, "all")["J&F-Mean"] == 1
    numbers = own.score(tmp_path / "out", roots.truth, "all", ["shapes-1"])
    assert {name.split("/")[1] for name in numbers if name.startswith("per_")} == {"shapes-1_1", "shapes-1_2"}


def test_objects_are_given_at_the_first_mask_as_masks_and_as_points(masks):
    (masks / "masks/shapes-0/00000.png").unlink()
    video = opened(masks)[2][0]
    ids = read_ids(masks / "masks/shapes-0/00002.png")
    by_mask, by_point = ([r for r in video.references() if (r.mask is None) == (k == 1)] for k in (0, 1))
    assert [(r.id, r.frame) for r in by_mask] == [(r.id, r.frame) for r in by_point] == [(1, 2), (2, 2)]
    for with_mask, with_point in zip(by_mask, by_point, strict=True):
        assert torch.equal(with_mask.mask, torch.from_numpy(ids == with_mask.id))
        x, y = map(int, with_point.point)
        assert ids[y, x] == with_point.id


@pytest.mark.parametrize("names", [("frames", "masks"), ("JPEGImages/480p", "Annotations/480p")])
@pytest.mark.parametrize("is_one", [True, False])
def test_one_video_needs_no_folder_of_its_own(masks, tmp_path, names, is_one):
    root = tmp_path / "one"
    for name, kind in zip(names, ("frames", "masks"), strict=True):
        shutil.copytree(masks / kind / "shapes-0", root / name / ("" if is_one else "shapes-0"))
    own, roots, (video,) = opened(root)
    assert video.name == (names[1].split("/")[-1] if is_one else "shapes-0")
    own.write(perfect_masks(video, roots.truth), video, tmp_path / "out")
    assert own.score(tmp_path / "out", roots.truth, "all")["J&F-Mean"] == 1


def test_first_masks_alone_are_no_truth(masks):
    for path in masks.glob("masks/*/*[246].png"):
        path.unlink()
    own, roots, videos = opened(masks)
    assert roots.truth is None
    assert len(videos[0].images) == FRAMES


def test_masks_that_cannot_be_scored_are_refused(masks):
    folder = masks / "masks/shapes-1"
    first = folder / "00000.png"
    whole, palette = read_ids(first), voc_palette()

    def refused(message):
        with pytest.raises(InputError, match=message):
            opened(masks)

    first.write_bytes(encode_ids(np.where(whole == 1, 0, whole), palette))
    refused(r"shapes-1/00000\.png: gives the objects to follow: .* without a gap, got 2")
    first.write_bytes(encode_ids(np.zeros_like(whole), palette))
    refused(r"shapes-1/00000\.png: .* got none")
    first.write_bytes(encode_ids(whole, palette))
    (folder / "00002.png").rename(folder / "2.png")
    (masks / "frames/shapes-1/00002.jpg").rename(masks / "frames/shapes-1/2.jpg")
    (folder / "00004.png").rename(folder / "10.png")
    (masks / "frames/shapes-1/00004.jpg").rename(masks / "frames/shapes-1/10.jpg")
    refused("shapes-1: expected numbers of frames with leading zeros")
    for name in ("2", "10"):
        (folder / f"{name}.png").unlink()
    refused("shapes-1: expected at least 3 masks, .* got 2")


def test_a_folder_has_its_own_frames(masks):
    with pytest.raises(InputError, match="my_val: has its own frames; drop --images"):
        own_benchmark(masks, masks)
