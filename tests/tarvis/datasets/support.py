"""Writes what the tests of the benchmarks need: files, published training files, the truth as results."""

import json

import cv2
import numpy as np

from tarvis.files import rle
from tarvis.stitch.panoptic import encode_labels
from tarvis.structures import Track, VideoResult


def write(path, content):
    """Write bytes, an RGB picture, or what JSON can hold; gives the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        content = png(content)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def png(picture):
    """PNG of colours [H, W, 3], or of numbers [H, W]."""
    bgr = np.ascontiguousarray(picture[..., ::-1]) if picture.ndim == 3 else picture
    return cv2.imencode(".png", bgr)[1].tobytes()


def colours(ids):
    """COCO's picture of ids [H, W]: red is the lowest byte."""
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)


def perfect(video, truth=None):
    """The truth of a video as a result; in frames that are not scored everything is of class 0."""
    truth = truth or video.truth
    masks, stuff, size = {track: {} for track in truth.labels}, {}, video.size
    for t, frame in enumerate(video.scored):
        labels = truth.read(t)
        for track in truth.visible[t]:
            coded = labels.masks and labels.masks[track]
            masks[track][frame] = coded or rle.encode((labels.ids == track)[None])[0]
        if labels.semantic is not None:
            size, stuff[frame] = labels.semantic.shape, encode_labels(labels.semantic)
    if stuff:
        nothing = encode_labels(np.zeros(size, np.uint8))
        stuff = {t: stuff.get(t, nothing) for t in range(len(video.images))}
    tracks = tuple(Track(k, masks[k], label, 0.9) for k, label in truth.labels.items())
    return VideoResult("vps" if stuff else "vis", size, len(video.images), tracks, stuff)


def submit(benchmark, videos, folder, results=None):
    """Write results, by default the truth, as a run does; gives the folder."""
    results = results or map(perfect, videos)
    shares = (benchmark.write(result, video, folder) for result, video in zip(results, videos, strict=True))
    benchmark.join(shares, videos, "val", folder)
    return folder


def write_coded(path, sequences):
    """A published training file, whose masks are run-length codes (`tarvis.datasets.coded_videos`)."""
    write(path, {"meta": {}, "sequences": sequences})


def coded_sequence(name, image_paths, maps, category_of=lambda id_: id_ // 1000):
    """The entry of a sequence; `maps` gives ids [H, W] and classes, or None, of each image."""
    maps = list(maps)
    objects = [coded_map(ids, without=0) for ids, _ in maps]
    classes = [coded_map(semantic) for _, semantic in maps if semantic is not None]
    return {
        "id": name,
        "height": maps[0][0].shape[0],
        "width": maps[0][0].shape[1],
        "image_paths": list(image_paths),
        "categories": {key: category_of(int(key)) for frame in objects for key in frame},
        "segmentations": objects,
        **({"semantic_segmentations": classes} if classes else {}),
    }


def coded_map(numbers, without=None):
    shown = [k for k in np.unique(numbers).tolist() if k != without]
    return {str(k): code(numbers == k) for k in shown}


def code(mask):
    """COCO's run-length code of a mask [H, W]."""
    return rle.encode(mask[None])[0]["counts"].decode()
