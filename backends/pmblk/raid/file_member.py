"""A regular file or a block device as a member of an array.

On tmpfs an I/O is a copy of memory, and is done on the event loop, a slice at a time. Everywhere
else a batch is one call in a thread, past the page cache (O_DIRECT) where the file can do that.
Requests that lie next to each other become one system call.

A thread that is not back in time has hung: whoever waits is told (`Hung`), and while it is away
nothing more is asked of the device. It goes on, with the memory of its batch, and has the file open
until it comes back. Trio's own limit of threads is not touched by any of this.

Not here: how a path becomes an open file that is ours alone (`pmblk.raid.opening`).
Sources: open(2), readv(2), fallocate(2), ioctl(2) BLKSSZGET.
"""

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence

import trio

from pmblk.media import syscalls
from pmblk.raid.buffers import buffer
from pmblk.raid.member import Hung, Member, Request

IN_MEMORY = frozenset({"tmpfs", "ramfs"})
BLKSSZGET = 0x1268  # linux/fs.h
SECTOR_BYTES = 512
BLOCK_BYTES = 4096
SLICE_BYTES = 1 << 20  # of a copy on the event loop: about 0.2 ms
PUNCH_BYTES = 4 << 20  # punching 4 MiB of tmpfs takes about 1 ms
CALL_BYTES = 1 << 30  # a system call moves less than 2 GiB
IOV_MAX = 1024
THREADS_MAX = 8  # of a member

Move = Callable[[int, Sequence[memoryview], int], int]
Run = tuple[int, list[memoryview]]


class FileMember(Member):
    """Owns `fd`, and closes it when the member is closed and no thread uses it any more."""

    def __init__(self, place: str, fd: int, *, timeout_seconds: float) -> None:
        self.place = place
        self.block_bytes = _block_bytes(fd)
        self.size = self._size_of(fd)
        self._file = _SharedFile(fd)
        self._is_regular = _is_regular(fd)
        self.inline = syscalls.file_system(fd) in IN_MEMORY and self._is_regular
        self._threads = _Threads(place, timeout_seconds)

    async def read(self, requests: Sequence[Request]) -> None:
        await self._move(requests, lambda fd, views, offset: os.preadv(fd, views, offset), "read")

    async def write(self, requests: Sequence[Request]) -> None:
        await self._move(requests, self._write, "written")

    def _write(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        """A file that somebody has truncated is not to grow again: its holes would be zeroes for
        whoever reads them, where there are errors now, which the array makes up for.
        """
        if self._is_regular and os.fstat(fd).st_size < self.size:
            raise OSError(errno.EIO, f"{self.place} was cut short")
        return os.pwritev(fd, views, offset)

    async def _move(self, requests: Sequence[Request], move: Move, done: str) -> None:
        if self.inline:
            for number, run in enumerate(runs(requests, bytes_max=SLICE_BYTES)):
                if number:
                    await trio.lowlevel.checkpoint()
                with self._file as fd:
                    self._move_run(fd, run, move, done)
            return

        def move_all(fd: int) -> None:
            for run in runs(requests, bytes_max=CALL_BYTES):
                self._move_run(fd, run, move, done)

        await self._threads.run(self._file, move_all)

    def _move_run(self, fd: int, run: Run, move: Move, done: str) -> None:
        offset, views = run
        wanted = sum(map(len, views))
        moved = move(fd, views, offset)
        if moved != wanted:
            words = f"{self.place}: {moved} of {wanted} bytes were {done} at {offset}"
            raise OSError(errno.EIO, words)

    async def flush(self) -> None:
        """A block device empties its cache by this, as a disk under a file does."""
        if self.inline:
            with self._file as fd:
                os.fdatasync(fd)
            return
        await self._threads.run(self._file, os.fdatasync)

    async def zero(self, offset: int, length: int) -> None:
        if not self.inline:
            await self._threads.run(self._file, lambda fd: syscalls.punch_hole(fd, offset, length))
            return
        for position in range(offset, offset + length, PUNCH_BYTES):
            if position > offset:
                await trio.lowlevel.checkpoint()
            with self._file as fd:
                piece = min(PUNCH_BYTES, offset + length - position)
                syscalls.punch_hole(fd, position, piece)

    async def refresh(self) -> None:
        with self._file as fd:
            self.size = self._size_of(fd)

    def _size_of(self, fd: int) -> int:
        return os.lseek(fd, 0, os.SEEK_END) // self.block_bytes * self.block_bytes

    def close(self) -> None:
        self._threads.close()
        self._file.close()


def runs(requests: Sequence[Request], *, bytes_max: int) -> Iterator[Run]:
    """The requests by their offsets, each run an offset and what lies there one after the other.

    A run has at most `bytes_max` bytes, whole blocks, and as many views as one call takes.
    """
    views: list[memoryview] = []
    start = end = 0
    for offset, view in sorted(requests, key=lambda request: request.offset):
        position = 0
        while position < len(view):
            place = offset + position
            if views and (place != end or end - start >= bytes_max or len(views) >= IOV_MAX):
                yield start, views
                views = []
            if not views:
                start = end = place
            piece = view[position : position + bytes_max - (end - start)]
            views.append(piece)
            position += len(piece)
            end += len(piece)
    if views:
        yield start, views


class _SharedFile:
    """A file descriptor with users; the last one to leave closes it, on any thread."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._changes = threading.Lock()
        self._users = 1
        self._closed = False

    def __enter__(self) -> int:
        with self._changes:
            if self._closed:
                raise OSError(errno.ENODEV, "the member is closed")
            self._users += 1
        return self._fd

    def __exit__(self, *_: object) -> None:
        with self._changes:
            self._users -= 1
            last = not self._users
        if last:
            os.close(self._fd)

    def close(self) -> None:
        """No new users from now on."""
        with self._changes:
            closed, self._closed = self._closed, True
        if not closed:
            self.__exit__()


class _Call:
    """Something that a thread does; `done` when it is back, also if nobody waits any more."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: BaseException | None = None


class _Threads:
    """The calls of one member: so many at a time, and no new one while one has hung."""

    def __init__(self, place: str, timeout_seconds: float) -> None:
        self._place = place
        self._timeout_seconds = timeout_seconds
        self._running: set[_Call] = set()
        self._hung: set[_Call] = set()
        self._queue = trio.lowlevel.ParkingLot()
        self._closed = False

    async def run(self, file: _SharedFile, work: Callable[[int], None]) -> None:
        """`work(fd)` in a thread. Raises what it raises (OSError), or Hung.

        Time counts from its start: a long queue on a slow disk is no hang.
        """
        while len(self._running) >= THREADS_MAX and not self._hung and not self._closed:
            await self._queue.park()
        if self._hung:
            raise Hung(self._place, self._timeout_seconds)
        call = self._start(file, work)
        with trio.move_on_after(self._timeout_seconds):
            await call.done.wait()
        if not call.done.is_set():
            self._hung.add(call)
            self._queue.unpark_all()
            raise Hung(self._place, self._timeout_seconds)
        if call.error is not None:
            raise call.error

    def _start(self, file: _SharedFile, work: Callable[[int], None]) -> _Call:
        """Not `trio.to_thread`: that may leave, cancelled, before the thread has even begun."""
        fd = file.__enter__()
        call, loop = _Call(), trio.lowlevel.current_trio_token()

        def run() -> None:
            try:
                work(fd)
            except BaseException as error:
                call.error = error
            file.__exit__()
            try:
                loop.run_sync_soon(self._end, call)
            except trio.RunFinishedError:
                pass  # it hung for longer than the program ran

        trio.lowlevel.start_thread_soon(run, lambda _: None)
        self._running.add(call)
        return call

    def _end(self, call: _Call) -> None:
        self._running.remove(call)
        self._hung.discard(call)
        call.done.set()
        self._queue.unpark()

    def close(self) -> None:
        """Who is in the queue finds the file closed."""
        self._closed = True
        self._queue.unpark_all()


# ---- what a file takes


def _is_regular(fd: int) -> bool:
    return stat.S_ISREG(os.fstat(fd).st_mode)


def go_direct(fd: int) -> None:
    """Past the page cache from now on, if the file can do that with blocks of at most 4 KiB.

    Only a try tells what a file of a file system takes: not all of them have statx's alignment.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.preadv(fd, [buffer(BLOCK_BYTES)], 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def _block_bytes(fd: int) -> int:
    """The smallest I/O: a device's logical block, or what a file takes."""
    if not _is_regular(fd):
        return int.from_bytes(fcntl.ioctl(fd, BLKSSZGET, bytes(4)), "little")
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
        try:
            os.preadv(fd, [buffer(SECTOR_BYTES)], SECTOR_BYTES)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return BLOCK_BYTES
    return SECTOR_BYTES
