"""A page that somebody holds is not given back: a discard waits for it, where the kind says so.

`page-cache` holds copies, so its discards go on; `pfn` without a lock lets them go on too, and that
is the race that `tests/e2e/test_pfn_race.py` shows.
"""

import errno
from typing import Any

import pytest
import trio
import trio.testing

from pmblk import Command, Namespace
from pmblk.nvme.command import ALLOCATE, READ, WRITE_ZEROES
from pmblk.nvme.status import Status
from tests.unit.conftest import MakeNamespace, content, discard, hold, write

PAGE = 4096
SIZE = 4 << 20
PAGE_KINDS: list[tuple[str, dict[str, Any]]] = [
    ("struct-page", {}),
    ("transient-page", {}),
    ("pfn", {"locking": "range"}),
]
COARSE_KINDS: list[tuple[str, dict[str, Any]]] = [
    ("struct-page", {"compound": "2MiB"}),
    ("extent", {}),
    ("extent", {"fragments": 2}),
]
BY_PAGES = pytest.mark.parametrize(("kind", "options"), PAGE_KINDS, ids=str)
WITH_LIFETIME = pytest.mark.parametrize(("kind", "options"), PAGE_KINDS + COARSE_KINDS, ids=str)


def filled(make_namespace: MakeNamespace, kind: str, options: dict[str, Any]) -> Namespace:
    namespace = make_namespace(SIZE, kind=kind, options=options)
    assert not namespace.execute([write(0, b"x" * SIZE)])
    return namespace


def is_hole(namespace: Namespace, offset: int, length: int) -> bool:
    return all(extent.hole for extent in namespace.media.allocation.extents(offset, length))


@WITH_LIFETIME
async def test_a_discard_waits_for_the_lease_and_the_bytes_stay(
    make_namespace: MakeNamespace, kind: str, options: dict[str, Any]
) -> None:
    namespace = filled(make_namespace, kind, options)
    held, gone = hold(namespace, 100, 2 * PAGE), discard(0, 2 * PAGE)
    assert list(namespace.execute([gone])) == [gone]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(namespace.complete, [gone])
        await trio.testing.wait_all_tasks_blocked()
        assert namespace.starved == 1
        assert content(held) == b"x" * 2 * PAGE
        assert namespace.counters.deallocations == 0
        namespace.release([held])
    assert gone.status == 0
    assert is_hole(namespace, 0, 2 * PAGE)


@pytest.mark.parametrize(("kind", "options"), [("page-cache", {}), ("pfn", {"locking": "none"})])
def test_a_discard_does_not_wait_where_no_page_is_held(
    make_namespace: MakeNamespace, kind: str, options: dict[str, Any]
) -> None:
    namespace = filled(make_namespace, kind, options)
    held, again = hold(namespace, 0, PAGE), Command(READ, 0, 0, PAGE)
    assert not namespace.execute([discard(0, PAGE), again])
    assert is_hole(namespace, 0, PAGE)
    assert content(again) == bytes(PAGE)
    assert content(held) == (b"x" * PAGE if kind == "page-cache" else bytes(PAGE))
    namespace.release([held])


@BY_PAGES
def test_a_lease_on_other_pages_does_not_hold_a_discard_up(
    make_namespace: MakeNamespace, kind: str, options: dict[str, Any]
) -> None:
    namespace = filled(make_namespace, kind, options)
    held = [hold(namespace, 0, PAGE), hold(namespace, 3 * PAGE, PAGE)]
    assert not namespace.execute([discard(PAGE, 2 * PAGE)])
    assert is_hole(namespace, PAGE, 2 * PAGE)
    namespace.release(held)


@pytest.mark.parametrize(("kind", "options"), [COARSE_KINDS[0], COARSE_KINDS[2]], ids=str)
def test_a_lease_on_another_2_mib_does_not_hold_a_discard_up(
    make_namespace: MakeNamespace, kind: str, options: dict[str, Any]
) -> None:
    namespace = filled(make_namespace, kind, options)
    held = hold(namespace, 2 << 20, PAGE)
    inside, apart = discard(3 << 20, PAGE), discard((2 << 20) - PAGE, PAGE)
    assert list(namespace.execute([apart, inside])) == [inside]
    namespace.release([held])


@WITH_LIFETIME
def test_zeroes_that_leave_no_hole_wait_for_nobody(
    make_namespace: MakeNamespace, kind: str, options: dict[str, Any]
) -> None:
    namespace = filled(make_namespace, kind, options)
    held = hold(namespace, 0, PAGE)
    assert not namespace.execute([Command(WRITE_ZEROES, ALLOCATE, 0, PAGE)])
    assert content(held) == bytes(PAGE)
    namespace.release([held])


@BY_PAGES
async def test_commands_to_a_range_that_is_to_go_wait_and_others_do_not(
    make_namespace: MakeNamespace, kind: str, options: dict[str, Any]
) -> None:
    namespace = filled(make_namespace, kind, options)
    held, gone = hold(namespace, 0, 4 * PAGE), discard(0, 4 * PAGE)
    inside = [Command(READ, 0, PAGE, PAGE), write(2 * PAGE, b"after")]
    outside = [Command(READ, 0, 4 * PAGE, PAGE), write(5 * PAGE, b"beside")]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(namespace.complete, namespace.execute([gone]))
        await trio.testing.wait_all_tasks_blocked()
        assert list(namespace.execute([*inside, *outside])) == inside
        nursery.start_soon(namespace.complete, inside[:1])
        nursery.start_soon(namespace.complete, inside[1:])
        await trio.testing.wait_all_tasks_blocked()
        assert namespace.counters.reads == 2
        namespace.release([held, *outside])
    assert content(inside[0]) == bytes(PAGE)
    namespace.release(inside)
    assert bytes(namespace.media.view[2 * PAGE : 2 * PAGE + 6]) == b"after\0"


@WITH_LIFETIME
async def test_a_batch_that_reads_and_discards_one_range_does_not_wait_for_itself(
    make_namespace: MakeNamespace, kind: str, options: dict[str, Any]
) -> None:
    """`complete` comes back with what is finished, so that its caller can give it back."""
    namespace = filled(make_namespace, kind, options)
    other, first = hold(namespace, 0, PAGE), discard(0, PAGE)
    batch = [Command(READ, 0, 0, 2 * PAGE), discard(0, 2 * PAGE), Command(READ, 0, 0, PAGE)]
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(namespace.complete, namespace.execute([first]))
            await trio.testing.wait_all_tasks_blocked()
            waiting = namespace.execute(batch)
            assert list(waiting) == batch
            namespace.release([other])
            rest = await namespace.complete(waiting)
            assert list(rest) == batch[1:]
            assert content(batch[0]) == bytes(PAGE) + b"x" * PAGE
            namespace.release(batch[:1])
            while rest:
                rest = await namespace.complete(rest)
    assert [command.status for command in batch] == [0, 0, 0]
    assert content(batch[2]) == bytes(PAGE)
    namespace.release(batch)
    assert namespace.representation.leases == 0


@WITH_LIFETIME
@pytest.mark.parametrize("offset", [0, 100])
async def test_steady_reads_do_not_starve_a_discard(
    make_namespace: MakeNamespace, kind: str, options: dict[str, Any], offset: int
) -> None:
    """Each reader asks anew before the other has given back, so the first page is always held.

    Not even where the discard begins behind what they read, inside the page that they hold.
    """
    namespace = filled(make_namespace, kind, options)
    gone = discard(offset, 3 * PAGE)
    held = hold(namespace, 0, 100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(namespace.complete, namespace.execute([gone]))
        await trio.testing.wait_all_tasks_blocked()
        following = Command(READ, 0, 0, 100)
        assert list(namespace.execute([following])) == [following]
        namespace.release([held])
        await namespace.complete([following])
        assert namespace.counters.deallocations == 1
        namespace.release([following])
    assert is_hole(namespace, PAGE, 2 * PAGE)


@WITH_LIFETIME
async def test_two_discards_of_what_one_reader_holds_both_come_to_an_end(
    make_namespace: MakeNamespace, kind: str, options: dict[str, Any]
) -> None:
    namespace = filled(make_namespace, kind, options)
    held = hold(namespace, 0, 8 * PAGE)
    gone = [discard(0, 4 * PAGE), discard(2 * PAGE, 6 * PAGE), discard(0, SIZE)]
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for one in gone:
                nursery.start_soon(namespace.complete, namespace.execute([one]))
            await trio.testing.wait_all_tasks_blocked()
            namespace.release([held])
    assert [one.status for one in gone] == [0, 0, 0]
    assert is_hole(namespace, 0, SIZE)


# ---- a discard that does not come about


@pytest.mark.parametrize("length", [64 << 10, 8 << 20])
async def test_a_punch_that_is_refused_loses_nothing_and_heals_nothing(
    make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """Short ones are punched on the spot, long ones in a thread."""
    namespace = make_namespace(16 << 20, kind="page-cache")
    assert not namespace.execute([write(0, b"b" * PAGE)])
    namespace.poison(2 * PAGE, PAGE)

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "immutable")

    monkeypatch.setattr(namespace.media, "punch", refuse)
    command = discard(0, length)
    await namespace.complete(namespace.execute([command]))
    assert command.status == Status.WRITE_FAULT
    read = hold(namespace, 0, PAGE)
    assert content(read) == b"b" * PAGE
    namespace.release([read])
    assert namespace.representation.poisoned() == [2]


@pytest.mark.parametrize("kind", ["page-cache", "struct-page", "pfn", "extent"])
async def test_a_long_discard_whose_client_is_gone_loses_nothing_and_heals_nothing(
    make_namespace: MakeNamespace, kind: str
) -> None:
    namespace = make_namespace(16 << 20, kind=kind)
    assert not namespace.execute([write(0, b"b" * PAGE)])
    namespace.poison(2 * PAGE, PAGE)
    with trio.CancelScope() as scope:
        scope.cancel()
        await namespace.complete(namespace.execute([discard(0, 8 << 20)]))
    assert scope.cancelled_caught
    read = hold(namespace, 0, PAGE)
    assert content(read) == b"b" * PAGE
    namespace.release([read])
    assert namespace.representation.poisoned() == [2]
    await namespace.flush()
    assert namespace.media.path.read_bytes()[:PAGE] == b"b" * PAGE


async def test_zeroes_that_cannot_be_stored_lose_nothing(
    make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = make_namespace(kind="page-cache")
    assert not namespace.execute([write(0, b"b" * PAGE)])

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "disk")

    monkeypatch.setattr(namespace.media, "fill_with_zeroes", refuse)
    command = Command(WRITE_ZEROES, ALLOCATE, 0, PAGE)
    assert not namespace.execute([command])
    assert command.status == Status.WRITE_FAULT
    read = hold(namespace, 0, PAGE)
    assert content(read) == b"b" * PAGE
    namespace.release([read])
