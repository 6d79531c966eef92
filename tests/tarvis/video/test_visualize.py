import numpy as np
import pytest

from tarvis.video.visualize import contact_sheet, overlay, panoptic_overlay, track_color

GREY = np.full((120, 160, 3), 128, np.uint8)


def box(y0, y1, x0, x1, size=(120, 160)):
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_tracks_keep_their_colour_and_neighbours_differ():
    colors = [np.array(track_color(i)) for i in range(1, 20)]
    assert min(abs(a - b).sum() for i, a in enumerate(colors) for b in colors[i + 1 : i + 4]) > 60
    assert track_color(5) == track_color(5 + 256)


def test_masks_are_tinted_and_the_rest_stays():
    picture = overlay(GREY, {1: box(20, 60, 20, 60)})
    inside, color = picture[40, 40].astype(int), np.array(track_color(1))
    np.testing.assert_allclose(inside, 0.55 * 128 + 0.45 * color, atol=2)
    np.testing.assert_array_equal(picture[70:, 70:], 128)
    assert (GREY == 128).all()


def test_masks_have_an_outline():
    picture = overlay(GREY, {1: box(20, 60, 20, 60)}).astype(int)
    assert abs(picture[20, 40] - picture[40, 40]).sum() > 60


def test_later_masks_lie_on_top():
    one = overlay(GREY, {1: box(0, 80, 0, 80), 2: box(20, 60, 20, 60)})
    two = overlay(GREY, {2: box(20, 60, 20, 60), 1: box(0, 80, 0, 80)})
    assert not np.array_equal(one[40, 40], two[40, 40])


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (9, 9), (50, 3)])
def test_tiny_frames_and_masks_of_one_pixel_work(size):
    frame = np.zeros((*size, 3), np.uint8)
    masks = {1: box(0, 1, 0, 1, size), 2: np.zeros(size, bool)}
    picture = overlay(frame, masks, labels={1: "one", 2: "two"}, points={1: (0, 0), 2: (size[1] - 1, 0)})
    assert picture.shape == frame.shape
    assert contact_sheet([picture] * 3).ndim == 3


def test_text_is_light_on_dark_and_stays_inside():
    frame = np.full((200, 300, 3), 128, np.uint8)
    for corner in (box(0, 3, 0, 3, (200, 300)), box(197, 200, 297, 300, (200, 300))):
        picture = overlay(frame, {1: corner}, labels={1: "name 0.97"})
        changed = np.argwhere((picture != frame).any(2))
        height, width = changed.max(0) - changed.min(0)
        assert 6 < height < 30
        assert 30 < width < 150
        assert picture.min() < 60
        assert picture.max() > 180


def test_points_are_drawn_where_they_were_given():
    picture = overlay(GREY, {}, points={3: (100, 30)})
    assert picture[30, 100].tolist() == list(track_color(3))
    changed = np.argwhere((picture != GREY).any(2))
    np.testing.assert_allclose((changed.max(0) + changed.min(0)) / 2, (30, 100), atol=0.5)


def test_stuff_is_pale_and_things_are_strong():
    semantic = np.zeros((120, 160), np.uint8)
    semantic[60:] = 1
    semantic[100:, :50] = 255
    colors = [(255, 0, 0), (0, 255, 0)]
    picture = panoptic_overlay(GREY, semantic, {4: box(10, 40, 10, 40)}, colors=colors).astype(int)
    np.testing.assert_allclose(picture[50, 100], [166, 90, 90], atol=2)
    np.testing.assert_allclose(picture[80, 100], [90, 166, 90], atol=2)
    assert picture[110, 10].tolist() == [128, 128, 128]  # void
    thing = picture[25, 25] - picture[50, 100]
    assert abs(thing).sum() > 100
    named = panoptic_overlay(GREY, semantic, {}, colors=colors, names=["above", "below"])
    assert not np.array_equal(named, panoptic_overlay(GREY, semantic, {}, colors=colors))


def test_a_contact_sheet_has_rows_and_columns():
    pictures = [np.full((60, 100, 3), 20 * i, np.uint8) for i in range(7)]
    sheet = contact_sheet(pictures, columns=3)
    assert 180 < sheet.shape[0] < 200
    assert 300 < sheet.shape[1] < 320
    assert sheet[2 + 30 + 62, 2 + 50 + 102].tolist() == [80, 80, 80]
    small = contact_sheet(pictures, columns=3, max_width=150)
    assert small.shape[1] <= 150
    assert contact_sheet(pictures[:2]).shape[1] < 210


def test_a_contact_sheet_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="none"):
        contact_sheet([])
    with pytest.raises(ValueError, match="one size"):
        contact_sheet([GREY, GREY[:50]])
