"""A connection over a socket pair: what waits, what is stuck, and how it ends."""

import contextlib
import itertools
import os
import socket
from collections.abc import AsyncIterator, Iterator

import pytest
import trio
import trio.testing

from pmblk import BlockDevice, Command, Namespace
from pmblk.media.faults import BUS_MCEERR_AR, Fault
from pmblkd.nbd import connection as connection_module
from pmblkd.nbd.connection import Connection, Use
from pmblkd.nbd.handshake import Export, Handshake
from pmblkd.nbd.requests import RequestStream
from pmblkd.spin import Spinner
from tests.unit import nbd_client as client
from tests.unit.conftest import LogRecord, MakeNamespace, write

READ, WRITE, DISC, FLUSH = 0, 1, 2, 3


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, trio.socket.SocketType]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    yield ours, trio.socket.from_stdlib_socket(theirs)
    ours.close()
    theirs.close()


def handshake(namespace: BlockDevice) -> Handshake:
    export = Export("ns", "", namespace.size, read_only=False, preferred_block=4096)
    return Handshake({"ns": export}, default="ns")


def user_of(namespace: BlockDevice) -> Use:
    return lambda _name: contextlib.nullcontext(namespace)


@contextlib.asynccontextmanager
async def serving(
    namespace: BlockDevice, sock: socket.socket, *, spinner: Spinner | None = None
) -> AsyncIterator[Connection]:
    """A connection that runs; leaving waits for its end."""
    served = Connection(sock, peer="test", spinner=spinner or Spinner(0))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(served.run, handshake(namespace), user_of(namespace))
        yield served


async def receive_exactly(sock: trio.socket.SocketType, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = await sock.recv(length - len(data))
        assert piece, f"ended after {len(data)} of {length} bytes"
        data += piece
    return data


async def go(sock: trio.socket.SocketType) -> None:
    """The least handshake: EXPORT_NAME, so that replies are simple."""
    await receive_exactly(sock, 18)
    await sock.send(client.flags() + client.option(1, b"ns"))
    await receive_exactly(sock, 10)


class SlowFlush:
    """A namespace whose flush takes until it is let."""

    def __init__(self, namespace: Namespace) -> None:
        self.go_on = trio.Event()
        self.batches: list[int] = []
        self._execute = namespace.execute
        namespace.execute = self.execute  # type: ignore[method-assign, assignment]
        namespace.complete = self.complete  # type: ignore[method-assign, assignment]

    def execute(self, commands: list[Command]) -> list[Command]:
        flushes = [command for command in commands if command.opcode == 0]
        self._execute([command for command in commands if command.opcode != 0])
        return flushes

    async def complete(self, commands: list[Command]) -> list[Command]:
        self.batches.append(len(commands))
        await self.go_on.wait()
        return []


async def test_a_flush_that_waits_holds_up_no_later_read(
    make_namespace: MakeNamespace, pair: tuple[socket.socket, trio.socket.SocketType]
) -> None:
    namespace = make_namespace()
    slow = SlowFlush(namespace)
    ours, theirs = pair
    async with serving(namespace, ours):
        await go(theirs)
        await theirs.send(client.request(FLUSH, 1) + client.request(READ, 2, 0, 4))
        assert client.replies(await receive_exactly(theirs, 20), {2: 4})[0].cookie == 2
        await theirs.send(client.request(FLUSH, 3) + client.request(FLUSH, 4))
        await trio.testing.wait_all_tasks_blocked()
        slow.go_on.set()
        flushed = client.replies(await receive_exactly(theirs, 48), {})
        assert [reply.cookie for reply in flushed] == [1, 3, 4]
        assert slow.batches == [1, 2], "those that came meanwhile are completed together"
        await theirs.send(client.request(DISC))


async def test_disc_answers_what_waits_before_it_closes(
    make_namespace: MakeNamespace, pair: tuple[socket.socket, trio.socket.SocketType]
) -> None:
    namespace = make_namespace()
    slow = SlowFlush(namespace)
    ours, theirs = pair
    async with serving(namespace, ours):
        await go(theirs)
        await theirs.send(client.request(FLUSH, 1) + client.request(DISC))
        await trio.testing.wait_all_tasks_blocked()
        slow.go_on.set()
        assert client.replies(await receive_exactly(theirs, 16), {})[0].cookie == 1
        assert await theirs.recv(1) == b""


async def test_a_stop_answers_what_has_arrived_and_ends(
    make_namespace: MakeNamespace, pair: tuple[socket.socket, trio.socket.SocketType]
) -> None:
    namespace = make_namespace()
    ours, theirs = pair
    async with serving(namespace, ours) as served:
        await go(theirs)
        await trio.testing.wait_all_tasks_blocked()
        await theirs.send(client.request(READ, 5, 0, 4))
        served.stop()
        assert client.replies(await receive_exactly(theirs, 20), {5: 4})[0].cookie == 5
        assert await theirs.recv(1) == b""


async def test_a_client_that_vanishes_while_its_flush_waits_ends_quietly(
    make_namespace: MakeNamespace, pair: tuple[socket.socket, trio.socket.SocketType]
) -> None:
    namespace = make_namespace()
    slow = SlowFlush(namespace)
    ours, theirs = pair
    async with serving(namespace, ours):
        await go(theirs)
        await theirs.send(client.request(FLUSH, 1))
        await trio.testing.wait_all_tasks_blocked()
        theirs.close()
        slow.go_on.set()
    assert namespace.representation.leases == 0


async def test_a_client_that_never_reads_is_not_received_from_and_keeps_its_leases_bounded(
    make_namespace: MakeNamespace, pair: tuple[socket.socket, trio.socket.SocketType]
) -> None:
    namespace = make_namespace()
    namespace.media.reserve(0, namespace.size)
    ours, theirs = pair
    requests = b"".join(client.request(READ, n, 0, namespace.size) for n in range(2000))
    async with serving(namespace, ours):
        await go(theirs)
        with trio.move_on_after(0.2):
            while requests:
                requests = requests[await theirs.send(requests) :]
        await trio.testing.wait_all_tasks_blocked()
        assert 0 < namespace.representation.leases <= 512
        theirs.close()
    assert namespace.representation.leases == 0


async def test_a_slow_reader_loses_its_connection_when_others_wait_for_its_memory(
    make_namespace: MakeNamespace,
    pair: tuple[socket.socket, trio.socket.SocketType],
    autojump_clock: trio.testing.MockClock,
) -> None:
    namespace = make_namespace()
    namespace.media.reserve(0, namespace.size)
    namespace._completer.starved = 1
    ours, theirs = pair
    async with serving(namespace, ours):
        await go(theirs)
        await theirs.send(b"".join(client.request(READ, n, 0, namespace.size) for n in range(20)))
    waited = trio.current_time()
    assert connection_module.LEASE_PATIENCE_SECONDS <= waited < 60
    assert namespace.representation.leases == 0


async def test_a_trickle_of_reading_is_no_excuse(
    make_namespace: MakeNamespace,
    pair: tuple[socket.socket, trio.socket.SocketType],
    autojump_clock: trio.testing.MockClock,
) -> None:
    namespace = make_namespace()
    namespace.media.reserve(0, namespace.size)
    namespace._completer.starved = 1
    ours, theirs = pair

    async def trickle() -> None:
        with trio.move_on_after(60):
            while await theirs.recv(64 << 10):
                await trio.sleep(4)

    async with trio.open_nursery() as nursery, serving(namespace, ours):
        await go(theirs)
        await theirs.send(b"".join(client.request(READ, n, 0, namespace.size) for n in range(20)))
        nursery.start_soon(trickle)
        await trio.sleep(3 * connection_module.LEASE_PATIENCE_SECONDS)
        assert namespace.representation.leases == 0, "it was cut off"


async def test_nothing_follows_a_reply_that_was_cut_off(
    pair: tuple[socket.socket, trio.socket.SocketType],
) -> None:
    ours, theirs = pair
    served = Connection(ours, peer="test", spinner=Spinner(0))
    with trio.move_on_after(0.05):
        await served._send([bytes(64 << 20)])
    with pytest.raises(connection_module.Disconnected):
        await served._send([b"would be taken for data"])
    received = 0
    while data := await theirs.recv(1 << 20):
        assert not data.strip(b"\0")
        received += len(data)
    assert received < 64 << 20


async def test_a_send_that_fails_breaks_the_connection_for_every_sender(
    pair: tuple[socket.socket, trio.socket.SocketType],
) -> None:
    """The kernel refuses memory that is gone (EFAULT) after a part of the reply has left."""
    ours, theirs = pair
    served = Connection(ours, peer="test", spinner=Spinner(0))
    real, calls = ours.sendmsg, []

    class Failing:
        def sendmsg(self, buffers: list[bytes]) -> int:
            calls.append(len(buffers))
            if len(calls) > 1:
                raise OSError(14, "Bad address")
            return real([b"half"])

        def shutdown(self, how: int) -> None:
            ours.shutdown(how)

    served._sock = Failing()  # type: ignore[assignment]
    with pytest.raises(connection_module.Disconnected, match="Bad address"):
        await served._send([b"half a reply"])
    assert await theirs.recv(100) == b"half"
    with trio.fail_after(5):
        assert await theirs.recv(100) == b""


async def test_a_reply_from_memory_that_its_file_has_lost_ends_the_connection_and_the_namespace(
    make_namespace: MakeNamespace,
    pair: tuple[socket.socket, trio.socket.SocketType],
    logged: LogRecord,
) -> None:
    """The kernel cannot send from there (EFAULT), and nobody knew until then."""
    namespace = make_namespace(1 << 20)
    namespace.execute([write(0, b"x" * namespace.size)])
    ours, theirs = pair
    async with serving(namespace, ours):
        await go(theirs)
        os.truncate(namespace.media.path, 4096)
        await theirs.send(client.request(READ, 1, 1 << 19, 1 << 16))
        with trio.fail_after(5):
            received = await theirs.recv(1 << 20)
            while data := await theirs.recv(1 << 20):
                received += data
    assert len(received) <= 16, "a header at most"
    assert "truncated" in namespace.failure()
    assert namespace.failure() in logged.expect("connection closed")["reason"]
    assert namespace.representation.leases == 0


async def test_a_reply_that_is_under_way_when_its_media_fail_is_cut_off(
    make_namespace: MakeNamespace, pair: tuple[socket.socket, trio.socket.SocketType]
) -> None:
    """Zeroes may stand where its bytes were: what the client has got by then is true."""
    namespace = make_namespace(8 << 20)
    namespace.execute([write(0, b"x" * namespace.size)])
    ours, theirs = pair
    async with serving(namespace, ours):
        await go(theirs)
        for cookie in (1, 2):  # the second waits behind the first
            await theirs.send(client.request(READ, cookie, 0, 4 << 20))
        await trio.testing.wait_all_tasks_blocked()
        size = namespace.media.file_bytes
        namespace.health.fault = Fault(0, BUS_MCEERR_AR, size, size)
        received = b""
        with trio.fail_after(5):
            while data := await theirs.recv(1 << 20):
                received += data
    assert 16 < len(received) < 4 << 20
    assert set(received[16:]) == {ord("x")}
    assert namespace.representation.leases == 0


LARGE = 1 << 20


async def send_all(sock: trio.socket.SocketType, data: bytes) -> None:
    while data:
        data = data[await sock.send(data) :]


async def test_a_large_write_that_arrives_in_pieces_lands_in_memory_uncopied(
    make_namespace: MakeNamespace, pair: tuple[socket.socket, trio.socket.SocketType]
) -> None:
    namespace = make_namespace(4 * LARGE)
    copied: list[int] = []
    store = namespace.representation.write
    namespace.representation.write = lambda offset, payload: (  # type: ignore[method-assign]
        copied.append(len(payload)) or store(offset, payload)  # type: ignore[func-returns-value]
    )
    ours, theirs = pair
    payload = bytes(range(256)) * (LARGE // 256)
    async with serving(namespace, ours):
        await go(theirs)
        for cookie in range(3):
            request = client.request(WRITE, cookie, cookie * LARGE, LARGE, data=payload)
            await send_all(theirs, request[:100_000])
            await trio.testing.wait_all_tasks_blocked()
            await send_all(theirs, request[100_000:])
            reply = client.replies(await receive_exactly(theirs, 16), {})[0]
            assert (reply.cookie, reply.error) == (cookie, 0)
        await theirs.send(client.request(DISC))
    assert bytes(namespace.media.view[: 3 * LARGE]) == payload * 3
    assert copied == []
    assert namespace.counters.writes == 3


async def test_a_window_that_closes_half_way_lets_the_rest_in_through_a_buffer(
    make_namespace: MakeNamespace, pair: tuple[socket.socket, trio.socket.SocketType]
) -> None:
    namespace = make_namespace(4 * LARGE)
    ours, theirs = pair
    payload = b"half" * (LARGE // 4)
    async with serving(namespace, ours):
        await go(theirs)
        request = client.request(WRITE, 1, LARGE, LARGE, data=payload)
        await send_all(theirs, request[:100_000])
        await trio.testing.wait_all_tasks_blocked()
        with namespace._dispatcher.fences.around(0, 4 * LARGE):
            await send_all(theirs, request[100_000:])
            await trio.testing.wait_all_tasks_blocked()
            assert namespace.counters.writes == 0, "it waits for the fence"
        assert client.replies(await receive_exactly(theirs, 16), {})[0].error == 0
        await theirs.send(client.request(DISC))
    assert bytes(namespace.media.view[LARGE : 2 * LARGE]) == payload


async def test_a_client_that_leaves_in_the_middle_of_a_large_write_harms_nothing_else(
    make_namespace: MakeNamespace, pair: tuple[socket.socket, trio.socket.SocketType]
) -> None:
    namespace = make_namespace(4 * LARGE)
    namespace.media.reserve(0, 4 * LARGE)
    namespace.media.store(0, b"\1" * 4 * LARGE)
    ours, theirs = pair
    async with serving(namespace, ours):
        await go(theirs)
        request = client.request(WRITE, 1, LARGE, LARGE, data=b"\2" * LARGE)
        await send_all(theirs, request[:500_000])
        theirs.close()
    view = bytes(namespace.media.view)
    assert view[:LARGE] + view[2 * LARGE :] == b"\1" * 3 * LARGE
    assert namespace.counters.writes == 0


async def test_no_handshake_in_time_closes(
    make_namespace: MakeNamespace,
    pair: tuple[socket.socket, trio.socket.SocketType],
    autojump_clock: trio.testing.MockClock,
) -> None:
    namespace = make_namespace()
    served = Connection(pair[0], peer="test", spinner=Spinner(0))
    await served.run(handshake(namespace), user_of(namespace))
    assert await receive_exactly(pair[1], 18)
    assert await pair[1].recv(1) == b""


async def test_a_busy_client_is_answered_from_the_spin(
    make_namespace: MakeNamespace,
    pair: tuple[socket.socket, trio.socket.SocketType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One request at a time, from a thread: after the first short waits most come in the spin."""
    spun: list[int | None] = []
    spin = Connection._spin

    def counted(self: Connection, buffer: memoryview) -> int | None:
        spun.append(spin(self, buffer))
        return spun[-1]

    monkeypatch.setattr(Connection, "_spin", counted)
    namespace = make_namespace()
    namespace.media.reserve(0, 4096)
    ours, theirs = pair
    spinner = Spinner(1000)
    async with serving(namespace, ours, spinner=spinner):
        await go(theirs)
        await trio.to_thread.run_sync(ask_one_at_a_time, theirs.fileno())
    assert namespace.counters.reads == 200
    assert sum(count is not None for count in spun) > 20


async def test_large_ios_are_received_without_a_turn_of_the_loop_but_not_for_ever(
    make_namespace: MakeNamespace,
    pair: tuple[socket.socket, trio.socket.SocketType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One batch a receive, all of them there already: the loop gets a turn every so often."""
    namespace = make_namespace(4 * LARGE)
    turns: list[int] = []
    wait = trio.lowlevel.wait_readable

    async def counted(sock: socket.socket) -> None:
        turns.append(namespace.counters.reads)
        await wait(sock)

    monkeypatch.setattr(trio.lowlevel, "wait_readable", counted)
    monkeypatch.setattr(RequestStream, "receive_buffer", one_request_at_a_time)
    ours, theirs = pair
    async with serving(namespace, ours):
        await receive_exactly(theirs, 18)
        reads = b"".join(client.request(READ, n, 0, 1 << 16) for n in range(100))
        await theirs.send(client.flags() + client.option(1, b"ns"))
        await receive_exactly(theirs, 10)
        turns.clear()
        await theirs.send(reads + client.request(DISC))
        await receive_exactly(theirs, 100 * ((1 << 16) + 16))
    between = [later - sooner for sooner, later in itertools.pairwise(turns)]
    assert len(turns) < 20, "most receives needed no turn"
    assert max(between) <= connection_module.EAGER_TURNS + 1, "and nobody is kept waiting"


def one_request_at_a_time(stream: RequestStream) -> memoryview:
    view = RECEIVE_BUFFER(stream)
    return view[: 28 - stream._end % 28]


RECEIVE_BUFFER = RequestStream.receive_buffer


def ask_one_at_a_time(fd: int) -> None:
    with socket.socket(fileno=os.dup(fd)) as sock:
        sock.setblocking(True)
        for cookie in range(200):
            sock.sendall(client.request(READ, cookie, 0, 4))
            assert len(sock.recv(20, socket.MSG_WAITALL)) == 20
        sock.sendall(client.request(DISC))
