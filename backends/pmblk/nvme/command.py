"""One I/O command, from the front end that decoded it to the reply that it becomes.

A command is filled in, not copied: the front end sets what is asked, `Namespace.execute` sets
`status` and what was read, the front end encodes the reply. Opcodes are those of the NVM Command
Set Specification 1.0 (7.1); flags are bits of our own for its fields (FUA, DEAC, ...).
"""

import enum
from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec

from pmblk.ranges import Extent

Segment: TypeAlias = "memoryview | Hole"


class Opcode(enum.IntEnum):
    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    WRITE_ZEROES = 0x08
    DATASET_MANAGEMENT = 0x09  # deallocate, and nothing else
    GET_LBA_STATUS = 0x86  # an admin command in NVMe; here it travels with the I/O
    PREFETCH = 0xC0  # vendor range: NBD's CACHE; NVMe knows it only as a dataset hint
    PREALLOCATE = 0xC4  # vendor range: memory for the range, which keeps what it holds


class Flag(enum.IntFlag):
    NONE = 0
    FUA = 1 << 0  # the reply means: durable
    ALLOCATE = 1 << 1  # WRITE_ZEROES: leave no hole (NVMe: DEAC clear)
    FAST_ONLY = 1 << 2  # WRITE_ZEROES: faster than a write, or not at all
    CONTIGUOUS = 1 << 3  # READ: the front end wants one run, not holes apart
    FIRST_EXTENT = 1 << 4  # GET_LBA_STATUS: one extent is enough
    KEEP = 1 << 5  # WRITE_ZEROES: what has memory keeps it, what is a hole stays one


# Plain ints for the paths that run for every I/O: enum members compare slower.
FLUSH = int(Opcode.FLUSH)
WRITE = int(Opcode.WRITE)
READ = int(Opcode.READ)
WRITE_ZEROES = int(Opcode.WRITE_ZEROES)
DATASET_MANAGEMENT = int(Opcode.DATASET_MANAGEMENT)
GET_LBA_STATUS = int(Opcode.GET_LBA_STATUS)
PREFETCH = int(Opcode.PREFETCH)
PREALLOCATE = int(Opcode.PREALLOCATE)
FUA = int(Flag.FUA)
ALLOCATE = int(Flag.ALLOCATE)
FAST_ONLY = int(Flag.FAST_ONLY)
CONTIGUOUS = int(Flag.CONTIGUOUS)
FIRST_EXTENT = int(Flag.FIRST_EXTENT)
KEEP = int(Flag.KEEP)


class Hole(msgspec.Struct, frozen=True, gc=False):
    """A stretch that reads as zeroes because no memory stands under it."""

    length: int


class Command(msgspec.Struct, gc=False):
    """`offset` and `length` are bytes. `cookie` is the front end's own and comes back untouched.

    `payload` (WRITE) belongs to the front end; the engine reads it before `execute` returns, and
    takes a copy of its own when the command has to wait. The first `received` bytes of a write are
    in memory already (`Namespace.window`), and `payload` is the rest.

    `segments` (READ) are views of memory that is held until `Namespace.release`, and may be looked
    at until the next await after it. `extents` is the answer to GET_LBA_STATUS.
    """

    opcode: int
    flags: int
    offset: int
    length: int
    cookie: int = 0
    payload: "memoryview | bytes | None" = None
    received: int = 0
    status: int = 0
    segments: "Sequence[Segment] | None" = None
    extents: "list[Extent] | None" = None
    applied: bool = False  # done but for its durability (FUA), which it waits for
    leases: Sequence[Any] = ()  # what is held for `segments`, or memory of a write's own
