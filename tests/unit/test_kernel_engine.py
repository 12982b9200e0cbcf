"""The kernel engine on its loop, with a kernel at the other end of a socket; no mount is made.

A socket of sequenced packets is to readv and writev what /dev/fuse is: a message each.
"""

import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from pmblk import Namespace
from pmblk.media.faults import BUS_MCEERR_AR, Fault
from pmblkd.fuse.files import Files
from pmblkd.fuse.kernel_engine import BATCH_REQUESTS, KernelEngine
from pmblkd.spin import Spinner
from tests.unit import fuse_kernel
from tests.unit.conftest import LogRecord, MakeNamespace, registered
from tests.unit.fuse_kernel import Op, io, message

NS = 2
PAGE = 4096
MESSAGE_BYTES = 1 << 20


class Client:
    """The kernel at the other end."""

    def __init__(self, end: socket.socket) -> None:
        self._end = trio.socket.from_stdlib_socket(end)

    async def send(self, request: bytes) -> None:
        await self._end.send(request)

    async def reply(self) -> tuple[int, int, bytes]:
        """Which request, its error, and the body."""
        with trio.fail_after(10):
            whole = await self._end.recv(MESSAGE_BYTES)
        header, body = fuse_kernel.split([whole])
        return header.unique, -header.error, body

    async def ask(self, request: bytes) -> tuple[int, int, bytes]:
        await self.send(request)
        return await self.reply()


@contextlib.asynccontextmanager
async def served(namespace: Namespace) -> AsyncIterator[tuple[KernelEngine, Client]]:
    files = Files(registered(namespace))
    engine = KernelEngine(
        files,
        Path("/mnt/x"),
        allow_other=False,
        options=[],
        request_timeout_seconds=0,
        spinner=Spinner(0),
    )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        for end in (ours, theirs):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_BYTES)
        engine._fd = ours.fileno()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.run)
            yield engine, Client(theirs)
            nursery.cancel_scope.cancel()


async def test_what_is_asked_is_answered(make_namespace: MakeNamespace) -> None:
    async with served(make_namespace()) as (_, client):
        assert (await client.ask(message(Op.WRITE, NS, io(5, 4, b"data"), unique=2)))[:2] == (2, 0)
        assert await client.ask(message(Op.READ, NS, io(4, 6), unique=4)) == (4, 0, b"\0data\0")
        assert await client.ask(message(Op.POLL, NS, unique=6)) == (6, errno.ENOSYS, b"")


async def test_what_wants_no_answer_gets_none(make_namespace: MakeNamespace) -> None:
    async with served(make_namespace()) as (_, client):
        await client.send(message(Op.FORGET, NS, bytes(8), unique=2))
        await client.send(b"short")
        assert (await client.ask(message(Op.GETATTR, NS, bytes(16), unique=4)))[:2] == (4, 0)


async def test_many_requests_at_once_are_all_answered(make_namespace: MakeNamespace) -> None:
    namespace = make_namespace()
    async with served(namespace) as (_, client):
        asked = range(2, 6 * BATCH_REQUESTS, 2)
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                for unique in asked:
                    await client.send(message(Op.READ, NS, io(0, 8), unique=unique))

            nursery.start_soon(ask)
            answered = [(await client.reply())[0] for _ in asked]
        assert answered == list(asked)
    assert namespace.representation.leases == 0


async def test_a_command_that_waits_holds_up_no_other_and_keeps_its_bytes(
    make_namespace: MakeNamespace,
) -> None:
    """The next message arrives in the buffer that its payload came in."""
    namespace = make_namespace()
    async with served(namespace) as (_, client):
        with namespace._dispatcher.fences.around(0, PAGE):
            await client.send(message(Op.WRITE, NS, io(0, 4, b"mine"), unique=2))
            other = message(Op.WRITE, NS, io(2 * PAGE, 4, b"next"), unique=4)
            assert (await client.ask(other))[0] == 4
        assert (await client.reply())[:2] == (2, 0)
        assert (await client.ask(message(Op.READ, NS, io(0, 4), unique=6)))[2] == b"mine"


async def test_a_read_that_waited_is_given_back_when_it_is_sent(
    make_namespace: MakeNamespace,
) -> None:
    namespace = make_namespace()
    async with served(namespace) as (_, client):
        await client.ask(message(Op.WRITE, NS, io(0, 4, b"data"), unique=2))
        with namespace._dispatcher.fences.around(0, PAGE):
            await client.send(message(Op.READ, NS, io(0, 4), unique=4))
            await trio.testing.wait_all_tasks_blocked()
        assert await client.reply() == (4, 0, b"data")
        assert namespace.representation.leases == 0


async def test_a_defect_is_an_io_error_and_the_mount_goes_on(
    make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch, logged: LogRecord
) -> None:
    namespace = make_namespace()
    async with served(namespace) as (_, client):
        with monkeypatch.context() as broken:
            broken.setattr(namespace, "execute", None)
            answer = await client.ask(message(Op.READ, NS, io(0, 4), unique=2))
        assert answer == (2, errno.EIO, b"")
        assert logged.expect("file operation failed")["exc_info"]
        assert (await client.ask(message(Op.READ, NS, io(0, 4), unique=4)))[:2] == (4, 0)


@pytest.mark.parametrize("error", [ZeroDivisionError("a defect"), OSError(errno.EFAULT, "copy")])
async def test_a_defect_in_what_waited_is_an_io_error_and_the_mount_goes_on(
    make_namespace: MakeNamespace,
    monkeypatch: pytest.MonkeyPatch,
    logged: LogRecord,
    error: Exception,
) -> None:
    namespace = make_namespace()

    async def fail(_commands: Any) -> None:
        raise error

    monkeypatch.setattr(namespace, "complete", fail)
    async with served(namespace) as (_, client):
        with namespace._dispatcher.fences.around(0, PAGE):
            answer = await client.ask(message(Op.READ, NS, io(0, 4), unique=2))
        assert answer == (2, errno.EIO, b"")
        assert logged.expect("file operation failed")["exc_info"]
        assert (await client.ask(message(Op.READ, NS, io(0, 4), unique=4)))[:2] == (4, 0)
    assert namespace.representation.leases == 0


@pytest.mark.parametrize("waits", [False, True])
async def test_a_reply_that_the_kernel_does_not_take_gives_its_memory_back(
    make_namespace: MakeNamespace,
    monkeypatch: pytest.MonkeyPatch,
    logged: LogRecord,
    waits: bool,
) -> None:
    namespace = make_namespace()
    refusals = [OSError(errno.EFAULT, os.strerror(errno.EFAULT))]
    writev = os.writev

    def refuse_once(fd: int, reply: Any) -> int:
        if refusals:
            raise refusals.pop()
        return writev(fd, reply)

    async with served(namespace) as (_, client):
        await client.ask(message(Op.WRITE, NS, io(0, 4, b"data"), unique=2))
        monkeypatch.setattr(os, "writev", refuse_once)
        with contextlib.ExitStack() as stack:
            if waits:
                stack.enter_context(namespace._dispatcher.fences.around(0, PAGE))
            await client.send(message(Op.READ, NS, io(0, 4), unique=4))
            await trio.testing.wait_all_tasks_blocked()
        assert await client.reply() == (4, errno.EIO, b"")
        assert namespace.representation.leases == 0
        logged.expect("file operation failed")
        assert (await client.ask(message(Op.READ, NS, io(0, 4), unique=6)))[2] == b"data"


@pytest.mark.parametrize("waits", [False, True])
async def test_a_reply_from_memory_that_its_file_has_lost_is_an_error_and_so_are_those_beside_it(
    make_namespace: MakeNamespace, waits: bool
) -> None:
    namespace = make_namespace()
    async with served(namespace) as (_, client):
        for page in (0, 8):
            await client.ask(message(Op.WRITE, NS, io(page * PAGE, PAGE, b"x" * PAGE), unique=2))
        os.truncate(namespace.media.path, PAGE)
        with contextlib.ExitStack() as stack:
            if waits:
                stack.enter_context(namespace._dispatcher.fences.around(0, namespace.size))
            await client.send(message(Op.READ, NS, io(8 * PAGE, PAGE), unique=4))
            await client.send(message(Op.READ, NS, io(0, PAGE), unique=6))
            await trio.testing.wait_all_tasks_blocked()
        assert sorted([await client.reply(), await client.reply()])[0] == (4, errno.EIO, b"")
        assert (await client.ask(message(Op.READ, NS, io(0, 4), unique=8)))[1] == errno.EIO
    assert "truncated" in namespace.failure()
    assert namespace.representation.leases == 0


async def test_when_media_fail_under_a_batch_none_of_its_replies_is_made_up(
    make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load that finds out about a bad page puts zeroes there, and the next reply is of that."""
    namespace = make_namespace()
    size = namespace.media.file_bytes
    refusals = [OSError(errno.EFAULT, os.strerror(errno.EFAULT))]
    writev = os.writev

    def refuse_once(fd: int, reply: Any) -> int:
        if refusals:
            namespace.health.fault = Fault(0, BUS_MCEERR_AR, size, size)
            raise refusals.pop()
        return writev(fd, reply)

    async with served(namespace) as (engine, client):
        await client.ask(message(Op.WRITE, NS, io(0, PAGE, b"x" * PAGE), unique=2))
        monkeypatch.setattr(os, "writev", refuse_once)
        read = message(Op.READ, NS, io(0, PAGE), unique=4), message(Op.READ, NS, io(0, 4), unique=6)
        engine._handle([memoryview(one) for one in read])
        assert [await client.reply(), await client.reply()] == [
            (4, errno.EIO, b""),
            (6, errno.EIO, b""),
        ]
    assert namespace.representation.leases == 0


@pytest.mark.parametrize("waits", [False, True])
async def test_what_cannot_be_answered_at_all_is_not_the_mount_s_end(
    make_namespace: MakeNamespace,
    monkeypatch: pytest.MonkeyPatch,
    logged: LogRecord,
    waits: bool,
) -> None:
    """Number 0 is no request's, and the kernel takes no answer to it."""
    namespace = make_namespace()

    def refuse(_fd: int, _reply: Any) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    async with served(namespace) as (_, client):
        with monkeypatch.context() as patched, contextlib.ExitStack() as stack:
            patched.setattr(os, "writev", refuse)
            if waits:
                stack.enter_context(namespace._dispatcher.fences.around(0, PAGE))
            await client.send(message(Op.READ, NS, io(0, 4), unique=0))
            await trio.testing.wait_all_tasks_blocked()
            stack.close()
            await trio.testing.wait_all_tasks_blocked()
        logged.expect("file operation failed")
        assert (await client.ask(message(Op.READ, NS, io(0, 4), unique=2)))[:2] == (2, 0)


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENODEV, errno.ECONNABORTED])
async def test_who_asked_may_be_gone_when_the_answer_comes(
    make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    namespace = make_namespace()

    def gone(_fd: int, _reply: Any) -> int:
        raise OSError(code, os.strerror(code))

    async with served(namespace) as (engine, client):
        await client.ask(message(Op.WRITE, NS, io(0, 4, b"data"), unique=2))
        with monkeypatch.context() as patched:
            patched.setattr(os, "writev", gone)
            await client.send(message(Op.READ, NS, io(0, 4), unique=4))
            await trio.testing.wait_all_tasks_blocked()
            engine.forget_size(NS)
        assert namespace.representation.leases == 0
        assert (await client.ask(message(Op.READ, NS, io(0, 4), unique=6)))[2] == b"data"


@pytest.mark.parametrize("code", [errno.ENODEV, errno.ECONNABORTED])
async def test_the_end_of_the_mount_ends_the_run_when_what_waits_is_done(
    make_namespace: MakeNamespace, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    namespace = make_namespace()

    def end(_fd: int, _buffers: Any) -> int:
        raise OSError(code, os.strerror(code))

    async with served(namespace) as (engine, client):
        with namespace._dispatcher.fences.around(0, PAGE):
            await client.send(message(Op.WRITE, NS, io(0, 4, b"late"), unique=2))
            await trio.testing.wait_all_tasks_blocked()
            monkeypatch.setattr(os, "readv", end)
            await client.send(b"wake up")
            await trio.testing.wait_all_tasks_blocked()
            assert len(engine._waiting.child_tasks) == 1
        assert (await client.reply())[:2] == (2, 0)
    assert bytes(namespace.media.view[:4]) == b"late"


async def test_a_file_that_grew_is_asked_about_again(make_namespace: MakeNamespace) -> None:
    async with served(make_namespace()) as (engine, client):
        engine.forget_size(NS)
        engine.forget_name("ns")
        whole = await client._end.recv(MESSAGE_BYTES)
        assert fuse_kernel.OutHeader.from_buffer_copy(whole).error == 2
        assert fuse_kernel.NotifyInvalInodeOut.from_buffer_copy(whole, 16).ino == NS
