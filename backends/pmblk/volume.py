"""A namespace over an array: the same face as one in memory, with members that take their time.

Every command but a few that ask nothing of the members waits. Writes and flushes that wait in one
turn of the loop, from whichever connection, are one batch (`pmblk.gathering`): neighbours become
full stripes, and all that is to be durable shares one flush. Reads, zeroing and discards go for
themselves, a bounded number at once.

Rules that live here and nowhere else:

1. A write that waits has its bytes in page-aligned memory of its own, since members take nothing
   else (O_DIRECT), and since a member that hangs may look at them for ever. A large one is received
   into such memory from the start.
2. A FLUSH, and FUA, cover every write that was completed before, and those of their own batch.
3. A read's memory is its own: nothing is held for it, and nobody waits for a release.
4. What a discard covers of a block is left alone. Nobody promises to zero fast, for a stripe may
   have to be read and computed for it.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial

import trio

from pmblk.array_face import Running
from pmblk.block_device import NONE, BlockDevice
from pmblk.counters import Counters
from pmblk.errors import PmblkError
from pmblk.gathering import Gathering
from pmblk.media.faults import Health
from pmblk.nvme.command import (
    ALLOCATE,
    DATASET_MANAGEMENT,
    FAST_ONLY,
    FLUSH,
    FUA,
    GET_LBA_STATUS,
    PREALLOCATE,
    PREFETCH,
    READ,
    WRITE,
    WRITE_ZEROES,
    Command,
)
from pmblk.nvme.status import Status, fault_of, from_oserror
from pmblk.pages import PAGE_BYTES
from pmblk.raid.buffers import buffer
from pmblk.ranges import Extent, slices, whole_units

AT_ONCE_MAX = 64  # reads, zeroings and discards under way
READ_BYTES_MAX = 16 << 20  # what one `complete` reads before its caller sends it
WRITE_BYTES_MAX = 32 << 20  # of one write of the array
ZEROES_BYTES = 1 << 20

_CHANGES = (WRITE, WRITE_ZEROES, DATASET_MANAGEMENT, PREALLOCATE)
_KNOWN = (*_CHANGES, READ, FLUSH, GET_LBA_STATUS, PREFETCH)


class Volume(BlockDevice):
    """`running` is the volume's: `stop` ends it."""

    remedy = "see pmblk raid status, and bring its members back"

    def __init__(
        self, name: str, running: Running, *, lba_bytes: int, read_only: bool = False
    ) -> None:
        self.name = name
        self.running = running
        self.lba_bytes = lba_bytes
        self.read_only = read_only
        self.health = Health(-1)  # nobody reads memory that could fail: there is no fault
        self.counters = Counters()
        self.changing = trio.Lock()
        self._gathering = Gathering(self._write_and_flush)
        self._at_once = trio.Semaphore(AT_ONCE_MAX)

    # ---- what it is

    @property
    def size(self) -> int:
        return self.running.size

    @property
    def description(self) -> str:
        geometry = self.running.geometry
        return f"RAID {geometry.level} over {geometry.members} members"

    @property
    def durability(self) -> tuple[str, str]:
        return "members", "a flush is done when every member has flushed"

    def allocated_bytes(self) -> int:
        return self.size

    @property
    def starved(self) -> int:
        return 0

    @property
    def starved_since(self) -> float:
        return 0.0

    # ---- what is answered at once: no await

    def execute(self, commands: Sequence[Command]) -> Sequence[Command]:
        waiting: list[Command] = []
        for command in commands:
            if command.status:
                self.counters.errors += 1
                continue
            status = self._guard(command)
            if status:
                self._fail(command, status)
            elif _answered(command):
                self.counters.count(command)
            else:
                waiting.append(command)
        if not waiting:
            return NONE
        self.counters.waits += len(waiting)
        _own_payloads([command for command in waiting if command.opcode == WRITE])
        return waiting

    def _guard(self, command: Command) -> Status:
        """Opcode, range, read-only, and what cannot be promised."""
        opcode = command.opcode
        if opcode not in _KNOWN:
            return Status.INVALID_OPCODE
        if opcode == FLUSH:
            return Status.SUCCESS
        if command.length > self.size - command.offset:
            return Status.LBA_OUT_OF_RANGE
        if self.read_only and opcode in _CHANGES:
            return Status.NAMESPACE_WRITE_PROTECTED
        if opcode == WRITE_ZEROES and command.flags & FAST_ONLY and command.length:
            return Status.FAST_ZERO_NOT_POSSIBLE
        return Status.SUCCESS

    def release(self, commands: Iterable[Command]) -> None:
        """Nothing is held: what was read is the commands' own."""

    @property
    def has_windows(self) -> bool:
        return True

    def window(self, command: Command) -> memoryview | None:
        if not command.leases:
            if not command.length or self._guard(command):
                return None
            command.leases = (buffer(command.length),)
        own: memoryview = command.leases[0]
        return own[command.received :]

    def received(self, command: Command, length: int) -> None:
        command.received += length

    # ---- what waits

    async def complete(self, commands: Sequence[Command]) -> Sequence[Command]:
        """As many as may be read at once; the same commands may be given again if cancelled."""
        chosen = _affordable(commands)
        gathered = [command for command in chosen if command.opcode in (WRITE, FLUSH)]
        work: list[Callable[[], Awaitable[None]]] = [
            partial(self._by_itself, command)
            for command in chosen
            if command.opcode not in (WRITE, FLUSH)
        ]
        if gathered:
            work.append(partial(self._gathering.join, gathered))
        if len(work) == 1:
            await work[0]()
        else:
            async with trio.open_nursery() as nursery:
                for one in work:
                    nursery.start_soon(one)
        return commands[len(chosen) :]

    async def _by_itself(self, command: Command) -> None:
        try:
            async with self._at_once:
                if command.opcode == READ:
                    found = await self.running.array.read(command.offset, command.length)
                    command.segments = [found]
                else:
                    await self._clear(command)
        except OSError as error:
            self._fail_with(command, error)
            return
        if command.flags & FUA and command.opcode != READ:
            await self._gathering.join((command,))
        else:
            self.counters.count(command)

    async def _clear(self, command: Command) -> None:
        """WRITE_ZEROES and deallocation. Raises OSError."""
        offset, length = command.offset, command.length
        if command.opcode == WRITE_ZEROES and command.flags & ALLOCATE:
            await self._write_zeroes(offset, length)
            return
        if command.opcode == DATASET_MANAGEMENT:
            offset, length = _whole_blocks(command)
        await self.running.array.zero(offset, length)

    async def _write_zeroes(self, offset: int, length: int) -> None:
        """Zeroes that take space. Raises OSError."""
        zeroes = buffer(ZEROES_BYTES)
        for start, piece in slices(offset, length, slice_bytes=ZEROES_BYTES):
            (error,) = await self.running.array.write([(start, zeroes[:piece])])
            if error is not None:
                raise error

    async def _write_and_flush(self, commands: Sequence[Command]) -> None:
        """Writes, flushes, and what is done but for its durability."""
        done = False
        try:
            for writes in _grouped([one for one in commands if one.opcode == WRITE]):
                await self._write(writes)
            await self._flush([one for one in commands if _is_to_be_durable(one)])
            done = True
        finally:
            for command in commands:
                if command.status:
                    continue
                if done:
                    self.counters.count(command)
                else:  # a defect of ours must not pass for a success
                    self._fail(command, Status.WRITE_FAULT)

    async def _write(self, commands: Sequence[Command]) -> None:
        writes = [(one.offset, memoryview(one.payload or b"")) for one in commands]
        errors = await self.running.array.write(writes)
        for command, error in zip(commands, errors, strict=True):
            if error is not None:
                self._fail_with(command, error)

    async def _flush(self, commands: Sequence[Command]) -> None:
        if not commands:
            return
        try:
            await self.running.array.flush()
        except OSError as error:
            for command in commands:
                self._fail_with(command, error)

    # ---- failures

    def _fail(self, command: Command, status: Status) -> None:
        command.status = status
        self.counters.errors += 1

    def _fail_with(self, command: Command, error: OSError) -> None:
        self._fail(command, from_oserror(error, otherwise=fault_of(command.opcode)))

    def failure(self) -> str:
        if self.running.status().state != "failed":
            return ""
        return "more members have failed than it can be without"

    def examine(self, views: Iterable[memoryview] = ()) -> bool:
        return bool(self.failure())

    # ---- its life

    async def run(self) -> None:
        await self.running.run()

    async def stop(self) -> None:
        await self.running.stop()

    def close(self) -> None:
        self.running.close()


def array_of(device: BlockDevice) -> Running | None:
    """What runs behind it where it is an array; None for a namespace in memory."""
    return device.running if isinstance(device, Volume) else None


def running_of(device: BlockDevice) -> Running:
    """The array behind it. Raises PmblkError for a namespace in memory."""
    running = array_of(device)
    if running is None:
        raise PmblkError(f"{device.name} is no array", hint="pmblk raid status lists the arrays")
    return running


def _answered(command: Command) -> bool:
    """What asks nothing of the members is done."""
    opcode = command.opcode
    if not command.length and opcode != FLUSH:
        command.segments = []
        command.extents = []
        return True
    if opcode == GET_LBA_STATUS:  # nobody keeps book of holes
        command.extents = [Extent(command.offset, command.length, hole=False)]
        return True
    if opcode == DATASET_MANAGEMENT:
        return not _whole_blocks(command)[1]
    return opcode in (PREFETCH, PREALLOCATE)


def _whole_blocks(command: Command) -> tuple[int, int]:
    """Offset and length of the whole blocks inside; the length is 0 when there is none."""
    offset, length = command.offset, command.length
    start, end = whole_units(offset, length, unit=PAGE_BYTES, limit=-1)
    return start, max(0, end - start)


def _own_payloads(writes: Sequence[Command]) -> None:
    """The front end's buffer is its own again: one copy, into memory for all of them."""
    borrowed = [command for command in writes if not command.leases]
    memory = buffer(sum(_pages_bytes(command.length) for command in borrowed) or PAGE_BYTES)
    for command in writes:
        if command.leases:  # it was received into memory of its own
            (own,), command.leases = command.leases, ()
        else:
            own, memory = memory[: command.length], memory[_pages_bytes(command.length) :]
        if command.received < command.length:
            assert command.payload is not None
            own[command.received :] = command.payload
        command.payload = own


def _pages_bytes(length: int) -> int:
    return -(-length // PAGE_BYTES) * PAGE_BYTES


def _affordable(commands: Sequence[Command]) -> Sequence[Command]:
    """The first of them, up to what may be read before somebody sends it; at least one."""
    budget = READ_BYTES_MAX
    for number, command in enumerate(commands):
        if command.opcode == READ:
            budget -= command.length
            if budget < 0 and number:
                return commands[:number]
    return commands


def _grouped(writes: Sequence[Command]) -> Iterator[list[Command]]:
    """In their order, in groups that the array takes at once."""
    group: list[Command] = []
    room = WRITE_BYTES_MAX
    for command in writes:
        if group and command.length > room:
            yield group
            group, room = [], WRITE_BYTES_MAX
        group.append(command)
        room -= command.length
    if group:
        yield group


def _is_to_be_durable(command: Command) -> bool:
    return not command.status and (command.opcode == FLUSH or bool(command.flags & FUA))
