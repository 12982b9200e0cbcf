"""Another representation, another size, while in use: a pause, no error, and nothing lost."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from pmblk import Command, Namespace
from pmblk.errors import PmblkError
from pmblk.media import Media, create
from pmblk.media.group_sync import GroupSync
from pmblk.namespace import QUIESCE_SECONDS
from pmblk.nvme.command import READ
from pmblk.nvme.status import Status
from pmblk.representations import Representation, make, parse_options
from pmblk.representations.extent import ExtentRepresentation
from pmblk.representations.pfn import PfnRepresentation
from pmblk.switching import resize, switch
from tests.unit.conftest import MakeNamespace, RecordedDurability, content, discard, hold, write

MakeMedia = Callable[..., Media]
PAGE = 4096
ARENA = {"arena": "1MiB"}
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("page-cache", ARENA),
    ("struct-page", {}),
    ("transient-page", {"pool_pages": 256}),
    ("struct-page", {"compound": "2MiB", "init": "eager"}),
    ("pfn", {}),
    ("struct-page", {"memmap": "device"}),
    ("extent", {"fragments": 9}),
    ("page-cache", {}),
    ("extent", {}),
]


async def to(namespace: Namespace, kind: str, **options: Any) -> None:
    await switch(namespace, kind, parse_options(kind, options))


# ---- what is held, and what is under way


async def test_a_switch_waits_for_leases_and_the_clients_for_the_switch(
    make_namespace: MakeNamespace,
) -> None:
    namespace = make_namespace(kind="page-cache")
    assert not namespace.execute([write(0, b"x" * PAGE)])
    held, late = hold(namespace, 0, PAGE), Command(READ, 0, 0, PAGE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(to, namespace, "extent")
        while not namespace.starved:
            await trio.testing.wait_all_tasks_blocked()
        assert namespace.representation.kind == "page-cache"
        assert list(namespace.execute([late])) == [late]
        namespace.release([held])
        await namespace.complete([late])
    assert namespace.representation.kind == "extent"
    assert content(late) == b"x" * PAGE
    namespace.release([late])


@pytest.mark.parametrize("what", ["switch", "resize"])
async def test_a_reader_that_hangs_ends_the_change_and_the_old_one_serves_on(
    make_namespace: MakeNamespace, autojump_clock: trio.testing.MockClock, what: str
) -> None:
    namespace = make_namespace(kind="pfn")
    assert not namespace.execute([write(0, b"x" * PAGE)])
    held, old = hold(namespace, 0, PAGE), namespace.representation
    begun = trio.current_time()
    change = {"switch": partial(to, kind="extent"), "resize": partial(resize, size=2 << 20)}[what]
    with pytest.raises(PmblkError, match="1 reads are not taken"):
        await change(namespace)
    assert trio.current_time() - begun == pytest.approx(QUIESCE_SECONDS)
    assert namespace.representation is old
    assert namespace.size == 1 << 20
    assert content(held) == b"x" * PAGE
    again = hold(namespace, 0, PAGE)
    namespace.release([held, again])
    await to(namespace, "extent")


async def test_commands_during_switches_through_all_kinds_read_as_a_model(
    make_media: MakeMedia,
) -> None:
    """Each task has a region of its own; all kinds take turns below them."""
    region_bytes, tasks = 256 << 10, 6
    media = make_media(2 << 20, with_reserve=True)
    kind, options = OTHERS[-1]
    representation = make(kind, media, parse_options(kind, options))
    namespace = Namespace("ns", media, representation, lba_bytes=512)
    over = done = 0

    async def finish(commands: list[Command]) -> None:
        waiting = namespace.execute(commands)
        finished = [one for one in commands if all(one is not other for other in waiting)]
        while waiting:
            namespace.release(finished)
            rest = await namespace.complete(waiting)
            finished = list(waiting[: len(waiting) - len(rest)])
            waiting = rest
        for command in commands:
            assert command.status == 0

    async def client(number: int) -> None:
        nonlocal done
        draw = random.Random(number)
        base, model = number * region_bytes, bytearray(region_bytes)
        while not over:
            offset = draw.randrange(region_bytes)
            length = min(draw.choice([1, 512, PAGE, 3 * PAGE, 200_000]), region_bytes - offset)
            step = draw.choice(["write", "discard", "read"])
            if step == "write":
                payload = draw.randbytes(length)
                await finish([write(base + offset, payload)])
                model[offset : offset + length] = payload
            elif step == "discard":
                await finish([discard(base + offset, length)])
                model[offset : offset + length] = bytes(length)
            else:
                read = Command(READ, 0, base + offset, length)
                await finish([read])
                assert content(read) == model[offset : offset + length]
                namespace.release([read])
            done += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for number in range(tasks):
            nursery.start_soon(client, number)
        for kind, options in OTHERS * 3:
            before = done
            await to(namespace, kind, **options)
            assert (namespace.representation.kind, namespace.counters.errors) == (kind, 0)
            while done < before + 20:
                await trio.lowlevel.checkpoint()
        over = True
    assert namespace.representation.leases == 0


async def test_a_transfer_in_pieces_goes_on_in_smaller_ones(make_namespace: MakeNamespace) -> None:
    """It has met a limit of 1 MiB, waits for frames, and then there are structs for 256 KiB."""
    namespace = make_namespace(8 << 20, kind="page-cache", options={"arena": "4MiB"})
    namespace.media.reserve(0, 8 << 20)
    pins = [hold(namespace, part << 20, 1 << 20) for part in range(4)]
    payload = random.Random(1).randbytes(3 << 20)
    offset = (4 << 20) + 777
    large, back = write(offset, payload), Command(READ, 0, offset, len(payload))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(namespace.complete, namespace.execute([large]))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(to, namespace, "transient-page")
        while namespace.starved < 2:
            await trio.testing.wait_all_tasks_blocked()
        namespace.release(pins)
    assert (large.status, namespace.representation.kind) == (0, "transient-page")
    await to(namespace, "transient-page", pool_pages=256)
    await namespace.complete(namespace.execute([back]))
    assert content(back) == payload
    namespace.release([back])


# ---- what fails


@pytest.mark.parametrize(
    ("kind", "options"),
    [("page-cache", {"arena": "1000000TiB"}), ("struct-page", {"memmap": "device"})],
)
async def test_when_the_new_one_cannot_be_had_the_old_one_serves_on(
    make_namespace: MakeNamespace, kind: str, options: dict[str, Any]
) -> None:
    namespace = make_namespace(kind="pfn")
    assert not namespace.execute([write(0, b"x" * PAGE)])
    old = namespace.representation
    with pytest.raises(PmblkError):
        await to(namespace, kind, **options)
    assert namespace.representation is old
    assert old.dirty(), "nothing was flushed for it"
    namespace.release([hold(namespace, 0, PAGE)])
    await to(namespace, "extent")


class FailingDurability(RecordedDurability):
    sync_blocks = True

    def sync(self) -> None:
        raise OSError(5, "disk")


async def test_when_the_media_cannot_be_synced_the_old_one_serves_on(
    make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = make_namespace(kind="page-cache", options=ARENA)
    assert not namespace.execute([write(0, b"x" * PAGE)])
    namespace._dispatcher.sync = GroupSync(FailingDurability())
    closed: list[str] = []
    monkeypatch.setattr(Representation, "close", lambda one: closed.append(one.kind))
    with pytest.raises(PmblkError, match="nothing was changed"):
        await to(namespace, "extent")
    with pytest.raises(PmblkError, match="cannot be made durable"):
        await resize(namespace, 2 << 20)
    assert closed == ["extent"], "the new one, and not the old one"
    assert (namespace.representation.kind, namespace.size) == ("page-cache", 1 << 20)
    read = hold(namespace, 0, PAGE)
    assert content(read) == b"x" * PAGE
    namespace.release([read])
    refused = write(0, b"y")
    namespace.execute([refused])
    assert refused.status == Status.WRITE_FAULT


async def test_bad_pages_that_cannot_be_handed_over_end_the_switch(
    make_media: MakeMedia, monkeypatch: pytest.MonkeyPatch
) -> None:
    media = make_media(4 << 20, with_reserve=True)
    old = make("extent", media, parse_options("extent", {}))
    namespace = Namespace("ns", media, old, lba_bytes=512)
    namespace.poison(0, PAGE)

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pmblk.media.syscalls.reserve", full)
    with pytest.raises(PmblkError, match="no room to remember bad pages"):
        await to(namespace, "struct-page", memmap="device")
    assert namespace.representation is old
    assert media.reserve_user == "", "the table that is not used was given back"
    monkeypatch.undo()
    await to(namespace, "struct-page", memmap="device")
    assert namespace.representation.poisoned() == [0]
    namespace.representation.close()


async def test_many_bad_pages_are_handed_over_by_runs(make_namespace: MakeNamespace) -> None:
    """Page by page an extent would be cut out of a list for each of them."""
    namespace = make_namespace(64 << 20)
    namespace.poison(0, 32 << 20)
    await to(namespace, "struct-page")
    namespace.execute([write(PAGE, b"x" * PAGE)])
    await to(namespace, "extent")
    extent = namespace.representation
    assert isinstance(extent, ExtentRepresentation)
    assert extent._poison == [(0, PAGE), (2 * PAGE, (32 << 20) - 2 * PAGE)]


# ---- another size


@pytest.mark.parametrize("size", [0, -512, 511, 4097, 1 << 63, 1 << 70])
async def test_a_size_that_cannot_be_is_refused(make_namespace: MakeNamespace, size: int) -> None:
    namespace = make_namespace()
    with pytest.raises(PmblkError, match="whole number of blocks"):
        await resize(namespace, size)
    assert namespace.size == namespace.media.path.stat().st_size == 1 << 20


async def test_the_size_of_read_only_media_is_fixed(
    make_namespace: MakeNamespace, directory: Path
) -> None:
    create(directory / "media.img", 1 << 20)
    with pytest.raises(PmblkError, match="read-only"):
        await resize(make_namespace(read_only=True), 2 << 20)


async def test_the_size_of_media_with_a_reserve_is_fixed(make_namespace: MakeNamespace) -> None:
    namespace = make_namespace(kind="struct-page", options={"memmap": "device"})
    with pytest.raises(PmblkError, match="reserve at its end"):
        await resize(namespace, 2 << 20)
    namespace.representation.close()


async def test_a_size_that_the_file_system_refuses_changes_nothing(
    make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = make_namespace()
    old = namespace.representation

    def refuse(_size: int) -> None:
        raise OSError(27, "File too large")

    monkeypatch.setattr(namespace.media, "resize", refuse)
    with pytest.raises(PmblkError, match="File too large"):
        await resize(namespace, 2 << 20)
    assert namespace.representation is old
    assert not namespace.execute([write(0, b"x")])


async def test_a_larger_size_whose_representation_cannot_be_had_is_undone(
    make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = make_namespace(kind="struct-page", options={"init": "eager"})
    assert not namespace.execute([write(0, b"x" * PAGE)])
    monkeypatch.setattr("pmblk.representations.table_memory.available_memory_bytes", lambda: 1)
    with pytest.raises(PmblkError, match="page table"):
        await resize(namespace, 2 << 20)
    assert namespace.size == namespace.media.size == namespace.media.path.stat().st_size == 1 << 20
    read = hold(namespace, 0, PAGE)
    assert content(read) == b"x" * PAGE
    namespace.release([read])


async def test_a_smaller_size_whose_representation_cannot_be_had_loses_nothing(
    make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = make_namespace(2 << 20, kind="struct-page", options={"init": "eager"})
    last = (2 << 20) - PAGE
    assert not namespace.execute([write(last, b"x" * PAGE)])
    monkeypatch.setattr("pmblk.representations.table_memory.available_memory_bytes", lambda: 1)
    with pytest.raises(PmblkError, match="page table"):
        await resize(namespace, 1 << 20)
    read = hold(namespace, last, PAGE)
    assert content(read) == b"x" * PAGE
    namespace.release([read])
    monkeypatch.undo()
    await resize(namespace, 1 << 20)
    assert namespace.media.path.stat().st_size == 1 << 20


async def test_a_discard_that_waits_for_a_reader_that_hangs_ends_the_change(
    make_namespace: MakeNamespace, autojump_clock: trio.testing.MockClock
) -> None:
    namespace = make_namespace()
    assert not namespace.execute([write(0, b"x" * PAGE)])
    held = hold(namespace, 0, PAGE)
    waiting = namespace.execute([discard(0, PAGE)])
    assert len(waiting) == 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(namespace.complete, waiting)
        await trio.testing.wait_all_tasks_blocked()
        begun = trio.current_time()
        with pytest.raises(PmblkError, match="a discard is under way"):
            await to(namespace, "pfn")
        assert trio.current_time() - begun == pytest.approx(QUIESCE_SECONDS)
        namespace.release([held])
    assert namespace.representation.kind == "extent"
    await to(namespace, "pfn")


@pytest.mark.parametrize("size", [PAGE + 512, 3 * PAGE + 512])
async def test_a_bad_last_page_stays_bad_at_another_size(
    make_namespace: MakeNamespace, size: int
) -> None:
    """It was reserved and never written, which is a hole to lseek; a hole would read as zeroes."""
    namespace = make_namespace(2 * PAGE - 512)
    namespace.poison(PAGE, 512)
    await resize(namespace, size)
    read = Command(READ, 0, PAGE, 512)
    namespace.execute([read])
    assert read.status == Status.UNRECOVERED_READ_ERROR


async def test_a_flush_under_way_ends_when_the_representation_is_exchanged(
    make_namespace: MakeNamespace,
) -> None:
    """Its extents are those of the old size; whoever exchanged it has made all of them durable."""
    namespace = make_namespace(64 << 20, kind="pfn")
    for part in range(16):
        assert not namespace.execute([write(part << 22, b"x" * (4 << 20))])
    old = namespace.representation
    written_back: list[int] = []

    def exchange(offset: int, length: int) -> None:
        written_back.append(offset)
        namespace.media.resize(1 << 20)
        namespace.install(PfnRepresentation(namespace.media, PfnRepresentation.Options()))

    old.write_back = exchange  # type: ignore[method-assign]
    await namespace.flush()
    assert written_back == [0]
    assert namespace.size == 1 << 20


async def test_discards_that_come_one_after_the_other_do_not_starve_a_switch(
    make_namespace: MakeNamespace,
) -> None:
    """They queue behind the switch, whoever sends them."""
    namespace = make_namespace(64 << 20)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:

            async def discards(part: int) -> None:
                while True:
                    command = discard(part << 24, 16 << 20)
                    await namespace.complete(namespace.execute([command]))

            for part in range(4):
                nursery.start_soon(discards, part)
            await trio.testing.wait_all_tasks_blocked()
            for kind in ("pfn", "extent", "struct-page"):
                await to(namespace, kind)
            nursery.cancel_scope.cancel()
    assert namespace.representation.kind == "struct-page"


# ---- a range on its way out


async def test_a_flush_that_is_overtaken_by_an_exchange_ends_well(
    make_namespace: MakeNamespace,
) -> None:
    """It resumes over a representation that is closed; the order of the two is trio's."""
    namespace = make_namespace(4 << 20, kind="struct-page")

    async def exchange() -> None:
        new = make("struct-page", namespace.media, parse_options("struct-page"))
        async with namespace.quiesced():
            old = namespace.representation
            namespace.install(new)
        old.close()
        del old

    for _ in range(12):
        pages = [write(page * PAGE, b"x" * PAGE) for page in range(0, 1024, 2)]
        assert not namespace.execute(pages)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange)
            nursery.start_soon(namespace.flush)
    assert not namespace.representation.dirty()


def test_a_range_on_its_way_out_cannot_be_poisoned(make_namespace: MakeNamespace) -> None:
    """The page would be punched after it was reserved, and count as memory that is there."""
    namespace = make_namespace()
    with namespace._dispatcher.fences.around(0, PAGE):
        with pytest.raises(PmblkError, match="try again"):
            namespace.poison(100, 1)
        namespace.poison(PAGE, 1)
    namespace.poison(0, 1)
    assert namespace.representation.poisoned() == [0, 1]
