"""Media that have failed: a status for every command, and nobody is told what is not so.

Here nothing is SIGBUS: either a file is found to be short, or the fault is set as the handler would
set it. `test_faults` has the rest.
"""

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from pmblk import Command, Namespace, PmblkError
from pmblk.description import describe
from pmblk.media import Media, create, faults, open_media
from pmblk.media.group_sync import GroupSync
from pmblk.media.target import Target, open_target
from pmblk.nvme.command import (
    DATASET_MANAGEMENT,
    FLUSH,
    FUA,
    GET_LBA_STATUS,
    PREALLOCATE,
    READ,
    WRITE_ZEROES,
)
from pmblk.nvme.status import Status
from pmblk.representations import KINDS, make, parse_options
from pmblk.saving import PIECE_BYTES, save
from pmblk.switching import resize, switch
from pmblkd import media_watch
from pmblkd.errors import WorkFailed
from pmblkd.fuse.files import Files
from pmblkd.service import Service
from tests.unit.conftest import (
    LogRecord,
    MakeNamespace,
    content,
    discard,
    hold,
    registered,
    write,
)
from tests.unit.test_service import make_config

MakeMedia = Callable[..., Media]
PAGE = 4096
SIZE = 1 << 20


def fail(namespace: Namespace) -> None:
    """As the handler does: somewhere, some copy met a bad page."""
    size = namespace.media.file_bytes
    namespace.health.fault = faults.Fault(5 * PAGE, faults.BUS_MCEERR_AR, size, size)


def truncate(namespace: Namespace, size: int) -> str:
    """What is to be told about it."""
    path = namespace.media.path
    os.truncate(path, size)
    return f"somebody truncated {path} from {namespace.media.file_bytes} to {size} bytes"


@pytest.fixture
def on_disk(tmp_path: Path) -> Any:
    """A namespace whose media are in a page cache: they are written with a system call."""
    create(tmp_path / "disk.img", SIZE)
    media = open_media(tmp_path / "disk.img")
    assert not media.stores_to_view
    yield Namespace("ns", media, make("extent", media, parse_options("extent")), lba_bytes=512)
    media.close()


# ---- how it is noticed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", [None, FUA])
async def test_a_flush_and_a_durable_write_look_whether_the_file_is_all_there(
    make_namespace: MakeNamespace, kind: str, flags: int | None
) -> None:
    """512 bytes less are the same page: no load and no store would fail."""
    namespace = make_namespace(SIZE, kind=kind)
    assert not namespace.execute([write(0, b"x" * PAGE)])
    reason = truncate(namespace, SIZE - 512)
    command = Command(FLUSH, 0, 0, 0) if flags is None else write(0, b"y" * 512, flags)
    waiting = namespace.execute([command])
    if waiting:
        assert not await namespace.complete(waiting)
    assert command.status == Status.WRITE_FAULT
    assert namespace.failure() == reason
    again = write(0, b"z" * 512)
    assert not namespace.execute([again])
    assert again.status == Status.WRITE_FAULT


async def test_a_read_only_namespace_is_looked_at_too(
    make_namespace: MakeNamespace, directory: Path
) -> None:
    create(directory / "media.img", SIZE)
    namespace = make_namespace(SIZE, read_only=True)
    await namespace.flush()
    reason = truncate(namespace, 0)
    with pytest.raises(OSError, match=re.escape(reason)):
        await namespace.flush()


@pytest.mark.parametrize("opcode", [READ, GET_LBA_STATUS])
def test_what_is_past_the_end_of_a_truncated_file_is_no_hole(
    make_namespace: MakeNamespace, opcode: int
) -> None:
    namespace = make_namespace(SIZE)
    truncate(namespace, SIZE // 2)
    command = Command(opcode, 0, SIZE // 2 - PAGE, 2 * PAGE)
    assert not namespace.execute([command])
    assert command.status == Status.UNRECOVERED_READ_ERROR
    assert not command.segments
    assert namespace.failure(), "and it is known from then on"


def test_holes_of_a_whole_file_are_holes(make_namespace: MakeNamespace) -> None:
    namespace = make_namespace(SIZE)
    assert content(hold(namespace, 0, SIZE)) == bytes(SIZE)


def test_a_write_does_not_make_a_truncated_file_grow(on_disk: Namespace) -> None:
    """Else what the file had lost would read as zeroes."""
    assert not on_disk.execute([write(0, b"x" * SIZE)])
    truncate(on_disk, PAGE)
    late, other = write(SIZE - PAGE, b"y" * PAGE), write(0, b"y" * 512)
    assert not on_disk.execute([late, other])
    assert (late.status, other.status) == (Status.WRITE_FAULT, Status.WRITE_FAULT)
    assert on_disk.media.path.read_bytes() == b"x" * PAGE


@pytest.mark.parametrize("opcode", [WRITE_ZEROES, DATASET_MANAGEMENT, PREALLOCATE])
async def test_what_a_file_has_lost_cannot_be_zeroed_or_had_memory_for(
    make_namespace: MakeNamespace, opcode: int
) -> None:
    """To the file system it is nothing to punch past the end of a file, or to reserve there."""
    for size in (64 << 10, 8 << 20):  # on the spot, and in a thread
        namespace = make_namespace(16 << 20, name=f"{size}.img")
        truncate(namespace, PAGE)
        command = Command(opcode, 0, 4 << 20, size)
        waiting = namespace.execute([command])
        if waiting:
            assert not await namespace.complete(waiting)
        assert command.status == Status.WRITE_FAULT


async def test_a_file_that_somebody_made_longer_is_as_good_as_before(
    make_namespace: MakeNamespace,
) -> None:
    namespace = make_namespace(SIZE)
    os.truncate(namespace.media.path, 2 * SIZE)
    assert not namespace.execute([write(SIZE - PAGE, b"x" * PAGE)])
    await namespace.flush()
    assert not namespace.examine()
    assert content(hold(namespace, SIZE - PAGE, PAGE)) == b"x" * PAGE


# ---- what follows from it


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_in_which_media_fail_gives_back_what_it_holds(
    make_namespace: MakeNamespace, kind: str
) -> None:
    namespace = make_namespace(SIZE, kind=kind)
    assert not namespace.execute([write(0, b"x" * SIZE)])
    representation = namespace.representation
    store = representation.write

    def meets_a_bad_page(offset: int, payload: "memoryview | bytes") -> bool:
        fail(namespace)
        return store(offset, payload)

    representation.write = meets_a_bad_page  # type: ignore[method-assign]
    first, flush = Command(READ, 0, 0, 4 * PAGE), Command(FLUSH, 0, 0, 0)
    refused = Command(READ, 0, SIZE, PAGE, status=Status.INVALID_FIELD)
    batch = [first, flush, write(8 * PAGE, b"y" * PAGE), refused]
    assert not namespace.execute(batch)
    statuses = [Status.UNRECOVERED_READ_ERROR, Status.WRITE_FAULT, Status.WRITE_FAULT]
    assert [command.status for command in batch] == [*statuses, Status.INVALID_FIELD]
    assert representation.leases == 0
    assert first.segments is None
    namespace.release(batch)
    assert representation.leases == 0


async def test_a_read_that_waited_for_a_sync_beside_it_is_not_answered_with_failed_media(
    make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = make_namespace(SIZE)
    assert not namespace.execute([write(0, b"x" * PAGE)])

    async def slow(_self: GroupSync) -> None:
        await trio.lowlevel.checkpoint()
        fail(namespace)

    monkeypatch.setattr(GroupSync, "__call__", slow)
    read, flush = Command(READ, 0, 0, PAGE), Command(FLUSH, 0, 0, 0)
    assert not await namespace.complete([read, flush])
    assert (read.status, flush.status) == (Status.UNRECOVERED_READ_ERROR, Status.WRITE_FAULT)
    assert namespace.representation.leases == 0


async def test_a_file_that_is_truncated_during_a_sync_is_not_durable(
    make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = make_namespace(SIZE)

    async def slow(_self: GroupSync) -> None:
        await trio.lowlevel.checkpoint()
        truncate(namespace, PAGE)

    monkeypatch.setattr(GroupSync, "__call__", slow)
    flush = Command(FLUSH, 0, 0, 0)
    assert not await namespace.complete([flush])
    assert flush.status == Status.WRITE_FAULT


async def test_a_discard_that_waits_for_a_reader_ends_when_the_media_fail(
    make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page table on the media is lost with them, and may call the page held for ever."""
    namespace = make_namespace(SIZE, kind="struct-page")
    assert not namespace.execute([write(0, b"x" * PAGE)])
    read, gone = hold(namespace, 0, PAGE), discard(0, PAGE)
    assert list(namespace.execute([gone])) == [gone]
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(namespace.complete, [gone])
            await trio.testing.wait_all_tasks_blocked()
            monkeypatch.setattr(namespace.representation, "busy", lambda *_: True)
            fail(namespace)
            namespace.release([read])
    assert gone.status == Status.WRITE_FAULT


async def test_nothing_is_done_to_a_namespace_that_has_failed(
    make_namespace: MakeNamespace, directory: Path
) -> None:
    namespace = make_namespace(SIZE)
    reason = truncate(namespace, SIZE // 2)
    with pytest.raises(PmblkError, match=re.escape(reason)):
        describe(namespace, 0, PAGE)
    with pytest.raises(PmblkError, match=re.escape(reason)):
        namespace.poison(0, PAGE)
    with pytest.raises(PmblkError, match=re.escape(reason)):
        await switch(namespace, "pfn", parse_options("pfn", {}))
    with pytest.raises(PmblkError, match=re.escape(reason)):
        await resize(namespace, 2 * SIZE)
    assert namespace.media.path.stat().st_size == SIZE // 2
    target = open_target(directory / "copy", needed_bytes=SIZE)
    with pytest.raises(PmblkError, match=re.escape(reason)):
        await save(namespace, target)
    target.close()
    assert not (directory / "copy").exists()


def test_a_file_that_is_truncated_while_it_is_cut_is_not_made_longer(
    make_media: MakeMedia,
) -> None:
    media = make_media(SIZE)
    media.resize(SIZE // 2)
    os.truncate(media.path, PAGE)
    with pytest.raises(OSError, match="truncated"):
        media.trim()
    assert media.path.stat().st_size == PAGE


@pytest.mark.parametrize("left", [PIECE_BYTES, 2 * PIECE_BYTES - 512])
async def test_a_save_that_meets_lost_memory_is_no_copy(
    make_namespace: MakeNamespace, directory: Path, left: int
) -> None:
    """The kernel refuses to write from there (EFAULT), and it is not the target's fault.

    Or nobody notices before the end: what is lost is a part of the last page.
    """
    namespace = make_namespace(2 * PIECE_BYTES)
    assert not namespace.execute([write(0, b"x" * namespace.size)])
    target = open_target(directory / "copy", needed_bytes=namespace.size)
    real = Target.write

    def truncating(self: Target, offset: int, views: list[memoryview]) -> None:
        if offset:
            os.truncate(namespace.media.path, left)
        real(self, offset, views)

    target.write = truncating.__get__(target)  # type: ignore[method-assign]
    with pytest.raises(PmblkError, match="is not saved: somebody truncated"):
        await save(namespace, target)
    target.close()
    assert not (directory / "copy").exists()
    assert namespace.representation.leases == 0


# ---- who is told


async def test_a_file_that_fails_is_eio_also_under_the_copy_of_what_was_read(
    make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = make_namespace(SIZE)
    files = Files(registered(namespace))
    await files.write(2, PAGE, b"x" * PAGE)
    assert await files.read(2, 0, 2 * PAGE) == bytes(PAGE) + b"x" * PAGE
    release = namespace.release

    def meets_a_bad_page(commands: Any) -> None:
        fail(namespace)
        release(commands)

    monkeypatch.setattr(namespace, "release", meets_a_bad_page)
    for _ in range(2):
        with pytest.raises(OSError, match=re.escape(os.strerror(errno.EIO))):
            await files.read(2, 0, 2 * PAGE)
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.EIO))):
        await files.write(2, 0, b"x")
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.EIO))):
        await files.sync(2)
    assert namespace.representation.leases == 0


async def test_the_watch_tells_of_each_failure_once(
    make_namespace: MakeNamespace, logged: LogRecord, autojump_clock: trio.testing.MockClock
) -> None:
    namespace, other = make_namespace(name="a.img"), make_namespace(name="b.img")
    other.name = "other"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(media_watch.run, registered(namespace, other))
        await trio.sleep(3)
        reason = truncate(namespace, PAGE)
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    record = logged.expect("media failed")
    assert (record["level"], record["name"], record["reason"]) == ("error", "ns", reason)
    assert "restore the file" in record["mend"]


async def test_a_stop_with_failed_media_says_what_has_failed(
    make_namespace: MakeNamespace, directory: Path
) -> None:
    namespace, other = make_namespace(name="a.img"), make_namespace(name="b.img")
    other.name = "other"
    service = Service(directory / "c.toml", make_config(directory))
    service._registry = registered(namespace, other)
    reason = truncate(namespace, PAGE)
    with pytest.raises(WorkFailed) as caught:
        await service._flush_namespaces()
    assert caught.value.message == f"namespace ns: {reason}"
    assert "restore the file" in caught.value.hint


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (faults.Fault(8192, faults.BUS_ADRERR, 4096, 16384), "truncated /m from 16384 to 4096"),
        (faults.Fault(8192, faults.BUS_ADRERR, 16384, 16384), "/m fails at byte 8192"),
        (faults.Fault(8192, faults.BUS_MCEERR_AR, 16384, 16384), "memory error at byte 8192"),
        (faults.Fault(8192, faults.BUS_MCEERR_AR, 99999, 16384), "memory error at byte 8192"),
    ],
)
def test_a_reason_says_what_somebody_did_or_what_is_broken(
    fault: faults.Fault, reason: str
) -> None:
    assert reason in fault.reason(Path("/m"))
