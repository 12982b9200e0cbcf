"""The NBD servers that are compared, each on a tmpfs file of its own; gone when its block ends.

Not here: the load (nbd.py) and the arithmetic (samples.py).
"""

import contextlib
import functools
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbd

from bench import ceiling, servers
from bench.nbd_rows import CEILING, OURS
from bench.servers import POLL_SECONDS, START_SECONDS, ServerError, allocate, spawned, started
from tests.harness.daemon import Daemon, scratch

REPLY_SECONDS = 10

REPRESENTATION = "extent"
CONFIG = f"""\
[[namespace]]
name = "bench"
path = "{{dir}}/media"
representation = "{REPRESENTATION}"

[nbd]
listen = ["unix:{{dir}}/nbd.sock"]
"""

# qemu-nbd with --cache=none works on tmpfs too since Linux 6.6, but is slower there: its best.
PEER_COMMANDS = {
    "nbdkit": "nbdkit -f -U {socket} file {file}",
    "qemu-nbd": (
        "qemu-nbd -f raw -k {socket} -x '' --aio=io_uring --cache=writeback -t -e 64 {file}"
    ),
}


FAILURES = (ServerError, nbd.Error)


@dataclass(frozen=True, kw_only=True)
class Server(servers.Server):
    uri: str


@contextlib.contextmanager
def running(name: str) -> Iterator[Server]:
    """The server of that name, ready for clients."""
    with scratch() as directory:
        allocate(directory / "media")
        start = {OURS: _pmblk, CEILING: _ceiling}.get(name) or functools.partial(_peer, name)
        with start(directory) as server:
            yield server


def _configured(directory: Path) -> Daemon:
    return Daemon(directory, CONFIG.replace("{dir}", str(directory)))


@contextlib.contextmanager
def _pmblk(directory: Path) -> Iterator[Server]:
    daemon = _configured(directory)
    with started(daemon):
        yield Server(
            name=OURS,
            pids=[daemon.pid],
            is_running=lambda: daemon.running,
            log=lambda: daemon.log,
            uri=daemon.uri(),
        )


@contextlib.contextmanager
def _ceiling(directory: Path) -> Iterator[Server]:
    # Not in the directory, which is in /dev/shm: that may be mounted noexec.
    with scratch(Path(tempfile.gettempdir())) as build:
        command = [sys.executable, "-m", "bench.ceiling", "{socket}", "{file}"]
        with _command(CEILING, directory, [*command, str(ceiling.compiled(build))]) as server:
            yield server


def _peer(name: str, directory: Path) -> contextlib.AbstractContextManager[Server]:
    return _command(name, directory, shlex.split(PEER_COMMANDS[name]))


@contextlib.contextmanager
def _command(name: str, directory: Path, words: Sequence[str]) -> Iterator[Server]:
    socket, log = directory / "nbd.sock", directory / "log"
    command = [word.format(socket=socket, file=directory / "media") for word in words]
    with spawned(command, log) as process:
        server = Server(
            name=name,
            pids=[process.pid],
            is_running=lambda: process.poll() is None,
            log=lambda: log.read_text(errors="replace"),
            uri=f"nbd+unix:///?socket={socket}",
        )
        _await_first_block(server)
        yield server


# ---- the first I/O


def _await_first_block(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        server.check()
        try:
            return read_first_block(server.uri)
        except nbd.Error as error:
            if time.monotonic() > deadline:
                raise ServerError(f"{server.name} does not serve: {error}") from error
        time.sleep(POLL_SECONDS)


def read_first_block(uri: str) -> None:
    """Connect, read 4 KiB, disconnect. Raises nbd.Error when nobody listens there."""
    handle = nbd.NBD()
    handle.aio_connect_uri(uri)
    _turn(handle, handle.aio_is_connecting)
    cookie = handle.aio_pread(nbd.Buffer(4096), 0)
    _turn(handle, lambda: not handle.aio_command_completed(cookie))
    handle.aio_disconnect(0)
    _turn(handle, lambda: not (handle.aio_is_closed() or handle.aio_is_dead()))


def _turn(handle: "nbd.NBD", unfinished: Callable[[], bool]) -> None:
    """libnbd's blocking calls have no time limit, its poll does."""
    deadline = time.monotonic() + REPLY_SECONDS
    while unfinished():
        if time.monotonic() > deadline:
            raise ServerError(f"no answer in {REPLY_SECONDS} s")
        handle.poll(100)


def first_io_seconds() -> float:
    """From the exec of `pmblk serve` to a client that has connected and read 4 KiB."""
    with scratch() as directory:
        allocate(directory / "media")
        daemon = _configured(directory)
        begun = time.monotonic()
        with started(daemon):
            read_first_block(daemon.uri())
            return time.monotonic() - begun
