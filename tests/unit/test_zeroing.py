"""Zeroes that keep memory where it is, and memory that is reserved ahead of what will need it.

That both hold for every representation, and any history, is the contract's
(`test_representation_contract`).
"""

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from pmblk import Command, Namespace
from pmblk.media import Media, syscalls
from pmblk.nvme.command import (
    FAST_ONLY,
    FUA,
    KEEP,
    PREALLOCATE,
    READ,
    WRITE,
    WRITE_ZEROES,
)
from pmblk.nvme.status import Status
from pmblk.zeroing import INLINE_BYTES
from tests.unit.conftest import MakeNamespace, content, discard, hold, recorded, write
from tests.unit.test_namespace import with_slow_sync

PAGE = 4096
SIZE = 16 << 20
LONG = 3 * INLINE_BYTES + 1000
KINDS = ["page-cache", "struct-page", "transient-page", "pfn", "extent"]


def keep(offset: int, length: int, flags: int = 0) -> Command:
    return Command(WRITE_ZEROES, KEEP | flags, offset, length)


def preallocate(offset: int, length: int, flags: int = 0) -> Command:
    return Command(PREALLOCATE, flags, offset, length)


def run(namespace: Namespace, command: Command) -> int:
    assert not namespace.execute((command,)), "it has to wait"
    return command.status


async def run_slowly(namespace: Namespace, command: Command) -> int:
    waiting = namespace.execute((command,))
    assert list(waiting) == [command], "it was done on the spot"
    assert not await namespace.complete(waiting)
    return command.status


def read(namespace: Namespace, offset: int, length: int) -> bytes:
    command = hold(namespace, offset, length)
    found = content(command)
    namespace.release((command,))
    return found


def assert_nothing_known_is_a_hole(media: Media) -> None:
    """A store to such a page would meet a file system that may be full: SIGBUS.

    On tmpfs the count of blocks is the count of pages with memory; lseek would call those holes
    that are reserved and not yet written.
    """
    assert bytes(media.allocation.known).count(1) * PAGE <= media.allocated_bytes()


# ---- zeroes that keep


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("punches", [True, False])
def test_what_has_memory_keeps_it_and_what_is_a_hole_stays_one(
    make_namespace: MakeNamespace, kind: str, punches: bool
) -> None:
    namespace = make_namespace(kind=kind)
    namespace.media.punches = punches
    for offset in (PAGE, 4 * PAGE):
        assert run(namespace, write(offset, b"x" * PAGE)) == 0
    allocated = namespace.media.allocated_bytes()
    assert run(namespace, keep(100, 6 * PAGE)) == 0
    assert read(namespace, 0, 8 * PAGE) == bytes(8 * PAGE)
    assert namespace.media.allocated_bytes() == allocated
    assert [namespace.media.allocation.covers(page * PAGE, 1) for page in range(1, 6)] == [
        *(True, False, False, True, False)
    ]
    assert namespace.counters.zero_bytes == 6 * PAGE


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_beside_the_range_stay(make_namespace: MakeNamespace, kind: str) -> None:
    namespace = make_namespace(kind=kind)
    run(namespace, write(0, b"x" * 3 * PAGE))
    assert run(namespace, keep(100, 2 * PAGE)) == 0
    assert read(namespace, 0, 3 * PAGE) == b"x" * 100 + bytes(2 * PAGE) + b"x" * (PAGE - 100)


def test_over_nothing_but_a_hole_there_is_nothing_to_do(make_namespace: MakeNamespace) -> None:
    namespace = make_namespace()
    allocated = namespace.media.allocated_bytes()
    assert run(namespace, keep(PAGE, 10 * PAGE)) == 0
    assert namespace.media.allocated_bytes() == allocated
    assert not namespace.media.allocation.covers(PAGE, PAGE)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_long_range_is_zeroed_in_slices_and_others_get_their_turn(
    make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    namespace = make_namespace(SIZE, kind=kind)
    await namespace.complete(namespace.execute([write(512, b"x" * LONG)]))
    await namespace.flush()
    allocated = namespace.media.allocated_bytes()
    longest: list[int] = []
    zero = namespace.representation.zero

    def watch(offset: int, length: int) -> None:
        longest.append(length)
        zero(offset, length)

    monkeypatch.setattr(namespace.representation, "zero", watch)
    turns = 0
    done = trio.Event()

    async def others() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        assert await run_slowly(namespace, keep(0, SIZE)) == 0
        done.set()
    assert max(longest) <= INLINE_BYTES
    assert turns >= len(longest) - 1 >= 2
    await namespace.flush()
    assert not any(namespace.media.path.read_bytes())
    assert namespace.media.allocated_bytes() == allocated


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [8 * PAGE, LONG])
async def test_bad_pages_are_good_again_where_they_are_zeroed_whole(
    make_namespace: MakeNamespace, kind: str, length: int
) -> None:
    namespace = make_namespace(SIZE, kind=kind)
    namespace.poison(PAGE, length - 2 * PAGE)
    command = keep(512, length)
    await namespace.complete(namespace.execute([command]))
    assert command.status == 0
    assert namespace.representation.poisoned() == []
    assert read(namespace, 0, PAGE * 8) == bytes(PAGE * 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [8 * PAGE, LONG])
async def test_half_of_a_bad_page_cannot_be_zeroed(
    make_namespace: MakeNamespace, kind: str, length: int
) -> None:
    namespace = make_namespace(SIZE, kind=kind)
    run(namespace, write(PAGE, b"x"))
    namespace.poison(0, PAGE)
    command = keep(512, length)
    await namespace.complete(namespace.execute([command]))
    assert command.status == Status.WRITE_FAULT
    assert namespace.representation.poisoned() == [0]


@pytest.mark.parametrize("kind", ["struct-page", "transient-page", "pfn", "extent"])
def test_who_reads_is_not_waited_for(make_namespace: MakeNamespace, kind: str) -> None:
    """No page changes its place: it is like any write that meets a read."""
    namespace = make_namespace(kind=kind)
    run(namespace, write(0, b"x" * PAGE))
    held = hold(namespace, 0, PAGE)
    assert run(namespace, keep(0, PAGE)) == 0
    assert content(held) == bytes(PAGE)
    namespace.release((held,))


def test_it_is_no_fast_way(make_namespace: MakeNamespace) -> None:
    namespace = make_namespace()
    run(namespace, write(0, b"kept"))
    assert run(namespace, keep(0, PAGE, FAST_ONLY)) == Status.FAST_ZERO_NOT_POSSIBLE
    assert read(namespace, 0, 4) == b"kept"


@pytest.mark.parametrize("length", [PAGE, LONG])
async def test_zeroes_that_are_to_be_durable_are(
    make_namespace: MakeNamespace, length: int
) -> None:
    namespace = make_namespace(SIZE, kind="page-cache")
    await namespace.complete(namespace.execute([write(0, b"x" * length)]))
    slow = with_slow_sync(namespace)
    slow.go_on.set()
    command = keep(0, length, FUA)
    assert await run_slowly(namespace, command) == 0
    assert slow.started == 1
    assert not any(namespace.media.path.read_bytes()[:length])


@pytest.mark.parametrize("kind", KINDS)
def test_on_persistent_memory_the_zeroes_are_written_back(
    make_namespace: MakeNamespace, kind: str
) -> None:
    namespace = make_namespace(kind=kind)
    durability = recorded(namespace.media)
    assert run(namespace, write(0, b"x" * PAGE)) == 0
    durability.taken()
    assert run(namespace, keep(0, PAGE, FUA)) == 0
    assert any(offset == 0 and length >= PAGE for offset, length in durability.taken())


# ---- memory that is reserved ahead


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [5 * PAGE, LONG])
async def test_memory_comes_under_a_range_that_keeps_what_it_holds(
    make_namespace: MakeNamespace, kind: str, length: int
) -> None:
    namespace = make_namespace(SIZE, kind=kind)
    run(namespace, write(PAGE + 5, b"kept"))
    command = preallocate(100, length)
    await namespace.complete(namespace.execute([command]))
    assert command.status == 0
    assert namespace.media.allocated_bytes() == -(-(100 + length) // PAGE) * PAGE
    assert namespace.media.allocation.covers(100, length)
    assert read(namespace, 0, 3 * PAGE) == bytes(PAGE + 5) + b"kept" + bytes(2 * PAGE - 9)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_pages_stay_bad(make_namespace: MakeNamespace, kind: str) -> None:
    namespace = make_namespace(kind=kind)
    namespace.poison(PAGE, PAGE)
    assert run(namespace, preallocate(0, 4 * PAGE)) == 0
    assert namespace.representation.poisoned() == [1]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("length", [PAGE, LONG])
async def test_a_full_file_system_is_no_capacity_and_loses_nothing(
    make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch, code: int, length: int
) -> None:
    namespace = make_namespace(SIZE)
    run(namespace, write(0, b"kept"))

    def full(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("pmblk.media.syscalls.reserve", full)
    command = preallocate(0, length) if length > PAGE else preallocate(PAGE, length)
    await namespace.complete(namespace.execute([command]))
    assert command.status == Status.CAPACITY_EXCEEDED
    assert not namespace._dispatcher.fences.standing
    assert read(namespace, 0, 4) == b"kept"
    assert_nothing_known_is_a_hole(namespace.media)


@pytest.mark.parametrize("length", [0, PAGE, SIZE])
def test_a_read_only_namespace_reserves_nothing(make_namespace: MakeNamespace, length: int) -> None:
    make_namespace(SIZE, name="other.img")
    namespace = make_namespace(SIZE)
    namespace.media.read_only = True
    assert run(namespace, preallocate(0, length)) == Status.NAMESPACE_WRITE_PROTECTED
    assert run(namespace, keep(0, length)) == Status.NAMESPACE_WRITE_PROTECTED


@pytest.mark.parametrize(
    ("offset", "length"), [(SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (2**64 - 1, 1)]
)
def test_past_the_end_is_out_of_range(
    make_namespace: MakeNamespace, offset: int, length: int
) -> None:
    namespace = make_namespace(SIZE)
    for command in (preallocate(offset, length), keep(offset, length)):
        assert run(namespace, command) == Status.LBA_OUT_OF_RANGE


async def test_after_a_failed_sync_nothing_is_reserved(make_namespace: MakeNamespace) -> None:
    namespace = make_namespace()
    slow = with_slow_sync(namespace)
    slow.error = OSError(errno.EIO, "disk")
    slow.go_on.set()
    with pytest.raises(OSError, match="flush failed"):
        await namespace.flush()
    assert run(namespace, preallocate(0, PAGE)) == Status.WRITE_FAULT


@pytest.mark.parametrize("length", [PAGE, LONG])
async def test_what_is_reserved_can_be_durable_too(
    make_namespace: MakeNamespace, length: int
) -> None:
    """Short ones as well as long ones."""
    namespace = make_namespace(SIZE)
    slow = with_slow_sync(namespace)
    slow.go_on.set()
    assert await run_slowly(namespace, preallocate(0, length, FUA)) == 0
    assert slow.started == 1


class HalfPunch:
    """Stands in for the thread of a discard, and is caught when its range is forgotten.

    It is not punched before `go_on`: there a thread can be, whatever the event loop does meanwhile.
    """

    def __init__(self, media: Media, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered = trio.Event()
        self.go_on = trio.Event()
        self._media = media
        monkeypatch.setattr(trio.to_thread, "run_sync", self._run)

    async def _run(self, punch: Callable[[int, int], None], offset: int, length: int) -> None:
        """The two halves of `Media.punch`."""
        assert punch == self._media.punch
        self._media.allocation.forget(offset, length)
        self.entered.set()
        await self.go_on.wait()
        syscalls.punch_hole(self._media._fd, offset, length)


async def begun(namespace: Namespace, command: Command, nursery: trio.Nursery) -> trio.Event:
    """Complete it in a task that has reserved its first slice and not the last; its end."""
    finished = trio.Event()

    async def complete() -> None:
        assert not await namespace.complete(namespace.execute([command]))
        finished.set()

    nursery.start_soon(complete)
    while not namespace.media.allocation.covers(0, PAGE):
        await trio.lowlevel.checkpoint()
    assert not namespace.media.allocation.covers(command.length - PAGE, PAGE)
    return finished


@pytest.mark.parametrize("kind", ["pfn", "extent"])
async def test_a_long_discard_that_comes_meanwhile_leaves_no_hole_that_counts_as_memory(
    make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The rest waits for it: what is reserved under its thread would be punched thereafter."""
    namespace = make_namespace(SIZE, kind=kind)
    half = HalfPunch(namespace.media, monkeypatch)
    reserving, discarding = preallocate(0, SIZE), discard(0, SIZE)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            finished = await begun(namespace, reserving, nursery)
            nursery.start_soon(namespace.complete, namespace.execute([discarding]))
            await half.entered.wait()
            await trio.testing.wait_all_tasks_blocked()
            assert not finished.is_set()
            half.go_on.set()
            await finished.wait()
    assert (reserving.status, discarding.status) == (0, 0)
    assert 0 < namespace.media.allocated_bytes() < SIZE, "the discard came amid it"
    assert_nothing_known_is_a_hole(namespace.media)


async def test_one_that_comes_while_a_discard_is_under_way_waits_for_it(
    make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = make_namespace(SIZE)
    run(namespace, write(0, b"x" * PAGE))
    half = HalfPunch(namespace.media, monkeypatch)
    discarding, short, reserving = discard(0, SIZE), preallocate(0, PAGE), preallocate(0, LONG)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(namespace.complete, namespace.execute([discarding]))
            await half.entered.wait()
            for command in (short, reserving):
                waiting = namespace.execute([command])
                assert list(waiting) == [command]
                nursery.start_soon(namespace.complete, waiting)
            await trio.testing.wait_all_tasks_blocked()
            assert not namespace.media.allocation.covers(0, PAGE)
            half.go_on.set()
    assert [one.status for one in (discarding, short, reserving)] == [0, 0, 0]
    assert namespace.media.allocation.covers(0, LONG)
    assert_nothing_known_is_a_hole(namespace.media)


@pytest.mark.parametrize("opcode", [READ, WRITE])
async def test_io_to_the_range_goes_on_while_it_is_reserved(
    make_namespace: MakeNamespace, opcode: int
) -> None:
    namespace = make_namespace(SIZE)

    def command(offset: int) -> Command:
        payload: Any = b"x" * PAGE if opcode == WRITE else None
        return Command(opcode, 0, offset, PAGE, payload=payload)

    inside, outside = command(LONG // PAGE * PAGE), command(SIZE - PAGE)
    async with trio.open_nursery() as nursery:
        await begun(namespace, preallocate(0, LONG), nursery)
        assert not namespace.execute([inside, outside])
    assert (inside.status, outside.status) == (0, 0)
    namespace.release((inside, outside))


async def test_a_cancelled_reservation_keeps_nobody_out(make_namespace: MakeNamespace) -> None:
    namespace = make_namespace(SIZE)
    with trio.CancelScope() as scope:
        scope.cancel()
        await namespace.complete(namespace.execute([preallocate(0, LONG)]))
    assert scope.cancelled_caught
    assert not namespace._dispatcher.fences.standing
    assert run(namespace, write(0, b"on")) == 0
