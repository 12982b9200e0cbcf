"""A member with a CRC-32C for each 4 KiB block of its data: what it gives back wrong is an error.

The checksums lie on the same member, behind the data. One is stored as a little-endian u32, XORed
with that of a block of zeroes: so an area of zeroes says that all data are zero, and neither a new
sparse member nor `zero` needs anything to be computed.

A block whose checksum does not fit is an OSError (EILSEQ) that names it, and the array makes up for
it and writes it back, as for a bad sector.

Checksums that are being changed are kept, a block of them (1024 checksums, 4 MiB of data) at a
time, in bounded memory, and written through together with the data. Writes that share such a block
change the one that is kept, and each of them sends it down after its own change; they take turns at
that, so the last one down has the changes of all.
"""

import collections
import contextlib
import errno
from collections.abc import AsyncIterator, Collection, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from pmblk.checksum import crc32c
from pmblk.raid.areas import checksums_bytes
from pmblk.raid.buffers import buffer
from pmblk.raid.locks import RowLocks
from pmblk.raid.member import Member, Request

BLOCK_BYTES = 4096
SUM_BYTES = 4
SUMS_A_BLOCK = BLOCK_BYTES // SUM_BYTES
CACHE_BLOCKS = 1024  # 4 MiB, for 4 GiB of data

ZERO_SUM = crc32c(bytes(BLOCK_BYTES))

Sums = npt.NDArray[np.uint32]
_LITTLE = np.dtype("<u4")


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
        assert checksums_offset >= data_offset + member_bytes
        assert checksums_offset + checksums_bytes(member_bytes) <= inner.size
        self.place = inner.place
        self.size = inner.size
        self.block_bytes = BLOCK_BYTES
        self.inner = inner
        self.mismatches = 0
        self._start, self._end = data_offset, data_offset + member_bytes
        self._sums_offset = checksums_offset
        self._cache: collections.OrderedDict[int, memoryview] = collections.OrderedDict()
        self._cache_blocks = cache_blocks
        self._users: collections.Counter[int] = collections.Counter()
        self._locks = RowLocks()  # of blocks of checksums
        self._distrusted: set[int] = set()

    def distrust(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Blocks in these ranges (offset and length on the device) are not verified until they are
        written.

        After an unclean stop: data and checksum go down together, but a crash may come between
        them. That block was being written, so either of its versions is right, and the array
        brings its redundancy in line with what is there; an error would make it a loss.
        """
        for offset, length in ranges:
            self._distrusted.update(self._blocks(offset, length))

    # ---- what is where

    def _blocks(self, offset: int, length: int) -> range:
        """Blocks of the data area, by number; part of one is one."""
        first = max(offset, self._start) - self._start
        last = min(offset + length, self._end) - self._start
        return range(first // BLOCK_BYTES, -(-last // BLOCK_BYTES)) if first < last else range(0)

    def _data(self, requests: Sequence[Request]) -> list[tuple[range, memoryview]]:
        """What of the requests is data, as block numbers and bytes."""
        found = []
        for offset, view in requests:
            blocks = self._blocks(offset, len(view))
            if blocks:
                assert self._start <= offset <= offset + len(view) <= self._end
                assert offset % BLOCK_BYTES == len(view) % BLOCK_BYTES == 0, "whole blocks only"
                found.append((blocks, view))
        return found

    # ---- reading and writing

    async def read(self, requests: Sequence[Request]) -> None:
        data = self._data(requests)
        async with self._held(data):
            await self.inner.read(requests)
            for blocks, view in data:
                self._verify(blocks, view)

    def _verify(self, blocks: range, view: memoryview) -> None:
        found, stored = sums_of(view), self._stored(blocks)
        if np.array_equal(found, stored):
            return
        wrong = [blocks[int(index)] for index in np.flatnonzero(found != stored)]
        wrong = [block for block in wrong if block not in self._distrusted]
        self.mismatches += len(wrong)
        for block in wrong:
            at = self._start + block * BLOCK_BYTES
            raise OSError(errno.EILSEQ, f"{self.place}: what is at byte {at} is not what was there")

    async def write(self, requests: Sequence[Request]) -> None:
        data = self._data(requests)
        if not data:
            await self.inner.write(requests)
            return
        async with self._held(data, alone=True) as kept:
            for blocks, view in data:
                self._store(blocks, sums_of(view))
            await self._write_through([*requests, *self._sum_requests(kept)], kept)
            for blocks, _ in data:
                self._distrusted.difference_update(blocks)

    async def _write_through(self, requests: Sequence[Request], kept: Collection[int]) -> None:
        try:
            await self.inner.write(requests)
        except BaseException:
            # What is on the device now is unknown, so it is read again when it is wanted again.
            for number in kept:
                self._cache.pop(number, None)
            raise

    async def zero(self, offset: int, length: int) -> None:
        """The checksums of zeroes are zeroes; whole blocks of them are zeroed in the same way."""
        blocks = self._blocks(offset, length)
        if not blocks:
            await self.inner.zero(offset, length)
            return
        assert self._start <= offset <= offset + length <= self._end
        assert offset % BLOCK_BYTES == length % BLOCK_BYTES == 0, "whole blocks only"
        await self.inner.zero(offset, length)
        for first in range(blocks.start, blocks.stop, SUMS_A_BLOCK * 64):  # bounded memory
            part = range(first, min(first + SUMS_A_BLOCK * 64, blocks.stop))
            async with self._held([(part, memoryview(b""))], alone=True) as kept:
                self._store(part, np.zeros(len(part), dtype=np.uint32))
                await self._write_through(self._sum_requests(kept), kept)
        self._distrusted.difference_update(blocks)

    async def flush(self) -> None:
        await self.inner.flush()

    def close(self) -> None:
        self.inner.close()

    # ---- checksums that are kept

    @contextlib.asynccontextmanager
    async def _held(
        self, data: Sequence[tuple[range, memoryview]], *, alone: bool = False
    ) -> AsyncIterator[Collection[int]]:
        """The blocks of checksums of these data are in memory, and stay there; their numbers."""
        numbers = sorted(
            {
                number
                for blocks, _ in data
                for number in range(
                    blocks.start // SUMS_A_BLOCK, (blocks.stop - 1) // SUMS_A_BLOCK + 1
                )
            }
        )
        async with self._locks.hold(numbers):
            await self._load(numbers)
            yield numbers
