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

The exchange, after the sweep. A start after a crash takes the old one until the change of roles is
durable, and the new one from then on: so meanwhile neither may lack a write that was acknowledged.

    if not await member.hand_over():
        return                                    # the new one failed: the old one goes on alone
    await change_roles(...)                       # durable when it returns
    if devices.members[slot] is member:           # neither has failed meanwhile
        devices.members[slot] = member.new        # in one turn with
        member.close()

`hand_over` holds new writes up until those under way are done, and only then says whether the new
one has all of them. When it has said so, what either of the two fails at is the slot's failure,
until `give_up` (the change was called off) or `close`. Whoever still writes through this object
after `close` writes to the new one; `Devices` asks that one where it had planned to ask this.

Ownership: `close` closes the old one. The new one stays the property of who gave it, who makes it
the member of the slot at the end, and closes it when it failed.
"""

import errno
from collections.abc import Awaitable, Callable, Sequence

import trio

from pmblk.raid.member import Member, Request
from pmblk.raid.superblock import DATA_OFFSET

Work = Callable[[], Awaitable[None]]


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
        self.handed_over = False  # to the new one, and both count until `close`
        self.position = 0
        self._own_bytes = own_bytes
        self._closed = False
        self._gate: trio.Event | None = None  # whoever comes waits for it
        self._under_way = 0
        self._none_under_way = trio.Event()

    @property
    def holders(self) -> tuple[Member, ...]:
        """Who is the slot's member, or will be when roles have changed."""
        return (self.old, self.new) if self.handed_over else (self.old,)

    @property
    def holder(self) -> Member:
        """Whose bytes are read."""
        return self.new if self._closed and self.handed_over else self.old

    async def read(self, requests: Sequence[Request]) -> None:
        await self.holder.read(requests)

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
            self.new_error = await _error_of(lambda: self.new.write(requests)) or self.new_error
        if self.new_error is not None:
            raise self.new_error
        for offset, view in requests:
            self.position = max(self.position, offset + len(view))

    def close(self) -> None:
        self._closed = True
        self.old.close()

    # ---- the exchange

    async def hand_over(self) -> bool:
        """Whether the new one has all that was written; from now on it has to go on having that."""
        assert self._gate is None, "once at a time"
        self._gate = trio.Event()
        try:
            while self._under_way:
                await self._none_under_way.wait()
            self.handed_over = self.new_error is None
        finally:
            self._gate.set()
            self._gate = None
        return self.handed_over

    def give_up(self, error: OSError) -> None:
        """The new one is not to be used any more."""
        self.new_error = self.new_error or error
        self.handed_over = False

    # ---- both

    async def _both(self, on_old: Work, on_new: Work | None) -> None:
        """At once. Raises what those who count say, when both are done."""
        while self._gate is not None:
            await self._gate.wait()
        self._under_way += 1
        try:
            old_error, new_error = await self._errors(on_old, on_new)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._none_under_way.set()
                self._none_under_way = trio.Event()
        if new_error is not None and not self.handed_over:
            self.new_error = self.new_error or new_error
            new_error = None
        if self.holder is self.new:
            old_error = None  # it was closed under a write: the new one has it
        for error in (old_error, new_error):
            if error is not None:
                raise error

    async def _errors(
        self, on_old: Work, on_new: Work | None
    ) -> tuple[OSError | None, OSError | None]:
        errors: list[OSError | None] = [None, None]

        async def one(number: int, what: Work) -> None:
            if number or self.holder is self.old:
                errors[number] = await _error_of(what)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, 0, on_old)
            if on_new is not None and self.new_error is None:
                nursery.start_soon(one, 1, on_new)
        return errors[0], errors[1]


async def _error_of(what: Work) -> OSError | None:
    try:
        await what()
    except OSError as error:
        return error
    return None


def holders_of(member: Member) -> tuple[Member, ...]:
    """Whose bytes count, where it may be one that is being replaced."""
    return member.holders if isinstance(member, Replacing) else (member,)


def goes_on(successor: Member, member: Member) -> bool:
    """Whether it holds all that `member` does, and may be asked instead: a replacement of that one
    has begun, was called off, or is over.
    """
    if isinstance(member, Replacing) and successor is not member:
        return successor in member.holders
    return member in (successor, holders_of(successor)[0])
