"""Memory for page structs: zeroed, since zeroes are a struct at rest: nobody's, clean, good.

In DRAM it costs nothing until it is touched; on the device it is the reserve of the file
(`pmblk.media.reserve`), which one table at a time can have.
"""

import mmap
from typing import Any

from pmblk.errors import PmblkError
from pmblk.media import Media
from pmblk.media.syscalls import anonymous, available_memory_bytes
from pmblk.representations.page_table import STRUCT_BYTES
from pmblk.units import format_size

USER = "struct-page"  # who has the reserve


def for_structs(structs: int) -> mmap.mmap:
    """Anonymous memory. Raises OSError."""
    return anonymous(max(structs, 1) * STRUCT_BYTES)


def in_dram(media: Media, structs: int, *, eager: bool) -> Any:
    """Anonymous memory. Raises PmblkError when there is not enough for an eager table."""
    needed, available = structs * STRUCT_BYTES, available_memory_bytes()
    if eager and needed > available:
        raise PmblkError(
            f"the page table of {format_size(media.size)} takes {format_size(needed)}, and "
            f"{format_size(available)} of memory are free",
            hint='choose init = "lazy", compound = "2MiB" or memmap = "device"',
        )
    try:
        return for_structs(structs)
    except OSError as error:
        raise PmblkError(
            f"cannot map {format_size(needed)} for a page table: {error.strerror}",
            hint='choose compound = "2MiB" or memmap = "device"',
        ) from error


def on_device(media: Media, structs: int, *, eager: bool) -> Any:
    """The reserve of the file, zeroed. Raises PmblkError when it is not to be had."""
    needed = structs * STRUCT_BYTES
    if not media.reserve_bytes:
        raise PmblkError(
            f"{media.path} is open without a reserve for a page table",
            hint="set reserve = true for the namespace, and restart",
        )
    if media.reserve_user:
        raise PmblkError(
            "the reserve holds the page table that is in use",
            hint="switch to another representation first",
        )
    if not media.stores_to_view or media.read_only:
        raise PmblkError(
            f"{media.path} cannot hold a page table: "
            + ("it is read-only" if media.read_only else "its file system has no DAX"),
            hint='choose memmap = "dram"',
        )
    try:
        if media.punches:
            media.punch(media.size, needed)
        if eager or not media.punches:
            media.reserve(media.size, needed)
        if not media.punches:
            media.reserve_view[:needed] = bytes(needed)
    except OSError as error:
        raise PmblkError(
            f"cannot clear the reserve of {media.path}: {error.strerror}",
            hint="make space on its file system",
        ) from error
    media.reserve_user = USER
    return media.reserve_view[:needed]
