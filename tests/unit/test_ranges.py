import itertools

from hypothesis import given
from hypothesis import strategies as st

from pmblk.ranges import Extent, merge_extents, overlap, round_out, slices

offsets = st.integers(0, 300)
lengths = st.integers(0, 100)


@given(offsets, lengths, offsets, lengths)
def test_ranges_overlap_when_they_share_a_byte(a: int, m: int, b: int, n: int) -> None:
    assert overlap(a, m, b, n) == bool(set(range(a, a + m)) & set(range(b, b + n)))


@given(offsets, lengths, st.integers(1, 50))
def test_slices_cover_the_range_once_and_in_order(offset: int, length: int, size: int) -> None:
    pieces = list(slices(offset, length, slice_bytes=size))
    assert [b for o, n in pieces for b in range(o, o + n)] == list(range(offset, offset + length))
    assert all(n <= size for _, n in pieces)


@given(offsets, st.integers(1, 100))
def test_rounding_out_is_the_smallest_aligned_cover(offset: int, length: int) -> None:
    first, span = round_out(offset, length, unit=64)
    assert first % 64 == 0
    assert span % 64 == 0
    assert first <= offset < first + 64
    assert first + span - 64 < offset + length <= first + span


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans())))
def test_merged_extents_say_the_same_of_every_byte(runs: list[tuple[int, bool]]) -> None:
    extents, position = [], 0
    for length, hole in runs:
        extents.append(Extent(position, length, hole))
        position += length
    merged = list(merge_extents(iter(extents)))

    def spread(some: list[Extent]) -> list[bool]:
        return [extent.hole for extent in some for _ in range(extent.length)]

    assert spread(merged) == spread(extents)
    assert all(a.hole != b.hole for a, b in itertools.pairwise(merged))
