"""One NBD connection: from the bytes of its socket to the engine and back.

The way of an I/O: `serve` wakes up once, receives all that has arrived, hands the engine one batch
after another and sends each batch's replies with one `sendmsg`. No task, channel or thread hop
happens on that way. Commands that have to wait go to `_complete_waiting`, a second task of the
connection, which finishes them together (one sync for all of them) and sends their replies.

Bounds: a connection receives nothing while its replies are stuck, or while `WAITING_MAX` commands
or `WAITING_BYTES_MAX` of payload wait; so a client that never reads holds what it asked for in the
receive buffer, and no more.
"""

import contextlib
import errno
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import structlog
import trio

from pmblk import BlockDevice, Command
from pmblkd.errors import first_leaf
from pmblkd.nbd.handshake import Handshake, State
from pmblkd.nbd.replies import Buffer, ReplyEncoder
from pmblkd.nbd.requests import ProtocolError, RequestStream
from pmblkd.spin import Spinner

HANDSHAKE_SECONDS = 30
HANDSHAKE_CHUNK_BYTES = 16 << 10
# After a large I/O the next bytes are asked for at once. With small ones a turn of the event loop
# (about 12 us) lets requests gather into one batch; with large ones it is only lost time.
LARGE_IO_BYTES = 32 << 10
EAGER_TURNS = 16  # then the others get theirs
WAITING_MAX = 1024
WAITING_BYTES_MAX = 64 << 20
LEASE_PATIENCE_SECONDS = 5
IOV_MAX = 1024

_log = structlog.get_logger(__name__)


Use = Callable[[str], AbstractContextManager[BlockDevice]]


class Disconnected(Exception):
    """The client is gone, or cannot be served any more; the reason is for the log."""


class Connection:
    """`sock` is connected and non-blocking; the connection closes it."""

    def __init__(self, sock: socket.socket, *, peer: str, spinner: Spinner) -> None:
        self._sock = sock
        self._peer = peer
        self._spinner = spinner
        self._namespace: BlockDevice | None = None
        self._sending = trio.Lock()
        self._waiting: list[Command] = []
        self._waiting_bytes = 0
        self._more_waiting = trio.Event()
        self._room = trio.Event()
        self._end_of_requests = False
        self._large = False  # whether the last I/O was
        self._eager_turns = 0  # taken in a row

    async def run(self, handshake: Handshake, use: Use) -> None:
        """Serve the client until it leaves, breaks the protocol, or `stop` ends its requests.

        The namespace of the export that the client chooses is in use until this returns.
        """
        log = _log.bind(peer=self._peer)
        try:
            with contextlib.ExitStack() as used:
                with trio.move_on_after(HANDSHAKE_SECONDS) as limit:
                    namespace = await self._shake_hands(handshake, use, used)
                if limit.cancelled_caught:
                    raise Disconnected(f"no handshake in {HANDSHAKE_SECONDS} s")
                self._namespace = namespace
                log = log.bind(export=namespace.name)
                log.info("client connected", structured=handshake.structured)
                await self._transmit(handshake, namespace)
                log.info("client left")
        except* (Disconnected, ProtocolError) as group:
            log.info("connection closed", reason=str(first_leaf(group)))
        finally:
            self._sock.close()

    def stop(self) -> None:
        """No further requests; those that have arrived are still answered."""
        try:
            self._sock.shutdown(socket.SHUT_RD)
        except OSError:
            pass  # the peer was faster

    # ---- handshake

    async def _shake_hands(
        self, handshake: Handshake, use: Use, used: contextlib.ExitStack
    ) -> BlockDevice:
        await self._send([handshake.greeting()])
        buffer = memoryview(bytearray(HANDSHAKE_CHUNK_BYTES))
        while True:
            count = await self._receive(buffer)
            if count == 0:
                raise Disconnected("left during the handshake")
            out = handshake.receive(buffer[:count])
            namespace = None
            if handshake.export is not None:
                # Before anything is awaited: an export that is promised must not go away.
                namespace = used.enter_context(use(handshake.export.name))
            if out:
                await self._send([out])
            if handshake.state is State.CLOSED:
                raise Disconnected(handshake.reason)
            if namespace is not None:
                return namespace

    # ---- transmission

    async def _transmit(self, handshake: Handshake, namespace: BlockDevice) -> None:
        replies = ReplyEncoder(structured=handshake.structured)
        requests = RequestStream(
            allocation_context=handshake.allocation_context, leftover=handshake.leftover
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._complete_waiting, replies, namespace)
            try:
                await self._serve(requests, replies, namespace)
            finally:
                self._end_of_requests = True
                self._more_waiting.set()

    async def _serve(
        self, requests: RequestStream, replies: ReplyEncoder, namespace: BlockDevice
    ) -> None:
        while True:
            batch = requests.next_batch()
            while batch:
                await self._answer(batch, replies, namespace)
                batch = requests.next_batch()
                if batch:  # one batch a turn of the loop, whatever has arrived
                    await trio.lowlevel.checkpoint()
            if requests.disconnecting:
                return
            command = requests.bulk_write
            if command is not None and namespace.has_windows:
                await self._receive_bulk(command, requests.take_bulk_payload(), namespace)
                await self._answer([command], replies, namespace)
            count = await self._receive(requests.receive_buffer())
            if count == 0:
                return
            requests.received(count)

    async def _answer(
        self, batch: list[Command], replies: ReplyEncoder, namespace: BlockDevice
    ) -> None:
        waiting = namespace.execute(batch)
        if waiting:
            batch = self._put_aside(batch, waiting)
        try:
            await self._send(replies.encode(batch), namespace)
        finally:
            namespace.release(batch)
        self._spinner.answered(len(batch))
        self._large = bool(batch) and batch[-1].length >= LARGE_IO_BYTES
        if len(self._waiting) >= WAITING_MAX or self._waiting_bytes >= WAITING_BYTES_MAX:
            await self._wait_for_room()

    async def _receive_bulk(
        self, command: Command, head: memoryview, namespace: BlockDevice
    ) -> None:
        """A large write's payload straight into memory, piece by piece as it arrives.

        The window is asked for anew after every wait, since nothing may be kept over one. When it
        is refused half way, the rest arrives in a buffer and is an ordinary write.
        """
        while command.received < command.length:
            window = namespace.window(command)
            if window is None:
                await self._receive_rest(command, head)
                return
            count = self._fill(window, head)
            head = head[:0]
            if count < len(window) and self._spinner.worth_it(self):
                count += self._spin(window[count:]) or 0
            if count:
                namespace.received(command, count)
            if command.received < command.length:
                await trio.lowlevel.wait_readable(self._sock)

    def _fill(self, window: memoryview, head: memoryview) -> int:
        """`head`, and what has arrived behind it, into the window; how much that is."""
        filled = len(head)
        window[:filled] = head
        while filled < len(window):
            count = self._receive_now(window[filled:])
            if count is None:
                break
            if count == 0:
                raise Disconnected("left in the middle of a write")
            filled += count
        return filled

    async def _receive_rest(self, command: Command, head: memoryview) -> None:
        """What is not in memory yet becomes the payload of the command."""
        command.payload = rest = memoryview(bytearray(command.length - command.received))
        rest[: len(head)] = head
        filled = len(head)
        while filled < len(rest):
            count = await self._receive(rest[filled:])
            if count == 0:
                raise Disconnected("left in the middle of a write")
            filled += count

    # ---- commands that wait

    def _put_aside(self, batch: list[Command], waiting: Sequence[Command]) -> list[Command]:
        """Hand the waiting commands over; the finished rest of the batch comes back."""
        self._waiting.extend(waiting)
        self._waiting_bytes += sum(len(command.payload or b"") for command in waiting)
        self._more_waiting.set()
        aside = {id(command) for command in waiting}
        return [command for command in batch if id(command) not in aside]

    async def _complete_waiting(self, replies: ReplyEncoder, namespace: BlockDevice) -> None:
        while not self._end_of_requests or self._waiting:
            if not self._waiting:
                await self._more_waiting.wait()
                self._more_waiting = trio.Event()
                continue
            batch: Sequence[Command] = self._waiting
            self._waiting, self._waiting_bytes = [], 0
            while batch:
                batch = await self._complete_some(batch, replies, namespace)
            self._room.set()

    async def _complete_some(
        self, batch: Sequence[Command], replies: ReplyEncoder, namespace: BlockDevice
    ) -> Sequence[Command]:
        """Finish and answer some of `batch`; what still waits comes back."""
        try:
            rest = await namespace.complete(batch)
            await self._send(replies.encode(batch[: len(batch) - len(rest)]), namespace)
        finally:
            namespace.release(batch)
        return rest

    async def _wait_for_room(self) -> None:
        self._room = trio.Event()
        await self._room.wait()

    # ---- the socket

    async def _receive(self, buffer: memoryview) -> int:
        """At least one byte, or 0 at the end of the stream."""
        if self._large and self._eager_turns < EAGER_TURNS:
            self._eager_turns += 1
            count = self._receive_now(buffer)
            if count is not None:
                return count
        loop_is_due = self._eager_turns == EAGER_TURNS
        self._eager_turns = 0
        if not loop_is_due and self._spinner.worth_it(self):
            count = self._spin(buffer)
            if count is not None:
                return count
        started = time.perf_counter()
        await trio.lowlevel.wait_readable(self._sock)
        self._spinner.waited(time.perf_counter() - started)
        while (count := self._receive_now(buffer)) is None:
            await trio.lowlevel.wait_readable(self._sock)
        return count

    def _receive_now(self, buffer: memoryview) -> int | None:
        try:
            return self._sock.recv_into(buffer)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._lost(error, [buffer]) from None

    def _spin(self, buffer: memoryview) -> int | None:
        end = time.perf_counter() + self._spinner.seconds
        while time.perf_counter() < end:
            count = self._receive_now(buffer)
            if count is not None:
                return count
        self._spinner.missed()
        return None

    async def _send(self, buffers: list[Buffer], namespace: BlockDevice | None = None) -> None:
        """All of `buffers`, in one call if the socket takes it; never between another's halves."""
        if self._sending.locked():
            sound = _is_sound(namespace)
            await self._sending.acquire()
        else:
            buffers = self._send_now(buffers)
            if not buffers:
                return
            sound = _is_sound(namespace)
            self._sending.acquire_nowait()
        blocked_since = trio.current_time()
        try:
            while buffers:
                if sound and not _is_sound(namespace):  # zeroes may stand where its bytes were
                    raise Disconnected("its namespace has failed under a reply")
                buffers = self._send_now(buffers)
                if buffers:
                    await self._wait_writable(namespace, blocked_since)
        finally:
            if buffers:
                self._break()
            self._sending.release()

    def _send_now(self, buffers: list[Buffer]) -> list[Buffer]:
        """Send until the socket is full; what is left comes back."""
        first = 0
        while first < len(buffers):
            try:
                sent = self._sock.sendmsg(buffers[first : first + IOV_MAX])
            except BlockingIOError:
                break
            except OSError as error:
                self._break()  # perhaps in the middle of a reply
                raise self._lost(error, buffers[first:]) from None
            while first < len(buffers) and sent >= len(buffers[first]):
                sent -= len(buffers[first])
                first += 1
            if sent:
                buffers[first] = memoryview(buffers[first])[sent:]
        return buffers[first:]

    async def _wait_writable(self, namespace: BlockDevice | None, blocked_since: float) -> None:
        """Wait for the client to read; but it must not keep memory that somebody else waits for."""
        writable = False
        while not writable:
            with trio.move_on_after(LEASE_PATIENCE_SECONDS / 5):
                await trio.lowlevel.wait_writable(self._sock)
                writable = True
            if namespace is not None and namespace.starved:
                since = max(blocked_since, namespace.starved_since)
                if trio.current_time() - since >= LEASE_PATIENCE_SECONDS:
                    raise Disconnected("reads too slowly, and others wait for the memory it holds")

    def _lost(self, error: OSError, buffers: Iterable[Buffer]) -> Disconnected:
        """A socket that fails; EFAULT is the media's failure, under one of the buffers."""
        namespace = self._namespace
        if error.errno != errno.EFAULT or namespace is None:
            return Disconnected(error.strerror)
        if namespace.examine(memoryview(buffer) for buffer in buffers):
            return Disconnected(f"its namespace has failed: {namespace.failure()}")
        return Disconnected(error.strerror)

    def _break(self) -> None:
        """A reply was cut off: nothing may follow it, whoever waits to send."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was faster


def _is_sound(namespace: BlockDevice | None) -> bool:
    return namespace is not None and namespace.health.fault is None
