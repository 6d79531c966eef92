"""Own data: COCO instances, COCO panoptic, YouTube-VIS and folders of masks; what is damaged is named."""

import copy
import dataclasses
import json

import cv2
import numpy as np
import pytest

from tarvis.data.clips import Kind
from tarvis.data.loader import TrainingLoader
from tarvis.data.sets import open_set, open_sets
from tarvis.data.settings import DataSettings
from tarvis.data.synthetic import synthetic_clip
from tarvis.datasets.own import read_own
from tarvis.files import rle
from tarvis.files.pictures import encode_ids, voc_palette
from tarvis.structures import InputError
from tests.tarvis.fuzz import only_our_errors, put

SIZE = (48, 64)
CATEGORIES = [{"id": 7, "name": "disc"}, {"id": 3, "name": "other"}]


@pytest.fixture(scope="module")
def clip():
    return synthetic_clip(1, 5, SIZE, 3, come_and_go=False)


def code(mask):
    return {"size": list(SIZE), "counts": rle.encode(mask[None])[0]["counts"].decode()}


def write_frames(folder, frames, suffix=".jpg"):
    folder.mkdir(parents=True)
    for t, frame in enumerate(frames):
        cv2.imwrite(str(folder / f"{t:03d}{suffix}"), frame[..., ::-1])


def instances(clip):
    """Each object in another of the three ways to write a mask."""
    runs = []
    for value, group in zip(*_runs(clip.instance[0] == 2), strict=True):
        if not runs and value:
            runs.append(0)
        runs.append(int(group))
    y, x = (int(v) for v in np.argwhere(clip.instance[0] == 1).mean(0))
    polygon = [x - 6, y - 6, x + 6, y - 6, x + 6, y + 6, x - 6, y + 6]
    masks = [[polygon], {"size": list(SIZE), "counts": runs}, code(clip.instance[0] == 3)]
    return {
        "images": [
            {"id": k, "file_name": f"{k:03d}.jpg", "height": SIZE[0], "width": SIZE[1]} for k in range(3)
        ],
        "annotations": [
            {"id": k, "image_id": 0, "category_id": (7, 3, 3)[k], "segmentation": mask, "iscrowd": 0}
            for k, mask in enumerate(masks)
        ],
        "categories": CATEGORIES,
    }


def _runs(mask):
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    edges = np.concatenate([[0], ends, [flat.size]])
    return flat[edges[:-1]], np.diff(edges)


def panoptic(clip, folder):
    folder.mkdir()
    listed = []
    for k in range(3):
        numbers = clip.instance[k].astype(np.int32) * 1000 + 70
        rgb = np.stack([numbers & 255, numbers >> 8 & 255, numbers >> 16], -1).astype(np.uint8)
        cv2.imwrite(str(folder / f"{k:03d}.png"), rgb[..., ::-1])
        segments = [{"id": 70, "category_id": 3}] + [
            {"id": 1000 * i + 70, "category_id": 7, "iscrowd": int(i == 3)} for i in (1, 2, 3)
        ]
        listed.append({"image_id": k, "file_name": f"{k:03d}.png", "segments_info": segments})
    categories = [{"id": 7, "name": "shape", "isthing": 1}, {"id": 3, "name": "ground", "isthing": 0}]
    return instances(clip) | {"annotations": listed, "categories": categories}


def tracks(clip):
    return {
        "videos": [
            {
                "id": 4,
                "height": SIZE[0],
                "width": SIZE[1],
                "length": 5,
                "file_names": [f"street/{t:03d}.jpg" for t in range(5)],
            }
        ],
        "annotations": [
            {
                "id": k,
                "video_id": 4,
                "category_id": 3 if k % 2 else 7,
                "segmentations": [
                    code(frame == k) if (frame == k).any() else None for frame in clip.instance
                ],
            }
            for k in (1, 2, 3)
        ],
        "categories": CATEGORIES,
    }


@pytest.fixture
def write(tmp_path, clip):
    """Writes a file of a kind beside its pictures; gives its path."""

    def make(kind, change=lambda _: None, name="my_shapes.json"):
        if kind == "tracks":
            write_frames(tmp_path / "images" / "street", clip.frames)
            tree = tracks(clip)
        else:
            write_frames(tmp_path / "images", clip.frames)
            tree = instances(clip) if kind == "instances" else panoptic(clip, tmp_path / "my_shapes")
        tree = copy.deepcopy(tree)
        change(tree)
        (tmp_path / name).write_text(json.dumps(tree))
        return tmp_path / name

    return make


def changes(**kwargs):
    return DataSettings(sets={"my_shapes": {"min_sizes": (48,), "image_size": (48, 48), **kwargs}})


def test_instances_of_images_train_vis_and_vos(write, clip):
    path = write("instances")
    own = read_own(path)
    assert own.classes.names == ("disc", "other")
    (image,) = own.images  # the others show nothing
    assert own.left_out == 2
    assert image.labels == {1: 0, 2: 1, 3: 1}
    masks = image.read_map().masks
    assert (rle.decode(masks[2]) == (clip.instance[0] == 2)).all()
    assert (rle.decode(masks[3]) == (clip.instance[0] == 3)).all()
    assert 100 <= rle.area(masks[1]) <= 169
    opened = open_set(str(path), changes())
    assert opened.name == "my_shapes"
    assert set(opened.clips.kinds()) == {Kind("vis"), Kind("vos")}
    sample = opened.clips.draw(Kind("vis"), 0, np.random.default_rng(0))
    assert set(sample.labels) <= {0, 1}


def test_crowds_are_no_objects(write):
    def crowd(tree):
        tree["annotations"][0]["iscrowd"] = 1

    assert read_own(write("instances", crowd)).images[0].labels == {1: 1, 2: 1}


def test_panoptic_images_train_every_task(write):
    opened = open_set(str(write("panoptic")), changes())
    assert {kind.task for kind in opened.clips.kinds()} == {"vis", "vps", "vos"}
    sample = opened.clips.draw(Kind("vps"), 0, np.random.default_rng(0))
    assert set(np.unique(sample.semantic)) <= {0, 1, 255}


def test_a_crowd_of_a_panoptic_image_has_a_class_but_is_no_object(write, clip):
    (image, *_) = read_own(write("panoptic")).images
    assert list(image.labels.values()) == [0, 0]
    truth = image.read_map()
    crowd = clip.instance[0] == 3
    assert (truth.ids[crowd] == 0).all()
    assert (truth.semantic[crowd] == 0).all()


def test_tracks_of_videos_train_vis_and_vos(write, clip):
    path = write("tracks")
    (video,) = read_own(path).videos
    assert video.name == "street"
    assert video.truth.labels == {1: 1, 2: 0, 3: 1}
    assert (rle.decode(video.truth.read(2).masks[1]) == (clip.instance[2] == 1)).all()
    opened = open_set(str(path), changes())
    assert {kind.task for kind in opened.clips.kinds()} == {"vis", "vos"}
    assert opened.clips.draw(Kind("vis"), 0, np.random.default_rng(0)).size == (48, 64)
    only = open_set(str(path), changes(tasks=("vos",)))
    assert only.classes is None


@pytest.mark.parametrize(
    "names",
    [
        ("JPEGImages", "Annotations"),
        ("JPEGImages/480p", "Annotations/480p"),
        ("frames", "masks"),
        ("images", "masks"),
    ],
)
@pytest.mark.parametrize("video", ["", "street"])
def test_a_folder_of_frames_and_masks_trains_vos(tmp_path, clip, names, video):
    root = tmp_path / "my video"
    write_frames(root / names[0] / video, clip.frames)
    masks = root / names[1] / video
    masks.mkdir(parents=True)
    for t in (0, 2, 3, 4):  # not every frame has a mask
        ids = np.where(clip.instance[t] == 3, 255, clip.instance[t]).astype(np.uint8)
        (masks / f"{t:03d}.png").write_bytes(encode_ids(ids, voc_palette()))
    own = read_own(root)
    (found,) = own.videos
    assert (own.name, own.classes, own.tasks) == ("my_video", None, ("vos",))
    assert found.frame_names == ("000", "002", "003", "004")
    assert found.truth.labels == {1: None, 2: None}  # 255 is void
    opened = open_set(str(root), DataSettings())
    sample = opened.clips.draw(Kind("vos", 2), 0, np.random.default_rng(0))
    assert sample.labels == (-1, -1)


@pytest.mark.parametrize(
    ("file", "pictures"),
    [
        ("_annotations.coco.json", "."),
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_default.json", "images/default"),
        ("annotations/instances_val.json", "images"),
        ("labels/mine.json", "."),
    ],
)
def test_images_are_found_where_tools_put_them(tmp_path, clip, file, pictures):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(json.dumps(instances(clip)))
    (tmp_path / pictures).mkdir(parents=True, exist_ok=True)
    for t, frame in enumerate(clip.frames):
        cv2.imwrite(str(tmp_path / pictures / f"{t:03d}.jpg"), frame)
    (image,) = read_own(tmp_path / file).images
    assert image.image.resolve() == (tmp_path / pictures / "000.jpg").resolve()


def test_crowds_of_videos_are_no_tracks(write):
    def crowd(tree):
        tree["annotations"][1]["iscrowd"] = 1

    (video,) = read_own(write("tracks", crowd)).videos
    assert video.truth.labels == {1: 1, 2: 1}
    assert {id_ for ids in video.truth.visible for id_ in ids} <= {1, 2}


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path, clip):
    write_frames(tmp_path / "frames", clip.frames)
    masks = tmp_path / "masks"
    masks.mkdir()
    for t in range(5):
        (tmp_path / f"frames/{t:03d}.jpg").rename(tmp_path / f"frames/frame{3 * t}.JPG")
        ids = clip.instance[t].astype(np.uint8)
        (masks / f"frame{3 * t}.PNG").write_bytes(encode_ids(ids, voc_palette()))
    (masks / "._frame0.png").write_bytes(b"what a Mac leaves behind")
    (video,) = read_own(tmp_path).videos
    assert video.frame_names == ("frame0", "frame3", "frame6", "frame9", "frame12")
    assert (video.truth.read(4).ids == clip.instance[4]).all()


def test_masks_of_void_alone_are_refused_with_a_hint(tmp_path, clip):
    write_frames(tmp_path / "frames", clip.frames[:1])
    (tmp_path / "masks").mkdir()
    white = np.where(clip.instance[0], 255, 0).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "masks/000.png"), white)
    with pytest.raises(InputError, match=r"masks: no mask shows an object, only 255.*number objects from 1"):
        read_own(tmp_path)
    cv2.imwrite(str(tmp_path / "masks/000.png"), 0 * white)
    with pytest.raises(InputError, match=r"masks: no mask shows an object$"):
        read_own(tmp_path)


def test_frames_and_categories_need_neither_order_nor_one_size(tmp_path):
    """Ids from 0 and with gaps, images of several sizes and kinds, some without objects."""
    boxes = {"wide.png": (40, 90), "tall.JPG": (90, 40), "bare.bmp": (50, 50)}
    tree = {"images": [], "annotations": [], "categories": [{"id": 12, "name": "b"}, {"id": 0, "name": "a"}]}
    for k, (name, (h, w)) in enumerate(boxes.items()):
        cv2.imwrite(str(tmp_path / name), np.full((h, w, 3), 60 * k, np.uint8))
        tree["images"].append({"id": f"image {k}", "file_name": name, "height": h, "width": w})
        if name != "bare.bmp":
            polygon = [[5, 5, w - 5, 5, w - 5, h - 5, 5, h - 5]]
            category = {"wide.png": 0, "tall.JPG": 12}[name]
            tree["annotations"].append(
                {"image_id": f"image {k}", "category_id": category, "segmentation": polygon}
            )
    (tmp_path / "my_shapes.json").write_text(json.dumps(tree))
    own = read_own(tmp_path / "my_shapes.json")
    assert own.classes.names == ("b", "a")
    assert [(image.size, image.labels) for image in own.images] == [((40, 90), {1: 1}), ((90, 40), {1: 0})]
    data = dataclasses.replace(changes(), train=(str(tmp_path / "my_shapes.json"),), num_workers=0)
    loader = TrainingLoader([open_sets(data)[0].clips], data, seed=0, batch_size=4, micro_batch=2)
    for step in loader.steps(0, 8):
        for batch in step:
            assert batch.frames.shape == (2, 3, 3, 64, 64)
            assert all(masks.flatten(1).any(1).all() for masks in batch.masks())


def test_data_called_like_a_known_set_is_refused(write):
    path = write("instances", name="coco.json")
    with pytest.raises(InputError, match="coco is the name of a known set"):
        open_set(str(path), DataSettings())


def test_two_files_of_one_name_are_refused(write):
    path = str(write("instances"))
    with pytest.raises(InputError, match="two sets that are called my_shapes, as their files: rename one"):
        open_sets(dataclasses.replace(changes(), train=(path, path)))


def test_a_file_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "cat.mp4").write_bytes(bytes(99))
    with pytest.raises(InputError, match=r"cat.mp4: expected a .json file, or a folder of frames and masks"):
        open_set(str(tmp_path / "cat.mp4"), DataSettings())


def test_a_task_that_the_data_cannot_train_is_refused(write):
    with pytest.raises(InputError, match=r"cannot train vps; it can: vis, vos"):
        open_set(str(write("instances")), changes(tasks=("vps",)))


DAMAGE = [
    (
        "instances",
        ("annotations", 0, "category_id"),
        99,
        r"annotations\[0\].category_id: category 99 is unknown",
    ),
    ("instances", ("annotations", 0, "image_id"), 99, r"image 99 is unknown"),
    ("instances", ("images", 1, "id"), 0, r"image 0 appears twice"),
    ("instances", ("images", 0, "file_name"), "../x.jpg", r"not a path below"),
    ("instances", ("images", 0, "file_name"), "no.jpg", r"no.jpg not found; looked in"),
    ("instances", ("images", 0, "height"), 0, r"images\[0\].height"),
    ("instances", ("categories",), [], r"expected 1 to 254 categories, got 0"),
    ("instances", ("categories", 1, "id"), 7, r"category 7 appears twice"),
    ("instances", ("annotations",), [], r"no image shows an object"),
    ("instances", ("annotations", 0, "segmentation"), [], r"annotations\[0\].segmentation: expected a run-"),
    (
        "instances",
        ("annotations", 0, "segmentation"),
        [[1, 2, 3, 4, 5, 6, 7]],
        r"tion\[0\]: expected x and y of",
    ),
    ("instances", ("annotations", 0, "segmentation"), None, r"segmentation: expected"),
    ("instances", ("annotations", 0, "iscrowd"), "no", r"iscrowd: expected 0 or 1"),
    ("tracks", ("videos",), [{"id": 4}, {"id": 4}], r"has no 'file_names'"),
    ("panoptic", ("annotations", 0, "segments_info", 1, "id"), 70, r"id 70 appears twice"),
    ("tracks", ("videos",), lambda videos: 2 * videos, r"videos\[1\].id: id 4 appears twice"),
    ("tracks", ("annotations", 0, "video_id"), 9, r"video 9 is unknown"),
    ("tracks", ("annotations", 0, "segmentations"), [], r"expected 5 segmentations"),
    (
        "tracks",
        ("annotations", 0, "segmentations", 0),
        {"size": [48, 64], "counts": "0"},
        r"a run-length code",
    ),
]


@pytest.mark.parametrize(("kind", "place", "value", "message"), DAMAGE)
def test_damage_is_named_with_its_place(write, kind, place, value, message):
    path = write(kind, lambda tree: put(tree, place, value))
    with pytest.raises(InputError, match=message) as error:
        read_own(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "mask", [[["a"] * 6], {"size": [48, 63], "counts": "x"}, {"size": [48, 64], "counts": "x"}]
)
def test_a_mask_whose_numbers_are_wrong_is_named_when_it_is_read(write, mask):
    def damage(tree):
        tree["annotations"][0]["segmentation"] = mask

    path = write("instances", damage)
    with pytest.raises(InputError, match=r"annotations\[0\].segmentation"):
        read_own(path).images[0].read_map()


PLACES = {"instances": ("annotations", 0, "segmentation"), "tracks": ("annotations", 0, "segmentations", 0)}
BOX = np.zeros(SIZE, bool)
BOX[10:20, 5:30] = True
FORMS = {
    "polygon": [[5, 10, 30, 10, 30, 20, 5, 20]],
    "polygons": [[5, 10, 30, 10, 30, 20, 5, 20], [5.0, 10.0, 17, 10, 17, 20, 5, 20]],
    "runs": {"size": [48.0, 64.0], "counts": [5 * 48 + 10] + [10, 38] * 24 + [10, 34 * 48 + 28]},
    "odd runs": {"size": [48, 64], "counts": [250, 0, 0] + [10, 38] * 24 + [10, 34 * 48 + 28, 0]},
    "code": code(BOX),
}


def first_mask(path):
    own = read_own(path)
    return (own.videos[0].truth.read(0) if own.videos else own.images[0].read_map()).masks.get(1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", PLACES)
def test_images_and_videos_take_a_mask_in_every_form(write, kind, form):
    def change(tree):
        put(tree, PLACES[kind], FORMS[form])
        tree["annotations"][0] |= {"iscrowd": None}
        for entry in (*tree.get("images", ()), *tree.get("videos", ())):
            entry |= {"height": 48.0, "width": 64.0}

    assert first_mask(write(kind, change)) == rle.encode(BOX[None])[0]


@pytest.mark.parametrize("kind", PLACES)
def test_polygons_without_area_are_left_out_with_a_warning(write, kind):
    path = write(kind, lambda tree: put(tree, PLACES[kind], [[1, 2, 3, 4], *FORMS["polygon"], []]))
    where = ".".join(map(str, PLACES[kind])).replace(".0", r"\[0\]")
    with pytest.warns(UserWarning, match=rf"my_shapes.json: left out .*: {where}\[0\], {where}\[2\]$"):
        assert first_mask(path) == rle.encode(BOX[None])[0]


@pytest.mark.parametrize("kind", PLACES)
def test_an_object_of_nothing_else_is_left_out(write, kind):
    path = write(kind, lambda tree: put(tree, PLACES[kind], [[1, 2, 3, 4]]))
    before = first_mask(write_again(path, lambda tree: tree["annotations"].pop(0)))
    with pytest.warns(UserWarning, match="left out polygons of fewer than three points"):
        found = first_mask(path)
    assert found == (before if kind == "instances" else None)


def write_again(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    other = path.with_name("other.json")
    other.write_text(json.dumps(tree))
    return other


@pytest.mark.parametrize("value", [[], "", 3, {"size": [48, 64]}, {"size": [48, 64], "counts": []}])
@pytest.mark.parametrize("kind", PLACES)
def test_what_is_no_mask_is_refused_for_images_and_videos(write, kind, value):
    path = write(kind, lambda tree: put(tree, PLACES[kind], value))
    with pytest.raises(InputError, match=r"ions\[0\]\.segmentation.*(expected a run-length code|has no)"):
        first_mask(path)


def test_a_folder_without_masks_lists_what_was_looked_for(tmp_path):
    with pytest.raises(
        InputError, match=r"masks \(.png files\); looked for .*JPEGImages with .*Annotations.*frames with"
    ):
        read_own(tmp_path)


def test_a_mask_without_frame_and_masks_of_two_sizes_are_named(tmp_path, clip):
    write_frames(tmp_path / "frames", clip.frames[:3])
    (tmp_path / "masks").mkdir()
    for t, part in ((0, np.s_[:40]), (1, np.s_[:]), (2, np.s_[:]), (7, np.s_[:])):
        (tmp_path / "masks" / f"{t:03d}.png").write_bytes(encode_ids(clip.instance[0][part], voc_palette()))
    with pytest.raises(InputError, match=r"007.png: there is no frame"):
        read_own(tmp_path)
    (tmp_path / "masks" / "007.png").unlink()
    with pytest.raises(InputError, match=r"000.png: expected a mask of \(48, 64\), .* got \(40, 64\)"):
        read_own(tmp_path)


@pytest.mark.parametrize("kind", ["instances", "panoptic", "tracks"])
def test_whatever_is_wrong_in_a_file_is_an_input_error(write, kind):
    path = write(kind)

    def use():
        own = read_own(path)
        for image in own.images:
            image.read_map()
        for video in own.videos:
            for t in range(len(video.images)):
                video.truth.read(t)

    only_our_errors(use, [path], path.parent, [[]], [1e300] * 6, max_examples=80)
