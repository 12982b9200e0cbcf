"""What file operations mean: a directory with a file a namespace. Knows no FUSE library.

Inode 1 is the directory; a namespace's file has its number in the registry and one more, so no
inode ever means another file. A file's size is its namespace's and cannot be changed by its users,
a write past the end finds no space, fsync is a flush, and the tree cannot be changed. A namespace
that drains has left the directory; its open files go on. Whatever is refused is an OSError with
the errno that the kernel is to see.

`read`, `write` and `sync` go through `Namespace.execute`, so bounds, read-only rules and
statuses are those of every other front end.
"""

import errno
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator

import msgspec

from pmblk import Command, Namespace
from pmblk.media import ZEROES
from pmblk.nvme.command import FLUSH, READ, WRITE, Hole
from pmblkd.registry import Registry, Served
from pmblkd.statuses import errno_of

ROOT_INODE = 1


class Attributes(msgspec.Struct, frozen=True):
    """What stat(2) shows. Sizes in bytes, time in nanoseconds."""

    inode: int
    mode: int
    size: int
    allocated: int
    time_ns: int
    links: int = 1


def refuse(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class Files:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry
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
        if inode == ROOT_INODE:
            mode = stat.S_IFDIR | 0o555
            return Attributes(inode, mode, 0, 0, self._born_ns, links=2)
        namespace = self._namespace(inode)
        mode = stat.S_IFREG | (0o400 if namespace.read_only else 0o600)
        allocated = namespace.media.allocated_bytes()
        return Attributes(inode, mode, namespace.size, allocated, self._born_ns)

    def entries(self) -> Iterator[tuple[str, int]]:
        """The directory's names with their inodes, in inode order."""
        for served in self._registry.live():
            yield served.name, inode_of(served)

    def resize(self, inode: int, size: int) -> None:
        """truncate(2): only to the size that the file has (fio asks for that)."""
        if size != self._namespace(inode).size:
            raise refuse(errno.EPERM)

    def open(self, inode: int, flags: int) -> None:
        """Emptying a file at its opening would be a truncation, and is refused like one."""
        served = self._served(inode)
        if served.draining:
            raise refuse(errno.ENOENT)
        if served.namespace.read_only and flags & os.O_ACCMODE != os.O_RDONLY:
            raise refuse(errno.EROFS)
        if flags & os.O_TRUNC:
            raise refuse(errno.EPERM)
        served.enter()
        self._opens[inode] += 1
        self.users += 1

    def release(self, inode: int) -> None:
        """The last close(2) of an open."""
        self._opens[inode] -= 1
        self.users -= 1
        self._served(inode).leave()

    def disconnected(self) -> None:
        """The mount is gone, and with it every open: no release will come."""
        for inode in [one for one, opens in self._opens.items() for _ in range(opens)]:
            self.release(inode)

    def total_bytes(self) -> tuple[int, int]:
        """Size and allocated bytes of all namespaces together, for statfs(2)."""
        namespaces = [served.namespace for served in self._registry.live()]
        allocated = sum(namespace.media.allocated_bytes() for namespace in namespaces)
        return sum(namespace.size for namespace in namespaces), allocated

    # ---- the data

    async def read(self, inode: int, offset: int, length: int) -> "memoryview | bytes":
        """Up to `length` bytes, fewer at the end of the file, none past it.

        The view is the memory itself. It is valid until the next await: the caller hands it to the
        kernel at once.
        """
        namespace = self._namespace(inode)
        length = min(length, namespace.size - offset)
        if length <= 0:
            return b""
        command = Command(READ, 0, offset, length)
        await self._run(namespace, command)
        segments = command.segments or ()
        if len(segments) == 1:
            (segment,) = segments
            data = _zeroes(segment.length) if isinstance(segment, Hole) else segment
        else:
            data = b"".join(
                _zeroes(segment.length) if isinstance(segment, Hole) else segment
                for segment in segments
            )
        namespace.release((command,))
        return data

    async def write(self, inode: int, offset: int, data: "bytes | memoryview") -> int:
        """All of `data`, or what fits before the end; ENOSPC when nothing does."""
        namespace = self._namespace(inode)
        length = min(len(data), max(0, namespace.size - offset))
        if length == 0 and len(data):
            raise refuse(errno.ENOSPC)
        payload = data if length == len(data) else memoryview(data)[:length]
        await self._run(namespace, Command(WRITE, 0, offset, length, payload=payload))
        return length

    async def sync(self, inode: int) -> None:
        await self._run(self._namespace(inode), Command(FLUSH, 0, 0, 0))

    async def _run(self, namespace: Namespace, command: Command) -> None:
        waiting = namespace.execute((command,))
        if waiting:
            await namespace.complete(waiting)
        if command.status:
            raise refuse(errno_of(command.status, command.opcode))

    def _namespace(self, inode: int) -> Namespace:
        return self._served(inode).namespace

    def _served(self, inode: int) -> Served:
        served = self._registry.numbered(inode - ROOT_INODE)
        if served is None:
            raise refuse(errno.EISDIR if inode == ROOT_INODE else errno.ENOENT)
        return served


def inode_of(served: Served) -> int:
    return served.number + ROOT_INODE


def _zeroes(length: int) -> "memoryview | bytes":
    return ZEROES[:length] if length <= len(ZEROES) else bytes(length)
