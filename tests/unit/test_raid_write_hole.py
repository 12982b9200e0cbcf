"""The power is cut at any write or flush, and members are lost with it: the array has no hole."""

import copy
from typing import Any

import pytest

from tests.unit.volatile_member import PowerCut
from tests.unit.write_hole_world import SHAPES, World, is_cut, name


async def crashed(seed: int, cut_at: int, *, steps: int = 8, **options: Any) -> World | None:
    """A world whose power went at that step of its work; None: the work was done before."""
    failing = options.pop("failing", False)
    world = World(seed, **options)
    await world.start()
    world.power.cut_at = world.power.steps + cut_at
    cut = await is_cut(world, steps, failing=failing)
    if not cut:
        return None
    world.crash()
    return world


async def broken_after_each_loss(world: World) -> list[tuple[frozenset[int], list[int]]]:
    """For each set of members that may be lost, the blocks that are not what they should be."""
    found = []
    for lost in world.losses():
        again = copy.copy(world)
        again.lost = set(lost)
        await again.start()
        blocks = await again.broken()
        if blocks:
            found.append((lost, blocks))
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("seed", range(1))
async def test_every_block_is_what_it_should_be_after_a_crash_and_any_loss(
    shape: dict[str, Any], seed: int
) -> None:
    cut_at = 1
    while world := await crashed(seed, cut_at, **shape):
        assert await broken_after_each_loss(world) == [], f"cut at {cut_at}"
        cut_at += 1
    assert cut_at > 20


@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("seed", range(12))
async def test_crashes_one_after_the_other_with_losses_failures_and_returns_do_no_harm(
    shape: dict[str, Any], seed: int
) -> None:
    """The power goes in the middle of starts too."""
    world = World(seed, **shape)
    starts = crashes = 0
    while starts < 6:
        if not await _starts(world):
            crashes += 1
            continue
        starts += 1
        assert await world.broken() == []
        await world.accept()
        if not world.has_bad_blocks:
            for lost in world.losses():
                assert await world.same_without(lost), f"redundancy is whole: {lost}"
        world.power.cut_at = world.power.steps + world.chosen.randint(1, 90)
        crashes += await is_cut(world, 12, failing=True)
        world.crash()
        if world.chosen.random() < 0.2:
            world.lose_some_member()
    assert crashes


async def _starts(world: World) -> bool:
    started = False
    cut_at = world.chosen.choice([None, None, 1, 2, 3, 5, 8, 13])
    try:
        await world.start(cut_at=cut_at)
        started = True
    except* PowerCut:
        world.crash()
    world.power.cut_at = None
    return started


@pytest.mark.parametrize("shape", SHAPES, ids=name)
async def test_without_a_journal_there_is_a_hole(shape: dict[str, Any]) -> None:
    """The same campaign finds it: blocks that nobody was writing, and that come out as garbage."""
    garbage = 0
    for seed in range(2):
        cut_at = 1
        while world := await crashed(seed, cut_at, journal=False, **shape):
            for lost, blocks in await broken_after_each_loss(world):
                idle = set(blocks) - world.promise.since.keys()
                assert lost or not idle, "with all members there, only what was written is torn"
                garbage += len(idle)
            cut_at += 1
    assert garbage > 3
