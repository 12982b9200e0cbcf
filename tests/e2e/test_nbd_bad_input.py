"""Clients that are wrong, broken or hostile: they get an error or lose their connection, no more.

After every case the same daemon serves a healthy client, and has logged no complaint.
"""

import errno
import random
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbd
import pytest

from tests.harness import nbd_raw as raw
from tests.harness.daemon import Daemon, scratch
from tests.harness.programs import assert_no_complaints

pytestmark = pytest.mark.e2e

MIB = 1 << 20
SIZE = 64 * MIB
CONFIG = """
[[namespace]]
name = "rw"
path = "{dir}/rw.img"
size = "64MiB"

[[namespace]]
name = "ro"
path = "{dir}/ro.img"
read_only = true

[[namespace]]
name = "health"
path = "{dir}/health.img"
size = "1MiB"

[nbd]
listen = ["unix:{dir}/nbd.sock"]
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with scratch() as directory:
        with (directory / "ro.img").open("wb") as stream:
            stream.truncate(SIZE)
        started = Daemon(directory, CONFIG.replace("{dir}", str(directory))).start()
        yield started
        started.stop()


@pytest.fixture
def path(daemon: Daemon) -> Path:
    """The daemon's socket."""
    return daemon.directory / "nbd.sock"


@pytest.fixture(autouse=True)
def _unharmed(daemon: Daemon, path: Path) -> Iterator[None]:
    before = daemon.pid
    yield
    raw.check_health(path, "health")
    assert daemon.pid == before
    assert_no_complaints(daemon)


# ---- the handshake


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\x16\x03\x01\x02\x00" * 20, b"\xff" * 70000],
    ids=["http", "tls", "ones"],
)
def test_garbage_instead_of_a_handshake_ends_the_connection(path: Path, garbage: bytes) -> None:
    with raw.Client(path) as client:
        client.receive(18)
        try:
            client.send(garbage)
        except (BrokenPipeError, ConnectionResetError):
            pass  # closed before it had all
        assert client.closed()


@pytest.mark.parametrize("flags", [4, 0x80000003, raw.UINT32_MAX])
def test_unknown_client_flags_end_the_connection(path: Path, flags: int) -> None:
    with raw.Client(path) as client:
        assert client.greet(flags).closed()


def test_a_wrong_option_magic_ends_the_connection(path: Path) -> None:
    with raw.Client(path).greet() as client:
        client.send(raw.option(raw.LIST, magic=b"IHAVEOPS"))
        assert client.closed()


@pytest.mark.parametrize("number", [raw.EXPORT_NAME, raw.GO, raw.SET_META_CONTEXT, 4711])
def test_an_option_of_4_gib_is_too_big(path: Path, number: int) -> None:
    with raw.Client(path).greet() as client:
        client.send(b"IHAVEOPT" + struct.pack(">II", number, raw.UINT32_MAX))
        (reply,) = client.option_replies(number)
        assert reply.kind == raw.ERR_TOO_BIG
        assert client.closed()


@pytest.mark.parametrize("number", [0, 4, raw.STARTTLS, 11, 4711, raw.UINT32_MAX])
def test_an_unknown_option_is_unsupported_and_the_stream_stays_in_sync(
    path: Path, number: int
) -> None:
    with raw.Client(path).greet() as client:
        for data in (b"", b"IHAVEOPT" * 3, bytes(60000)):
            (reply,) = client.ask_option(number, data)
            assert reply.kind == raw.ERR_UNSUP
        names = [reply.data for reply in client.ask_option(raw.LIST)[:-1]]
        assert [name[4:6] for name in names] == [b"rw", b"ro", b"he"]
        assert client.ask_option(raw.ABORT) == [(raw.REP_ACK, b"")]
        assert client.closed()


@pytest.mark.parametrize("name", ["none", "RW", "r", "rw\n", "x" * 4096])
def test_info_and_go_do_not_know_an_unknown_export(path: Path, name: str) -> None:
    with raw.Client(path).greet() as client:
        for number in (raw.INFO, raw.GO):
            replies = client.ask_option(number, raw.string(name) + struct.pack(">H", 0))
            assert [reply.kind for reply in replies] == [raw.ERR_UNKNOWN]
        replies = client.ask_option(raw.GO, raw.string("rw") + struct.pack(">H", 0))
        assert replies[-1].kind == raw.REP_ACK, "the connection is as good as before"
        assert client.read(0, 512) == bytes(512)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        raw.string("rw"),
        struct.pack(">I", raw.UINT32_MAX) + b"rw",
        raw.string("rw") + struct.pack(">H", 3) + b"\0",
        raw.string("rw") + struct.pack(">H", 0) + b"more",
        raw.string("r\0w") + struct.pack(">H", 0),
        struct.pack(">I", 2) + b"\xff\xfe" + struct.pack(">H", 0),
        raw.string("y" * 4097) + struct.pack(">H", 0),
    ],
)
def test_a_malformed_go_is_invalid(path: Path, data: bytes) -> None:
    with raw.Client(path).greet() as client:
        (reply,) = client.ask_option(raw.GO, data)
        assert reply.kind == raw.ERR_INVALID
        assert client.ask_option(raw.ABORT)[-1].kind == raw.REP_ACK


def test_an_unknown_export_name_ends_the_connection(path: Path) -> None:
    with raw.Client(path).greet() as client:
        client.send(raw.option(raw.EXPORT_NAME, b"none"))
        assert client.closed()


def test_slow_handshakes_hold_up_nobody(path: Path) -> None:
    slow = [raw.Client(path) for _ in range(20)]
    try:
        for count, client in enumerate(slow):
            client.receive(18)
            client.send(struct.pack(">I", 3) + raw.option(raw.GO, bytes(40))[:count])
        started = time.monotonic()
        for _ in range(10):
            raw.check_health(path, "health")
        assert time.monotonic() - started < 2
    finally:
        for client in slow:
            client.sock.close()


# ---- the stream of requests


@pytest.mark.parametrize("count", [1, 4, 27, 28 + 1, 28 + 4095])
def test_half_a_request_and_an_end_changes_nothing(path: Path, count: int) -> None:
    whole = raw.request(raw.WRITE, 0, 4096) + b"H" * 4096
    with raw.Client(path).go("rw") as client:
        assert client.write(0, b"W" * 4096) == 0
        client.send(whole[:count])
    with raw.connected(path, "rw") as client:
        assert client.read(0, 4096) == b"W" * 4096


def test_a_write_half_sent_leaves_all_other_data_as_it_was(path: Path) -> None:
    """What it would have written may be old or new, as on a disk; nobody was told it is there."""
    old = random.randbytes(4 * MIB)
    with raw.connected(path, "rw") as other:
        with raw.Client(path).go("rw") as client:
            assert client.write(8 * MIB, old) == 0
            client.send(raw.request(raw.WRITE, 9 * MIB + 7, 2 * MIB) + b"N" * MIB)
        now = other.read(8 * MIB, 4 * MIB)
        sent, end = MIB + 7, 2 * MIB + 7
        assert now[:sent] == old[:sent]
        assert now[end:] == old[end:]
        pairs = zip(now[sent:end], old[sent:end], strict=True)
        assert all(byte in (was, ord("N")) for byte, was in pairs)


@pytest.mark.parametrize("magic", [0, 0x25609514, 0x67446698, 0x21E41C71])
def test_a_wrong_request_magic_closes_that_connection_only(path: Path, magic: int) -> None:
    with raw.connected(path, "rw") as other, raw.Client(path).go("rw") as client:
        client.send(raw.request(raw.READ, 0, 512, magic=magic))
        assert client.closed()
        assert other.read(0, 512) is not None


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("length", [32 * MIB + 1, 33 * MIB, raw.UINT32_MAX])
def test_a_write_that_is_too_long_is_refused_and_drained(
    path: Path, length: int, structured: bool
) -> None:
    with raw.connected(path, "rw", structured=structured) as client:
        assert client.write(0, b"before") == 0
        client.request(raw.WRITE, 0, length)
        assert client.reply().error == errno.EINVAL, "before the payload has to come"
        piece = b"\x25\x60\x95\x13" * MIB  # full of request magics
        for _ in range(length // len(piece)):
            client.send(piece)
        client.send(piece[: length % len(piece)])
        assert client.read(0, 6) == b"before"


def test_a_write_of_32_mib_is_taken(path: Path) -> None:
    payload = random.Random(1).randbytes(32 * MIB)
    with raw.connected(path, "rw") as client:
        assert client.write(MIB + 1, payload) == 0
        assert client.read(MIB + 1, 32 * MIB) == payload


@pytest.mark.parametrize("structured", [False, True])
def test_a_read_of_4_gib_is_refused(path: Path, structured: bool) -> None:
    with raw.connected(path, "rw", structured=structured) as client:
        for length in (32 * MIB + 1, raw.UINT32_MAX):
            assert client.ask(raw.READ, 0, length).error == errno.EINVAL
        assert len(client.read(0, 32 * MIB)) == 32 * MIB


# ---- one request each: export, kind, offset, length, flags, error

Case = tuple[str, int, int, int, int, int]
ENOSPC, EINVAL, EPERM, ENOTSUP = errno.ENOSPC, errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP
_PAST_THE_END = {
    raw.WRITE: ENOSPC,
    raw.WRITE_ZEROES: ENOSPC,
    raw.READ: EINVAL,
    raw.TRIM: EINVAL,
    raw.CACHE: EINVAL,
    raw.BLOCK_STATUS: EINVAL,
}
_PAST_PLACES = [(SIZE - 511, 512), (SIZE, 1), (2**63 - 512, 512), (2**62, 4096)]
PAST_THE_END: list[Case] = [
    ("rw", kind, offset, length, 0, error)
    for kind, error in _PAST_THE_END.items()
    for offset, length in _PAST_PLACES
]
FAR_PAST_THE_END: list[Case] = [
    ("rw", kind, offset, length, 0, error)
    for kind, error in _PAST_THE_END.items()
    for offset, length in [(raw.UINT64_MAX, 1), (raw.UINT64_MAX - 511, 512), (2**63, 512)]
]
READ_ONLY: list[Case] = [
    ("ro", kind, offset, 512, flags, EPERM)
    for kind in (raw.WRITE, raw.TRIM, raw.WRITE_ZEROES)
    for offset in (0, 4095)
    for flags in (0, raw.FUA)
]
UNKNOWN_FLAGS: list[Case] = [
    ("rw", kind, 0, 512, flags, EINVAL)
    for kind in range(8)
    if kind != raw.DISC
    for flags in (0x20, 0x8000, raw.NO_HOLE | raw.DF, raw.FAST_ZERO | raw.REQ_ONE)
]
MISPLACED_FLAGS: list[Case] = [
    ("rw", raw.READ, 0, 512, raw.NO_HOLE, EINVAL),
    ("rw", raw.READ, 0, 512, raw.FAST_ZERO, EINVAL),
    ("rw", raw.WRITE, 0, 512, raw.DF, EINVAL),
    ("rw", raw.TRIM, 0, 512, raw.NO_HOLE, EINVAL),
]
BAD_FLUSHES: list[Case] = [
    ("rw", raw.FLUSH, 512, 0, 0, EINVAL),
    ("rw", raw.FLUSH, 0, 512, 0, EINVAL),
]
UNKNOWN_COMMANDS: list[Case] = [
    ("rw", kind, 0, 512, 0, EINVAL) for kind in (8, 9, 255, 256, 0x101, 0xFFFF)
]


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(PAST_THE_END, id="a write past the end finds no space, the rest is wrong"),
        pytest.param(FAR_PAST_THE_END, id="offsets wrap around nothing"),
        pytest.param(READ_ONLY, id="a read-only export permits no change"),
        pytest.param(UNKNOWN_FLAGS, id="unknown flags are invalid"),
        pytest.param(MISPLACED_FLAGS, id="flags of another command are invalid"),
        pytest.param(BAD_FLUSHES, id="a flush has no offset and no length"),
        pytest.param(UNKNOWN_COMMANDS, id="unknown commands are invalid"),
    ],
)
def test_a_refused_request_says_why_and_the_connection_goes_on(
    path: Path, cases: list[Case], structured: bool
) -> None:
    for name, kind, offset, length, flags, error in cases:
        with raw.connected(path, name, structured=structured, context=structured) as client:
            data = b"?" * length if kind == raw.WRITE else b""
            reply = client.ask(kind, offset, length, flags=flags, data=data)
            assert reply.error == error, (name, kind, hex(offset), length, hex(flags))
            assert len(client.read(0, 512)) == 512


def _send_with_libnbd(handle: nbd.NBD, case: Case) -> None:
    _, kind, offset, length, flags, _ = case
    calls: dict[int, Callable[[], object]] = {
        raw.READ: lambda: handle.pread(length, offset, flags),
        raw.WRITE: lambda: handle.pwrite(b"?" * length, offset, flags),
        raw.FLUSH: lambda: handle.flush(flags),
        raw.TRIM: lambda: handle.trim(length, offset, flags),
        raw.CACHE: lambda: handle.cache(length, offset, flags),
        raw.WRITE_ZEROES: lambda: handle.zero(length, offset, flags),
        raw.BLOCK_STATUS: lambda: handle.block_status(length, offset, lambda *_: 0, flags),
    }
    calls[kind]()


@pytest.mark.parametrize("structured", [False, True])
def test_libnbd_sees_the_same_errors_and_stays_connected(path: Path, structured: bool) -> None:
    cases = PAST_THE_END + READ_ONLY + UNKNOWN_FLAGS + MISPLACED_FLAGS
    for name in ("rw", "ro"):
        handle = nbd.NBD()
        handle.set_strict_mode(0)
        handle.set_request_structured_replies(structured)
        handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        handle.set_export_name(name)
        handle.connect_unix(str(path))
        for case in cases:
            if case[0] != name or (case[1] == raw.BLOCK_STATUS and not structured):
                continue
            with pytest.raises(nbd.Error) as caught:
                _send_with_libnbd(handle, case)
            assert caught.value.errnum == case[5], (case, str(caught.value))
            assert handle.aio_is_ready(), case
        handle.shutdown()


@pytest.mark.parametrize("structured", [False, True])
def test_a_request_of_no_length_does_not_disconnect(path: Path, structured: bool) -> None:
    with raw.connected(path, "rw", structured=structured) as client:
        for kind in (raw.READ, raw.WRITE, raw.TRIM, raw.CACHE, raw.WRITE_ZEROES, raw.BLOCK_STATUS):
            for offset in (0, SIZE):
                reply = client.ask(kind, offset, 0)
                assert reply.error in (0, EINVAL)
        assert len(client.read(0, 512)) == 512


@pytest.mark.parametrize("structured", [False, True])
def test_block_status_without_a_context_is_invalid(path: Path, structured: bool) -> None:
    with raw.connected(path, "rw", structured=structured) as client:
        assert client.ask(raw.BLOCK_STATUS, 0, 4096).error == EINVAL
    with raw.connected(path, "rw", context=True) as client:
        reply = client.ask(raw.BLOCK_STATUS, 0, SIZE, flags=raw.REQ_ONE)
        assert reply.error == 0
        assert len(reply.extents) == 1


@pytest.mark.parametrize("flags", [raw.FAST_ZERO | raw.NO_HOLE, raw.FAST_ZERO | raw.NO_HOLE | 1])
def test_a_fast_zero_that_cannot_be_changes_nothing(path: Path, flags: int) -> None:
    with raw.connected(path, "rw") as client:
        for offset, length in ((16 * MIB, 65536), (16 * MIB + 3, 4097), (16 * MIB, 8 * MIB)):
            old = random.randbytes(length)
            assert client.write(offset, old) == 0
            assert client.ask(raw.WRITE_ZEROES, offset, length, flags=flags).error == ENOTSUP
            assert client.read(offset, length) == old
            fast = client.ask(raw.WRITE_ZEROES, offset, length, flags=raw.FAST_ZERO)
            assert fast.error in (0, ENOTSUP)
            assert client.read(offset, length) == (old if fast.error else bytes(length))


def test_noise_in_the_request_stream_harms_nobody(path: Path) -> None:
    """Headers with the right magic and anything else in them."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    source = random.Random(seed)
    without_payload = [kind for kind in range(300) if kind not in (raw.WRITE, raw.DISC)]
    for _ in range(20):
        with raw.Client(path).go("rw", context=True) as client:
            for cookie in range(50):
                kind = source.choice((source.choice(without_payload), *without_payload[:6]))
                flags = source.choice((0, source.randrange(32), source.randrange(2**16)))
                offset = source.choice((source.randrange(SIZE), source.randrange(2**64)))
                length = source.choice((source.randrange(MIB), source.randrange(2**32)))
                client.send(raw.request(kind, offset, length, flags=flags, cookie=cookie))
            client.send(raw.request(raw.DISC))
            assert client.drain() >= 50 * 16, "every request has a reply"
