"""The data of a file, its holes and its memory, against a kernel by hand."""

import errno
import os

import pytest

from pmblk import Command, Namespace
from pmblk.nvme.command import READ, Hole
from pmblkd.fuse.files import Files
from pmblkd.fuse.session import IO_BYTES_MAX, Session, Work
from tests.unit.conftest import MakeNamespace, registered
from tests.unit.fuse_kernel import FakeBackings, Kernel, Op, io, message, refused

SIZE = 1 << 20
NS = 2
PAGE = 4096
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE, INSERT, UNSHARE = 1, 2, 8, 0x10, 0x20, 0x40


@pytest.fixture
def backings() -> FakeBackings:
    return FakeBackings()


@pytest.fixture
def namespace(make_namespace: MakeNamespace) -> Namespace:
    return make_namespace()


@pytest.fixture
def kernel(namespace: Namespace, backings: FakeBackings) -> Kernel:
    return Kernel(Session(Files(registered(namespace)), backings))


# ---- the data


def test_what_is_written_is_read_back_and_holes_are_zeroes(kernel: Kernel) -> None:
    assert kernel.write(NS, 10_000, b"hello") == 5
    assert kernel.read(NS, 9_998, 9) == b"\0\0hello\0\0"
    assert kernel.read(NS, 0, SIZE) == bytes(10_000) + b"hello" + bytes(SIZE - 10_005)


@pytest.mark.parametrize(
    ("offset", "asked", "length"),
    [
        (SIZE - 10, 100, 10),
        (SIZE, 100, 0),
        (SIZE + 5, 100, 0),
        ((1 << 64) - 1, 100, 0),
        (0, 0, 0),
        (0, (1 << 32) - 1, SIZE),
    ],
)
def test_a_read_is_clipped_at_the_end(kernel: Kernel, offset: int, asked: int, length: int) -> None:
    assert kernel.read(NS, offset, asked) == bytes(length)


def test_no_read_is_longer_than_what_was_agreed(
    make_namespace: MakeNamespace, backings: FakeBackings
) -> None:
    files = Files(registered(make_namespace(2 * IO_BYTES_MAX)))
    assert len(Kernel(Session(files, backings)).read(NS, 0, 2 * IO_BYTES_MAX)) == IO_BYTES_MAX


def test_a_write_is_short_at_the_end_and_finds_no_space_past_it(
    kernel: Kernel, namespace: Namespace
) -> None:
    for length in (10, 11, 100, PAGE):
        assert kernel.write(NS, SIZE - 10, b"x" * length) == 10
    assert namespace.media.path.stat().st_size == SIZE
    for offset in (SIZE, SIZE + 1, (1 << 64) - 1):
        with refused(errno.ENOSPC):
            kernel.write(NS, offset, b"x")
    assert kernel.write(NS, 0, b"") == 0
    assert kernel.write(NS, SIZE, b"") == 0


def test_a_write_whose_length_is_not_that_of_its_data_is_malformed(kernel: Kernel) -> None:
    for size in (3, 5, (1 << 32) - 1):
        with refused(errno.EINVAL):
            kernel.ask(Op.WRITE, NS, io(0, size, b"four"))
    assert kernel.read(NS, 0, 4) == bytes(4)


def test_a_write_without_memory_finds_no_space(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("pmblk.media.syscalls.reserve", full)
    with refused(errno.ENOSPC):
        kernel.write(NS, 65536, b"x")
    with refused(errno.ENOSPC):
        kernel.fallocate(NS, 0, 65536, PAGE)


def test_bad_memory_is_an_io_error(kernel: Kernel, namespace: Namespace) -> None:
    namespace.poison(PAGE, PAGE)
    with refused(errno.EIO):
        kernel.read(NS, 0, SIZE)
    with refused(errno.EIO):
        kernel.write(NS, PAGE, b"half")
    assert kernel.write(NS, PAGE, b"w" * PAGE) == PAGE
    assert kernel.read(NS, PAGE, PAGE) == b"w" * PAGE


def test_the_directory_holds_no_data(kernel: Kernel) -> None:
    for opcode, body in ((Op.READ, io(0, 1)), (Op.WRITE, io(0, 1, b"x")), (Op.FSYNC, bytes(16))):
        with refused(errno.EISDIR):
            kernel.ask(opcode, 1, body)


def test_a_sync_flushes_and_tells_those_who_let_clients_through(
    make_namespace: MakeNamespace, backings: FakeBackings
) -> None:
    namespace = make_namespace(kind="page-cache")
    kernel = Kernel(Session(Files(registered(namespace)), backings))
    kernel.write(NS, 0, b"data")
    assert namespace.representation.dirty()
    work = kernel.start(Op.FSYNC, NS, bytes(16))
    assert backings.told == [("synced", "ns")], "before the flush, which has to cover it"
    assert isinstance(work, Work)
    assert list(namespace.execute((work.command,))) == [work.command]


async def test_a_sync_that_waits_is_answered_when_it_is_durable(
    make_namespace: MakeNamespace, backings: FakeBackings
) -> None:
    namespace = make_namespace(kind="page-cache")
    kernel = Kernel(Session(Files(registered(namespace)), backings))
    kernel.write(NS, 0, b"data")
    assert await kernel.ask_slowly(Op.FSYNC, NS, bytes(16)) == b""
    assert not namespace.representation.dirty()
    assert namespace.media.path.read_bytes()[:4] == b"data"


async def test_a_write_that_waits_stores_what_arrived_though_its_buffer_is_another_s_by_then(
    kernel: Kernel, namespace: Namespace
) -> None:
    with namespace._dispatcher.fences.around(0, PAGE):
        work = kernel.start(Op.WRITE, NS, io(0, 4, b"mine"))
        assert isinstance(work, Work)
        waiting = namespace.execute((work.command,))
        assert list(waiting) == [work.command]
        kernel.receive(message(Op.WRITE, NS, io(0, 4, b"next")))
    await namespace.complete(waiting)
    assert kernel.finish(work) == (4).to_bytes(8, "little")
    assert kernel.read(NS, 0, 4) == b"mine"


def test_what_a_read_found_is_sent_from_memory_itself_and_held_until_then(
    kernel: Kernel, namespace: Namespace
) -> None:
    kernel.write(NS, 0, b"x" * PAGE)
    work = kernel.start(Op.READ, NS, io(0, PAGE))
    assert isinstance(work, Work)
    assert not namespace.execute((work.command,))
    reply = kernel.session.answer(work)
    assert namespace.representation.leases == 1
    namespace.media.view[:PAGE] = b"y" * PAGE
    assert bytes(reply[1]) == b"y" * PAGE, "a view, no copy"
    namespace.release((work.command,))
    assert namespace.representation.leases == 0


@pytest.mark.parametrize("runs", [511, 1023, 1024, 2048])
def test_a_reply_has_no_more_pieces_than_one_writev_takes(
    kernel: Kernel, namespace: Namespace, runs: int
) -> None:
    """Holes and data in turn, in blocks of 512 bytes: a file that came to us like this."""
    block = memoryview(b"d" * 512)
    command = Command(READ, 0, 0, runs * 512)
    command.segments = [block if index % 2 else Hole(512) for index in range(runs)]
    body = kernel.finish(Work(0, namespace, command))
    assert body == b"".join(b"d" * 512 if index % 2 else bytes(512) for index in range(runs))


# ---- fallocate


def allocated(namespace: Namespace, offset: int, length: int) -> bool:
    return all(not one.hole for one in namespace.media.allocation.extents(offset, length))


@pytest.mark.parametrize("mode", [0, KEEP_SIZE])
def test_memory_is_reserved_and_what_is_there_stays(
    kernel: Kernel, namespace: Namespace, mode: int
) -> None:
    kernel.write(NS, PAGE, b"kept")
    kernel.fallocate(NS, mode, 0, SIZE)
    assert namespace.media.allocated_bytes() == SIZE
    assert kernel.read(NS, PAGE, 4) == b"kept"


@pytest.mark.parametrize("punch", [True, False])
def test_a_hole_gives_its_memory_back_only_if_that_is_wanted(
    namespace: Namespace, backings: FakeBackings, punch: bool
) -> None:
    kernel = Kernel(Session(Files(registered(namespace), punch=punch), backings))
    kernel.write(NS, 0, b"x" * 4 * PAGE)
    kernel.fallocate(NS, PUNCH_HOLE | KEEP_SIZE, PAGE, 2 * PAGE)
    assert kernel.read(NS, 0, 4 * PAGE) == b"x" * PAGE + bytes(2 * PAGE) + b"x" * PAGE
    assert allocated(namespace, PAGE, 2 * PAGE) is not punch
    kernel.fallocate(NS, PUNCH_HOLE | KEEP_SIZE, 8 * PAGE, PAGE)
    assert not allocated(namespace, 8 * PAGE, PAGE)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(SIZE - PAGE, 1 << 40), (SIZE - PAGE, (1 << 64) - 1), (SIZE, PAGE), ((1 << 64) - 1, PAGE)],
)
def test_a_hole_may_reach_past_the_end_where_there_is_nothing(
    kernel: Kernel, offset: int, length: int
) -> None:
    kernel.write(NS, SIZE - 2 * PAGE, b"x" * 2 * PAGE)
    kernel.fallocate(NS, PUNCH_HOLE | KEEP_SIZE, offset, length)
    kept = 1 if offset < SIZE else 2
    assert kernel.read(NS, SIZE - 2 * PAGE, 2 * PAGE) == b"x" * kept * PAGE + bytes(
        (2 - kept) * PAGE
    )


@pytest.mark.parametrize("mode", [ZERO_RANGE, ZERO_RANGE | KEEP_SIZE])
def test_a_range_is_zeroed_with_memory_under_it(
    kernel: Kernel, namespace: Namespace, mode: int
) -> None:
    kernel.write(NS, 0, b"x" * PAGE)
    kernel.fallocate(NS, mode, 100, 2 * PAGE)
    assert kernel.read(NS, 0, 3 * PAGE) == b"x" * 100 + bytes(3 * PAGE - 100)
    assert allocated(namespace, 0, 2 * PAGE + 100)


@pytest.mark.parametrize("mode", [0, KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(SIZE - PAGE, PAGE + 1), (SIZE, 1), (0, (1 << 64) - 1), ((1 << 64) - 1, 1)],
)
def test_no_file_grows(kernel: Kernel, mode: int, offset: int, length: int) -> None:
    with refused(errno.ENOSPC):
        kernel.fallocate(NS, mode, offset, length)


@pytest.mark.parametrize(
    "mode",
    [
        PUNCH_HOLE,
        COLLAPSE,
        INSERT,
        UNSHARE,
        PUNCH_HOLE | ZERO_RANGE | KEEP_SIZE,
        UNSHARE | KEEP_SIZE,
        (1 << 32) - 1,
    ],
)
def test_no_other_mode_is_supported(kernel: Kernel, mode: int) -> None:
    kernel.write(NS, 0, b"kept")
    with refused(errno.EOPNOTSUPP):
        kernel.fallocate(NS, mode, 0, PAGE)
    assert kernel.read(NS, 0, 4) == b"kept"


# ---- lseek


@pytest.fixture
def holey(kernel: Kernel) -> Kernel:
    """Data in the second and in the last page."""
    kernel.write(NS, PAGE, b"x" * PAGE)
    kernel.write(NS, SIZE - PAGE, b"x" * PAGE)
    return kernel


@pytest.mark.parametrize(
    ("offset", "data", "hole"),
    [
        (0, PAGE, 0),
        (5, PAGE, 5),
        (PAGE, PAGE, 2 * PAGE),
        (2 * PAGE - 1, 2 * PAGE - 1, 2 * PAGE),
        (2 * PAGE, SIZE - PAGE, 2 * PAGE),
        (SIZE - 1, SIZE - 1, SIZE),
    ],
)
def test_data_and_holes_are_found(holey: Kernel, offset: int, data: int, hole: int) -> None:
    assert holey.seek(NS, offset, os.SEEK_DATA) == data
    assert holey.seek(NS, offset, os.SEEK_HOLE) == hole


def test_there_is_nothing_at_the_end_and_no_data_in_the_last_hole(kernel: Kernel) -> None:
    kernel.write(NS, 0, b"x")
    assert kernel.seek(NS, PAGE, os.SEEK_HOLE) == PAGE
    with refused(errno.ENXIO):
        kernel.seek(NS, PAGE, os.SEEK_DATA)
    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
        for offset in (SIZE, SIZE + 1, (1 << 64) - 1):
            with refused(errno.ENXIO):
                kernel.seek(NS, offset, whence)


@pytest.mark.parametrize("whence", [os.SEEK_SET, os.SEEK_CUR, os.SEEK_END, 5, (1 << 32) - 1])
def test_only_data_and_holes_can_be_sought(kernel: Kernel, whence: int) -> None:
    with refused(errno.EINVAL):
        kernel.seek(NS, 0, whence)
