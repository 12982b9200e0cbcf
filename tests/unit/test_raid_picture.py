"""Pictures of layouts, and that the document has them as the code places the data."""

import pytest

from pmblk.raid.geometry import LEVELS, layouts_of
from pmblk.raid.picture import beside, picture
from tests import pictures


def test_a_picture_has_a_line_for_each_row_and_a_column_for_each_slot() -> None:
    assert picture(pictures.shape("5 left-symmetric 4 rows=3")) == [
        "    0   1   2   3",
        "0   D0  D1  D2  P",
        "1   D4  D5  P   D3",
        "2   D8  P   D6  D7",
    ]


def test_a_picture_has_both_parities_and_every_copy() -> None:
    assert picture(pictures.shape("6 left-symmetric 4 rows=1"))[1] == "0   Q   D0  D1  P"
    assert picture(pictures.shape("1 - 2 rows=1"))[1] == "0   D0  D0"
    assert picture(pictures.shape("10 far 3 x2 rows=2"))[1:] == ["0   D0  D1  D2", "1   D2  D0  D1"]


def test_a_chunk_that_is_not_used_is_a_dot() -> None:
    assert picture(pictures.shape("10 near 3 x2 rows=1"))[1] == "0   D0  D0  ."


def test_a_picture_can_be_cut_short() -> None:
    geometry = pictures.shape("0 - 2 rows=9")
    assert len(picture(geometry, rows_max=2)) == 3
    assert len(picture(geometry, rows_max=99)) == 10


def test_pictures_of_different_heights_stand_beside_each_other() -> None:
    assert beside([("one", ["a"]), ("two", ["b", "c"])]) == ["one    two", "a      b", "       c"]


def test_the_document_has_its_pictures_as_the_code_places_the_data() -> None:
    text = pictures.DOCUMENT.read_text()
    assert pictures.redrawn(text) == text, "python -m tests.pictures"
    assert len(pictures.BLOCK.findall(text)) == text.count("<!-- picture:")


@pytest.mark.parametrize("level", LEVELS)
def test_the_document_has_a_picture_of_every_layout(level: int) -> None:
    shown = pictures.shown(pictures.DOCUMENT.read_text())
    assert {one.layout for one in shown if one.level == level} == set(layouts_of(level))
