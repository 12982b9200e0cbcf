"""Somebody truncates the file under a served namespace: an error there, and the daemon lives."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import nbd_raw as raw
from tests.harness.command_line import answer, ask
from tests.harness.daemon import Daemon, scratch
from tests.harness.file_systems import guarded
from tests.harness.programs import wait_for

pytestmark = pytest.mark.e2e

KIB, MIB = 1 << 10, 1 << 20
SIZE = 32 * MIB
LEFT = 5 * MIB + 100  # of the file, after the truncation
GONE = 16 * MIB
BUSY = 24 * MIB  # the range that loads go over: the largest that every kind serves, in 8 MiB
HANG_SECONDS = 60
KINDS = {
    "extent": '"extent"',
    "page-cache": '{ kind = "page-cache", arena = "1MiB" }',
    "struct-page": '"struct-page"',
    "on-device": '{ kind = "struct-page", memmap = "device" }',
    "transient-page": '"transient-page"',
    "pfn": '"pfn"',
}
CONFIG = """
[[namespace]]
name = "bad"
path = "{media}/bad.img"
size = {size}
representation = {kind}
reserve = {reserve}

[[namespace]]
name = "good"
path = "{dir}/good.img"
size = {size}

[nbd]
listen = ["unix:{dir}/nbd.sock"]
[fuse]
mountpoint = "{dir}/mnt"
engine = "{engine}"
"""


@contextlib.contextmanager
def served(
    kind: str = "extent", *, media: Path | None = None, engine: str = "auto"
) -> Iterator[Daemon]:
    """`bad` on tmpfs, or in `media`, and full of x; and `good`, which nothing may happen to."""
    with scratch() as directory:
        config = CONFIG.replace("{dir}", str(directory)).replace("{size}", str(SIZE))
        config = config.replace("{media}", str(media or directory)).replace("{kind}", KINDS[kind])
        config = config.replace("{engine}", engine)
        config = config.replace("{reserve}", "true" if kind == "on-device" else "false")
        daemon = Daemon(directory, config).start()
        try:
            with guarded(daemon, seconds=HANG_SECONDS):
                with connect(daemon, "bad") as client:
                    fill(client, size_of(daemon))
                yield daemon
        finally:
            if daemon.running:
                daemon.stop()


def fill(client: raw.Client, size: int) -> None:
    for offset in range(0, size, MIB):
        length = min(MIB, size - offset)
        assert client.write(offset, b"x" * length) == 0
    assert client.ask(raw.FLUSH).error == 0


def connect(daemon: Daemon, name: str) -> "contextlib.AbstractContextManager[raw.Client]":
    return raw.connected(daemon.directory / "nbd.sock", name, structured=True)


def size_of(daemon: Daemon) -> int:
    return daemon.report("bad").size_bytes


def media_of(daemon: Daemon, name: str = "bad") -> Path:
    return Path(daemon.report(name).path)


def truncate(daemon: Daemon) -> str:
    """What the daemon has to say about it."""
    path = media_of(daemon)
    before = path.stat().st_size
    os.truncate(path, LEFT)
    return f"somebody truncated {path} from {before} to {LEFT} bytes"


def is_refused(client: raw.Client) -> None:
    """Whatever it asks for, also what is still in the file."""
    assert client.ask(raw.READ, 0, 4 * KIB).error == errno.EIO
    assert client.ask(raw.READ, GONE, MIB).error == errno.EIO
    assert client.write(0, b"y" * 4 * KIB) == errno.EIO
    assert client.write(GONE, b"y" * MIB) == errno.EIO
    assert client.ask(raw.TRIM, 0, MIB).error == errno.EIO
    assert client.ask(raw.WRITE_ZEROES, GONE, MIB).error == errno.EIO
    assert client.ask(raw.FLUSH).error == errno.EIO


def is_unharmed(daemon: Daemon) -> None:
    content = os.urandom(MIB)
    with connect(daemon, "good") as client:
        assert client.write(8 * MIB, content, flags=raw.FUA) == 0
        assert client.read(8 * MIB, MIB) == content
    path = daemon.directory / "mnt" / "good"
    with path.open("r+b", buffering=0) as file:
        file.seek(8 * MIB)
        assert file.read(MIB) == content
        assert file.write(content[::-1]) == MIB
        os.fsync(file.fileno())


def is_known(daemon: Daemon, reason: str) -> None:
    """One line in the log, at error level, that says what to do; and the list shows it."""
    wait_for(lambda: 'event="media failed"' in daemon.log)
    lines = [line for line in daemon.log.splitlines() if 'event="media failed"' in line]
    assert len(lines) == 1
    for words in ("level=error", "name=bad", reason, "stop the daemon, restore the file"):
        assert words in lines[0], lines
    assert daemon.report("bad").failure == reason
    assert daemon.report("good").failure is None
    shown = " ".join(answer(daemon, "list").split())
    assert f"failed: {reason}" in shown
    assert "Traceback" not in daemon.log
    assert "Fatal" not in daemon.log


def stops_with(daemon: Daemon, reason: str) -> None:
    """Status 1: it stopped in order, and not all of what it served is durable."""
    assert daemon.stop() == 1, daemon.log
    last = daemon.log.splitlines()[-1]
    assert last.startswith(f"pmblk: namespace bad: {reason}; restore the file, and check"), last
    assert not (daemon.directory / "nbd.sock").exists()
    assert media_of_config(daemon).stat().st_size == LEFT, "nobody made it longer"


def media_of_config(daemon: Daemon) -> Path:
    return next(
        Path(line.split('"')[1])
        for line in daemon.config.read_text().splitlines()
        if line.startswith("path")
    )


# ---- one I/O after the other


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        *((kind, "large write") for kind in KINDS),
        *(("extent", first) for first in ("small write", "read", "hole", "flush", "zeroes")),
        *(("page-cache", first) for first in ("small write", "read")),
    ],
)
def test_whoever_meets_lost_memory_over_nbd_gets_an_error_and_so_do_all_after_him(
    kind: str, first: str
) -> None:
    with served(kind) as daemon:
        with raw.Client(daemon.directory / "nbd.sock") as client:
            client.go("bad", structured=True)
            if first == "hole":
                assert client.ask(raw.TRIM, GONE, MIB).error == 0
            reason = truncate(daemon)
            _meet(client, first)
        with connect(daemon, "bad") as client:
            is_refused(client)
        is_unharmed(daemon)
        is_known(daemon, reason)
        stops_with(daemon, reason)


def _meet(client: raw.Client, first: str) -> None:
    """An error, or the end of the connection in the middle of a reply; never a success."""
    if first == "read":
        client.request(raw.READ, GONE, MIB)
        with contextlib.suppress(AssertionError, ConnectionResetError):  # it was cut off
            reply = client.reply()
            assert reply.error == errno.EIO or reply.data == b"x" * MIB  # frames of its own
            client.request(raw.FLUSH)
            assert client.reply().error == errno.EIO
    elif first == "small write":
        # A frame of a page cache takes it; it is not durable, and no flush will say so.
        assert client.write(GONE, b"y" * 4 * KIB) in (0, errno.EIO)
        assert client.ask(raw.FLUSH).error == errno.EIO
    elif first == "large write":
        assert client.write(GONE, b"y" * 8 * MIB) == errno.EIO
    elif first == "hole":
        assert client.ask(raw.READ, GONE, 64 * KIB).error == errno.EIO
    elif first == "zeroes":
        assert client.ask(raw.WRITE_ZEROES, GONE, 8 * MIB).error == errno.EIO
    else:
        assert client.ask(raw.FLUSH).error == errno.EIO


@pytest.mark.parametrize(
    ("engine", "kind", "first"),
    [
        *(("kernel", "extent", first) for first in ("read", "write", "fsync")),
        *(("pyfuse3", "extent", first) for first in ("read", "write")),
        *(("kernel", kind, "write") for kind in ("page-cache", "on-device")),
    ],
)
def test_whoever_meets_lost_memory_in_a_file_gets_eio(engine: str, kind: str, first: str) -> None:
    with served(kind, engine=engine) as daemon:
        path = daemon.directory / "mnt" / "bad"
        fd = os.open(path, os.O_RDWR)
        try:
            reason = truncate(daemon)
            for one in (first, "read", "write", "fsync"):
                assert _attempt(fd, one) == errno.EIO, one
        finally:
            os.close(fd)
        is_unharmed(daemon)
        is_known(daemon, reason)
        stops_with(daemon, reason)


def _attempt(fd: int, what: str) -> int:
    """Its errno. A write counts when it is synced, for a page cache keeps it until then."""
    try:
        if what == "read":
            os.pread(fd, MIB, GONE)
        elif what == "write":
            os.pwrite(fd, b"y" * MIB, GONE)
            os.fsync(fd)
        else:
            os.fsync(fd)
    except OSError as error:
        return error.errno or -1
    return 0


def test_media_on_a_disk_fail_alike_and_are_not_made_longer(tmp_path: Path) -> None:
    with served(media=tmp_path) as daemon:
        assert daemon.report("bad").durability == "file"
        with connect(daemon, "bad") as client:
            reason = truncate(daemon)
            assert client.write(SIZE - MIB, b"y" * MIB) == errno.EIO
            is_refused(client)
        is_known(daemon, reason)
        stops_with(daemon, reason)


def test_a_file_that_nobody_uses_is_looked_at_and_a_longer_one_is_fine() -> None:
    with served() as daemon:
        path = media_of(daemon)
        os.truncate(path, 2 * SIZE)
        with connect(daemon, "bad") as client:
            assert client.write(0, b"y" * MIB, flags=raw.FUA) == 0
            assert client.read(GONE, MIB) == b"x" * MIB
        assert daemon.report("bad").failure is None
        os.truncate(path, LEFT)
        is_known(daemon, f"somebody truncated {path} from {SIZE} to {LEFT} bytes")


def test_a_failed_namespace_cannot_be_changed_and_can_be_taken_away() -> None:
    with served() as daemon:
        reason = truncate(daemon)
        for command in (
            ("switch", "bad", "pfn"),
            ("save", "bad", str(daemon.directory / "copy")),
            ("poison", "bad", "--offset", "0"),
            ("describe", "bad"),
        ):
            done = ask(daemon, *command)
            assert done.returncode in (1, 2), command
            assert reason in done.stderr, command
        without = daemon.config.read_text().split("[[namespace]]", 2)[2]
        assert daemon.reload("[[namespace]]" + without).removed == ["bad"]
        wait_for(lambda: "not all of it durable" in daemon.log)
        is_unharmed(daemon)
        assert daemon.stop() == 0, "what it serves is durable"


# ---- many at once


class Load:
    """Reads and writes in a thread, until one fails; `wrong` is what must never be."""

    def __init__(self, name: str, one: Callable[[int], int]) -> None:
        self.name = name
        self.done = 0
        self.error = 0
        self.wrong = ""
        self._one = one
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self.error:
                self.error = self._one(self.done)
                self.done += 1
        except (AssertionError, OSError) as error:
            closed = "closed after" in str(error) or isinstance(error, ConnectionError)
            self.error = errno.EIO
            self.wrong = "" if closed else repr(error)

    def ended(self) -> None:
        self._thread.join(HANG_SECONDS)
        assert not self._thread.is_alive(), f"{self.name} hangs"
        assert (self.error, self.wrong) == (errno.EIO, ""), self.name


def nbd_reads(client: raw.Client) -> Callable[[int], int]:
    def one(turn: int) -> int:
        reply = client.ask(raw.READ, turn * MIB % BUSY, MIB)
        assert reply.error or set(reply.data) <= {ord("x"), ord("y")}, "made-up bytes"
        return reply.error

    return one


def nbd_writes(client: raw.Client, length: int) -> Callable[[int], int]:
    """Each is read back: a write that is answered well is there."""

    def one(turn: int) -> int:
        offset = turn * length % BUSY
        error = client.write(offset, b"y" * length)
        if error:
            return error
        reply = client.ask(raw.READ, offset, length)
        assert reply.error or set(reply.data) <= {ord("x"), ord("y")}, "made-up bytes"
        return reply.error

    return one


FILE_LOAD = """
import os, sys
path, what = sys.argv[1:]
fd = os.open(path, os.O_RDWR)
print("begun", flush=True)
turn = 0
try:
    while True:
        offset = turn * 65536 % {size}
        if what == "read":
            data = os.pread(fd, 65536, offset)
            if set(data) - set(b"xy"):
                sys.exit("made-up bytes")
        else:
            os.pwrite(fd, b"y" * 65536, offset)
        turn += 1
except OSError as error:
    print(error.errno, flush=True)
"""


@contextlib.contextmanager
def file_load(daemon: Daemon, what: str) -> Iterator["subprocess.Popen[str]"]:
    """Through the mount, by a process of its own."""
    path = daemon.directory / "mnt" / "bad"
    script = FILE_LOAD.replace("{size}", str(BUSY))
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path), what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            yield process
        finally:
            process.kill()


def good_load(client: raw.Client, stop: threading.Event) -> Callable[[int], int]:
    """On the other namespace; its error is the end of the test."""

    def one(turn: int) -> int:
        content = bytes([turn % 251]) * MIB
        assert client.write(turn % 24 * MIB, content) == 0
        assert client.read(turn % 24 * MIB, MIB) == content
        return errno.EIO if stop.is_set() else 0

    return one


@pytest.mark.parametrize("kind", KINDS)
def test_with_everything_in_flight_nobody_is_told_what_is_not_so(kind: str) -> None:
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(served(kind))
        clients = []
        for name in ("bad", "bad", "bad", "bad", "good"):
            clients.append(stack.enter_context(raw.Client(daemon.directory / "nbd.sock")))
            clients[-1].go(name, structured=True)
        stuck = clients[3]  # reads nothing of 24 MiB
        stuck.send(b"".join(stuck.packed(raw.READ, at * MIB, 8 * MIB) for at in (0, 8, 16)))
        files = [stack.enter_context(file_load(daemon, what)) for what in ("read", "write")]
        stop = threading.Event()
        good = Load("good", good_load(clients[4], stop))
        loads = [
            Load("reads", nbd_reads(clients[0])),
            Load("small writes", nbd_writes(clients[1], 16 * KIB)),
            Load("large writes", nbd_writes(clients[2], 2 * MIB)),
        ]
        wait_for(lambda: all(load.done > 20 for load in (*loads, good)), seconds=30)
        reason = truncate(daemon)
        for load in loads:
            load.ended()
        for process in files:
            said, complaint = process.communicate(timeout=HANG_SECONDS)
            assert (said, complaint) == (f"{errno.EIO}\n", "")
        _drain_true_bytes(stuck)
        before = good.done
        wait_for(lambda: good.done > before + 10)
        stop.set()
        good.ended()
        is_unharmed(daemon)
        is_known(daemon, reason)
        stops_with(daemon, reason)


def _drain_true_bytes(client: raw.Client) -> None:
    """What had left for it before is true, an error is one, and nothing else comes."""
    client.sock.settimeout(10)
    with contextlib.suppress(AssertionError, ConnectionError):  # cut off
        for _ in range(3):
            reply = client.reply()
            if not reply.error:
                assert set(reply.data) <= {ord("x"), ord("y")}
                assert reply.data.strip(b"xy") == b""


def test_another_sigbus_ends_the_daemon_and_has_a_last_word() -> None:
    with served() as daemon:
        os.kill(daemon.pid, signal.SIGBUS)
        wait_for(lambda: not daemon.running)
        assert "Fatal Python error: Bus error" in daemon.log
