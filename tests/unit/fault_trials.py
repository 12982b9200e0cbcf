"""Trials with media that fail under a load or store, in a process of their own: it may be SIGBUS.

Usage: fault_trials.py TRIAL DIRECTORY, with a directory on tmpfs. Ends with status 0 when all that
the trial expects is so, and says "alive" then.
"""

import ctypes
import faulthandler
import mmap
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from pmblk import Command, Namespace, PmblkError
from pmblk.media import Media, create, faults, open_media
from pmblk.media.target import open_target
from pmblk.nvme.command import (
    DATASET_MANAGEMENT,
    FLUSH,
    FUA,
    GET_LBA_STATUS,
    PREFETCH,
    READ,
    WRITE,
    WRITE_ZEROES,
)
from pmblk.nvme.status import Status
from pmblk.representations import make, parse_options
from pmblk.saving import save

PAGE = 4096
SIZE = 8 << 20
LEFT = 2 * PAGE + 100  # of the file, after the truncation
GONE = SIZE // 2  # a byte that it has lost
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "extent": ("extent", {}),
    "fragments": ("extent", {"fragments": 16}),
    "page-cache": ("page-cache", {}),
    "struct-page": ("struct-page", {}),
    "on-device": ("struct-page", {"memmap": "device"}),
    "compound": ("struct-page", {"compound": "2MiB"}),
    "transient-page": ("transient-page", {}),
    "pfn": ("pfn", {}),
}


def full_media(directory: Path, *, reserve: bool = False) -> Media:
    """Every byte of them is an x."""
    if not (directory / "media.img").exists():
        create(directory / "media.img", SIZE)
    media = open_media(directory / "media.img", with_reserve=reserve)
    media.reserve(0, media.size)
    media.store(0, b"x" * media.size)
    return media


def truncated_media(directory: Path) -> Media:
    media = full_media(directory)
    os.truncate(media.path, LEFT)
    return media


def in_a_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


# ---- what touches the memory


def store(media: Media) -> None:
    media.view[PAGE:] = bytes(media.size - PAGE)


def numpy_store(media: Media) -> None:
    """In place, with the GIL released in between."""
    np.frombuffer(media.view, np.uint8)[:] += 1


def scattered(media: Media) -> None:
    """Thousands of pages from the last to the first, as some copies do."""
    for offset in range(media.size - 1, 0, -PAGE):
        media.view[offset] = 1


def without_the_gil(media: Media) -> None:
    address = np.frombuffer(media.view, np.uint8).ctypes.data
    ctypes.memset(address + GONE, 1, PAGE)


def beside_a_busy_thread(media: Media) -> None:
    """Somebody else wants the GIL all the time."""
    done = threading.Event()

    def spin() -> None:
        while not done.is_set():
            sum(range(100))

    thread = threading.Thread(target=spin)
    thread.start()
    for _ in range(20):
        bytes(media.view)
        np.frombuffer(media.view, np.uint8).copy()
    done.set()
    thread.join()


TOUCHES: dict[str, Callable[[Media], object]] = {
    "load": lambda media: bytes(media.view),
    "item": lambda media: media.view[GONE],
    "join": lambda media: b"".join([media.view[:PAGE], media.view[GONE:]]),
    "store": store,
    "numpy-load": lambda media: np.frombuffer(media.view, np.uint8).copy(),
    "numpy-store": numpy_store,
    "thread-load": lambda media: in_a_thread(lambda: bytes(media.view)),
    "thread-store": lambda media: in_a_thread(lambda: store(media)),
    "thread-numpy": lambda media: in_a_thread(lambda: numpy_store(media)),
    "scattered": scattered,
    "without-the-gil": without_the_gil,
    "beside-a-busy-thread": beside_a_busy_thread,
}


def touch(directory: Path, how: str) -> None:
    media = truncated_media(directory)
    assert media.health.fault is None
    TOUCHES[how](media)
    fault = media.health.fault
    assert fault is not None, "nobody noticed"
    assert (fault.code, fault.file_bytes) == (faults.BUS_ADRERR, LEFT)
    assert fault.mapped_bytes == media.size
    assert 3 * PAGE <= fault.offset < media.size
    assert "truncated" in fault.reason(media.path)


# ---- which memory is replaced, and for how long


def the_rest_stays(directory: Path) -> None:
    """What the file still has is not touched, and can be stored to."""
    media = truncated_media(directory)
    assert bytes(media.view[:LEFT]) == b"x" * LEFT
    assert media.health.fault is None
    assert bytes(media.view[GONE : GONE + 10]) == bytes(10)
    faults._regions.clear()  # all that is lost was replaced by then
    assert not np.frombuffer(media.view, np.uint8)[3 * PAGE :].any()
    media.view[:5] = b"still"
    assert media.path.read_bytes() == b"still" + b"x" * (LEFT - 5)


def again(directory: Path) -> None:
    """A file that becomes still shorter; the first fault is the one that is told."""
    media = truncated_media(directory)
    bytes(media.view[GONE:])
    os.truncate(media.path, 0)
    bytes(media.view)
    assert media.health.fault is not None
    assert media.health.fault.file_bytes == LEFT


def read_only(directory: Path) -> None:
    full_media(directory).close()
    media = open_media(directory / "media.img", read_only=True)
    os.truncate(media.path, LEFT)
    assert bytes(media.view[GONE:]) == bytes(media.size - GONE)
    assert media.health.fault is not None


def one_bad_page(directory: Path) -> None:
    """The file is as long as ever: only the page that failed is replaced."""
    media = full_media(directory)
    (region,) = faults._regions.values()
    assert region.take_over(region.start + GONE + 5, faults.BUS_MCEERR_AR)
    after = media.size - GONE - PAGE
    assert bytes(media.view) == b"x" * GONE + bytes(PAGE) + b"x" * after
    assert media.health.fault is not None
    reason = media.health.fault.reason(media.path)
    assert reason == f"{media.path} has a memory error at byte {GONE + 5}"


def whole_huge_pages(directory: Path) -> None:
    """A mapping of huge pages can only be replaced by whole ones."""
    faults._page_bytes = lambda fd: 2 << 20
    media = full_media(directory)
    os.truncate(media.path, 2 << 20)
    store(media)
    assert bytes(media.view[PAGE : 2 << 20]) == bytes((2 << 20) - PAGE)
    assert media.path.stat().st_size == 2 << 20
    (region,) = faults._regions.values()
    assert (region.end - region.start) % (2 << 20) == 0


def two_files(directory: Path) -> None:
    """The fault is the file's whose memory it was."""
    media = truncated_media(directory)
    (directory / "other").mkdir()
    other = truncated_media(directory / "other")
    bytes(other.view)
    assert other.health.fault is not None
    assert media.health.fault is None


def a_resize_is_followed(directory: Path) -> None:
    """The new mapping is watched, the old one as long as somebody has it."""
    media = full_media(directory)
    old = media.view
    media.resize(2 * media.size)
    assert len(faults._regions) == 2
    os.truncate(media.path, LEFT)
    bytes(old)
    assert media.health.fault is not None
    media.health.fault = None
    bytes(media.view)
    assert media.health.fault is not None
    del old
    assert len(faults._regions) == 1
    media.close()
    assert not faults._regions


# ---- other people's SIGBUS


def somebody_elses(directory: Path) -> None:
    """A mapping that nobody watches; the process ends."""
    faulthandler.enable()
    open_somebody_elses(directory)


def closed(directory: Path) -> None:
    """The same, after ours is closed and its addresses may be anybody's."""
    open_somebody_elses(directory, closing=True)


def open_somebody_elses(directory: Path, *, closing: bool = False) -> None:
    media = full_media(directory)
    if closing:
        media.close()
    with (directory / "other").open("w+b") as file:
        file.truncate(PAGE)
        mapping = mmap.mmap(file.fileno(), PAGE)
        file.truncate(0)
        print("before", flush=True)
        mapping[0]


def sent(directory: Path) -> None:
    """By kill(2): there is no address to look at."""
    truncated_media(directory)
    print("before", flush=True)
    os.kill(os.getpid(), signal.SIGBUS)


def no_address(directory: Path) -> None:
    """What stands where it would be is the sender's number, and may look like one of ours."""
    media = full_media(directory)
    (region,) = faults._regions.values()
    raised: list[int] = []
    signal.raise_signal = raised.append
    info = faults._SignalInfo(code=0, address=region.start)
    faults._on_sigbus(signal.SIGBUS, ctypes.pointer(info), None)
    assert raised == [signal.SIGBUS]
    assert media.health.fault is None


# ---- a namespace


def namespace_of(directory: Path, kind: str) -> Namespace:
    name, options = KINDS[kind]
    media = full_media(directory, reserve=kind == "on-device")
    representation = make(name, media, parse_options(name, options))
    return Namespace("ns", media, representation, lba_bytes=512)


def serve(directory: Path, kind: str) -> None:
    """A batch that meets lost memory fails as a whole and holds nothing; so does all after it."""
    namespace = namespace_of(directory, kind)
    os.truncate(namespace.media.path, LEFT)
    intact = Command(READ, 0, 0, PAGE)
    write = Command(WRITE, 0, GONE, 64 * PAGE, payload=bytes(64 * PAGE))
    part = Command(READ, 0, GONE + 100 * PAGE + 7, 100)
    durable = Command(WRITE, FUA, GONE + 512, 512, payload=bytes(512))
    batch = [intact, write, part, durable]
    waiting = namespace.execute(batch)
    if waiting:
        trio.run(namespace.complete, waiting)
    statuses = [command.status for command in batch]
    assert statuses[1::2] == [Status.WRITE_FAULT, Status.WRITE_FAULT], statuses
    assert statuses[2] == Status.UNRECOVERED_READ_ERROR, statuses
    assert statuses[0] == Status.UNRECOVERED_READ_ERROR, "the same batch"
    assert not any(command.segments or command.leases for command in batch)
    assert namespace.representation.leases == 0
    assert namespace.counters.errors == 4
    fails_for_ever(namespace)
    assert namespace.media.path.stat().st_size == LEFT


def fails_for_ever(namespace: Namespace) -> None:
    for opcode, status in (
        (READ, Status.UNRECOVERED_READ_ERROR),
        (GET_LBA_STATUS, Status.UNRECOVERED_READ_ERROR),
        (PREFETCH, Status.UNRECOVERED_READ_ERROR),
        (WRITE, Status.WRITE_FAULT),
        (WRITE_ZEROES, Status.WRITE_FAULT),
        (DATASET_MANAGEMENT, Status.WRITE_FAULT),
    ):
        payload = bytes(PAGE) if opcode == WRITE else None
        command = Command(opcode, 0, 0, PAGE, payload=payload)
        assert not namespace.execute([command])
        assert command.status == status, opcode
    flush = Command(FLUSH, 0, 0, 0)
    assert not namespace.execute([flush])
    assert flush.status == Status.WRITE_FAULT
    assert namespace.window(Command(WRITE, 0, 0, PAGE)) is None


def half_received(directory: Path, kind: str) -> None:
    """A large write whose file is truncated while it arrives in its window."""
    namespace = namespace_of(directory, kind)
    command = Command(WRITE, 0, GONE, 64 * PAGE)
    window = namespace.window(command)
    assert window is not None
    window[:PAGE] = b"y" * PAGE
    namespace.received(command, PAGE)
    os.truncate(namespace.media.path, LEFT)
    window = namespace.window(command)
    assert window is not None, "nobody knows yet"
    window[: 32 * PAGE] = b"y" * 32 * PAGE
    namespace.received(command, 32 * PAGE)
    assert namespace.window(command) is None, "it is known now"
    command.payload = b"y" * 31 * PAGE
    assert not namespace.execute([command])
    assert command.status == Status.WRITE_FAULT
    fails_for_ever(namespace)


def refused_memory(directory: Path) -> None:
    """A view that a system call met EFAULT in: the same load here finds out why."""
    namespace = namespace_of(directory, "extent")
    fine = namespace.media.view[:PAGE]
    assert not namespace.examine([fine, fine[:0]])
    os.truncate(namespace.media.path, LEFT)
    namespace.media.check = lambda: None  # type: ignore[method-assign]  # as if it were as long
    assert not namespace.examine([fine])
    assert namespace.examine([fine, namespace.media.view[GONE : GONE + 10 * PAGE]])


def save_from_bad_memory(directory: Path) -> None:
    """A file as long as ever, as far as anybody can see, and a page that the kernel refuses."""
    namespace = namespace_of(directory, "extent")
    namespace.media.check = lambda: None  # type: ignore[method-assign]
    os.truncate(namespace.media.path, LEFT)
    target = open_target(directory / "copy", needed_bytes=SIZE)
    with pytest.raises(PmblkError, match="somebody truncated"):
        trio.run(save, namespace, target)
    assert namespace.failure()


ALONE: dict[str, Callable[[Path], None]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        *(the_rest_stays, again, read_only, one_bad_page, whole_huge_pages),
        *(two_files, a_resize_is_followed, refused_memory, save_from_bad_memory, no_address),
    )
}
DEADLY: dict[str, Callable[[Path], None]] = {
    "somebody-elses": somebody_elses,
    "closed": closed,
    "sent": sent,
}
WITH_WINDOWS = sorted(set(KINDS) - {"page-cache"})


def main(trial: str, directory: Path) -> None:
    name, _, variant = trial.partition(":")
    if name in ALONE or name in DEADLY:
        {**ALONE, **DEADLY}[name](directory)
    else:
        {"touch": touch, "serve": serve, "half-received": half_received}[name](directory, variant)
    print("alive")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
