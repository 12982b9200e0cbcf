"""One flush over NBD, and how long a client waits for it.

fio's own flush at the end of a job counts as time of its I/Os, and no report of its says how long
it took. This client can do nothing else.
"""

import socket
import time
from pathlib import Path

from pmblkd.errors import WorkFailed
from pmblkd.nbd import wire

FLUSH_SECONDS = 60
COOKIE = 1


def flush_seconds(path: Path, export: str) -> float:
    """From the request to its reply. Raises WorkFailed."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(FLUSH_SECONDS)
        try:
            sock.connect(str(path))
            _shake_hands(sock, export.encode())
            begun = time.perf_counter()
            sock.sendall(_request(wire.Cmd.FLUSH))
            reply = wire.SIMPLE_REPLY.unpack(_receive(sock, wire.SIMPLE_REPLY.size))
            seconds = time.perf_counter() - begun
            sock.sendall(_request(wire.Cmd.DISC))
        except OSError as error:
            raise WorkFailed(f"cannot flush {export}: {error.strerror or error}") from error
    if reply != (wire.SIMPLE_REPLY_MAGIC, 0, COOKIE):
        raise WorkFailed(f"the flush of {export} was answered with {reply}")
    return seconds


def _shake_hands(sock: socket.socket, export: bytes) -> None:
    """The shortest there is: EXPORT_NAME, which is answered with the size, or by hanging up."""
    _receive(sock, wire.GREETING.size)
    sock.sendall(
        wire.CLIENT_FLAGS.pack(wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES)
        + wire.OPTION.pack(wire.OPTION_MAGIC, wire.Opt.EXPORT_NAME, len(export))
        + export
    )
    _receive(sock, wire.EXPORT_NAME_REPLY.size)


def _request(command: wire.Cmd) -> bytes:
    return wire.REQUEST.pack(wire.REQUEST_MAGIC, command, COOKIE, 0, 0)


def _receive(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = sock.recv(length - len(data))
        if not piece:
            raise ConnectionError("the daemon hung up")
        data += piece
    return data
