"""Rebuild, resync, check and repair against a model, with clients and failures around them."""

from typing import Any

import pytest
import trio
import trio.testing

from pmblk.raid.bad_blocks import BadBlocks, remembering
from pmblk.raid.layout import Place, Stripes, copies
from pmblk.raid.member import Hung
from pmblk.raid.superblock import DATA_OFFSET
from pmblk.raid.sweep import Pace, Sweep
from tests.unit.raid_world import CHUNK, SHAPES, World, name
from tests.unit.sim_member import SimMember

FAST = Pace(bytes_per_second_min=0)
REDUNDANT = [shape for shape in SHAPES if shape["level"]]
WITH_PARITY = [shape for shape in SHAPES if shape["level"] in (4, 5, 6)]


def sweep(world: World, kind: Any, **options: Any) -> Sweep:
    options.setdefault("pace", FAST)
    options.setdefault("batch_bytes", 3 * CHUNK)
    return Sweep(kind, world.array, **options)


def put_new(world: World, slot: int) -> SimMember:
    """A member full of something else in that slot, to be rebuilt."""
    new = SimMember(world.members[slot].size, world.chosen, name=f"new{slot}")
    new.content[DATA_OFFSET:] = world.chosen.randbytes(len(new.content) - DATA_OFFSET)
    world.members[slot] = new
    world.array.devices.rebuilt[slot] = 0
    world.array.devices.members[slot] = new
    return new


def lose(world: World, slot: int) -> None:
    world.members[slot].gone = True
    world.array.devices.members[slot] = None


async def check_redundancy(world: World) -> None:
    """It fits the data, and a check says so."""
    world.assert_whole()
    await check_finds_nothing(world)


async def check_finds_nothing(world: World) -> None:
    found = sweep(world, "check")
    await found.run()
    assert found.status().findings == ()


async def clients(world: World, batches: int = 25) -> None:
    for _ in range(batches):
        extents = [world.extent() for _ in range(world.chosen.choice([1, 1, 3]))]
        assert await world.write(*extents) == [None] * len(extents)
        offset, length = world.extent()
        found = await world.array.read(offset, length)
        assert bytes(found) == bytes(world.model[offset : offset + length])


@pytest.mark.parametrize("shape", REDUNDANT, ids=name)
async def test_a_rebuilt_member_is_whole_whatever_clients_wrote_meanwhile(
    shape: dict[str, Any],
) -> None:
    for seed in range(3):
        world = World(seed, **shape)
        await world.write((0, world.array.size))
        slot = world.chosen.randrange(world.geometry.members)
        lose(world, slot)
        await clients(world, 5)
        put_new(world, slot)
        work = sweep(world, "rebuild", slot=slot)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(clients, world)
            nursery.start_soon(work.run)
        assert work.position == work.end == world.geometry.member_chunks * CHUNK
        assert world.array.devices.rebuilt.pop(slot) == world.geometry.member_chunks
        await world.check()
        await check_redundancy(world)


@pytest.mark.parametrize(
    "shape", [REDUNDANT[0], REDUNDANT[2], {"level": 10, "members": 4, "layout": "far"}], ids=name
)
async def test_a_rebuild_goes_on_from_any_checkpoint(shape: dict[str, Any]) -> None:
    """Cut off after every batch, with writes of clients before the next one goes on."""
    world = World(3, **shape)
    await world.write((0, world.array.size))
    lose(world, 1)
    put_new(world, 1)
    saved = [0]
    while saved[-1] < world.geometry.member_chunks * CHUNK:
        with trio.CancelScope() as scope:

            async def checkpoint(position: int) -> None:
                saved.append(position)
                scope.cancel()  # it is done with before the next turn

            work = sweep(
                world,
                "rebuild",
                slot=1,
                position=saved[-1],
                checkpoint=checkpoint,
                checkpoint_seconds=0,
            )
            await work.run()
        await clients(world, 2)
    assert saved[:3] == [0, 3 * CHUNK, 6 * CHUNK]
    del world.array.devices.rebuilt[1]
    await check_redundancy(world)


@pytest.mark.parametrize("shape", REDUNDANT, ids=name)
async def test_who_comes_back_lacks_only_what_was_written_without_it(
    shape: dict[str, Any],
) -> None:
    world = World(4, chunks=40, **shape)
    devices = world.array.devices
    await world.write((0, world.array.size))
    slot, back = 1, world.members[1]
    devices.members[slot] = None
    ranges = [(5 * CHUNK, 4096), (11 * CHUNK + 512, 3 * CHUNK), (12 * CHUNK, CHUNK)]
    await world.write(*ranges)
    devices.rebuilt[slot] = 0
    devices.members[slot] = back
    back.writes = 0
    work = sweep(world, "rebuild", slot=slot, ranges=ranges)
    await work.run()
    assert devices.rebuilt.pop(slot) == 0
    assert back.writes < world.geometry.member_bytes / 2
    assert work.position == work.end
    await check_redundancy(world)


def data_on_members(world: World) -> list[list[Place]]:
    """Where the chunks of the array lie; the first place is the one that rules after a crash."""
    geometry = world.geometry
    if not geometry.parities:
        return [copies(geometry, chunk) for chunk in range(geometry.chunks)]
    stripes = Stripes(geometry)
    return [
        [Place(slot, row)] for row in range(geometry.member_chunks) for slot in stripes[row].data
    ]


def half_write(world: World) -> None:
    """What a crash leaves: members that have some of what was being written, and some not."""
    for places in data_on_members(world):
        if world.chosen.random() < 0.4:
            slot, chunk = world.chosen.choice(places)
            start = DATA_OFFSET + chunk * CHUNK + world.chosen.choice([0, 4096])
            world.members[slot].content[start : start + 4096] = world.chosen.randbytes(4096)


@pytest.mark.parametrize("shape", REDUNDANT, ids=name)
async def test_after_a_resync_the_redundancy_fits_what_was_read_before(
    shape: dict[str, Any],
) -> None:
    for seed in range(2):
        world = World(seed, **shape)
        await world.write((0, world.array.size))
        half_write(world)
        world.model[:] = await world.array.read(0, world.array.size)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(clients, world)
            nursery.start_soon(sweep(world, "resync").run)
        await world.check()
        await check_redundancy(world)


@pytest.mark.parametrize("shape", WITH_PARITY, ids=name)
async def test_with_a_member_missing_the_row_defines_what_it_held(shape: dict[str, Any]) -> None:
    for slot in range(3):
        world = World(7 + slot, **shape)
        await world.write((0, world.array.size))
        half_write(world)
        lose(world, slot)
        before = bytes(await world.array.read(0, world.array.size))
        await sweep(world, "resync").run()
        assert bytes(await world.array.read(0, world.array.size)) == before
        found = sweep(world, "check")
        await found.run()
        assert found.status().findings == ()


async def test_a_resync_writes_only_what_differs() -> None:
    for shape in REDUNDANT:
        world = World(8, **shape)
        await world.write((0, world.array.size))
        world.amplification()
        await sweep(world, "resync").run()
        assert world.amplification()[1] == 0
        slot = 0 if world.geometry.parities else data_on_members(world)[0][1].slot
        world.members[slot].content[DATA_OFFSET] ^= 1
        await sweep(world, "resync").run()
        assert 0 < world.amplification()[1] <= 2 * CHUNK


async def test_a_resync_only_of_ranges_leaves_the_rest_alone() -> None:
    world = World(9, level=5, members=4, chunks=30)
    await world.write((0, world.array.size))
    world.amplification()
    stripe = world.geometry.stripe_bytes
    work = sweep(world, "resync", ranges=[(2 * stripe + 7, 5), (20 * stripe, stripe)])
    await work.run()
    assert world.amplification() == (2 * 4 * CHUNK, 0)
    assert (work.position, work.end) == (world.array.size, world.array.size)


# ---- check and repair


def lie(world: World, slot: int, offset: int, length: int = 1) -> None:
    """Some bytes of a member's data area flip, and it does not say so."""
    for at in range(DATA_OFFSET + offset, DATA_OFFSET + offset + length):
        world.members[slot].content[at] ^= world.chosen.randrange(1, 256)


@pytest.mark.parametrize("shape", REDUNDANT, ids=name)
async def test_a_check_counts_a_lie_and_writes_nothing_and_a_repair_mends_it(
    shape: dict[str, Any],
) -> None:
    world = World(10, **shape)
    await world.write((0, world.array.size))
    world.amplification()
    lie(world, 1, CHUNK + 4096 + 17, 100)
    for _ in range(2):
        checked = sweep(world, "check")
        await checked.run()
        assert checked.findings.mismatched == 1
        assert checked.findings.mended == 0
        assert len(checked.status().findings) == 2
    assert world.amplification()[1] == 0
    repair = sweep(world, "repair")
    await repair.run()
    assert repair.findings.mended >= 1
    await check_finds_nothing(world)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape["level"] == 6], ids=name)
async def test_level_6_names_the_liar_and_restores_its_bytes(shape: dict[str, Any]) -> None:
    for slot in range(6):
        world = World(11, **shape)
        await world.write((0, world.array.size))
        before = bytes(world.members[slot].content)
        for row in (0, 1, 5, 8):
            lie(world, slot, row * CHUNK + 4000, 200)  # in both blocks of the chunk
        repair = sweep(world, "repair")
        await repair.run()
        total, *lines = repair.status().findings
        assert total == "8 blocks do not fit, 8 blocks made to fit"
        assert lines[0] == f"m{slot} at byte {DATA_OFFSET}: 8192 bytes are wrong"
        assert len(lines) == 4
        assert bytes(world.members[slot].content) == before
        await check_redundancy(world)


async def test_two_liars_in_different_blocks_of_a_row_are_both_named() -> None:
    world = World(12, level=6, members=6)
    await world.write((0, world.array.size))
    lie(world, 2, 10, 5)
    lie(world, 4, 5000, 5)
    repair = sweep(world, "repair")
    await repair.run()
    assert [line.split()[0] for line in repair.status().findings[1:]] == ["m2", "m4"]
    await check_redundancy(world)


async def test_two_liars_in_one_block_are_nobodys_and_parity_is_made_to_fit() -> None:
    world = World(13, level=6, members=6)
    await world.write((0, world.array.size))
    stripe = Stripes(world.geometry)[0]
    lie(world, stripe.data[0], 0, 400)
    lie(world, stripe.data[1], 200, 400)
    world.model[:] = await world.array.read(0, world.array.size)
    repair = sweep(world, "repair")
    await repair.run()
    assert repair.status().findings[1].startswith("row 0: 4096 bytes do not fit")
    await check_redundancy(world)


async def test_the_majority_of_three_copies_is_right() -> None:
    for shape in ({"level": 1, "members": 3}, {"level": 10, "members": 5, "copies": 3}):
        world = World(14, **shape)
        await world.write((0, world.array.size))
        lie(world, 0, 100)
        repair = sweep(world, "repair")
        await repair.run()
        assert repair.status().findings[1] == (
            f"m0 at byte {DATA_OFFSET}: 4096 bytes wrong, by most copies"
        )
        await world.check()
        await check_redundancy(world)


async def test_findings_are_few_lines_and_a_total() -> None:
    world = World(15, level=5, members=4, chunks=64)
    await world.write((0, world.array.size))
    for row in range(50):
        lie(world, 0, row * CHUNK)
    found = sweep(world, "check")
    await found.run()
    lines = found.status().findings
    assert lines[0] == "50 blocks do not fit"
    assert lines[-1] == "and 30 more"
    assert len(lines) == 22


# ---- what cannot be read


@pytest.mark.parametrize("kind", ["check", "repair", "resync"])
@pytest.mark.parametrize("shape", REDUNDANT, ids=name)
async def test_every_sweep_heals_what_cannot_be_read(shape: dict[str, Any], kind: Any) -> None:
    world = World(16, **shape)
    await world.write((0, world.array.size))
    world.members[0].bad_blocks = {DATA_OFFSET // 4096, DATA_OFFSET // 4096 + 9}
    work = sweep(world, kind)
    await work.run()
    assert not world.members[0].bad_blocks
    assert work.findings.healed == 2
    assert work.status().findings[1] == f"4096 bytes made up for: m0 at byte {DATA_OFFSET}"
    assert world.announced == []
    await check_redundancy(world)


async def test_a_rebuild_heals_what_it_reads() -> None:
    world = World(16, level=6, members=6)
    await world.write((0, world.array.size))
    lose(world, 1)
    put_new(world, 1)
    blocks = {row * CHUNK // 4096 for row in range(12)}
    world.members[0].bad_blocks = {DATA_OFFSET // 4096 + block for block in blocks}
    work = sweep(world, "rebuild", slot=1)
    await work.run()
    del world.array.devices.rebuilt[1]
    assert world.members[0].bad_blocks == set()
    assert work.findings.healed == 12
    assert world.announced == []
    await check_redundancy(world)


async def test_beside_a_bad_sector_a_resync_still_believes_the_data() -> None:
    world = World(16, level=6, members=6)
    await world.write((0, world.array.size))
    first, second, *_ = Stripes(world.geometry)[0].data
    lie(world, first, 0, 100)
    world.model[:] = await world.array.read(0, world.array.size)
    world.members[second].bad_blocks = {DATA_OFFSET // 4096 + 1}
    await sweep(world, "resync").run()
    await check_redundancy(world)


async def test_nobody_is_accused_in_a_block_that_had_to_be_made_up() -> None:
    world = World(16, level=6, members=6)
    await world.write((0, world.array.size))
    first, second, *_ = Stripes(world.geometry)[0].data
    lie(world, first, 0, 100)
    world.members[second].bad_blocks = {DATA_OFFSET // 4096}
    work = sweep(world, "check")
    await work.run()
    assert any(line.startswith("row 0: 4096 bytes") for line in work.status().findings)
    assert not any("are wrong" in line for line in work.status().findings)


async def test_bad_sectors_in_different_blocks_of_a_row_are_all_healed() -> None:
    world = World(17, level=5, members=4)
    await world.write((0, world.array.size))
    for slot in range(2):
        world.members[slot].bad_blocks.add(DATA_OFFSET // 4096 + slot)
    work = sweep(world, "check")
    await work.run()
    assert work.findings.healed == 2
    assert work.findings.lost == 0
    await check_redundancy(world)


@pytest.mark.parametrize("shape", REDUNDANT, ids=name)
async def test_what_a_rebuild_cannot_make_is_an_error_and_never_other_bytes(
    shape: dict[str, Any],
) -> None:
    world = World(18, **shape)
    devices = world.array.devices
    await world.write((0, world.array.size))
    lose(world, 1)
    log = await remembering(put_new(world, 1), data_offset=DATA_OFFSET)
    devices.members[1] = log
    for slot, member in enumerate(world.members):
        if slot != 1:
            member.bad_blocks.add(DATA_OFFSET // 4096 + 1)
    work = sweep(world, "rebuild", slot=1)
    await work.run()
    del devices.rebuilt[1]
    assert log.count == 1
    assert work.findings.lost
    errors = 0
    for offset in range(0, world.array.size, 4096):
        try:
            found = await world.array.read(offset, 4096)
        except OSError:
            errors += 1
        else:
            assert bytes(found) == bytes(world.model[offset : offset + 4096])
    assert errors
    await world.write((0, world.array.size))
    await world.array.flush()
    assert log.count == 0
    await check_redundancy(world)


async def test_a_rebuild_that_has_nowhere_to_say_what_is_lost_ends() -> None:
    world = World(19, level=5, members=4)
    await world.write((0, world.array.size))
    lose(world, 1)
    put_new(world, 1)
    world.members[0].bad_blocks.add(DATA_OFFSET // 4096 + 4)
    with pytest.raises(OSError, match="what was there is lost"):
        await sweep(world, "rebuild", slot=1).run()
    assert world.array.devices.rebuilt[1] == 0


# ---- members that leave


async def test_a_rebuild_ends_when_its_member_or_too_many_others_leave() -> None:
    for gone, reason in ((1, "gone"), (0, "gone")):
        world = World(20, level=5, members=4)
        await world.write((0, world.array.size))
        lose(world, 1)
        put_new(world, 1)
        world.members[gone].gone = True
        with pytest.raises(OSError, match=reason):
            await sweep(world, "rebuild", slot=1).run()
        assert world.announced == ([1] if gone == 1 else [])


async def test_a_rebuild_does_not_go_on_with_the_next_member_of_its_slot() -> None:
    world = World(20, level=5, members=4)
    await world.write((0, world.array.size))
    lose(world, 1)
    put_new(world, 1)

    async def checkpoint(_position: int) -> None:
        lose(world, 1)
        put_new(world, 1)

    with pytest.raises(OSError, match="has left"):
        await sweep(world, "rebuild", slot=1, checkpoint=checkpoint, checkpoint_seconds=0).run()
    assert world.array.devices.rebuilt[1] == 0


async def test_a_member_that_is_failed_under_a_batch_of_its_rebuild_is_not_whole() -> None:
    world = World(20, level=5, members=4)
    await world.write((0, world.array.size))
    lose(world, 1)
    put_new(world, 1)
    devices, write = world.array.devices, world.array.devices.write

    async def failed_meanwhile(batch: Any) -> Any:
        failures = await write(batch)
        await devices.fail({1: OSError("by the write of a client")})
        return failures

    devices.write = failed_meanwhile  # type: ignore[method-assign, assignment]
    with pytest.raises(OSError, match="has left"):
        await sweep(world, "rebuild", slot=1).run()
    assert 1 not in devices.rebuilt


@pytest.mark.parametrize("shape", [{"level": 5, "members": 4}, {"level": 1, "members": 2}])
async def test_a_member_that_is_failed_while_it_is_told_of_a_loss_leaves_no_trace(
    shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no ghost of it is rebuilt from then on."""
    world = World(20, **shape)
    devices = world.array.devices
    await world.write((0, world.array.size))
    lose(world, 1)
    devices.members[1] = await remembering(put_new(world, 1), data_offset=DATA_OFFSET)
    world.members[0].bad_blocks.add(DATA_OFFSET // 4096 + 1)
    lose_blocks = BadBlocks.lose

    async def failed_meanwhile(log: BadBlocks, offset: int, length: int) -> None:
        await lose_blocks(log, offset, length)
        await devices.fail({1: OSError("by the write of a client")})

    monkeypatch.setattr(BadBlocks, "lose", failed_meanwhile)
    with pytest.raises(OSError, match="has left"):
        await sweep(world, "rebuild", slot=1).run()
    assert not devices.rebuilt


@pytest.mark.parametrize("kind", ["check", "rebuild"])
@pytest.mark.parametrize(("level", "members"), [(6, 5), (1, 3)])
async def test_a_member_that_hangs_keeps_the_memory_and_the_batch_is_done_without_it(
    kind: Any, level: int, members: int
) -> None:
    world = World(20, level=level, members=members)
    await world.write((0, world.array.size))
    if kind == "rebuild":
        lose(world, 1)
        put_new(world, 1)
    devices, read = world.array.devices, world.array.devices.read
    kept: list[memoryview] = []

    async def hang(batch: Any) -> Any:
        kept.extend(request.view for request in batch[0])
        await devices.fail({0: Hung("m0", 30)})
        devices.read = read  # type: ignore[method-assign]
        raise Hung("m0", 30)

    devices.read = hang  # type: ignore[method-assign, assignment]
    work = sweep(world, kind, slot=1 if kind == "rebuild" else None)
    await work.run()
    if kind == "rebuild":
        del devices.rebuilt[1]
    assert world.announced == [0]
    assert kept
    assert not any(any(view) for view in kept), "nobody uses it again"
    await world.check()


@pytest.mark.parametrize("kind", ["check", "resync", "repair"])
async def test_a_member_that_leaves_under_a_sweep_is_failed_and_the_sweep_goes_on(
    kind: Any,
) -> None:
    for shape in REDUNDANT:
        world = World(21, **shape)
        await world.write((0, world.array.size))
        world.members[1].gone = True
        work = sweep(world, kind)
        await work.run()
        assert world.announced == [1]
        assert work.findings.mismatched == work.findings.lost == 0
        await world.check()


async def test_a_level_without_redundancy_is_read_and_its_losses_are_named() -> None:
    world = World(22, level=0, members=3)
    await world.write((0, world.array.size))
    world.members[2].bad_blocks.add(DATA_OFFSET // 4096 + 3)
    work = sweep(world, "check")
    await work.run()
    at = DATA_OFFSET + 3 * 4096
    assert work.status().findings == ("1 blocks lost", f"4096 bytes lost: m2 at byte {at}")


# ---- how it goes about it


@pytest.mark.parametrize("kind", ["check", "rebuild"])
async def test_the_memory_of_a_batch_is_bounded(kind: Any) -> None:
    for shape in REDUNDANT:
        world = World(23, chunks=40, **shape)
        await world.write((0, world.array.size))
        if kind == "rebuild":
            put_new(world, 0)
        largest = watch_reads(world)
        work = sweep(world, kind, slot=0 if kind == "rebuild" else None, batch_bytes=4 * CHUNK)
        await work.run()
        assert 0 < max(largest) <= 4 * CHUNK * world.geometry.copies


def watch_reads(world: World) -> list[int]:
    """Bytes that one member was asked for in one round."""
    largest: list[int] = []
    read = world.array.devices.read

    async def watched(batch: Any) -> Any:
        largest.extend(sum(len(one.view) for one in requests) for requests in batch.values())
        return await read(batch)

    world.array.devices.read = watched  # type: ignore[method-assign, assignment]
    return largest


async def test_a_sweep_is_as_fast_as_it_may_be_and_slower_while_clients_are_busy(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World(24, level=5, members=4, chunks=60)
    pace = Pace(bytes_per_second_max=30 * CHUNK, bytes_per_second_min=3 * CHUNK)
    work = sweep(world, "rebuild", slot=2, pace=pace)
    await run_timed(work, 2)
    assert work.status().bytes_per_second == pytest.approx(30 * CHUNK)
    slow = sweep(world, "rebuild", slot=2, pace=pace)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_again_and_again, world)
        await run_timed(slow, 20)
        assert slow.status().bytes_per_second == pytest.approx(3 * CHUNK)
        nursery.cancel_scope.cancel()


async def run_timed(work: Sweep, seconds: float) -> None:
    started = trio.current_time()
    await work.run()
    assert trio.current_time() - started == pytest.approx(seconds)


async def read_again_and_again(world: World) -> None:
    while True:
        await world.array.read(0, 4096)
        await trio.sleep(0.05)


async def test_a_checkpoint_comes_after_a_flush_now_and_then_and_at_the_end(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World(25, level=5, members=4, chunks=60)
    saved: list[tuple[int, int]] = []

    async def checkpoint(position: int) -> None:
        saved.append((position, world.members[0].flushes))

    pace = Pace(bytes_per_second_max=3 * CHUNK)
    await sweep(world, "rebuild", slot=1, pace=pace, checkpoint=checkpoint).run()
    assert [position // CHUNK for position, _ in saved] == [24, 48, 60]
    assert [flushes for _, flushes in saved] == [1, 2, 3]


async def test_a_batch_waits_for_the_client_that_has_a_row_of_it() -> None:
    for shape in REDUNDANT:
        world = World(26, **shape)
        work = sweep(world, "check")
        async with trio.open_nursery() as nursery, world.array.locks.hold((1,)):
            nursery.start_soon(work.run)
            await trio.testing.wait_all_tasks_blocked()
            assert work.position == 0
        assert work.position == work.end
