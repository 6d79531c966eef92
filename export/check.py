"""Compare folders of graphs with the weights they were made from.

    python -m export.check graphs --weights weights.pth
    python -m export.check graphs engines --weights weights.pth --video video.mp4 --device cuda

First what must be the weights' bit for bit: the constants of queries, and the tensors of graphs where they
can be read (not in engines). Then per output the largest and the mean difference from PyTorch in float32,
each graph fed what PyTorch feeds it; then the masks of two clips, end to end. The table goes to stderr, one
JSON line to stdout. The exit status is 1 if something differs by more than its precision explains or nothing
could be compared, 2 if a folder could not be run. Frames come from --video, else from a synthetic clip;
objects to follow from --masks or --points, else from the synthetic clip or the middle of the frame.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarvis import cli, places
from tarvis.api import Model
from tarvis.config import InferenceConfig
from tarvis.data.synthetic import synthetic_clip
from tarvis.files import rle
from tarvis.model import TarVis
from tarvis.model.decoder import DecoderLayer
from tarvis.model.object_encoder import ObjectEncoder
from tarvis.model.weights import BUNDLED
from tarvis.operators import masked_attention, pack_bits
from tarvis.stitch.panoptic import decode_labels
from tarvis.stitch.resize import resize_frame, resize_mask
from tarvis.structures import (
    RLE,
    Features,
    InputError,
    Network,
    PointFeatures,
    Queries,
    Reference,
    VideoResult,
)
from tarvis.tasks import TASKS
from tarvis.video.frames import open_frames
from tarvis.video.references import read_masks, read_points
from tarvis.video.segmenter import VideoSegmenter

from .folder import divide, is_out_of_memory, load
from .graphs import ENCODED, FOUND, without_tf32
from .manifest import DTYPES, Manifest, difference
from .runner import Runner, decoder_inputs, open_runner

Frames = list[NDArray[np.uint8]]


class Tolerance(NamedTuple):
    """What a precision explains: of features, of the decoder's answers, and the least IoU of masks.

    Differences are relative to 1 + |value|.
    """

    features: float
    answers: float
    iou: float


TOLERANCES = {
    "fp32": Tolerance(1e-4, 2e-3, 0.999),
    "fp16": Tolerance(3e-2, 1e-1, 0.98),
    "bf16": Tolerance(2e-1, 5e-1, 0.95),
}

Bits = Callable[[Mapping[str, Tensor]], list[Tensor]]
"""Inputs of the decoder's graph -> which keys each query sees in every layer, bool [B, Q, N]."""


@dataclass(frozen=True)
class Row:
    """One line of the table. `limit` is None for what is reported and not judged."""

    output: str
    largest: float
    mean: float
    limit: float | None
    is_within: bool
    note: str = ""
    folder: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.guarded(lambda: check_all(args))


def check_all(args: argparse.Namespace) -> int:
    """Compare all folders and print the table; returns the exit status."""
    rows: list[Row] = []
    errors: dict[str, None] = {}  # in order, and each once
    for folder in args.folders:
        try:
            rows += check(folder, args)
        except (InputError, OSError) as error:
            errors[str(error)] = None
        except (MemoryError, RuntimeError) as error:
            reason = "out of memory" if is_out_of_memory(error) else " ".join(str(error).split())[:400]
            errors[f"{folder}: {reason or type(error).__name__}"] = None
    passed = not errors and all(row.is_within for row in rows)
    if rows:
        print(table(rows), file=sys.stderr)
        print(json.dumps({"passed": passed, "rows": [dataclasses.asdict(row) for row in rows]}))
    for message in errors:
        print(f"error: {message}", file=sys.stderr)
    return 2 if errors else int(not passed)


def parser() -> argparse.ArgumentParser:
    p = cli.command("export.check", __doc__)
    p.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders with a manifest.json")
    p.add_argument(
        "--weights", default=BUNDLED, type=places.weights, help=f"made into the graphs: {cli.WEIGHTS}"
    )
    cli.add_reading(p)
    p.add_argument("--video", metavar="INPUT", help="a video file, a folder of images, or a quoted glob")
    p.add_argument("--masks", nargs="+", default=(), metavar="PNG", help="vos: as in tarvis.infer")
    p.add_argument("--points", type=Path, metavar="JSON", help="pet: as in tarvis.infer")
    feed = "ONNX: PyTorch's masks are made with the graph's attention bits"
    p.add_argument("--feed-bits", action="store_true", help=feed)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, .. (default: auto)")
    return p


def check(folder: Path, args: argparse.Namespace) -> list[Row]:
    """All rows of one folder."""
    runner = open_runner(folder, device=args.device, trust=args.trust)
    model, config = load(args.weights, args.config, trust=args.trust)
    runner.manifest.require_weights(model.state_dict(), config)
    constants = list(compare_constants(model, runner))
    model.eval().requires_grad_(False).to(runner.device)
    frames, references = video(runner.manifest, args)
    bits = attention_bits(runner)
    fed_bits = bits if args.feed_bits else None
    with without_tf32():
        rows = [
            *constants,
            *compare_outputs(model, runner, frames, references, bits),
            *compare_masks(model, runner, frames, references, fed_bits, judged=bits is not None),
        ]
    return [dataclasses.replace(row, folder=folder.name) for row in rows]


def attention_bits(runner: Runner) -> Bits | None:
    """How to get at the bits inside the decoder's graph, where the runtime tells them."""
    if runner.manifest.precision == "bf16":  # NumPy, which carries a graph's tensors, has no such type
        return None
    return getattr(runner.graphs["decoder"], "attention_bits", None)


def settings(manifest: Manifest) -> InferenceConfig:
    """Clips of the graphs' length, or another where it is free, that overlap by half; frames as they come."""
    length = manifest.frames
    if "frames" in manifest.dynamic and length > 1:
        length -= 1  # engines may take no more
    return InferenceConfig(length, length // 2, max_tracks_per_clip=20)


def video(manifest: Manifest, args: argparse.Namespace) -> tuple[Frames, list[Reference]]:
    """Frames of two clips at the manifest's size, and what to follow in them."""
    clips = settings(manifest)
    needed = 2 * clips.clip_length - clips.overlap
    if args.video is None:
        clip = synthetic_clip(0, needed, manifest.size, come_and_go=False)
        shown = [(i, torch.from_numpy(clip.instance[0] == i)) for i in clip.classes]
        return list(clip.frames), given(manifest, [(i, mask) for i, mask in shown if mask.any()])
    source = open_frames(args.video, limit=needed)
    frames = [resize_frame(frame, manifest.size) for frame in islice(source, needed)]
    if len(frames) < needed:  # one clip, then, or the graphs will say what they take
        frames = frames[: clips.clip_length]
    references = read_masks(args.masks, source) if args.masks else []
    if args.points is not None:
        references += read_points(args.points, source)
    height, width = manifest.size
    if not references:
        middle = torch.zeros(height, width, dtype=torch.bool)
        middle[height // 4 : -(height // 4), width // 4 : -(width // 4)] = True
        return frames, given(manifest, [(1, middle)])
    for i, reference in enumerate(references):
        if reference.mask is not None:
            references[i] = dataclasses.replace(reference, mask=resize_mask(reference.mask, manifest.size))
        elif reference.point is not None:
            x, y = (
                min(int((n + 0.5) * new / old), new - 1)
                for n, new, old in zip(reference.point, (width, height), source.size[::-1], strict=True)
            )
            references[i] = dataclasses.replace(reference, point=(x, y))
    return frames, TASKS[manifest.task].targets(references)


def given(manifest: Manifest, objects: Sequence[tuple[int, Tensor]]) -> list[Reference]:
    """References at frame 0 for objects (id, mask): the masks or a point in each, as the task wants."""
    references = []
    for i, mask in objects:
        pixels = mask.nonzero()
        y, x = pixels[len(pixels) // 2].tolist()
        references += [Reference(i, 0, mask=mask), Reference(i, 0, point=(x, y))]
    return TASKS[manifest.task].targets(references)


def compare_constants(model: TarVis, runner: Runner) -> Iterator[Row]:
    """Rows of what depends on no video, which must be the same bit for bit: one wrong number in a graph may
    change outputs by less than rounding does."""
    manifest = runner.manifest
    device = manifest.target.get("device", "cpu")  # that graphs were traced on
    parts, constants, groups = divide(
        model, manifest.class_set, manifest, device=device, plain=device == "cpu"
    )
    largest, note = difference(constants, runner.constants)
    if groups != manifest.groups:
        largest, note = math.inf, f"groups {manifest.groups}, not {groups}"
    yield Row("constants", largest, largest, 0, not note, note)
    for name, graph in parts.items():
        differences = getattr(runner.graphs[name], "differences", None)
        if differences is None:
            yield Row(f"tensors ({name})", 0, 0, None, True, "cannot be read, not compared")
            continue
        for kind, largest, note in differences(graph, manifest):
            yield Row(f"{kind} ({name})", largest, largest, 0, not note, note)


@torch.inference_mode()
def compare_outputs(
    model: TarVis, runner: Runner, frames: Frames, references: Sequence[Reference], bits: Bits | None
) -> Iterator[Row]:
    """Rows of the graphs' outputs on the first clip; what comes before a graph is PyTorch's on both sides."""
    manifest = runner.manifest
    limit, dtype = TOLERANCES[manifest.precision].features, DTYPES[manifest.precision]
    clip = torch.from_numpy(np.stack(frames[: settings(manifest).clip_length]))
    clip = clip.permute(0, 3, 1, 2)[None].to(runner.device)  # [1, T, 3, H, W]
    ours, theirs = model.encode(clip), runner.encode(clip)
    yield from compare_all(
        ENCODED, (*ours.memory, ours.mask_features), (*theirs.memory, theirs.mask_features), limit
    )
    coarse, middle, fine, mask_features = (x.to(dtype) for x in (*ours.memory, ours.mask_features))
    rounded = Features((coarse, middle, fine), mask_features)
    if manifest.class_set is None:
        masks, points = shown_objects(ours, references, manifest)
        halves = None if points is None else PointFeatures(*(x.to(dtype) for x in points))
        expected = model.object_encoder(ours.mask_features[0, :1], masks, points)
        found = runner.object_encoder(rounded.mask_features[0, :1], masks, halves)
        yield from compare_all(FOUND, expected, found, limit)
        queries = model.queries.objects(*(x[None] for x in expected))
        asked = runner.queries.objects(*(x[None].to(dtype) for x in expected))
    else:
        queries, asked = model.queries.classes(manifest.class_set), runner.queries.classes(manifest.class_set)
    yield from compare_answers(model, runner, (ours, queries), (rounded, asked), bits)


def compare_answers(
    model: TarVis,
    runner: Runner,
    ours: tuple[Features, Queries],
    theirs: tuple[Features, Queries],
    bits: Bits | None,
) -> Iterator[Row]:
    """Rows of the decoder.

    An attention logit near zero may get another sign by rounding, and the query then sees another set of
    keys, which can move all queries. So PyTorch gets the graph's bits here, where they can be had; without
    them the answers are reported and not judged.
    """
    limit = None
    b = runner.decode(*theirs)
    if bits is None:
        a = model.decode(*ours)
    else:
        limit = TOLERANCES[runner.manifest.precision].answers
        with fed(model, bits(decoder_inputs(*theirs))) as turned:
            a = model.decode(*ours)
        flipped = torch.cat(turned)
        largest, mean = (flipped.max().item(), flipped.mean().item()) if len(flipped) else (0.0, 0.0)
        yield Row("attention bits", largest, mean, limit, largest <= limit, f"{len(flipped)} flip")
    if a.class_logits is not None and b.class_logits is not None:
        yield compare("class_logits", a.class_logits, b.class_logits, limit)
    elif a.class_logits is not None or b.class_logits is not None:
        note = "missing" if b.class_logits is None else "not the network's"
        yield Row("class_logits", math.inf, math.inf, limit, False, note)
    for group in a.groups:
        if not group.startswith("background"):
            yield compare(f"mask_logits ({group})", a.mask_logits(group), b.mask_logits(group), limit)


def shown_objects(
    features: Features, references: Sequence[Reference], manifest: Manifest
) -> tuple[Tensor, PointFeatures | None]:
    """What the object encoder is given of references at frame 0."""
    (height, width), device = manifest.padded, features.mask_features.device
    masks = [r.mask for r in references if r.mask is not None and r.frame == 0]
    shown = torch.zeros(len(masks), 1, height, width, dtype=torch.bool, device=device)
    for row, mask in zip(shown, masks, strict=True):
        row[0, : manifest.size[0], : manifest.size[1]] = mask.to(device)
    places = [r.point for r in references if r.point is not None and r.frame == 0]
    if not places:
        return shown, None
    yx = torch.tensor([((y + 0.5) / height, (x + 0.5) / width) for x, y in places], device=device)
    frame = torch.zeros(len(places), dtype=torch.long, device=device)
    return shown, ObjectEncoder.look_up(features, frame, yx)


def compare_all(
    names: Sequence[str], expected: Sequence[Tensor], got: Sequence[Tensor], limit: float
) -> Iterator[Row]:
    for name, a, b in zip(names, expected, got, strict=True):
        yield compare(name, a, b, limit)


def compare(name: str, expected: Tensor, got: Tensor, limit: float | None) -> Row:
    """How far two tensors are apart, relative to 1 + |expected|."""
    if expected.shape != got.shape:
        return Row(name, math.inf, math.inf, limit, False, f"{list(got.shape)}")
    difference = (got.float() - expected).abs() / (1 + expected.abs())
    largest, mean = difference.max().item(), difference.mean().item()
    is_finite = bool(got.isfinite().all()) and bool(expected.isfinite().all())
    is_within = is_finite and (limit is None or largest <= limit)
    return Row(name, largest, mean, limit, is_within, "" if is_finite else "not finite")


@contextmanager
def fed(model: TarVis, bits: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The decoder sees these keys, layer by layer; gives |logit| of those whose bit that turns."""
    visible, turned = iter(bits), list[Tensor]()

    def attend(q: Tensor, keys: Tensor, values: Tensor, embedding: Tensor, mask_features: Tensor) -> Tensor:
        logits, seen = embedding @ mask_features, next(visible).to(q.device)
        turned.append(logits[(logits >= 0) != seen].abs())
        return masked_attention(q, keys, values, pack_bits(seen), seen.any(-1))

    layers = [layer for layer in model.modules() if isinstance(layer, DecoderLayer)]
    for layer in layers:
        layer.attend = attend  # type: ignore[method-assign]
    try:
        yield turned
    finally:
        for layer in layers:
            del layer.attend


def compare_masks(
    model: TarVis,
    runner: Runner,
    frames: Frames,
    references: Sequence[Reference],
    bits: Bits | None = None,
    *,
    judged: bool = True,
) -> Iterator[Row]:
    """Rows of final masks, end to end: intersection over union of all masks of all frames.

    With `bits` PyTorch sees the keys that the graph sees, clip by clip; without them, a bit that rounding
    turns counts. Where the decoder's answers were not `judged`, the comparison must contain masks, or at
    least two classes, to be meaningful.
    """
    limit, kept = TOLERANCES[runner.manifest.precision].iou, list[Tensor]()
    asked = runner
    if bits is not None:

        def keep_bits(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            kept.extend(bits(inputs))
            return runner.graphs["decoder"](inputs)

        asked = copy.copy(runner)
        asked.graphs = {**runner.graphs, "decoder": keep_bits}
    theirs = segment(asked, runner.manifest, frames, references)
    with fed(model, kept) if bits is not None else nullcontext(list[Tensor]()) as turned:
        ours = segment(model, runner.manifest, frames, references)
    shared, joined, worst = overlap(ours, theirs)
    iou = shared / joined if joined else 1.0
    note = f"{len(ours.tracks)} tracks of {joined:.0f} pixels, the worst {worst:.4f}"
    if bits is not None:
        note += f"; bits fed, {sum(map(len, turned))} flip"
    stuff, found = (
        {frame: decode_labels(labels) for frame, labels in result.stuff.items()} for result in (ours, theirs)
    )
    can_tell = bool(joined) or judged or any(np.ptp(labels) for labels in stuff.values())
    if not can_tell:
        note += "; nothing to compare: give a --video with objects that the weights find"
    yield Row("masks, 1 - IoU", 1 - iou, 1 - iou, 1 - limit, can_tell and iou >= limit, note)
    if stuff or found:
        differing, note = 1.0, f"of {len(found)} frames, not of {len(stuff)}"
        if stuff.keys() == found.keys():
            differing, note = float(np.mean([np.mean(stuff[t] != found[t]) for t in stuff])), ""
        yield Row("stuff, pixels", differing, differing, 1 - limit, differing <= 1 - limit, note)


def segment(
    model: Network, manifest: Manifest, frames: Frames, references: Sequence[Reference]
) -> VideoResult:
    classes = None
    if manifest.class_set is not None:
        known = Model(model, manifest.model, device=model.device)
        classes = known.classes([manifest.task], manifest.class_set)
    segmenter = VideoSegmenter(
        model, [manifest.task], classes=classes, references=references, settings=settings(manifest)
    )
    segmenter.step(frames)
    return segmenter.finish()[manifest.task]


def overlap(ours: VideoResult, theirs: VideoResult) -> tuple[float, float, float]:
    """Pixels in both and in either, over all tracks, and the least IoU of a track with its counterpart."""
    shared = joined = 0.0
    worst = 1.0
    left = list(theirs.tracks)
    for track in ours.tracks:
        found = [(*pixels(track.masks, other.masks), other) for other in left if other.label == track.label]
        alone = (*pixels(track.masks, {}), None)
        both, either, other = max(found, key=lambda pair: pair[0] / max(pair[1], 1), default=alone)
        if other is not None:
            left.remove(other)
        shared, joined = shared + both, joined + either
        worst = min(worst, both / either if either else 1.0)
    joined += sum(pixels(track.masks, {})[1] for track in left)  # what the network has not found
    return shared, joined, 0.0 if left else worst


def pixels(masks: Mapping[int, RLE], others: Mapping[int, RLE]) -> tuple[float, float]:
    """Number of pixels in both and in either of two tracks, over all frames."""
    shown = masks.keys() & others.keys()
    both = sum(float(rle.shared_pixels([masks[t]], [others[t]])[0, 0]) for t in shown)
    return both, sum(rle.area(mask) for mask in (*masks.values(), *others.values())) - both


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'folder':16} {'output':24} {'largest':>9} {'mean':>9} {'limit':>8}"]
    for row in rows:
        limit = "-" if row.limit is None else f"{row.limit:.1e}"
        verdict = "ok" if row.is_within else "DIFFERS"
        lines.append(
            f"{row.folder:16} {row.output:24} {row.largest:9.1e} {row.mean:9.1e} {limit:>8}  {verdict}"
            + (f" ({row.note})" if row.note else "")
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
