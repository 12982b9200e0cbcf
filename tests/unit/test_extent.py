"""Extents: one descriptor a run, cut where fragments end, and a lifetime as long as the extent."""

from collections.abc import Callable

import msgspec
import pytest

from pmblk import Namespace
from pmblk.media import Media
from pmblk.nvme.command import FUA
from pmblk.representations import make, parse_options
from pmblk.representations.extent import ExtentRepresentation
from tests.unit.conftest import recorded, write

MakeMedia = Callable[..., Media]
PAGE = 4096
SIZE = 1 << 20


def over(media: Media, fragments: int = 1) -> ExtentRepresentation:
    made = make("extent", media, parse_options("extent", {"fragments": fragments}))
    assert isinstance(made, ExtentRepresentation)
    return made


@pytest.mark.parametrize("fragments", [0, -1, (1 << 20) + 1])
def test_fragments_that_cannot_be_are_refused(fragments: int) -> None:
    with pytest.raises(msgspec.ValidationError):
        parse_options("extent", {"fragments": fragments})


@pytest.mark.parametrize(
    ("offset", "length"), [(0, PAGE), (0, 128 << 10), (0, SIZE), (77, SIZE - 99)]
)
def test_any_io_over_one_extent_is_one_descriptor_of_16_bytes(
    make_media: MakeMedia, offset: int, length: int
) -> None:
    extent = over(make_media(SIZE))
    extent.write(offset, bytes(length))
    lease = extent.hold(offset, length)
    assert lease is not None
    assert [len(view) for view in lease.views] == [length]
    counters = extent.counters()
    assert (counters.descriptors_built, counters.descriptor_bytes) == (2, 32)
    assert (counters.pins, counters.unpins, counters.peak_pins) == (1, 0, 1)
    assert (counters.splits, counters.metadata_bytes) == (0, 16)
    extent.release([lease])


@pytest.mark.parametrize(
    ("offset", "length", "pieces"),
    [
        (0, PAGE, [PAGE]),
        (64 * PAGE - 1, 2, [1, 1]),
        (0, SIZE, [SIZE // 4] * 4),
        (100, SIZE - 200, [SIZE // 4 - 100, SIZE // 4, SIZE // 4, SIZE // 4 - 100]),
        (64 * PAGE, 64 * PAGE, [64 * PAGE]),
        (192 * PAGE, 64 * PAGE, [64 * PAGE]),
    ],
)
def test_an_io_is_cut_where_a_fragment_ends(
    make_media: MakeMedia, offset: int, length: int, pieces: list[int]
) -> None:
    extent = over(make_media(SIZE), 4)
    lease = extent.hold(offset, length)
    assert lease is not None
    assert [len(view) for view in lease.views] == pieces
    counters = extent.counters()
    assert counters.descriptors_built == counters.pins == counters.iovecs == len(pieces)
    assert counters.splits == len(pieces) - 1
    assert counters.metadata_bytes == 4 * 16
    extent.release([lease])
    extent.write(offset, bytes(length))
    after = extent.counters()
    assert after.descriptors_built == 2 * len(pieces)
    assert after.splits == 2 * (len(pieces) - 1)
    assert after.pins == after.unpins == len(pieces)


def test_fragments_are_whole_pages_that_differ_by_one_at_most(make_media: MakeMedia) -> None:
    extent = over(make_media(SIZE + 512), 100)
    lease = extent.hold(0, SIZE + 512)
    assert lease is not None
    lengths = [len(view) for view in lease.views]
    assert len(lengths) == 100
    assert {length // PAGE for length in lengths[:-1]} == {2, 3}
    assert all(length % PAGE == 0 for length in lengths[:-1])
    assert lengths[-1] % PAGE == 512
    extent.release([lease])


def test_there_are_never_more_fragments_than_pages(make_media: MakeMedia) -> None:
    extent = over(make_media(3 * PAGE + 512), 1 << 20)
    assert extent.counters().metadata_bytes == 4 * 16


def test_one_extent_lives_as_long_as_anybody_holds_a_byte_of_it(make_media: MakeMedia) -> None:
    extent = over(make_media(SIZE))
    lease = extent.hold(0, 1)
    assert lease is not None
    assert extent.busy(SIZE - PAGE, PAGE)
    assert extent.lifetime_unit(SIZE - PAGE, PAGE) == (0, SIZE)
    extent.release([lease])
    assert not extent.busy(0, SIZE)


def test_a_fragment_lives_on_its_own(make_media: MakeMedia) -> None:
    extent = over(make_media(SIZE), 4)
    lease = extent.hold(65 * PAGE, 1)
    assert lease is not None
    assert [extent.busy(part * 64 * PAGE, PAGE) for part in range(4)] == [False, True, False, False]
    assert extent.busy(64 * PAGE - 1, 2)
    assert extent.lifetime_unit(64 * PAGE - 1, 2) == (0, 128 * PAGE)
    assert extent.lifetime_unit(70 * PAGE, PAGE) == (64 * PAGE, 64 * PAGE)
    extent.release([lease])
    assert not extent.busy(0, SIZE)


@pytest.mark.parametrize("fragments", [1, 4])
def test_what_is_stored_is_written_back_at_once(make_media: MakeMedia, fragments: int) -> None:
    media = make_media(SIZE)
    durability = recorded(media)
    namespace = Namespace("ns", media, over(media, fragments), lba_bytes=512)
    assert not namespace.execute([write(100, b"x" * PAGE), write(9 * PAGE, b"y" * 8, FUA)])
    assert durability.taken() == [(100, PAGE), (9 * PAGE, 8)]
    window = namespace.representation.window(0, PAGE)
    assert window is not None
    namespace.representation.stored(0, 3, continued=False)
    assert durability.taken() == [(0, 3)]
    assert not namespace.representation.dirty()


def test_bad_runs_are_cut_where_they_are_healed(make_media: MakeMedia) -> None:
    extent = over(make_media(SIZE + 512))
    extent.poison(10, 10)
    extent.poison(256, 1)
    extent.poison(5, 7)
    assert extent.poisoned() == [*range(5, 20), 256]
    assert extent.write(12 * PAGE, bytes(PAGE))
    assert extent.poisoned() == [*range(5, 12), *range(13, 20), 256]
    with pytest.raises(OSError, match="poisoned"):
        extent.hold(13 * PAGE - 1, 2)
    for offset, length in ((0, 5 * PAGE), (12 * PAGE, PAGE), (20 * PAGE, 236 * PAGE)):
        lease = extent.hold(offset, length)
        assert lease is not None
        extent.release([lease])
    assert extent.write(256 * PAGE, bytes(512)), "all that there is of the last page"
    extent.forget(0, SIZE)
    assert not extent.has_poison
