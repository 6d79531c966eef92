"""Damaged files of every kind that users bring: they are read rightly, or refused in one line, soon.

A target writes sound files into a folder, and gives them with what reads them. A case damages one file. Cases
follow from seed, target and number: `--fuzz-seed`, `--fuzz-cases`.
"""

import json
import random

import cv2
import numpy as np
import pytest

from tarvis.config import load, read_yaml
from tarvis.data.synthetic import synthetic_clip
from tarvis.datasets.own import own_benchmark, read_own
from tarvis.datasets.vipseg import VIPSeg
from tarvis.datasets.youtube_vis import YOUTUBE_VIS_2021
from tarvis.demo.synthetic_benchmarks import make_benchmark
from tarvis.files import rle
from tarvis.files.pictures import encode_ids, read_ids, read_image, read_rgb, voc_palette
from tarvis.structures import Track, VideoResult
from tarvis.training.config import Config
from tarvis.video.frames import open_frames
from tarvis.video.references import read_masks, read_points
from tarvis.video.results import ResultFiles, read_results
from tests.tarvis.datasets.support import submit
from tests.tarvis.fuzz import damaged, mutated, read_or_refused

SIZE, FRAMES = (48, 64), 3
CLIP = synthetic_clip(1, FRAMES, SIZE, 3, come_and_go=False)
JUNK = [
    *(None, True, -1, 0, 1, 255, 2**31, 2**63, 10**30, -(10**20), 0.5, 96.0, 1e300),
    *(float("nan"), float("inf"), "", "x", "\x1b[31m", "../x", "/", "a\0b", "x" * 5000, "\ud800", "007"),
    *(
        "52N2",
        "PPPPPPPP",
        "1.png",
        [],
        [[]],
        [1, 2],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6]],
        [[["a"]]],
        [0, 0, 3072],
    ),
    *([-1, 3073], [None], {}, {"id": 1}),
    *({"size": [48, 64], "counts": [0, 0, 3072]}, {"size": [2**20, 2**20], "counts": "0"}),
]
YAML = [
    *("&a [*a]", "!!int x", "9" * 5000, "[" * 2000, "2020-01-01", "{<<: 1}", "- x", "1e9", "~", "'\x1b'"),
    *("&a x", "!!python/name:os.system", "0x" + "f" * 5000, "[1, [2, [3]]]", "{a: {b: c}}", "1:2:3", ".nan"),
]


def code(mask):
    return rle.to_json(rle.encode(mask[None])[0])


def frames(folder):
    folder.mkdir(parents=True)
    for t, frame in enumerate(CLIP.frames):
        cv2.imwrite(str(folder / f"{t:05d}.png"), frame[..., ::-1])
    return folder


def masks(folder):
    folder.mkdir(parents=True)
    for t in range(FRAMES):
        (folder / f"{t:05d}.png").write_bytes(encode_ids(CLIP.instance[t].astype(np.uint8), voc_palette()))
    return folder


def own(root, kind):
    images = frames(root / "images/v")
    names = [f"v/{path.name}" for path in sorted(images.iterdir())]
    size = {"height": SIZE[0], "width": SIZE[1]}
    tree = {"categories": [{"id": k, "name": f"c{k}", "isthing": 1} for k in (1, 2)]}
    if kind == "images":
        tree["images"] = [{"id": k, "file_name": name, **size} for k, name in enumerate(names)]
        shown = [code(CLIP.instance[0] == 1), [[5, 5, 30, 5, 30, 30]], {"size": SIZE, "counts": [9, 9, 3054]}]
        tree["annotations"] = [
            {"id": k, "image_id": k, "category_id": 1, "iscrowd": 0, "segmentation": mask}
            for k, mask in enumerate(shown)
        ]
    else:
        tree["videos"] = [{"id": 4, "length": FRAMES, "file_names": names, **size}]
        tree["annotations"] = [
            {"id": k, "video_id": 4, "category_id": k, "iscrowd": 0}
            | {"segmentations": [code(frame == k) for frame in CLIP.instance]}
            for k in (1, 2)
        ]
    path = root / "own.json"
    path.write_text(json.dumps(tree))

    def use():
        found = read_own(path)
        for image in found.images:
            image.read_map()
        for video in found.videos:
            for t in range(len(video.images)):
                video.truth.read(t)
        if kind == "videos":
            own_benchmark(path)

    return [path], use


def own_folder(root):
    frames(root / "frames")
    return [*masks(root / "masks").iterdir()], lambda: read_own(root)


def results(root, benchmark):
    make_benchmark(benchmark.name, root, num_videos=1, num_frames=3, num_objects=2, size=SIZE)
    roots = benchmark.find(root, "val")
    videos = benchmark.read(roots, "val")
    found = submit(benchmark, videos, root / "results")
    files = [*found.rglob("*.json"), *found.rglob("*.png"), roots.annotations]

    def use():
        benchmark.read(roots, "val")
        benchmark.score(found, roots.truth, "val")
        benchmark.check(found, videos, "val")

    return files, use


def points(root):
    source, path = open_frames(frames(root / "frames")), root / "points.json"
    path.write_text(json.dumps([{"id": k, "frame": 0, "x": 9 * k, "y": 9.5} for k in (1, 2)]))
    return [path], lambda: read_points(path, source)


def given_masks(root):
    source, folder = open_frames(frames(root / "frames")), masks(root / "masks")
    first = folder / "00000.png"
    return [first], lambda: (read_masks([folder], source), read_masks([f"1@00000={first}"], source))


def tracks(root):
    found = VideoResult("vos", SIZE, FRAMES, perfect_tracks())
    with ResultFiles(found, root, names=[str(t) for t in range(FRAMES)]) as files:
        for t in range(FRAMES):
            files.add(t)
    return [root / "tracks.json", *root.rglob("*.png")], lambda: read_results(root)


def perfect_tracks():
    return tuple(
        Track(k, {t: rle.encode((CLIP.instance[t] == k)[None])[0] for t in range(FRAMES)}) for k in (1, 2)
    )


def images(root):
    files = []
    for suffix in ("jpg", "png", "bmp", "webp", "tif"):
        files.append(root / f"a.{suffix}")
        cv2.imwrite(str(files[-1]), CLIP.frames[0])
    ids = root / "ids.png"
    ids.write_bytes(encode_ids(CLIP.instance[0].astype(np.uint16), voc_palette()))

    def use():
        for path in files:
            read_image(path)
        read_rgb(root / "a.png")
        read_ids(ids)

    return [*files, ids], use


def videos(root):
    files = [root / "a.mp4", root / "a.avi"]
    for path, fourcc in zip(files, ("mp4v", "MJPG"), strict=True):
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*fourcc), 12, SIZE[::-1])
        for frame in CLIP.frames:
            writer.write(frame)
        writer.release()
    return files, lambda: [list(open_frames(path)) for path in files]


def settings(root):
    path = root / "c.yaml"
    model = "model: {backbone: swin_tiny, neck_layers: 2}"
    path.write_text(f"{model}\ndata:\n  train: [synthetic]\noptim:\n  lr: 5e-5\n")
    return [path], lambda: (load(Config, path), read_yaml(path))


TARGETS = {
    "images of own data": lambda root: own(root, "images"),
    "videos of own data": lambda root: own(root, "videos"),
    "folders of own data": own_folder,
    "results of YouTube-VIS": lambda root: results(root, YOUTUBE_VIS_2021),
    "results of VIPSeg": lambda root: results(root, VIPSeg()),
    "points": points,
    "masks": given_masks,
    "tracks": tracks,
    "images": images,
    "videos": videos,
    "settings": settings,
}


def damage(path, rng):
    """Damage a file in a way of its kind."""
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.9:
        path.write_text(json.dumps(mutated(json.loads(data), rng, rng.choice(JUNK))))
    elif path.suffix == ".yaml" and rng.random() < 0.7:
        words = data.decode().split(" ")
        words[rng.randrange(len(words))] = rng.choice(YAML)
        path.write_text(" ".join(words))
    else:
        path.write_bytes(damaged(data, rng))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_damaged_files_are_read_rightly_or_refused(target, tmp_path, request):
    files, use = TARGETS[target](tmp_path)
    use()
    for case in range(request.config.getoption("--fuzz-cases")):
        what = f"{target}, seed {request.config.getoption('--fuzz-seed')}, case {case}"
        rng = random.Random(what)
        path = rng.choice(files)
        sound = path.read_bytes()
        try:
            damage(path, rng)
            read_or_refused(use, f"{what}: {path.name}")
        finally:
            path.write_bytes(sound)


@pytest.mark.slow
def test_settings_of_the_command_line_are_taken_or_refused(request):
    keys = ["model.backbone", "model.class_sets", "optim.steps", "optim.lr", "data.train", "data.sets.x"]
    for case in range(request.config.getoption("--fuzz-cases")):
        what = f"settings, seed {request.config.getoption('--fuzz-seed')}, case {case}"
        rng = random.Random(what)
        value = rng.choice([*YAML, *map(str, JUNK)])
        item = "".join((rng.choice(keys), rng.choice(["=", "=", "=", "", ".a="]), value))
        read_or_refused(lambda: load(Config, None, [item]), f"{what}: {item[:80]!r}")  # noqa: B023
