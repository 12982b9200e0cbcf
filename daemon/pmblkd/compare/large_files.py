"""Devices of gigabytes and terabytes: what each representation keeps for them before any I/O.

The engine alone. The files are sparse, so any file system that can hold their size will do.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from pmblk import PmblkError
from pmblk.media import create
from pmblk.media.syscalls import available_memory_bytes
from pmblk.pages import PAGE_BYTES
from pmblk.representations import KINDS
from pmblk.representations.page_table import STRUCT_BYTES
from pmblk.units import format_size
from pmblkd.compare.children import output_of
from pmblkd.compare.contenders import VARIANTS, Contender, contender
from pmblkd.compare.large_file_child import MEMORY_SHARE, Order
from pmblkd.compare.results import LargeFileFacts
from pmblkd.errors import WorkFailed

FILES_BYTES = (8 << 30, 400 << 30, 6 << 40)  # a notebook's, the one of the question, a server's
EAGER_SECONDS = 120  # an eager table of gigabytes takes its time
EXPECTED_SECONDS = 0.6
EAGER_BYTES_PER_SECOND = 1 << 30  # about what a fresh page costs: a fault and 4 KiB of zeroes

_TABLE_VARIANTS = ({"memmap": "device"}, {"compound": "2MiB"}, {"init": "eager"})


def large_file_contenders(only: Sequence[str], *, variants: bool) -> list[Contender]:
    """Every kind with its default options, and the variants of a page table; with `variants` all.

    Page-cache has its default arena, whatever the loads of the comparison are.
    """
    wanted = [
        *((kind, {}) for kind in KINDS),
        *(("struct-page", options) for options in _TABLE_VARIANTS),
        *(VARIANTS if variants else ()),
    ]
    known = {one.name: one for one in (contender(*each) for each in wanted)}
    kinds = [kind for kind in KINDS if not only or kind in only]
    return [one for kind in kinds for one in known.values() if one.kind == kind]


def expected_seconds(one: Contender, file_bytes: int) -> float:
    """For the estimate: the start of a process, and the memory of an eager table."""
    if one.options.get("init") != "eager":
        return EXPECTED_SECONDS
    table_bytes = file_bytes // PAGE_BYTES * STRUCT_BYTES
    if table_bytes * MEMORY_SHARE > available_memory_bytes():
        return EXPECTED_SECONDS
    return EXPECTED_SECONDS + table_bytes / EAGER_BYTES_PER_SECOND


def facts(
    directory: Path, one: Contender, file_bytes: int, *, check: Callable[[], None]
) -> LargeFileFacts:
    """Of a new sparse file in the directory, which is gone again afterwards.

    Raises WorkFailed, and what `check` raises.
    """
    file = directory / "large"
    try:
        create(file, file_bytes)
    except PmblkError as error:
        reason = f"no file of {format_size(file_bytes)}: {error.message}"
        return LargeFileFacts(
            contender=one.name, kind=one.kind, file_bytes=file_bytes, skipped=reason
        )
    try:
        order = Order(file=str(file), name=one.name, kind=one.kind, options=one.options)
        return _ask_child(order, check)
    finally:
        file.unlink()


def _ask_child(order: Order, check: Callable[[], None]) -> LargeFileFacts:
    words = msgspec.json.encode(order).decode()
    process = subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.large_file_child", words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # ^C is for us to act on
    )
    try:
        said = output_of(process, seconds=EAGER_SECONDS, check=check)
    except subprocess.TimeoutExpired:
        raise WorkFailed(f"{order.name} was not open after {EAGER_SECONDS} s") from None
    if process.returncode != 0:
        raise WorkFailed(f"{order.name} failed on {order.file}: {said.decode(errors='replace')}")
    return msgspec.json.decode(said, type=LargeFileFacts)
