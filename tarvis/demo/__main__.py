"""The main job end to end, from nothing: fit a tiny network, segment its clips with all four tasks.

    python -m tarvis.demo --out demo

No trained weights can be bundled yet, so the demo makes synthetic clips (moving, textured shapes), fits
`configs/tiny.yaml` to them for a minute on the CPU, and runs `tarvis.infer` for VIS, VPS, VOS and PET. Then
it writes the clips as the seven benchmarks would have them, and runs `tarvis.evaluate` on each.

It prints how well the masks fit, and each benchmark's number beside that of perfect predictions; it fails if
VOS or PET fall below J = 0.5, or if a benchmark's number is 0. Numbers on fitted clips say that the parts
work together; they say nothing about accuracy on videos the network has not seen.
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

from tarvis import infer, rle
from tarvis.training.config import load_config
from tarvis.data.frames import open_frames
from tarvis.data.synthetic import SyntheticClip, synthetic_clip
from tarvis.datasets.benchmarks import BENCHMARKS
from tarvis.datasets.pictures import voc_palette
from tarvis.demo.benchmarks import score_benchmarks
from tarvis.demo.fit import fit
from tarvis.model import TarVis
from tarvis.model.weights import save_weights
from tarvis.panoptic import decode_labels
from tarvis.png import encode_ids
from tarvis.results import SavedResult, read_results, staged
from tarvis.structures import InputError
from tarvis.visualize import contact_sheet

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
NUM_CLIPS, NUM_FRAMES = 2, 12
REQUIRED = {"vos": 0.5, "pet": 0.5}
"""Least mean J over the objects of all clips."""


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        "python -m tarvis.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, default=Path("demo"), help="folder to make (default: demo)")
    p.add_argument(
        "--steps", type=int, default=150, help="of fitting (default: 150, about 75 s on two cores)"
    )
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    if args.steps < 1 or args.seed < 0:
        p.error("--steps must be at least 1 and --seed at least 0")
    clips = [synthetic_clip(args.seed + i, NUM_FRAMES, come_and_go=False) for i in range(NUM_CLIPS)]
    try:
        with staged(args.out, overwrite=True) as folder:
            weights = folder / "tiny.safetensors"
            config = load_config(CONFIG).model
            save_weights(weights, fit_clips(clips, args.steps, args.seed).state_dict(), config)
            values: dict[str, list[float]] = {task: [] for task in SCORES}
            for index, clip in enumerate(clips):
                for task, result in segment(clip, folder, str(index), weights).items():
                    values[task].append(SCORES[task](clip, result))
            cv2.imwrite(str(folder / "tasks.png"), cv2.cvtColor(side_by_side(folder, "0"), cv2.COLOR_RGB2BGR))
            size = clips[0].frames.shape[1], clips[0].frames.shape[2]
            benchmarks = score_benchmarks(
                weights, folder / "benchmarks", seed=args.seed, num_videos=NUM_CLIPS, size=size
            )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    scores = {task: round(float(np.mean(of_clips)), 3) for task, of_clips in values.items()}
    for task, score in scores.items():
        print(
            f"{task}  {MEANING[task]} {score:.3f}  {args.out / f'{task}-*' / 'overlay.mp4'}", file=sys.stderr
        )
    print(f"all four tasks on one clip: {args.out / 'tasks.png'}", file=sys.stderr)
    for name, (found, perfect) in benchmarks.items():
        headline = BENCHMARKS[name].headline
        print(f"{name:<16}  {headline:<8}  {found:8.3f}  perfect {perfect:7.3f}", file=sys.stderr)
    summary = {name: {BENCHMARKS[name].headline: round(found, 4)} for name, (found, _) in benchmarks.items()}
    print(json.dumps({"out": str(args.out), "scores": scores, "benchmarks": summary}))
    failed = [task for task, least in REQUIRED.items() if scores[task] < least]
    if failed:
        print(f"error: {', '.join(failed)} below J = {max(REQUIRED.values())}", file=sys.stderr)
    nothing = [name for name, (found, _) in benchmarks.items() if found <= 0]
    if nothing:
        print(f"error: {', '.join(nothing)}: the score is 0", file=sys.stderr)
    return 1 if failed or nothing else 0


def fit_clips(clips: Sequence[SyntheticClip], steps: int, seed: int) -> TarVis:
    """Fit the tiny network behind a progress bar."""
    with tqdm(total=steps, desc="fitting a tiny network", unit="step", file=sys.stderr) as bar:

        def report(_: int, loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.1f}", refresh=False)
            bar.update()

        return fit(load_config(CONFIG).model, clips, steps=steps, seed=seed, report=report)


def segment(clip: SyntheticClip, folder: Path, name: str, weights: Path) -> dict[str, SavedResult]:
    """Write a clip as a user would have it, run every task on it, read the results back."""
    video = folder / f"clip-{name}"
    video.mkdir()
    for t, frame in enumerate(clip.frames):
        cv2.imwrite(str(video / f"{t:05d}.png"), cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    mask, points = folder / f"mask-{name}.png", folder / f"points-{name}.json"
    mask.write_bytes(encode_ids(clip.instance[0], voc_palette()))
    points.write_text(json.dumps([centre(i, clip.instance[0] == i) for i in clip.classes]))
    results = {}
    for task in SCORES:
        out = folder / f"{task}-{name}"
        given = {"vos": ["--masks", str(mask)], "pet": ["--points", str(points)]}.get(task, [])
        common = ["--weights", str(weights), "--dataset", "synthetic", "--out", str(out)]
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
    """Mean J over objects and over all frames but the first, where the object was given (VOS, PET)."""
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


SCORES = {"vis": score_tracks, "vps": score_classes, "vos": score_objects, "pet": score_objects}
MEANING = {
    "vis": "IoU of the best track of the right class:",
    "vps": "mean IoU of classes:                     ",
    "vos": "mean J of objects given by masks:        ",
    "pet": "mean J of objects given by points:       ",
}

if __name__ == "__main__":
    sys.exit(main())
