"""Page structs while a page is under I/O: the pool, sharing, and what happens when it is empty."""

from collections.abc import Callable

import msgspec
import pytest
import trio
import trio.testing

from pmblk import Command, Namespace
from pmblk.media import Media
from pmblk.nvme.command import FUA, READ
from pmblk.representations import make, parse_options
from pmblk.representations.page_table import STRUCT_BYTES
from pmblk.representations.transient_page import TransientPageRepresentation
from tests.unit.conftest import MakeNamespace, content, hold, recorded, write

MakeMedia = Callable[..., Media]
PAGE = 4096
KIND = "transient-page"
SMALL = {"pool_pages": 256}


def over(media: Media, pool_pages: int = 16384) -> TransientPageRepresentation:
    made = make(KIND, media, parse_options(KIND, {"pool_pages": pool_pages}))
    assert isinstance(made, TransientPageRepresentation)
    return made


def pooled(namespace: Namespace) -> TransientPageRepresentation:
    representation = namespace.representation
    assert isinstance(representation, TransientPageRepresentation)
    return representation


def is_at_rest(representation: TransientPageRepresentation) -> bool:
    return (
        not representation._struct_of
        and not representation._pool.refcounts.any()
        and sorted(representation._free) == list(range(representation._pool.count))
    )


@pytest.mark.parametrize("pool_pages", [0, 255, (1 << 24) + 1, "many"])
def test_a_pool_that_cannot_be_is_refused(pool_pages: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        parse_options(KIND, {"pool_pages": pool_pages})


@pytest.mark.parametrize(
    ("offset", "length", "count"),
    [
        (0, PAGE, 1),
        (0, 128 << 10, 32),
        (0, 1 << 20, 256),
        (5 * PAGE + 512, PAGE, 2),
        (5 * PAGE + 512, 1 << 20, 257),
    ],
)
def test_each_page_that_is_touched_has_a_struct_of_its_own(
    make_media: MakeMedia, offset: int, length: int, count: int
) -> None:
    transient = over(make_media(4 << 20))
    lease = transient.hold(offset, length)
    assert lease is not None
    structs, vector = lease.descriptors
    pool = transient._pool
    assert len(set(structs)) == len(structs) == len(vector) == count
    assert [pool.index_of(struct) for struct in structs] == [
        offset // PAGE + at for at in range(count)
    ]
    assert [int(entry[0]) for entry in vector] == [
        pool.address + struct * STRUCT_BYTES for struct in structs
    ]
    assert sum(int(entry[1]) for entry in vector) == length
    counters = transient.counters()
    assert (counters.descriptors_built, counters.descriptor_bytes) == (count, 80 * count)
    assert counters.pool_peak_bytes == count * STRUCT_BYTES
    transient.release([lease])
    assert is_at_rest(transient)


def test_queue_depth_32_of_1_mib_takes_512_kib_of_structs(make_media: MakeMedia) -> None:
    transient = over(make_media(64 << 20))
    leases = [transient.hold(part << 20, 1 << 20) for part in range(32)]
    transient.release([lease for lease in leases if lease])
    counters = transient.counters()
    assert counters.peak_pins == 32 * 256
    assert counters.pool_peak_bytes == 512 << 10
    assert counters.metadata_bytes == 1 << 20
    assert is_at_rest(transient)


@pytest.mark.parametrize("pages", [2, 40])
def test_a_struct_that_two_share_is_freed_by_the_last(make_media: MakeMedia, pages: int) -> None:
    transient = over(make_media(4 << 20))
    first, second = transient.hold(0, pages * PAGE), transient.hold(PAGE, pages * PAGE)
    assert first is not None
    assert second is not None
    assert first.descriptors[0][1:] == second.descriptors[0][:-1]
    assert transient.counters().peak_pins == 2 * pages
    assert transient.counters().pool_peak_bytes == (pages + 1) * STRUCT_BYTES
    transient.release([first])
    assert not transient.busy(0, PAGE)
    assert transient.busy(PAGE, pages * PAGE)
    transient.release([second])
    assert is_at_rest(transient)


async def test_when_the_pool_is_empty_an_io_waits_and_then_goes_on(
    make_namespace: MakeNamespace,
) -> None:
    namespace = make_namespace(4 << 20, kind=KIND, options=SMALL)
    namespace.media.reserve(0, 4 << 20)
    held = [hold(namespace, part << 18, 1 << 18) for part in range(4)]
    late = [write(2 << 20, b"y" * PAGE), Command(READ, 0, 3 << 20, PAGE), write(0, b"z")]
    assert list(namespace.execute(late)) == late[:2], "page 0 has a struct to share"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(namespace.complete, late[:1])
        nursery.start_soon(namespace.complete, late[1:2])
        await trio.testing.wait_all_tasks_blocked()
        assert namespace.starved == 2
        assert namespace.counters.errors == 0
        namespace.release(held[:1])
    assert [command.status for command in late] == [0, 0, 0]
    assert bytes(namespace.media.view[2 << 20 : (2 << 20) + 1]) == b"y"
    namespace.release([*held[1:], late[1]])
    assert namespace.representation.counters().pool_waits >= 2
    assert is_at_rest(pooled(namespace))


async def test_a_transfer_larger_than_the_pool_goes_in_pieces(
    make_namespace: MakeNamespace,
) -> None:
    namespace = make_namespace(8 << 20, kind=KIND, options=SMALL)
    payload = bytes(range(256)) * (3 << 12)
    large, back = write(777, payload), Command(READ, 0, 777, len(payload))
    for command in (large, back):
        waiting = namespace.execute([command])
        assert list(waiting) == [command]
        await namespace.complete(waiting)
        assert command.status == 0
    assert content(back) == payload
    namespace.release([back])
    counters = namespace.representation.counters()
    assert counters.bytes_copied == 0
    assert counters.pool_peak_bytes <= 256 * STRUCT_BYTES // 4 + STRUCT_BYTES
    assert (namespace.counters.reads, namespace.counters.writes) == (1, 1)
    assert is_at_rest(pooled(namespace))


@pytest.mark.parametrize(("kind", "options"), [(KIND, SMALL), ("page-cache", {"arena": "1MiB"})])
async def test_a_bad_page_inside_a_transfer_in_pieces_is_written_as_a_whole(
    make_namespace: MakeNamespace, kind: str, options: dict[str, object]
) -> None:
    """A piece is cut at a page, wherever the transfer begins: no half of a page is refused."""
    namespace = make_namespace(2 << 20, kind=kind, options=options)
    namespace.poison(PAGE, (1 << 20) - PAGE)
    large = write(512, b"x" * (1 << 20))
    await namespace.complete(namespace.execute([large]))
    assert large.status == 0
    assert namespace.representation.poisoned() == []


def test_a_window_is_given_only_when_its_structs_are_there(make_media: MakeMedia) -> None:
    transient = over(make_media(4 << 20), 256)
    leases = [transient.hold(part * 64 * PAGE, 64 * PAGE) for part in range(3)]
    assert transient.window(3 << 20, 64 * PAGE) is None
    window = transient.window(3 << 20, 62 * PAGE)
    assert window is not None
    assert len(window) == 62 * PAGE
    transient.stored((3 << 20) - 1, 62 * PAGE, continued=False)
    transient.release([lease for lease in leases if lease])
    assert is_at_rest(transient)


def test_a_store_that_fails_returns_its_structs(make_media: MakeMedia) -> None:
    media = make_media()

    def refuse(*_: object) -> None:
        raise OSError(5, "disk")

    media.store = refuse
    transient = over(media)
    with pytest.raises(OSError, match="disk"):
        transient.write(100, b"x" * 40 * PAGE)
    assert is_at_rest(transient)


def test_what_is_stored_is_written_back_before_its_struct_is_gone(make_media: MakeMedia) -> None:
    media = make_media()
    durability = recorded(media)
    namespace = Namespace("ns", media, over(media), lba_bytes=512)
    assert not namespace.execute([write(100, b"x" * PAGE), write(0, b"y" * 8, FUA)])
    assert durability.taken() == [(100, PAGE), (0, 8)]
    assert not namespace.representation.dirty()


def test_a_bad_page_is_bad_though_its_struct_comes_and_goes(
    make_namespace: MakeNamespace,
) -> None:
    namespace = make_namespace(kind=KIND)
    namespace.release([hold(namespace, 0, PAGE)])
    namespace.poison(0, PAGE)
    for command in (Command(READ, 0, 0, 1), write(0, b"x")):
        namespace.execute([command])
        assert command.status
    assert is_at_rest(pooled(namespace))


def test_busy_looks_at_what_is_under_io_and_not_at_every_page(make_media: MakeMedia) -> None:
    """A discard of 400 GiB asks again after each release: it must not walk over 10^8 pages."""
    transient = over(make_media(400 << 30))
    lease = transient.hold(300 << 30, PAGE)
    assert lease is not None

    class Looked(dict[int, int]):
        looks = 0

        def __contains__(self, page: object) -> bool:
            self.looks += 1
            return super().__contains__(page)

    looked = transient._struct_of = Looked(transient._struct_of)
    assert transient.busy(0, 400 << 30)
    assert not transient.busy(0, 300 << 30)
    assert looked.looks <= 2
    transient.release([lease])
