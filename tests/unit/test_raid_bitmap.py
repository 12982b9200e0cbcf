"""The write-intent bitmap as bytes: what is torn, damaged or never written, and its regions."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmblk.raid.bitmap import (
    AREA_ALL_SET,
    BLOCK_BYTES,
    BLOCKS,
    REGIONS_MAX,
    REGIONS_PER_BLOCK,
    Marks,
    blocks_of,
    decode,
    encode,
    ranges_of,
    region_bytes_for,
    regions_of,
    union,
)
from pmblk.raid.superblock import BITMAP_BYTES

MEBIBYTE = 1 << 20
REGIONS = 2 * REGIONS_PER_BLOCK + 77


def marks_of(*regions: int) -> Marks:
    marks = np.zeros(REGIONS, dtype=np.bool_)
    marks[list(regions)] = True
    return marks


def area_of(marks: Marks, region_bytes: int = MEBIBYTE) -> bytes:
    return b"".join(
        encode(marks, number, region_bytes=region_bytes, generation=1) for number in range(BLOCKS)
    )


def united(*areas: bytes) -> list[int]:
    found = union(areas, regions=REGIONS, region_bytes=MEBIBYTE)
    return [int(region) for region in np.flatnonzero(found)]


@given(st.sets(st.integers(0, REGIONS - 1)), st.sets(st.integers(0, REGIONS - 1)))
def test_members_are_united(left: set[int], right: set[int]) -> None:
    assert united(area_of(marks_of(*left)), area_of(marks_of(*right))) == sorted(left | right)


def test_a_block_that_is_damaged_on_one_member_is_taken_from_another() -> None:
    marks = marks_of(5, REGIONS_PER_BLOCK + 3, REGIONS - 1)
    area = bytearray(area_of(marks))
    area[BLOCK_BYTES + 100] ^= 1
    assert united(bytes(area), area_of(marks)) == [5, REGIONS_PER_BLOCK + 3, REGIONS - 1]


def test_a_block_that_is_damaged_everywhere_marks_all_of_its_regions() -> None:
    area = bytearray(area_of(marks_of(5)))
    area[BLOCK_BYTES + 100] ^= 1
    within = range(REGIONS_PER_BLOCK, 2 * REGIONS_PER_BLOCK)
    assert united(bytes(area), bytes(area)) == [5, *within]


def test_without_a_member_everything_is_marked() -> None:
    assert united() == list(range(REGIONS))


def test_what_is_zero_on_every_member_was_never_written() -> None:
    blank = bytes(BITMAP_BYTES)
    assert united(blank, blank) == []
    assert united(blank, area_of(marks_of(7))) == [7]
    assert united(blank, b"x" * BITMAP_BYTES) == list(range(REGIONS))


def test_an_area_can_mark_everything_for_any_size() -> None:
    assert united(AREA_ALL_SET) == list(range(REGIONS))
    assert len(AREA_ALL_SET) == BITMAP_BYTES


def test_a_torn_block_is_known() -> None:
    """Any mixture of two blocks by sectors, but for either of them."""
    old = encode(marks_of(1), 0, region_bytes=MEBIBYTE, generation=1)
    new = encode(marks_of(1, 20000), 0, region_bytes=MEBIBYTE, generation=2)
    chosen = random.Random(1)
    for _ in range(200):
        sources = [chosen.choice((old, new)) for _ in range(8)]
        torn = b"".join(one[i * 512 : i * 512 + 512] for i, one in enumerate(sources))
        if torn not in (old, new):
            assert decode(torn, 0, region_bytes=MEBIBYTE) is None


def test_a_block_of_another_place_or_of_other_regions_says_nothing() -> None:
    block = encode(marks_of(1), 0, region_bytes=MEBIBYTE, generation=1)
    assert decode(block, 0, region_bytes=MEBIBYTE) is not None
    assert decode(block, 1, region_bytes=MEBIBYTE) is None
    assert decode(block, 0, region_bytes=2 * MEBIBYTE) is None


@given(st.integers(1, 1 << 60))
def test_regions_are_powers_of_two_that_fit(size: int) -> None:
    region_bytes = region_bytes_for(size)
    if size <= REGIONS_MAX << 50:
        assert -(-size // region_bytes) <= REGIONS_MAX
    assert region_bytes & (region_bytes - 1) == 0
    assert region_bytes >= MEBIBYTE


@pytest.mark.parametrize(
    ("size", "region_bytes"),
    [
        (1 << 20, 1 << 20),
        (4 << 30, 1 << 20),
        (1 << 40, 64 << 20),  # TiB would be 256 MiB for 4,096 of them: md's default is the limit
        (16 << 40, 64 << 20),
        (64 << 40, 256 << 20),  # the bitmap is full
    ],
)
def test_the_default_follows_the_size(size: int, region_bytes: int) -> None:
    assert region_bytes_for(size) == region_bytes


def test_ranges_touch_regions_and_regions_are_joined() -> None:
    unit = MEBIBYTE
    assert regions_of([(0, 1), (unit - 1, 2), (5 * unit, 0), (7 * unit, unit)], unit) == {0, 1, 7}
    assert ranges_of(marks_of(0, 1, 7), region_bytes=unit, size=8 * unit - 512) == [
        (0, 2 * unit),
        (7 * unit, unit - 512),
    ]
    assert ranges_of(marks_of(), region_bytes=unit, size=8 * unit) == []
    assert [*blocks_of([0, REGIONS_PER_BLOCK, 3])] == [0, 1]
