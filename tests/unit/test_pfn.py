"""Page frame numbers: the numbers, the lock on the side, the dirty bits on the side."""

from collections.abc import Callable

import msgspec
import pytest

from pmblk import Command, Namespace
from pmblk.media import Media
from pmblk.nvme.command import FLUSH, FUA
from pmblk.representations import make, parse_options
from pmblk.representations.pfn import PfnRepresentation
from tests.unit.conftest import discard, recorded, write

MakeMedia = Callable[..., Media]
PAGE = 4096


def over(media: Media, locking: str = "range") -> PfnRepresentation:
    made = make("pfn", media, parse_options("pfn", {"locking": locking}))
    assert isinstance(made, PfnRepresentation)
    return made


def test_a_locking_that_is_unknown_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        parse_options("pfn", {"locking": "page"})


@pytest.mark.parametrize("locking", ["range", "none"])
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
def test_an_io_is_described_by_8_bytes_a_page(
    make_media: MakeMedia, locking: str, offset: int, length: int, count: int
) -> None:
    pfn = over(make_media(4 << 20), locking)
    lease = pfn.hold(offset, length)
    assert lease is not None
    assert [int(number) for number in lease.descriptors] == [
        offset // PAGE + at for at in range(count)
    ]
    counters = pfn.counters()
    assert (counters.descriptors_built, counters.descriptor_bytes) == (count, 8 * count)
    pfn.release([lease])
    assert pfn.counters().pins == pfn.counters().unpins == pfn.counters().peak_pins == count


def test_a_lock_covers_the_pages_that_the_range_touches(make_media: MakeMedia) -> None:
    pfn = over(make_media())
    lease = pfn.hold(PAGE + 100, PAGE)
    assert lease is not None
    assert [pfn.busy(page * PAGE, PAGE) for page in range(4)] == [False, True, True, False]
    pfn.release([lease])
    assert not pfn.busy(0, 1 << 20)


def test_without_a_lock_nobody_knows_who_reads(make_media: MakeMedia) -> None:
    pfn = over(make_media(), "none")
    lease = pfn.hold(0, PAGE)
    assert lease is not None
    assert not pfn.busy(0, PAGE)
    assert pfn.leases == 1
    pfn.release([lease])


@pytest.mark.parametrize(
    ("size", "bitmap"), [(8 << 30, 256 << 10), (400 << 30, 12 << 20 | 512 << 10)]
)
async def test_the_dirty_bits_have_memory_only_where_something_is_dirty(
    make_media: MakeMedia, size: int, bitmap: int
) -> None:
    media = make_media(size)
    namespace = Namespace("ns", media, over(media), lba_bytes=512)
    counters = namespace.representation.counters()
    assert (counters.metadata_bytes, counters.metadata_resident_bytes) == (bitmap, 0)
    assert not namespace.execute([write(size - PAGE, b"x")])
    namespace.representation.forget(0, size)
    assert not namespace.representation.dirty()
    assert namespace.representation.counters().metadata_resident_bytes == PAGE


async def test_a_flush_writes_back_the_dirty_pages_and_no_others(make_media: MakeMedia) -> None:
    media = make_media(4 << 20)
    durability = recorded(media)
    namespace = Namespace("ns", media, over(media), lba_bytes=512)
    assert not namespace.execute([write(100, b"x"), write(PAGE, b"x"), write(9 * PAGE - 1, b"xx")])
    assert durability.taken() == [], "a store writes nothing back"
    assert not namespace.execute([write(20 * PAGE, b"x", FUA), discard(PAGE, PAGE)])
    assert durability.taken() == [(20 * PAGE, PAGE)]
    await namespace.complete(namespace.execute([Command(FLUSH, 0, 0, 0)]))
    assert durability.taken() == [(0, PAGE), (8 * PAGE, 2 * PAGE)]
    assert not namespace.representation.dirty()


def test_bytes_that_were_received_into_a_window_are_dirty(make_media: MakeMedia) -> None:
    pfn = over(make_media())
    window = pfn.window(PAGE, PAGE)
    assert window is not None
    window[:1] = b"x"
    pfn.stored(PAGE, 1, continued=False)
    assert list(pfn.dirty_extents()) == [(PAGE, PAGE)]


async def test_a_long_discard_writes_back_what_is_dirty_in_its_range_and_touches_no_hole(
    make_media: MakeMedia,
) -> None:
    media = make_media(32 << 20)
    durability = recorded(media)
    namespace = Namespace("ns", media, over(media), lba_bytes=512)
    assert not namespace.execute([write(0, b"x"), write(9 << 20, b"x")])
    await namespace.complete(namespace.execute([discard(8 << 20, 16 << 20)]))
    assert durability.taken() == [(9 << 20, PAGE)]
    assert list(namespace.representation.dirty_extents()) == [(0, PAGE)]
