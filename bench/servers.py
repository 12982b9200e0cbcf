"""What the servers of every benchmark have in common: a file in memory, a process that ends.

Which servers there are is nbd_servers.py's and fuse_contenders.py's.
"""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.harness.daemon import Daemon

FILE_BYTES = 512 * 1024 * 1024
START_SECONDS = 15
STOP_SECONDS = 15
POLL_SECONDS = 0.01


class ServerError(Exception):
    """A server that did not start, ended by itself or did not answer in time."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """One that runs, in the processes `pids`. `log` is what it wrote so far."""

    name: str
    pids: Sequence[int]
    is_running: Callable[[], bool]
    log: Callable[[], str]

    def check(self) -> None:
        if not self.is_running():
            raise ServerError(f"{self.name} ended during the run:\n{self.log()}")


def allocate(file: Path) -> None:
    """Every page is there, so that no server pays for a page's first use."""
    with file.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, FILE_BYTES)


@contextlib.contextmanager
def started(daemon: Daemon) -> Iterator[None]:
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


@contextlib.contextmanager
def spawned(command: Sequence[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that ends with the block. A session of its own: ^C is for us to pass on."""
    with log.open("ab") as stream:
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
