"""Writes the published training files, whose masks are run-length codes (`tarvis.datasets.coded_videos`)."""

import json

import numpy as np

from tarvis.files import rle


def write_coded(path, sequences):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"meta": {}, "sequences": sequences}))


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
    return {str(k): rle.encode((numbers == k)[None])[0]["counts"].decode() for k in shown}
