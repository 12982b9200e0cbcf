"""An array: a range of bytes over members, with the redundancy of its level.

`read`, `write`, `zero` and `flush` are all that a namespace needs of it. Members are given open,
and are the array's from then on.

A write that has begun is finished, also when nobody wants it any more: half of one would leave a
stripe whose parity does not fit its data. What bounds it is the patience with a member.
"""

import contextlib
from collections.abc import Iterable, Sequence

import trio

from pmblk.raid.buffers import buffer
from pmblk.raid.devices import Announce, Devices
from pmblk.raid.geometry import Geometry
from pmblk.raid.intents import Intents
from pmblk.raid.locks import RowLocks
from pmblk.raid.member import Member
from pmblk.raid.mirrors import Mirrors
from pmblk.raid.rows import Rows

BLOCK_BYTES = 4096


class Array:
    """`members` are by slot; None is missing. `announce`: see `Devices`.

    `intents` know which regions are being written; None: nobody keeps a bitmap.
    """

    def __init__(
        self,
        geometry: Geometry,
        members: Sequence[Member | None],
        *,
        data_offset: int,
        announce: Announce,
        intents: Intents | None = None,
    ) -> None:
        self.geometry = geometry
        self.size = geometry.size
        self.devices = Devices(geometry, members, data_offset=data_offset, announce=announce)
        self.intents = intents
        self._level = Rows(self.devices) if geometry.parities else Mirrors(self.devices)
        self.operations = 0  # of clients: who works in the background stands back for them

    async def read(self, offset: int, length: int) -> memoryview:
        """The bytes, in memory that is the caller's. Raises OSError (EIO) for what is lost."""
        assert 0 <= offset <= offset + length <= self.size
        if not length:
            return memoryview(b"")
        first, last = offset & -BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES) * BLOCK_BYTES
        target = buffer(last - first)
        self.operations += 1
        await self._level.read(first, target)
        return target[offset - first : offset - first + length]

    async def write(self, writes: Sequence[tuple[int, memoryview]]) -> list[OSError | None]:
        """Offsets and bytes, in the order given where they overlap; what became of each.

        What is written together is planned together: neighbours become full stripes.
        """
        assert all(0 <= offset <= offset + len(view) <= self.size for offset, view in writes)
        self.operations += 1
        with trio.CancelScope(shield=True):
            async with self._intended([(offset, len(view)) for offset, view in writes]):
                errors = await self._level.write(writes)
        return errors

    @property
    def locks(self) -> RowLocks:
        """Of rows where there is parity, else of chunks of the array: a sweep takes them too."""
        return self._level.locks

    def _intended(
        self, ranges: Iterable[tuple[int, int]]
    ) -> contextlib.AbstractAsyncContextManager[None, bool | None]:
        return contextlib.nullcontext() if self.intents is None else self.intents.writing(ranges)

    async def flush(self) -> None:
        """All that was written is durable on every member that is in. Raises OSError.

        A member that cannot say so is failed: what it lacks the others make up for.
        """
        failures = await self.devices.flush()
        for slot in await self.devices.fail(failures):
            raise failures[slot]

    def close(self) -> None:
        """Let the members go."""
        for member in self.devices.members:
            if member is not None:
                member.close()
