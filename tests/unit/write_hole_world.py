"""An array under a power supply that is cut: what was promised of each block, and whether it holds.

What is promised: a block reads as what it was at the last flush, or as one of the versions written
since. Of a stripe that was written as a whole and torn, so does each sector; and when a member is
lost as well, what that one held of it may be an error.
"""

import itertools
import random
from collections.abc import Collection, Iterator
from typing import Any

import trio

from pmblk.raid.array import Array
from pmblk.raid.geometry import Geometry, layouts_of
from pmblk.raid.layout import survives
from pmblk.raid.member import Request
from pmblk.raid.replaying import JournalReplay
from pmblk.raid.rows import Rows
from tests.unit.volatile_member import SECTOR, Power, PowerCut, VolatileMember

CHUNK = 8192
BLOCK = 4096
ROWS = 5
JOURNAL = (8192, 72 << 10)
DATA_OFFSET = 96 << 10
SHAPES: list[dict[str, Any]] = [
    {"level": 4, "members": 3},
    {"level": 5, "members": 4, "layout": "left-symmetric"},
    {"level": 5, "members": 5, "layout": "right-asymmetric"},
    {"level": 6, "members": 5, "layout": "left-symmetric"},
]


def name(shape: dict[str, Any]) -> str:
    return "-".join(str(value) for value in shape.values())


class Promise:
    """Of the blocks of an array: which versions each of them may have."""

    def __init__(self, content: bytes, *, torn_bytes: int) -> None:
        self.content = bytearray(content)
        self.since: dict[int, list[bytes]] = {}  # versions, oldest first: the flushed one leads
        self.torn: set[int] = set()  # may have been written as part of a full stripe
        self._torn_bytes = torn_bytes

    def writing(self, offset: int, data: bytes) -> None:
        blocks = range(offset // BLOCK, -(-(offset + len(data)) // BLOCK))
        for block in blocks:
            self.since.setdefault(block, [self.version(block)])
        self.content[offset : offset + len(data)] = data
        for block in blocks:
            self.since[block].append(self.version(block))
        if len(data) >= self._torn_bytes:
            self.torn.update(blocks)

    def flushed(self) -> None:
        self.since.clear()
        self.torn.clear()

    def version(self, block: int) -> bytes:
        return bytes(self.content[block * BLOCK : (block + 1) * BLOCK])

    def kept_by(self, block: int, found: bytes | None) -> bool:
        """`found`: None is an error."""
        versions = self.since.get(block, [self.version(block)])
        if found in versions:
            return True
        if block not in self.torn:
            return False
        return found is None or all(
            found[start : start + SECTOR] in [one[start : start + SECTOR] for one in versions]
            for start in range(0, BLOCK, SECTOR)
        )


class World:
    """`lost`: who is away, for the array knows that they are."""

    def __init__(self, seed: int, *, journal: bool = True, **shape: Any) -> None:
        shape.setdefault("layout", layouts_of(shape["level"])[0])
        self.chosen = random.Random(seed)
        self.geometry = Geometry(member_bytes=ROWS * CHUNK, chunk_bytes=CHUNK, **shape)
        self.journal = JOURNAL if journal else None
        self.images = [bytes(DATA_OFFSET + ROWS * CHUNK)] * self.geometry.members
        self.bad_blocks: list[set[int]] = [set() for _ in self.images]
        self.lost: set[int] = set()
        self.promise = Promise(
            bytes(self.geometry.size), torn_bytes=(self.geometry.data_members - 1) * CHUNK + 1
        )

    # ---- switched on and off

    async def start(self, *, cut_at: int | None = None) -> JournalReplay | None:
        """Raises PowerCut, as everything does from here on."""
        self.power = Power(cut_at)
        self.members = [
            VolatileMember(image, self.power, self.chosen, name=f"m{slot}")
            for slot, image in enumerate(self.images)
        ]
        for member, bad in zip(self.members, self.bad_blocks, strict=True):
            member.bad_blocks |= bad
            member.durably_bad |= bad
        self.array = Array(
            self.geometry,
            [None if slot in self.lost else one for slot, one in enumerate(self.members)],
            data_offset=DATA_OFFSET,
            announce=self._announce,
            journal=self.journal,
        )
        if self.array.journal is None:
            return None
        found = await self.array.journal.replay()
        for slot, offset, length in found.lost:
            self.members[slot].lose(offset, length)
        return found

    async def _announce(self, slot: int, _error: OSError) -> None:
        await trio.lowlevel.checkpoint()
        if self.power.step():
            raise PowerCut
        self.lost.add(slot)

    def crash(self) -> None:
        self.images = [one.after_the_cut() for one in self.members]
        self.bad_blocks = [one.durably_bad for one in self.members]

    @property
    def has_bad_blocks(self) -> bool:
        """Some of a torn stripe was lost: what else is in its block rows has no redundancy."""
        return any(one.bad_blocks or one.durably_bad for one in self.members)

    def lose_some_member(self) -> None:
        """One that the array can be without."""
        losses = [lost for lost in self.losses() if len(lost) == len(self.lost) + 1]
        if losses and not self.has_bad_blocks:
            self.lost = set(self.chosen.choice(losses))

    async def take_back(self, slot: int) -> None:
        """A member that was lost is there again with all that it had, and is rebuilt."""
        devices, rows = self.array.devices, self.array._level
        assert isinstance(rows, Rows)
        member = VolatileMember(
            self.members[slot].after_the_cut(), self.power, self.chosen, name=f"m{slot}"
        )
        self.members[slot] = member
        devices.rebuilt[slot] = 0
        devices.members[slot] = member
        if self.array.journal is not None:
            await self.array.journal.renew()
        for row in range(ROWS):
            async with rows._locks.hold((row,)):
                content = await rows._recover(row, 0, CHUNK, slot)
                await member.write([Request(devices.place(row), content)])
                devices.rebuilt[slot] = row + 1
        await member.flush()
        del devices.rebuilt[slot]
        self.lost.discard(slot)

    def losses(self) -> Iterator[frozenset[int]]:
        """Every set of members that may be lost now, none among them."""
        others = [slot for slot in range(self.geometry.members) if slot not in self.lost]
        for count in range(self.geometry.redundancy - len(self.lost) + 1):
            for more in itertools.combinations(others, count):
                yield frozenset(self.lost | {*more})

    # ---- work

    async def work(self, steps: int, *, failing: bool = False) -> None:
        if self.has_bad_blocks:  # a part of such a block row cannot be written
            await self.write(0, self.array.size)
            await self.flush()
            assert not self.has_bad_blocks
        for _ in range(steps):
            what = self.chosen.randrange(8)
            if what == 0:
                await self.flush()
            elif what < 4:
                await self._write_side_by_side()
            elif what == 4 and failing:
                self._spoil_a_member()
            elif what == 5 and failing and self.lost and not self.has_bad_blocks:
                await self.take_back(self.chosen.choice(sorted(self.lost)))
            else:
                await self.write(*self._extent(0, self.array.size))

    async def write(self, offset: int, length: int) -> None:
        data = self.chosen.randbytes(length)
        self.promise.writing(offset, data)
        (error,) = await self.array.write([(offset, memoryview(data))])
        if self.power.off:
            raise PowerCut
        assert error is None

    async def flush(self) -> None:
        await self.array.flush()
        self.promise.flushed()

    async def _write_side_by_side(self) -> None:
        """Some of them meet in a row; none in a block."""
        parts = self.chosen.choice([2, 3, 5])
        size = self.array.size // parts // BLOCK * BLOCK
        async with trio.open_nursery() as nursery:
            for part in range(parts):
                nursery.start_soon(self.write, *self._extent(part * size, size))

    def _extent(self, start: int, size: int) -> tuple[int, int]:
        """Mostly a block or two, often whole stripes."""
        chosen = self.chosen
        unit = chosen.choice([512, BLOCK, BLOCK, BLOCK, CHUNK, self.geometry.stripe_bytes])
        if unit > size:
            unit = BLOCK
        offset = chosen.randrange(-(-size // unit)) * unit
        length = chosen.choice([1, 1, 2, 3]) * unit
        return start + offset, min(length, size - offset)

    def _spoil_a_member(self) -> None:
        slot = self.chosen.randrange(self.geometry.members)
        spoiled = {slot for slot, one in enumerate(self.members) if one.refuses_writes}
        spoiled |= self.lost | {slot}
        if survives(self.geometry, spoiled) and not self.has_bad_blocks:
            self.members[slot].refuses_writes = True

    # ---- what is found

    async def broken(self) -> list[int]:
        """Blocks that read as nothing that was promised."""
        found = await self._blocks()
        return [n for n, content in enumerate(found) if not self.promise.kept_by(n, content)]

    async def _blocks(self) -> list[bytes | None]:
        """All of the array; None is an error."""
        numbers = range(self.array.size // BLOCK)
        try:
            whole = bytes(await self.array.read(0, self.array.size))
        except OSError:
            return [await self._block(number) for number in numbers]
        return [whole[number * BLOCK : (number + 1) * BLOCK] for number in numbers]

    async def _block(self, number: int) -> bytes | None:
        try:
            return bytes(await self.array.read(number * BLOCK, BLOCK))
        except OSError:
            return None

    async def accept(self) -> None:
        """What is there now is what has to be there from now on; an error may stay one."""
        found = await self._blocks()
        for block in list(self.promise.since):
            content = found[block]
            if content is not None:
                self.promise.content[block * BLOCK : (block + 1) * BLOCK] = content
                self.promise.since.pop(block)
                self.promise.torn.discard(block)

    async def same_without(self, slots: Collection[int]) -> bool:
        """Whether all reads as before when these members are lost now."""
        before = await self._blocks()
        members = self.array.devices.members
        kept = list(members)
        for slot in slots:
            members[slot] = None
        after = await self._blocks()
        members[:] = kept
        return before == after


async def is_cut(world: World, steps: int, **options: bool) -> bool:
    """Work until the power goes; False: it did not."""
    cut = False
    try:
        await world.work(steps, **options)
    except* PowerCut:
        cut = True
    return cut
