"""The layouts of FUSE's messages, and what a mount and its kernel agree on at first."""

import ctypes
import errno
import struct

import pytest

from pmblkd.fuse import wire
from pmblkd.fuse.files import Files
from pmblkd.fuse.session import IO_BYTES_MAX, MESSAGE_BYTES_MAX, Session
from pmblkd.registry import Registry
from tests.unit import fuse_kernel
from tests.unit.fuse_kernel import FakeBackings, Kernel, Op, refused

PAGE = 4096


@pytest.fixture
def kernel() -> Kernel:
    return Kernel(Session(Files(Registry()), FakeBackings()))


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
    assert answer.flags == 1 << 0 | 1 << 5 | 1 << 15 | 1 << 18 | 1 << 22 | 1 << 28 | 1 << 30
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


def test_a_time_limit_is_asked_for_if_there_is_one_and_the_kernel_has_it() -> None:
    kernel = Kernel(Session(Files(Registry()), FakeBackings(), request_timeout_seconds=77))
    answer = kernel.init()
    assert (answer.request_timeout, answer.flags2 & 1 << 10) == (77, 1 << 10)
    answer = kernel.init(flags2=1 << 5)
    assert (answer.request_timeout, answer.flags2) == (0, 1 << 5)


def test_the_longest_time_limit_of_the_config_fits() -> None:
    session = Session(Files(Registry()), FakeBackings(), request_timeout_seconds=65535)
    assert Kernel(session).init().request_timeout == 65535
