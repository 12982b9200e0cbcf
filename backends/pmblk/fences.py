"""Ranges that are closed to new commands: those that overlap one wait until it is lifted.

A long discard or zeroing closes its own, a discard of held memory the unit of lifetime, a change of
the representation or of the size everything.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import trio

from pmblk.ranges import overlap


class Fence(NamedTuple):
    offset: int
    length: int
    lifted: trio.Event


class Fences:
    """`standing` is empty nearly always: the path of an I/O asks only that."""

    def __init__(self) -> None:
        self.standing: list[Fence] = []

    def overlap(self, offset: int, length: int) -> bool:
        return self._first(offset, length) is not None

    async def lifted(self, offset: int, length: int) -> None:
        """No fence overlaps the range when this returns; it may return without a checkpoint."""
        while (fence := self._first(offset, length)) is not None:
            await fence.lifted.wait()

    @contextlib.contextmanager
    def around(self, offset: int, length: int) -> Iterator[Sequence[Fence]]:
        """A fence; yields those that were there before it and overlap it."""
        fence = Fence(offset, length, trio.Event())
        older = [one for one in self.standing if overlap(offset, length, one.offset, one.length)]
        self.standing.append(fence)
        try:
            yield older
        finally:
            self.standing.remove(fence)
            fence.lifted.set()

    def _first(self, offset: int, length: int) -> Fence | None:
        for fence in self.standing:
            if overlap(offset, length, fence.offset, fence.length):
                return fence
        return None
