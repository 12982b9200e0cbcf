"""4 KiB pages: the unit of every representation but one, and of the allocation map. Pure."""

from pmblk.ranges import slices, whole_units

PAGE_SHIFT = 12
PAGE_BYTES = 1 << PAGE_SHIFT


def span(offset: int, length: int) -> tuple[int, int]:
    """First page and number of pages that the range touches; `length` is at least 1."""
    first = offset >> PAGE_SHIFT
    return first, ((offset + length - 1) >> PAGE_SHIFT) - first + 1


def pieces(offset: int, length: int) -> list[tuple[int, int]]:
    """The range cut at page boundaries, as (offset, length)."""
    head = min(length, -offset % PAGE_BYTES)
    cut = [(offset, head)] if head else []
    cut += slices(offset + head, length - head, slice_bytes=PAGE_BYTES)
    return cut


def whole(offset: int, length: int, *, limit: int) -> range:
    """The pages that lie in the range as a whole; a last page that `limit` cuts short is one."""
    start, end = whole_units(offset, length, unit=PAGE_BYTES, limit=limit)
    return range(start >> PAGE_SHIFT, (end + PAGE_BYTES - 1) >> PAGE_SHIFT)
