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
from pmblk.representations import KINDS
from pmblk.units import format_size
from pmblkd.compare.children import output_of
from pmblkd.compare.contenders import Contender, contender
from pmblkd.compare.device_child import Order
from pmblkd.compare.results import DeviceFacts
from pmblkd.errors import WorkFailed

DEVICES_BYTES = (8 << 30, 400 << 30, 6 << 40)  # a notebook's, the one of the question, a server's
EAGER_SECONDS = 120  # an eager table of gigabytes takes its time
EXPECTED_SECONDS = 0.6

_STRUCT_PAGE_VARIANTS = ({"memmap": "device"}, {"compound": "2MiB"}, {"init": "eager"})


def device_contenders(only: Sequence[str]) -> list[Contender]:
    """Every kind with its default options, and the variants that change what is kept."""
    found = []
    for kind in KINDS:
        if only and kind not in only:
            continue
        found.append(contender(kind, {}))
        if kind == "struct-page":
            found += [contender(kind, options) for options in _STRUCT_PAGE_VARIANTS]
    return found


def facts(
    directory: Path, one: Contender, file_bytes: int, *, check: Callable[[], None]
) -> DeviceFacts:
    """Of a new sparse file in the directory, which is gone again afterwards.

    Raises WorkFailed, and what `check` raises.
    """
    file = directory / "device"
    try:
        create(file, file_bytes)
    except PmblkError as error:
        reason = f"no file of {format_size(file_bytes)}: {error.message}"
        return DeviceFacts(contender=one.name, kind=one.kind, file_bytes=file_bytes, skipped=reason)
    try:
        order = Order(file=str(file), name=one.name, kind=one.kind, options=one.options)
        return _ask_child(order, check)
    finally:
        file.unlink()


def _ask_child(order: Order, check: Callable[[], None]) -> DeviceFacts:
    words = msgspec.json.encode(order).decode()
    process = subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.device_child", words],
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
    return msgspec.json.decode(said, type=DeviceFacts)
