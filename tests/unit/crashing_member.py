"""A crash after so many steps of members, for the tests of what arrays keep on them.

The fault model: a step is one request of a write, or a flush. At the crash the step that is due
does not happen, nor does any after it; what was written before stays, torn at nothing. (A torn
write of a superblock is `test_raid_superblock`'s.)
"""

import errno
import random
from collections.abc import Sequence

from pmblk.raid.member import Request
from tests.unit.sim_member import SimMember


class Crashed(Exception):
    """Of the whole machine: nobody catches it."""


class Fuse:
    """Burns down step by step; shared by all members of a machine."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def burn(self) -> None:
        if not self.left:
            raise Crashed
        self.left -= 1


class CrashingMember(SimMember):
    def __init__(self, size: int, fuse: Fuse, *, name: str) -> None:
        super().__init__(size, random.Random(0), name=name)
        self.fuse = fuse

    async def _start(self, requests: Sequence[Request]) -> None:
        """As of a real device: a superblock may be on its way to who is just being let go."""
        if self.closed:
            raise OSError(errno.ENODEV, "closed")
        await super()._start(requests)

    async def write(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.fuse.burn()
            await super().write((request,))

    async def flush(self) -> None:
        self.fuse.burn()
        await super().flush()

    async def zero(self, offset: int, length: int) -> None:
        self.fuse.burn()
        await super().zero(offset, length)
