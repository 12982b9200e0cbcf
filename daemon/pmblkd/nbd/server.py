"""The NBD server: listeners, the table of exports, and the connections they bring.

Not here: what a connection does (`connection`), the protocol (`handshake`, `requests`, `replies`).
"""

import errno
import socket
from collections.abc import Sequence

import structlog
import trio

from pmblk import Namespace, PmblkError
from pmblk.units import format_size
from pmblkd.listen import Address, UnixAddress, bind
from pmblkd.nbd.connection import Connection
from pmblkd.nbd.handshake import Export, Handshake
from pmblkd.spin import Spinner

SOCKET_BUFFER_BYTES = 4 << 20
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33

_log = structlog.get_logger(__name__)


class NbdServer:
    """Serves `namespaces` by name; the empty name is `default`.

    `bind` first (it raises PmblkError and leaves nothing behind), then `run` in a nursery, `stop`
    to let the connections finish what has arrived, and `close` when `run` has returned.
    """

    def __init__(
        self,
        namespaces: dict[str, Namespace],
        *,
        default: str,
        max_connections: int,
        spinner: Spinner,
    ) -> None:
        self._namespaces = namespaces
        self._exports = {name: _export(namespace) for name, namespace in namespaces.items()}
        self._default = default
        self._max_connections = max_connections
        self._spinner = spinner
        self._listeners: list[tuple[Address, socket.socket]] = []
        self._connections: set[Connection] = set()
        self._accepting = trio.CancelScope()

    @property
    def connections(self) -> int:
        return len(self._connections)

    def bind(self, addresses: Sequence[Address]) -> None:
        try:
            for address in addresses:
                self._listeners.append((address, bind(address)))
        except PmblkError:
            self.close()
            raise

    async def run(self) -> None:
        """Until `stop`, and then until the last connection has ended."""
        async with trio.open_nursery() as connections:
            with self._accepting:
                async with trio.open_nursery() as accepting:
                    for address, listener in self._listeners:
                        accepting.start_soon(self._accept, listener, address, connections)

    def stop(self) -> None:
        self._accepting.cancel()
        for connection in self._connections:
            connection.stop()

    def close(self) -> None:
        for address, listener in self._listeners:
            listener.close()
            if isinstance(address, UnixAddress):
                address.path.unlink(missing_ok=True)
        self._listeners.clear()

    async def _accept(
        self, listener: socket.socket, address: Address, nursery: trio.Nursery
    ) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener)
            try:
                sock, peer = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError as error:
                # Descriptors are short, or a network error of that one client (accept(2)).
                if error.errno in (errno.EBADF, errno.EINVAL):
                    raise
                _log.warning("cannot accept", listen=str(address), reason=error.strerror)
                await trio.sleep(0.1)
                continue
            if len(self._connections) >= self._max_connections:
                _log.warning("too many connections", max_connections=self._max_connections)
                sock.close()
                continue
            _tune(sock)
            name = str(address) if isinstance(address, UnixAddress) else f"{peer[0]}:{peer[1]}"
            connection = Connection(sock, peer=name, spinner=self._spinner)
            self._connections.add(connection)  # here, so that a stop in this turn finds it
            nursery.start_soon(self._serve, connection)

    async def _serve(self, connection: Connection) -> None:
        try:
            handshake = Handshake(self._exports, default=self._default)
            await connection.run(handshake, self._namespaces)
        except Exception:
            # A defect of ours that one client ran into must not take the others' devices away.
            _log.exception("connection failed")
        finally:
            self._connections.discard(connection)


def _export(namespace: Namespace) -> Export:
    kind = namespace.representation.kind
    return Export(
        name=namespace.name,
        description=f"{format_size(namespace.size)} of persistent memory as {kind}",
        size=namespace.size,
        read_only=namespace.read_only,
        preferred_block=max(namespace.lba_bytes, 512),
    )


def _tune(sock: socket.socket) -> None:
    """Deep buffers, so that a batch of replies leaves in one call; no delay for small ones."""
    sock.setblocking(False)
    for forced, plain in (
        (_SO_SNDBUFFORCE, socket.SO_SNDBUF),
        (_SO_RCVBUFFORCE, socket.SO_RCVBUF),
    ):
        try:
            sock.setsockopt(socket.SOL_SOCKET, forced, SOCKET_BUFFER_BYTES)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, plain, SOCKET_BUFFER_BYTES)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
