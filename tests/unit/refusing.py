"""Members that refuse some requests for a while, or hold them back, for the tests of arrays.

Requests are told apart by the area of a member that they are in. What is refused has not happened
at all; what is held back happens when its time has come.
"""

import contextlib
import errno
from collections.abc import Awaitable, Callable, Iterator, Sequence

import trio

from pmblk.raid.member import Request
from pmblk.raid.superblock import BAD_BLOCKS_OFFSET, BITMAP_OFFSET, SLOT_OFFSETS
from tests.unit.sim_member import SimMember

Where = Callable[[Request], bool]
_Move = Callable[[Sequence[Request]], Awaitable[None]]


def in_superblock(request: Request) -> bool:
    return request.offset in SLOT_OFFSETS


def in_bitmap(request: Request) -> bool:
    return BITMAP_OFFSET <= request.offset < BAD_BLOCKS_OFFSET


def in_bad_blocks(request: Request) -> bool:
    return request.offset == BAD_BLOCKS_OFFSET


def between(start: int, end: int) -> Where:
    return lambda request: start <= request.offset < end


@contextlib.contextmanager
def refusing(
    member: SimMember, where: Where, *, reads: bool = False, code: int = errno.EIO
) -> Iterator[list[Request]]:
    """Writes there are errors as long as the body runs; or reads. Gives what was refused so far."""
    move = member.read if reads else member.write
    refused: list[Request] = []

    async def moved(requests: Sequence[Request]) -> None:
        if any(map(where, requests)):
            await trio.lowlevel.checkpoint()
            refused.extend(requests)
            raise OSError(code, "refused")
        await move(requests)

    with _instead(member, moved, reads=reads):
        yield refused


@contextlib.contextmanager
def holding(
    member: SimMember, where: Where, *, until: trio.Event, reads: bool = False
) -> Iterator[None]:
    """Writes there wait for `until`; or reads."""
    move = member.read if reads else member.write

    async def moved(requests: Sequence[Request]) -> None:
        if any(map(where, requests)):
            await until.wait()
        await move(requests)

    with _instead(member, moved, reads=reads):
        yield


@contextlib.contextmanager
def _instead(member: SimMember, moved: _Move, *, reads: bool) -> Iterator[None]:
    name = "read" if reads else "write"
    setattr(member, name, moved)
    try:
        yield
    finally:
        delattr(member, name)
