"""The NBD server: listeners, the table of exports, and the connections they bring.

Not here: what a connection does (`connection`), the protocol (`handshake`, `requests`, `replies`).
"""

import errno
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import structlog
import trio

from pmblk import BlockDevice, PmblkError
from pmblk.units import format_size
from pmblkd.listen import Address, UnixAddress, bind
from pmblkd.nbd.connection import Connection
from pmblkd.nbd.handshake import Export, Handshake
from pmblkd.registry import Registry
from pmblkd.spin import Spinner

SOCKET_BUFFER_BYTES = 4 << 20
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33

_log = structlog.get_logger(__name__)


class _Listener:
    """A listening socket, and the scope of the task that accepts from it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.scope = trio.CancelScope()


class NbdServer:
    """Serves the live namespaces of `registry` by name; the empty name is `default`.

    `default` and `max_connections` may change at any time. `bind` first (it raises PmblkError and
    leaves nothing behind), then `run` in a nursery, `stop` to let the connections finish what has
    arrived, and `close` when `run` has returned. While it runs, `bind` and `unbind` change where
    it listens; connections stay.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        default: str,
        max_connections: int,
        spinner: Spinner,
    ) -> None:
        self.default = default
        self.max_connections = max_connections
        self._registry = registry
        self._spinner = spinner
        self._listeners: dict[Address, _Listener] = {}
        self._connections: set[Connection] = set()
        self._accepting: trio.Nursery | None = None
        self._serving: trio.Nursery | None = None

    @property
    def addresses(self) -> list[Address]:
        """Where it listens."""
        return list(self._listeners)

    def bind(self, addresses: Sequence[Address]) -> None:
        """Listen there too: on all of them, or, when PmblkError is raised, on none."""
        new = [address for address in addresses if address not in self._listeners]
        try:
            for address in new:
                self._listeners[address] = _Listener(bind(address))
        except PmblkError:
            self.unbind(new)
            raise
        for address in new:
            self._start_accepting(address)

    def unbind(self, addresses: Sequence[Address]) -> None:
        """Take no more clients there; those that are connected stay."""
        for address in addresses:
            listener = self._listeners.pop(address, None)
            if listener is None:
                continue
            listener.scope.cancel()  # at once off the loop's list, so the descriptor can be closed
            listener.sock.close()
            if isinstance(address, UnixAddress):
                address.path.unlink(missing_ok=True)

    async def run(self) -> None:
        """Until `stop`, and then until the last connection has ended."""
        async with trio.open_nursery() as self._serving:
            async with trio.open_nursery() as self._accepting:
                self._accepting.start_soon(trio.sleep_forever)  # it may listen nowhere for a while
                for address in self._listeners:
                    self._start_accepting(address)
            self._accepting = None

    def stop(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel_scope.cancel()
        for connection in self._connections:
            connection.stop()

    def close(self) -> None:
        self.unbind(self.addresses)

    def _start_accepting(self, address: Address) -> None:
        if self._accepting is not None and self._serving is not None:
            listener = self._listeners[address]
            self._accepting.start_soon(self._accept, listener, address, self._serving)

    async def _accept(self, listener: _Listener, address: Address, nursery: trio.Nursery) -> None:
        with listener.scope:
            while True:
                await trio.lowlevel.wait_readable(listener.sock)
                if self._listeners.get(address) is not listener:
                    return  # unbound in the same turn, when it was too late to cancel
                await self._accept_one(listener.sock, address, nursery)

    async def _accept_one(
        self, listener: socket.socket, address: Address, nursery: trio.Nursery
    ) -> None:
        try:
            sock, peer = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # Descriptors are short, or a network error of that one client (accept(2)).
            if error.errno in (errno.EBADF, errno.EINVAL):
                raise
            _log.warning("cannot accept", listen=str(address), reason=error.strerror)
            await trio.sleep(0.1)
            return
        if len(self._connections) >= self.max_connections:
            _log.warning("too many connections", max_connections=self.max_connections)
            sock.close()
            return
        _tune(sock)
        name = str(address) if isinstance(address, UnixAddress) else f"{peer[0]}:{peer[1]}"
        connection = Connection(sock, peer=name, spinner=self._spinner)
        self._connections.add(connection)  # here, so that a stop in this turn finds it
        nursery.start_soon(self._serve, connection)

    async def _serve(self, connection: Connection) -> None:
        try:
            handshake = Handshake(Exports(self._registry), default=self.default)
            await connection.run(handshake, self._use)
        except Exception:
            # A defect of ours that one client ran into must not take the others' away.
            _log.exception("connection failed")
        finally:
            self._connections.discard(connection)

    def _use(self, name: str) -> AbstractContextManager[BlockDevice]:
        return self._registry.named(name).used()


class Exports(Mapping[str, Export]):
    """The live namespaces of a registry as exports, each as it is when it is asked for."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def __getitem__(self, name: str) -> Export:
        for served in self._registry.live():
            if served.name == name:
                return _export(served.namespace)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (served.name for served in self._registry.live())

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _export(namespace: BlockDevice) -> Export:
    return Export(
        name=namespace.name,
        description=f"{format_size(namespace.size)} of {namespace.description}",
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
