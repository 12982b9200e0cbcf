"""An NBD export as a member of an array, through libnbd (package python3-libnbd, module `nbd`).

All requests of a batch are in flight at once, and so are all batches. Nothing is copied on the way:
libnbd reads into the views and writes out of them, and has them until the server has answered, also
when nobody waits any more. There is no task and no thread: of all who wait for the server one turns
the connection, for the others too, and hands that on when it has what it wants.

A connection that is lost stays lost: every I/O is ENOTCONN, which is the end of the member. A
server that has not answered in time has hung: while it owes an answer, nothing more is asked of it.

A server does not know of owners: that two arrays do not share an export, their superblocks say.
Sources: libnbd(3), nbd_aio_pread(3), nbd_get_block_size(3), nbd_zero(3).
"""

import errno
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio

from pmblk.errors import PmblkError
from pmblk.raid.member import Hung, Member, Request

SECTOR_BYTES = 512
BLOCK_BYTES = 4096
REQUEST_BYTES_MAX = 32 << 20  # what every server takes that does not say
ZERO_BYTES_MAX = 1 << 30  # a request has 32 bits for its length
RETIRED = 1  # what a completion returns when nobody will ask for it again

Issue = Callable[["_Batch"], None]


class _Batch:
    """`pending` requests are with the server; `news`: look again, or turn the connection."""

    def __init__(self) -> None:
        self.pending = 0
        self.error = 0
        self.news = trio.Event()


class NbdMember(Member):
    """Made by `connect`. Owns the connection."""

    def __init__(self, place: str, handle: Any, *, timeout_seconds: float) -> None:
        self.place = place
        self.block_bytes = max(SECTOR_BYTES, handle.get_block_size(_nbd().SIZE_MINIMUM))
        self.size = handle.get_size() // self.block_bytes * self.block_bytes
        self._handle = handle
        self._timeout_seconds = timeout_seconds
        most = handle.get_block_size(_nbd().SIZE_MAXIMUM) or REQUEST_BYTES_MAX
        self._request_bytes = max(BLOCK_BYTES, min(most, REQUEST_BYTES_MAX) & -BLOCK_BYTES)
        self._batches: dict[_Batch, None] = {}  # somebody waits for these
        self._hung: set[_Batch] = set()
        self._turner: _Batch | None = None
        self._waiting = trio.CancelScope()  # of the one who turns, for the server

    async def read(self, requests: Sequence[Request]) -> None:
        def issue(batch: _Batch) -> None:
            for offset, view in self._split(requests):
                self._handle.aio_pread(view, offset, self._completion(batch))

        await self._do(issue)

    async def write(self, requests: Sequence[Request]) -> None:
        def issue(batch: _Batch) -> None:
            for offset, view in self._split(requests):
                self._handle.aio_pwrite(view, offset, self._completion(batch))

        await self._do(issue)

    def _split(self, requests: Sequence[Request]) -> Sequence[Request]:
        """None of them is larger than the server takes."""
        most = self._request_bytes
        if all(len(view) <= most for _, view in requests):
            return requests
        return [
            Request(offset + position, view[position : position + most])
            for offset, view in requests
            for position in range(0, len(view), most)
        ]

    async def flush(self) -> None:
        await self._do(lambda batch: self._handle.aio_flush(self._completion(batch)))

    async def zero(self, offset: int, length: int) -> None:
        """Fast or not at all, where the server can tell; else its own way of writing zeroes."""
        handle = self._handle
        if handle is not None and not handle.can_zero():
            raise OSError(errno.EOPNOTSUPP, f"{self.place} cannot write zeroes")

        def issue(batch: _Batch) -> None:
            flags = _nbd().CMD_FLAG_FAST_ZERO if handle.can_fast_zero() else 0
            for position in range(0, length, ZERO_BYTES_MAX):
                piece = min(ZERO_BYTES_MAX, length - position)
                handle.aio_zero(piece, offset + position, self._completion(batch), flags)

        await self._do(issue)

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is None:
            return
        if self._turner is not None:
            trio.lowlevel.notify_closing(handle.aio_get_fd())
        _disconnect(handle)

    # ---- one batch

    async def _do(self, issue: Issue) -> None:
        """Raises OSError: of the first request that failed, ENOTCONN, or Hung."""
        batch = _Batch()
        try:
            self._check()
            self._issue(batch, issue)
            with trio.move_on_after(self._timeout_seconds):
                await self._until_done(batch)
        except _nbd().Error as error:
            self._check_connected()
            raise self._error(error.errnum or errno.EIO, _plain(error.string)) from error
        if batch.error:
            self._check_connected()
            raise self._error(batch.error, os.strerror(batch.error))
        if batch.pending:
            self._check_connected()
            self._hung.add(batch)
            raise Hung(self.place, self._timeout_seconds)

    def _check(self) -> None:
        self._check_connected()
        if self._hung and self._turner is None:
            self._handle.poll(0)  # nobody else would hear that it has come back
        if self._hung:
            raise Hung(self.place, self._timeout_seconds)

    def _check_connected(self) -> None:
        if self._handle is None:
            raise OSError(errno.ENODEV, "the member is closed")
        if self._handle.aio_is_dead() or self._handle.aio_is_closed():
            raise self._error(errno.ENOTCONN, "the connection is lost")

    def _error(self, code: int, words: str) -> OSError:
        return OSError(code, f"{self.place}: {words}")

    def _issue(self, batch: _Batch, issue: Issue) -> None:
        issue(batch)
        if self._handle.aio_get_direction() & _nbd().AIO_DIRECTION_WRITE:
            self._waiting.cancel()  # who turns may only be waiting for the server to speak

    def _completion(self, batch: _Batch) -> Callable[[Any], int]:
        batch.pending += 1

        def completed(error: Any) -> int:
            batch.pending -= 1
            batch.error = batch.error or error.value
            if not batch.pending:
                batch.news.set()
                self._hung.discard(batch)
            return RETIRED

        return completed

    # ---- the connection, turned by who waits

    async def _until_done(self, batch: _Batch) -> None:
        """Whoever leaves hands the turning on, so an end reaches them all, one after the other."""
        self._batches[batch] = None
        try:
            while batch.pending:
                self._check_connected()
                if self._turner is None:
                    await self._turn_for(batch)
                else:
                    batch.news = trio.Event()
                    await batch.news.wait()
        finally:
            del self._batches[batch]
            if self._turner is None and self._batches:
                next(iter(self._batches)).news.set()

    async def _turn_for(self, batch: _Batch) -> None:
        self._turner = batch
        try:
            with trio.CancelScope() as self._waiting:
                await _turn(self._handle)
        except* trio.ClosedResourceError:
            pass  # the member was closed meanwhile
        finally:
            self._turner = None


async def _turn(handle: Any) -> None:
    """Let it go on once there is something to receive, or room to send."""
    nbd = _nbd()
    fd, direction = handle.aio_get_fd(), handle.aio_get_direction()
    if direction == nbd.AIO_DIRECTION_BOTH:
        readable = await _readable_or_writable(fd)
    else:
        readable = direction == nbd.AIO_DIRECTION_READ
        await (trio.lowlevel.wait_readable if readable else trio.lowlevel.wait_writable)(fd)
    if readable:
        handle.aio_notify_read()
    else:
        handle.aio_notify_write()


async def _readable_or_writable(fd: int) -> bool:
    """Whether it is readable, once it is one of the two."""
    found: list[bool] = []

    async def wait(what: Callable[[int], Awaitable[None]], readable: bool) -> None:
        await what(fd)
        found.append(readable)
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, trio.lowlevel.wait_readable, True)
        nursery.start_soon(wait, trio.lowlevel.wait_writable, False)
    return True in found


def _disconnect(handle: Any) -> None:
    """The server is told if it can be told at once; the last reference closes the socket."""
    try:
        handle.aio_disconnect()
    except _nbd().Error:
        pass


# ---- connecting


async def connect(uri: str, *, read_only: bool, timeout_seconds: float) -> NbdMember:
    """Connected, and good enough to be a member. Raises PmblkError with what to do."""
    nbd = _nbd()
    handle = nbd.NBD()
    handle.set_uri_allow_local_file(True)  # keys and certificates of TLS that the URI names
    handle.set_pread_initialize(False)  # memory of a read that failed is not looked at
    try:
        with trio.fail_after(timeout_seconds):
            # In a thread for the name's sake: it is looked up while nobody else can go on.
            await trio.to_thread.run_sync(handle.aio_connect_uri, uri, abandon_on_cancel=True)
            while handle.aio_is_connecting():
                await _turn(handle)
        if not handle.aio_is_ready():
            raise nbd.Error("the server hung up", errno.ENOTCONN)
    except nbd.Error as error:
        raise PmblkError(
            f"cannot connect to {uri}: {_plain(error.string)}",
            hint="is the server there, and the URI right?",
        ) from error
    except trio.TooSlowError:
        raise PmblkError(
            f"{uri} does not answer in {timeout_seconds:g} s", hint="is its server there, and well?"
        ) from None
    _check(uri, handle, read_only=read_only)
    return NbdMember(uri, handle, timeout_seconds=timeout_seconds)


def _check(uri: str, handle: Any, *, read_only: bool) -> None:
    refusal = _refusal(handle, read_only=read_only)
    if refusal is not None:
        _disconnect(handle)
        words, hint = refusal
        raise PmblkError(f"{uri} {words}", hint=hint)


def _refusal(handle: Any, *, read_only: bool) -> tuple[str, str] | None:
    least = handle.get_block_size(_nbd().SIZE_MINIMUM)
    if least > BLOCK_BYTES:
        words = f"takes blocks of {least} bytes and more; a member needs {BLOCK_BYTES} or less"
        return words, "put nbdkit's blocksize filter in front of it"
    if read_only:
        return None
    if handle.is_read_only():
        return "is read-only", "let its server allow writing"
    if not handle.can_flush():
        words = "cannot be flushed: nobody could tell when a write is durable"
        return words, "choose a server that offers FLUSH"
    return None


def _plain(words: str) -> str:
    """What went wrong, without the name of the function that says so."""
    return words.split(": ", 1)[1] if words.startswith("nbd_") and ": " in words else words


def _nbd() -> Any:
    """The module, when it is wanted. Raises PmblkError where it is not installed."""
    try:
        import nbd
    except ImportError as error:
        raise PmblkError(
            "a member over NBD needs libnbd's Python module, which is not installed",
            hint="install the package python3-libnbd",
        ) from error
    return nbd
