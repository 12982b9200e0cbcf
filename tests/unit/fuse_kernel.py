"""The kernel's side of FUSE, for tests: requests as it packs them, replies as it reads them.

The layouts are those of include/uapi/linux/fuse.h, written down field by field, and nothing is
taken from `pmblkd.fuse.wire`: a slip in one of the two shows at the other.
"""

import ctypes
import enum
import errno
import os
import re
from contextlib import AbstractContextManager
from typing import Any

import pytest

from pmblkd.fuse import passthrough
from pmblkd.fuse.dax import Way
from pmblkd.fuse.session import Outcome, Reply, Session, Work
from pmblkd.registry import Served

U16, U32, U64 = ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64
I32, I64 = ctypes.c_int32, ctypes.c_int64
STRUCT = ctypes.LittleEndianStructure


class Op(enum.IntEnum):
    LOOKUP, FORGET, GETATTR, SETATTR, READLINK = 1, 2, 3, 4, 5
    SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK = 6, 8, 9, 10, 11, 12, 13
    OPEN, READ, WRITE, STATFS, RELEASE, FSYNC = 14, 15, 16, 17, 18, 20
    SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR, FLUSH, INIT = 21, 22, 23, 24, 25, 26
    OPENDIR, READDIR, RELEASEDIR, FSYNCDIR, GETLK, SETLK, SETLKW = 27, 28, 29, 30, 31, 32, 33
    ACCESS, CREATE, INTERRUPT, BMAP, DESTROY, IOCTL, POLL = 34, 35, 36, 37, 38, 39, 40
    BATCH_FORGET, FALLOCATE, READDIRPLUS, RENAME2, LSEEK = 42, 43, 44, 45, 46
    COPY_FILE_RANGE, SETUPMAPPING, SYNCFS, TMPFILE, STATX = 47, 48, 50, 51, 52


class InHeader(STRUCT):
    _fields_ = (
        *(("len", U32), ("opcode", U32), ("unique", U64), ("nodeid", U64), ("uid", U32)),
        *(("gid", U32), ("pid", U32), ("total_extlen", U16), ("padding", U16)),
    )


class OutHeader(STRUCT):
    _fields_ = (("len", U32), ("error", I32), ("unique", U64))


class InitIn(STRUCT):
    _fields_ = (
        *(("major", U32), ("minor", U32), ("max_readahead", U32), ("flags", U32)),
        *(("flags2", U32), ("unused", U32 * 11)),
    )


class InitOut(STRUCT):
    _fields_ = (
        *(("major", U32), ("minor", U32), ("max_readahead", U32), ("flags", U32)),
        *(("max_background", U16), ("congestion_threshold", U16), ("max_write", U32)),
        *(("time_gran", U32), ("max_pages", U16), ("map_alignment", U16), ("flags2", U32)),
        *(("max_stack_depth", U32), ("request_timeout", U16), ("unused", U16 * 11)),
    )


class Attr(STRUCT):
    _fields_ = (
        *(("ino", U64), ("size", U64), ("blocks", U64)),
        *(("atime", U64), ("mtime", U64), ("ctime", U64)),
        *(("atimensec", U32), ("mtimensec", U32), ("ctimensec", U32)),
        *(("mode", U32), ("nlink", U32), ("uid", U32), ("gid", U32)),
        *(("rdev", U32), ("blksize", U32), ("flags", U32)),
    )


class EntryOut(STRUCT):
    _fields_ = (
        *(("nodeid", U64), ("generation", U64), ("entry_valid", U64), ("attr_valid", U64)),
        *(("entry_valid_nsec", U32), ("attr_valid_nsec", U32), ("attr", Attr)),
    )


class AttrOut(STRUCT):
    _fields_ = (("attr_valid", U64), ("attr_valid_nsec", U32), ("dummy", U32), ("attr", Attr))


class SetattrIn(STRUCT):
    _fields_ = (
        *(("valid", U32), ("padding", U32), ("fh", U64), ("size", U64), ("lock_owner", U64)),
        *(("atime", U64), ("mtime", U64), ("ctime", U64)),
        *(("atimensec", U32), ("mtimensec", U32), ("ctimensec", U32)),
        *(("mode", U32), ("unused4", U32), ("uid", U32), ("gid", U32), ("unused5", U32)),
    )


class OpenIn(STRUCT):
    _fields_ = (("flags", U32), ("open_flags", U32))


class OpenOut(STRUCT):
    _fields_ = (("fh", U64), ("open_flags", U32), ("backing_id", I32))


class ReleaseIn(STRUCT):
    _fields_ = (("fh", U64), ("flags", U32), ("release_flags", U32), ("lock_owner", U64))


class IoIn(STRUCT):
    """READ, READDIR and WRITE; the data of a WRITE follow."""

    _fields_ = (
        *(("fh", U64), ("offset", U64), ("size", U32), ("io_flags", U32)),
        *(("lock_owner", U64), ("flags", U32), ("padding", U32)),
    )


class WriteOut(STRUCT):
    _fields_ = (("size", U32), ("padding", U32))


class StatfsOut(STRUCT):
    _fields_ = (
        *(("blocks", U64), ("bfree", U64), ("bavail", U64), ("files", U64), ("ffree", U64)),
        *(("bsize", U32), ("namelen", U32), ("frsize", U32), ("padding", U32), ("spare", U32 * 6)),
    )


class FsyncIn(STRUCT):
    _fields_ = (("fh", U64), ("fsync_flags", U32), ("padding", U32))


class FallocateIn(STRUCT):
    _fields_ = (("fh", U64), ("offset", U64), ("length", U64), ("mode", U32), ("padding", U32))


class LseekIn(STRUCT):
    _fields_ = (("fh", U64), ("offset", U64), ("whence", U32), ("padding", U32))


class LseekOut(STRUCT):
    _fields_ = (("offset", U64),)


class IoctlIn(STRUCT):
    _fields_ = (
        *(("fh", U64), ("flags", U32), ("cmd", U32)),
        *(("arg", U64), ("in_size", U32), ("out_size", U32)),
    )


class IoctlOut(STRUCT):
    _fields_ = (("result", I32), ("flags", U32), ("in_iovs", U32), ("out_iovs", U32))


class Dirent(STRUCT):
    """The name follows, and zeroes up to a multiple of 8."""

    _fields_ = (("ino", U64), ("off", U64), ("namelen", U32), ("type", U32))


class NotifyInvalInodeOut(STRUCT):
    _fields_ = (("ino", U64), ("off", I64), ("len", I64))


def message(opcode: int, inode: int, body: bytes = b"", *, unique: int = 1) -> bytes:
    """A request, whole."""
    length = ctypes.sizeof(InHeader) + len(body)
    header = InHeader(len=length, opcode=opcode, unique=unique, nodeid=inode, uid=0, gid=0, pid=7)
    return bytes(header) + body


def io(offset: int, size: int, data: bytes = b"") -> bytes:
    return bytes(IoIn(offset=offset, size=size)) + data


def split(reply: Reply) -> tuple[OutHeader, bytes]:
    """Header and body of a reply that is well formed."""
    assert 1 <= len(reply) <= 1024, "more pieces than one writev takes"
    whole = b"".join(reply)
    header = OutHeader.from_buffer_copy(whole)
    assert header.len == len(whole)
    assert -4095 <= header.error <= 0
    assert not header.error or len(whole) == ctypes.sizeof(OutHeader)
    return header, whole[ctypes.sizeof(OutHeader) :]


class Kernel:
    """Asks a session, and runs the commands that come of it, as an engine does.

    Every message arrives in one buffer, which is another message's as soon as it has been executed.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._unique = 0
        self._buffer = bytearray(2 << 20)

    # ---- one request

    def receive(self, request: bytes) -> Outcome:
        self._buffer[: len(request)] = request
        return self.session.receive(memoryview(self._buffer)[: len(request)])

    def ask(self, opcode: int, inode: int, body: bytes = b"") -> bytes:
        """The body of the reply, which comes at once. Raises OSError with its error."""
        work = self.start(opcode, inode, body)
        if isinstance(work, Work):
            assert not work.namespace.execute((work.command,)), "it has to wait"
            self._spoil()
            return self.finish(work)
        return work

    async def ask_slowly(self, opcode: int, inode: int, body: bytes = b"") -> bytes:
        """The same, for what may have to wait."""
        work = self.start(opcode, inode, body)
        if isinstance(work, Work):
            waiting = work.namespace.execute((work.command,))
            self._spoil()
            if waiting:
                assert not await work.namespace.complete(waiting)
            return self.finish(work)
        return work

    async def answer_slowly(self, opcode: int, inode: int, body: bytes = b"") -> "bytes | OSError":
        """The same, where an error is as good an answer."""
        try:
            return await self.ask_slowly(opcode, inode, body)
        except OSError as error:
            return error

    def start(self, opcode: int, inode: int, body: bytes = b"") -> "Work | bytes":
        """The command that the request becomes, or the body of its reply."""
        self._unique += 2  # as the kernel counts
        outcome = self.receive(message(opcode, inode, body, unique=self._unique))
        assert outcome is not None
        if isinstance(outcome, Work):
            assert outcome.unique == self._unique
            return outcome
        return self._body(outcome)

    def finish(self, work: Work) -> bytes:
        """The body of its reply, once its command has been executed."""
        try:
            return self._body(self.session.answer(work), work.unique)
        finally:
            work.namespace.release((work.command,))

    def _body(self, reply: Reply, unique: int | None = None) -> bytes:
        header, body = split(reply)
        assert header.unique == (self._unique if unique is None else unique)
        if header.error:
            raise OSError(-header.error, os.strerror(-header.error))
        return body

    def _spoil(self) -> None:
        self._buffer[:4096] = b"\xff" * 4096

    # ---- the usual ones

    def init(self, **fields: Any) -> InitOut:
        hello = {"major": 7, "minor": 45, "max_readahead": 131072, "flags": 0xFFFFFFFF}
        hello |= {"flags2": 0xFFFFFFFF}
        return InitOut.from_buffer_copy(self.ask(Op.INIT, 0, bytes(InitIn(**(hello | fields)))))

    def lookup(self, name: bytes, *, parent: int = 1) -> EntryOut:
        return EntryOut.from_buffer_copy(self.ask(Op.LOOKUP, parent, name + b"\0"))

    def open(self, inode: int, flags: int = os.O_RDWR) -> OpenOut:
        return OpenOut.from_buffer_copy(self.ask(Op.OPEN, inode, bytes(OpenIn(flags=flags))))

    def release(self, inode: int) -> None:
        assert self.ask(Op.RELEASE, inode, bytes(ReleaseIn(fh=inode))) == b""

    def read(self, inode: int, offset: int, size: int) -> bytes:
        return self.ask(Op.READ, inode, io(offset, size))

    def write(self, inode: int, offset: int, data: bytes) -> int:
        reply = self.ask(Op.WRITE, inode, io(offset, len(data), data))
        return int(WriteOut.from_buffer_copy(reply).size)

    def fsync(self, inode: int) -> None:
        assert self.ask(Op.FSYNC, inode, bytes(FsyncIn(fh=inode))) == b""

    def fallocate(self, inode: int, mode: int, offset: int, length: int) -> None:
        body = FallocateIn(fh=inode, offset=offset, length=length, mode=mode)
        assert self.ask(Op.FALLOCATE, inode, bytes(body)) == b""

    def seek(self, inode: int, offset: int, whence: int) -> int:
        body = self.ask(Op.LSEEK, inode, bytes(LseekIn(fh=inode, offset=offset, whence=whence)))
        return int(LseekOut.from_buffer_copy(body).offset)

    def setattr(self, inode: int, valid: int, **fields: int) -> AttrOut:
        body = self.ask(Op.SETATTR, inode, bytes(SetattrIn(valid=valid, **fields)))
        return AttrOut.from_buffer_copy(body)

    def names(
        self, inode: int = 1, *, offset: int = 0, room: int = 4096
    ) -> list[tuple[int, bytes]]:
        """One READDIR: the position after each entry, and its name."""
        body = self.ask(Op.READDIR, inode, io(offset, room))
        assert len(body) <= room
        found = []
        while body:
            entry = Dirent.from_buffer_copy(body)
            start = ctypes.sizeof(Dirent)
            found.append((int(entry.off), body[start : start + entry.namelen]))
            body = body[start + -(-entry.namelen // 8) * 8 :]
        return found


class FakeBackings:
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


def refused(code: int) -> AbstractContextManager[object]:
    return pytest.raises(OSError, match=re.escape(os.strerror(code)))


class BackingFiles:
    """The kernel's side of passthrough: ids for the files that it takes, until they are closed.

    `error` is what it says instead, while that is set.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open: dict[int, os.stat_result] = {}  # by id, the file that was given
        self.given = 0  # ids, ever
        self.error = 0
        monkeypatch.setattr(passthrough, "register", self.register)
        monkeypatch.setattr(passthrough, "unregister", self.unregister)

    def register(self, _device: int, fd: int) -> int:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        self.given += 1
        self.open[self.given] = os.fstat(fd)
        return self.given

    def unregister(self, _device: int, backing: int) -> None:
        if backing not in self.open:
            raise OSError(errno.ENOENT, "closed twice, or never opened")
        del self.open[backing]
