"""Training clips of videos and of images: frames, parts, masks."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tarvis.data.clips import Kind, VideoClips
from tarvis.data.images import ImageClips
from tarvis.data.layers import frame_layers, stack_layers, union
from tarvis.data.loader import collate
from tarvis.data.sampling import (
    consecutive_frames,
    first_frames,
    frames_after,
    frames_around,
    window_showing,
    window_with,
)
from tarvis.data.settings import SetSettings
from tarvis.data.synthetic import synthetic_clip
from tarvis.datasets.benchmark import FrameTruth, Truth, VideoSample
from tarvis.datasets.image_sets import IMAGE_SETS
from tarvis.datasets.registry import BENCHMARKS
from tarvis.files import rle
from tarvis.files.pictures import Window, read_window
from tarvis.structures import VOID, InputError
from tarvis.tasks import TRAINED

SIZE = (96, 160)
PUBLISHED = {name: SetSettings(**of.training) for name, of in (BENCHMARKS | IMAGE_SETS).items()}
PLAIN = SetSettings(TRAINED, window=2, min_sizes=None, crop=(1, 1), colour="none", flip=False)


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def clip():
    return synthetic_clip(3, 8, SIZE, 4, come_and_go=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory, clip):
    folder = tmp_path_factory.mktemp("frames")
    for t, frame in enumerate(clip.frames):
        cv2.imwrite(str(folder / f"{t}.png"), frame[..., ::-1])
    return [folder / f"{t}.png" for t in range(len(clip.frames))]


def video(files, clip, *, as_codes=False, name="a video", visible=None):
    ids = clip.instance.astype(np.uint16)
    shown = [tuple(int(k) for k in np.unique(frame) if k) for frame in ids] if visible is None else visible

    def read(t):
        if not as_codes:
            return FrameTruth(ids=ids[t], semantic=clip.semantic[t])
        codes = rle.encode(np.stack([ids[t] == k for k in shown[t]]))
        return FrameTruth(dict(zip(shown[t], codes, strict=True)))

    return VideoSample(
        name,
        tuple(files),
        tuple(f.stem for f in files),
        size=clip.instance.shape[1:],
        truth=Truth({**clip.classes}, tuple(shown), read),
    )


# Frames


def test_frames_lie_around_one_that_shows_an_object(random):
    visible = [()] * 30 + [(1,)] + [()] * 30
    for _ in range(100):
        frames = frames_around(visible, 3, 7.5, random)
        assert 30 in frames
        assert frames == sorted(set(frames))
        assert all(abs(t - 30) <= 22 for t in frames)  # round(22.5), half to even


def test_short_videos_give_clips_whose_frames_come_twice(random):
    assert frames_around([(1,), (1,)], 3, 2, random) in ([0, 0, 1], [0, 1, 1])
    assert frames_around([(1,)], 3, 2, random) == [0, 0, 0]
    assert frames_after(0, 1, 3, 2, random) == [0, 0, 0]
    assert consecutive_frames(2, 3, random) == [0, 1, 1]


def test_consecutive_frames_start_anywhere(random):
    assert {tuple(consecutive_frames(6, 3, random)) for _ in range(99)} == {
        (k, k + 1, k + 2) for k in range(4)
    }


def test_in_vos_the_given_frame_comes_first_and_the_others_are_later(random):
    for _ in range(100):
        first, *later = frames_after(4, 60, 3, 3, random)
        assert first == 4
        assert later == sorted(set(later))
        assert all(5 <= t <= 4 + 9 - 1 for t in later)


def test_every_frame_that_shows_enough_objects_can_be_the_first(files, clip):
    visible = [(1, 2)] * 5 + [(1, 2, 3)] * 3
    starts = first_frames([video(files, clip, visible=visible)], 3, 4)
    assert sorted(starts) == [1, 2, 3]
    assert starts[2][:, 1].tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]  # the last one is 8 - 3, which the original leaves out
    assert starts[3][:, 1].tolist() == [5]
    assert first_frames([video(files[:3], clip, visible=visible[:3])], 3, 4)[2][:, 1].tolist() == [0]


# Parts


def test_a_part_shows_a_quarter_of_the_objects_or_is_given_up(random):
    covered = np.zeros((100, 100), bool)
    covered[10:30, 10:30] = True
    for _ in range(50):
        window = window_showing(covered, (50, 50), random)
        assert window is None or covered[window.box].sum() >= 100
    assert window_showing(np.zeros((9, 9), bool), (4, 4), random) is None


def test_a_part_for_vos_shows_all_of_the_objects(random):
    covered = np.zeros((100, 100), bool)
    covered[40:60, 5:45] = True
    windows = [window_with(covered, (50, 50), random) for _ in range(200)]
    assert all(covered[w.box].sum() == covered.sum() for w in windows)
    assert min(w.top for w in windows) == 10
    assert max(w.top for w in windows) == 40
    assert {w.left for w in windows} <= set(range(6))
    covered[0, 99] = True
    assert window_with(covered, (50, 50), random) is None


def test_a_part_of_a_large_jpeg_is_decoded_at_half_size_where_it_belongs(tmp_path):
    ramp = np.linspace(0, 255, 400)[None].repeat(300, 0)
    image = np.stack([ramp, ramp[:, ::-1], np.full_like(ramp, 90)], -1).astype(np.uint8)
    path = tmp_path / "large.jpg"
    cv2.imwrite(str(path), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 100])
    window = Window(31, 63, 202, 203).aligned((100, 100), (300, 400))
    assert window == (30, 62, 204, 204)
    part = read_window(path, window, (100, 100), (300, 400))
    assert part.shape == (102, 102, 3)
    assert abs(part.astype(int) - cv2.resize(image[window.box], (102, 102))).max() <= 4
    with pytest.raises(InputError, match=r"large.jpg.*expected an image of \(300, 401\)"):
        read_window(path, window, (204, 204), (300, 401))


# Masks


def inner(masks):
    """Pixels [T, H, W] that are not at the edge of their mask."""
    return np.stack(
        [
            cv2.erode(mask.astype(np.uint8), np.ones((5, 5)), borderType=cv2.BORDER_CONSTANT, borderValue=0)
            for mask in masks
        ]
    ).astype(bool)


def test_objects_that_share_pixels_go_to_maps_behind():
    masks = np.zeros((3, 20, 30), bool)
    masks[0, 2:12, 2:12] = masks[1, 8:18, 8:18] = masks[2, 2:8, 20:28] = True
    truth = FrameTruth(dict(zip((5, 7, 9), rle.encode(masks), strict=True)))
    layers = frame_layers(truth, [9, 5, 7], Window(1, 2, 18, 26), (18, 26))
    assert len(layers) == 2
    for number, mask in zip((2, 3, 1), masks, strict=True):
        assert (np.any([layer == number for layer in layers], 0) == mask[1:19, 2:28]).all()
    assert stack_layers([layers, layers[:1]]).shape == (2, 2, 18, 26)
    assert (union([truth], (20, 30), [5]) == masks[0]).all()
    assert (union([truth], (20, 30)) == masks.any(0)).all()


@pytest.mark.parametrize("as_codes", [False, True])
def test_codes_and_maps_give_the_same_clip(files, clip, as_codes):
    clips = VideoClips(
        "set", [video(files, clip, as_codes=as_codes)], dataclasses.replace(PLAIN, tasks=("vis",))
    )
    sample = clips.draw(Kind("vis"), 0, np.random.default_rng(5))
    frames = [int(t) for t in sample.name.rpartition("frames ")[2].split(", ")]
    assert sample.name.startswith("set: a video, ")
    assert (sample.frames == clip.frames[frames]).all()
    ids = sorted({int(k) for k in np.unique(clip.instance[frames]) if k})
    assert sample.labels == tuple(clip.classes[k] for k in ids)
    for number, id_ in enumerate(ids, 1):
        assert (sample.layers[0] == number).tolist() == (clip.instance[frames] == id_).tolist()


@pytest.mark.parametrize("task", TRAINED)
@pytest.mark.parametrize("crop", [(1, 1), (0.75, 0.5)])
def test_frames_masks_and_labels_stay_together(files, clip, task, crop):
    """Colours are by class: wherever the map says a class, the frame must look like it."""
    settings = dataclasses.replace(PLAIN, crop=crop, min_sizes=(72, 80), flip=True)
    painted = dataclasses.replace(clip, frames=np.stack([20 * clip.semantic] * 3, -1))
    folder = Path(files[0]).parent / f"{task}{crop}"
    folder.mkdir()
    for t, frame in enumerate(painted.frames):
        cv2.imwrite(str(folder / f"{t}.png"), frame)
    clips = VideoClips("set", [video(sorted(folder.iterdir()), clip)], settings)
    for seed in range(6):
        kind = Kind(task, 2 if task == "vos" else None)
        sample = clips.draw(kind, 0, np.random.default_rng(seed))
        grey = sample.frames[..., 0].astype(int)
        assert sample.layers.shape == (1, 3, *sample.size)
        if task == "vps":
            known = sample.semantic != VOID
            assert known.mean() > 0.95
            assert (abs(grey - 20 * sample.semantic.astype(int))[known] < 10).mean() > 0.95
        for number, label in enumerate(sample.labels, 1):
            shown = sample.layers[0] == number
            assert shown.any()
            assert (abs(grey - 20 * label)[inner(shown)] < 3).all()
        if task == "vos":
            assert len(sample.labels) == 2
            assert all(sample.mask(number).any() for number in (1, 2))
            assert sample.size in ((72, 120), (80, 133), (54, 60), (60, 66))


def test_labels_of_pixels_that_nobody_labelled_stay_void(files, clip):
    semantic = clip.semantic.copy()
    semantic[:, :40] = VOID
    clips = VideoClips("s", [video(files, dataclasses.replace(clip, semantic=semantic))], PLAIN)
    sample = clips.draw(Kind("vps"), 0, np.random.default_rng(0))
    assert (sample.semantic[:, :40] == VOID).all()


def test_a_set_without_masks_or_objects_is_refused(files, clip):
    bare = dataclasses.replace(video(files, clip), truth=None)
    with pytest.raises(InputError, match="mine: video 'a video' comes without masks"):
        VideoClips("mine", [bare], PLAIN)
    with pytest.raises(InputError, match="mine: no video shows an object"):
        VideoClips("mine", [video(files, clip, visible=[()] * 8)], PLAIN)
    late = video(files, clip, visible=[()] * 7 + [(1,)])
    with pytest.raises(InputError, match="mine: no clip of 3 frames begins with an object"):
        VideoClips("mine", [late], dataclasses.replace(PLAIN, tasks=("vos",)))
    with pytest.raises(InputError, match="mine: it has no videos"):
        VideoClips("mine", [], PLAIN)


def test_labels_of_another_size_than_the_others_are_named(files, clip):
    whole = video(files, clip)

    def read(t):
        truth = whole.truth.read(t)
        return truth._replace(ids=truth.ids[:-1]) if t == 3 else truth

    odd = dataclasses.replace(whole, truth=dataclasses.replace(whole.truth, read=read))
    clips = VideoClips("s", [odd], PLAIN, clip_length=8)
    with pytest.raises(InputError, match=r"'a video': labels of frame 3 are of \(95, 160\), expected \(96,"):
        clips.draw(Kind("vis"), 0, np.random.default_rng(0))


def test_stuff_is_wanted_for_vps(files, clip):
    with pytest.raises(InputError, match="'a video' has no labels of stuff"):
        VideoClips("s", [video(files, clip, as_codes=True)], PLAIN).draw(
            Kind("vps"), 0, np.random.default_rng(0)
        )


# Images


@dataclasses.dataclass
class Image:
    name: str
    image: Path
    size: tuple
    labels: dict
    truth: FrameTruth

    def read_map(self):
        return self.truth


@pytest.fixture(scope="module")
def image(tmp_path_factory, clip):
    path = tmp_path_factory.mktemp("images") / "one.png"
    cv2.imwrite(str(path), np.stack([20 * clip.semantic[0]] * 3, -1))
    truth = FrameTruth(ids=clip.instance[0].astype(np.uint16), semantic=clip.semantic[0])
    return Image("one", path, SIZE, clip.classes, truth)


IMAGE = SetSettings(TRAINED, min_sizes=(96, 104), image_size=(88, 88), colour="none")


@pytest.mark.parametrize("task", TRAINED)
def test_every_frame_of_an_images_clip_is_the_image_moved(image, task):
    for seed in range(8):
        sample = ImageClips("set", [image], IMAGE).draw(Kind(task), 0, np.random.default_rng(seed))
        assert sample.size == (88, 88)
        assert sample.layers.shape == (1, 3, 88, 88)
        assert (sample.frames[0] != sample.frames[1]).any()
        grey = sample.frames[..., 0].astype(int)
        for number, label in enumerate(sample.labels, 1):
            shown = sample.layers[0] == number
            assert shown[0].any() if task == "vos" else shown.any()
            assert (abs(grey - 20 * label)[inner(shown)] < 3).all()
        if task == "vps":
            known = sample.semantic != VOID
            assert (grey[~known] < 20 * 8).all()
            assert (abs(grey - 20 * sample.semantic.astype(int))[known] < 10).mean() > 0.9
            outside = (grey == 0) & ~known
            assert outside.any() or known.all()


def test_places_differ_unless_the_set_says_otherwise(image):
    random = np.random.default_rng(0)
    here = dataclasses.replace(IMAGE, same_crop=True, min_sizes=(176,))
    for settings, expected in ((dataclasses.replace(IMAGE, min_sizes=(176,)), 3), (here, 1)):
        clips = ImageClips("set", [image], settings)
        views, _ = clips._views(SIZE, random)
        centres = {tuple((view @ (79.5, 47.5, 1)).round(3)[:2]) for view in views}
        assert len(centres) == expected


def test_an_image_too_narrow_gives_a_narrower_clip(image):
    settings = dataclasses.replace(IMAGE, min_sizes=(96,), max_size=120)  # 96 x 160 -> 72 x 120
    sample = ImageClips("set", [image], settings).draw(Kind("vis"), 0, np.random.default_rng(0))
    assert sample.size == (72, 88)


def test_a_clip_of_images_for_vos_keeps_some_objects(image):
    clips = ImageClips("set", [image], IMAGE, max_objects=2)
    assert len(clips.draw(Kind("vos"), 0, np.random.default_rng(1)).labels) == 2


# Batches


def test_a_batch_is_padded_and_masks_are_made_of_its_maps(files, clip):
    settings = dataclasses.replace(PLAIN, crop=(0.75, 0.75))
    clips = VideoClips("set", [video(files, clip)], settings)
    samples = [clips.draw(Kind("vps"), 0, np.random.default_rng(k)) for k in range(3)]
    batch = collate("set", "vps", samples)
    assert batch.frames.shape == (3, 3, 3, 128, 128)
    for b, (sample, masks) in enumerate(zip(samples, batch.masks(), strict=True)):
        H, W = sample.size
        assert (batch.frames[b, ..., :H, :W].numpy() == sample.frames.transpose(0, 3, 1, 2)).all()
        assert (batch.frames[b, ..., H:, :] == 128).all()
        assert (batch.semantic[b, :, :, W:] == VOID).all()
        assert masks.shape == (len(sample.labels), 3, 128, 128)
        for n, mask in enumerate(masks, 1):
            assert (mask[:, :H, :W].numpy() == (sample.layers[0] == n)).all()
        assert batch.extent[b].tolist() == [W / 128, H / 128]
        assert batch.labels_by_clip()[b].tolist() == list(sample.labels)
    assert batch.num_targets == sum(batch.counts) == len(batch.labels)
    assert batch.to("cpu").frames is batch.frames


def test_clips_of_a_vos_batch_have_equally_many_objects_and_the_last_get_points(files, clip):
    clips = VideoClips("set", [video(files, clip)], PLAIN)
    samples = [clips.draw(Kind("vos", n), 0, np.random.default_rng(n)) for n in (3, 2)]
    batch = collate("set", "vos", samples, num_points=lambda n: n - 1, pad_to=128)
    assert batch.counts == (2, 2)
    assert batch.frames.shape[-2:] == (128, 256)
    assert batch.points.shape == (2, 1, 2)
    for masks, point in zip(batch.masks(), batch.points, strict=True):
        row, column = (point[0] * torch.tensor([128, 256])).int().tolist()
        assert masks[1, 0, row, column]
        assert not masks[0, 0, row, column]


def test_more_objects_than_a_byte_can_name_fit():
    count = 300
    ids = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) // 13 + 1
    layers = frame_layers(FrameTruth(ids=ids), list(range(1, count + 1)), Window(0, 0, 64, 64), (64, 64))
    assert layers[0].dtype == np.uint16
    assert layers[0].max() == count


def test_published_settings_are_those_of_the_resolved_configurations():
    """Fine-tuning of the published models."""
    expected = {
        "youtube_vis_2021": (7.5, (448, 512), 1024),
        "ovis": (7.5, (512,), 1024),
        "kitti_step": (2, (320,), 1333),
        "vipseg": (5, (512,), 1333),
        "davis": (7.5, (512,), 1333),
        "burst": (3, (512,), 1333),
    }
    for name, values in expected.items():
        found = PUBLISHED[name]
        assert (found.window, found.min_sizes, found.max_size) == values
    assert PUBLISHED["cityscapes_vps"].consecutive
