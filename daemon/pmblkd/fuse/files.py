"""What file operations mean: a directory with a file a namespace. Knows no FUSE protocol.

Inode 1 is the directory; a namespace's file has its number in the registry and one more, so no
inode ever means another file. A file's size is its namespace's and cannot be changed by its users,
a write past the end finds no space, fsync is a flush, and the tree cannot be changed. A namespace
that drains has left the directory; its open files go on. Whatever is refused is an OSError with
the errno that the kernel is to see.

Data operations become commands for `Namespace.execute`, so bounds, read-only rules and statuses
are those of every other front end. The engine that speaks the protocol itself takes the commands
(`to_read` and its like) and runs them; a library that wants results awaits `read`, `write`, `sync`.
"""

import errno
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator

import msgspec

from pmblk import BlockDevice, Command
from pmblk.media import ZEROES
from pmblk.media.syscalls import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
)
from pmblk.nvme.command import (
    ALLOCATE,
    FIRST_EXTENT,
    FLUSH,
    GET_LBA_STATUS,
    KEEP,
    PREALLOCATE,
    READ,
    WRITE,
    WRITE_ZEROES,
    Hole,
)
from pmblkd.registry import Registry, Served
from pmblkd.rights import Rights
from pmblkd.statuses import errno_of

ROOT_INODE = 1  # FUSE_ROOT_ID

# Of the mount, whichever engine delivers it.
BLOCK_BYTES = 4096
NAME_BYTES_MAX = 64
ATTRIBUTE_SECONDS = 1  # the kernel keeps so long what it was told of a file


class Attributes(msgspec.Struct, frozen=True):
    """What stat(2) shows. Sizes in bytes, time in nanoseconds."""

    inode: int
    mode: int
    size: int
    allocated: int
    time_ns: int
    uid: int
    gid: int
    links: int = 1


class Statistics(msgspec.Struct, frozen=True):
    """What statfs(2) shows: `blocks` and `free` of `BLOCK_BYTES`, `files` with the directory."""

    blocks: int
    free: int
    files: int


Target = tuple[BlockDevice, Command]  # what an operation is to be done to, and how


def refuse(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class Files:
    """The mount's files.

    `punch`: a hole that is punched gives its memory back; else it is zeroed and keeps it, so that
    no write to it ever has to find memory (which may be what the kernel is short of).
    """

    def __init__(
        self, registry: Registry, *, rights: Rights | None = None, punch: bool = False
    ) -> None:
        self._registry = registry
        self._rights = rights or Rights(os.getuid(), os.getgid())
        self._punch = punch
        self._born_ns = time.time_ns()
        self._opens: Counter[int] = Counter()  # by inode, those without their release
        self.users = 0  # opens without their release

    # ---- the tree

    def lookup(self, parent: int, name: str) -> Attributes:
        if parent == ROOT_INODE:
            for served in self._registry.live():
                if served.name == name:
                    return self.attributes(inode_of(served))
        raise refuse(errno.ENOENT)

    def attributes(self, inode: int) -> Attributes:
        uid, gid, mode = self._rights.uid, self._rights.gid, self._rights.mode
        born = self._born_ns
        if inode == ROOT_INODE:
            return Attributes(inode, stat.S_IFDIR | 0o555, 0, 0, born, uid, gid, links=2)
        namespace = self.served(inode).namespace
        if namespace.read_only:
            mode &= ~0o222
        allocated = namespace.allocated_bytes()
        return Attributes(inode, stat.S_IFREG | mode, namespace.size, allocated, born, uid, gid)

    def entries(self) -> Iterator[tuple[str, int]]:
        """The directory's names with their inodes, in inode order."""
        for served in self._registry.live():
            yield served.name, inode_of(served)

    def resize(self, inode: int, size: int) -> None:
        """truncate(2): only to the size that the file has (fio asks for that)."""
        if size != self.served(inode).namespace.size:
            raise refuse(errno.EPERM)

    def open(self, inode: int, flags: int) -> Served:
        """Emptying a file at its opening would be a truncation, and is refused like one."""
        served = self.served(inode)
        if served.draining:
            raise refuse(errno.ENOENT)
        if served.namespace.read_only and flags & os.O_ACCMODE != os.O_RDONLY:
            raise refuse(errno.EROFS)
        if flags & os.O_TRUNC:
            raise refuse(errno.EPERM)
        served.enter()
        self._opens[inode] += 1
        self.users += 1
        return served

    def release(self, inode: int) -> Served:
        """The last close(2) of an open."""
        if not self._opens[inode]:
            raise refuse(errno.EBADF)
        served = self.served(inode)
        self._opens[inode] -= 1
        self.users -= 1
        served.leave()
        return served

    def disconnected(self) -> None:
        """The mount is gone, and with it every open: no release will come."""
        for inode in [one for one, opens in self._opens.items() for _ in range(opens)]:
            self.release(inode)

    def statistics(self) -> Statistics:
        """Of all namespaces together; free is what their files have no memory for yet."""
        namespaces = [served.namespace for served in self._registry.live()]
        size = sum(namespace.size for namespace in namespaces)
        allocated = sum(namespace.allocated_bytes() for namespace in namespaces)
        free = max(0, size - allocated)
        return Statistics(size // BLOCK_BYTES, free // BLOCK_BYTES, len(namespaces) + 1)

    # ---- the data, as commands

    def to_read(self, inode: int, offset: int, length: int) -> Target:
        """Up to `length` bytes, fewer at the end of the file, none past it."""
        namespace = self.served(inode).namespace
        room = namespace.size - offset
        if length > room:
            length = max(0, room)
        return namespace, Command(READ, 0, offset if length else 0, length)

    def to_write(self, inode: int, offset: int, data: "bytes | memoryview") -> Target:
        """All of `data`, or what fits before the end; ENOSPC when nothing does."""
        namespace = self.served(inode).namespace
        length = len(data)
        room = namespace.size - offset
        if length > room:
            if room <= 0:
                raise refuse(errno.ENOSPC)
            length, data = room, memoryview(data)[:room]
        return namespace, Command(WRITE, 0, offset, length, payload=data)

    def to_sync(self, inode: int) -> Target:
        return self.served(inode).namespace, Command(FLUSH, 0, 0, 0)

    def to_allocate(self, inode: int, mode: int, offset: int, length: int) -> Target:
        """fallocate(2): memory for a range, a hole, or zeroes. The size never changes.

        A hole may reach past the end, where there is nothing; the others find no space there.
        """
        namespace = self.served(inode).namespace
        if mode == FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE:
            length = max(0, min(length, namespace.size - offset))
            flags = 0 if self._punch else KEEP
            return namespace, Command(WRITE_ZEROES, flags, offset if length else 0, length)
        if mode & ~FALLOC_FL_KEEP_SIZE not in (0, FALLOC_FL_ZERO_RANGE):
            raise refuse(errno.EOPNOTSUPP)
        if length > namespace.size - offset:
            raise refuse(errno.ENOSPC)
        if mode & FALLOC_FL_ZERO_RANGE:
            return namespace, Command(WRITE_ZEROES, ALLOCATE, offset, length)
        return namespace, Command(PREALLOCATE, 0, offset, length)

    def to_seek(self, inode: int, offset: int, whence: int) -> Target:
        """lseek(2) with SEEK_DATA or SEEK_HOLE; `found` reads the answer."""
        namespace = self.served(inode).namespace
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise refuse(errno.EINVAL)
        if not offset < namespace.size:
            raise refuse(errno.ENXIO)
        length = namespace.size - offset
        return namespace, Command(GET_LBA_STATUS, FIRST_EXTENT, offset, length)

    # ---- the data, for a library that waits for results

    async def read(self, inode: int, offset: int, length: int) -> "memoryview | bytes":
        """Up to `length` bytes, fewer at the end of the file, none past it.

        The view is the memory itself. It is valid until the next await: the caller hands it to the
        kernel at once.
        """
        namespace, command = self.to_read(inode, offset, length)
        await self._run(namespace, command)
        segments = [
            zeroes(segment.length) if isinstance(segment, Hole) else segment
            for segment in command.segments or ()
        ]
        data = segments[0] if len(segments) == 1 else b"".join(segments)
        namespace.release((command,))
        if namespace.health.fault is not None:  # under this copy: what it took may be made up
            raise refuse(errno.EIO)
        return data

    async def write(self, inode: int, offset: int, data: "bytes | memoryview") -> int:
        """All of `data`, or what fits before the end; ENOSPC when nothing does."""
        namespace, command = self.to_write(inode, offset, data)
        await self._run(namespace, command)
        return command.length

    async def sync(self, inode: int) -> None:
        await self._run(*self.to_sync(inode))

    async def _run(self, namespace: BlockDevice, command: Command) -> None:
        waiting = namespace.execute((command,))
        if waiting:
            await namespace.complete(waiting)
        if command.status:
            raise refuse(errno_of(command.status, command.opcode))

    def served(self, inode: int) -> Served:
        """What the file is. Raises OSError (EISDIR, ENOENT)."""
        served = self._registry.numbered(inode - ROOT_INODE)
        if served is None:
            raise refuse(errno.EISDIR if inode == ROOT_INODE else errno.ENOENT)
        return served


def inode_of(served: Served) -> int:
    return served.number + ROOT_INODE


def found(command: Command, whence: int) -> int:
    """Where the data or the hole begins that `to_seek` asked for. Past the data: ENXIO.

    Extents alternate, so what is not in the first one begins at its end; the end of the file
    counts as a hole.
    """
    assert command.extents
    extent = command.extents[0]
    if extent.hole == (whence == os.SEEK_HOLE):
        return command.offset
    end = extent.offset + extent.length
    if whence == os.SEEK_DATA and end == command.offset + command.length:
        raise refuse(errno.ENXIO)
    return end


def zeroes(length: int) -> "memoryview | bytes":
    return ZEROES[:length] if length <= len(ZEROES) else bytes(length)
