"""Who serves a FUSE file, each on a tmpfs file of its own; all gone when its block ends.

*tmpfs*, which they are measured against, is the file below *fast*.

Not here: the load (fuse.py) and the arithmetic (samples.py).
"""

import contextlib
import functools
import mmap
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bench import servers
from bench.fuse_rows import AUTO, FAST, NBDFUSE, OFF, PYFUSE3, QEMU, RAW
from bench.servers import POLL_SECONDS, START_SECONDS, ServerError, allocate, spawned, started
from pmblkd import loop
from tests.harness import file_systems
from tests.harness.daemon import PMBLK, Daemon, scratch

NAME = "bench"  # of the namespace
BLOCK_BYTES = 4096
CONFIG = f"""\
[[namespace]]
name = "{NAME}"
path = "{{dir}}/media"
dax = "{{dax}}"

[fuse]
mountpoint = "{{dir}}/mnt"
engine = "{{engine}}"
"""
# Engine and dax of the ways that pmblk serves a file.
OURS: Mapping[str, tuple[str, str]] = {
    FAST: ("kernel", "fast"),
    AUTO: ("kernel", "auto"),
    OFF: ("kernel", "off"),
    PYFUSE3: ("pyfuse3", "off"),
}
# qemu-storage-daemon is no faster with cache.direct=on or aio=threads, nor nbdfuse with one
# connection (-C 1) or one thread (-s): no option had the better of its rows.
QEMU_COMMAND = (
    "qemu-storage-daemon --blockdev file,node-name=media,filename={file},aio=io_uring"
    " --export fuse,id=export,node-name=media,mountpoint={mount},writable=on"
)
NBDKIT_COMMAND = "nbdkit -f -U {socket} file {file}"
NBDFUSE_COMMAND = "nbdfuse {mount}/nbd nbd+unix:///?socket={socket}"

Attach = Callable[[], AbstractContextManager[Path]]


@dataclass(frozen=True, kw_only=True)
class Contender(servers.Server):
    """A file that is served. `attach` makes a block device of it; `daemon` is ours, if it is."""

    file: Path
    attach: Attach
    daemon: Daemon | None = None

    def guarded(self, seconds: float) -> AbstractContextManager[None]:
        """SIGKILL for the server after that long: who waits for its mount cannot be killed."""
        return file_systems.killing(lambda: self.pids if self.is_running() else [], seconds=seconds)


@contextlib.contextmanager
def running(name: str, *, cpu: int) -> Iterator[Contender]:
    """The contender of that name, ready for clients; its processes stay on that CPU."""
    start = {QEMU: _qemu, NBDFUSE: _nbdfuse}.get(name) or functools.partial(_ours, name)
    with scratch() as directory:
        allocate(directory / "media")
        with start(directory, ("taskset", "--cpu-list", str(cpu))) as contender:
            yield contender


def raw(fast: Contender) -> Contender:
    """The media of `fast` themselves, past its mount and its daemon.

    Not a file of its own: two files in memory differ by a third or more at large I/O, by where
    their pages lie.
    """
    assert fast.daemon is not None
    file = fast.daemon.directory / "media"
    return Contender(
        name=RAW,
        pids=[],
        is_running=lambda: True,
        log=str,
        file=file,
        attach=lambda: _cleared(file, attached(file)),
    )


@contextlib.contextmanager
def _ours(name: str, directory: Path, pinned: Sequence[str]) -> Iterator[Contender]:
    engine, dax = OURS[name]
    file = directory / "mnt" / NAME
    config = CONFIG.format(dir=directory, engine=engine, dax=dax)
    daemon = Daemon(directory, config, program=(*pinned, PMBLK, "serve"))
    with started(daemon):
        contender = Contender(
            name=name,
            pids=[daemon.pid],
            is_running=lambda: daemon.running,
            log=lambda: daemon.log,
            file=file,
            attach=lambda: _cleared(file, file_systems.attached(daemon, NAME)),
            daemon=daemon,
        )
        _check_way(contender, dax)
        yield contender


def _check_way(contender: Contender, dax: str) -> None:
    """Figures of a way that was not to be had here would be those of another one."""
    assert contender.daemon is not None
    (namespace,) = contender.daemon.list()
    fuse = namespace["fuse"]
    if fuse["dax"] != {"auto": "dax"}.get(dax, dax):
        raise ServerError(f"{contender.name} is not to be had here: {fuse['dax_reason']}")


@contextlib.contextmanager
def _qemu(directory: Path, pinned: Sequence[str]) -> Iterator[Contender]:
    mount, log = directory / "mnt", directory / "log"
    mount.touch()  # it serves one file, over this one
    command = [*pinned, *_words(QEMU_COMMAND, directory)]
    with spawned(command, log) as process:
        yield _ready(_peer(QEMU, mount, [process], log))


@contextlib.contextmanager
def _nbdfuse(directory: Path, pinned: Sequence[str]) -> Iterator[Contender]:
    mount, log = directory / "mnt", directory / "log"
    mount.mkdir()
    with spawned([*pinned, *_words(NBDKIT_COMMAND, directory)], log) as nbdkit:
        _await(lambda: (directory / "nbd.sock").exists(), "nbdkit does not listen", log)
        with spawned([*pinned, *_words(NBDFUSE_COMMAND, directory)], log) as nbdfuse:
            yield _ready(_peer(NBDFUSE, mount / "nbd", [nbdkit, nbdfuse], log))


def _words(command: str, directory: Path) -> list[str]:
    places = {name: directory / path for name, path in _PLACES.items()}
    return [word.format(**places) for word in shlex.split(command)]


_PLACES = {"file": "media", "mount": "mnt", "socket": "nbd.sock"}


def _peer(
    name: str, file: Path, processes: Sequence["subprocess.Popen[bytes]"], log: Path
) -> Contender:
    return Contender(
        name=name,
        pids=[process.pid for process in processes],
        is_running=lambda: all(process.poll() is None for process in processes),
        log=lambda: log.read_text(errors="replace"),
        file=file,
        attach=lambda: _cleared(file, attached(file)),
    )


def _ready(contender: Contender) -> Contender:
    """Its file has its size, and is read from."""

    def is_there() -> bool:
        contender.check()
        try:
            return contender.file.stat().st_size == servers.FILE_BYTES
        except OSError:
            return False

    with contender.guarded(START_SECONDS + POLL_SECONDS):
        _await(is_there, f"{contender.name} does not serve", None)
        read_first_block(contender.file)
    return contender


def _await(condition: Callable[[], bool], complaint: str, log: Path | None) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise ServerError(f"{complaint}:\n{log.read_text() if log else ''}")
        time.sleep(POLL_SECONDS)


# ---- block devices


@contextlib.contextmanager
def attached(file: Path) -> Iterator[Path]:
    """A loop device on the file, as `pmblk attach` makes one, and without pmblk."""
    options = ("--direct-io=on", "--sector-size", str(BLOCK_BYTES))
    device = Path(file_systems.run("losetup", "--find", "--show", *options, str(file)).strip())
    try:
        yield device
    finally:
        file_systems.drop_loop(device)


@contextlib.contextmanager
def _cleared(file: Path, attachment: AbstractContextManager[Path]) -> Iterator[Path]:
    """An interrupt in the middle of attaching would leave a device that nobody has heard of."""
    try:
        with attachment as device:
            yield device
    except BaseException:
        for device in loop.devices_on(lambda backing: backing == file):
            file_systems.drop_loop(device)
        raise


def first_io_seconds(contender: Contender) -> float:
    """From the exec of `pmblk attach` to a client that has read 4 KiB from the device."""
    begun = time.monotonic()
    with contender.attach() as device:
        read_first_block(device)
        return time.monotonic() - begun


def read_first_block(file: Path) -> None:
    """Past the page cache. Raises OSError."""
    fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as page:  # O_DIRECT wants it aligned
            if os.preadv(fd, [page], 0) != BLOCK_BYTES:
                raise ServerError(f"{file} is shorter than a block")
    finally:
        os.close(fd)
