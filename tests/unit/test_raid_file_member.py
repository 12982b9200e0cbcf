"""Files as members: what is moved, how it is joined, and what becomes of threads that hang."""

import errno
import os
import random
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from pmblk.raid import file_member
from pmblk.raid.buffers import buffer
from pmblk.raid.file_member import FileMember, go_direct, runs
from pmblk.raid.member import Hung, Request

SIZE = 8 << 20


@pytest.fixture(params=["tmpfs", "disk"])
def path(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file of `SIZE` bytes, once where I/O is done inline, and once where it is not."""
    place = {"tmpfs": "/dev/shm", "disk": "/var/tmp"}[request.param]
    with tempfile.TemporaryDirectory(prefix="pmblk-unit-", dir=place) as directory:
        path = Path(directory) / "member"
        path.write_bytes(bytes(SIZE))
        yield path


@pytest.fixture
def member(path: Path) -> Iterator[FileMember]:
    member = opened(path)
    yield member
    member.close()


def opened(path: Path, *, timeout_seconds: float = 30) -> FileMember:
    fd = os.open(path, os.O_RDWR)
    if not path.is_relative_to("/dev/shm"):
        go_direct(fd)
    return FileMember(str(path), fd, timeout_seconds=timeout_seconds)


def filled(length: int, seed: int = 0) -> memoryview:
    view = buffer(length)
    view[:] = random.Random(seed).randbytes(length)
    return view


async def test_what_is_written_is_read_and_is_in_the_file(member: FileMember, path: Path) -> None:
    first, second = filled(4096, 1), filled(3 << 20, 2)
    await member.write([Request(1 << 20, second), Request(8192, first)])
    await member.flush()
    content = path.read_bytes()
    assert content[8192 : 8192 + 4096] == first
    assert content[1 << 20 : 4 << 20] == second
    assert content.count(0) >= SIZE - len(first) - len(second), "and nothing else was touched"
    found = [buffer(4096), buffer(3 << 20)]
    await member.read([Request(8192, found[0]), Request(1 << 20, found[1])])
    assert found == [first, second]


async def test_random_batches_are_what_a_model_says(member: FileMember) -> None:
    chosen = random.Random(5)
    model = bytearray(SIZE)
    for seed in range(20):
        edges = sorted(chosen.sample(range(SIZE // 4096), 8))
        pairs = list(zip(edges[::2], edges[1::2], strict=True))
        chosen.shuffle(pairs)
        batch = [Request(start * 4096, filled((end - start) * 4096, seed)) for start, end in pairs]
        await member.write(batch)
        for offset, view in batch:
            model[offset : offset + len(view)] = view
        again = [Request(offset, buffer(len(view))) for offset, view in batch]
        await member.read(again)
        assert [one.view for one in again] == [one.view for one in batch]
    whole = buffer(SIZE)
    await member.read([Request(0, whole)])
    assert whole == model


async def test_zeroes_give_the_space_back(member: FileMember, path: Path) -> None:
    await member.write([Request(0, filled(SIZE))])
    await member.flush()
    before = path.stat().st_blocks
    await member.zero(4096, SIZE - 8192)
    assert path.stat().st_blocks < before / 2
    assert not path.read_bytes()[4096:-4096].strip(b"\0")


async def test_the_end_of_a_file_that_was_cut_is_an_error(member: FileMember, path: Path) -> None:
    os.truncate(path, 4096)
    with pytest.raises(OSError, match="4096 of 8192 bytes were read at 0") as caught:
        await member.read([Request(0, buffer(8192))])
    assert caught.value.errno == errno.EIO


async def test_a_file_that_was_cut_is_not_made_longer_again_with_holes_for_what_was_lost(
    member: FileMember, path: Path
) -> None:
    """Reads would find zeroes there, and nobody would make up for them."""
    os.truncate(path, SIZE - 8192)
    with pytest.raises(OSError, match="was cut short"):
        await member.write([Request(SIZE - 4096, filled(4096))])
    assert path.stat().st_size == SIZE - 8192


async def test_a_write_that_the_system_cuts_short_is_an_error(
    member: FileMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwritev", lambda fd, views, offset: 512)
    with pytest.raises(OSError, match="512 of 4096 bytes were written at 0"):
        await member.write([Request(0, buffer(4096))])


async def test_nobody_uses_a_member_that_was_closed(member: FileMember) -> None:
    member.close()
    member.close()
    with pytest.raises(OSError, match="closed"):
        await member.read([Request(0, buffer(4096))])
    with pytest.raises(OSError, match="closed"):
        await member.flush()


async def test_others_have_their_turn_in_a_long_batch_on_tmpfs(directory: Path) -> None:
    path = directory / "member"
    path.write_bytes(bytes(SIZE))
    member = opened(path)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        await member.write([Request(0, filled(SIZE))])
        nursery.cancel_scope.cancel()
    assert turns >= SIZE // file_member.SLICE_BYTES // 2
    member.close()


# ---- joining


def test_neighbours_are_one_run_whatever_their_order() -> None:
    views = [memoryview(bytes(4096)) for _ in range(4)]
    requests = [
        Request(offset, view)
        for offset, view in zip((8192, 4096, 65536, 12288), views, strict=True)
    ]
    found = list(runs(requests, bytes_max=1 << 20))
    assert [(offset, len(parts)) for offset, parts in found] == [(4096, 3), (65536, 1)]


def test_a_run_is_cut_where_it_is_too_long_for_one_call() -> None:
    view = memoryview(bytes(range(256)) * 48)  # three blocks
    found = list(runs([Request(0, view), Request(12288, view)], bytes_max=8192))
    assert [(offset, sum(map(len, parts))) for offset, parts in found] == [
        *((0, 8192), (8192, 8192), (16384, 8192)),
    ]
    assert b"".join(part for _, parts in found for part in parts) == bytes(view) * 2
    many = [Request(4096 * i, memoryview(bytes(4096))) for i in range(1500)]
    assert [len(parts) for _, parts in runs(many, bytes_max=1 << 30)] == [1024, 476]


# ---- hangs


class Stuck:
    """Calls of a member that do not come back until they are let go."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on = threading.Event()
        self.begun = threading.Semaphore(0)
        self.fds: list[int] = []
        self._read = os.preadv
        monkeypatch.setattr(os, "preadv", self._stuck_read)
        self.member = FileMember(str(path), os.open(path, os.O_RDWR), timeout_seconds=0.05)
        self.member.inline = False

    def _stuck_read(self, fd: int, views: list[memoryview], offset: int) -> int:
        self.fds.append(fd)
        self.begun.release()
        assert self.go_on.wait(30)
        return self._read(fd, views, offset)

    async def until_back(self) -> None:
        self.go_on.set()
        with trio.fail_after(10):
            for call in [*self.member._threads._running]:
                await call.done.wait()


@pytest.fixture
def stuck(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    path = directory / "member"
    path.write_bytes(b"x" * SIZE)
    stuck = Stuck(path, monkeypatch)
    yield stuck
    stuck.go_on.set()


async def test_a_thread_that_is_not_back_in_time_has_hung(stuck: Stuck) -> None:
    with pytest.raises(Hung, match=r"does not answer in 0\.05 s") as caught:
        await stuck.member.read([Request(0, buffer(4096))])
    assert caught.value.errno == errno.ETIMEDOUT
    await stuck.until_back()


async def test_nothing_is_asked_of_a_member_that_hangs_and_all_when_it_is_back(
    stuck: Stuck,
) -> None:
    with pytest.raises(Hung):
        await stuck.member.read([Request(0, buffer(4096))])
    for _ in range(20):
        with pytest.raises(Hung):
            await stuck.member.flush()
    assert len(stuck.fds) == 1
    await stuck.until_back()
    view = buffer(4096)
    await stuck.member.read([Request(0, view)])
    assert view == b"x" * 4096


async def test_those_in_the_queue_of_a_member_that_hangs_are_told(stuck: Stuck) -> None:
    told = 0

    async def read() -> None:
        nonlocal told
        with pytest.raises(Hung):
            await stuck.member.read([Request(0, buffer(4096))])
        told += 1

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(3 * file_member.THREADS_MAX):
                nursery.start_soon(read)
    assert told == 3 * file_member.THREADS_MAX
    assert len(stuck.fds) == file_member.THREADS_MAX
    await stuck.until_back()


async def test_the_file_is_not_closed_under_a_thread_that_hangs(stuck: Stuck) -> None:
    view = buffer(4096)
    with pytest.raises(Hung):
        await stuck.member.read([Request(0, view)])
    stuck.member.close()
    (fd,) = stuck.fds
    os.fstat(fd)
    await stuck.until_back()
    assert view == b"x" * 4096, "it read what it was asked to, from the file it was given"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


async def test_whoever_is_cancelled_leaves_at_once_and_the_thread_goes_on(stuck: Stuck) -> None:
    stuck.member._threads._timeout_seconds = 30
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stuck.member.read, [Request(0, buffer(4096))])
        await trio.to_thread.run_sync(stuck.begun.acquire)
        nursery.cancel_scope.cancel()
    assert len(stuck.member._threads._running) == 1
    await stuck.until_back()
    assert not stuck.member._threads._running


async def test_threads_of_one_member_are_bounded_and_a_queue_is_no_hang(stuck: Stuck) -> None:
    stuck.member._threads._timeout_seconds = 30
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(3 * file_member.THREADS_MAX):
                nursery.start_soon(stuck.member.read, [Request(0, buffer(4096))])
            for _ in range(file_member.THREADS_MAX):
                await trio.to_thread.run_sync(stuck.begun.acquire)
            await trio.testing.wait_all_tasks_blocked()
            assert len(stuck.fds) == file_member.THREADS_MAX
            stuck.go_on.set()
    assert len(stuck.fds) == 3 * file_member.THREADS_MAX


async def test_a_file_that_became_larger_is_as_large_as_it_is_when_it_is_asked(
    member: FileMember, path: Path
) -> None:
    os.truncate(path, SIZE + 8192 + 7)
    assert member.size == SIZE
    await member.refresh()
    assert member.size == SIZE + 8192
