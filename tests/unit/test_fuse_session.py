"""One mount's conversation about its tree and its open files, against a kernel by hand."""

import ctypes
import errno
import os
import stat

import pytest

from pmblk import Namespace
from pmblkd.fuse.dax import Way
from pmblkd.fuse.files import Files
from pmblkd.fuse.session import IO_BYTES_MAX, Session
from pmblkd.rights import Rights
from tests.unit import fuse_kernel
from tests.unit.conftest import MakeNamespace, registered
from tests.unit.fuse_kernel import (
    Dirent,
    FakeBackings,
    IoctlIn,
    IoctlOut,
    Kernel,
    Op,
    StatfsOut,
    message,
    refused,
)

SIZE = 1 << 20
NS, RO, NOBODY = 2, 3, 99
PAGE = 4096
KEEP_SIZE, PUNCH_HOLE = 1, 2
BLKGETSIZE64, BLKDISCARD = 0x80081272, 0x1277


@pytest.fixture
def backings() -> FakeBackings:
    return FakeBackings()


@pytest.fixture
def namespace(make_namespace: MakeNamespace) -> Namespace:
    return make_namespace()


@pytest.fixture
def files(make_namespace: MakeNamespace, namespace: Namespace) -> Files:
    read_only = make_namespace(name="ro.img")
    read_only.name, read_only.read_only, read_only.media.read_only = "ro", True, True
    return Files(registered(namespace, read_only), rights=Rights(1000, 100, 0o640))


@pytest.fixture
def kernel(files: Files, backings: FakeBackings) -> Kernel:
    return Kernel(Session(files, backings))


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


def test_the_largest_owner_that_can_be_is_shown(
    namespace: Namespace, backings: FakeBackings
) -> None:
    largest = (1 << 32) - 2
    files = Files(registered(namespace), rights=Rights(largest, largest))
    assert Kernel(Session(files, backings)).lookup(b"ns").attr.gid == largest


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
    kernel: Kernel, backings: FakeBackings, way: Way, backing: int, flags: int
) -> None:
    backings.answer = (way, backing)
    opened = kernel.open(NS)
    assert (opened.fh, opened.open_flags, opened.backing_id) == (NS, flags, backing)


def test_users_are_counted_from_open_to_release(
    kernel: Kernel, files: Files, backings: FakeBackings
) -> None:
    served = files.served(NS)
    kernel.open(NS)
    kernel.open(NS, os.O_RDONLY)
    assert (served.users, files.users) == (2, 2)
    kernel.release(NS)
    kernel.release(NS)
    assert (served.users, files.users) == (0, 0)
    assert backings.told == [(what, "ns") for what in ("open", "open", "close", "close")]


def test_what_is_not_open_cannot_be_released(
    kernel: Kernel, files: Files, backings: FakeBackings
) -> None:
    for inode in (NS, RO, 1, NOBODY):
        with refused(errno.EBADF):
            kernel.release(inode)
    kernel.open(NS)
    kernel.release(NS)
    with refused(errno.EBADF):
        kernel.release(NS)
    assert (files.users, files.served(NS).users) == (0, 0)
    assert backings.told == [("open", "ns"), ("close", "ns")]


def test_an_open_that_finds_no_way_leaves_no_user(
    kernel: Kernel, files: Files, backings: FakeBackings
) -> None:
    backings.error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
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
