"""Making a range zero: holes where pages can be given back, zeroes in memory where not.

There are three ways (`Clearing`). Only whole pages are punched. A page that the range covers in
part keeps its memory and gets zeroes there, so a page that a representation holds dirty always has
memory under it, and nothing outside the range is looked at.
"""

import enum
from collections.abc import Iterator

import trio

from pmblk.media import Media
from pmblk.pages import PAGE_BYTES
from pmblk.ranges import merge_extents, slices, whole_units
from pmblk.representations import Representation

INLINE_BYTES = 4 << 20  # punching 4 MiB of tmpfs takes about 1 ms, a thread hop 0.1 ms
SLICE_BYTES = 256 << 20  # a long punch is cut, so that a stop does not wait for all of it


class Clearing(enum.Enum):
    """What becomes of the memory under a range that is made zero."""

    PUNCH = "punch"  # whole pages are given back
    FILL = "fill"  # memory everywhere, no hole is left
    KEEP = "keep"  # what has memory keeps it, what is a hole stays one


def clear(
    media: Media, representation: Representation, offset: int, length: int, way: Clearing
) -> None:
    """In one go; for at most `INLINE_BYTES`. Raises OSError."""
    if way is Clearing.FILL:
        _store_zeroes(media, representation, offset, length)
        return
    if way is Clearing.KEEP:
        _zero_memory(media, representation, offset, length)
        return
    start, end = _zero_edges(media, representation, offset, length)
    if start < end:
        media.punch(start, end - start)
        representation.forget(start, end - start)  # not before: a refused punch loses nothing


async def clear_in_slices(
    media: Media, representation: Representation, offset: int, length: int, way: Clearing
) -> None:
    """Punched in a worker thread, or zeroed in memory with pauses between. Raises OSError.

    The caller keeps everybody else out of the range.
    """
    if way is Clearing.FILL:
        for position, piece in _page_slices(offset, length):
            _store_zeroes(media, representation, position, piece)
            await trio.lowlevel.checkpoint()
        return
    if way is Clearing.KEEP:
        await _zero_memory_in_slices(media, representation, offset, length)
        return
    start, end = _zero_edges(media, representation, offset, length)
    await _settle(representation, start, end)
    for position, piece in slices(start, end - start, slice_bytes=SLICE_BYTES):
        await trio.to_thread.run_sync(media.punch, position, piece)
        representation.forget(position, piece)


async def _settle(representation: Representation, start: int, end: int) -> None:
    """Write back what is dirty in the range, and only that: elsewhere there may be holes.

    While a thread punches nothing may be stored there, so nothing may be left to write back; and
    when it never starts, since its client is gone, nothing may be lost.
    """
    for offset, length in representation.dirty_extents():
        first, last = max(start, offset), min(end, offset + length)
        for place, part in slices(first, last - first, slice_bytes=INLINE_BYTES):
            representation.write_back(place, part)
            await trio.lowlevel.checkpoint()


def _page_slices(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """In `INLINE_BYTES`, cut at pages: half of a bad page cannot be zeroed, all of it can."""
    head = min(length, -offset % PAGE_BYTES)
    if head:
        yield offset, head
    yield from slices(offset + head, length - head, slice_bytes=INLINE_BYTES)


def _store_zeroes(media: Media, representation: Representation, offset: int, length: int) -> None:
    media.reserve(offset, length)
    representation.zero(offset, length)


def _zero_edges(
    media: Media, representation: Representation, offset: int, length: int
) -> tuple[int, int]:
    """Zero the pages that are covered in part; start and end of the whole ones between them."""
    start, end = whole_units(offset, length, unit=PAGE_BYTES, limit=media.size)
    end = max(start, end)
    for edge_start, edge_end in ((offset, min(start, offset + length)), (end, offset + length)):
        _zero_memory(media, representation, edge_start, edge_end - edge_start)
    return start, end


def _zero_memory(media: Media, representation: Representation, offset: int, length: int) -> None:
    """A hole is zero as it is; only what has memory is stored to."""
    for extent in list(media.allocation.extents(offset, length)):
        if not extent.hole:
            _store_zeroes(media, representation, extent.offset, extent.length)


async def _zero_memory_in_slices(
    media: Media, representation: Representation, offset: int, length: int
) -> None:
    for extent in merge_extents(media.allocation.extents(offset, length)):
        if not extent.hole:
            for position, piece in _page_slices(extent.offset, extent.length):
                _store_zeroes(media, representation, position, piece)
                await trio.lowlevel.checkpoint()
