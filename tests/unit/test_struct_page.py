"""Page structs for every page: their descriptors, their table, their marks."""

import ctypes
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pmblk import Command, MediaError, Namespace
from pmblk.errors import PmblkError
from pmblk.media import Media, create, open_media
from pmblk.nvme.command import FLUSH, FUA, WRITE
from pmblk.nvme.status import Status
from pmblk.representations import make, parse_options
from pmblk.representations.page_table import DIRTY, HWPOISON, RESERVED, STRUCT_BYTES
from pmblk.representations.struct_page import SECTION_PAGES, StructPageRepresentation
from tests.unit.conftest import MakeNamespace, discard, hold, recorded, write

MakeMedia = Callable[..., Media]
PAGE = 4096
SECTION = SECTION_PAGES * PAGE
DEVICE = {"memmap": "device"}
COMPOUND = {"compound": "2MiB"}


def over(media: Media, **options: Any) -> StructPageRepresentation:
    made = make("struct-page", media, parse_options("struct-page", options))
    assert isinstance(made, StructPageRepresentation)
    return made


def tabled(namespace: Namespace) -> StructPageRepresentation:
    representation = namespace.representation
    assert isinstance(representation, StructPageRepresentation)
    return representation


@pytest.mark.parametrize(
    ("offset", "length", "count"),
    [
        (0, PAGE, 1),
        (0, 128 << 10, 32),
        (0, 1 << 20, 256),
        (5 * PAGE + 512, PAGE, 2),
        (5 * PAGE + 512, 128 << 10, 33),
        (5 * PAGE + 512, 1 << 20, 257),
        (PAGE - 1, 1, 1),
        (PAGE - 1, 2, 2),
    ],
)
def test_each_page_that_is_touched_has_a_bio_vec_that_names_its_struct(
    make_media: MakeMedia, offset: int, length: int, count: int
) -> None:
    struct_page = over(make_media(4 << 20))
    lease = struct_page.hold(offset, length)
    assert lease is not None
    vector = [tuple(entry) for entry in lease.descriptors]
    base = struct_page._table.address
    first = offset // PAGE
    assert [int(page) for page, _, _ in vector] == [
        base + (first + at) * STRUCT_BYTES for at in range(count)
    ]
    assert sum(int(piece) for _, piece, _ in vector) == length
    assert [int(place) for _, _, place in vector] == [offset % PAGE] + [0] * (count - 1)
    counters = struct_page.counters()
    assert (counters.descriptors_built, counters.descriptor_bytes) == (count, 16 * count)
    assert (counters.pins, counters.unpins, counters.peak_pins) == (count, 0, count)
    struct_page.release([lease])
    assert struct_page.counters().unpins == count


@pytest.mark.parametrize(
    ("offset", "length", "pieces"),
    [
        (0, 1 << 20, [(0, 1 << 20, 0)]),
        (SECTION - 512, 1024, [(0, 512, SECTION - 512), (1, 512, 0)]),
        (100, 2 * SECTION, [(0, SECTION - 100, 100), (1, SECTION, 0), (2, 100, 0)]),
    ],
)
def test_a_compound_page_has_one_bio_vec_for_2_mib(
    make_media: MakeMedia, offset: int, length: int, pieces: list[tuple[int, int, int]]
) -> None:
    compound = over(make_media(3 * SECTION), **COMPOUND)
    lease = compound.hold(offset, length)
    assert lease is not None
    head_bytes = 128 * STRUCT_BYTES
    base = compound._table.address
    assert lease.descriptors == [
        (base + section * head_bytes, piece, place) for section, piece, place in pieces
    ]
    compound.release([lease])


def test_two_leases_on_a_page_are_two_references(make_media: MakeMedia) -> None:
    struct_page = over(make_media())
    leases = [struct_page.hold(0, PAGE), struct_page.hold(100, 8)]
    assert struct_page._table.refcounts[0] == 2
    for lease in leases:
        assert struct_page.busy(0, 1)
        assert lease is not None
        struct_page.release([lease])
    assert not struct_page.busy(0, PAGE)


# ---- the table


@pytest.mark.parametrize(("options", "share"), [({}, 64), (COMPOUND, 256)])
async def test_the_table_of_400_gib_has_memory_only_where_it_is_used(
    make_media: MakeMedia, options: dict[str, str], share: int
) -> None:
    """Neither an I/O, nor a flush, nor a discard of everything below a reader gives it any."""
    media = make_media(400 << 30)
    namespace = Namespace("ns", media, over(media, **options), lba_bytes=512)
    struct_page = tabled(namespace)
    assert struct_page.counters().metadata_bytes == (400 << 30) // share
    assert struct_page.counters().metadata_resident_bytes == 0
    assert not namespace.execute([write(0, b"x" * PAGE), write(300 << 30, b"y" * PAGE)])
    await namespace.flush()
    held = hold(namespace, 300 << 30, PAGE)
    namespace.poison(200 << 30, PAGE)
    assert struct_page.busy(0, 400 << 30)
    assert not struct_page.busy(0, 300 << 30)
    namespace.release([held])
    assert not struct_page.busy(0, 400 << 30)
    struct_page.forget(0, 400 << 30)
    assert struct_page.counters().metadata_resident_bytes <= 256 << 10


def test_an_eager_table_has_all_of_its_memory_and_is_reserved(make_media: MakeMedia) -> None:
    eager = over(make_media(64 << 20), init="eager")
    assert eager.counters().metadata_resident_bytes == 1 << 20
    assert (eager._table.flags == RESERVED).all()


@pytest.mark.parametrize("compound", ["none", "2MiB"])
def test_an_eager_table_without_memory_for_it_is_refused(
    make_media: MakeMedia, monkeypatch: pytest.MonkeyPatch, compound: str
) -> None:
    monkeypatch.setattr(
        "pmblk.representations.table_memory.available_memory_bytes", lambda: 10 << 10
    )
    media = make_media(64 << 20)
    with pytest.raises(PmblkError, match=r"page table of 64 MiB takes .* 10 KiB .*lazy"):
        over(media, init="eager", compound=compound)
    over(media, compound=compound)


def test_a_table_on_the_device_is_a_64th_of_it_and_lies_in_the_file(
    make_media: MakeMedia, directory: Path
) -> None:
    media = make_media(4 << 20, with_reserve=True)
    assert (media.size, media.reserve_bytes) == (63 << 16, 1 << 16)
    struct_page = over(media, **DEVICE)
    counters = struct_page.counters()
    assert counters.metadata_device_bytes == counters.metadata_bytes == (63 << 16) // 64
    assert counters.metadata_resident_bytes == 0
    struct_page.write(3 * PAGE, b"z")
    flags = (directory / "media.img").read_bytes()[media.size + 3 * STRUCT_BYTES :][:8]
    assert int.from_bytes(flags, "little") == DIRTY
    assert ctypes.string_at(struct_page._table.address + 3 * STRUCT_BYTES, 8) == flags
    struct_page.close()


def test_a_table_on_the_device_starts_anew_when_it_is_opened_again(directory: Path) -> None:
    create(directory / "a", 4 << 20)
    for _ in range(2):
        media = open_media(directory / "a", with_reserve=True)
        struct_page = over(media, **DEVICE)
        assert not struct_page._table.flags.any()
        assert not struct_page._table.refcounts.any()
        struct_page.write(0, b"z")
        assert struct_page.hold(0, PAGE) is not None  # and the process ends
        media.close()


def test_one_reserve_holds_one_table(make_media: MakeMedia) -> None:
    media = make_media(4 << 20, with_reserve=True)
    first = over(media, **DEVICE)
    with pytest.raises(PmblkError, match="in use"):
        over(media, **DEVICE, **COMPOUND)
    first.close()
    over(media, **DEVICE, **COMPOUND).close()


def test_without_a_reserve_there_is_no_table_on_the_device(make_media: MakeMedia) -> None:
    with pytest.raises(PmblkError, match="without a reserve"):
        over(make_media(), **DEVICE)


def test_a_file_with_data_where_the_table_would_go_is_refused(directory: Path) -> None:
    (directory / "a").write_bytes(bytes((4 << 20) - 1) + b"x")
    with pytest.raises(MediaError, match="has data in its last 1/64"):
        open_media(directory / "a", with_reserve=True)
    assert (directory / "a").read_bytes()[-1:] == b"x"


@pytest.mark.parametrize("options", [DEVICE, DEVICE | COMPOUND])
async def test_a_look_at_a_table_on_the_device_allocates_nothing(
    make_media: MakeMedia, options: dict[str, str]
) -> None:
    """On tmpfs a load from a hole allocates, and is SIGBUS when the file system is full."""
    media = make_media(1 << 30, with_reserve=True)
    namespace = Namespace("ns", media, over(media, **options), lba_bytes=512)
    assert not namespace.execute([write(0, b"x" * PAGE)])
    namespace.poison(512 << 20, PAGE)
    held = hold(namespace, 0, PAGE)
    before = media.allocated_bytes()
    assert not namespace.representation.busy(PAGE << 9, media.size - (PAGE << 9))
    await namespace.flush()
    await namespace.complete(namespace.execute([discard(4 << 20, media.size - (4 << 20))]))
    assert not namespace.representation.has_poison
    namespace.release([held])
    assert media.allocated_bytes() <= before, "of 16 MiB of table"
    namespace.representation.close()


# ---- its marks


@pytest.mark.parametrize("memmap", ["dram", "device"])
async def test_a_flush_writes_back_the_dirty_pages_and_no_others(
    make_media: MakeMedia, memmap: str
) -> None:
    media = make_media(4 << 20, with_reserve=True)
    durability = recorded(media)
    namespace = Namespace("ns", media, over(media, memmap=memmap), lba_bytes=512)
    assert not namespace.execute([write(100, b"x"), write(PAGE, b"x"), write(9 * PAGE - 1, b"xx")])
    assert not namespace.execute([write(1023 * PAGE - (1 << 16), b"x")])
    assert durability.taken() == [], "a store writes nothing back"
    assert namespace.representation.counters().dirty_bytes == namespace.size, "both sections"
    flush = Command(FLUSH, 0, 0, 0)
    await namespace.complete(namespace.execute([flush]))
    assert durability.taken() == [(0, 2 * PAGE), (8 * PAGE, 2 * PAGE), (1007 * PAGE, PAGE)]
    assert not namespace.representation.dirty()
    assert not namespace.execute([flush])
    assert durability.taken() == []


async def test_fua_writes_back_its_own_pages_only(make_media: MakeMedia) -> None:
    media = make_media()
    durability = recorded(media)
    namespace = Namespace("ns", media, over(media), lba_bytes=512)
    assert not namespace.execute([write(0, b"x" * PAGE), write(5 * PAGE + 7, b"x" * PAGE, FUA)])
    assert durability.taken() == [(5 * PAGE, 2 * PAGE)]
    assert list(namespace.representation.dirty_extents()) == [(0, PAGE)]


async def test_a_discard_takes_the_dirty_mark_of_whole_pages_with_it(
    make_media: MakeMedia,
) -> None:
    media = make_media()
    durability = recorded(media)
    namespace = Namespace("ns", media, over(media), lba_bytes=512)
    assert not namespace.execute([write(0, b"x" * 4 * PAGE), discard(PAGE, 2 * PAGE)])
    durability.taken()
    await namespace.flush()
    assert durability.taken() == [(0, PAGE), (3 * PAGE, PAGE)]


async def test_a_compound_flush_writes_2_mib_back_for_a_dirty_byte(make_media: MakeMedia) -> None:
    media = make_media(2 * SECTION + PAGE)
    durability = recorded(media)
    namespace = Namespace("ns", media, over(media, **COMPOUND), lba_bytes=512)
    assert not namespace.execute([write(SECTION + 5, b"x"), write(2 * SECTION, b"x")])
    assert not namespace.execute([write(PAGE, b"x", FUA)])
    assert durability.taken() == [(0, SECTION)]
    await namespace.flush()
    assert durability.taken() == [(SECTION, SECTION), (2 * SECTION, PAGE)]
    assert not namespace.representation.dirty()


def test_a_bad_page_is_marked_in_its_struct_until_it_is_written_whole(
    make_namespace: MakeNamespace,
) -> None:
    namespace = make_namespace(kind="struct-page")
    struct_page = tabled(namespace)
    namespace.poison(3 * PAGE, 2 * PAGE)
    assert struct_page._table.with_flags(0, 256, HWPOISON).tolist() == [3, 4]
    part, whole = write(3 * PAGE + 1, b"x"), write(3 * PAGE, b"x" * PAGE)
    namespace.execute([part, whole])
    assert (part.status, whole.status) == (Status.WRITE_FAULT, 0)
    assert struct_page._table.with_flags(0, 256, HWPOISON).tolist() == [4]


def test_a_compound_page_stays_marked_while_one_of_its_pages_is_bad(
    make_namespace: MakeNamespace,
) -> None:
    namespace = make_namespace(2 * SECTION, kind="struct-page", options=COMPOUND)
    namespace.poison(0, 2 * PAGE)
    for page, marked in ((0, [0]), (1, [])):
        namespace.execute([write(page * PAGE, b"x" * PAGE)])
        assert tabled(namespace)._table.with_flags(0, 256, HWPOISON).tolist() == marked


def test_without_room_for_structs_on_the_device_there_is_no_window(
    make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is received into memory must not fail afterwards."""
    namespace = make_namespace(SECTION, kind="struct-page", options={"memmap": "device"})
    command = Command(WRITE, 0, 0, 65536)
    assert namespace.window(command) is not None
    reserve = namespace.media.reserve

    def full(offset: int, length: int) -> None:
        if offset >= namespace.media.size:
            raise OSError(errno.ENOSPC, "full")
        reserve(offset, length)

    monkeypatch.setattr(namespace.media, "reserve", full)
    assert namespace.window(command) is None
