"""Clients that take and never give: no memory piles up, nobody else starves, nothing falls over."""

import os
import random
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import nbd_raw as raw
from tests.harness.daemon import Daemon, running
from tests.harness.programs import assert_no_complaints

pytestmark = pytest.mark.e2e

KIB, MIB = 1 << 10, 1 << 20
SIZE = 64 * MIB
PATIENCE_SECONDS = 5
CONFIG = """
[[namespace]]
name = "extent"
path = "{dir}/extent.img"
size = "64MiB"

[[namespace]]
name = "cache"
path = "{dir}/cache.img"
size = "64MiB"
representation = { kind = "page-cache", arena = "1MiB" }

[nbd]
listen = ["unix:{dir}/nbd.sock"]
"""


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """Both namespaces are full of data: a hole is answered without memory."""
    with running(CONFIG) as started:
        noise = random.Random(1).randbytes(8 * MIB)
        for name in ("extent", "cache"):
            with raw.connected(started.directory / "nbd.sock", name) as client:
                for offset in range(0, SIZE, len(noise)):
                    assert client.write(offset, noise) == 0
        yield started
        assert_no_complaints(started)


@pytest.fixture
def path(daemon: Daemon) -> Path:
    """The daemon's socket."""
    return daemon.directory / "nbd.sock"


def _status_kib(daemon: Daemon, key: str) -> int:
    lines = Path(f"/proc/{daemon.pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields[key].split()[0])


def _private_kib(daemon: Daemon) -> int:
    """Resident memory without the namespaces themselves, which are shared mappings."""
    return _status_kib(daemon, "VmRSS") - _status_kib(daemon, "RssShmem")


def _forget_peak(daemon: Daemon) -> None:
    """VmHWM starts anew (proc(5), clear_refs)."""
    Path(f"/proc/{daemon.pid}/clear_refs").write_text("5")


def _await_first_bytes(client: raw.Client) -> None:
    """The daemon has begun to answer; nothing is read."""
    ready, _, _ = select.select([client.sock], [], [], raw.SECONDS)
    assert ready, "not a byte of a reply"


def _reads(count: int, length: int) -> bytes:
    """Requests for reads that walk over the namespace."""
    return b"".join(
        raw.request(raw.READ, index * length % SIZE, length, cookie=index) for index in range(count)
    )


@pytest.mark.parametrize("name", ["extent", "cache"])
def test_a_client_that_asks_for_much_and_vanishes_leaves_nothing_behind(
    daemon: Daemon, path: Path, name: str
) -> None:
    before = _private_kib(daemon)
    _forget_peak(daemon)
    peak_before = _status_kib(daemon, "VmHWM")
    for _ in range(5):
        with raw.connected(path, "extent") as other, raw.Client(path).go(name) as client:
            client.send(_reads(200, MIB))
            _await_first_bytes(client)
            assert len(other.read(MIB, MIB)) == MIB
    with raw.connected(path, name) as other:
        assert len(other.read(0, MIB)) == MIB
    peak = _status_kib(daemon, "VmHWM") - peak_before
    assert peak < 128 * KIB, f"{peak} KiB were needed to answer a client that takes nothing"
    assert _private_kib(daemon) - before < 32 * KIB


def test_large_reads_through_a_small_arena_need_bounded_memory(daemon: Daemon, path: Path) -> None:
    """24 reads of 32 MiB are 768 MiB; whoever asks may not make the daemon hold that."""
    _forget_peak(daemon)
    before = _status_kib(daemon, "VmHWM")
    with raw.Client(path).go("cache") as client:
        client.send(_reads(24, 32 * MIB))
        _await_first_bytes(client)
        peak = _status_kib(daemon, "VmHWM") - before
    assert peak < 160 * KIB, f"{peak} KiB for the reads of one client"


def test_a_client_that_never_reads_slows_nobody_down(daemon: Daemon, path: Path) -> None:
    before = _private_kib(daemon)
    with raw.Client(path).go("extent") as greedy, raw.connected(path, "extent") as other:
        greedy.send(_reads(5000, MIB))
        _await_first_bytes(greedy)
        seconds = sorted(_time_of_a_read(other, index) for index in range(500))
        assert seconds[-1] < 1
        assert seconds[len(seconds) // 2] < 0.02
        with raw.connected(path, "cache") as third:
            assert len(third.read(0, MIB)) == MIB
        assert _private_kib(daemon) - before < 32 * KIB


def _time_of_a_read(client: raw.Client, index: int) -> float:
    started = time.perf_counter()
    client.read(index * 64 * KIB % SIZE, 64 * KIB)
    return time.perf_counter() - started


def test_a_client_with_one_read_at_a_time_leaves_others_their_turn(
    daemon: Daemon, path: Path
) -> None:
    """The daemon spins for such a client; that must not keep it from accepting another."""
    pid = os.fork()
    if pid == 0:
        _read_for_ever(path)
    try:
        seconds = sorted(_time_of_a_visit(path) for _ in range(300))
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert seconds[-1] < 0.5
    assert seconds[len(seconds) // 2] < 0.02


def _read_for_ever(path: Path) -> None:
    """In a child, since two busy threads of one Python would slow each other down."""
    try:
        client = raw.Client(path).go("extent")
        request = raw.request(raw.READ, 0, 1)
        while True:
            client.sock.send(request)
            client.sock.recv(17)
    finally:
        os._exit(1)


def _time_of_a_visit(path: Path) -> float:
    started = time.perf_counter()
    with raw.connected(path, "extent") as client:
        client.read(0, 4096)
    return time.perf_counter() - started


def test_a_queue_deeper_than_the_arena_is_answered(daemon: Daemon, path: Path) -> None:
    """512 reads of 64 KiB in one piece, from a client that reads all it gets."""
    with raw.connected(path, "cache") as client:
        client.send(b"".join(client.packed(raw.READ, i * 64 * KIB, 64 * KIB) for i in range(512)))
        assert len({client.reply().cookie for _ in range(512)}) == 512


def test_a_client_that_never_reads_does_not_keep_all_frames(daemon: Daemon, path: Path) -> None:
    """It pins the whole arena; when another one needs a frame, it loses its connection."""
    with raw.Client(path).go("cache") as greedy, raw.connected(path, "cache") as other:
        greedy.send(_reads(5000, 64 * KIB))
        _await_first_bytes(greedy)
        started = time.monotonic()
        for index in range(50):
            assert len(other.read(SIZE - (index + 1) * 64 * KIB, 64 * KIB)) == 64 * KIB
        assert time.monotonic() - started < PATIENCE_SECONDS + 4
        assert greedy.drain() < 5000 * 64 * KIB
    assert daemon.log.count("reads too slowly") == 1


def test_one_connection_too_many_is_closed_and_the_others_live() -> None:
    with running(CONFIG, overrides=["nbd.max_connections=3"]) as daemon:
        path = daemon.directory / "nbd.sock"
        with raw.connected(path, "extent") as first, raw.Client(path).greet() as second:
            with raw.connected(path, "cache") as third:
                for _ in range(10):
                    with raw.Client(path) as refused:
                        assert refused.closed()
                assert first.write(0, b"still here") == 0
                assert third.read(0, 4) == bytes(4)
                assert second.ask_option(raw.LIST)[-1].kind == raw.REP_ACK
            with raw.connected(path, "extent") as again:
                assert again.read(0, 10) == b"still here"
        assert "Traceback" not in daemon.log
        assert "level=error" not in daemon.log
        assert daemon.log.count("too many connections") == 10


@pytest.mark.parametrize("name", ["extent", "cache"])
@pytest.mark.parametrize("flags", [0, raw.FUA])
def test_a_write_that_drips_in_meets_reads_and_trims_of_its_range(
    daemon: Daemon, path: Path, name: str, flags: int
) -> None:
    """Half of its payload is here when the range is trimmed under it, in a worker thread."""
    new = random.randbytes(8 * MIB)
    with raw.connected(path, name) as slow, raw.connected(path, name, structured=True) as other:
        header = slow.packed(raw.WRITE, 16 * MIB + 5, len(new), flags=flags)
        slow.send(header + new[: 4 * MIB])
        assert len(other.read(16 * MIB, 8 * MIB)) == 8 * MIB
        other.request(raw.TRIM, 0, SIZE)
        slow.send(new[4 * MIB :])
        assert {other.reply().error, slow.reply().error} == {0}
        now = other.read(16 * MIB + 5, len(new))
        for start in range(0, len(new), MIB):
            piece, wanted = now[start : start + MIB], new[start : start + MIB]
            assert all(map(_is_in, piece, zip(wanted, bytes(MIB), strict=True)))
        assert other.ask(raw.FLUSH).error == 0
        assert slow.write(16 * MIB + 5, new, flags=flags) == 0
        assert other.read(16 * MIB + 5, len(new)) == new
        assert other.read(0, 16 * MIB) == bytes(16 * MIB), "outside of it all is trimmed"


def _is_in(byte: int, allowed: tuple[int, int]) -> bool:
    return byte in allowed
