"""Blocks of members that hold nobody knows what, in memory: for losses that no log takes.

A write that failed on a member that has to stay leaves old bytes there, or new ones, or some of
both. Where somebody is missing, what that one held is made of just these bytes. So they are an
error until they are written again (`Devices.fail_and_lose`).
"""

import errno
import weakref
from collections.abc import Iterable, Sequence

from pmblk.raid.findings import BLOCK_BYTES
from pmblk.raid.member import Member, Request


class Poison:
    """By member, not by slot: whoever comes into it next has nothing to do with this."""

    def __init__(self) -> None:
        self._blocks: weakref.WeakKeyDictionary[Member, set[int]] = weakref.WeakKeyDictionary()

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def add(self, member: Member, ranges: Iterable[tuple[int, int]]) -> None:
        """`ranges`: offset and length, on the device."""
        blocks = self._blocks.setdefault(member, set())
        for offset, length in ranges:
            blocks.update(range(offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES)))

    def check(self, member: Member, requests: Sequence[Request]) -> None:
        """Raises OSError (EIO) for what must not be read."""
        blocks = self._blocks.get(member, ())
        for offset, view in requests if blocks else ():
            for block in range(offset // BLOCK_BYTES, -(-(offset + len(view)) // BLOCK_BYTES)):
                if block in blocks:
                    at = block * BLOCK_BYTES
                    raise OSError(errno.EIO, f"{member.place}: a write at byte {at} has failed")

    def take_off(self, member: Member, ranges: Iterable[tuple[int, int]]) -> None:
        """What is covered as a whole holds something again, or is on a log."""
        blocks = self._blocks.get(member)
        if blocks is None:
            return
        for offset, length in ranges:
            whole = range(-(-offset // BLOCK_BYTES), (offset + length) // BLOCK_BYTES)
            blocks.difference_update(whole)
        if not blocks:
            del self._blocks[member]
