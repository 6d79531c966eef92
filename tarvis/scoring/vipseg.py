"""VIPSeg: VPQ and STQ.

    results: folder of pred.json and pan_pred/<video>/<frame>.png
    truth:   folder of panoptic_gt_VIPSeg_{val,test,train}.json (one of them) and of
             panomasksRGB/<video>/<frame>.png; or that JSON file

Numbers: VPQ/{all,thing,stuff} in percent, the means over windows of 1, 2, 4 and 6 frames that papers quote;
VPQ_with_8/{all,thing,stuff}, the means over 1, 2, 4, 6 and 8 that the official script prints; STQ, AQ, IoU in
[0, 1]; <n>/{all,thing,stuff}/{pq,sq,rq,n} and <n>/per_class/<id>/... for each window;
per_sequence/<video>/{STQ,AQ,IoU,Length}. What has no class that occurs is left out.

For STQ an instance is the place of its id in the order of first listing in its video, from 0, as in the
official script: the segment that a video lists first counts as crowd if it is a thing.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tarvis.files.folders import chosen
from tarvis.files.records import Entry, read_json
from tarvis.metrics.overlaps import Overlaps
from tarvis.metrics.stq import INSTANCES, STQ, encode
from tarvis.metrics.vpq import VIPSEG_WINDOWS, VPQ, Segments, mean_over_windows
from tarvis.scoring.panoptic_files import Frame, read_categories, read_frame
from tarvis.structures import InputError

PAPER_WINDOWS = (1, 2, 4, 6)
NUM_CLASSES = 124
VOID = 255


def evaluate(results: Path, truth: Path, videos: Collection[str] | None = None) -> dict[str, float]:
    """The numbers of VIPSeg, of all videos or of those named."""
    path = _annotations(truth)
    root = read_json(path)
    is_thing = read_categories(root)
    if max(is_thing, default=0) >= NUM_CLASSES:
        raise root["categories"].error(f"expected ids below {NUM_CLASSES}, got {max(is_thing)}")
    annotations = by_video(root)
    predictions_root = read_json(results / "pred.json")
    predictions = by_video(predictions_root)

    vpq = VPQ(is_thing, VIPSEG_WINDOWS)
    stq = STQ(NUM_CLASSES, [k for k, thing in is_thing.items() if thing], VOID)
    entries = root["videos"].entries()
    names = [video["video_id"].path() for video in entries]
    wanted = set(chosen(names, videos, path))
    for name, video in zip(names, entries, strict=True):
        if name not in wanted:
            continue
        if name not in annotations:
            raise video["video_id"].error(f"video {name!r} has no annotations")
        if name not in predictions:
            raise predictions_root["annotations"].error(f"lacks video {name!r}")
        frames = annotations[name].entries()
        files = [image["file_name"].path() for image in video["images"].entries(len(frames), "images")]
        predicted = predictions[name].entries(len(frames), "frames, as the truth")
        true_instances, instances = _instances(annotations[name]), _instances(predictions[name])
        for entry, file, prediction in zip(frames, files, predicted, strict=True):
            true_picture = path.parent / "panomasksRGB" / name / entry["file_name"].path()
            picture = results / "pan_pred" / name / file
            frame = read_frame(entry, true_picture, prediction, picture, is_thing)
            vpq.add_frame(*frame)
            stq.add_frame(_with_classes(frame, true_instances, instances))
        vpq.end_video()
        stq.end_sequence(name)

    windows = {n: vpq.summary(n) for n in vpq.windows}
    numbers = {f"VPQ/{key}": value for key, value in mean_over_windows(windows, PAPER_WINDOWS).items()}
    for key, value in mean_over_windows(windows, VIPSEG_WINDOWS).items():
        numbers[f"VPQ_with_8/{key}"] = value
    numbers |= stq.summary()
    return numbers | {f"{n}/{key}": value for n in windows for key, value in windows[n].items()}


def _annotations(truth: Path) -> Path:
    if truth.is_file():
        return truth
    found = [
        path
        for split in ("val", "test", "train")
        if (path := truth / f"panoptic_gt_VIPSeg_{split}.json").is_file()
    ]
    if len(found) != 1:
        names = " and ".join(path.name for path in found) or "no panoptic_gt_VIPSeg_val.json"
        raise InputError(f"{truth}: has {names}; name the file")
    return found[0]


def by_video(root: Entry) -> dict[str, Entry]:
    """Lists of annotated frames by name of the video."""
    videos: dict[str, Entry] = {}
    for entry in root["annotations"].entries():
        name = entry["video_id"].text()
        if name in videos:
            raise entry["video_id"].error(f"video {name!r} comes twice")
        videos[name] = entry["annotations"]
    return videos


def _instances(frames: Entry) -> dict[int, int]:
    """Number of each id of a video, in the order of first listing."""
    numbers: dict[int, int] = {}
    for frame in frames.entries():
        for segment in frame["segments_info"].entries():
            number = numbers.setdefault(segment["id"].integer(), len(numbers))
            if number >= INSTANCES:
                raise segment["id"].error(f"expected at most {INSTANCES} segments in a video")
    return numbers


def _with_classes(frame: Frame, true_instances: dict[int, int], instances: dict[int, int]) -> Overlaps:
    """Overlaps of ids as overlaps of `encode(class, instance)`."""
    return Overlaps(
        _encode(frame.shared.truth, frame.truth, true_instances),
        _encode(frame.shared.predicted, frame.predicted, instances),
        frame.shared.pixels,
    )


def _encode(ids: NDArray[np.int64], segments: Segments, instances: dict[int, int]) -> NDArray[np.int64]:
    numbers = np.array([instances[k] for k in segments.ids.tolist()], np.int64)
    codes = dict(zip(segments.ids.tolist(), encode(segments.categories, numbers).tolist(), strict=True))
    void = VOID * INSTANCES
    return np.array([codes.get(k, void) for k in ids.tolist()], np.int64)
