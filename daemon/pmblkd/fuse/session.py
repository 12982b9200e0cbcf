"""One mount's conversation with the kernel, without I/O: a message in, a reply or work out.

`receive` takes one message and returns its reply, or `Work`: a command for the engine, whose reply
`answer` makes when it is done; or None where FUSE wants no reply. Whatever the bytes are, that is
all that can come of them: what is malformed is EINVAL, what is unknown is ENOSYS (which the kernel
remembers, and asks no more), and what changes the tree is EPERM.

Names are asked for anew at each use (no entry is cached), so a namespace comes and goes without
word; sizes are cached for a second, and `resized` makes the message that ends that.
"""

import errno
import struct
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import msgspec

from pmblk import BlockDevice, Command
from pmblk.nvme.command import GET_LBA_STATUS, READ, WRITE, Hole
from pmblkd.fuse import wire
from pmblkd.fuse.dax import Way
from pmblkd.fuse.files import (
    ATTRIBUTE_SECONDS,
    BLOCK_BYTES,
    NAME_BYTES_MAX,
    ROOT_INODE,
    Attributes,
    Files,
    found,
    refuse,
    zeroes,
)
from pmblkd.fuse.wire import Init, Opcode, SetAttr
from pmblkd.registry import Served
from pmblkd.statuses import errno_of

Buffer: TypeAlias = "memoryview | bytes"
Reply = Sequence[Buffer]

IO_BYTES_MAX = 1 << 20
PAGES_MAX = IO_BYTES_MAX >> 12
IOV_MAX = 1024
BACKGROUND_MAX = 128  # asynchronous requests that the kernel keeps in flight
MESSAGE_BYTES_MAX = IO_BYTES_MAX + 4096  # what a read buffer must take

_WANTED = (
    Init.ASYNC_READ
    | Init.BIG_WRITES
    | Init.ASYNC_DIO
    | Init.PARALLEL_DIROPS
    | Init.MAX_PAGES
    | Init.HANDLE_KILLPRIV_V2  # no file has privileges: the kernel need not ask at each write
    | Init.INIT_EXT
    | Init.DIRECT_IO_ALLOW_MMAP
    | Init.PASSTHROUGH
)
_HEADER_BYTES = wire.IN_HEADER.size
_REPLY_HEADER_BYTES = wire.OUT_HEADER.size
_IO_DATA = wire.IO_IN.size


class Work(msgspec.Struct, gc=False):
    """A command that is to run, and the request that waits for it. `whence`: of an lseek."""

    unique: int
    namespace: BlockDevice
    command: Command
    whence: int = 0


class Backings(Protocol):
    """Lets clients through to the media; see `pmblkd.fuse.passthrough`."""

    def open(self, served: Served) -> tuple[Way, int]:
        """The way of a file that is being opened, and the kernel's id of its backing file."""

    def close(self, served: Served) -> None:
        """One of its opens has ended."""

    def synced(self, served: Served) -> None:
        """The next sync has to cover what clients stored past the daemon."""


Outcome = Reply | Work | None
Handler = Callable[[int, int, memoryview], Outcome]


class Session:
    """`request_timeout_seconds`: after it the kernel ends a mount that does not answer; 0: never.

    `minor` is 0 until the kernel has said hello, and `refusal` says why it cannot be served.
    """

    def __init__(
        self, files: Files, backings: Backings, *, request_timeout_seconds: int = 0
    ) -> None:
        self._files = files
        self._backings = backings
        self._request_timeout_seconds = request_timeout_seconds
        self.minor = 0
        self.agreed = Init(0)
        self.refusal = ""
        self._handlers: dict[int, Handler] = {
            Opcode.INIT: self._init,
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.SETATTR: self._setattr,
            Opcode.OPEN: self._open,
            Opcode.RELEASE: self._release,
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.FSYNC: self._fsync,
            Opcode.FALLOCATE: self._fallocate,
            Opcode.LSEEK: self._lseek,
            Opcode.IOCTL: self._ioctl,
            Opcode.STATFS: self._statfs,
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIR: self._readdir,
            **dict.fromkeys(_FINE, _succeed),
            **dict.fromkeys(_UNANSWERED, _ignore),
            **dict.fromkeys(_FIXED_TREE, _refuse_change),
        }

    def receive(self, message: memoryview) -> Outcome:
        """`message` is the caller's again when this returns, but for the payload of a WRITE: that
        is read when its command is executed.
        """
        if len(message) < _HEADER_BYTES:
            return None  # nobody could be answered
        length, opcode, unique, inode = wire.IN_HEADER_START.unpack_from(message)
        handler = self._handlers.get(opcode)
        if handler is None:
            return error_reply(unique, errno.ENOSYS)
        try:
            if length != len(message):
                raise refuse(errno.EINVAL)
            return handler(unique, inode, message[_HEADER_BYTES:])
        except struct.error:
            return error_reply(unique, errno.EINVAL)
        except OSError as error:
            if opcode in _UNANSWERED:
                return None
            return error_reply(unique, error.errno or errno.EIO)

    def answer(self, work: Work) -> Reply:
        """The reply to a command that has its status. What it read is held until it has left."""
        command = work.command
        opcode = command.opcode
        if command.status:
            return error_reply(work.unique, errno_of(command.status, opcode))
        if opcode == READ:
            length = _REPLY_HEADER_BYTES + command.length
            reply: list[Buffer] = [wire.OUT_HEADER.pack(length, 0, work.unique)]
            for segment in command.segments or ():
                reply.append(zeroes(segment.length) if isinstance(segment, Hole) else segment)
            if len(reply) > IOV_MAX:  # more pieces than writev(2) takes
                reply = [b"".join(reply)]
                if work.namespace.health.fault is not None:  # met by this very copy
                    return error_reply(work.unique, errno.EIO)
            return reply
        if opcode == WRITE:
            return _reply(work.unique, wire.WRITE_OUT.pack(command.length, 0))
        if opcode == GET_LBA_STATUS:
            try:
                return _reply(work.unique, wire.LSEEK_OUT.pack(found(command, work.whence)))
            except OSError as error:
                return error_reply(work.unique, error.errno or errno.EIO)
        return _reply(work.unique)

    @staticmethod
    def resized(inode: int) -> Reply:
        """Not a reply: the kernel is to ask for this file's attributes again."""
        body = wire.NOTIFY_INVAL_INODE_OUT.pack(inode, -1, 0)
        length = _REPLY_HEADER_BYTES + len(body)
        return [wire.OUT_HEADER.pack(length, wire.NOTIFY_INVAL_INODE, 0) + body]

    # ---- the mount

    def _init(self, unique: int, _inode: int, body: memoryview) -> Outcome:
        major, minor, readahead, flags = wire.INIT_IN.unpack_from(body)
        if major > wire.MAJOR:  # it says hello again, with our number
            return _reply(unique, wire.INIT_OUT_VERSION.pack(wire.MAJOR, wire.MINOR))
        if (major, minor) < (wire.MAJOR, wire.MINOR_MIN):
            self.refusal = f"this kernel speaks FUSE {major}.{minor}; 7.{wire.MINOR_MIN} is needed"
            return error_reply(unique, errno.EPROTO)
        if flags & Init.INIT_EXT:
            flags |= wire.INIT_IN_FLAGS2.unpack_from(body, wire.INIT_IN.size)[0] << 32
        wanted = _WANTED
        if self._request_timeout_seconds:
            wanted |= Init.REQUEST_TIMEOUT
        self.minor = minor
        self.agreed = wanted & Init(flags)
        return _reply(unique, self._init_out(min(minor, wire.MINOR), readahead))

    def _init_out(self, minor: int, readahead: int) -> bytes:
        agreed = int(self.agreed)
        return wire.INIT_OUT.pack(
            wire.MAJOR,
            minor,
            readahead,
            agreed & 0xFFFFFFFF,
            BACKGROUND_MAX,
            BACKGROUND_MAX * 3 // 4,
            IO_BYTES_MAX,
            1,
            PAGES_MAX,
            0,
            agreed >> 32,
            1,  # media may not lie on a stacked file system themselves
            self._request_timeout_seconds if agreed & Init.REQUEST_TIMEOUT else 0,
        )

    # ---- the tree

    def _lookup(self, unique: int, inode: int, body: memoryview) -> Reply:
        name = bytes(body)
        if not name.endswith(b"\0"):
            raise refuse(errno.EINVAL)
        # Names are ASCII; any other stays one that nothing has.
        attributes = self._files.lookup(inode, name[:-1].decode("ascii", "surrogateescape"))
        entry = wire.ENTRY_OUT.pack(attributes.inode, 0, 0, ATTRIBUTE_SECONDS, 0, 0)
        return _reply(unique, entry + _attr(attributes))

    def _getattr(self, unique: int, inode: int, _body: memoryview) -> Reply:
        return _attr_reply(unique, self._files.attributes(inode))

    def _setattr(self, unique: int, inode: int, body: memoryview) -> Reply:
        """A size that changes nothing is fine, and so are times, which are not kept."""
        valid, _, _, size = wire.SETATTR_IN.unpack_from(body)
        if valid & (SetAttr.MODE | SetAttr.UID | SetAttr.GID):
            raise refuse(errno.EPERM)
        if valid & SetAttr.SIZE:
            self._files.resize(inode, size)
        return _attr_reply(unique, self._files.attributes(inode))

    def _opendir(self, unique: int, inode: int, _body: memoryview) -> Reply:
        if inode != ROOT_INODE:
            raise refuse(errno.ENOTDIR)
        return _reply(unique, wire.OPEN_OUT.pack(inode, 0, 0))

    def _readdir(self, unique: int, _inode: int, body: memoryview) -> Reply:
        """The position in the directory is the inode of the last name that was given."""
        start, room = wire.IO_IN.unpack_from(body)
        entries = b""
        for name, inode in self._files.entries():
            if inode > start:
                entry = _dirent(name, inode)
                if len(entries) + len(entry) > min(room, IO_BYTES_MAX):
                    break
                entries += entry
        return _reply(unique, entries)

    def _statfs(self, unique: int, _inode: int, _body: memoryview) -> Reply:
        shown = self._files.statistics()
        blocks = (shown.blocks, shown.free, shown.free, shown.files, 0)
        answer = wire.STATFS_OUT.pack(*blocks, BLOCK_BYTES, NAME_BYTES_MAX, BLOCK_BYTES, 0)
        return _reply(unique, answer)

    # ---- open files; a handle has no state of its own, so it is the inode

    def _open(self, unique: int, inode: int, body: memoryview) -> Reply:
        flags, _ = wire.OPEN_IN.unpack_from(body)
        served = self._files.open(inode, flags)
        try:
            way, backing = self._backings.open(served)
        except BaseException:
            self._files.release(inode)
            raise
        return _reply(unique, wire.OPEN_OUT.pack(inode, way.open_flags, backing))

    def _release(self, unique: int, inode: int, _body: memoryview) -> Reply:
        self._backings.close(self._files.release(inode))
        return _reply(unique)

    def _ioctl(self, unique: int, inode: int, body: memoryview) -> Reply:
        """BLKGETSIZE64, for programs that ask a disk image as they would a disk."""
        _, _, request, _, _, room = wire.IOCTL_IN.unpack_from(body)
        size = self._files.served(inode).namespace.size
        if request != wire.BLKGETSIZE64 or room < wire.SIZE64.size:
            raise refuse(errno.ENOTTY)
        return _reply(unique, wire.IOCTL_OUT.pack(0, 0, 0, 0) + wire.SIZE64.pack(size))

    # ---- the data

    def _read(self, unique: int, inode: int, body: memoryview) -> Work:
        offset, length = wire.IO_IN.unpack_from(body)
        namespace, command = self._files.to_read(inode, offset, min(length, IO_BYTES_MAX))
        return Work(unique, namespace, command)

    def _write(self, unique: int, inode: int, body: memoryview) -> Work:
        offset, length = wire.IO_IN.unpack_from(body)
        payload = body[_IO_DATA:]
        if length != len(payload):
            raise refuse(errno.EINVAL)
        namespace, command = self._files.to_write(inode, offset, payload)
        return Work(unique, namespace, command)

    def _fsync(self, unique: int, inode: int, _body: memoryview) -> Work:
        served = self._files.served(inode)
        self._backings.synced(served)
        return Work(unique, *self._files.to_sync(inode))

    def _fallocate(self, unique: int, inode: int, body: memoryview) -> Work:
        _, offset, length, mode, _ = wire.FALLOCATE_IN.unpack_from(body)
        return Work(unique, *self._files.to_allocate(inode, mode, offset, length))

    def _lseek(self, unique: int, inode: int, body: memoryview) -> Work:
        _, offset, whence, _ = wire.LSEEK_IN.unpack_from(body)
        return Work(unique, *self._files.to_seek(inode, offset, whence), whence)


# ---- requests that all fare alike


def _succeed(unique: int, _inode: int, _body: memoryview) -> Reply:
    return _reply(unique)


def _ignore(_unique: int, _inode: int, _body: memoryview) -> None:
    return None


def _refuse_change(_unique: int, _inode: int, _body: memoryview) -> Reply:
    raise refuse(errno.EPERM)


_FINE = (Opcode.RELEASEDIR, Opcode.FSYNCDIR, Opcode.DESTROY)
_UNANSWERED = (Opcode.FORGET, Opcode.BATCH_FORGET)
_FIXED_TREE = (
    *(Opcode.CREATE, Opcode.MKNOD, Opcode.MKDIR, Opcode.SYMLINK, Opcode.LINK, Opcode.TMPFILE),
    *(Opcode.UNLINK, Opcode.RMDIR, Opcode.RENAME, Opcode.RENAME2),
    *(Opcode.SETXATTR, Opcode.REMOVEXATTR),
)


# ---- replies


def error_reply(unique: int, code: int) -> Reply:
    return [wire.OUT_HEADER.pack(_REPLY_HEADER_BYTES, -code, unique)]


def _reply(unique: int, body: bytes = b"") -> Reply:
    return [wire.OUT_HEADER.pack(_REPLY_HEADER_BYTES + len(body), 0, unique) + body]


def _attr_reply(unique: int, attributes: Attributes) -> Reply:
    return _reply(unique, wire.ATTR_OUT.pack(ATTRIBUTE_SECONDS, 0, 0) + _attr(attributes))


def _attr(attributes: Attributes) -> bytes:
    seconds, nanoseconds = divmod(attributes.time_ns, 1_000_000_000)
    return wire.ATTR.pack(
        attributes.inode,
        attributes.size,
        attributes.allocated // 512,
        *(seconds, seconds, seconds, nanoseconds, nanoseconds, nanoseconds),
        attributes.mode,
        attributes.links,
        attributes.uid,
        attributes.gid,
        0,
        IO_BYTES_MAX,
        0,
    )


def _dirent(name: str, inode: int) -> bytes:
    encoded = name.encode("ascii")  # the config takes no others
    entry = wire.DIRENT.pack(inode, inode, len(encoded), wire.DT_REG) + encoded
    return entry + bytes(-len(entry) % 8)
