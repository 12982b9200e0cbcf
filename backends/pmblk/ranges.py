"""Byte ranges: overlap, slices and extents. Pure."""

from collections.abc import Iterator

import msgspec


class Extent(msgspec.Struct, frozen=True, gc=False):
    """A run of bytes that are all backed by memory, or all not (`hole`: they read as zeroes)."""

    offset: int
    length: int
    hole: bool


def overlap(offset_a: int, length_a: int, offset_b: int, length_b: int) -> bool:
    """Whether two ranges share a byte; an empty range shares none."""
    return (
        offset_a < offset_b + length_b
        and offset_b < offset_a + length_a
        and length_a > 0
        and length_b > 0
    )


def slices(offset: int, length: int, *, slice_bytes: int) -> Iterator[tuple[int, int]]:
    """The range in (offset, length) pieces of at most `slice_bytes`, in order."""
    end = offset + length
    while offset < end:
        piece = min(slice_bytes, end - offset)
        yield offset, piece
        offset += piece


def round_out(offset: int, length: int, *, unit: int) -> tuple[int, int]:
    """The smallest range of whole units (a power of two) around the given one."""
    first = offset & -unit
    return first, ((offset + length + unit - 1) & -unit) - first


def whole_units(offset: int, length: int, *, unit: int, limit: int) -> tuple[int, int]:
    """Start and end of the whole units (a power of two) inside the range; start > end: none.

    A last unit that `limit` cuts short counts as whole.
    """
    end = offset + length
    start = (offset + unit - 1) & -unit
    return start, end if end == limit else end & -unit


def merge_extents(extents: Iterator[Extent]) -> Iterator[Extent]:
    """Neighbours of one kind become one extent; the input is sorted and without gaps."""
    current: Extent | None = None
    for extent in extents:
        if current is None:
            current = extent
        elif current.hole == extent.hole:
            current = Extent(current.offset, current.length + extent.length, current.hole)
        else:
            yield current
            current = extent
    if current is not None:
        yield current
