"""The pyfuse3 engine: `Files` delivered by libfuse, on the daemon's own trio loop.

Every file is opened with direct I/O, so each read(2) and write(2) reaches the namespace and the
page cache keeps nothing that another front end could make stale. libfuse delivers no fallocate
and no lseek: files have no holes to their users, and a loop device above must not discard.

pyfuse3's session is global: one mount a process. Source: the pyfuse3 reference, libfuse 3.14.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyfuse3
import structlog

from pmblk import PmblkError
from pmblkd.fuse.dax import Way
from pmblkd.fuse.files import (
    ATTRIBUTE_SECONDS,
    BLOCK_BYTES,
    NAME_BYTES_MAX,
    ROOT_INODE,
    Attributes,
    Files,
    refuse,
)
from pmblkd.registry import Served

IO_BYTES_MAX = 1 << 20  # what libfuse negotiates for one request

_log = structlog.get_logger(__name__)


class Pyfuse3Engine:
    """Mount with `mount`, serve with `run` until `stop`, and always `unmount`."""

    name = "pyfuse3"
    discards = False

    def __init__(
        self, files: Files, mountpoint: Path, *, allow_other: bool, options: list[str]
    ) -> None:
        self._operations = _Operations(files)
        self._mountpoint = mountpoint
        self._options = {"fsname=pmblk", "subtype=pmblk", "default_permissions", *options}
        if allow_other:
            self._options.add("allow_other")
        self._mounted = False
        self._ended = False

    def mount(self) -> None:
        """Raises PmblkError."""
        try:
            pyfuse3.init(self._operations, str(self._mountpoint), self._options)
        except RuntimeError as error:
            raise PmblkError(
                f"cannot mount on {self._mountpoint}: {error}",
                hint="is /dev/fuse there, and may this user mount (root, or fusermount3)?",
            ) from error
        self._mounted = True

    def dax(self, _served: Served) -> tuple[Way, str]:
        return Way.DAEMON, "the pyfuse3 engine has no passthrough"

    async def run(self) -> None:
        """Until `stop`, or until somebody unmounts."""
        try:
            await pyfuse3.main()
        finally:
            self._ended = True

    def stop(self) -> None:
        pyfuse3.terminate()

    def forget_name(self, name: str) -> None:
        """A file has left the directory: the kernel need not wait until its entry is stale."""
        if self._mounted and not self._ended:
            pyfuse3.invalidate_entry_async(
                pyfuse3.InodeT(ROOT_INODE), os.fsencode(name), ignore_enoent=True
            )

    def forget_size(self, inode: int) -> None:
        """A file has another size. Attributes only: this cannot block."""
        if self._mounted and not self._ended:
            with contextlib.suppress(OSError):  # the kernel does not know the file
                pyfuse3.invalidate_inode(pyfuse3.InodeT(inode), attr_only=True)

    def unmount(self) -> None:
        if self._mounted:
            self._mounted = False
            pyfuse3.close(unmount=True)


class _Operations(pyfuse3.Operations):
    """pyfuse3's calls, translated; what is not here it refuses with ENOSYS.

    `fh` is the inode: a handle has no state of its own.
    """

    def __init__(self, files: Files) -> None:
        super().__init__()
        self._files = files

    async def lookup(self, parent: int, name: bytes, _ctx: Any) -> pyfuse3.EntryAttributes:
        with _errors():
            return self._entry(self._files.lookup(parent, os.fsdecode(name)))

    async def getattr(self, inode: int, _ctx: Any) -> pyfuse3.EntryAttributes:
        with _errors():
            return self._entry(self._files.attributes(inode))

    async def setattr(
        self, inode: int, attr: Any, fields: Any, _fh: int | None, _ctx: Any
    ) -> pyfuse3.EntryAttributes:
        """A size that changes nothing is fine, and so are times, which are not kept."""
        with _errors():
            if fields.update_mode or fields.update_uid or fields.update_gid:
                raise refuse(errno.EPERM)
            if fields.update_size:
                self._files.resize(inode, attr.st_size)
            return self._entry(self._files.attributes(inode))

    async def opendir(self, inode: int, _ctx: Any) -> int:
        if inode != ROOT_INODE:
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        return inode

    async def readdir(self, _fh: int, start: int, token: Any) -> None:
        for name, inode in self._files.entries():
            if inode > start:
                entry = self._entry(self._files.attributes(inode))
                if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, inode):
                    return

    async def open(self, inode: int, flags: int, _ctx: Any) -> pyfuse3.FileInfo:
        with _errors():
            self._files.open(inode, flags)
        return pyfuse3.FileInfo(fh=inode, direct_io=True, keep_cache=False)

    async def read(  # type: ignore[override]  # it takes any buffer
        self, fh: int, off: int, size: int
    ) -> "memoryview | bytes":
        with _errors():
            return await self._files.read(fh, off, size)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        with _errors():
            return await self._files.write(fh, off, buf)

    async def fsync(self, fh: int, _datasync: bool) -> None:
        with _errors():
            await self._files.sync(fh)

    async def release(self, fh: int) -> None:
        with _errors():
            self._files.release(fh)

    async def flush(self, fh: int) -> None:
        """close(2): nothing is kept back, so there is nothing to do."""

    async def statfs(self, _ctx: Any) -> pyfuse3.StatvfsData:
        shown = self._files.statistics()
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = BLOCK_BYTES
        answer.f_blocks = shown.blocks
        answer.f_bfree = answer.f_bavail = shown.free
        answer.f_files = shown.files
        answer.f_namemax = NAME_BYTES_MAX
        return answer

    async def getxattr(self, _inode: int, _name: bytes, _ctx: Any) -> bytes:
        """ENOSYS, once: the kernel remembers, where ENOTSUP would be asked for at every write."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    def _entry(self, attributes: Attributes) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = attributes.inode
        entry.generation = 0
        entry.entry_timeout = entry.attr_timeout = ATTRIBUTE_SECONDS
        entry.st_mode = attributes.mode
        entry.st_nlink = attributes.links
        entry.st_uid, entry.st_gid = attributes.uid, attributes.gid
        entry.st_rdev = 0
        entry.st_size = attributes.size
        entry.st_blksize = IO_BYTES_MAX
        entry.st_blocks = attributes.allocated // 512
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = attributes.time_ns
        return entry


_FIXED_TREE = (
    *("create", "mkdir", "mknod", "symlink", "link"),
    *("unlink", "rmdir", "rename", "setxattr"),
)


async def _refuse(*_arguments: Any) -> Any:
    raise pyfuse3.FUSEError(errno.EPERM)


for _name in _FIXED_TREE:
    setattr(_Operations, _name, _refuse)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """The errno of `Files`, in pyfuse3's words; a defect of ours is EIO, not the mount's end."""
    try:
        yield
    except OSError as error:
        raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
    except Exception:
        _log.exception("file operation failed")
        raise pyfuse3.FUSEError(errno.EIO) from None
