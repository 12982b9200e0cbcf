"""A member that is being replaced while it serves: reads from the old, writes to both.

The `replace` sweep copies what was there before, range by range, under the locks of the array, so
no write of a client falls between reading a range and writing it. What the old one cannot read, the
sweep makes from redundancy.

- The new one fails: it is dropped, `new_error` says why, and the old one goes on alone. The slot
  does not notice; the sweep ends with that error.
- The old one fails at a write: so does the slot, whatever the new one holds, since nobody knows
  which of the ranges above `position` it lacks. The new one is a spare to be rebuilt on.

What lies below `own_bytes` (superblock, bitmap, log of bad blocks) is each device's own, and only
the old one's is touched here. Wrappers of the data area belong around each of the two.

Ownership: `close` closes the old one. The new one stays the property of who gave it, who makes it
the member of the slot at the end, and closes it when it failed.
"""

import errno
from collections.abc import Awaitable, Callable, Sequence

import trio

from pmblk.raid.member import Member, Request
from pmblk.raid.superblock import DATA_OFFSET


def holder(member: Member) -> Member:
    """Whose bytes are read: the old one's, while a member is replaced."""
    return member.old if isinstance(member, Replacing) else member


class Replacing(Member):
    """`position`: up to that byte of the device the new one holds all that the old one does."""

    def __init__(self, old: Member, new: Member, *, own_bytes: int = DATA_OFFSET) -> None:
        assert new.size > own_bytes
        self.place = old.place
        self.size = min(old.size, new.size)
        self.block_bytes = max(old.block_bytes, new.block_bytes)
        self.inline = old.inline and new.inline
        self.old = self.inner = old  # the log of its losses, and its checksums, are the old one's
        self.new = new
        self.new_error: OSError | None = None
        self.position = 0
        self._own_bytes = own_bytes

    async def read(self, requests: Sequence[Request]) -> None:
        await self.old.read(requests)

    async def write(self, requests: Sequence[Request]) -> None:
        shared = [request for request in requests if request.offset >= self._own_bytes]
        await self._both(
            lambda: self.old.write(requests), (lambda: self.new.write(shared)) if shared else None
        )

    async def flush(self) -> None:
        await self._both(self.old.flush, self.new.flush)

    async def zero(self, offset: int, length: int) -> None:
        """Where only one of them can do it fast, the caller writes zeroes to both."""
        if offset < self._own_bytes:
            await self.old.zero(offset, length)
            return

        async def zero_new() -> None:
            try:
                await self.new.zero(offset, length)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                unsupported.append(error)

        unsupported: list[OSError] = []
        await self._both(lambda: self.old.zero(offset, length), zero_new)
        for error in unsupported:
            raise error

    async def fill(self, requests: Sequence[Request]) -> None:
        """What the old one holds there already, in the order of the device, to the new one alone.

        Raises OSError when that fails, or has failed before: the replacement is off.
        """
        if self.new_error is None:
            await self._on_new(lambda: self.new.write(requests))
        if self.new_error is not None:
            raise self.new_error
        for offset, view in requests:
            self.position = max(self.position, offset + len(view))

    def close(self) -> None:
        self.old.close()

    # ---- both

    async def _both(
        self,
        on_old: Callable[[], Awaitable[None]],
        on_new: Callable[[], Awaitable[None]] | None,
    ) -> None:
        """At once. Raises what the old one says, when both are done."""
        errors: list[OSError] = []

        async def old() -> None:
            try:
                await on_old()
            except OSError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(old)
            if on_new is not None and self.new_error is None:
                nursery.start_soon(self._on_new, on_new)
        for error in errors:
            raise error

    def give_up(self, error: OSError) -> None:
        """The new one is not to be used any more."""
        self.new_error = self.new_error or error

    async def _on_new(self, what: Callable[[], Awaitable[None]]) -> None:
        if self.new_error is not None:
            return
        try:
            await what()
        except OSError as error:
            self.new_error = self.new_error or error
