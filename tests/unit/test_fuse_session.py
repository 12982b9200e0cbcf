"""One mount's conversation, message by message, against a kernel that is written by hand."""

import ctypes
import errno
import os
import re
import stat
import struct
from contextlib import AbstractContextManager

import pytest

from pmblk import Command, Namespace
from pmblk.nvme.command import READ, Hole
from pmblkd.fuse import wire
from pmblkd.fuse.dax import Way
from pmblkd.fuse.files import Files
from pmblkd.fuse.session import IO_BYTES_MAX, MESSAGE_BYTES_MAX, Session, Work
from pmblkd.registry import Served
from pmblkd.rights import Rights
from tests.unit import fuse_kernel
from tests.unit.conftest import MakeNamespace, registered
from tests.unit.fuse_kernel import Dirent, IoctlIn, IoctlOut, Kernel, Op, StatfsOut, io, message

SIZE = 1 << 20
NS, RO, NOBODY = 2, 3, 99
PAGE = 4096
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE, INSERT, UNSHARE = 1, 2, 8, 0x10, 0x20, 0x40
BLKGETSIZE64, BLKDISCARD = 0x80081272, 0x1277


class FakeDoors:
    """Answers every open with one way, and remembers what it was told."""

    def __init__(self) -> None:
        self.answer = (Way.DAEMON, 0)
        self.error: Exception | None = None
        self.told: list[tuple[str, str]] = []

    def open(self, served: Served) -> tuple[Way, int]:
        if self.error is not None:
            raise self.error
        self.told.append(("open", served.name))
        return self.answer

    def close(self, served: Served) -> None:
        self.told.append(("close", served.name))

    def synced(self, served: Served) -> None:
        self.told.append(("synced", served.name))


@pytest.fixture
def doors() -> FakeDoors:
    return FakeDoors()


@pytest.fixture
def namespace(make_namespace: MakeNamespace) -> Namespace:
    return make_namespace()


@pytest.fixture
def files(make_namespace: MakeNamespace, namespace: Namespace) -> Files:
    read_only = make_namespace(name="ro.img")
    read_only.name, read_only.read_only, read_only.media.read_only = "ro", True, True
    return Files(registered(namespace, read_only), rights=Rights(1000, 100, 0o640))


@pytest.fixture
def kernel(files: Files, doors: FakeDoors) -> Kernel:
    return Kernel(Session(files, doors))


def refused(code: int) -> AbstractContextManager[object]:
    return pytest.raises(OSError, match=re.escape(os.strerror(code)))


# ---- the layouts


@pytest.mark.parametrize(
    ("ours", "theirs", "size"),
    [
        (wire.IN_HEADER, fuse_kernel.InHeader, 40),
        (wire.OUT_HEADER, fuse_kernel.OutHeader, 16),
        (wire.INIT_OUT, fuse_kernel.InitOut, 64),
        (wire.INIT_OUT_VERSION, fuse_kernel.InitOut, 64),
        (wire.ATTR, fuse_kernel.Attr, 88),
        (wire.OPEN_IN, fuse_kernel.OpenIn, 8),
        (wire.OPEN_OUT, fuse_kernel.OpenOut, 16),
        (wire.IO_IN, fuse_kernel.IoIn, 40),
        (wire.WRITE_OUT, fuse_kernel.WriteOut, 8),
        (wire.STATFS_OUT, fuse_kernel.StatfsOut, 80),
        (wire.FALLOCATE_IN, fuse_kernel.FallocateIn, 32),
        (wire.LSEEK_IN, fuse_kernel.LseekIn, 24),
        (wire.LSEEK_OUT, fuse_kernel.LseekOut, 8),
        (wire.IOCTL_IN, fuse_kernel.IoctlIn, 32),
        (wire.IOCTL_OUT, fuse_kernel.IoctlOut, 16),
        (wire.DIRENT, fuse_kernel.Dirent, 24),
        (wire.NOTIFY_INVAL_INODE_OUT, fuse_kernel.NotifyInvalInodeOut, 24),
    ],
)
def test_every_layout_has_the_size_of_the_kernel_s(
    ours: struct.Struct, theirs: type[ctypes.Structure], size: int
) -> None:
    assert ours.size == ctypes.sizeof(theirs) == size


def test_what_is_read_of_a_layout_in_part_lies_where_the_kernel_puts_it() -> None:
    assert wire.INIT_IN.size == fuse_kernel.InitIn.flags2.offset == 16
    assert ctypes.sizeof(fuse_kernel.InitIn) == 64
    assert fuse_kernel.SetattrIn.size.offset + 8 == wire.SETATTR_IN.size == 24
    assert ctypes.sizeof(fuse_kernel.SetattrIn) == 88
    assert wire.ENTRY_OUT.size == fuse_kernel.EntryOut.attr.offset == 40
    assert wire.ATTR_OUT.size == fuse_kernel.AttrOut.attr.offset == 16
    assert fuse_kernel.InitOut.max_stack_depth.offset == 36
    assert fuse_kernel.InitOut.request_timeout.offset == 40


def test_every_opcode_has_the_kernel_s_number() -> None:
    assert {one.name: int(one) for one in wire.Opcode}.items() <= {
        one.name: int(one) for one in Op
    }.items()


# ---- INIT


def test_hello_agrees_on_what_both_can(kernel: Kernel) -> None:
    answer = kernel.init()
    assert (answer.major, answer.minor, answer.max_readahead) == (7, 45, 131072)
    assert answer.flags == 1 << 0 | 1 << 5 | 1 << 15 | 1 << 18 | 1 << 22 | 1 << 30
    assert answer.flags2 == 1 << 4 | 1 << 5
    assert not answer.flags & 1 << 16, "WRITEBACK excludes passthrough"
    assert (answer.max_write, answer.max_pages) == (IO_BYTES_MAX, IO_BYTES_MAX // PAGE)
    assert (answer.time_gran, answer.max_stack_depth, answer.request_timeout) == (1, 1, 0)
    assert 0 < answer.congestion_threshold <= answer.max_background
    assert answer.max_write + 80 <= MESSAGE_BYTES_MAX, "a WRITE of that length, whole"
    assert kernel.session.minor == 45


def test_an_older_kernel_is_answered_in_its_words_and_gets_nothing_newer(kernel: Kernel) -> None:
    answer = kernel.init(minor=31, flags=1 | 1 << 22, flags2=0)
    assert (answer.minor, answer.flags, answer.flags2) == (31, 1 | 1 << 22, 0)
    assert kernel.session.agreed == wire.Init.ASYNC_READ | wire.Init.MAX_PAGES


def test_the_short_hello_of_an_old_kernel_is_understood(kernel: Kernel) -> None:
    body = bytes(fuse_kernel.InitIn(major=7, minor=31, flags=1))[:16]
    answer = fuse_kernel.InitOut.from_buffer_copy(kernel.ask(Op.INIT, 0, body))
    assert (answer.minor, answer.flags) == (31, 1)


def test_a_newer_kernel_gets_our_minor(kernel: Kernel) -> None:
    assert kernel.init(minor=99).minor == 45


@pytest.mark.parametrize("version", [(7, 30), (7, 0), (6, 99), (0, 0)])
def test_a_kernel_that_is_too_old_is_refused_and_it_is_said_why(
    kernel: Kernel, version: tuple[int, int]
) -> None:
    with refused(errno.EPROTO):
        kernel.init(major=version[0], minor=version[1])
    assert kernel.session.refusal == (
        f"this kernel speaks FUSE {version[0]}.{version[1]}; 7.31 is needed"
    )
    assert not kernel.session.minor


def test_a_later_major_version_is_told_ours_and_says_hello_again(kernel: Kernel) -> None:
    answer = kernel.init(major=8, minor=2)
    assert (answer.major, answer.minor, answer.flags) == (7, 45, 0)
    assert (kernel.session.minor, kernel.session.refusal) == (0, "")
    assert kernel.init(major=7, minor=45).flags
    assert (kernel.session.minor, kernel.session.refusal) == (45, "")


def test_flags_that_are_not_extended_have_no_second_word(kernel: Kernel) -> None:
    answer = kernel.init(flags=0xFFFFFFFF & ~(1 << 30))
    assert answer.flags2 == 0
    assert not kernel.session.agreed & wire.Init.PASSTHROUGH


def test_passthrough_is_agreed_on_where_the_kernel_has_it(kernel: Kernel) -> None:
    kernel.init(flags2=1 << 4)
    assert not kernel.session.agreed & wire.Init.PASSTHROUGH
    kernel.init(flags2=1 << 5)
    assert kernel.session.agreed & wire.Init.PASSTHROUGH


def test_a_time_limit_is_asked_for_if_there_is_one_and_the_kernel_has_it(
    files: Files, doors: FakeDoors
) -> None:
    kernel = Kernel(Session(files, doors, request_timeout_seconds=77))
    answer = kernel.init()
    assert (answer.request_timeout, answer.flags2 & 1 << 10) == (77, 1 << 10)
    answer = kernel.init(flags2=1 << 5)
    assert (answer.request_timeout, answer.flags2) == (0, 1 << 5)


def test_the_longest_time_limit_of_the_config_fits(files: Files, doors: FakeDoors) -> None:
    assert Kernel(Session(files, doors, request_timeout_seconds=65535)).init().request_timeout


# ---- the tree


def test_a_name_is_looked_up_anew_each_time_and_its_attributes_hold_a_second(
    kernel: Kernel,
) -> None:
    entry = kernel.lookup(b"ns")
    assert (entry.nodeid, entry.generation, entry.entry_valid) == (NS, 0, 0)
    assert (entry.attr_valid, entry.attr.ino, entry.attr.size) == (1, NS, SIZE)


@pytest.mark.parametrize("name", [b"", b"nope", b"n", b"ns\0x", b"\xff\xfe", "ns\u00e9".encode()])
def test_a_name_that_nothing_has_is_not_found(kernel: Kernel, name: bytes) -> None:
    with refused(errno.ENOENT):
        kernel.lookup(name)


def test_a_file_has_nothing_below_it(kernel: Kernel) -> None:
    with refused(errno.ENOENT):
        kernel.lookup(b"ns", parent=NS)


def test_a_name_without_its_end_is_malformed(kernel: Kernel) -> None:
    for body in (b"ns", b""):
        with refused(errno.EINVAL):
            kernel.ask(Op.LOOKUP, 1, body)


def test_owner_mode_and_blocks_are_what_the_files_say(kernel: Kernel) -> None:
    kernel.write(NS, 0, b"x" * 8192)
    attr = fuse_kernel.AttrOut.from_buffer_copy(kernel.ask(Op.GETATTR, NS, bytes(16))).attr
    assert (attr.uid, attr.gid, attr.nlink) == (1000, 100, 1)
    assert attr.mode == stat.S_IFREG | 0o640
    assert (attr.blocks, attr.blksize) == (16, IO_BYTES_MAX)
    assert attr.mtime > 1_700_000_000
    assert attr.mtimensec < 1_000_000_000
    assert kernel.lookup(b"ro").attr.mode == stat.S_IFREG | 0o440
    root = fuse_kernel.AttrOut.from_buffer_copy(kernel.ask(Op.GETATTR, 1, bytes(16)))
    assert (root.attr.mode, root.attr.uid, root.attr_valid) == (stat.S_IFDIR | 0o555, 1000, 1)


def test_the_largest_owner_that_can_be_is_shown(namespace: Namespace, doors: FakeDoors) -> None:
    largest = (1 << 32) - 2
    files = Files(registered(namespace), rights=Rights(largest, largest))
    assert Kernel(Session(files, doors)).lookup(b"ns").attr.gid == largest


def test_a_size_can_be_set_to_what_it_is_and_to_nothing_else(kernel: Kernel) -> None:
    assert kernel.setattr(NS, 1 << 3, size=SIZE).attr.size == SIZE
    for size in (0, SIZE - 1, SIZE + 1, (1 << 64) - 1):
        with refused(errno.EPERM):
            kernel.setattr(NS, 1 << 3, size=size)
    with refused(errno.EISDIR):
        kernel.setattr(1, 1 << 3, size=0)


@pytest.mark.parametrize("bit", [0, 1, 2])
def test_mode_owner_and_group_are_the_config_s(kernel: Kernel, bit: int) -> None:
    with refused(errno.EPERM):
        kernel.setattr(NS, 1 << bit, mode=0o100777)
    with refused(errno.EPERM):
        kernel.setattr(NS, 1 << bit | 1 << 3, size=SIZE)


def test_times_can_be_set_and_are_not_kept(kernel: Kernel) -> None:
    for valid in (1 << 4, 1 << 5, 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8, 1 << 10, 0):
        assert kernel.setattr(NS, valid, atime=5, mtime=5).attr.mtime > 5


@pytest.mark.parametrize("opcode", [Op.GETATTR, Op.SETATTR, Op.OPEN, Op.READ, Op.FSYNC, Op.IOCTL])
def test_an_inode_that_nothing_has_is_not_there(kernel: Kernel, opcode: Op) -> None:
    with refused(errno.ENOENT):
        kernel.ask(opcode, NOBODY, bytes(88))


def test_the_directory_is_read_in_pieces_and_each_name_once(kernel: Kernel) -> None:
    assert kernel.ask(Op.OPENDIR, 1, bytes(8)) == bytes(fuse_kernel.OpenOut(fh=1))
    assert kernel.names() == [(NS, b"ns"), (RO, b"ro")]
    one = ctypes.sizeof(Dirent) + 8
    assert kernel.names(room=2 * one - 1) == [(NS, b"ns")]
    assert kernel.names(offset=NS, room=one) == [(RO, b"ro")]
    assert kernel.names(offset=RO) == []
    assert kernel.names(room=one - 1) == []
    assert kernel.names(offset=(1 << 64) - 1, room=(1 << 32) - 1) == []
    assert kernel.ask(Op.RELEASEDIR, 1, bytes(24)) == b""
    assert kernel.ask(Op.FSYNCDIR, 1, bytes(16)) == b""


def test_a_name_that_leaves_while_the_directory_is_read_hides_no_other(
    kernel: Kernel, files: Files
) -> None:
    assert kernel.names(room=32) == [(NS, b"ns")]
    files.served(NS).draining = True
    assert kernel.names(offset=NS) == [(RO, b"ro")]
    assert kernel.names() == [(RO, b"ro")]


def test_a_file_is_no_directory(kernel: Kernel) -> None:
    with refused(errno.ENOTDIR):
        kernel.ask(Op.OPENDIR, NS, bytes(8))


@pytest.mark.parametrize(
    "opcode",
    [
        *(Op.CREATE, Op.MKNOD, Op.MKDIR, Op.SYMLINK, Op.LINK, Op.TMPFILE, Op.UNLINK, Op.RMDIR),
        *(Op.RENAME, Op.RENAME2, Op.SETXATTR, Op.REMOVEXATTR),
    ],
)
def test_the_tree_cannot_be_changed(kernel: Kernel, opcode: Op) -> None:
    with refused(errno.EPERM):
        kernel.ask(opcode, 1, bytes(16) + b"new\0")


@pytest.mark.parametrize(
    "opcode",
    [
        *(Op.GETXATTR, Op.LISTXATTR, Op.FLUSH, Op.ACCESS, Op.POLL, Op.GETLK, Op.SETLK, Op.BMAP),
        *(Op.READDIRPLUS, Op.COPY_FILE_RANGE, Op.SYNCFS, Op.STATX, Op.READLINK, Op.INTERRUPT),
        *(0, 7, 19, 999, (1 << 32) - 1),
    ],
)
def test_what_is_not_known_is_not_asked_again(kernel: Kernel, opcode: int) -> None:
    """ENOSYS, which the kernel remembers; to an INTERRUPT it says that there are none."""
    with refused(errno.ENOSYS):
        kernel.ask(opcode, NS, bytes(64))


def test_the_end_is_acknowledged(kernel: Kernel) -> None:
    assert kernel.ask(Op.DESTROY, 0) == b""


@pytest.mark.parametrize("opcode", [Op.FORGET, Op.BATCH_FORGET])
@pytest.mark.parametrize("body", [b"", bytes(8), bytes(24), b"\xff" * 40])
def test_what_is_forgotten_is_not_answered(kernel: Kernel, opcode: Op, body: bytes) -> None:
    whole = message(opcode, NS, body)
    assert kernel.receive(whole) is None
    assert kernel.receive(whole + b"more than it says") is None


def test_df_shows_the_namespaces_together(kernel: Kernel, namespace: Namespace) -> None:
    kernel.write(NS, 0, b"x" * SIZE)
    assert namespace.media.allocated_bytes() == SIZE
    shown = StatfsOut.from_buffer_copy(kernel.ask(Op.STATFS, 1))
    assert (shown.bsize, shown.frsize, shown.namelen) == (PAGE, PAGE, 64)
    assert (shown.blocks, shown.files, shown.ffree) == (2 * SIZE // PAGE, 3, 0)
    empty = SIZE // PAGE
    assert empty - 1 <= shown.bfree == shown.bavail <= empty, "the other one may have a page"


# ---- open files


@pytest.mark.parametrize(
    ("way", "backing", "flags"),
    [(Way.DAEMON, 0, 1 | 64), (Way.DAX, 7, 1 | 64 | 128), (Way.FAST, 8, 128)],
)
def test_an_open_is_told_its_way(
    kernel: Kernel, doors: FakeDoors, way: Way, backing: int, flags: int
) -> None:
    doors.answer = (way, backing)
    opened = kernel.open(NS)
    assert (opened.fh, opened.open_flags, opened.backing_id) == (NS, flags, backing)


def test_users_are_counted_from_open_to_release(
    kernel: Kernel, files: Files, doors: FakeDoors
) -> None:
    served = files.served(NS)
    kernel.open(NS)
    kernel.open(NS, os.O_RDONLY)
    assert (served.users, files.users) == (2, 2)
    kernel.release(NS)
    kernel.release(NS)
    assert (served.users, files.users) == (0, 0)
    assert doors.told == [(what, "ns") for what in ("open", "open", "close", "close")]


def test_what_is_not_open_cannot_be_released(
    kernel: Kernel, files: Files, doors: FakeDoors
) -> None:
    for inode in (NS, RO, 1, NOBODY):
        with refused(errno.EBADF):
            kernel.release(inode)
    kernel.open(NS)
    kernel.release(NS)
    with refused(errno.EBADF):
        kernel.release(NS)
    assert (files.users, files.served(NS).users) == (0, 0)
    assert doors.told == [("open", "ns"), ("close", "ns")]


def test_an_open_that_finds_no_way_leaves_no_user(
    kernel: Kernel, files: Files, doors: FakeDoors
) -> None:
    doors.error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    with refused(errno.EMFILE):
        kernel.open(NS)
    assert (files.users, files.served(NS).users) == (0, 0)
    with refused(errno.EBADF):
        kernel.release(NS)


def test_a_file_that_drains_takes_no_new_users_and_keeps_its_old_ones(
    kernel: Kernel, files: Files
) -> None:
    kernel.open(NS)
    files.served(NS).draining = True
    with refused(errno.ENOENT):
        kernel.open(NS)
    with refused(errno.ENOENT):
        kernel.lookup(b"ns")
    assert kernel.write(NS, 0, b"late") == 4
    assert kernel.read(NS, 0, 4) == b"late"
    kernel.release(NS)
    assert files.served(NS).users == 0


@pytest.mark.parametrize(
    ("inode", "flags", "code"),
    [
        (RO, os.O_WRONLY, errno.EROFS),
        (RO, os.O_RDWR, errno.EROFS),
        (RO, os.O_ACCMODE, errno.EROFS),
        (NS, os.O_RDWR | os.O_TRUNC, errno.EPERM),
        (RO, os.O_RDONLY | os.O_TRUNC, errno.EPERM),
        (1, os.O_RDONLY, errno.EISDIR),
        (0, os.O_RDONLY, errno.ENOENT),
        ((1 << 64) - 1, os.O_RDONLY, errno.ENOENT),
    ],
)
def test_what_cannot_be_opened_is_refused_and_counts_nobody(
    kernel: Kernel, files: Files, inode: int, flags: int, code: int
) -> None:
    with refused(code):
        kernel.open(inode, flags)
    assert files.users == 0


def test_a_read_only_file_opens_for_reading(kernel: Kernel) -> None:
    assert kernel.open(RO, os.O_RDONLY | os.O_CLOEXEC).fh == RO
    with refused(errno.EPERM):
        kernel.write(RO, 0, b"x")
    with refused(errno.EPERM):
        kernel.fallocate(RO, 0, 0, PAGE)
    with refused(errno.EPERM):
        kernel.fallocate(RO, PUNCH_HOLE | KEEP_SIZE, 0, PAGE)
    kernel.fsync(RO)


def ioctl(request: int, room: int) -> bytes:
    return bytes(IoctlIn(fh=NS, cmd=request, out_size=room))


def test_the_size_is_told_to_who_asks_a_disk_for_it(kernel: Kernel) -> None:
    body = kernel.ask(Op.IOCTL, NS, ioctl(BLKGETSIZE64, 8))
    assert body == bytes(IoctlOut()) + SIZE.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("inode", "request_number", "room", "code"),
    [
        (NS, BLKDISCARD, 8, errno.ENOTTY),
        (NS, BLKGETSIZE64, 4, errno.ENOTTY),
        (NS, 0, 0, errno.ENOTTY),
        (1, BLKGETSIZE64, 8, errno.EISDIR),
    ],
)
def test_no_other_ioctl_is_known(
    kernel: Kernel, inode: int, request_number: int, room: int, code: int
) -> None:
    with refused(code):
        kernel.ask(Op.IOCTL, inode, ioctl(request_number, room))


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
    make_namespace: MakeNamespace, doors: FakeDoors
) -> None:
    files = Files(registered(make_namespace(2 * IO_BYTES_MAX)))
    assert len(Kernel(Session(files, doors)).read(NS, 0, 2 * IO_BYTES_MAX)) == IO_BYTES_MAX


def test_a_write_is_short_at_the_end_and_finds_no_space_past_it(
    kernel: Kernel, namespace: Namespace
) -> None:
    assert kernel.write(NS, SIZE - 10, b"x" * 100) == 10
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
    make_namespace: MakeNamespace, doors: FakeDoors
) -> None:
    namespace = make_namespace(kind="page-cache")
    kernel = Kernel(Session(Files(registered(namespace)), doors))
    kernel.write(NS, 0, b"data")
    assert namespace.representation.dirty()
    work = kernel.start(Op.FSYNC, NS, bytes(16))
    assert doors.told == [("synced", "ns")], "before the flush, which has to cover it"
    assert isinstance(work, Work)
    assert list(namespace.execute((work.command,))) == [work.command]


async def test_a_sync_that_waits_is_answered_when_it_is_durable(
    make_namespace: MakeNamespace, doors: FakeDoors
) -> None:
    namespace = make_namespace(kind="page-cache")
    kernel = Kernel(Session(Files(registered(namespace)), doors))
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
    namespace: Namespace, doors: FakeDoors, punch: bool
) -> None:
    kernel = Kernel(Session(Files(registered(namespace), punch=punch), doors))
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


# ---- what is malformed


def test_a_message_that_is_too_short_to_answer_is_not_answered(kernel: Kernel) -> None:
    whole = message(Op.GETATTR, NS)
    for length in range(len(whole)):
        assert kernel.receive(whole[:length]) is None


def test_a_length_that_is_not_the_message_s_is_malformed(kernel: Kernel, files: Files) -> None:
    whole = message(Op.OPEN, NS, bytes(8))
    for other in (whole[:-1], whole + b"\0"):
        reply = kernel.receive(other)
        assert isinstance(reply, list)
        assert fuse_kernel.split(reply)[0].error == -errno.EINVAL
    assert files.users == 0


@pytest.mark.parametrize(
    ("opcode", "needed"),
    [
        (Op.INIT, 16),
        (Op.SETATTR, 24),
        (Op.OPEN, 8),
        (Op.READ, 40),
        (Op.WRITE, 40),
        (Op.FALLOCATE, 32),
        (Op.LSEEK, 24),
        (Op.IOCTL, 32),
        (Op.READDIR, 40),
    ],
)
def test_a_body_that_is_too_short_is_malformed(
    kernel: Kernel, files: Files, opcode: Op, needed: int
) -> None:
    for length in range(needed):
        with refused(errno.EINVAL):
            kernel.ask(opcode, NS, bytes(length))
    assert files.users == 0


def test_the_kernel_is_told_to_ask_for_attributes_again() -> None:
    (whole,) = Session.resized(NS)
    header = fuse_kernel.OutHeader.from_buffer_copy(whole)
    body = fuse_kernel.NotifyInvalInodeOut.from_buffer_copy(whole, 16)
    assert (header.len, header.error, header.unique) == (40, 2, 0)
    assert (body.ino, body.off, body.len) == (NS, -1, 0)
