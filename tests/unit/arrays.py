"""Arrays over simulated members that stand in for running ones, for the tests of what is above."""

import random
import uuid
from collections.abc import Sequence
from typing import Any

import trio

from pmblk.errors import PmblkError
from pmblk.raid.array import Array
from pmblk.raid.geometry import Geometry, layouts_of
from pmblk.raid.layout import survives
from pmblk.raid.status import ArrayStatus, MemberStatus
from tests.unit.sim_member import SimMember

CHUNK = 8192
DATA_OFFSET = 1 << 16
ARRAY = uuid.UUID(int=7)


class CountedArray(Array):
    """Notes what it is asked for; `gate`, once set, lets nothing begin before it opens."""

    asked: list[tuple[str, int]]
    gate: trio.Event | None = None

    async def _ask(self, what: str, count: int) -> None:
        self.asked.append((what, count))
        if self.gate is not None:
            await self.gate.wait()

    async def read(self, offset: int, length: int) -> memoryview:
        await self._ask("read", length)
        return await super().read(offset, length)

    async def write(self, writes: Sequence[tuple[int, memoryview]]) -> list[OSError | None]:
        await self._ask("write", len(writes))
        return await super().write(writes)

    async def zero(self, offset: int, length: int) -> None:
        await self._ask("zero", length)
        await super().zero(offset, length)

    async def flush(self) -> None:
        await self._ask("flush", 0)
        await super().flush()


class FakeRunning:
    """The face of an array in service; what a person asks of it is noted in `asked`."""

    def __init__(
        self, *, level: int = 5, members: int = 4, chunks: int = 32, name: str = "array"
    ) -> None:
        self.name = name
        self.geometry = Geometry(
            level=level,  # type: ignore[arg-type]
            members=members,
            member_bytes=chunks * CHUNK,
            chunk_bytes=CHUNK,
            layout=layouts_of(level)[0],  # type: ignore[arg-type]
        )
        size = DATA_OFFSET + chunks * CHUNK
        self.members = [
            SimMember(size, random.Random(slot), name=f"/m{slot}") for slot in range(members)
        ]
        self.array = CountedArray(
            self.geometry, self.members, data_offset=DATA_OFFSET, announce=self._announce
        )
        self.array.asked = []
        self.size = self.array.size
        self.asked: list[Any] = []
        self.runs = 0
        self.stopped = self.closed = False
        self.refusal: PmblkError | None = None

    async def _announce(self, _slot: int, _error: OSError) -> None:
        await trio.lowlevel.checkpoint()

    async def run(self) -> None:
        self.runs += 1
        try:
            await trio.sleep_forever()
        finally:
            self.runs -= 1

    async def stop(self) -> None:
        assert not self.runs, "its work ends first"
        await trio.lowlevel.checkpoint()
        self.stopped = True
        self.close()

    def close(self) -> None:
        self.closed = True
        self.array.close()

    async def _note(self, *what: Any) -> None:
        await trio.lowlevel.checkpoint()
        self._note_now(*what)

    def _note_now(self, *what: Any) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.asked.append(what)

    async def fail(self, place: str) -> None:
        await self._note("fail", place)

    async def remove(self, place: str) -> None:
        await self._note("remove", place)

    async def add(self, place: str) -> None:
        await self._note("add", place)

    async def replace(self, old: str, new: str) -> None:
        await self._note("replace", old, new)

    def scrub(self, *, repair: bool) -> None:
        self._note_now("scrub", repair)

    def stop_scrub(self) -> None:
        self._note_now("stop_scrub")

    def status(self) -> ArrayStatus:
        lost = {slot for slot, member in enumerate(self.members) if member.gone}
        state = "clean" if not lost else "degraded" if survives(self.geometry, lost) else "failed"
        return array_status(
            name=self.name,
            level=self.geometry.level,
            size_bytes=self.size,
            state=state,
            members=tuple(
                MemberStatus(
                    slot=slot,
                    place=member.place,
                    member=uuid.UUID(int=slot + 1),
                    state="faulty" if member.gone else "active",
                )
                for slot, member in enumerate(self.members)
            ),
        )


def array_status(**changes: Any) -> ArrayStatus:
    """A plain array of level 5, with some fields changed."""
    fields: dict[str, Any] = {
        "name": "array",
        "array": ARRAY,
        "level": 5,
        "layout": "left-symmetric",
        "chunk_bytes": 64 << 10,
        "size_bytes": 2 << 30,
        "member_bytes": 1 << 30,
        "state": "clean",
        "events": 3,
        "write_hole": "journal",
        "integrity": False,
        "bitmap_chunk_bytes": 64 << 20,
        "dirty_bytes": 0,
        "members": (),
        "sweep": None,
        "scrub": None,
        "member_read_bytes": 0,
        "member_write_bytes": 0,
    }
    return ArrayStatus(**{**fields, **changes})
