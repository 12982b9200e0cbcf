"""Which way the bytes of an open file go, decided by what its namespace is. Pure.

`DAEMON`: every read, write and mapped page is a request to the daemon. `DAX`: a mapping of the file
is a mapping of the media, so loads and stores never meet the daemon, while read(2) and write(2)
do: bounds, read-only rules, poison and counters hold for them. `FAST`: read and write go to the
media too, and the daemon sees nothing but fsync, fallocate, lseek and the file's end.

A mapping shows the media, so a representation that keeps copies beside them cannot be had together
with one. Source: the kernel's Documentation/filesystems/fuse-passthrough.rst (Linux 6.9).
"""

import enum

from pmblk import BlockDevice
from pmblk.namespace import in_memory
from pmblkd.config import Dax
from pmblkd.fuse.wire import Open


class Way(enum.Enum):
    """How an open file's bytes go; the value is what `pmblk list` says."""

    DAEMON = "off"
    DAX = "dax"
    FAST = "fast"

    @property
    def open_flags(self) -> int:
        """For the kernel. Writers may run side by side: the engine orders what needs an order."""
        return _OPEN_FLAGS[self]


_DIRECT = Open.DIRECT_IO | Open.PARALLEL_DIRECT_WRITES
_OPEN_FLAGS = {
    Way.DAEMON: int(_DIRECT),
    Way.DAX: int(_DIRECT | Open.PASSTHROUGH),
    Way.FAST: int(Open.PASSTHROUGH),
}


def choose(dax: Dax, device: BlockDevice) -> tuple[Way, str]:
    """The way that a namespace can go, as far as it can be told, and why it is not a faster one."""
    namespace = in_memory(device)
    if namespace is None:
        return Way.DAEMON, "it is an array"
    if namespace.health.fault is not None:
        return Way.DAEMON, "its media have failed"
    if dax == "off":
        return Way.DAEMON, 'dax = "off"'
    if namespace.media.reserve_bytes:
        return Way.DAEMON, "the end of its file is a page table, which a mapping would show"
    if namespace.representation.keeps_copies:
        return Way.DAEMON, f"{namespace.representation.kind} keeps copies of the media"
    return (Way.FAST, "") if dax == "fast" else (Way.DAX, "")
