"""The main job end to end: the network that comes with the package, on videos that it has not seen.

    python -m tarvis.demo --out demo

`tarvis.infer` follows a dog and a woman, given by a point each, through a real video. It then segments
generated clips of moving, textured shapes for VIS, VPS, VOS and PET. The clips are also written as the seven
benchmarks would have them, and `tarvis.evaluate` scores each, beside perfect predictions.

Prints a table and one JSON line; fails where a number is below what the network is known to reach.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tarvis import cli, evaluate, infer
from tarvis.data.synthetic import SyntheticClip, synthetic_clip
from tarvis.datasets.registry import BENCHMARKS
from tarvis.demo.synthetic_benchmarks import class_map, make_benchmark, perfect_result
from tarvis.distributed import World
from tarvis.files import rle
from tarvis.files.atomic import write_json
from tarvis.files.outputs import whole_folder
from tarvis.files.pictures import encode_ids, encode_rgb, voc_palette
from tarvis.model.weights import BUNDLED
from tarvis.stitch.panoptic import decode_labels
from tarvis.structures import Size
from tarvis.video.frames import open_frames
from tarvis.video.results import SavedResult, read_results
from tarvis.video.visualize import contact_sheet

SEED = 1_000_000
"""Of the first clip; training has seen those below 100 000."""
NUM_CLIPS, NUM_FRAMES = 2, 12
CLASS_SET = "synthetic"
ASSETS = BUNDLED.parent
GIVEN = ({"id": 1, "frame": 0, "x": 222, "y": 158}, {"id": 2, "frame": 0, "x": 118, "y": 128})
"""A point on the dog and one on the woman of assets/dog.mp4."""
SEVEN = ("youtube_vis_2021", "ovis", "cityscapes_vps", "kitti_step", "vipseg", "davis", "burst")
REQUIRED = {
    "vis": 0.5,
    "vps": 0.5,
    "vos": 0.8,
    "pet": 0.7,
    "youtube_vis_2021": 0.5,
    "ovis": 0.5,
    "cityscapes_vps": 50.0,
    "kitti_step": 0.6,
    "vipseg": 50.0,
    "davis": 0.8,
    "burst": 50.0,
}
"""Least score of a task, of a benchmark."""


def main(argv: Sequence[str] | None = None) -> int:
    p = cli.command("tarvis.demo", __doc__)
    p.add_argument("--out", type=Path, default=Path("demo"), help="folder to make (default: demo)")
    p.add_argument("--weights", type=Path, help="others that know the classes `synthetic`")
    p.add_argument("--seed", type=int, default=SEED, help=f"of the first clip (default: {SEED})")
    args = p.parse_args(argv)
    if args.seed < 0:
        p.error("--seed must be at least 0")
    return cli.guarded(lambda: demo(args))


def demo(args: argparse.Namespace) -> int:
    """Make the folder and print its table; returns the exit status."""
    clips = [synthetic_clip(args.seed + i, NUM_FRAMES, come_and_go=False) for i in range(NUM_CLIPS)]
    size = clips[0].frames.shape[1], clips[0].frames.shape[2]
    with whole_folder(args.out, overwrite=True) as folder:
        weights = args.weights or BUNDLED
        follow(folder, weights)
        tasks = score_tasks(clips, folder, weights)
        picture = side_by_side(folder, "0")
        (folder / "tasks.png").write_bytes(encode_rgb(picture))
        benchmarks = score_benchmarks(
            weights, folder / "benchmarks", seed=args.seed, num_videos=NUM_CLIPS, size=size
        )
    for task, score in tasks.items():
        print(f"{task:<16}  {MEANING[task]:<16}  {score:8.3f}", file=sys.stderr)
    for name, (score, perfect) in benchmarks.items():
        headline = BENCHMARKS[name].headline
        print(f"{name:<16}  {headline:<16}  {score:8.3f}  perfect {perfect:7.3f}", file=sys.stderr)
    seen = ("dog/overlay.mp4", "tasks.png", "*-*/overlay.mp4")
    print(f"to look at: {', '.join(str(args.out / name) for name in seen)}", file=sys.stderr)
    print(f"to point at things yourself: {sys.executable} -m tarvis.web", file=sys.stderr)
    scores = tasks | {name: score for name, (score, _) in benchmarks.items()}
    print(json.dumps({"out": str(args.out), "scores": {name: round(x, 4) for name, x in scores.items()}}))
    failed = [name for name, least in REQUIRED.items() if not scores[name] >= least]
    for name in failed:
        print(f"error: {name}: {scores[name]:.3f} is below {REQUIRED[name]}", file=sys.stderr)
    return 1 if failed else 0


def follow(folder: Path, weights: Path) -> None:
    """Follow two objects of a real video; the masks and pictures are in `folder/dog`."""
    points = folder / "points-dog.json"
    write_json(points, list(GIVEN))
    argv = [str(ASSETS / "dog.mp4"), "--task", "pet", "--points", str(points), "--out", str(folder / "dog")]
    infer.infer(infer.parser().parse_args([*argv, "--weights", str(weights)]))


def score_tasks(clips: Sequence[SyntheticClip], folder: Path, weights: Path) -> dict[str, float]:
    """The mean score of each task over the clips, which are segmented in `folder`."""
    values: dict[str, list[float]] = {task: [] for task in SCORES}
    for index, clip in enumerate(clips):
        for task, found in segment(clip, folder, str(index), weights).items():
            values[task].append(SCORES[task](clip, found))
    return {task: float(np.mean(of_clips)) for task, of_clips in values.items()}


def segment(clip: SyntheticClip, folder: Path, name: str, weights: Path) -> dict[str, SavedResult]:
    """Write a clip as a user would have it, run every task on it, read the results back."""
    video = folder / f"clip-{name}"
    video.mkdir()
    for t, frame in enumerate(clip.frames):
        (video / f"{t:05d}.png").write_bytes(encode_rgb(frame))
    mask, points = folder / f"mask-{name}.png", folder / f"points-{name}.json"
    mask.write_bytes(encode_ids(clip.instance[0], voc_palette()))
    points.write_text(json.dumps([centre(i, clip.instance[0] == i) for i in clip.classes]))
    results = {}
    for task in SCORES:
        out = folder / f"{task}-{name}"
        given = {"vos": ["--masks", str(mask)], "pet": ["--points", str(points)]}.get(task, [])
        common = ["--weights", str(weights), "--dataset", CLASS_SET, "--min-size", "0"]
        common += ["--out", str(out)]
        infer.infer(infer.parser().parse_args([str(video), "--task", task, *common, *given]))
        results[task] = read_results(out)
    return results


def centre(id_: int, mask: NDArray[np.bool_]) -> dict[str, int]:
    """The pixel farthest from the object's border, as a user would click it."""
    distance = cv2.distanceTransform(np.pad(mask, 1).view(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), mask.shape)
    return {"id": id_, "frame": 0, "x": int(x), "y": int(y)}


def side_by_side(folder: Path, name: str) -> NDArray[np.uint8]:
    """Some frames of one clip as each task saw it, a row a task."""
    shown = (0, 4, 8)
    pictures, titles = [], []
    for task in SCORES:
        frames = list(open_frames(folder / f"{task}-{name}" / "overlay.mp4"))
        pictures += [frames[t] for t in shown]
        titles += [f"{task}  frame {t}" for t in shown]
    return contact_sheet(pictures, columns=len(shown), titles=titles)


def iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def tube(found: SavedResult, track: int) -> NDArray[np.bool_]:
    """A track's masks [F, H, W]."""
    result = found.result
    masks = np.zeros((result.num_frames, *result.size), bool)
    for frame, mask in result.tracks[track].masks.items():
        masks[frame] = rle.decode(mask)
    return masks


def score_objects(clip: SyntheticClip, found: SavedResult) -> float:
    """Mean J over objects and over all frames after the first, where the object was given (VOS, PET)."""
    row = {track.id: i for i, track in enumerate(found.result.tracks)}
    values = []
    for i in clip.classes:
        masks = tube(found, row[i])
        values += [iou(masks[t], clip.instance[t] == i) for t in range(1, len(masks))]
    return float(np.mean(values))


def score_tracks(clip: SyntheticClip, found: SavedResult) -> float:
    """Mean over objects of the best IoU, over the whole clip, with a track of the object's class (VIS)."""
    values = []
    for i, label in clip.classes.items():
        same = [row for row, track in enumerate(found.result.tracks) if track.label == label]
        values.append(max((iou(tube(found, row), clip.instance == i) for row in same), default=0.0))
    return float(np.mean(values))


def score_classes(clip: SyntheticClip, found: SavedResult) -> float:
    """Mean IoU of the classes of the clip, things and stuff, over the whole clip (VPS)."""
    labels = np.stack([decode_labels(found.result.stuff[t]) for t in range(found.result.num_frames)])
    return float(np.mean([iou(labels == k, clip.semantic == k) for k in np.unique(clip.semantic)]))


def score_benchmarks(
    weights: Path, folder: Path, *, seed: int, num_videos: int, size: Size
) -> dict[str, tuple[float, float]]:
    """Make each benchmark in `folder`, infer and score it, score the truth itself: (found, perfect) by name.

    `weights` know the synthetic classes; their videos are those of the seeds from `seed` on.
    """
    found: dict[str, tuple[float, float]] = {}
    with tqdm(SEVEN, unit="benchmark", desc="scoring benchmarks") as bar:
        for name in bar:
            data = folder / name / "data"
            make_benchmark(name, data, seed=seed, num_videos=num_videos, size=size)
            argv = [name, "--data", str(data), "--out", str(folder / name / "run"), "--min-size", "0"]
            if names := class_map(name):
                write_json(data / "classes.json", {"class_set": CLASS_SET, "names": names})
                argv += ["--classes", str(data / "classes.json")]
            summary = evaluate.evaluate(
                evaluate.parser().parse_args([*argv, "--weights", str(weights)]), World()
            )
            found[name] = (
                summary["scores"][BENCHMARKS[name].headline],
                perfect_score(name, data, folder / name / "perfect"),
            )
    return found


def perfect_score(name: str, data: Path, folder: Path) -> float:
    """The headline of the truth, written and read back as a result."""
    benchmark = BENCHMARKS[name]
    split = benchmark.splits[0]
    roots = benchmark.find(data, split)
    videos = benchmark.read(roots, split)
    shares = [benchmark.write(perfect_result(name, data, video), video, folder) for video in videos]
    benchmark.join(shares, videos, split, folder)
    assert roots.truth is not None, name
    return benchmark.score(folder, roots.truth, split)[benchmark.headline]


SCORES = {"vis": score_tracks, "vps": score_classes, "vos": score_objects, "pet": score_objects}
MEANING = {"vis": "IoU of tracks", "vps": "IoU of classes", "vos": "J", "pet": "J"}

if __name__ == "__main__":
    sys.exit(main())
