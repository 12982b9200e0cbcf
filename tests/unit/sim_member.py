"""Members in memory that fail on purpose, for the tests of arrays.

The fault model: a member may refuse reads of some blocks until they are written (bad sectors),
refuse all writes, be gone altogether, or hang: then the memory of its reads is its for ever, and
`scribble` shows who used it all the same. A batch that fails may have been done in part. Every
batch yields to the event loop once, so that histories interleave.
"""

import errno
import random
from collections.abc import Sequence

import trio

from pmblk.raid.buffers import numbers
from pmblk.raid.member import MEMORY_ALIGNMENT, Hung, Member, Request

BLOCK = 4096


class SimMember(Member):
    def __init__(self, size: int, chosen: random.Random, *, name: str = "sim") -> None:
        self.place = name
        self.size = size
        self.block_bytes = BLOCK
        self.content = bytearray(size)
        self.bad_blocks: set[int] = set()
        self.gone = False
        self.refuses_writes = False
        self.hangs = False
        self.late: list[memoryview] = []
        self.cannot_zero = False
        self.zeroed: list[tuple[int, int]] = []
        self.closed = False
        self.reads = self.writes = self.flushes = 0
        self._chosen = chosen

    async def read(self, requests: Sequence[Request]) -> None:
        await self._start(requests)
        if self.hangs:
            self.late += [view for _, view in requests]
            raise Hung(self.place, 30)
        for offset, view in requests:
            if self.bad_blocks & _blocks(offset, len(view)):
                raise OSError(errno.EIO, "bad sector")
            self.reads += len(view)
            view[:] = self.content[offset : offset + len(view)]

    async def write(self, requests: Sequence[Request]) -> None:
        await self._start(requests)
        done = len(requests)
        if self.refuses_writes or self.hangs:
            done = self._chosen.randint(0, len(requests) - 1)
        for offset, view in requests[:done]:
            self.writes += len(view)
            self.bad_blocks -= _blocks(offset, len(view))
            self.content[offset : offset + len(view)] = view
        if self.hangs:
            raise Hung(self.place, 30)
        if done < len(requests):
            raise OSError(errno.EIO, "refused")

    async def flush(self) -> None:
        await self._start(())
        if self.hangs:
            raise Hung(self.place, 30)
        if self.refuses_writes:
            raise OSError(errno.EIO, "refused")
        self.flushes += 1

    async def zero(self, offset: int, length: int) -> None:
        await self._start(())
        assert offset % BLOCK == length % BLOCK == 0, "whole blocks only"
        if self.cannot_zero:
            raise OSError(errno.EOPNOTSUPP, "no way but writing")
        if self.hangs:
            raise Hung(self.place, 30)
        if self.refuses_writes:
            raise OSError(errno.EIO, "refused")
        self.zeroed.append((offset, length))
        self.bad_blocks -= _blocks(offset, length)
        self.content[offset : offset + length] = bytes(length)

    async def refresh(self) -> None:
        self.size = len(self.content)

    def close(self) -> None:
        self.closed = True

    def scribble(self) -> None:
        """A hung read goes on."""
        for view in self.late:
            view[:] = b"\xee" * len(view)

    async def _start(self, requests: Sequence[Request]) -> None:
        assert not self.closed, "nobody uses a member that has left"
        await trio.lowlevel.checkpoint()
        if self.gone:
            raise OSError(errno.ENODEV, "gone")
        for offset, view in requests:
            assert offset % BLOCK == len(view) % BLOCK == 0, "whole blocks only"
            assert 0 <= offset <= self.size - len(view)
            assert numbers(view).ctypes.data % MEMORY_ALIGNMENT == 0, "aligned memory only"


def _blocks(offset: int, length: int) -> set[int]:
    return set(range(offset // BLOCK, -(-(offset + length) // BLOCK)))
