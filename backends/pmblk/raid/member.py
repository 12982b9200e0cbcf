"""The contract of a member: one device of an array, read and written a batch at a time.

Nothing of it blocks the event loop. Offsets count from the start of the device; what is read and
written is whole blocks of `block_bytes`, from memory that is aligned to `MEMORY_ALIGNMENT`, as
O_DIRECT wants it. A batch that fails is an OSError; parts of it may have been done.
"""

import abc
import errno
from collections.abc import Sequence
from typing import NamedTuple

MEMORY_ALIGNMENT = 4096


class Request(NamedTuple):
    """Bytes from `offset` on into `view`, or out of it. The view stays the caller's."""

    offset: int
    view: memoryview


class Hung(OSError):
    """A member has not answered in time. It may yet: the memory of its batch is its for ever."""

    def __init__(self, place: str, seconds: float) -> None:
        super().__init__(errno.ETIMEDOUT, f"{place} does not answer in {seconds:g} s")


class Member(abc.ABC):
    """`place` is its path or URI, `size` and `block_bytes` what the device has.

    `inline`: its I/O is done on the event loop, so members like it are not used side by side.
    """

    place: str
    size: int
    block_bytes: int
    inline: bool = False

    @abc.abstractmethod
    async def read(self, requests: Sequence[Request]) -> None:
        """All of them, in any order. Raises OSError."""

    @abc.abstractmethod
    async def write(self, requests: Sequence[Request]) -> None:
        """All of them, in any order; requests of one batch do not overlap. Raises OSError."""

    @abc.abstractmethod
    async def flush(self) -> None:
        """All writes that have returned are durable. Raises OSError."""

    @abc.abstractmethod
    async def zero(self, offset: int, length: int) -> None:
        """The range reads as zeroes, and gives its space back where it can.

        Whole blocks. Raises OSError; EOPNOTSUPP where only writing zeroes would do.
        """

    async def refresh(self) -> None:
        """The device may have become larger: `size` is what it has now. Raises OSError.

        Nothing happens where that cannot be asked again.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Let the device go. No error."""
