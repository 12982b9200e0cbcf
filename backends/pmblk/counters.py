"""What a namespace did: plain ints, added to on the I/O path and read when somebody asks."""

import msgspec

from pmblk.nvme.command import (
    DATASET_MANAGEMENT,
    FLUSH,
    READ,
    WRITE,
    WRITE_ZEROES,
    Command,
)
from pmblk.nvme.data_pointer import prp_entries, prp_list_pages
from pmblk.pages import PAGE_BYTES


class Counters(msgspec.Struct):
    """One command of a front end counts once, however it was carried out (NVMe: SMART log).

    `prp_entries` and `prp_list_pages` are what the data pointers of all reads and writes would
    take as PRPs (`pmblk.nvme.data_pointer`): they follow from the pages that an I/O touches.
    """

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    write_bytes: int = 0
    zeroes: int = 0
    zero_bytes: int = 0
    deallocations: int = 0
    deallocated_bytes: int = 0
    flushes: int = 0
    errors: int = 0
    prp_entries: int = 0
    prp_list_pages: int = 0
    waits: int = 0  # commands that could not be answered on the spot

    def count(self, command: Command) -> None:
        """A command has succeeded."""
        opcode, length = command.opcode, command.length
        if opcode == READ:
            self.reads += 1
            self.read_bytes += length
            self._count_pages(command.offset, length)
        elif opcode == WRITE:
            self.writes += 1
            self.write_bytes += length
            self._count_pages(command.offset, length)
        elif opcode == WRITE_ZEROES:
            self.zeroes += 1
            self.zero_bytes += length
        elif opcode == DATASET_MANAGEMENT:
            self.deallocations += 1
            self.deallocated_bytes += length
        elif opcode == FLUSH:
            self.flushes += 1

    def _count_pages(self, offset: int, length: int) -> None:
        """The PRP entries of an I/O; `Namespace.execute` counts the usual ones itself."""
        entries = prp_entries(offset % PAGE_BYTES, length)
        self.prp_entries += entries
        self.prp_list_pages += prp_list_pages(entries)
