"""A member that remembers which of its blocks are lost: they are errors until they are written.

A rebuild that cannot make a block, since too much else is lost, writes something there; without
this, that would be read as data. The log is on the member itself (`pmblk.raid.bad_block_log`).

Durability: `lose` returns when the log is durable. A block that is written again is taken off the
log with the next flush, after its data are durable; a crash before that leaves an error where the
write, which nobody flushed, may have been.
"""

import errno
from collections.abc import Iterable, Sequence

import trio

from pmblk.errors import PmblkError
from pmblk.raid.bad_block_log import HALF_BYTES, Full, LogError, encode, newest
from pmblk.raid.buffers import aligned, buffer
from pmblk.raid.member import Member, Request
from pmblk.raid.superblock import BAD_BLOCKS_BYTES, BAD_BLOCKS_OFFSET

BLOCK_BYTES = 4096


async def remembering(member: Member, *, data_offset: int) -> "BadBlocks":
    """The member, with the log that is on it. Raises OSError, and PmblkError for a damaged one."""
    area = buffer(BAD_BLOCKS_BYTES)
    await member.read((Request(BAD_BLOCKS_OFFSET, area),))
    try:
        blocks, sequence = newest(bytes(area))
    except LogError as error:
        raise PmblkError(
            f"{member.place}: the log of its lost blocks cannot be used: {error}",
            hint="rebuild this member from the others",
        ) from error
    return BadBlocks(member, data_offset=data_offset, blocks=blocks, sequence=sequence)


async def forget(member: Member) -> None:
    """No log on a device that becomes a member: what lies there now is somebody else's.

    Raises OSError.
    """
    await member.write((Request(BAD_BLOCKS_OFFSET, buffer(BAD_BLOCKS_BYTES)),))
    await member.flush()


def bad_blocks_of(member: Member | None) -> "BadBlocks | None":
    """The log of a member, whatever is wrapped around it."""
    while member is not None and not isinstance(member, BadBlocks):
        member = getattr(member, "inner", None)
    return member


class BadBlocks(Member):
    """Around `inner`, which belongs to it."""

    def __init__(self, inner: Member, *, data_offset: int, blocks: set[int], sequence: int) -> None:
        self.place = inner.place
        self.size = inner.size
        self.block_bytes = inner.block_bytes
        self.inner = inner
        self.inline = inner.inline
        self._data_offset = data_offset
        self._blocks = set(blocks)
        self._written: set[int] = set()  # again, and still on the log
        self._sequence = sequence
        self._storing = trio.Lock()

    @property
    def count(self) -> int:
        """Blocks of 4 KiB that are lost."""
        return len(self._blocks)

    async def lose(self, offset: int, length: int) -> None:
        """These bytes, and what else is in their blocks, are lost: when this returns, durably.

        Raises OSError; ENOSPC when the log is full: then nothing is remembered, and the member is
        not to be used.
        """
        await self.lose_all([(offset, length)])

    async def lose_all(self, ranges: Iterable[tuple[int, int]]) -> None:
        """The same for many, in one go."""
        lost: set[int] = set()
        for offset, length in ranges:
            assert offset >= self._data_offset
            lost.update(_blocks(offset, length))
        async with self._storing:
            await self._store(self._blocks | self._written | lost)
            self._blocks |= lost

    async def read(self, requests: Sequence[Request]) -> None:
        self._check(requests)
        await self.inner.read(requests)
        self._check(requests)  # it may have been lost meanwhile

    def _check(self, requests: Sequence[Request]) -> None:
        if not self._blocks:
            return
        for offset, view in requests:
            for block in _blocks(offset, len(view)):
                if block in self._blocks:
                    at = block * BLOCK_BYTES
                    raise OSError(errno.EIO, f"{self.place}: what was at byte {at} is lost")

    async def write(self, requests: Sequence[Request]) -> None:
        await self.inner.write(requests)
        for offset, view in requests:
            self._has_again(offset, len(view))

    async def zero(self, offset: int, length: int) -> None:
        await self.inner.zero(offset, length)
        self._has_again(offset, length)

    def _has_again(self, offset: int, length: int) -> None:
        """Blocks that are covered as a whole hold something again."""
        if self._blocks:
            whole = range(-(-offset // BLOCK_BYTES), (offset + length) // BLOCK_BYTES)
            again = self._blocks.intersection(whole)
            self._blocks -= again
            self._written |= again

    async def flush(self) -> None:
        written = set(self._written)
        await self.inner.flush()
        if not written:
            return
        async with self._storing:
            written &= self._written
            await self._store(self._blocks | (self._written - written))
            self._written -= written

    async def _store(self, blocks: set[int]) -> None:
        """Both halves, one after the other, so that one of them is whole at any time.

        Done to its end before anything newer is stored, also when a flush is cancelled.
        """
        try:
            halves = [encode(blocks, self._sequence + number) for number in (1, 2)]
        except Full as error:
            raise OSError(errno.ENOSPC, f"{self.place}: too much is lost: {error}") from error
        self._sequence += 2
        with trio.CancelScope(shield=True):
            for number, half in enumerate(halves):
                place = BAD_BLOCKS_OFFSET + number * HALF_BYTES
                await self.inner.write((Request(place, aligned(half)),))
                await self.inner.flush()

    async def refresh(self) -> None:
        await self.inner.refresh()
        self.size = self.inner.size

    def close(self) -> None:
        self.inner.close()


def _blocks(offset: int, length: int) -> range:
    return range(offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES))
