"""How the kernel engine takes requests in batches, with a socket in the place of /dev/fuse.

One that keeps messages apart, as the device does; what the messages say is `pmblkd.fuse.session`'s.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import trio

from pmblk import Command, Namespace
from pmblkd.fuse import mounting, wire
from pmblkd.fuse.files import Files
from pmblkd.fuse.kernel_engine import KernelEngine
from pmblkd.fuse.wire import Opcode
from pmblkd.spin import Spinner
from tests.unit.conftest import LogRecord, MakeNamespace, registered, write

PAGE = 4096
REPLY_SECONDS = 5


class Client:
    """The kernel's end. Requests are numbered; `sizes` are those of the batches executed."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self.sizes: list[int] = []

    def send(self, opcode: Opcode, number: int, inode: int, body: bytes) -> None:
        length = wire.IN_HEADER.size + len(body)
        self._end.send(wire.IN_HEADER.pack(length, opcode, number, inode, 0, 0, 0, 0, 0) + body)

    def send_read(self, number: int, offset: int, *, inode: int = 2) -> None:
        self.send(Opcode.READ, number, inode, struct.pack("<QQI20x", 0, offset, PAGE))

    def send_write(self, number: int, offset: int, data: bytes) -> None:
        body = struct.pack("<QQI20x", 0, offset, len(data)) + data
        self.send(Opcode.WRITE, number, 2, body)

    async def replies(self, count: int) -> dict[int, tuple[int, bytes]]:
        """Of so many requests, by number: errno and what follows."""
        found: dict[int, tuple[int, bytes]] = {}
        with trio.fail_after(REPLY_SECONDS):
            while len(found) < count:
                await trio.lowlevel.wait_readable(self._end)
                reply = self._end.recv(1 << 16)
                _, error, number = wire.OUT_HEADER.unpack_from(reply)
                found[number] = -error, reply[wire.OUT_HEADER.size :]
        return found

    def watch(self, namespace: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
        execute = namespace.execute

        def watched(commands: Sequence[Command]) -> Sequence[Command]:
            self.sizes.append(len(commands))
            return execute(commands)

        monkeypatch.setattr(namespace, "execute", watched)


@pytest.fixture
def namespaces(make_namespace: MakeNamespace) -> Sequence[Namespace]:
    """Two, of which every page tells its namespace and its number."""
    made = [make_namespace(name="one.img"), make_namespace(name="two.img")]
    made[1].name = "two"
    for index, namespace in enumerate(made):
        commands = [write(page * PAGE, content(index, page)) for page in range(16)]
        assert not namespace.execute(commands)
    return made


def content(index: int, page: int) -> bytes:
    return bytes([16 * index + page]) * PAGE


@pytest.fixture
def client() -> Iterator[tuple[Client, socket.socket]]:
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, ours:
        ours.setblocking(False)
        yield Client(theirs), ours


@pytest.fixture
def served(
    namespaces: Sequence[Namespace],
    client: tuple[Client, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[KernelEngine, Client]]:
    """An engine that has shaken hands."""
    end, ours = client
    monkeypatch.setattr(mounting, "mount", lambda *_, **_options: os.dup(ours.fileno()))
    end.watch(namespaces[0], monkeypatch)
    engine = KernelEngine(
        Files(registered(*namespaces)),
        Path("/nowhere"),
        allow_other=False,
        options=[],
        request_timeout_seconds=0,
        spinner=Spinner(0),
    )
    end.send(Opcode.INIT, 99, 0, wire.INIT_IN.pack(7, 45, 0, 0))
    engine.mount()
    yield engine, end
    engine.unmount()


Served = tuple[KernelEngine, Client]


async def answers(served: Served, numbers: Iterable[int]) -> list[tuple[int, bytes]]:
    """What these requests, which were sent, are answered, in this order."""
    engine, client = served
    numbers = list(numbers)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        found = await client.replies(len(numbers))
        nursery.cancel_scope.cancel()
    return [found[number] for number in numbers]


@pytest.fixture
async def greeted(served: Served) -> Served:
    await served[1].replies(1)
    return served


async def test_requests_that_are_there_are_executed_in_growing_batches(greeted: Served) -> None:
    for page in range(7):
        greeted[1].send_read(page + 1, page * PAGE)
    assert await answers(greeted, range(1, 8)) == [(0, content(0, page)) for page in range(7)]
    assert greeted[1].sizes == [1, 2, 4]


async def test_a_client_that_sends_one_at_a_time_never_waits_for_a_second(
    greeted: Served,
) -> None:
    engine, client = greeted
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        for number in (1, 2, 3, 4):
            client.send_read(number, 0)
            assert await client.replies(1) == {number: (0, content(0, 0))}
        nursery.cancel_scope.cancel()
    assert client.sizes == [1, 1, 1, 1]


async def test_what_a_batch_writes_comes_from_the_message_of_each(
    greeted: Served, namespaces: Sequence[Namespace]
) -> None:
    data = {number: bytes([number]) * (100 + number) for number in range(1, 8)}
    for number, payload in data.items():
        greeted[1].send_write(number, number * PAGE + 5, payload)
    assert all(code == 0 for code, _ in await answers(greeted, data))
    for number, payload in data.items():
        start = number * PAGE + 5
        assert bytes(namespaces[0].media.view[start : start + len(payload)]) == payload
    assert greeted[1].sizes == [1, 2, 4]


async def test_a_batch_for_two_namespaces_is_answered_by_each(greeted: Served) -> None:
    for number in range(1, 8):
        greeted[1].send_read(number, number * PAGE, inode=2 + number % 2)
    expected = [(0, content(number % 2, number)) for number in range(1, 8)]
    assert await answers(greeted, range(1, 8)) == expected


async def test_what_is_malformed_leaves_the_rest_of_its_batch_alone(greeted: Served) -> None:
    greeted[1].send_read(1, 0)
    greeted[1].send(Opcode.READ, 2, 2, b"short")
    greeted[1].send_read(3, PAGE)
    code = (errno.EINVAL, b"")
    expected = [(0, content(0, 0)), code, (0, content(0, 1))]
    assert await answers(greeted, (1, 2, 3)) == expected


async def test_what_a_batch_read_is_given_back(
    greeted: Served, namespaces: Sequence[Namespace]
) -> None:
    for number in range(1, 8):
        greeted[1].send_read(number, number * PAGE)
    await answers(greeted, range(1, 8))
    assert namespaces[0].representation.leases == 0


async def test_a_defect_fails_its_batch_and_not_the_next(
    greeted: Served,
    namespaces: Sequence[Namespace],
    monkeypatch: pytest.MonkeyPatch,
    logged: LogRecord,
) -> None:
    execute, failed = namespaces[0].execute, []

    def fail_the_second(commands: Sequence[Command]) -> Sequence[Command]:
        if len(commands) == 2:
            failed.append(commands)
            raise ZeroDivisionError
        return execute(commands)

    monkeypatch.setattr(namespaces[0], "execute", fail_the_second)
    for number in range(1, 8):
        greeted[1].send_read(number, number * PAGE)
    codes = [code for code, _ in await answers(greeted, range(1, 8))]
    assert codes == [0, errno.EIO, errno.EIO, 0, 0, 0, 0]
    assert len(failed) == 1
    assert logged.expect("file operation failed")["exc_info"]
