"""Intents against a simulated bitmap on media: no region is ever half written without its bit."""

import contextlib
import errno
import random

import pytest
import trio
import trio.testing

from pmblk.raid import bitmap
from pmblk.raid.array import Array
from pmblk.raid.bitmap import BLOCK_BYTES, REGIONS_PER_BLOCK
from pmblk.raid.geometry import Geometry
from pmblk.raid.intents import Intents
from pmblk.raid.superblock import BITMAP_BYTES
from tests.unit.sim_member import SimMember

UNIT = 1 << 20
REGIONS = REGIONS_PER_BLOCK + 40  # two blocks


class Media:
    """One member's bitmap. While a store runs, the media may have the old bytes or the new ones."""

    def __init__(self, size: int = REGIONS * UNIT) -> None:
        self.durable = bytes(BITMAP_BYTES)
        self.coming: bytes | None = None
        self.stores = 0
        self.fails = False
        self.gate: trio.Event | None = None
        self.intents = Intents(size=size, region_bytes=UNIT, store=self.store)

    async def store(self, offset: int, view: memoryview) -> None:
        assert self.coming is None, "stores take turns"
        assert offset % BLOCK_BYTES == len(view) % BLOCK_BYTES == 0
        self.stores += 1
        content = bytearray(self.durable)
        content[offset : offset + len(view)] = view
        self.coming = bytes(content)
        try:
            await trio.lowlevel.checkpoint()
            if self.gate is not None:
                await self.gate.wait()
            if self.fails:
                raise OSError(errno.EIO, "refused")
            self.durable = self.coming
        finally:
            self.coming = None

    def marked(self) -> set[int]:
        """What a crash now leaves marked, whatever of a store has arrived."""
        images = [self.durable, *([self.coming] if self.coming is not None else [])]
        found = [bitmap.union([one], regions=REGIONS, region_bytes=UNIT) for one in images]
        return {region for region in _some() if all(marks[region] for marks in found)}


def _some() -> list[int]:
    """A few regions at the edges of the two blocks, so that they meet."""
    return [0, 1, 2, REGIONS_PER_BLOCK - 1, REGIONS_PER_BLOCK, REGIONS - 1]


def of(*regions: int) -> list[tuple[int, int]]:
    return [(region * UNIT + 4096, 4096) for region in regions]


async def nothing() -> None:
    await trio.lowlevel.checkpoint()


async def write(media: Media, *regions: int) -> None:
    async with media.intents.writing(of(*regions)):
        assert media.marked() >= set(regions)


async def test_a_region_is_marked_before_it_is_written_and_only_once() -> None:
    media = Media()
    for _ in range(3):
        await write(media, 0, 1)
    assert media.stores == 1
    assert media.intents.dirty_ranges() == [(0, 2 * UNIT)]


async def test_whoever_writes_where_all_is_marked_does_not_wait_for_anything() -> None:
    media = Media()
    await write(media, 0)
    again = media.intents.writing(of(0))
    with pytest.raises(StopIteration):  # it returns at once
        again.__aenter__().send(None)
    await again.__aexit__(None, None, None)


async def test_writers_of_the_same_new_region_wait_for_one_store() -> None:
    media = Media()
    media.gate = trio.Event()
    inside: list[int] = []

    async def one(region: int) -> None:
        async with media.intents.writing(of(region)):
            inside.append(region)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, 0)
        await trio.testing.wait_all_tasks_blocked()
        for region in (0, 1, 2, 1, 0, REGIONS - 1):
            nursery.start_soon(one, region)
        await trio.testing.wait_all_tasks_blocked()
        assert inside == []
        media.gate.set()
    assert sorted(inside) == [0, 0, 0, 1, 1, 2, REGIONS - 1]
    assert media.stores == 2, "the first, and one for all who came meanwhile"


async def test_a_store_that_fails_lets_nobody_in_and_the_next_one_tries_again() -> None:
    media = Media()
    media.fails = True
    for _ in range(2):
        with pytest.raises(OSError, match="refused"):
            await write(media, 2)
    assert media.stores == 2
    media.fails = False
    await write(media, 2)


async def test_idle_regions_are_cleared_after_a_flush() -> None:
    media = Media()
    await write(media, 0, 1)
    flushes: list[set[int]] = []

    async def flush() -> None:
        await trio.lowlevel.checkpoint()
        flushes.append(media.marked())

    await media.intents.clear_idle(flush)
    assert flushes == [], "both were written since the last look"
    await write(media, 1)
    await media.intents.clear_idle(flush)
    assert flushes == [{0, 1}]
    assert media.marked() == {1}
    await media.intents.clear_idle(flush)
    assert media.marked() == set()
    assert media.intents.dirty_ranges() == []


async def test_nothing_is_cleared_when_the_flush_fails() -> None:
    media = Media()
    await write(media, 0)
    await media.intents.clear_idle(nothing)

    async def flush() -> None:
        raise OSError(errno.EIO, "no flush")

    for _ in range(2):
        with pytest.raises(OSError, match="no flush"):
            await media.intents.clear_idle(flush)
    await media.intents.cleaned(0, media.intents.size)
    assert media.marked() == {0}


async def test_nothing_is_cleared_while_marks_are_kept() -> None:
    media = Media()
    await write(media, 0)
    media.intents.keeping = True
    for _ in range(3):
        await media.intents.clear_idle(nothing)
        await media.intents.cleaned(0, media.intents.size)
    assert media.marked() == {0}
    media.intents.keeping = False
    await media.intents.clear_idle(nothing)
    assert media.marked() == set()


@pytest.mark.parametrize("stays", [False, True])
async def test_a_write_between_the_flush_and_the_clearing_store_is_safe(stays: bool) -> None:
    media = Media()
    await write(media, 0, 1)
    await media.intents.clear_idle(nothing)
    held = contextlib.AsyncExitStack()

    async def flush() -> None:
        await held.enter_async_context(media.intents.writing(of(0)))
        if not stays:
            await held.aclose()

    async with held:
        await media.intents.clear_idle(flush)
        assert media.marked() == {0}


async def test_a_write_that_comes_while_its_mark_is_taken_back_marks_anew() -> None:
    media = Media()
    await write(media, 0, 1)
    await media.intents.clear_idle(nothing)
    media.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(media.intents.clear_idle, nothing)
        await trio.testing.wait_all_tasks_blocked()
        assert media.coming is not None
        nursery.start_soon(write, media, 0)  # which checks that it is marked
        await trio.testing.wait_all_tasks_blocked()
        media.gate.set()
    assert media.marked() == {0}


async def test_what_was_found_marked_stays_until_it_is_cleaned() -> None:
    media = Media()
    await write(media, 0, 2, REGIONS - 1)
    after = Media()
    after.durable = media.durable
    after.intents.load([media.durable])
    for _ in range(3):
        await after.intents.clear_idle(nothing)
    assert after.marked() == {0, 2, REGIONS - 1}
    await after.intents.cleaned(4096, 3 * UNIT - 4096)
    assert after.marked() == {0, REGIONS - 1}, "region 0 is not wholly within"
    await after.intents.cleaned(3 * UNIT, after.intents.size - 3 * UNIT)
    await after.intents.cleaned(0, UNIT)
    assert after.marked() == set()


async def test_a_mark_that_was_found_is_stored_again_before_it_is_relied_on() -> None:
    """It may be on one member only, and go with it."""
    media = Media()
    media.durable = bitmap.AREA_ALL_SET
    media.intents.load([media.durable])
    await write(media, 0)
    assert media.stores == 1
    assert media.marked() == set(_some())


async def test_what_a_client_writes_is_not_cleaned_away() -> None:
    media = Media()
    async with media.intents.writing(of(0)):
        await media.intents.cleaned(0, media.intents.size)
        assert media.marked() == {0}
    await media.intents.cleaned(0, media.intents.size)
    assert media.marked() == {0}, "it is not flushed"
    await media.intents.clear_idle(nothing)
    await media.intents.clear_idle(nothing)
    assert media.marked() == set()


async def test_what_is_being_flushed_is_not_cleaned_away_before_it_is() -> None:
    media = Media()
    await write(media, 0)
    await media.intents.clear_idle(nothing)

    async def flush() -> None:
        await media.intents.cleaned(0, UNIT)
        assert media.marked() == {0}

    await media.intents.clear_idle(flush)
    assert media.marked() == set()


async def test_a_write_that_fails_leaves_its_regions_in_doubt() -> None:
    media = Media()
    with pytest.raises(ValueError, match="oops"):
        async with media.intents.writing(of(0)):
            raise ValueError("oops")
    await write(media, 1)
    media.intents.doubt(of(1))
    for _ in range(3):
        await media.intents.clear_idle(nothing)
    assert media.marked() == {0, 1}
    await media.intents.cleaned(0, 2 * UNIT)
    await media.intents.clear_idle(nothing)
    assert media.marked() == {0, 1}, "the resync may have passed before: the next start looks again"
    assert media.intents.has_failed
    assert media.intents.has_doubts


async def test_all_can_be_marked() -> None:
    media = Media()
    await media.intents.mark_all()
    assert media.marked() == set(_some())
    assert media.stores == 1
    assert media.intents.dirty_ranges() == [(0, media.intents.size)]


async def test_an_array_doubts_what_it_could_not_write() -> None:
    media = Media(size=8192 * 12)
    geometry = Geometry(level=0, members=2, member_bytes=8192 * 6, chunk_bytes=8192)
    members = [SimMember(8192 * 6, random.Random(1)) for _ in range(2)]

    async def announce(_slot: int, _error: OSError) -> None:
        raise AssertionError("level 0 cannot be without a member")

    array = Array(geometry, members, data_offset=0, announce=announce, intents=media.intents)
    members[0].refuses_writes = True
    (error,) = await array.write([(0, memoryview(bytes(4096)))])
    assert error is not None
    for _ in range(3):
        await media.intents.clear_idle(nothing)
    assert media.intents.dirty_ranges() == [(0, array.size)]


# ---- any history


class History:
    """Tasks at random; at each step every region that may be half written has its bit."""

    def __init__(self, seed: int) -> None:
        self.chosen = random.Random(seed)
        self.media = Media()
        self.volatile: dict[int, int] = {}  # region: writes of it that no flush has covered
        self.done: list[list[int]] = []
        self.checks = 0

    def check(self) -> None:
        self.checks += 1
        assert self.media.marked() >= {one for one, count in self.volatile.items() if count}

    async def pause(self) -> None:
        for _ in range(self.chosen.randrange(4)):
            await trio.lowlevel.checkpoint()
            self.check()

    async def writer(self) -> None:
        for _ in range(12):
            regions = self.chosen.sample(_some(), self.chosen.choice([1, 1, 2, 3]))
            try:
                async with self.media.intents.writing(of(*regions)):
                    for region in regions:
                        self.volatile[region] = self.volatile.get(region, 0) + 1
                    self.check()
                    await self.pause()
            except OSError:
                continue
            self.done.append(regions)
            await self.pause()

    async def flush(self) -> None:
        covered, self.done = self.done, []
        await self.pause()
        if self.chosen.random() < 0.2:
            self.done += covered
            raise OSError(errno.EIO, "no flush")
        for regions in covered:
            for region in regions:
                self.volatile[region] -= 1

    async def clearer(self) -> None:
        for _ in range(25):
            try:
                await self.media.intents.clear_idle(self.flush)
                await self.media.intents.cleaned(self.chosen.choice(_some()) * UNIT, 3 * UNIT)
            except OSError:
                pass
            self.check()
            self.media.fails = self.chosen.random() < 0.15
            await self.pause()
        self.media.fails = False

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(self.writer)
            nursery.start_soon(self.clearer)


@pytest.mark.parametrize("seed", range(30))
async def test_no_region_is_ever_half_written_without_its_mark(seed: int) -> None:
    history = History(seed)
    await history.run()
    assert history.checks > 100
