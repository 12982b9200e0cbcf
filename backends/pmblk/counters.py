"""What a namespace did: plain ints, added to on the I/O path and read when somebody asks."""

import msgspec


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
