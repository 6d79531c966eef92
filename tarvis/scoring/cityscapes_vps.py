"""Cityscapes-VPS: VPQ.

    results: folder of pred.json and pan_pred/<image id>.png
    truth:   folder of panpotic_gt_val_city_vps.json (as it is spelled; panoptic_... is found too) and of
             panoptic_video/

Numbers: VPQ/{all,thing,stuff}, the means over windows of 1 to 4 annotated frames (k = 0, 5, 10, 15 in
papers), and for each window n of them <n>/{all,thing,stuff}/{pq,sq,rq,n} and <n>/per_class/<id>/...; in
percent but for classes. What has no class that occurs is left out.

Entries of pred.json have no names: they are in the order of the truth's annotations, which come video by
video, six frames each. Pictures belong to the truth by name, as the names are sorted.
"""

from __future__ import annotations

from pathlib import Path

from tarvis.datasets.records import read_json
from tarvis.metrics.vpq import CITYSCAPES_VPS_WINDOWS, VPQ, mean_over_windows
from tarvis.scoring.panoptic_files import read_categories, read_frame
from tarvis.structures import InputError

ANNOTATIONS = ("panpotic_gt_val_city_vps.json", "panoptic_gt_val_city_vps.json")
FRAMES_PER_VIDEO = 6
PICTURES = {"_newImg8bit.png": "_final_mask.png", "_leftImg8bit.png": "_gtFine_color.png"}
"""End of an image's name -> end of its truth's."""


def evaluate(results: Path, truth: Path) -> dict[str, float]:
    """The numbers of Cityscapes-VPS."""
    found = [truth / name for name in ANNOTATIONS if (truth / name).is_file()]
    if not found:
        raise InputError(f"{truth}: has no {ANNOTATIONS[0]}")
    root = read_json(found[0])
    is_thing = read_categories(root)
    images = root["images"].entries()
    if not images or len(images) % FRAMES_PER_VIDEO:
        raise root["images"].error(f"expected {FRAMES_PER_VIDEO} for each video, got {len(images)} in all")
    annotations = root["annotations"].entries(len(images), "annotations, one an image")
    predictions = read_json(results / "pred.json")["annotations"].entries(
        len(images), "annotations, one an image"
    )
    true_names, names = [], []
    for image in images:
        name = image["file_name"].path()
        end = next((end for end in PICTURES if name.endswith(end)), None)
        if end is None:
            raise image["file_name"].expected(f"a name that ends with {' or '.join(PICTURES)}")
        true_names.append(name.removesuffix(end) + PICTURES[end])
        names.append(image["id"].path() + ".png")

    vpq = VPQ(is_thing, CITYSCAPES_VPS_WINDOWS)
    pictures = zip(sorted(true_names), names, strict=True)
    for k, (entry, predicted, (true_name, name)) in enumerate(
        zip(annotations, predictions, pictures, strict=True)
    ):
        true_picture, picture = truth / "panoptic_video" / true_name, results / "pan_pred" / name
        vpq.add_frame(*read_frame(entry, true_picture, predicted, picture, is_thing))
        if (k + 1) % FRAMES_PER_VIDEO == 0:
            vpq.end_video()
    windows = {n: vpq.summary(n) for n in vpq.windows}
    means = {f"VPQ/{group}": value for group, value in mean_over_windows(windows, vpq.windows).items()}
    return means | {f"{n}/{name}": value for n in windows for name, value in windows[n].items()}
