import pytest

from tarvis.config import VIDEO_CLASS_SETS
from tarvis.datasets.classes import TABLES, class_table, distinct_colors, named_classes
from tarvis.structures import InputError


@pytest.mark.parametrize(
    ("name", "classes", "things"),
    [
        ("youtube_vis_2021", 40, 40),
        ("youtube_vis_2019", 40, 40),
        ("ovis", 25, 25),
        ("kitti_step", 19, 2),
        ("cityscapes_vps", 19, 8),
        ("vipseg", 124, 58),
        ("coco", 133, 80),
        ("ade20k", 150, 100),
        ("cityscapes", 34, 10),
        ("mapillary", 65, 37),
        ("synthetic", 8, 5),
    ],
)
def test_every_table_is_complete(name, classes, things):
    table = class_table(name)
    assert table.name == name
    assert table.num_classes == len(table.names) == len(table.is_thing) == len(table.colors) == classes
    assert len(set(table.names)) == classes
    assert len(table.things) == things
    assert sorted(table.things + table.stuff) == list(range(classes))
    assert all(len(color) == 3 and all(0 <= c <= 255 for c in color) for color in table.colors)


def test_this_list_names_all_tables():
    assert len(TABLES) == 11
    assert set(VIDEO_CLASS_SETS) <= set(TABLES)


@pytest.mark.parametrize("name", VIDEO_CLASS_SETS)
def test_sizes_agree_with_the_published_models(name):
    assert class_table(name).num_classes == VIDEO_CLASS_SETS[name]


def test_known_classes_stand_at_their_index():
    assert class_table("kitti_step").things == (11, 13)
    assert class_table("cityscapes_vps").things == tuple(range(11, 19))
    assert class_table("cityscapes_vps").names[13] == "car"
    assert class_table("coco").names[0] == "person"
    assert class_table("youtube_vis_2021").names[0] == "airplane"


def test_made_up_colours_differ():
    for count in (25, 40, 200):
        assert len(set(distinct_colors(count))) == count
    assert class_table("ovis").colors == tuple(distinct_colors(25))


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'youtube_vis'.*youtube_vis_2021.*synthetic"):
        class_table("youtube_vis")


def test_classes_are_named_with_commas_between_and_may_have_some_themselves():
    table = named_classes("mine", ["road, route", "cat", "road"], [False, True, False])
    assert table.named("road, route") == {0}
    assert table.named("road,cat") == {1, 2}
    assert table.named("cat, road,route") == {0, 1}
    with pytest.raises(InputError, match="unknown class 'route'; mine has: road, route; cat; road"):
        table.named("road, cat, route")
