"""Replays the stitching of the published code: clips' predictions in, masks, tracks and result entries out.

Each case file is one test; its fields, not its name, say what kind of case it is. Where the published code
has a defect, the file's corrected expectation counts.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from kernels.mask_upsample import label_upsample, mask_upsample, upsample_logits
from tarvis.config import InferenceConfig
from tarvis.datasets.burst import interleaved_frames
from tarvis.datasets.cityscapes_vps import every_fifth
from tarvis.datasets.classes import class_table
from tarvis.datasets.kitti_step import step_encoding
from tarvis.datasets.panoptic_format import assign_colours, coco_encoding
from tarvis.files import rle
from tarvis.stitch.panoptic import (
    SemanticMaps,
    decode_labels,
    paint_over,
    painting_order,
    select_things,
)
from tarvis.stitch.propagation import ObjectPropagation
from tarvis.stitch.resize import area_size, network_size, resize_frame, resize_mask
from tarvis.stitch.schedule import clip_frames
from tarvis.stitch.tracking import InstanceTracker, select_queries, select_results
from tarvis.structures import Geometry, Reference, Size

OURS = Path(__file__).parents[1] / "goldens" / "stitch"
FEW = 5  # pixels a video that may differ, as the upsampling rounds differently
CLOSE = 1e-5  # class logits and scores


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("--goldens-stitch", default=OURS))
        kinds = KINDS[metafunc.function.__name__]
        paths = [p for p in sorted(folder.glob("*.json")) if p.stem != "index" and kind_of(p) in kinds]
        metafunc.parametrize("path", paths, ids=[p.stem for p in paths])


KINDS = {
    "test_instances": {"instance", "panoptic"},
    "test_result_entries": {"instance"},
    "test_panoptic": {"panoptic"},
    "test_fusion": {"panoptic_fusion"},
    "test_objects": {"vos"},
    "test_references": {"references"},
    "test_upsampling": {"chain"},
    "test_frames": {"frames"},
    "test_sizes": {"sizes"},
    "test_clips": {"clips"},
}


def kind_of(path: Path) -> str:
    case = json.loads(path.read_text())
    if case.get("task") in {"instance", "panoptic", "panoptic_fusion", "vos"}:
        return case["task"]
    if "clips" in case:
        return "clips"
    if "sizes" in case:
        return "sizes"
    first = case["cases"][0]
    return "frames" if "rule" in first else "references" if "previous" in first else "chain"


def test_every_case_has_a_test(goldens_stitch_dir: Path) -> None:
    found = {kind_of(p) for p in goldens_stitch_dir.glob("*.json") if p.stem != "index"}
    assert found
    assert found <= set.union(*KINDS.values())


def test_instances(path: Path) -> None:
    case = Case(path)
    frames, tracker = case.track()
    assert [frame for frame, _ in frames] == list(range(case.num_frames))
    assert_same_masks([masks for _, masks in frames], case.expected["frames"], case.original)
    ids, class_logits = tracker.class_logits()
    assert ids == case.expected["track_ids"]
    if ids:
        np.testing.assert_allclose(class_logits, case.arrays["class_logits"], atol=CLOSE, rtol=0)


def test_result_entries(path: Path) -> None:
    case = Case(path)
    frames, tracker = case.track()
    for top_k in (10, 20):
        expected = case.expected[f"results_{top_k}"]
        entries = select_results(frames, *tracker.class_logits(), top_k)
        assert [track.id for track in entries] == list(range(1, len(expected) + 1))
        assert [track.label for track in entries] == [entry["category_id"] - 1 for entry in expected]
        np.testing.assert_allclose(
            [track.score for track in entries], [entry["score"] for entry in expected], atol=CLOSE, rtol=0
        )
        for track, entry in zip(entries, expected, strict=True):
            wanted = {f: counts for f, counts in enumerate(entry["segmentations"]) if counts is not None}
            assert_same_masks([track.masks], [wanted], case.original)


def test_panoptic(path: Path) -> None:
    case = Case(path)
    stuff = [decode_labels(png) for png in case.stuff()]
    frames, tracker = case.track()
    settings = case.settings
    tracks = select_things(
        frames, *tracker.class_logits(), settings["thing_classes"], settings["track_score_threshold"]
    )
    assert {t.id: t.label for t in tracks} == {
        int(i): track["category_id"] for i, track in case.expected["kept_tracks"].items()
    }
    for track in tracks:
        wanted = case.expected["kept_tracks"][str(track.id)]["score"]
        assert track.score == pytest.approx(wanted, abs=CLOSE)

    painted = [paint_over(labels, painting_order(tracks), frame) for frame, labels in enumerate(stuff)]
    semantic, instance = (np.stack(maps) for maps in zip(*painted, strict=True))
    assert_same_labels(np.stack(stuff), case.arrays["stuff"])
    assert_same_labels(semantic, case.arrays["semantic"])
    assert_same_labels(instance, case.arrays["instance"])

    if "segments" in case.expected:
        palette = class_table(settings["format"]).colors
        colours = assign_colours(tracks, palette)
        for frame, wanted in zip(case.expected["scored_frames"], case.expected["segments"], strict=True):
            image, segments = coco_encoding(*painted[frame], palette, colours)
            assert_same_segments(image, segments, wanted)


def assert_same_segments(image: np.ndarray, segments: list[Any], wanted: list[dict[str, Any]]) -> None:
    got = {(s.track, s.category): s for s in segments}
    assert got.keys() == {(w["track"], w["category_id"]) for w in wanted}
    assert len({s.id for s in segments}) == len(segments)
    packed = image.astype(np.int64) @ [1, 256, 65536]
    for w in wanted:
        segment = got[w["track"], w["category_id"]]
        assert segment.area == (packed == segment.id).sum() == pytest.approx(w["area"], abs=FEW)
        assert w["id"] in (segment.id, None)


def test_fusion(path: Path) -> None:
    case = Case(path)
    given = case.inputs
    size = case.original
    frames = [
        (f, {int(i): {"size": list(size), "counts": counts.encode()} for i, counts in masks.items()})
        for f, masks in enumerate(given["frames"])
    ]
    tracks = select_things(
        frames,
        given["track_ids"],
        case.arrays["class_logits"],
        case.settings["thing_classes"],
        case.settings["track_score_threshold"],
    )
    encoded = np.stack(
        [
            step_encoding(*paint_over(labels, painting_order(tracks), frame))
            for frame, labels in enumerate(case.arrays["stuff"])
        ]
    ).astype(int)
    wanted = case.arrays["step_png"].astype(int)
    assert (encoded[..., 0] == wanted[..., 0]).all()
    ours, theirs = (e[..., 1] * 256 + e[..., 2] for e in (encoded, wanted))
    pairs = set(zip(ours.flat, theirs.flat, strict=True))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})  # a relabelling
    assert ours.max() <= 999
    assert (0, 0) in pairs or not (wanted[..., 1:] == 0).all(-1).any()


def test_objects(path: Path) -> None:
    case = Case(path)
    propagation = ObjectPropagation(case.geometry, case.config)
    found = []
    for frames, clip in zip(case.clip_ranges, case.clips, strict=True):
        if clip is None:
            found += propagation.skip(frames)
        else:
            found += propagation.add(frames, clip["ids"], torch.from_numpy(clip["mask_logits"]))
    found += propagation.finish(case.num_frames)
    assert [frame for frame, _ in found] == list(range(case.num_frames))
    masks = [masks for _, masks in found]
    assert [list(m) for m in masks] == [[int(i) for i in m] for m in case.expected["frames"]]
    assert_same_masks(masks, case.expected["frames"], case.original)

    key = "label_maps_corrected" if "label_maps_corrected" in case.arrays else "label_maps_original"
    assert_same_labels(np.stack([paint(m, case.original) for m in masks]), case.arrays[key])


def paint(masks: Mapping[int, Any], size: Size) -> np.ndarray:
    labels = np.zeros(size, np.uint8)
    for i, mask in masks.items():
        labels[rle.decode(mask)] = i
    return labels


def test_references(path: Path) -> None:
    case = json.loads(path.read_text())
    arrays = np.load(path.with_suffix(".npz"))
    for number, c in enumerate(case["cases"]):
        height, width = (4 * n for n in c["logits"])
        geometry = PaddedTo((height, width), (height, width), (height, width))
        propagation = ObjectPropagation(geometry, InferenceConfig())
        if c["previous"] is not None:
            frames = c["previous"]["frames"]
            (clip,) = make_clips().clip_inputs(c["previous"]["inputs"])
            propagation.add(
                range(frames[0], frames[-1] + 1), clip["ids"], torch.from_numpy(clip["mask_logits"])
            )
        given = [
            Reference(i, frame, mask=torch.from_numpy(make_clips().ellipse(height, width, *shape)).bool())
            for i, frame, shape in c["masks"]
        ]
        given += [
            Reference(i, frame, point=(x * width - 0.5, y * height - 0.5)) for i, frame, y, x in c["points"]
        ]
        found = propagation.references(range(c["frames"][0], c["frames"][-1] + 1), given)

        expected = {**c["original"], **c.get("corrected", {})}
        if "raises" in expected:
            assert found.ids == (), number
            continue
        assert list(found.mask_ids) == expected["mask_object_ids"], number
        assert list(found.point_ids) == expected["point_object_ids"], number
        assert list(found.lost) == expected["lost"], number
        assert list(found.init_frames) == expected["init_frames"], number
        assert found.first_frame == {int(i): t for i, t in expected["first_frame_in_clip"].items()}, number
        assert list(found.masks.shape) == expected["shape"], number
        bits = np.unpackbits(arrays[f"masks_{c['index']}"], count=found.masks.numel())
        assert_same_labels(found.masks.numpy(), bits.reshape(expected["shape"]).astype(bool))
        for point, i in zip(found.points.tolist(), found.point_ids, strict=True):
            assert point == pytest.approx(next(yx for j, _, *yx in c["points"] if j == i), abs=1e-6)


def test_upsampling(path: Path) -> None:
    case = json.loads(path.read_text())
    arrays = np.load(path.with_suffix(".npz"))
    for c in case["cases"]:
        index, sizes = c["index"], (tuple(c["network"]), tuple(c["original"]))
        logits = torch.from_numpy(make_clips().resize_logits(c["seed"], *c["logits"]))
        sampled = upsample_logits(logits, *sizes)[:, :, :: c["step"][0], :: c["step"][1]]
        np.testing.assert_allclose(sampled, arrays[f"logits_{index}"], atol=2e-5, rtol=0)
        positive = np.unpackbits(arrays[f"positive_{index}"], count=int(np.prod(c["shape"])))
        assert_same_labels(mask_upsample(logits, *sizes).numpy(), positive.reshape(c["shape"]).astype(bool))
        assert_same_labels(label_upsample(logits, *sizes).numpy(), arrays[f"argmax_{index}"])


def test_frames(path: Path) -> None:
    case = json.loads(path.read_text())
    arrays = np.load(path.with_suffix(".npz"))
    recipe = make_clips()
    for c in case["cases"]:
        h, w, rule = c["h"], c["w"], c["rule"]
        if rule["MODE"] == "min_dim":
            size = network_size((h, w), rule["MIN_DIMS"][0], rule["MAX_DIM"])
        elif rule["MODE"] == "pixel_area":
            size = area_size((h, w), rule["TARGET_PIXEL_AREA"])
        else:
            size = network_size((h, w), None, 1333)
        assert list(size) == c["resized"]
        assert list(Geometry((h, w), size).padded) == c["network_input"]
        wanted = arrays[f"image_{c['index']}"]
        images = np.stack(
            [resize_frame(recipe.texture(f"{c['seed']}|{i}", h, w), size) for i in range(len(wanted))]
        )
        difference = np.abs(images.astype(int) - wanted)
        assert difference.max() <= 1  # OpenCV versions round differently
        assert (difference > 0).mean() < 0.01
        shapes = [
            (h // 2, w // 3, h // 4, w // 5),
            (h // 3, 2 * w // 3, max(1, h // 9), max(1, w // 7)),
        ]
        masks = torch.stack(
            [resize_mask(torch.from_numpy(recipe.ellipse(h, w, *s)).bool(), size) for s in shapes]
        )
        bits = np.unpackbits(arrays[f"mask_{c['index']}"], count=masks.numel())
        assert (masks.numpy() == bits.reshape(masks.shape)).all()


def test_sizes(path: Path) -> None:
    for row in json.loads(path.read_text())["sizes"]:
        original = row.pop("h"), row.pop("w")
        for rule, wanted in row.items():
            if rule == "padded_unresized":
                got = Geometry(original, network_size(original, None, 1333)).padded
            elif rule.startswith("area"):
                got = area_size(original, int(rule.removeprefix("area")))
            else:
                least, most = rule.removeprefix("min").split("_max")
                got = network_size(original, int(least), int(most))
            assert list(got) == wanted, (original, rule)


def test_clips(path: Path) -> None:
    case = json.loads(path.read_text())
    for c in case["clips"]:
        got = clip_frames(c["num_frames"], c["clip_length"], c["overlap"], c["first"])
        assert [list(clip) for clip in got] == c["clips"], c
    image_ids: list[int] = []
    for c in case.get("cityscapes_vps", []):
        image_ids = image_ids if isinstance(c["image_ids"], str) else c["image_ids"]  # "as above"
        for video, names in c["videos"].items():
            frames = sorted(i % 10000 for i in image_ids if i // 10000 == int(video))
            kept = every_fifth(frames) if c["sparse"] else frames
            assert kept == [int(Path(name).stem.split("_")[-1]) for name in names]
    for c in case.get("burst", []):
        assert interleaved_frames(c["num_frames"], c["fps"], c["interleaved"]) == c["sampled"], c
    if annotated := case.get("burst_annotated"):
        frames = interleaved_frames(annotated["num_frames"], annotated["fps"])
        places = {str(i): frames.index(frame) for i, frame in enumerate(annotated["annotated"])}
        assert places == annotated["position_in_sampled_list"]


@dataclass(frozen=True)
class PaddedTo(Geometry):
    """Padded as a case says: some save pixels by padding to multiples of 16 only."""

    padding: Size

    @property
    def padded(self) -> Size:
        return self.padding


class Case:
    """A case file whose clips are rebuilt and whose expectation is merged."""

    def __init__(self, path: Path) -> None:
        case = json.loads(path.read_text())
        self.expected: dict[str, Any] = {**case["original"], **case.get("corrected", {})}
        self.settings: dict[str, Any] = case["settings"]
        self.inputs: dict[str, Any] = case["inputs"]
        self.original: Size = tuple(case["sizes"]["original"])
        npz = path.with_name(path.stem + ".npz")
        self.arrays: Mapping[str, np.ndarray] = dict(np.load(npz)) if npz.exists() else {}
        if "schedule" not in case:
            return
        self.geometry = PaddedTo(
            self.original, tuple(case["sizes"]["network"]), tuple(case["sizes"]["padded"])
        )
        assert list(self.geometry.logits) == case["sizes"]["logits"]
        schedule = case["schedule"]
        self.num_frames: int = schedule["num_frames"]
        self.config = InferenceConfig(
            clip_length=schedule["clip_length"],
            overlap=schedule["overlap"],
            max_tracks_per_clip=self.settings.get("max_tracks_per_clip", 10),
            score_threshold=self.settings.get("score_threshold", 0.0),
        )
        self.clip_ranges = clip_frames(
            self.num_frames, self.config.clip_length, self.config.overlap, schedule["first"]
        )
        assert [list(r) for r in self.clip_ranges] == [c["frames"] for c in self.inputs["clips"]]
        self.clips = make_clips().clip_inputs(self.inputs)
        assert make_clips().sha256(self.clips) == case["inputs_sha256"]

    def track(self) -> tuple[list[Any], InstanceTracker]:
        tracker = InstanceTracker(self.geometry, self.config)
        finished = []
        for frames, clip in zip(self.clip_ranges, self.clips, strict=True):
            class_logits = torch.from_numpy(clip["class_logits"])
            kept = select_queries(class_logits, self.config.score_threshold, self.config.max_tracks_per_clip)
            mask_logits = torch.from_numpy(clip["mask_logits"])
            finished += tracker.add(frames, mask_logits[kept], class_logits[kept])
        return finished + tracker.finish(), tracker

    def stuff(self) -> Iterable[bytes]:
        things = set(self.settings["thing_classes"])
        classes = [k for k in range(self.settings["num_classes"]) if k not in things]
        maps = SemanticMaps(self.geometry, classes)
        finished = []
        for frames, clip in zip(self.clip_ranges, self.clips, strict=True):
            finished += maps.add(frames, torch.from_numpy(clip["semantic_logits"])[classes])
        finished += maps.finish()
        assert [frame for frame, _ in finished] == list(range(self.num_frames))
        return [png for _, png in finished]


def assert_same_masks(got: list[Any], wanted: list[dict[Any, str]], size: Size) -> None:
    """Equal keys; masks that differ in a few pixels in all, at most."""
    assert [set(masks) for masks in got] == [{int(i) for i in masks} for masks in wanted]
    different = 0
    for ours, theirs in zip(got, wanted, strict=True):
        for i, counts in theirs.items():
            mask = ours[int(i)]
            assert mask["size"] == list(size)
            if mask["counts"] != counts.encode():
                other = rle.decode({"size": list(size), "counts": counts.encode()})
                different += int((rle.decode(mask) != other).sum())
    assert different <= FEW


def assert_same_labels(got: np.ndarray, wanted: np.ndarray) -> None:
    assert got.shape == wanted.shape
    assert (got != wanted).sum() <= FEW


@cache
def make_clips() -> ModuleType:
    """The recipe of the inputs, kept beside this file. Test folders are no packages, hence by path."""
    path = Path(__file__).with_name("make_clips.py")
    spec = importlib.util.spec_from_file_location("make_clips", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
