"""Cityscapes-VPS: VPQ.

    results: folder of pred.json and pan_pred/<image id>.png
    truth:   folder of panpotic_gt_val_city_vps.json (as it is spelled; panoptic_... is found too) and of
             panoptic_video/, or of val/panoptic_video/ as it is downloaded

Numbers: VPQ/{all,thing,stuff}, the means over windows of 1 to 4 annotated frames (k = 0, 5, 10, 15 in
papers), and for each window n of them <n>/{all,thing,stuff}/{pq,sq,rq,n} and <n>/per_class/<id>/...; in
percent but for classes. What has no class that occurs is left out.

Entries of pred.json have no names: they are in the order of the truth's annotations, which come video by
video, six frames each. Pictures belong to the truth by name, as the names are sorted. A video's name is what
its images' ids begin with.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from tarvis.files.folders import chosen
from tarvis.files.records import Entry, read_json
from tarvis.metrics.vpq import CITYSCAPES_VPS_WINDOWS, VPQ, mean_over_windows
from tarvis.scoring.panoptic_files import read_categories, read_frame
from tarvis.structures import InputError

ANNOTATIONS = ("panpotic_gt_val_city_vps.json", "panoptic_gt_val_city_vps.json")
FRAMES_PER_VIDEO = 6
PICTURES = {"_newImg8bit.png": "_final_mask.png", "_leftImg8bit.png": "_gtFine_color.png"}
"""End of an image's name -> end of its truth's."""


def evaluate(results: Path, truth: Path, videos: Collection[str] | None = None) -> dict[str, float]:
    """The numbers of Cityscapes-VPS, of all videos or of those named.

    Results may be of those alone, or of all videos of the truth.
    """
    true_json = find_annotations(truth)
    if true_json is None:
        raise InputError(f"{truth}: has no {ANNOTATIONS[0]}")
    root = read_json(true_json)
    is_thing = read_categories(root)
    images = root["images"].entries()
    if not images or len(images) % FRAMES_PER_VIDEO:
        raise root["images"].error(f"expected {FRAMES_PER_VIDEO} for each video, got {len(images)} in all")
    annotations = root["annotations"].entries(len(images), "annotations, one an image")
    names = [image["id"].path() for image in images]
    wanted = set(chosen([video_name(name) for name in names[::FRAMES_PER_VIDEO]], videos, true_json))
    places = [
        k for k in range(len(images)) if video_name(names[k - k % FRAMES_PER_VIDEO]) in wanted
    ]  # of the images that are scored
    predicted_root = read_json(results / "pred.json")["annotations"]
    predictions = predicted_root.entries()
    if len(predictions) == len(images):
        predictions = [predictions[k] for k in places]
    else:
        predictions = predicted_root.entries(len(places), "annotations, one an image")
    true_names = sorted(true_picture(image) for image in images)
    pictures = find_pictures(truth)

    vpq = VPQ(is_thing, CITYSCAPES_VPS_WINDOWS)
    for k, predicted in zip(places, predictions, strict=True):
        picture = results / "pan_pred" / f"{names[k]}.png"
        vpq.add_frame(*read_frame(annotations[k], pictures / true_names[k], predicted, picture, is_thing))
        if (k + 1) % FRAMES_PER_VIDEO == 0:
            vpq.end_video()
    windows = {n: vpq.summary(n) for n in vpq.windows}
    means = {f"VPQ/{group}": value for group, value in mean_over_windows(windows, vpq.windows).items()}
    return means | {f"{n}/{name}": value for n in windows for name, value in windows[n].items()}


def find_annotations(truth: Path) -> Path | None:
    """The JSON file of the truth, None where there is none."""
    return next((path for name in ANNOTATIONS if (path := truth / name).is_file()), None)


def find_pictures(truth: Path) -> Path:
    """The folder of the true pictures, if there is one."""
    places = [truth / "panoptic_video", truth / "val" / "panoptic_video"]
    return next((path for path in places if path.is_dir()), places[0])


def true_picture(image: Entry) -> str:
    """Name of the true picture of an image."""
    name = image["file_name"].path()
    end = next((end for end in PICTURES if name.endswith(end)), None)
    if end is None:
        raise image["file_name"].expected(f"a name that ends with {' or '.join(PICTURES)}")
    return name.removesuffix(end) + PICTURES[end]


def video_name(image: str) -> str:
    """Name of the video that an image is of, by the image's id."""
    return image.split("_")[0]
