"""A client of a file that does what it is told: maps it, stores and loads, writes and reads.

    python mapping_client.py FILE FLAGS

FLAGS are those of open(2). A line on standard input is an order, a line on standard output is the
answer to it: what it got, in hex or as a number, or `error ERRNO`. So when an answer is there, the
order was carried out, and nothing that is ordered elsewhere after it can be early.

    map LENGTH FLAGS PROTECTION     in place of the mapping before
    store OFFSET HEX        load OFFSET LENGTH      by the mapping
    write OFFSET HEX        read OFFSET LENGTH      by the descriptor
    msync   fsync   unmap   close   size   end      size by fstat(2), end by lseek(2)

Standard library only: it runs beside the daemon, from any interpreter and as any user. `Client` is
the other end of its pipes.
"""

import contextlib
import ctypes
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ENDS_SECONDS = 10
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_MS_SYNC = 4
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (*(ctypes.c_void_p, ctypes.c_size_t), *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.msync.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Client:
    """Every order is carried out when the call returns; one that fails raises OSError.

    AssertionError when the client ends instead.
    """

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.pid = process.pid

    def map(
        self, length: int, flags: int = mmap.MAP_SHARED, protection: int = READ_WRITE
    ) -> "Client":
        self._order("map", length, flags, protection)
        return self

    def store(self, offset: int, data: bytes) -> None:
        self._order("store", offset, data.hex())

    def load(self, offset: int, length: int) -> bytes:
        return bytes.fromhex(self._order("load", offset, length))

    def write(self, offset: int, data: bytes) -> int:
        return int(self._order("write", offset, data.hex()))

    def read(self, offset: int, length: int) -> bytes:
        return bytes.fromhex(self._order("read", offset, length))

    def msync(self) -> None:
        self._order("msync")

    def fsync(self) -> None:
        self._order("fsync")

    def unmap(self) -> None:
        self._order("unmap")

    def close(self) -> None:
        self._order("close")

    def size(self) -> int:
        return int(self._order("size"))

    def end(self) -> int:
        return int(self._order("end"))

    def is_killed_by(self, number: signal.Signals) -> bool:
        """Whether it has ended, and by that signal."""
        return self._process.wait(ENDS_SECONDS) == -number

    def _order(self, *words: object) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        assert answer, "the client has ended"
        verb, _, code = answer.strip().partition(" ")
        if verb == "error":
            raise OSError(int(code), os.strerror(int(code)))
        return verb


@contextlib.contextmanager
def client_of(
    file: Path, flags: int = os.O_RDWR, *, as_user: Sequence[str] = ()
) -> Iterator[Client]:
    """A client with the file open, not mapped yet. OSError when it cannot be opened.

    `as_user` goes before its command, setpriv(1) for one. It ends with the block.
    """
    command = [*as_user, sys.executable, __file__, str(file), str(flags)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            client = Client(process)
            client.answer()  # the file is open
            yield client
        finally:
            process.kill()


# ---- the client's end


class _Mapping:
    """By mmap(2) itself: Python's would keep a descriptor of its own, and close(2) not be one."""

    def __init__(self, fd: int, length: int, flags: int, protection: int) -> None:
        address = _libc.mmap(None, length, protection, flags, fd, 0)
        if address == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), "mmap")
        self._address = address
        self._length = length
        self.view = memoryview((ctypes.c_char * length).from_address(address)).cast("B")

    def sync(self) -> None:
        if _libc.msync(self._address, self._length, _MS_SYNC) != 0:
            raise OSError(ctypes.get_errno(), "msync")

    def unmap(self) -> None:
        self.view.release()
        _libc.munmap(self._address, self._length)


class _Orders:
    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._mapping: _Mapping | None = None
        self.known: dict[str, Callable[..., object]] = {
            "map": self._map,
            "store": self._store,
            "load": lambda offset, length: self._range(int(offset), int(length)).hex(),
            "write": lambda offset, data: os.pwrite(fd, bytes.fromhex(data), int(offset)),
            "read": lambda offset, length: os.pread(fd, int(length), int(offset)).hex(),
            "msync": lambda: self._mapped.sync(),
            "fsync": lambda: os.fsync(fd),
            "unmap": lambda: self._mapped.unmap(),
            "close": lambda: os.close(fd),
            "size": lambda: os.fstat(fd).st_size,
            "end": lambda: os.lseek(fd, 0, os.SEEK_END),
        }

    @property
    def _mapped(self) -> _Mapping:
        assert self._mapping is not None, "it was told to map nothing"
        return self._mapping

    def _range(self, offset: int, length: int) -> memoryview:
        return self._mapped.view[offset : offset + length]

    def _map(self, length: str, flags: str, protection: str) -> None:
        new = _Mapping(self._fd, int(length), int(flags), int(protection))
        if self._mapping is not None:
            self._mapping.unmap()
        self._mapping = new

    def _store(self, offset: str, data: str) -> None:
        stored = bytes.fromhex(data)
        self._range(int(offset), len(stored))[:] = stored


def main() -> None:
    try:
        fd = os.open(sys.argv[1], int(sys.argv[2]))
    except OSError as error:
        print("error", error.errno, flush=True)
        return
    print("open", flush=True)
    orders = _Orders(fd)
    for line in sys.stdin:
        verb, *words = line.split()
        try:
            answer = orders.known[verb](*words)
        except OSError as error:
            answer = f"error {error.errno}"
        print(answer, flush=True)


if __name__ == "__main__":
    main()
