"""A member with a CRC-32C for each 4 KiB block of its data: what it gives back wrong is an error.

The checksums lie on the same member, behind the data. One is stored as a little-endian u32, XORed
with that of a block of zeroes: so an area of zeroes says that all data are zero, and neither a new
sparse member nor `zero` needs anything to be computed. A block whose checksum does not fit is an
OSError (EILSEQ) that names it; the array makes up for it and writes it back, as for a bad sector.

Blocks of checksums (each for 4 MiB of data) are kept in bounded memory. A write changes the one
that is kept and sends it down in the same batch as the data, under the lock of that block: writes
to the same 4 MiB take turns, so none of them is lost. Reads take no lock. What does not fit may be
a write that is under way, so it is read once more under the lock before it is said to be wrong.
"""

import collections
import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import trio

from pmblk.checksum import crc32c
from pmblk.raid.areas import checksums_bytes
from pmblk.raid.buffers import buffer
from pmblk.raid.locks import RowLocks
from pmblk.raid.member import Member, Request

BLOCK_BYTES = 4096
SUMS_A_BLOCK = BLOCK_BYTES // 4
CACHE_BLOCKS = 1024  # 4 MiB, for 4 GiB of data
COPY_BLOCKS = 64  # of checksums at a time
ZERO_BLOCKS = 64  # of checksums at a time, 256 MiB of data

ZERO_SUM = np.uint32(crc32c(bytes(BLOCK_BYTES)))

Sums = npt.NDArray[np.uint32]
Kept = dict[int, Sums]


class Part(NamedTuple):
    """Data under one block of checksums: its number, the first of its sums, and the bytes."""

    number: int
    first: int
    view: memoryview

    @property
    def bits(self) -> int:
        return _bits(self.first, self.first + len(self.view) // BLOCK_BYTES)


async def checksummed(
    member: Member, *, data_offset: int, member_bytes: int, checksums_offset: int
) -> "Checksummed":
    """Around the member, which belongs to it. Nothing is read yet."""
    return Checksummed(
        member,
        data_offset=data_offset,
        member_bytes=member_bytes,
        checksums_offset=checksums_offset,
    )


def checksummed_of(member: Member | None) -> "Checksummed | None":
    """The checksums of a member, whatever is wrapped around them."""
    while member is not None and not isinstance(member, Checksummed):
        member = getattr(member, "inner", None)
    return member


class Checksummed(Member):
    """`mismatches` counts blocks that were read and did not fit."""

    def __init__(
        self,
        inner: Member,
        *,
        data_offset: int,
        member_bytes: int,
        checksums_offset: int,
        cache_blocks: int = CACHE_BLOCKS,
    ) -> None:
        assert data_offset % BLOCK_BYTES == member_bytes % BLOCK_BYTES == 0
        assert checksums_offset % BLOCK_BYTES == 0
        assert data_offset + member_bytes <= checksums_offset
        assert checksums_offset + checksums_bytes(member_bytes) <= inner.size
        self.place = inner.place
        self.size = inner.size
        self.block_bytes = BLOCK_BYTES
        self.inner = inner
        self.inline = inner.inline
        self.mismatches = 0
        self._start, self._end = data_offset, data_offset + member_bytes
        self._sums_offset = checksums_offset
        self._copy_offset: int | None = None  # where they are kept, too, while they move
        self._cache: collections.OrderedDict[int, Sums] = collections.OrderedDict()
        self._cache_blocks = cache_blocks
        self._locks = RowLocks()  # of blocks of checksums
        self._distrusted: dict[int, int] = {}  # a bit for each sum of a block of checksums

    def distrust(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Blocks in these ranges (offset and length on the device) are not held to their checksum
        until it is known to fit.

        After an unclean stop: data and checksum go down together, but a crash may come between
        them. Such a block was being written, so either of its versions is right, and the array
        makes its redundancy fit what is there; an error would make it a loss. The first read of one
        that does not fit stores the checksum that does, so a resync of the ranges ends the doubt.
        """
        for offset, length in ranges:
            first = max(offset, self._start) - self._start
            last = min(offset + length, self._end) - self._start
            for number, start, end in _cut(first // BLOCK_BYTES, -(-last // BLOCK_BYTES)):
                self._doubt(number, _bits(start, end))

    def _doubt(self, number: int, bits: int) -> None:
        self._distrusted[number] = self._distrusted.get(number, 0) | bits

    def _trust(self, number: int, bits: int) -> None:
        left = self._distrusted.pop(number, 0) & ~bits
        if left:
            self._distrusted[number] = left

    # ---- data

    def _parts(self, requests: Iterable[Request]) -> Iterator[Part]:
        """What of the requests is data."""
        for offset, view in requests:
            end = offset + len(view)
            if end <= self._start or offset >= self._end:
                continue
            assert self._start <= offset <= end <= self._end, "data, or something else"
            assert offset % BLOCK_BYTES == len(view) % BLOCK_BYTES == 0, "whole blocks only"
            first = (offset - self._start) // BLOCK_BYTES
            done = 0
            for number, start, last in _cut(first, first + len(view) // BLOCK_BYTES):
                length = (last - start) * BLOCK_BYTES
                yield Part(number, start, view[done : done + length])
                done += length

    def _offset(self, number: int, index: int) -> int:
        """Of a block of data, on the device."""
        return self._start + (number * SUMS_A_BLOCK + index) * BLOCK_BYTES

    async def read(self, requests: Sequence[Request]) -> None:
        await self.inner.read(requests)
        doubtful = []
        for part in self._parts(requests):
            if part.number not in self._cache:
                async with self._locks.hold((part.number,)):
                    await self._load(part.number)
            if self._wrong(part):
                doubtful.append(part)
            elif self._distrusted:
                self._trust(part.number, part.bits)
        for part in doubtful:
            await self._read_again(part)

    def _wrong(self, part: Part) -> list[int]:
        """Which of its blocks do not fit the checksums that are kept."""
        found = sums_of(part.view)
        stored = self._cache[part.number][part.first : part.first + len(found)]
        if np.array_equal(found, stored):
            return []
        return [int(index) for index in np.flatnonzero(found != stored)]

    async def _read_again(self, part: Part) -> None:
        """With nobody writing there. Raises OSError for what still does not fit."""
        async with self._locks.hold((part.number,)):
            await self._load(part.number)
            again = (Request(self._offset(part.number, part.first), part.view),)
            await self.inner.read(again)
            for index in self._wrong(part):
                start = index * BLOCK_BYTES
                view = part.view[start : start + BLOCK_BYTES]
                block = Part(part.number, part.first + index, view)
                if not self._distrusted.get(block.number, 0) & block.bits:
                    self.mismatches += 1
                    at = self._offset(block.number, block.first)
                    raise OSError(errno.EILSEQ, f"{self.place}: byte {at} is not what was written")
                await self._write_locked((), [block])
            self._trust(part.number, part.bits)

    async def write(self, requests: Sequence[Request]) -> None:
        parts = list(self._parts(requests))
        async with self._locks.hold({part.number for part in parts}):
            await self._write_locked(requests, parts)

    async def _write_locked(self, requests: Sequence[Request], parts: Sequence[Part]) -> None:
        """The requests, and the checksums of these parts of them."""
        kept: Kept = {}
        for part in parts:
            if part.number not in kept:
                kept[part.number] = await self._load(part.number)
        for part in parts:
            found = sums_of(part.view)
            kept[part.number][part.first : part.first + len(found)] = found
        try:
            await self._write_through(requests, kept)
        except OSError:  # either version may be there, with either checksum
            for part in parts:
                self._doubt(part.number, part.bits)
            raise
        for part in parts:
            self._trust(part.number, part.bits)

    async def zero(self, offset: int, length: int) -> None:
        """The checksums of zeroes are zeroes, and are written after the data are."""
        end = offset + length
        if end <= self._start or offset >= self._end:
            await self.inner.zero(offset, length)
            return
        assert self._start <= offset <= end <= self._end, "data, or something else"
        assert offset % BLOCK_BYTES == length % BLOCK_BYTES == 0, "whole blocks only"
        first, last = ((at - self._start) // BLOCK_BYTES for at in (offset, end))
        cuts = list(_cut(first, last))
        for one in range(0, len(cuts), ZERO_BLOCKS):
            await self._zero_some(cuts[one : one + ZERO_BLOCKS])

    async def _zero_some(self, cuts: Sequence[tuple[int, int, int]]) -> None:
        numbers = [number for number, _, _ in cuts]
        async with self._locks.hold(numbers):
            start = self._offset(numbers[0], cuts[0][1])
            await self.inner.zero(start, self._offset(numbers[-1], cuts[-1][2]) - start)
            kept: Kept = {}
            for number, first, last in cuts:
                whole = last - first == SUMS_A_BLOCK
                kept[number] = _new_sums() if whole else await self._load(number)
                kept[number][first:last] = 0
            await self._write_through((), kept)
            for number, first, last in cuts:
                self._trust(number, _bits(first, last))

    async def flush(self) -> None:
        await self.inner.flush()

    async def refresh(self) -> None:
        await self.inner.refresh()
        self.size = self.inner.size

    def close(self) -> None:
        self.inner.close()

    # ---- another place for the checksums

    async def copy_sums(self, offset: int) -> None:
        """From now on they are kept at that place of the device, too, and durably when this
        returns. Raises OSError.
        """
        assert offset >= self._sums_offset + checksums_bytes(self._end - self._start)
        self._copy_offset = offset
        for run in self._runs():
            async with self._locks.hold(run):
                blocks = [await self._load(number) for number in run]
                view = buffer(len(run) * BLOCK_BYTES)
                np.frombuffer(view, dtype="<u4")[:] = np.concatenate(blocks)
                with trio.CancelScope(shield=True):  # it lands over nothing newer
                    await self.inner.write((Request(offset + run[0] * BLOCK_BYTES, view),))
        await self.inner.flush()

    async def extend(self, sums_offset: int, data_bytes: int) -> None:
        """They are there alone, and are kept of so much data. The new part holds anything: it is to
        be made zero. When this returns nobody writes to the place they had before.
        """
        self._sums_offset, self._copy_offset = sums_offset, None
        for run in self._runs():
            async with self._locks.hold(run):
                pass
        self._end = self._start + data_bytes

    def _runs(self) -> Iterator[range]:
        """Numbers of blocks of checksums, some at a time."""
        blocks = checksums_bytes(self._end - self._start) // BLOCK_BYTES
        for first in range(0, blocks, COPY_BLOCKS):
            yield range(first, min(blocks, first + COPY_BLOCKS))

    # ---- checksums

    async def _load(self, number: int) -> Sums:
        """A block of checksums, whose lock is held."""
        sums = self._cache.get(number)
        if sums is None:
            view = buffer(BLOCK_BYTES)
            await self.inner.read((Request(self._sums_offset + number * BLOCK_BYTES, view),))
            sums = np.frombuffer(view, dtype="<u4")
        self._keep(number, sums)
        return sums

    def _keep(self, number: int, sums: Sums) -> None:
        self._cache[number] = sums
        self._cache.move_to_end(number)
        while len(self._cache) > self._cache_blocks:
            self._cache.popitem(last=False)

    async def _write_through(self, requests: Sequence[Request], kept: Mapping[int, Sums]) -> None:
        """In one batch. When it fails, what the device has now is read when it is wanted.

        Done to its end before the locks go, also when a read that stores a checksum is cancelled.
        """
        places = [self._sums_offset, *([] if self._copy_offset is None else [self._copy_offset])]
        sums = [
            Request(place + number * BLOCK_BYTES, block.data.cast("B"))
            for place in places
            for number, block in kept.items()
        ]
        try:
            with trio.CancelScope(shield=True):
                await self.inner.write([*requests, *sums])
        except BaseException:
            for number in kept:
                self._cache.pop(number, None)
            raise
        for number, block in kept.items():
            self._keep(number, block)


def sums_of(view: memoryview) -> Sums:
    """As they are stored: 0 for zeroes. 0.45 us a block, of which 0.15 is the sum."""
    found = [
        crc32c(bytes(view[start : start + BLOCK_BYTES]))
        for start in range(0, len(view), BLOCK_BYTES)
    ]
    return np.array(found, dtype="<u4") ^ ZERO_SUM


def _new_sums() -> Sums:
    return np.frombuffer(buffer(BLOCK_BYTES), dtype="<u4")


def _bits(first: int, last: int) -> int:
    return (1 << last) - (1 << first)


def _cut(first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Blocks of data as number of a block of checksums, and its first and last sums."""
    while first < last:
        number, start = divmod(first, SUMS_A_BLOCK)
        end = min(SUMS_A_BLOCK, start + last - first)
        yield number, start, end
        first += end - start
