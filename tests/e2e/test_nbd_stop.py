"""SIGTERM: what has arrived is answered, what was written is flushed, nothing is left behind."""

import random
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import nbd_raw as raw
from tests.harness.daemon import Daemon, running

pytestmark = pytest.mark.e2e

KIB, MIB = 1 << 10, 1 << 20
SIZE = 64 * MIB
CONFIG = """
[[namespace]]
name = "cache"
path = "{dir}/cache.img"
size = "64MiB"
representation = "page-cache"

[[namespace]]
name = "extent"
path = "{dir}/extent.img"
size = "64MiB"

[nbd]
listen = ["unix:{dir}/nbd.sock"]
"""


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with running(CONFIG) as started:
        yield started


def _path(daemon: Daemon) -> Path:
    return daemon.directory / "nbd.sock"


def _assert_stopped_well(daemon: Daemon, *, seconds: float) -> None:
    """SIGTERM, and then status 0, in time, with no complaint and no socket left."""
    started = time.monotonic()
    assert daemon.stop() == 0, daemon.log
    assert time.monotonic() - started < seconds
    for word in ("Traceback", "level=error", "level=warning"):
        assert word not in daemon.log, daemon.log
    assert "event=stopped" in daemon.log
    assert not _path(daemon).exists()
    assert not daemon.socket.exists()


def test_a_stop_flushes_what_idle_clients_have_written(daemon: Daemon) -> None:
    content = random.randbytes(4 * MIB)
    with (
        raw.Client(_path(daemon)).go("cache") as writer,
        raw.Client(_path(daemon)) as mute,
        raw.Client(_path(daemon)).go("extent") as stalled,
    ):
        mute.receive(18)
        stalled.send(raw.request(raw.WRITE, 0, 2 * MIB) + bytes(MIB))
        assert writer.write(MIB + 1, content) == 0
        media = daemon.directory / "cache.img"
        assert content not in media.read_bytes(), "it is in frames only, or this tests nothing"
        _assert_stopped_well(daemon, seconds=5)
        assert media.read_bytes()[MIB + 1 :][: len(content)] == content
        assert writer.closed()
        assert mute.closed()
        assert stalled.closed()


def test_requests_that_had_arrived_are_answered(daemon: Daemon) -> None:
    with raw.Client(_path(daemon)).go("cache") as client:
        content = random.randbytes(64 * KIB)
        requests = [client.packed(raw.WRITE, i * len(content), len(content)) for i in range(64)]
        flush, read = client.packed(raw.FLUSH), client.packed(raw.READ, 0, 4096)
        client.send(content.join([*requests, b""]) + flush + read)
        assert daemon.stop() == 0
        assert [client.reply().error for _ in range(66)] == [0] * 66
        assert client.closed()
    assert (daemon.directory / "cache.img").read_bytes()[: 64 * len(content)] == content * 64


_BUSY = """
import sys, threading
from pathlib import Path
from tests.harness import nbd_raw as raw
client = raw.Client(Path(sys.argv[1])).go("extent")
requests = b"".join(raw.request(raw.WRITE, i * 4096, 4096) + bytes(4096) for i in range(64))
threading.Thread(target=client.drain, daemon=True).start()
print("busy", flush=True)
try:
    while True:
        client.send(requests)
except OSError:
    pass
"""


def test_clients_that_never_pause_do_not_keep_it_from_stopping(daemon: Daemon) -> None:
    command = [sys.executable, "-c", _BUSY, str(_path(daemon))]
    root = str(Path(__file__).parents[2])
    clients = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(2)
    ]
    try:
        for client in clients:
            assert client.stdout is not None
            assert client.stdout.readline() == "busy\n"
        _assert_stopped_well(daemon, seconds=5)
        assert [client.wait(10) for client in clients] == [0, 0]
    finally:
        for client in clients:
            client.kill()
            client.communicate()


def test_a_client_that_never_reads_is_cut_off_at_the_deadline() -> None:
    with running(CONFIG, overrides=["daemon.stop_seconds=1"]) as daemon:
        with raw.Client(_path(daemon)).go("extent") as greedy:
            with raw.connected(_path(daemon), "extent") as client:
                for offset in range(0, SIZE, MIB):
                    assert client.write(offset, b"e" * MIB) == 0
            with raw.connected(_path(daemon), "cache") as client:
                assert client.write(0, b"kept" * 1024) == 0
            greedy.send(b"".join(raw.request(raw.READ, 0, MIB) for _ in range(1000)))
            ready, _, _ = select.select([greedy.sock], [], [], raw.SECONDS)
            assert ready
            started = time.monotonic()
            assert daemon.stop() == 1
            assert 0.5 < time.monotonic() - started < 4
        last = daemon.log.splitlines()[-1]
        assert last == "pmblk: clients did not let go in time and were cut off"
        assert "Traceback" not in daemon.log
        assert not _path(daemon).exists()
        assert (daemon.directory / "cache.img").read_bytes()[:4096] == b"kept" * 1024
