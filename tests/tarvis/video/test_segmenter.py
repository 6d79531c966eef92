"""VideoSegmenter: streaming, several tasks in one pass, what is computed and what is kept."""

import dataclasses

import numpy as np
import pytest
import torch

from tarvis.config import InferenceConfig
from tarvis.data.synthetic import synthetic_clip
from tarvis.datasets.classes import class_table
from tarvis.files import rle
from tarvis.stitch.panoptic import decode_labels
from tarvis.structures import InputError, Reference
from tarvis.video.segmenter import VideoSegmenter

SIZE = (64, 96)
SETTINGS = InferenceConfig(clip_length=4, overlap=2, max_tracks_per_clip=5)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()


@pytest.fixture(scope="module")
def clip():
    return synthetic_clip(3, num_frames=9, size=SIZE, come_and_go=False)


def references(clip, first=0):
    masks = [Reference(i, first, mask=torch.from_numpy(clip.instance[first] == i)) for i in (1, 2)]
    points = [Reference(i, first, point=(20.0 * i, 30.0)) for i in (1, 2)]
    return masks + points


def segmenter(model, tasks, given=(), settings=SETTINGS, **options):
    return VideoSegmenter(
        model, tasks, classes=class_table("synthetic"), references=given, settings=settings, **options
    )


def whole(segmenter, frames, chunk=1):
    streamed = []
    for start in range(0, len(frames), chunk):
        streamed += segmenter.step(frames[start : start + chunk])
    return streamed + segmenter.flush(), segmenter.finish()


@pytest.mark.parametrize("task", ["vis", "vps", "vos", "pet"])
@pytest.mark.parametrize("num_frames", [1, 3, 4, 5, 9])
def test_every_frame_comes_out_once_and_in_order(model, clip, task, num_frames):
    streamed, results = whole(segmenter(model, [task], references(clip)), clip.frames[:num_frames])
    assert [result.frame for result in streamed] == list(range(num_frames))
    assert results[task].num_frames == num_frames
    for track in results[task].tracks:
        assert all(mask["size"] == list(SIZE) for mask in track.masks.values())


@pytest.mark.parametrize("task", ["vis", "vps", "vos", "pet"])
@pytest.mark.parametrize(("length", "overlap"), [(4, 0), (3, 2), (1, 0), (20, 10)])
def test_any_overlap_works(model, clip, task, length, overlap):
    settings = dataclasses.replace(SETTINGS, clip_length=length, overlap=overlap)
    streamed, _ = whole(segmenter(model, [task], references(clip), settings), clip.frames)
    assert [result.frame for result in streamed] == list(range(len(clip.frames)))


def test_a_step_of_many_frames_keeps_no_more_of_them_than_a_clip(model, clip, monkeypatch):
    running = segmenter(model, ["vis"])
    kept = []
    fuse = model.fuse
    monkeypatch.setattr(model, "fuse", lambda maps: kept.append(len(running._maps)) or fuse(maps))
    running.step(clip.frames)
    assert len(kept) > 1
    assert max(kept) == SETTINGS.clip_length


def test_frames_arrive_in_any_portion_with_the_same_result(model, clip):
    one, _ = whole(segmenter(model, ["vps"]), clip.frames, chunk=1)
    all_at_once, _ = whole(segmenter(model, ["vps"]), clip.frames, chunk=9)
    assert one == all_at_once


def test_several_tasks_in_one_pass_equal_separate_passes(model, clip):
    tasks = ["vis", "vps", "vos", "pet"]
    _, together = whole(segmenter(model, tasks, references(clip)), clip.frames)
    for task in tasks:
        _, alone = whole(segmenter(model, [task], references(clip)), clip.frames)
        assert together[task] == alone[task]


def agreement(a, b):
    """Share of pixels, over all tracks and frames, on which two results of given objects agree."""
    empty = np.zeros(a.size, bool)
    same = []
    for one, other in zip(a.tracks, b.tracks, strict=True):
        for t in range(a.num_frames):
            masks = [rle.decode(track.masks[t]) if t in track.masks else empty for track in (one, other)]
            same.append((masks[0] == masks[1]).mean())
    return np.mean(same)


def test_objects_that_come_later_start_their_own_clips_beside_those_of_other_tasks(model, clip):
    late = references(clip, first=3)[:2]
    streamed, together = whole(segmenter(model, ["vis", "vos"], late), clip.frames)
    _, alone = whole(segmenter(model, ["vos"], late), clip.frames)
    # other frames share a backbone call, so rounding differs
    assert agreement(together["vos"], alone["vos"]) > 0.99
    before = [result for result in streamed if result.task == "vos" and result.frame < 3]
    assert len(before) == 3
    assert not any(result.masks for result in before)


def test_frames_shared_by_clips_pass_the_backbone_once(model, clip, monkeypatch):
    passed = []
    extract = model.extract
    monkeypatch.setattr(model, "extract", lambda frames: passed.append(frames.shape[1]) or extract(frames))
    whole(segmenter(model, ["vis"]), clip.frames)
    assert sum(passed) == len(clip.frames)


def test_cached_frames_give_the_features_of_an_encoded_clip(model, clip, monkeypatch):
    fused = []
    fuse = model.fuse
    monkeypatch.setattr(model, "fuse", lambda maps: fused.append(fuse(maps)) or fused[-1])
    whole(segmenter(model, ["vis"]), clip.frames)
    assert len(fused) == 4
    for start, features in zip((0, 2, 4, 6), fused, strict=True):
        frames = torch.from_numpy(clip.frames[start : start + 4]).permute(0, 3, 1, 2)[None]
        expected = model.extract(frames)
        torch.testing.assert_close(features.mask_features, fuse(expected).mask_features, atol=1e-4, rtol=1e-4)


def storage_bytes(tensors):
    """Memory that tensors keep alive, which for a view is all of what it is a view of."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize(("length", "overlap"), [(4, 2), (4, 3), (5, 1), (4, 0)])
def test_memory_does_not_grow_with_the_video(model, clip, length, overlap):
    settings = dataclasses.replace(SETTINGS, clip_length=length, overlap=overlap)
    long = segmenter(model, ["vis", "vps", "vos"], references(clip), settings)
    frame = torch.from_numpy(clip.frames[:1]).permute(0, 3, 1, 2)[None]  # [1, 1, 3, H, W]
    frame_bytes, map_bytes = frame.nbytes, storage_bytes(model.extract(frame))
    for _ in range(6):
        long.step(clip.frames[:4])
        assert len(long._maps) <= overlap
        assert len(long._maps) + len(long._frames) < length
        assert storage_bytes(m for maps in long._maps.values() for m in maps) <= len(long._maps) * map_bytes
        assert storage_bytes(long._frames.values()) <= len(long._frames) * frame_bytes


def test_vps_gives_every_pixel_a_stuff_class(model, clip):
    streamed, results = whole(segmenter(model, ["vps"]), clip.frames)
    stuff = class_table("synthetic").stuff
    for result in streamed:
        labels = decode_labels(result.stuff)
        assert labels.shape == SIZE
        assert set(np.unique(labels)) <= set(stuff)
    assert set(results["vps"].stuff) == set(range(len(clip.frames)))


def test_vos_masks_of_a_frame_do_not_overlap_in_a_single_clip(model, clip):
    settings = dataclasses.replace(SETTINGS, clip_length=20, overlap=0)
    streamed, results = whole(segmenter(model, ["vos"], references(clip), settings), clip.frames)
    assert [track.id for track in results["vos"].tracks] == [1, 2]
    for result in streamed:
        covered = sum((rle.decode(mask).astype(int) for mask in result.masks.values()), np.zeros(SIZE, int))
        assert covered.max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_masks_like_single(model, clip, dtype):
    _, full = whole(segmenter(model, ["vps", "vos"], references(clip)), clip.frames)
    _, half = whole(segmenter(model, ["vps", "vos"], references(clip), amp=dtype), clip.frames)
    same = [
        (decode_labels(full["vps"].stuff[t]) == decode_labels(half["vps"].stuff[t])).mean() for t in range(9)
    ]
    assert np.mean(same) > 0.9
    assert any(rle.decode(mask).any() for track in full["vos"].tracks for mask in track.masks.values())
    assert agreement(full["vos"], half["vos"]) > 0.9


def test_results_of_vis_name_the_streamed_id_that_they_come_from(model, clip):
    streamed, results = whole(segmenter(model, ["vis"]), clip.frames)
    tracks = results["vis"].tracks
    shown = {source: {} for source in (track.source for track in tracks)}
    for result in streamed:
        for source in result.masks.keys() & shown.keys():
            shown[source][result.frame] = result.masks[source]
    best = {}  # of each class: entries come by falling score
    for track in tracks:
        best.setdefault(track.label, track)
        assert track.masks.keys() == shown[track.source].keys()
        for frame, mask in track.masks.items():  # without what better entries of the class cover
            assert not (rle.decode(mask) & ~rle.decode(shown[track.source][frame])).any()
    assert best
    for track in best.values():
        assert track.masks == shown[track.source]


def test_frames_of_another_size_are_refused(model, clip):
    running = segmenter(model, ["vis"])
    running.step(clip.frames[:2])
    with pytest.raises(ValueError, match="frame 2 is 32x96, those before 64x96"):
        running.step(clip.frames[2:3, :32])


def test_a_task_without_its_targets_is_refused(model, clip):
    with pytest.raises(ValueError, match="no mask was given"):
        segmenter(model, ["vos"]).step(clip.frames[:1])
    with pytest.raises(ValueError, match="no point was given"):
        segmenter(model, ["pet"]).step(clip.frames[:1])
    with pytest.raises(ValueError, match="name a class set"):
        VideoSegmenter(model, ["vis"]).step(clip.frames[:1])
    with pytest.raises(ValueError, match="no class set 'ovis'"):
        VideoSegmenter(model, ["vis"], classes=class_table("ovis"), settings=SETTINGS).step(clip.frames[:4])
    with pytest.raises(ValueError, match="expected one or several of vis, vps, vos, pet"):
        VideoSegmenter(model, ["sam"])


def test_a_reference_past_the_end_is_refused(model, clip):
    late = [Reference(1, 20, point=(3, 3))]
    with pytest.raises(ValueError, match=r"given at frame 20, but the video has 9 frames"):
        whole(segmenter(model, ["pet"], late), clip.frames)


def test_a_model_in_train_mode_is_refused(tiny_model):
    with pytest.raises(InputError, match="in train mode"):
        segmenter(tiny_model().train(), ["vis"])


def test_an_empty_video_is_refused(model):
    with pytest.raises(ValueError, match="no frames"):
        segmenter(model, ["vis"]).finish()
