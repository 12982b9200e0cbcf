"""Arrays over simulated members, with a model of what they should hold: for the tests of arrays."""

import random
from typing import Any

import numpy as np
import trio

from pmblk.raid import galois
from pmblk.raid.areas import checksums_bytes
from pmblk.raid.array import Array
from pmblk.raid.checksummed import Checksummed
from pmblk.raid.geometry import Geometry, layouts_of
from pmblk.raid.layout import NONE, Stripes, copies, survives
from pmblk.raid.member import Member
from pmblk.raid.parity import combine_by_numpy
from pmblk.raid.superblock import DATA_OFFSET
from tests.unit.sim_member import SimMember

CHUNK = 8192
SHAPES: list[dict[str, Any]] = [
    {"level": 0, "members": 3},
    {"level": 1, "members": 3},
    {"level": 4, "members": 4},
    *({"level": 5, "members": 4, "layout": layout} for layout in layouts_of(5)),
    *({"level": 6, "members": 6, "layout": layout} for layout in layouts_of(6)),
    *({"level": 10, "members": 4, "layout": layout} for layout in layouts_of(10)),
    {"level": 10, "members": 5, "layout": "near", "copies": 3},
    {"level": 10, "members": 3, "layout": "offset"},
]


def name(shape: dict[str, Any]) -> str:
    return "-".join(str(value) for value in shape.values())


class World:
    """An array over simulated members, and what it should hold."""

    def __init__(self, seed: int, *, chunks: int = 12, **shape: Any) -> None:
        checksums = shape.pop("checksums", False)
        self.chosen = random.Random(seed)
        shape.setdefault("layout", layouts_of(shape["level"])[0])
        self.geometry = Geometry(member_bytes=chunks * CHUNK, chunk_bytes=CHUNK, **shape)
        size = DATA_OFFSET + chunks * CHUNK + checksums_bytes(chunks * CHUNK) * checksums
        self.members = [
            SimMember(size, self.chosen, name=f"m{slot}") for slot in range(self.geometry.members)
        ]
        self.announced: list[int] = []
        wrapped = [self._checksummed(one) if checksums else one for one in self.members]
        self.array = Array(self.geometry, wrapped, data_offset=DATA_OFFSET, announce=self._announce)
        self.model = bytearray(self.array.size)

    def _checksummed(self, member: SimMember) -> Member:
        length = self.geometry.member_bytes
        return Checksummed(
            member,
            data_offset=DATA_OFFSET,
            member_bytes=length,
            checksums_offset=DATA_OFFSET + length,
        )

    async def _announce(self, slot: int, _error: OSError) -> None:
        await trio.lowlevel.checkpoint()
        self.announced.append(slot)

    @property
    def lost(self) -> set[int]:
        return {slot for slot, one in enumerate(self.members) if one.gone or one.hangs}

    def extent(self) -> tuple[int, int]:
        """Any range; often whole blocks, sometimes whole stripes."""
        chosen, size = self.chosen, self.array.size
        unit = chosen.choice([1, 512, 4096, 4096, CHUNK, self.geometry.stripe_bytes])
        offset = chosen.randrange(size // unit) * unit
        length = chosen.randint(1, max(1, 3 * CHUNK // unit)) * unit
        return offset, min(length, size - offset)

    async def write(self, *extents: tuple[int, int]) -> list[OSError | None]:
        """A batch; the model has it where the array says that it was written."""
        writes = [(offset, memoryview(self.chosen.randbytes(n))) for offset, n in extents]
        errors = await self.array.write(writes)
        for (offset, view), error in zip(writes, errors, strict=True):
            if error is None:
                self.model[offset : offset + len(view)] = view
        return errors

    async def zero(self, offset: int, length: int) -> None:
        await self.array.zero(offset, length)
        self.model[offset : offset + length] = bytes(length)

    async def check(self, offset: int = 0, length: int | None = None) -> None:
        """It reads as it should, also when hung reads go on after that."""
        length = self.array.size if length is None else length
        found = await self.array.read(offset, length)
        for member in self.members:
            member.scribble()
        assert bytes(found) == bytes(self.model[offset : offset + length])

    def assert_whole(self) -> None:
        """Every member that is there holds what it should: data, copies, and parity.

        Computed from the model, and not through the array.
        """
        expected = self._expected()
        for slot, member in enumerate(self.members):
            if self.array.devices.members[slot] is None:
                continue
            for chunk in range(self.geometry.member_chunks):
                start = DATA_OFFSET + chunk * CHUNK
                found = member.content[start : start + CHUNK]
                wanted = expected.get((slot, chunk), found)
                assert found == wanted, f"chunk {chunk} of slot {slot} is wrong"

    def _expected(self) -> dict[tuple[int, int], bytes]:
        geometry = self.geometry
        chunks = [
            bytes(self.model[start : start + CHUNK]) for start in range(0, len(self.model), CHUNK)
        ]
        if not geometry.parities:
            return {
                (place.slot, place.chunk): data
                for number, data in enumerate(chunks)
                for place in copies(geometry, number)
            }
        expected: dict[tuple[int, int], bytes] = {}
        stripes = Stripes(geometry)
        for row in range(geometry.member_chunks):
            stripe = stripes[row]
            data = chunks[row * len(stripe.data) : (row + 1) * len(stripe.data)]
            expected.update({(slot, row): one for slot, one in zip(stripe.data, data, strict=True)})
            factors = [[1] * len(data), [galois.power(one) for one in stripe.powers]]
            for slot, coefficients in zip((stripe.p, stripe.q), factors, strict=True):
                if slot != NONE:
                    output = np.empty(CHUNK, dtype=np.uint8)
                    sources = [np.frombuffer(one, dtype=np.uint8) for one in data]
                    combine_by_numpy([coefficients], sources, [output])
                    expected[slot, row] = output.tobytes()
        return expected

    def amplification(self) -> tuple[int, int]:
        """Bytes that the members read and wrote since the last call."""
        found = sum(member.reads for member in self.members), sum(m.writes for m in self.members)
        for member in self.members:
            member.reads = member.writes = 0
        return found


def lose_a_member(world: World) -> None:
    slot = world.chosen.randrange(world.geometry.members)
    if survives(world.geometry, world.lost | {slot}) and not spoiled(world):
        setattr(world.members[slot], world.chosen.choice(["gone", "hangs"]), True)


def spoil_a_block(world: World) -> None:
    """A bad sector, as long as the redundancy makes up for it."""
    slot = world.chosen.randrange(world.geometry.members)
    losses = {slot, *world.lost, *spoiled(world)}
    if survives(world.geometry, losses):
        blocks = range(DATA_OFFSET // 4096, world.members[slot].size // 4096)
        world.members[slot].bad_blocks.add(world.chosen.choice(blocks))


def spoiled(world: World) -> set[int]:
    return {slot for slot, member in enumerate(world.members) if member.bad_blocks}
