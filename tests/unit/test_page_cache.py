import msgspec
import pytest
import trio
import trio.testing

from pmblk import Command
from pmblk.nvme.command import DATASET_MANAGEMENT, FLUSH, FUA, READ, WRITE
from pmblk.nvme.status import Status
from pmblk.representations import parse_options
from pmblk.representations.page_cache import PageCacheRepresentation
from tests.unit.conftest import MakeNamespace, content

PAGE = 4096
ARENA = {"arena": "1MiB"}  # 256 frames


def write(offset: int, payload: bytes, flags: int = 0) -> Command:
    return Command(WRITE, flags, offset, len(payload), payload=payload)


def cache_of(namespace: object) -> PageCacheRepresentation:
    cache = namespace.representation  # type: ignore[attr-defined]
    assert isinstance(cache, PageCacheRepresentation)
    return cache


@pytest.mark.parametrize("arena", ["4KiB", "1000000", "x", 0])
def test_an_arena_that_cannot_be_is_refused(make_namespace: MakeNamespace, arena: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        make_namespace(kind="page-cache", options={"arena": arena})


def test_an_unknown_option_is_refused(make_namespace: MakeNamespace) -> None:
    with pytest.raises(msgspec.ValidationError, match="frames"):
        parse_options("page-cache", {"frames": 3})


def test_a_write_stays_in_its_frame_until_a_flush(make_namespace: MakeNamespace) -> None:
    namespace = make_namespace(kind="page-cache", options=ARENA)
    assert not namespace.execute([write(0, b"a" * PAGE)])
    assert bytes(namespace.media.view[:1]) == b"\0"
    cache_of(namespace).write_back(0, PAGE)
    assert bytes(namespace.media.view[:PAGE]) == b"a" * PAGE
    assert not cache_of(namespace).dirty()


def test_fua_writes_its_own_pages_back_and_no_others(make_namespace: MakeNamespace) -> None:
    namespace = make_namespace(kind="page-cache", options=ARENA)
    namespace.execute([write(0, b"a" * PAGE), write(PAGE, b"b" * PAGE, FUA)])
    assert bytes(namespace.media.view[: 2 * PAGE]) == bytes(PAGE) + b"b" * PAGE


def test_a_full_arena_evicts_and_writes_back(make_namespace: MakeNamespace) -> None:
    namespace = make_namespace(4 << 20, kind="page-cache", options=ARENA)
    for page in range(1024):
        assert not namespace.execute([write(page * PAGE, page.to_bytes(2, "big") * 2048)])
    cache = cache_of(namespace)
    assert cache.counters().cache_write_backs >= 1024 - 256
    read = Command(READ, 0, 0, PAGE)
    namespace.execute([read])
    assert content(read) == bytes(PAGE)  # page 0 holds zeroes
    namespace.release([read])


def test_bytes_are_copied_once_each_way(make_namespace: MakeNamespace) -> None:
    namespace = make_namespace(kind="page-cache", options=ARENA)
    cache = cache_of(namespace)
    namespace.execute([write(0, b"a" * 8 * PAGE)])
    assert cache.counters().bytes_copied == 8 * PAGE, "in"
    cache.write_back(0, 8 * PAGE)
    assert cache.counters().bytes_copied == 16 * PAGE, "write-back"
    read = Command(READ, 0, 0, 8 * PAGE)
    namespace.execute([read])
    namespace.release([read])
    assert cache.counters().bytes_copied == 16 * PAGE, "a hit copies nothing"


async def test_when_every_frame_is_held_an_io_waits_and_then_goes_on(
    make_namespace: MakeNamespace,
) -> None:
    namespace = make_namespace(4 << 20, kind="page-cache", options=ARENA)
    for piece in range(4):
        namespace.execute([write(piece << 20 | part << 16, b"x" * 65536) for part in range(16)])
    held = [Command(READ, 0, part << 18, 1 << 18) for part in range(4)]
    assert not namespace.execute(held)
    late = write(2 << 20, b"y" * PAGE)
    assert list(namespace.execute([late])) == [late]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(namespace.complete, [late])
        await trio.testing.wait_all_tasks_blocked()
        assert namespace.starved == 1
        namespace.release(held[:1])
    read = Command(READ, 0, 2 << 20, PAGE)
    namespace.release(held[1:])
    namespace.execute([read])
    assert content(read) == b"y" * PAGE
    namespace.release([read])


async def test_one_client_may_ask_for_more_than_the_arena_at_once(
    make_namespace: MakeNamespace,
) -> None:
    """Nobody waits for memory while holding memory: each turn answers what it can."""
    namespace = make_namespace(8 << 20, kind="page-cache", options=ARENA)
    namespace.media.reserve(0, 8 << 20)
    reads = [Command(READ, 0, part << 18, 1 << 18) for part in range(32)]
    waiting = namespace.execute(reads)
    assert 0 < len(waiting) < 32
    namespace.release(reads)
    with trio.fail_after(5):
        while waiting:
            rest = await namespace.complete(waiting)
            assert len(rest) < len(waiting)
            finished = waiting[: len(waiting) - len(rest)]
            assert all(len(content(read)) == 1 << 18 for read in finished)
            namespace.release(finished)
            waiting = rest
    assert namespace.counters.reads == 32
    assert cache_of(namespace).leases == 0


async def test_the_pieces_of_a_large_write_wait_for_fences_and_for_health(
    make_namespace: MakeNamespace,
) -> None:
    namespace = make_namespace(8 << 20, kind="page-cache", options=ARENA)
    namespace.media.reserve(0, 8 << 20)
    pins = [Command(READ, 0, 6 << 20 | part << 18, 1 << 18) for part in range(4)]
    namespace.execute(pins)
    large = write(0, b"B" * (2 << 20))
    waiting = namespace.execute([large])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(namespace.complete, waiting)
        await trio.testing.wait_all_tasks_blocked()
        with namespace._dispatcher.fences.around(0, 8 << 20):
            namespace.release(pins)
            await trio.testing.wait_all_tasks_blocked()
            assert not cache_of(namespace).dirty(), "nothing is stored below a fence"
            namespace._dispatcher.sync.failure = OSError(5, "disk")
    assert large.status == Status.WRITE_FAULT


async def test_an_io_larger_than_the_arena_goes_through_in_pieces(
    make_namespace: MakeNamespace,
) -> None:
    namespace = make_namespace(8 << 20, kind="page-cache", options=ARENA)
    payload = bytes(range(256)) * (4 << 12)
    large = write(4096, payload)
    await namespace.complete(namespace.execute([large]))
    read = Command(READ, 0, 4096, len(payload))
    await namespace.complete(namespace.execute([read]))
    assert content(read) == payload
    namespace.release([read])
    assert cache_of(namespace).leases == 0


def test_a_discarded_page_keeps_its_bytes_for_who_holds_it(make_namespace: MakeNamespace) -> None:
    namespace = make_namespace(kind="page-cache", options=ARENA)
    namespace.execute([write(0, b"a" * PAGE)])
    read = Command(READ, 0, 0, PAGE)
    namespace.execute([read])
    namespace.execute([Command(DATASET_MANAGEMENT, 0, 0, PAGE)])
    namespace.execute([write(0, b"b" * PAGE)])
    assert content(read) == b"a" * PAGE
    namespace.release([read])
    cache = cache_of(namespace)
    assert sorted(cache._free + list(cache._frame_of.values())) == list(range(256))


async def test_media_that_refuse_a_store_lose_nothing_and_leak_nothing(
    make_namespace: MakeNamespace,
) -> None:
    namespace = make_namespace(4 << 20, kind="page-cache", options=ARENA)
    namespace.media.reserve(0, 4 << 20)
    cache, store = cache_of(namespace), namespace.media.store
    for page in range(256):
        assert not namespace.execute([write(page * PAGE, bytes([page]) * PAGE)])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    namespace.media.store = full
    evicting = [write(1 << 20, b"n" * PAGE), Command(READ, 0, 2 << 20, 2 * PAGE)]
    evicting.append(write((1 << 20) + 100, b"n" * PAGE))
    flush = Command(FLUSH, 0, 0, 0)
    await namespace.complete(namespace.execute([*evicting, flush]))
    assert [command.status for command in evicting] == [Status.CAPACITY_EXCEEDED] * 3
    assert flush.status == Status.CAPACITY_EXCEEDED
    assert not cache._table.refcounts.any()
    namespace.media.store = store
    await namespace.flush()
    assert all(namespace.media.view[page * PAGE] == page for page in range(256))
    assert len(cache._free) + len(cache._frame_of) == 256


async def test_a_large_fua_write_that_the_media_refuse_is_a_status(
    make_namespace: MakeNamespace,
) -> None:
    """In pieces, and written back at their end: the refusal must not escape `complete`."""
    namespace = make_namespace(8 << 20, kind="page-cache", options=ARENA)
    large = write(0, b"x" * (512 << 10), FUA)  # fits the arena, so only the write-back stores

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    waiting = namespace.execute([large])
    assert list(waiting) == [large]
    namespace.media.store = full
    await namespace.complete(waiting)
    assert large.status == Status.CAPACITY_EXCEEDED


async def test_a_flush_writes_everything_back(make_namespace: MakeNamespace) -> None:
    namespace = make_namespace(kind="page-cache", options=ARENA)
    namespace.execute([write(page * 2 * PAGE, b"z" * PAGE) for page in range(100)])
    flush = Command(FLUSH, 0, 0, 0)
    await namespace.complete(namespace.execute([flush]))
    assert flush.status == 0
    assert not cache_of(namespace).dirty()
    assert bytes(namespace.media.view[198 * PAGE : 199 * PAGE]) == b"z" * PAGE


def test_a_last_page_that_is_cut_short_is_whole(make_namespace: MakeNamespace) -> None:
    """It is bad until all there is of it is written, and gone when all there is is discarded.

    A frame that stayed dirty over its hole would be stored to memory that nobody has reserved.
    """
    namespace = make_namespace((1 << 20) + 512, kind="page-cache", options=ARENA)
    cache = cache_of(namespace)
    namespace.poison(1 << 20, 512)
    last = write(1 << 20, b"x" * 512)
    assert not namespace.execute([last])
    assert (last.status, cache.poisoned()) == (0, [])
    assert list(cache.dirty_extents()) == [(1 << 20, PAGE)]
    assert not namespace.execute([Command(DATASET_MANAGEMENT, 0, 1 << 20, 512)])
    assert not cache.dirty()
    assert cache.counters().cached_bytes == 0
    assert not namespace.media.allocation.covers(1 << 20, 512)
