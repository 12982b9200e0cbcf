"""Backing files: media that the kernel lets a client of the mount map as they are.

The kernel takes a file descriptor and gives an id; an open that is answered with this id goes to
that file. All opens of an inode at one time go the same way: the kernel refuses a mixture.

Source: the kernel's Documentation/filesystems/fuse-passthrough.rst and fs/fuse/backing.c. The media
must be a regular file that lies on no stacked file system, and it takes CAP_SYS_ADMIN.
"""

import contextlib
import errno
import fcntl
import os

import msgspec
import structlog

from pmblk.media import Media
from pmblk.namespace import memory_of
from pmblkd.fuse import dax, wire
from pmblkd.fuse.dax import Way
from pmblkd.fuse.files import inode_of
from pmblkd.mappers import on_mount
from pmblkd.registry import Served

_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)  # they pass

_log = structlog.get_logger(__name__)


class _Opened(msgspec.Struct):
    served: Served
    way: Way
    backing: int  # the kernel's id; 0 is none
    opens: int = 0


class Passthrough:
    """The backing files of one mount."""

    def __init__(self) -> None:
        self._fd = -1
        self._minor = 0
        self._refusal = "not mounted"
        self._opened: dict[int, _Opened] = {}  # by the namespace's number
        self._refusals: dict[int, str] = {}  # what the kernel said of a namespace's file

    def attach(self, device: int, *, minor: int, refusal: str) -> None:
        """`device` is /dev/fuse, `minor` the mount's device number.

        `refusal`: why no file of this mount can be mapped, if so.
        """
        self._fd = device
        self._minor = minor
        self._refusal = refusal

    def open(self, served: Served) -> tuple[Way, int]:
        opened = self._opened.get(served.number)
        if opened is None:
            opened = self._opened[served.number] = _Opened(served, *self._first_open(served))
        opened.opens += 1
        if opened.way is not Way.DAEMON:
            served.dax_opens += 1
            served.mapped_as = on_mount(self._minor, str(inode_of(served)))
        return opened.way, opened.backing

    def close(self, served: Served) -> None:
        opened = self._opened[served.number]
        opened.opens -= 1
        if opened.way is not Way.DAEMON:
            served.dax_opens -= 1
        if opened.opens == 0:
            del self._opened[served.number]
            if opened.backing:
                unregister(self._fd, opened.backing)
        if opened.way is Way.FAST:
            cut_excess(served)  # last, for it can fail

    def disconnected(self) -> None:
        """The mount is gone, and with it every open: no `close` will come.

        What clients still have of the media after that, `pmblkd.fuse.mappings` finds.
        """
        for opened in self._opened.values():
            if opened.way is not Way.DAEMON:
                opened.served.dax_opens -= opened.opens
            with contextlib.suppress(OSError):
                if opened.backing:
                    unregister(self._fd, opened.backing)
                if opened.way is Way.FAST:
                    cut_excess(opened.served)
        self._opened.clear()

    def synced(self, served: Served) -> None:
        opened = self._opened.get(served.number)
        if opened is None or opened.way is Way.DAEMON:
            return
        _media(served).stored_elsewhere()
        if opened.way is Way.FAST:
            cut_excess(served)

    def describe(self, served: Served) -> tuple[Way, str]:
        """The way that its next open will go, and why it is not another one."""
        opened = self._opened.get(served.number)
        way, reason = self._choose(served)
        if opened is not None and opened.way is not way:
            return opened.way, "its open files began that way; close them all"
        return way, reason

    def _first_open(self, served: Served) -> tuple[Way, int]:
        way, _ = self._choose(served)
        if way is Way.DAEMON:
            return way, 0
        try:
            return way, self._register(served)
        except OSError as error:  # it took the file before: what is short is found again some time
            _log.warning("a file goes through the daemon", name=served.name, reason=explain(error))
            return Way.DAEMON, 0

    def _choose(self, served: Served) -> tuple[Way, str]:
        way, reason = dax.choose(served.config.dax, served.namespace)
        if way is Way.DAEMON:
            return way, reason
        if served.dax_kept_out:
            return Way.DAEMON, "it is being switched to a kind that keeps copies"
        if self._refusal:
            return Way.DAEMON, self._refusal
        reason = self._refusal_of(served)
        return (Way.DAEMON, reason) if reason else (way, "")

    def _refusal_of(self, served: Served) -> str:
        """Asks the kernel, once for each namespace, whether it takes the file."""
        known = self._refusals.get(served.number)
        if known is not None:
            return known
        reason = ""
        try:
            unregister(self._fd, self._register(served))
        except OSError as error:
            reason = explain(error)
            if error.errno in _SHORTAGES:
                return reason
        self._refusals[served.number] = reason
        return reason

    def _register(self, served: Served) -> int:
        fd = _media(served).open_again()
        try:
            return register(self._fd, fd)
        finally:
            os.close(fd)


def _media(served: Served) -> Media:
    return memory_of(served.namespace, "media to map").media


def register(device: int, fd: int) -> int:
    """The kernel's id of `fd` as a backing file. Raises OSError."""
    # A bytearray: with bytes, fcntl.ioctl gives the struct back and not the id.
    backing: int = fcntl.ioctl(
        device, wire.BACKING_OPEN, bytearray(wire.BACKING_MAP.pack(fd, 0, 0))
    )
    return backing


def unregister(device: int, backing: int) -> None:
    """The kernel forgets the id; opens that were answered with it go on. Raises OSError."""
    fcntl.ioctl(device, wire.BACKING_CLOSE, wire.BACKING_ID.pack(backing))


def explain(error: OSError) -> str:
    """Why the kernel refuses a backing file, in words that say what to do."""
    if error.errno == errno.EPERM:
        return "passthrough takes CAP_SYS_ADMIN"
    if error.errno == errno.ELOOP:
        return "its file lies on a stacked file system (overlay, FUSE); move it"
    if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
        return "this kernel has no passthrough for its file (Linux 6.9 has, for regular files)"
    return f"passthrough: {error.strerror}"


def cut_excess(served: Served) -> None:
    """Nobody but us makes the file longer; past the daemon, a write at the end does.

    Raises OSError.
    """
    excess = _media(served).cut_excess()
    if excess:
        _log.warning(
            "a client wrote past the end: what it wrote there is cut off",
            name=served.name,
            bytes=excess,
            hint='dax = "auto" has the daemon check every write',
        )
