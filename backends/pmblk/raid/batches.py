"""What the sweeps of all levels share: memory used again and again, comparing it, and the contract.

Fresh memory for every batch would have to be zeroed by the kernel first, which takes as long as
reading into it; memory that was just used is still in the processor's caches.
"""

import abc
import ctypes
import errno
from collections.abc import Iterable, Mapping, Sequence

from pmblk.raid.bad_blocks import bad_blocks_of
from pmblk.raid.buffers import buffer, numbers
from pmblk.raid.devices import Devices, Failures
from pmblk.raid.findings import BLOCK_BYTES, Findings
from pmblk.raid.member import Hung, Member, Request
from pmblk.raid.parity import Bytes
from pmblk.raid.replacing import Replacing
from pmblk.raid.status import SweepKind

SECTOR_ERRORS = (errno.EIO, errno.EILSEQ, errno.ENODATA, errno.EBADMSG)
"""What a device that is there says of sectors that it cannot read."""

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def same(one: Bytes, other: Bytes) -> bool:
    """Whether two contiguous arrays of one length hold the same, at the speed of memory."""
    assert len(one) == len(other)
    return _memcmp(one.ctypes.data, other.ctypes.data, len(one)) == 0  # type: ignore[no-any-return]


class Space:
    """Buffers of one length by number, made when they are first wanted, as bytes and as numbers."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._buffers: dict[int, tuple[memoryview, Bytes]] = {}

    def view(self, number: int) -> memoryview:
        return self._get(number)[0]

    def numbers(self, number: int) -> Bytes:
        return self._get(number)[1]

    def _get(self, number: int) -> tuple[memoryview, Bytes]:
        found = self._buffers.get(number)
        if found is None:
            view = buffer(self.length)
            found = self._buffers[number] = view, numbers(view)
        return found

    def forget(self) -> None:
        """New ones from now on: a member that hangs may still write into the old."""
        self._buffers.clear()


class Work(abc.ABC):
    """One kind of sweep over the arrays of one family of levels, a batch of units at a time.

    A unit is a row or a chunk: of the array where the kind looks at all members, of the member in
    `slot` where one is filled. `whole`: all of that member is, so clients may read what is done.
    """

    unit_bytes: int
    units: int

    def __init__(
        self,
        kind: SweepKind,
        devices: Devices,
        *,
        slot: int | None,
        whole: bool,
        batch_bytes: int,
        findings: Findings,
    ) -> None:
        self.kind = kind
        self.devices = devices
        self.geometry = devices.geometry
        self.slot = -1 if slot is None else slot
        self.whole = whole
        self.findings = findings
        self._filled: Member | None = None
        self.batch_units = max(1, batch_bytes // self.geometry.chunk_bytes)
        self.space = Space(self.batch_units * self.geometry.chunk_bytes)

    @abc.abstractmethod
    def units_of(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        """First unit, and the one behind the last, for a range of the array; maybe a few more."""

    @abc.abstractmethod
    async def step(self, first: int, last: int) -> None:
        """These units, under their locks. Raises OSError when the sweep cannot go on."""

    # ---- members

    def name(self, slot: int, offset: int) -> str:
        member = self.devices.members[slot]
        return f"{member.place if member else f'slot {slot}'} at byte {offset}"

    async def read(self, batch: Mapping[int, Sequence[Request]]) -> Failures:
        failures = await self.devices.read(batch)
        if any(isinstance(error, Hung) for error in failures.values()):
            self.space.forget()
        return failures

    async def write(self, batch: Mapping[int, Sequence[Request]]) -> None:
        """Who does not take it is failed. Raises OSError when the array cannot be without it."""
        failures = await self.devices.write(batch)
        for slot in await self.devices.fail(failures):
            raise _at_an_end(failures[slot])

    # ---- one member that is filled

    async def fill(
        self, runs: Sequence[tuple[int, int]], *, first: int, lost: Iterable[tuple[int, int]]
    ) -> None:
        """Chunks of the space of `slot`, which starts with chunk `first`, to that member.

        `lost` are chunks and blocks in them that hold nothing: they will not be read as anything.
        """
        chunk_bytes = self.geometry.chunk_bytes
        view = self.space.view(self.slot)
        requests = [
            Request(
                self.devices.place(start),
                view[(start - first) * chunk_bytes : (end - first) * chunk_bytes],
            )
            for start, end in runs
        ]
        target = self._target()
        await self._fill(target, requests)
        self._target()  # it is there yet, so it is this one that has them
        for chunk, block in lost:
            log = bad_blocks_of(target)
            place = self.devices.place(chunk, block * BLOCK_BYTES)
            if log is None:
                raise OSError(errno.EIO, f"{self.name(self.slot, place)}: what was there is lost")
            await log.lose(place, BLOCK_BYTES)

    def filled(self, end: int) -> None:
        """Clients may read the member that is filled up to that chunk: if it still sits there.

        Raises OSError: whoever came into its slot meanwhile has nothing yet.
        """
        self._target()
        if self.whole:
            self.devices.rebuilt[self.slot] = end

    def _target(self) -> Member:
        member = self.devices.members[self.slot]
        self._filled = self._filled or member
        if member is None or member is not self._filled:
            raise OSError(errno.ENODEV, f"the member in slot {self.slot} has left")
        if self.kind != "replace":
            return member
        assert isinstance(member, Replacing)
        return member.new

    async def _fill(self, target: Member, requests: Sequence[Request]) -> None:
        if self.kind == "replace":
            member = self.devices.members[self.slot]
            assert isinstance(member, Replacing)
            try:
                await member.fill(requests)
            except Hung as error:
                raise _at_an_end(error) from error
            return
        failures = await self.devices.write({self.slot: requests})
        await self.devices.fail(failures)
        for failure in failures.values():
            raise _at_an_end(failure)


def _at_an_end(error: OSError) -> OSError:
    """Of a sweep: no `Hung`, which is a reason to try again without that member."""
    return OSError(error.errno, error.strerror or str(error))
