"""The placement of data and parity: one chunk, one place, and back, for every small array."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from pmblk.raid.geometry import LEVELS, MEMBERS_MIN, Geometry, layouts_of
from pmblk.raid.layout import NONE, Place, Stripes, chunk_at, copies, survives

CHUNK = 4096


def shape(level: int, members: int, layout: str, *, chunks: int = 1, **others: Any) -> Geometry:
    fields: dict[str, Any] = {"level": level, "members": members, "layout": layout, **others}
    return Geometry(member_bytes=chunks * CHUNK, chunk_bytes=CHUNK, **fields)


MIRRORED, WITH_PARITY = (0, 1, 10), (4, 5, 6)


def geometries(
    levels: tuple[int, ...], *, rows: tuple[int, ...] = (1, 2, 5, 12)
) -> Iterator[Geometry]:
    """Every layout of 2 to 8 members, with a few lengths and every number of copies."""
    for level in levels:
        for members, layout, row in itertools.product(range(2, 9), layouts_of(level), rows):
            if members < MEMBERS_MIN[level]:
                continue
            for number in range(2, members + 1) if level == 10 else (2,):
                try:
                    yield shape(level, members, layout, chunks=row, copies=number)
                except ValueError:
                    assert layout in ("far", "offset"), "only sections can be too short"
                    assert row < number


def name(geometry: Geometry) -> str:
    return f"{geometry.level}-{geometry.layout}-{geometry.members}x{geometry.member_chunks}"


@pytest.mark.parametrize("level", MIRRORED)
def test_every_chunk_has_places_of_its_own_and_is_found_there(level: int) -> None:
    for geometry in geometries((level,)):
        taken: dict[Place, int] = {}
        for chunk in range(geometry.chunks):
            places = copies(geometry, chunk)
            assert len({slot for slot, _ in places}) == len(places), "two copies on one member"
            for place in places:
                assert 0 <= place.chunk < geometry.member_chunks, (name(geometry), chunk)
                assert taken.setdefault(place, chunk) == chunk, (name(geometry), place)
        for slot, row in itertools.product(range(geometry.members), range(geometry.member_chunks)):
            place = Place(slot, row)
            assert chunk_at(geometry, place) == taken.get(place), (name(geometry), place)


@pytest.mark.parametrize("level", MIRRORED)
def test_little_of_the_members_is_wasted(level: int) -> None:
    for geometry in geometries((level,)):
        number = {0: 1, 1: geometry.members, 10: geometry.copies}[level]
        used = geometry.chunks * number
        wasted = geometry.members * geometry.member_chunks - used
        assert 0 <= wasted < number * geometry.members


@pytest.mark.parametrize("level", MIRRORED)
def test_an_array_survives_as_long_as_every_chunk_has_a_copy(level: int) -> None:
    for geometry in geometries((level,), rows=(12,)):
        for count in range(geometry.members + 1):
            for missing in itertools.combinations(range(geometry.members), count):
                whole = all(
                    any(slot not in missing for slot, _ in copies(geometry, chunk))
                    for chunk in range(geometry.chunks)
                )
                assert survives(geometry, missing) == whole, (name(geometry), missing)


@pytest.mark.parametrize("level", WITH_PARITY)
def test_an_array_with_parity_survives_as_many_losses_as_it_has_parities(level: int) -> None:
    geometry = shape(level, 5, layouts_of(level)[0])
    for count in range(6):
        for missing in itertools.combinations(range(5), count):
            assert survives(geometry, missing) == (count <= geometry.parities)


@pytest.mark.parametrize("level", WITH_PARITY)
def test_every_slot_of_a_stripe_has_one_role(level: int) -> None:
    for geometry in geometries((level,), rows=(1,)):
        stripes = Stripes(geometry)
        for row in range(2 * geometry.members):
            stripe = stripes[row]
            parities = [slot for slot in (stripe.p, stripe.q) if slot != NONE]
            assert sorted((*stripe.data, *parities)) == list(range(geometry.members))
            assert len(parities) == geometry.parities
            assert sorted(stripe.powers) == (
                list(range(geometry.data_members)) if level == 6 else [0] * geometry.data_members
            )
            for slot in range(geometry.members):
                role = stripe.role(slot)
                assert (role == NONE) == (slot in parities)
                assert role == NONE or stripe.data[role] == slot


@pytest.mark.parametrize("level", [5, 6])
@pytest.mark.parametrize("layout", layouts_of(5))
def test_parity_rotates_over_all_members_or_stays(level: int, layout: str) -> None:
    geometry = shape(level, 5, layout)
    stripes = Stripes(geometry)
    slots = [stripes[row].p for row in range(5)]
    assert len(set(slots)) == (1 if layout.startswith("parity") else 5)


def rows(level: int, layout: str, members: int) -> list[str]:
    """The first rows, as mdadm(8) and md(4) draw them."""
    geometry = shape(level, members, layout)
    stripes, drawn = Stripes(geometry), []
    for row in range(members):
        cells = ["?"] * members
        for index, slot in enumerate(stripes[row].data):
            cells[slot] = str(row * geometry.data_members + index)
        for slot, letter in ((stripes[row].p, "P"), (stripes[row].q, "Q")):
            if slot != NONE:
                cells[slot] = letter
        drawn.append(" ".join(cells))
    return drawn


def test_the_layouts_of_level_5_are_those_that_md_draws() -> None:
    assert rows(5, "left-symmetric", 4) == ["0 1 2 P", "4 5 P 3", "8 P 6 7", "P 9 10 11"]
    assert rows(5, "left-asymmetric", 4) == ["0 1 2 P", "3 4 P 5", "6 P 7 8", "P 9 10 11"]
    assert rows(5, "right-symmetric", 4) == ["P 0 1 2", "5 P 3 4", "7 8 P 6", "9 10 11 P"]
    assert rows(5, "right-asymmetric", 4) == ["P 0 1 2", "3 P 4 5", "6 7 P 8", "9 10 11 P"]
    assert rows(5, "parity-first", 3) == ["P 0 1", "P 2 3", "P 4 5"]
    assert rows(5, "parity-last", 3) == rows(4, "", 3) == ["0 1 P", "2 3 P", "4 5 P"]


def test_the_layouts_of_level_6_are_those_that_md_draws() -> None:
    assert rows(6, "left-symmetric", 5)[:3] == ["Q 0 1 2 P", "3 4 5 P Q", "7 8 P Q 6"]
    assert rows(6, "left-asymmetric", 5)[:3] == ["Q 0 1 2 P", "3 4 5 P Q", "6 7 P Q 8"]
    assert rows(6, "right-symmetric", 4)[:2] == ["P Q 0 1", "3 P Q 2"]
    assert rows(6, "parity-last", 4)[:2] == ["0 1 P Q", "2 3 P Q"]


def test_the_powers_of_q_count_from_the_slot_behind_it() -> None:
    geometry = shape(6, 5, "left-asymmetric")
    stripe = Stripes(geometry)[2]  # 6 7 P Q 8: the slot behind Q has chunk 8
    assert stripe.data == (0, 1, 4)
    assert stripe.powers == (1, 2, 0)


def test_the_layouts_of_level_10_are_those_that_md_draws() -> None:
    def drawn(layout: str, members: int, member_chunks: int) -> list[str]:
        geometry = shape(10, members, layout, chunks=member_chunks)
        return [
            " ".join(str(chunk_at(geometry, Place(slot, row))) for slot in range(members))
            for row in range(member_chunks)
        ]

    assert drawn("near", 4, 2) == ["0 0 1 1", "2 2 3 3"]
    assert drawn("near", 3, 2) == ["0 0 1", "1 2 2"]
    assert drawn("far", 4, 4) == ["0 1 2 3", "4 5 6 7", "3 0 1 2", "7 4 5 6"]
    assert drawn("offset", 3, 4) == ["0 1 2", "2 0 1", "3 4 5", "5 3 4"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"level": 2}, "level 2"),
        ({"members": 2}, "members 2: level 5 takes 3 to 64"),
        ({"members": 65}, "members 65"),
        ({"chunk_bytes": 3 << 12}, "chunk_bytes"),
        ({"chunk_bytes": 2 << 20}, "chunk_bytes"),
        ({"layout": "near"}, 'layout "near" is not for level 5: left-symmetric'),
        ({"member_bytes": 4095}, "member_bytes"),
        ({"level": 10, "layout": "near", "copies": 6}, "copies 6"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_by_its_field(
    fields: dict[str, object], words: str
) -> None:
    good = {"level": 5, "members": 5, "layout": "left-symmetric", "chunk_bytes": 4096}
    with pytest.raises(ValueError, match=words):
        Geometry(**{"member_bytes": 1 << 20, **good, **fields})  # type: ignore[arg-type]


def test_every_level_has_a_default_layout() -> None:
    for level in LEVELS:
        shape(level, 4, layouts_of(level)[0])
