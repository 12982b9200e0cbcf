"""What was promised is there: after SIGKILL, and on the way to the disk before the reply.

SIGKILL ends the process, not the machine, so this finds a promise that the daemon keeps in its
own memory (a dirty frame, an unsent write); that the kernel is asked in time, strace shows.
"""

import contextlib
import os
import random
import signal
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest

from tests.harness import nbd_raw as raw
from tests.harness.daemon import PMBLK, Daemon, scratch
from tests.harness.programs import assert_no_complaints

pytestmark = pytest.mark.e2e

MIB = 1 << 20
SECONDS = 20
KINDS = {
    "extent": '"extent"',
    "page-cache": '{ kind = "page-cache", arena = "1MiB" }',
    "struct-page": '"struct-page"',
    "transient-page": '{ kind = "transient-page", pool_pages = 256 }',
    "pfn": '"pfn"',
}


@contextlib.contextmanager
def daemon_in(parent: Path, kind: str, *, size: str = "16MiB") -> Iterator[Daemon]:
    """A daemon that is not started yet, on media below `parent`."""
    with scratch(parent) as directory:
        config = f"""
[[namespace]]
name = "ns"
path = "{directory}/ns.img"
size = "{size}"
representation = {KINDS[kind]}
[nbd]
listen = ["unix:{directory}/nbd.sock"]
"""
        daemon = Daemon(directory, config)
        try:
            yield daemon
        finally:
            if daemon.running:
                daemon.kill()


def _path(daemon: Daemon) -> Path:
    return daemon.directory / "nbd.sock"


# ---- SIGKILL

SLOTS = 256
SLOT_BYTES = 5000  # not a page, and not at its start: neighbours share pages
STRIDE_BYTES = 6008
DEPTH = 32


class Writer:
    """Keeps `DEPTH` writes in flight, one a slot, and knows what may and what must be there.

    A slot is filled with the number of its write. `durable` is the last that was acknowledged as
    durable, `issued` are those that were sent after it.
    """

    def __init__(self, path: Path, source: random.Random) -> None:
        self.durable = dict.fromkeys(range(SLOTS), 0)
        self.issued: dict[int, set[int]] = {slot: set() for slot in range(SLOTS)}
        self.acknowledged = 0
        self._source = source
        self._version = 0
        self._busy: set[int] = set()
        self._completed: dict[int, int] = {}
        self._handle = nbd.NBD()
        self._handle.connect_unix(str(path))

    def run(self) -> None:
        """Until the connection breaks."""
        try:
            while True:
                while len(self._busy) < DEPTH:
                    self._write(self._source.choice([*set(range(SLOTS)) - self._busy]))
                    if self._source.random() < 0.02:
                        self._flush()
                self._handle.poll(1000 * SECONDS)
        except nbd.Error:
            assert self._handle.aio_is_dead() or self._handle.aio_is_closed()

    def _write(self, slot: int) -> None:
        self._version += 1
        version = self._version
        fua = self._source.random() < 0.3
        content = nbd.Buffer.from_bytearray(_content(version))

        def completed(error: int) -> int:
            if not error:
                self._busy.discard(slot)
                self.acknowledged += 1
                self._completed[slot] = version
                if fua:
                    self._is_durable(slot, version)
            assert content is not None, "alive until here"
            return 1

        self._busy.add(slot)
        self.issued[slot].add(version)
        flags = nbd.CMD_FLAG_FUA if fua else 0
        self._handle.aio_pwrite(content, slot * STRIDE_BYTES, completed, flags)

    def _flush(self) -> None:
        covered = dict(self._completed)

        def completed(error: int) -> int:
            if not error:
                for slot, version in covered.items():
                    self._is_durable(slot, version)
            return 1

        self._handle.aio_flush(completed)

    def _is_durable(self, slot: int, version: int) -> None:
        if version > self.durable[slot]:
            self.durable[slot] = version
            self.issued[slot] = {later for later in self.issued[slot] if later > version}


def _content(version: int) -> bytearray:
    return bytearray(struct.pack("=Q", version) * (SLOT_BYTES // 8))


def _verify(path: Path, writer: Writer) -> None:
    with raw.connected(path, "ns") as client:
        for slot in range(SLOTS):
            words = struct.iter_unpack("=Q", client.read(slot * STRIDE_BYTES, SLOT_BYTES))
            found = {word for (word,) in words}
            allowed = {writer.durable[slot], *writer.issued[slot]}
            assert found <= allowed, f"slot {slot} holds {found}, not {allowed}"


@pytest.mark.parametrize("parent", ["/dev/shm", "/tmp"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_acknowledged_as_durable_survives_sigkill(kind: str, parent: str) -> None:
    """The daemon starts again on the sockets and files that the killed one left behind."""
    for _ in range(3):
        seed = random.randrange(2**32)
        print(f"seed {seed}")
        source = random.Random(seed)
        with daemon_in(Path(parent), kind) as daemon:
            daemon.start()
            writer = Writer(_path(daemon), source)
            killer = threading.Timer(source.uniform(0.02, 0.3), daemon.kill)
            killer.start()
            writer.run()
            killer.join(SECONDS)
            assert not daemon.running
            assert _path(daemon).is_socket(), "a stale socket is in the way"
            daemon.start()
            _verify(_path(daemon), writer)
            assert daemon.stop() == 0
            assert_quiet(daemon)
            assert writer.acknowledged > 0


def assert_quiet(daemon: Daemon) -> None:
    for word in ("Traceback", "level=error", "level=warning"):
        assert word not in daemon.log, daemon.log


def test_a_second_daemon_on_the_same_media_is_refused() -> None:
    with daemon_in(Path("/dev/shm"), "page-cache") as first, scratch() as elsewhere:
        first.start()
        media = first.directory / "ns.img"
        with raw.connected(_path(first), "ns") as client:
            assert client.write(0, b"first" * 1000, flags=raw.FUA) == 0
            before = media.read_bytes()
            config = first.config.read_text().replace(str(_path(first)), f"{elsewhere}/nbd.sock")
            (elsewhere / "second.toml").write_text(config)
            control = f"control.socket={elsewhere}/control.sock"
            refused = subprocess.run(
                [PMBLK, "serve", str(elsewhere / "second.toml"), "--set", control],
                capture_output=True,
                timeout=SECONDS,
                check=False,
                text=True,
            )
            assert refused.returncode == 2
            (line,) = refused.stderr.splitlines()
            assert str(media) in line
            assert f"process {first.pid}" in line
            assert refused.stdout == ""
            assert media.read_bytes() == before
            assert sorted(elsewhere.iterdir()) == [elsewhere / "second.toml"]
            assert client.read(0, 5000) == b"first" * 1000
        assert_no_complaints(first)
        assert first.stop() == 0


# ---- the order of system calls


@contextlib.contextmanager
def _traced(daemon: Daemon, output: Path) -> Iterator[None]:
    """strace on every thread of the daemon, attached when the block begins, gone when it ends."""
    command = ["strace", "-f", "-e", "trace=fdatasync,sendmsg,fsync", "-xx", "-s", "64"]
    command += ["-o", str(output), "-p", str(daemon.pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        assert "attached" in strace.stderr.readline()
        try:
            yield
        finally:
            strace.send_signal(signal.SIGINT)
            strace.wait(SECONDS)


def _events(output: Path) -> list[str]:
    """In order: "sync" as one is asked for, "synced" as it has succeeded, "reply N" as it leaves.

    A call that another thread interrupts is on two lines, "unfinished" and "resumed".
    """
    events = []
    for line in output.read_text().splitlines():
        if "sendmsg(" in line:
            _, header, rest = line.partition(r"\x67\x44\x66\x98\x00\x00\x00\x00")
            if header:
                cookie = bytes.fromhex(rest.replace("\\x", "")[:16])
                events.append(f"reply {int.from_bytes(cookie, 'big')}")
        elif "sync" in line:
            if "sync(" in line:
                events.append("sync")
            if line.endswith("= 0"):
                events.append("synced")
    return events


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_file_is_synced_before_the_reply_to_flush_and_fua(kind: str) -> None:
    with daemon_in(Path("/tmp"), kind) as daemon:
        daemon.start()
        assert daemon.list()[0]["durability"] == "file"
        output = daemon.directory / "strace"
        with raw.connected(_path(daemon), "ns") as client:
            with _traced(daemon, output):
                assert client.write(4096, b"1" * 4096) == 0
                assert client.ask(raw.FLUSH).error == 0
                assert client.write(8192, b"3" * 4096, flags=raw.FUA) == 0
                zero = client.ask(raw.WRITE_ZEROES, 4096, 4096, flags=raw.FUA)
                assert zero.error == 0
            assert _events(output) == [
                *("reply 1", "sync", "synced", "reply 2"),
                *("sync", "synced", "reply 3"),
                *("sync", "synced", "reply 4"),
            ]
        assert daemon.stop() == 0


def test_flushes_that_come_together_share_a_sync() -> None:
    with daemon_in(Path("/tmp"), "extent") as daemon:
        daemon.start()
        output = daemon.directory / "strace"
        with raw.connected(_path(daemon), "ns") as client:
            with _traced(daemon, output):
                client.send(b"".join(client.packed(raw.FLUSH) for _ in range(100)))
                assert [client.reply().error for _ in range(100)] == [0] * 100
            events = _events(output)
            assert 1 <= events.count("synced") <= 2
            assert sum(event.startswith("reply") for event in events) <= 100
        assert daemon.stop() == 0


def test_nothing_is_synced_where_memory_is_all_there_is() -> None:
    with daemon_in(Path("/dev/shm"), "extent") as daemon:
        daemon.start()
        assert daemon.list()[0]["durability"] == "memory"
        output = daemon.directory / "strace"
        with raw.connected(_path(daemon), "ns") as client:
            with _traced(daemon, output):
                assert client.write(0, b"1" * 4096, flags=raw.FUA) == 0
                assert client.ask(raw.FLUSH).error == 0
            assert _events(output) == ["reply 1", "reply 2"]
        os.kill(daemon.pid, signal.SIGKILL)
