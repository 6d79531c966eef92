"""Training clips a second: our loader against a transcription of the published one.

    python -m bench.bench_loader --out bench/results/loader_cpu.json
    pytest bench/bench_loader.py --benchmark-only    # fewer clips, and those of one process

Both make clips in two worker processes, a thread each, and hand them to the process that would train. The
transcription works as the published one does: it decodes, colours and flips whole frames, makes a mask of
every object and class at full size and resizes each by itself; it hands on float images and bool masks. It
uses the calls of OpenCV and pycocotools as they are. Ours is `TrainingLoader`.

Files are generated: of YouTube-VIS (720p, 4 objects in run-length codes), VIPSeg (720p, 124 classes, 30
segments in PNG files) and COCO (480 x 640, 25 segments); clips have 3 frames. Frames of 720p take about
100 KB, as those of VIPSeg do.

The command measures the two in turn, in a steady state, and reports medians: clips a second, and seconds of
the processor a clip, of all processes, which depend less on what else runs on the machine.
"""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from bench.fresh import Numbers, in_turn, parse, rows, write
from bench.timing import machine
from tarvis.data.clips import Kind, VideoClips
from tarvis.data.images import ImageClips
from tarvis.data.loader import TrainingLoader, collate
from tarvis.data.mixture import ClipSet, Purpose, generator
from tarvis.data.sampling import window_showing
from tarvis.data.settings import DataSettings, SetSettings
from tarvis.data.transforms import BRIGHTNESS, HUES, MIDDLE, Colour, about_centre, affine
from tarvis.datasets.benchmark import FrameTruth, Roots, Truth, VideoSample
from tarvis.datasets.image_sets import IMAGE_SETS, ImageSample
from tarvis.datasets.registry import BENCHMARKS
from tarvis.files import rle
from tarvis.files.pictures import read_ids, read_rgb
from tarvis.stitch.resize import network_size
from tarvis.structures import RLE, VOID, Size

SPEEDUP = 3
"""At least, of clips as fine-tuning mixes them."""
MIXTURE = {"youtube_vis": 0.7, "vipseg": 0.3}
"""Share of videos that only have objects, and of panoptic ones, as published."""
WORKERS = 2
FRAMES, VIDEOS = 3, 4
VIDEO, IMAGE = (720, 1280), (480, 640)
NUM_CLASSES, NUM_THINGS = 124, 58
JPEG_OF_VIDEO, JPEG = [cv2.IMWRITE_JPEG_QUALITY, 60], [cv2.IMWRITE_JPEG_QUALITY, 92]
Masks = NDArray[np.bool_]


# Files


def scene(size: Size, segments: int, seed: int, shift: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """A picture, RGB, and its segments 0 .. N - 1: cells around points, with round objects before them."""
    random = np.random.default_rng(seed)
    H, W = size
    centres = random.uniform(0, 1, (segments, 2)) * (W, H)
    y, x = np.mgrid[:H, :W]
    nearest = np.full(size, np.inf)
    ids = np.zeros(size, np.int32)
    for k in range(segments // 2):
        distance = (x - centres[k, 0] - shift) ** 2 + (y - centres[k, 1]) ** 2
        ids[distance < nearest] = k
        nearest = np.minimum(distance, nearest)
    for k in range(segments // 2, segments):
        at = (int(centres[k, 0]) + 2 * shift, int(centres[k, 1]))
        axes = (int(random.uniform(0.03, 0.15) * H), int(random.uniform(0.03, 0.15) * H))
        cv2.ellipse(ids, at, axes, random.uniform(0, 180), 0, 360, k, -1)
    tones = random.integers(40, 215, (segments, 3))
    texture = cv2.GaussianBlur(random.normal(0, 60, (*size, 3)).astype(np.float32), (0, 0), 1.5)
    return np.clip(tones[ids] + texture, 0, 255).astype(np.uint8), ids


@cache
def folder() -> Path:
    return Path(mkdtemp("bench_loader"))


def frame_files(name: str, segments: int, video: int) -> list[tuple[Path, NDArray[np.int32]]]:
    found = []
    for t in range(2 * FRAMES):
        image, ids = scene(VIDEO, segments, video, 6 * t)
        path = folder() / f"{name}_{video}_{t}.jpg"
        cv2.imwrite(str(path), image[..., ::-1], JPEG_OF_VIDEO)
        found.append((path, ids))
    return found


def a_video(name: str, files: list[tuple[Path, NDArray[np.int32]]], truth: Truth) -> VideoSample:
    paths = tuple(path for path, _ in files)
    return VideoSample(name, paths, tuple(path.stem for path in paths), size=VIDEO, truth=truth)


@cache
def youtube_vis() -> tuple[VideoSample, ...]:
    videos = []
    for video in range(VIDEOS):
        files = frame_files("youtube_vis", 8, video)
        codes = [
            dict(enumerate(rle.encode(np.stack([ids == k for k in range(4, 8)])), 1)) for _, ids in files
        ]
        labels: dict[int, int | None] = dict(enumerate((3, 7, 7, 20), 1))
        shown = tuple(tuple(k for k, mask in frame.items() if rle.area(mask)) for frame in codes)
        videos.append(a_video(f"{video}", files, Truth(labels, shown, partial(_coded, codes))))
    return tuple(videos)


def _coded(codes: list[dict[int, RLE]], t: int) -> FrameTruth:
    return FrameTruth(codes[t])


@cache
def vipseg() -> tuple[VideoSample, ...]:
    videos = []
    for video in range(VIDEOS):
        files = frame_files("vipseg", 30, video)
        maps, shown = [], []
        for path, ids in files:
            # stuff is class + 1, a thing 100 (class + 1) + its number
            pixels = np.where(ids < 15, NUM_THINGS + ids + 1, 100 * (ids + 1) + 1).astype(np.uint16)
            maps.append(path.with_suffix(".png"))
            cv2.imwrite(str(maps[-1]), pixels)
            shown.append(tuple(np.unique(pixels[pixels >= 100]).tolist()))
        labels = {id_: id_ // 100 - 1 for ids in shown for id_ in ids}
        videos.append(a_video(f"{video}", files, Truth({**labels}, tuple(shown), partial(_mapped, maps))))
    return tuple(videos)


def _mapped(maps: list[Path], t: int) -> FrameTruth:
    pixels = read_ids(maps[t]).astype(np.uint16)
    number = np.arange(2**16)
    class_of = np.where(number >= 100, number // 100, number)
    semantic = np.where((class_of > 0) & (class_of <= NUM_CLASSES), class_of - 1, VOID).astype(np.uint8)
    things = np.where(number >= 100, number, 0).astype(np.uint16)
    return FrameTruth(ids=things.take(pixels), semantic=semantic.take(pixels))


@cache
def coco() -> tuple[ImageSample, ...]:
    roots = Roots(folder(), folder(), folder())
    images = []
    for number in range(VIDEOS):
        image, ids = scene(IMAGE, 25, number, 0)
        cv2.imwrite(str(folder() / f"coco_{number}.jpg"), image[..., ::-1], JPEG)
        colours = (ids + 1) * 70001 % 2**24
        rgb = np.stack([colours & 255, colours >> 8 & 255, colours >> 16], -1).astype(np.uint8)
        cv2.imwrite(str(folder() / f"coco_{number}.png"), rgb[..., ::-1])
        listed = [((k + 1) * 70001 % 2**24, 5 * k) for k in reversed(range(25))]
        images.append(
            ImageSample(
                roots, f"coco_{number}.jpg", f"coco_{number}.png", IMAGE, np.array(listed, np.int32), 12
            )
        )
    return tuple(images)


# Ours


def our_clip(clips: ClipSet, task: str, number: int) -> Any:
    sample = clips.draw(Kind(task), number % VIDEOS, generator(0, Purpose.SAMPLE, number))
    assert sample is not None
    return collate(clips.name, task, [sample])


# The transcription


def colour(images: list[NDArray[np.uint8]], random: np.random.Generator) -> list[NDArray[np.uint8]]:
    change = Colour.draw(random, "wide")
    assert change is not None
    return [coloured(image, change) for image in images]


def coloured(image: NDArray[np.uint8], change: Colour) -> NDArray[np.uint8]:
    hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    hue = cv2.LUT(hue, ((np.arange(256) + change.hue) % HUES).astype(np.uint8))
    saturation = cv2.add(saturation, float(change.saturation))  # type: ignore[call-overload]
    rgb = cv2.cvtColor(cv2.merge((hue, saturation, value)), cv2.COLOR_HSV2RGB)
    level = MIDDLE + change.contrast * (np.arange(256) - MIDDLE)
    rgb = cv2.LUT(rgb, np.clip(np.rint(level), 0, 255).astype(np.uint8))
    there, back, channel = BRIGHTNESS[change.space]
    planes = list(cv2.split(cv2.cvtColor(rgb, there)))
    planes[channel] = cv2.add(planes[channel], float(change.brightness))  # type: ignore[call-overload]
    return np.asarray(cv2.cvtColor(cv2.merge(planes), back), np.uint8)


def read_rgb_image(path: Path) -> NDArray[np.uint8]:
    return np.asarray(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB), np.uint8)  # type: ignore[arg-type]


def resize_masks(masks: NDArray[np.bool_], size: Size) -> torch.Tensor:
    """[N, T, H, W] at another size, one by one."""
    resized = [
        [
            F.interpolate(torch.from_numpy(m)[None, None].float(), size, mode="bilinear")[0, 0] > 0.5
            for m in tube
        ]
        for tube in masks
    ]
    return torch.stack([torch.stack(tube) for tube in resized])


def video_clip(videos: tuple[VideoSample, ...], name: str, number: int) -> Any:
    """One clip as published: whole frames, one mask an object and a class."""
    random = np.random.default_rng(number)
    video, settings = videos[number % VIDEOS], published(name)
    assert video.truth is not None
    frames = sorted(random.choice(len(video.images), FRAMES, replace=False).tolist())
    images = colour([read_rgb_image(video.images[t]) for t in frames], random)
    truths = [video.truth.read(t) for t in frames]
    objects = sorted({id_ for t in frames for id_ in video.truth.visible[t]})
    masks = np.stack([np.stack([mask_of(truth, id_) for truth in truths]) for id_ in objects])
    classes = None
    if truths[0].semantic is not None:
        kinds = (*range(NUM_CLASSES), VOID)
        classes = np.stack([np.stack([truth.semantic == k for truth in truths]) for k in kinds])
    if random.random() < 0.5:
        images = [image[:, ::-1] for image in images]
        masks = masks[..., ::-1]
        classes = None if classes is None else classes[..., ::-1]
    part = round(settings.crop[0] * VIDEO[0]), round(settings.crop[1] * VIDEO[1])
    window = window_showing(np.asarray(masks.any((0, 1))), part, random)
    box = (slice(None), slice(None)) if window is None else window.box
    assert settings.min_sizes is not None
    shorter = int(random.choice(settings.min_sizes))
    size = network_size(VIDEO if window is None else part, shorter, settings.max_size)
    cut = [cv2.resize(np.ascontiguousarray(image[box]), size[::-1]) for image in images]
    pixels = torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).float()
    resized = resize_masks(np.ascontiguousarray(masks[..., box[0], box[1]]), size)
    resized = resized[resized.flatten(1).any(1)]
    if classes is None:
        return pixels, resized
    of_class = resize_masks(np.ascontiguousarray(classes[..., box[0], box[1]]), size)
    semantic = torch.zeros(of_class.shape[1:], dtype=torch.int64)
    for k, tube in enumerate(of_class[:-1]):
        semantic[tube] = k
    return pixels, resized, semantic, of_class[-1]


def mask_of(truth: FrameTruth, id_: int) -> NDArray[np.bool_]:
    if truth.ids is not None:
        return truth.ids == id_
    assert truth.masks is not None
    return rle.decode(truth.masks[id_])


def image_clip(images: tuple[ImageSample, ...], number: int) -> Any:
    """One pseudo-clip as published: warped, then resized, then cut, frame by frame."""
    random = np.random.default_rng(number)
    sample, settings = images[number % VIDEOS], published("coco")
    rgb = read_rgb(sample.map).astype(np.int32)
    segments = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
    both = np.zeros((*IMAGE, 2), np.int32)  # object, class + 1
    for k, (id_, label) in enumerate(sample.segments.tolist()):
        mask = segments == id_
        both[mask] = (k + 1 if k < sample.num_things else 0, label + 1)
    (image,) = colour([read_rgb_image(sample.image)], random)
    if random.random() < 0.5:
        image, both = image[:, ::-1].copy(), both[:, ::-1].copy()
    assert settings.min_sizes is not None
    pixels, objects, classes = [], [], []
    for _ in range(FRAMES):
        scale, rotation, shear = random.uniform([0.9, -0.35, -0.17], [1.1, 0.35, 0.17])
        matrix = about_centre(affine(scale, rotation, shear), IMAGE)[:2]
        size = network_size(IMAGE, int(random.choice(settings.min_sizes)), settings.max_size)
        top, left = int(random.integers(size[0] - 511)), int(random.integers(size[1] - 511))
        box = slice(top, top + 512), slice(left, left + 512)
        warped = cv2.warpAffine(image, matrix, IMAGE[::-1], flags=cv2.INTER_LINEAR)
        maps = cv2.warpAffine(both.astype(np.float32), matrix, IMAGE[::-1], flags=cv2.INTER_NEAREST)
        pixels.append(cv2.resize(warped, size[::-1], interpolation=cv2.INTER_LINEAR_EXACT)[box])
        resized: Any = cv2.resize(maps, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)[box].astype(
            np.int64
        )
        objects.append(resized[..., 0])
        classes.append(resized[..., 1] - 1)
    shown = np.stack(objects)
    masks = torch.from_numpy(np.stack([shown == k for k in np.unique(shown) if k]))
    semantic = torch.from_numpy(np.stack(classes))
    semantic = torch.where(semantic < 0, -100, semantic)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float(), masks, semantic, semantic < 0


class Published(Dataset[Any]):
    """Clips by number."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make

    def __getitem__(self, number: int) -> Any:
        return self._make(number)


# Both


KINDS = ("youtube_vis", "vipseg", "coco")
SIDES = ("tarvis", "transcription")


def published(name: str) -> SetSettings:
    """Published settings of a training set."""
    return SetSettings(**(IMAGE_SETS | BENCHMARKS)[name].training)


def our_clips(kind: str) -> ClipSet:
    if kind == "coco":
        return ImageClips(kind, coco(), dataclasses.replace(published("coco"), tasks=("vps",)))
    if kind == "vipseg":
        return VideoClips(kind, vipseg(), published("vipseg"))
    return VideoClips(kind, youtube_vis(), published("youtube_vis_2021"))


def maker(kind: str, side: str) -> Callable[[int], Any]:
    """What makes clip k in this process."""
    if side == "tarvis":
        return partial(our_clip, our_clips(kind), "vis" if kind == "youtube_vis" else "vps")
    if kind == "coco":
        return partial(image_clip, coco())
    if kind == "vipseg":
        return partial(video_clip, vipseg(), "vipseg")
    return partial(video_clip, youtube_vis(), "youtube_vis_2021")


def loaded(kind: str, side: str, clips: int) -> Iterable[Any]:
    """Clips as they come to the process that trains."""
    if side == "tarvis":
        data = DataSettings(train=(kind,), num_workers=WORKERS)
        return TrainingLoader([our_clips(kind)], data, seed=0, batch_size=1).steps(0, clips)
    return DataLoader(
        Published(maker(kind, side)),
        batch_size=None,
        sampler=range(clips),
        num_workers=WORKERS,
        prefetch_factor=2,
        multiprocessing_context="fork",
        worker_init_fn=lambda _: cv2.setNumThreads(1),
    )


def measure(clips: int, kind: str, side: str) -> Numbers:
    """Clips a second, with as many made ahead at the end as at the start; processor time a clip."""
    our_clips(kind)  # writes the files
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    ahead = 2 * WORKERS
    began, total, arrived = used(), clips + 2 * ahead, []
    for _ in loaded(kind, side, total):
        arrived.append(time.perf_counter())
    seconds = arrived[-1 - ahead] - arrived[ahead - 1]
    return {"clips_per_s": clips / seconds, "cpu_ms": 1e3 * (used() - began) / total}


def used() -> float:
    """Seconds of the processor that this process and those that have ended took."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in both)


def compare(clips: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each kind of files and side: medians of runs in turn."""
    cases = [(kind, side) for kind in KINDS for side in SIDES]
    return rows(in_turn(cases, repeats, partial(measure, clips)), "kind", "side")


def speedups(found: Sequence[dict[str, Any]], by: str = "clips_per_s") -> dict[str, float]:
    """How many times as fast ours is, by clips a second or by the processor's time, and for the mixture."""
    taken = {(row["kind"], row["side"]): row[by] if by == "cpu_ms" else 1 / row[by] for row in found}
    faster = {kind: taken[kind, "transcription"] / taken[kind, "tarvis"] for kind in KINDS}
    ours, theirs = (sum(share * taken[kind, side] for kind, share in MIXTURE.items()) for side in SIDES)
    return {**faster, "fine-tuning": theirs / ours}


def one_round(make: Callable[[int], Any]) -> None:
    for number in range(VIDEOS):
        make(number)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_clips(benchmark: Any, kind: str, side: str) -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    benchmark.group = kind
    benchmark.extra_info["clips"] = VIDEOS
    benchmark.pedantic(one_round, (maker(kind, side),), rounds=5, warmup_rounds=1)


def test_fine_tuning_is_fed_three_times_as_fast(benchmark: Any) -> None:
    faster = speedups(benchmark.pedantic(compare, (16, 3), rounds=1), by="cpu_ms")
    benchmark.extra_info["speedup"] = faster
    assert faster["fine-tuning"] >= SPEEDUP, faster


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(__doc__, argv, repeats=5, clips={"type": int, "default": 64, "help": "of each run"})
    results = compare(args.clips, args.repeats)
    about: dict[str, Any] = {
        "command": f"python -m bench.bench_loader --out {args.out.name} --clips {args.clips} "
        f"--repeats {args.repeats}",
        "frames": FRAMES,
        "workers": WORKERS,
        "machine": machine(),
        "speedup": speedups(results),
        "speedup_by_cpu": speedups(results, by="cpu_ms"),
    }
    write(args.out, {**about, "results": results})
    for name in ("speedup", "speedup_by_cpu"):
        print(name, {kind: round(value, 2) for kind, value in about[name].items()})


if __name__ == "__main__":
    main()
