"""Which pages are dirty, one bit a page: for those who have no page struct to write it in.

A summary of one byte for each 128 MiB finds the dirty parts of a large device without a look at all
of its bits. The bits are in anonymous memory that costs nothing until it is touched.
"""

from collections.abc import Iterator

import numpy as np

from pmblk import page_runs
from pmblk.media.syscalls import anonymous, resident_bytes
from pmblk.pages import PAGE_BYTES

_CHUNK_BYTES = 4096  # of bits: 128 MiB of the device
_CHUNK_PAGES = _CHUNK_BYTES * 8
_CHUNK_SHIFT = _CHUNK_PAGES.bit_length() - 1


class DirtyMap:
    def __init__(self, pages: int) -> None:
        chunks = -(-pages // _CHUNK_PAGES)
        self.bytes = -(-pages // 8)
        self._pages = pages
        self._bits = anonymous(max(chunks, 1) * _CHUNK_BYTES)
        self._summary = bytearray(chunks)

    def __bool__(self) -> bool:
        """Whether a page may be dirty; what was cleared counts until `extents` has passed by."""
        return 1 in self._summary

    def mark(self, first: int, count: int) -> None:
        bits = self._bits
        end = first + count
        byte, last = first >> 3, (end - 1) >> 3
        self._summary[first >> _CHUNK_SHIFT] = 1
        if byte == last:
            bits[byte] |= ((1 << count) - 1) << (first & 7)
            return
        bits[byte] |= 0xFF << (first & 7) & 0xFF
        bits[last] |= 0xFF >> (7 - (end - 1 & 7))
        bits[byte + 1 : last] = b"\xff" * (last - byte - 1)
        for chunk in range((first >> _CHUNK_SHIFT) + 1, (end - 1 >> _CHUNK_SHIFT) + 1):
            self._summary[chunk] = 1

    def clear(self, first: int, count: int) -> None:
        """Only where something is dirty: the other bits may have no memory, and need none."""
        end = first + count
        last = (end - 1 >> _CHUNK_SHIFT) + 1
        chunk = self._summary.find(1, first >> _CHUNK_SHIFT, last)
        while chunk >= 0:
            whole = chunk << _CHUNK_SHIFT, min(chunk + 1 << _CHUNK_SHIFT, self._pages)
            start, stop = max(first, whole[0]), min(end, whole[1])
            self._clear_bits(start, stop - start)
            if (start, stop) == whole:
                self._summary[chunk] = 0
            chunk = self._summary.find(1, chunk + 1, last)

    def _clear_bits(self, first: int, count: int) -> None:
        bits = self._bits
        end = first + count
        byte, last = first >> 3, (end - 1) >> 3
        if byte == last:
            bits[byte] &= ~(((1 << count) - 1) << (first & 7)) & 0xFF
        else:
            bits[byte] &= 0xFF >> (8 - (first & 7))
            bits[last] &= 0xFF << ((end - 1 & 7) + 1) & 0xFF
            bits[byte + 1 : last] = bytes(last - byte - 1)

    def extents(self) -> Iterator[tuple[int, int]]:
        """The dirty pages as byte ranges (offset, length), in order, looked up as it goes.

        Neighbours are joined inside each 128 MiB.
        """
        chunk = self._summary.find(1)
        while chunk >= 0:
            bits = np.unpackbits(self._in_chunk(chunk), bitorder="little")
            yield from page_runs.extents(np.flatnonzero(bits) + chunk * _CHUNK_PAGES)
            if not self._in_chunk(chunk).any():
                self._summary[chunk] = 0
            chunk = self._summary.find(1, chunk + 1)

    def resident_bytes(self) -> int:
        return resident_bytes(self._bits)

    def dirty_bytes(self) -> int:
        chunks = (chunk for chunk, dirty in enumerate(self._summary) if dirty)
        return PAGE_BYTES * sum(int(np.bitwise_count(self._in_chunk(one)).sum()) for one in chunks)

    def _in_chunk(self, chunk: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        return np.frombuffer(self._bits, np.uint8, _CHUNK_BYTES, chunk * _CHUNK_BYTES)
