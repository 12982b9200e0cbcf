"""Members with a volatile cache, under one power supply, for the tests of crashes.

The fault model, on top of `SimMember`'s: what was written since the last flush is in a cache. When
the power is cut, each 512-byte sector of it has any one of its versions since then, whatever the
order of the writes; a member may also have lost all of its cache, or nothing. The power goes at any
write, of which some requests may have arrived, at any flush, or in the middle of an announcement.
"""

import random
from collections.abc import Sequence

import trio

from pmblk.raid.member import Request
from tests.unit.sim_member import BLOCK, SimMember

SECTOR = 512


class PowerCut(Exception):
    """Everything stops here; no OSError, so nobody handles it."""


class Power:
    """It is cut at the step of that number; None: never."""

    def __init__(self, cut_at: int | None = None) -> None:
        self.cut_at = cut_at
        self.steps = 0

    @property
    def off(self) -> bool:
        return self.cut_at is not None and self.steps >= self.cut_at

    def step(self) -> bool:
        """Whether the power goes now. Raises PowerCut when it is off already."""
        if self.off:
            raise PowerCut
        self.steps += 1
        return self.off


class VolatileMember(SimMember):
    def __init__(self, content: bytes, power: Power, chosen: random.Random, *, name: str) -> None:
        super().__init__(len(content), chosen, name=name)
        self.content[:] = content
        self._power = power
        self.durable = bytearray(content)
        self._cache: dict[int, list[bytes]] = {}  # versions, by sector
        self.durably_bad: set[int] = set()

    def lose(self, offset: int, length: int) -> None:
        """These blocks are bad, durably, until they are written and flushed."""
        self.bad_blocks.update(range(offset // BLOCK, (offset + length) // BLOCK))
        self.durably_bad |= self.bad_blocks

    async def read(self, requests: Sequence[Request]) -> None:
        if self._power.off:
            raise PowerCut
        await super().read(requests)

    async def write(self, requests: Sequence[Request]) -> None:
        await trio.lowlevel.checkpoint()
        goes = self._power.step()
        arrived = requests
        if goes:
            arrived = [one for one in requests if self._chosen.random() < 0.5]
        try:
            if arrived:
                await super().write(arrived)
        finally:
            for offset, view in arrived:
                for sector in range(offset // SECTOR, (offset + len(view)) // SECTOR):
                    version = self.content[sector * SECTOR : (sector + 1) * SECTOR]
                    self._cache.setdefault(sector, []).append(bytes(version))
        if goes:
            raise PowerCut

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._power.step():
            raise PowerCut
        await super().flush()
        for sector, versions in self._cache.items():
            self.durable[sector * SECTOR : (sector + 1) * SECTOR] = versions[-1]
        self._cache.clear()
        self.durably_bad = set(self.bad_blocks)

    def after_the_cut(self) -> bytes:
        """What its media have, of all that they may have."""
        chosen, image = self._chosen, bytearray(self.durable)
        kept = chosen.choice(["nothing", "all", "some", "some"])
        for sector, versions in self._cache.items():
            place = slice(sector * SECTOR, (sector + 1) * SECTOR)
            if kept == "all":
                image[place] = versions[-1]
            elif kept == "some":
                image[place] = chosen.choice([bytes(image[place]), *versions])
        return bytes(image)
