"""Memory, durability and the commands that wait; `test_front_end_contract` has the guard."""

import errno
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from pmblk import Command, Namespace
from pmblk.media.group_sync import GroupSync
from pmblk.nvme.command import (
    ALLOCATE,
    DATASET_MANAGEMENT,
    FAST_ONLY,
    FIRST_EXTENT,
    FLUSH,
    FUA,
    GET_LBA_STATUS,
    PREFETCH,
    READ,
    WRITE,
    WRITE_ZEROES,
)
from pmblk.nvme.status import Status
from tests.unit.conftest import MakeNamespace, content

SIZE = 1 << 20
EVERY_RANGED = (READ, WRITE, WRITE_ZEROES, DATASET_MANAGEMENT, GET_LBA_STATUS, PREFETCH)


def command(opcode: int, offset: int = 0, length: int = 4096, flags: int = 0) -> Command:
    payload = bytes(min(length, SIZE)) if opcode == WRITE else None
    return Command(opcode, flags, offset, length, payload=payload)


def run(namespace: Namespace, one: Command) -> int:
    assert not namespace.execute([one])
    return one.status


class SlowSync:
    """Stands in for a durability level that must sync; syncs when it is let."""

    level = "file"
    sync_blocks = True

    def __init__(self) -> None:
        self.started = 0
        self.go_on = threading.Event()
        self.error: OSError | None = None

    def sync(self) -> None:
        self.started += 1
        assert self.go_on.wait(10)
        if self.error:
            raise self.error

    def fence(self) -> None:
        pass

    def layout_changed(self) -> None:
        pass


def with_slow_sync(namespace: Namespace) -> SlowSync:
    slow = SlowSync()
    namespace.media.durability = slow  # type: ignore[assignment]
    namespace._dispatcher.sync = GroupSync(slow)  # type: ignore[arg-type]
    return slow


@pytest.mark.parametrize("opcode", EVERY_RANGED)
def test_a_command_past_the_end_takes_no_memory(make_namespace: MakeNamespace, opcode: int) -> None:
    namespace = make_namespace()
    assert run(namespace, command(opcode, SIZE - 1, 2)) == Status.LBA_OUT_OF_RANGE
    assert namespace.media.allocated_bytes() <= 4096


def test_what_a_read_only_file_holds_is_served(
    make_namespace: MakeNamespace, directory: Path
) -> None:
    (directory / "media.img").write_bytes(b"kept" + bytes(SIZE - 4))
    namespace = make_namespace(read_only=True)
    read = command(READ, 0, 4)
    assert run(namespace, read) == Status.SUCCESS
    assert content(read) == b"kept"
    namespace.release([read])


@pytest.mark.parametrize(
    ("reserve_error", "status"),
    [
        (errno.ENOSPC, Status.CAPACITY_EXCEEDED),
        (errno.EDQUOT, Status.CAPACITY_EXCEEDED),
        (errno.EIO, Status.WRITE_FAULT),
    ],
)
def test_a_write_that_cannot_reserve_fails_and_touches_nothing(
    make_namespace: MakeNamespace,
    monkeypatch: pytest.MonkeyPatch,
    reserve_error: int,
    status: Status,
) -> None:
    namespace = make_namespace()

    def refuse(*_: int) -> None:
        raise OSError(reserve_error, "no")

    monkeypatch.setattr("pmblk.media.syscalls.reserve", refuse)
    assert run(namespace, Command(WRITE, 0, 8192, 4, payload=b"data")) == status
    assert next(iter(namespace.media.allocation.extents(8192, 4096))).hole


def test_a_fast_zero_that_must_allocate_is_refused_and_changes_nothing(
    make_namespace: MakeNamespace,
) -> None:
    namespace = make_namespace()
    run(namespace, Command(WRITE, 0, 0, 4, payload=b"kept"))
    zero = command(WRITE_ZEROES, flags=FAST_ONLY | ALLOCATE)
    assert run(namespace, zero) == Status.FAST_ZERO_NOT_POSSIBLE
    assert bytes(namespace.media.view[:4]) == b"kept"
    assert run(namespace, command(WRITE_ZEROES, flags=FAST_ONLY)) == Status.SUCCESS
    assert next(iter(namespace.media.allocation.extents(0, 4096))).hole


def test_zeroing_without_holes_leaves_the_range_allocated(make_namespace: MakeNamespace) -> None:
    namespace = make_namespace()
    assert run(namespace, command(WRITE_ZEROES, 0, SIZE, ALLOCATE)) == Status.SUCCESS
    assert namespace.media.allocated_bytes() == SIZE


def test_where_no_hole_can_be_punched_zeroes_are_written_and_discard_does_nothing(
    make_namespace: MakeNamespace,
) -> None:
    namespace = make_namespace()
    namespace.media.punches = False
    run(namespace, Command(WRITE, 0, 0, 8, payload=b"12345678"))
    assert run(namespace, command(DATASET_MANAGEMENT, 0, 4)) == Status.SUCCESS
    assert run(namespace, command(WRITE_ZEROES, 4, 4)) == Status.SUCCESS
    assert bytes(namespace.media.view[:8]) == b"1234\0\0\0\0"
    assert run(namespace, command(WRITE_ZEROES, flags=FAST_ONLY)) == Status.FAST_ZERO_NOT_POSSIBLE


def test_lba_status_answers_with_one_extent_when_one_is_wanted(
    make_namespace: MakeNamespace,
) -> None:
    namespace = make_namespace()
    run(namespace, command(WRITE, 65536))
    first = command(GET_LBA_STATUS, 8192, SIZE - 8192, FIRST_EXTENT)
    run(namespace, first)
    assert first.extents is not None
    assert [(e.offset, e.length, e.hole) for e in first.extents] == [(8192, 57344, True)]


def test_a_window_is_memory_that_is_reserved(make_namespace: MakeNamespace) -> None:
    namespace = make_namespace()
    write = Command(WRITE, 0, 8192, 8192)
    for part in (b"a" * 4096, b"b" * 1000):
        window = namespace.window(write)
        assert window is not None
        assert len(window) == 8192 - write.received
        assert namespace.media.allocation.covers(8192, 8192)
        window[: len(part)] = part
        namespace.received(write, len(part))
    write.payload = b"c" * 3096  # the rest came another way
    assert run(namespace, write) == Status.SUCCESS
    expected = b"a" * 4096 + b"b" * 1000 + b"c" * 3096
    assert bytes(namespace.media.view[8192:16384]) == expected
    assert (namespace.counters.writes, namespace.counters.write_bytes) == (1, 8192)


def test_no_window_where_a_write_would_fail_or_wait(
    make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = make_namespace()
    assert namespace.window(Command(WRITE, 0, SIZE - 1, 2)) is None
    with namespace._dispatcher.fences.around(0, 4096):
        assert namespace.window(Command(WRITE, 0, 0, 4096)) is None

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("pmblk.media.syscalls.reserve", full)
    assert namespace.window(Command(WRITE, 0, 65536, 4096)) is None
    namespace.media.read_only = True
    assert namespace.window(Command(WRITE, 0, 0, 4096)) is None


def test_the_page_cache_gives_no_window(make_namespace: MakeNamespace) -> None:
    assert make_namespace(kind="page-cache").window(Command(WRITE, 0, 0, 4096)) is None


async def test_a_flush_waits_for_the_sync_of_the_media(make_namespace: MakeNamespace) -> None:
    namespace = make_namespace()
    slow = with_slow_sync(namespace)
    flush = Command(FLUSH, 0, 0, 0)
    waiting = namespace.execute([flush])
    assert list(waiting) == [flush]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(namespace.complete, waiting)
        await trio.testing.wait_all_tasks_blocked()
        assert namespace.counters.flushes == 0
        slow.go_on.set()
    assert namespace.counters.flushes == 1


async def test_all_flushes_that_wait_share_one_sync_that_starts_after_them(
    make_namespace: MakeNamespace,
) -> None:
    namespace = make_namespace()
    slow = with_slow_sync(namespace)
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(namespace.flush)
            await trio.testing.wait_all_tasks_blocked()
        slow.go_on.set()
    assert slow.started == 2, "the first had its own, the nine that came during it share one"


async def test_fua_waits_and_a_plain_write_does_not(make_namespace: MakeNamespace) -> None:
    namespace = make_namespace()
    slow = with_slow_sync(namespace)
    plain, durable = command(WRITE), command(WRITE, 4096, flags=FUA)
    assert list(namespace.execute([plain, durable])) == [durable]
    slow.go_on.set()
    await namespace.complete([durable])
    assert (durable.status, slow.started) == (0, 1)


async def test_after_a_failed_sync_every_write_and_flush_fails_and_reads_go_on(
    make_namespace: MakeNamespace,
) -> None:
    """The kernel may have called the pages clean: a later sync that succeeds proves nothing."""
    namespace = make_namespace()
    run(namespace, Command(WRITE, 0, 0, 4, payload=b"data"))
    slow = with_slow_sync(namespace)
    slow.error = OSError(errno.EIO, "disk")
    slow.go_on.set()
    with pytest.raises(OSError, match="flush failed"):
        await namespace.flush()
    slow.error = None
    with pytest.raises(OSError, match="flush failed"):
        await namespace.flush()
    assert slow.started == 1
    assert run(namespace, command(WRITE)) == Status.WRITE_FAULT
    read = command(READ, 0, 4)
    assert run(namespace, read) == Status.SUCCESS
    namespace.release([read])


class SlowPunch:
    """Lets a discard in the worker thread be caught in the middle."""

    def __init__(self, punch: Callable[[int, int], None]) -> None:
        self.entered = trio.Event()
        self.go_on = threading.Event()
        self._punch = punch
        self._token = trio.lowlevel.current_trio_token()

    def __call__(self, offset: int, length: int) -> None:
        self._token.run_sync_soon(self.entered.set)
        assert self.go_on.wait(10)
        self._punch(offset, length)


async def test_a_long_discard_fences_its_range_and_nothing_else(
    make_namespace: MakeNamespace,
) -> None:
    namespace = make_namespace(32 << 20)
    slow = SlowPunch(namespace.media.punch)
    namespace.media.punch = slow  # type: ignore[method-assign]
    inside, outside = Command(WRITE, 0, 5 << 20, 4, payload=b"late"), command(WRITE, 20 << 20)
    reader = command(READ, 5 << 20)
    discard = command(DATASET_MANAGEMENT, 4 << 20, 8 << 20)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(namespace.complete, namespace.execute([discard]))
        await slow.entered.wait()
        assert list(namespace.execute([inside, outside, reader])) == [inside, reader]
        nursery.start_soon(namespace.complete, [inside])
        await trio.testing.wait_all_tasks_blocked()
        slow.go_on.set()
    assert (discard.status, inside.status, outside.status) == (0, 0, 0)
    assert bytes(namespace.media.view[5 << 20 : (5 << 20) + 4]) == b"late"
    assert namespace.media.allocation.covers(5 << 20, 4)
    await namespace.complete([reader])
    namespace.release([reader])


async def test_a_payload_that_waits_is_the_engine_s_own(make_namespace: MakeNamespace) -> None:
    """The front end receives the next requests into the same buffer."""
    namespace = make_namespace(32 << 20)
    slow = SlowPunch(namespace.media.punch)
    namespace.media.punch = slow  # type: ignore[method-assign]
    buffer = bytearray(b"mine")
    late = Command(WRITE, 0, 0, 4, payload=memoryview(buffer))
    async with trio.open_nursery() as nursery:
        discard = command(DATASET_MANAGEMENT, 0, 8 << 20)
        nursery.start_soon(namespace.complete, namespace.execute([discard]))
        await slow.entered.wait()
        waiting = namespace.execute([late])
        buffer[:] = b"next"
        nursery.start_soon(namespace.complete, waiting)
        slow.go_on.set()
    assert bytes(namespace.media.view[:4]) == b"mine"


async def test_a_long_zeroing_that_fails_reports_and_lifts_its_fence(
    make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = make_namespace(32 << 20)

    def fail(*_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(namespace.media, "punch", fail)
    zero = command(WRITE_ZEROES, 0, 16 << 20)
    await namespace.complete(namespace.execute([zero]))
    assert zero.status == Status.CAPACITY_EXCEEDED
    assert run(namespace, command(WRITE)) == Status.SUCCESS


@pytest.mark.parametrize("kind", ["extent", "struct-page", "page-cache"])
async def test_bad_pages_in_a_long_zeroing_are_zeroed_wherever_it_begins(
    make_namespace: MakeNamespace, kind: str
) -> None:
    """It is done in slices, and a slice must not end inside a page: half of it is refused."""
    namespace = make_namespace(16 << 20, kind=kind)
    namespace.poison(4096, 12 << 20)
    zero = command(WRITE_ZEROES, 512, 14 << 20, ALLOCATE)
    await namespace.complete(namespace.execute([zero]))
    assert zero.status == Status.SUCCESS
    assert namespace.representation.poisoned() == []


def _pages(start: int, end: int) -> int:
    return (end - 1) // 4096 - start // 4096 + 1


@pytest.mark.parametrize(
    ("kind", "options", "descriptors_of"),
    [
        ("struct-page", {}, _pages),
        ("struct-page", {"compound": "2MiB"}, lambda _start, _end: 1),
        ("transient-page", {}, _pages),
        ("pfn", {}, _pages),
        ("extent", {}, lambda _start, _end: 1),
        ("extent", {"fragments": 256}, _pages),
    ],
    ids=str,
)
def test_a_write_that_arrives_in_pieces_is_described_once(
    make_namespace: MakeNamespace,
    kind: str,
    options: dict[str, Any],
    descriptors_of: Callable[[int, int], int],
) -> None:
    namespace = make_namespace(kind=kind, options=options)
    chance = random.Random(3)
    for _ in range(50):
        start = chance.randrange(20_000)
        pieces = [chance.choice((1, 4096, 9000, chance.randrange(1, 9000))) for _ in range(6)]
        before = namespace.representation.counters()
        command = Command(WRITE, 0, start, sum(pieces))
        for piece in pieces:
            window = namespace.window(command)
            assert window is not None
            window[:piece] = bytes(piece)
            namespace.received(command, piece)
        assert not namespace.execute([command])
        after = namespace.representation.counters()
        end = start + sum(pieces)
        built = after.descriptors_built - before.descriptors_built
        assert built == descriptors_of(start, end), (start, pieces)
        assert after.splits - before.splits == (built - 1 if kind == "extent" else 0)
