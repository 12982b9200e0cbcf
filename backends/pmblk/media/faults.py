"""SIGBUS under a mapping of ours: noted as a fault of its media, and gone on from.

A load or store that a mapped file cannot serve (somebody truncated it, its memory or its device
has failed) is SIGBUS on the thread that made it, at the instruction that made it. The handler here
runs at that instruction. When the address lies in a mapping that is watched, it puts zeroes there,
so that the instruction can be made, and sets `Health.fault`. Whoever copied has to look at that
afterwards, for what was read is made up, and what was written is gone (`pmblk.namespace` does).
Any other SIGBUS is what it was before: usually the end of the process.

What makes a handler in Python possible is that it is called through ctypes from sigaction(2), not
by the interpreter between two bytecodes, which would never get there. It takes the GIL first, also
in a thread that has it already. It runs on the stack of its thread, for the alternate one of
`faulthandler` is too small; it is short, logs nothing, and its calls keep the GIL. Only copies
touch watched memory, so no lock of an allocator is held under it. SIGBUS stays blocked meanwhile:
a fault in the handler ends the process, and does not come back for ever.

System calls that meet such memory fail with EFAULT instead; there is no signal then.

Sources: sigaction(2), mmap(2), Python's ctypes and C API (PyGILState_Ensure).
"""

import atexit
import ctypes
import mmap
import os
import signal
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pmblk.media import syscalls

HUGE_PAGE_FILE_SYSTEMS = frozenset({"hugetlbfs"})

_MAP_FIXED = 0x10  # the mmap module has no name for it
_SA_SIGINFO = 4
_SIGNAL_SET_BYTES = 128  # of glibc and musl

# si_code, include/uapi/asm-generic/siginfo.h: these four come from the instruction itself.
BUS_ADRALN, BUS_ADRERR, BUS_OBJERR, BUS_MCEERR_AR = 1, 2, 3, 4
_SYNCHRONOUS = frozenset({BUS_ADRALN, BUS_ADRERR, BUS_OBJERR, BUS_MCEERR_AR})
_MEMORY_ERRORS = frozenset({BUS_MCEERR_AR, BUS_MCEERR_AR + 1})


class Fault(msgspec.Struct, frozen=True):
    """What went wrong first: at which byte, and how long the file was then and should have been.

    `code` is the signal's (si_code), 0 where the file was just found to be short.
    """

    offset: int
    code: int
    file_bytes: int
    mapped_bytes: int

    def reason(self, path: Path) -> str:
        if self.file_bytes < self.mapped_bytes:
            return f"somebody truncated {path} from {self.mapped_bytes} to {self.file_bytes} bytes"
        if self.code in _MEMORY_ERRORS:
            return f"{path} has a memory error at byte {self.offset}"
        return f"{path} fails at byte {self.offset}: look for its device in the kernel's log"


class Health:
    """Of one open file, however often it is mapped. `fault` is None while all is well.

    A plain attribute, since the path of every I/O asks for it.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.fault: Fault | None = None


class _SignalInfo(ctypes.Structure):
    _fields_ = (
        ("number", ctypes.c_int),
        ("errno", ctypes.c_int),
        ("code", ctypes.c_int),
        ("address", ctypes.c_void_p),
    )


class _Action(ctypes.Structure):
    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_byte * _SIGNAL_SET_BYTES),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(_SignalInfo), ctypes.c_void_p)

# PyDLL keeps the GIL: while a copy stands still, no other thread's Python should run.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_libc.mmap.restype = ctypes.c_void_p
_libc.lseek.argtypes = (ctypes.c_int, ctypes.c_long, ctypes.c_int)
_libc.lseek.restype = ctypes.c_long
_libc.sigaction.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Region:
    """The addresses of one mapping of a file; `unit` are the bytes of a page there."""

    def __init__(self, health: Health, mapping: mmap.mmap, *, read_only: bool) -> None:
        self._health = health
        self._length = len(mapping)
        self._unit = _page_bytes(health.fd)
        self._protection = mmap.PROT_READ if read_only else mmap.PROT_READ | mmap.PROT_WRITE
        self.start = int(np.frombuffer(mapping, np.uint8).ctypes.data)
        self.end = self.start + self._rounded_up(self._length)

    def _rounded_up(self, length: int) -> int:
        return -(-length // self._unit) * self._unit

    def take_over(self, address: int, code: int) -> bool:
        """Zeroes for the page at `address`; False when there is no memory for them.

        Where the file is short, all that it lost is replaced at once: one copy may go through
        thousands of pages, and not in order. What the file still has stays as it is.
        """
        offset = address - self.start
        file_bytes: int = _libc.lseek(self._health.fd, 0, os.SEEK_END)
        if self._health.fault is None:
            self._health.fault = Fault(offset, code, file_bytes, self._length)
        lost = self.start + self._rounded_up(file_bytes)
        if lost <= address and self._replace(lost, self.end - lost):
            return True
        return self._replace(address - offset % self._unit, self._unit)

    def _replace(self, address: int, length: int) -> bool:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | syscalls.MAP_NORESERVE
        found: int | None = _libc.mmap(address, length, self._protection, flags, -1, 0)
        return found == address


_regions: dict[int, _Region] = {}  # by id: what is done to a dict is done at once, in any thread
_before = _Action()
_installing = threading.Lock()
_installed = False


def watch(health: Health, mapping: mmap.mmap, *, read_only: bool) -> Callable[[], Any]:
    """Faults of this mapping are the file's from now on, until the mapping is gone.

    Call what is returned before the mapping is closed by hand. The first call installs the
    handler, for the whole process.
    """
    _install()
    region = _Region(health, mapping, read_only=read_only)
    _regions[id(region)] = region
    return weakref.finalize(mapping, _regions.pop, id(region), None)


def _page_bytes(fd: int) -> int:
    """What a part of the mapping has to be a multiple of, to be replaced."""
    if syscalls.file_system(fd) in HUGE_PAGE_FILE_SYSTEMS:
        return os.fstatvfs(fd).f_bsize
    return mmap.PAGESIZE


def _on_sigbus(_number: int, info: Any, _context: int | None) -> None:
    code: int = info.contents.code
    address: int = info.contents.address or 0
    if code > 0:  # else somebody sent it, and there is no address
        for region in list(_regions.values()):
            if region.start <= address < region.end and region.take_over(address, code):
                return
    _restore()
    if code not in _SYNCHRONOUS:  # those that are come again by themselves
        signal.raise_signal(signal.SIGBUS)


_handler = _Handler(_on_sigbus)


def _install() -> None:
    global _installed
    with _installing:
        if _installed:
            return
        action = _Action(handler=ctypes.cast(_handler, ctypes.c_void_p).value, flags=_SA_SIGINFO)
        installed = _libc.sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(_before))
        syscalls.checked(installed)
        _installed = True
        atexit.register(_restore)  # nothing of Python can be called after its end


def _restore() -> None:
    """SIGBUS does what it did before this module: faulthandler's words, if it was there first."""
    _libc.sigaction(signal.SIGBUS, ctypes.byref(_before), None)
