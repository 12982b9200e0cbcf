"""The servers that are compared, each on a tmpfs file of its own; all gone when its block ends.

Not here: the load (nbd.py) and the arithmetic (rows.py).
"""

import contextlib
import functools
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbd

from bench import ceiling
from bench.rows import CEILING, OURS
from tests.harness.daemon import Daemon, scratch

FILE_BYTES = 512 * 1024 * 1024
START_SECONDS = 15
STOP_SECONDS = 15
REPLY_SECONDS = 10
POLL_SECONDS = 0.01

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


class ServerError(Exception):
    """A server that did not start, ended by itself or did not answer in time."""


FAILURES = (ServerError, nbd.Error)


@dataclass(frozen=True)
class Server:
    """One that runs. `log` is what it wrote so far."""

    name: str
    pid: int
    uri: str
    is_running: Callable[[], bool]
    log: Callable[[], str]

    def check(self) -> None:
        if not self.is_running():
            raise ServerError(f"{self.name} ended during the run:\n{self.log()}")


@contextlib.contextmanager
def running(name: str) -> Iterator[Server]:
    """The server of that name, ready for clients."""
    with scratch() as directory:
        allocate(directory / "media")
        start = {OURS: _pmblk, CEILING: _ceiling}.get(name) or functools.partial(_peer, name)
        with start(directory) as server:
            yield server


def allocate(file: Path) -> None:
    """Every page is there, so that no server pays for a page's first use."""
    with file.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, FILE_BYTES)


@contextlib.contextmanager
def _started(daemon: Daemon) -> Iterator[None]:
    """Like the harness's `running`, in a directory that has the media already."""
    try:
        _start(daemon)
        yield
    finally:
        if daemon.running:
            daemon.stop()


def _start(daemon: Daemon) -> None:
    try:
        daemon.start()
    except AssertionError as error:
        raise ServerError(str(error)) from error


def _configured(directory: Path) -> Daemon:
    return Daemon(directory, CONFIG.replace("{dir}", str(directory)))


@contextlib.contextmanager
def _pmblk(directory: Path) -> Iterator[Server]:
    daemon = _configured(directory)
    with _started(daemon):
        yield Server(OURS, daemon.pid, daemon.uri(), lambda: daemon.running, lambda: daemon.log)


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
    with _spawned(command, log) as process:
        server = Server(
            name,
            process.pid,
            f"nbd+unix:///?socket={socket}",
            lambda: process.poll() is None,
            lambda: log.read_text(errors="replace"),
        )
        _await_first_block(server)
        yield server


@contextlib.contextmanager
def _spawned(command: Sequence[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that ends with the block. A session of its own: ^C is for us to pass on."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_SECONDS)


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
        with _started(daemon):
            read_first_block(daemon.uri())
            return time.monotonic() - begun
