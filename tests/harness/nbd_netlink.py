"""Linux's NBD client over generic netlink: what nbd-client 3.24 cannot ask of it.

That is a dead_conn_timeout (requests wait for a new connection instead of failing), putting that
connection in, and a new size. Standard library only. Sources: include/uapi/linux/nbd-netlink.h,
genetlink.h and netlink.h.
"""

import os
import socket
import struct
from collections.abc import Sequence

NETLINK_GENERIC = 16
_REQUEST_ACK = 1 | 4  # NLM_F_REQUEST, NLM_F_ACK
_ERROR = 2  # NLMSG_ERROR; an errno of 0 is the acknowledgement
_CONTROL_FAMILY, _GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 16, 3, 1, 2
_CONNECT, _DISCONNECT, _RECONFIGURE = 1, 2, 3
_INDEX, _SIZE_BYTES, _BLOCK_BYTES, _TIMEOUT, _SERVER_FLAGS = 1, 2, 3, 4, 5
_SOCKETS, _DEAD_CONNECTION_TIMEOUT = 7, 8
_ITEM, _FD = 1, 1
_NESTED = 0x8000


def connect(
    index: int,
    connections: Sequence[socket.socket],
    *,
    size_bytes: int,
    block_bytes: int,
    flags: int,
    timeout_seconds: int,
    dead_connection_seconds: int = 0,
) -> None:
    """Make /dev/nbdINDEX of connections that are in transmission; the kernel keeps them.

    A request that has no reply after `timeout_seconds` fails, or is sent again when there is
    another connection by then. Raises OSError, as all of these do.
    """
    _ask(
        _CONNECT,
        _u32(_INDEX, index),
        _u64(_SIZE_BYTES, size_bytes),
        _u64(_BLOCK_BYTES, block_bytes),
        _u64(_SERVER_FLAGS, flags),
        _u64(_TIMEOUT, timeout_seconds),
        _u64(_DEAD_CONNECTION_TIMEOUT, dead_connection_seconds),
        _sockets(connections),
    )


def replace_dead(index: int, connections: Sequence[socket.socket]) -> None:
    """Put these where connections of the device have died; ENOSPC when none has."""
    _ask(_RECONFIGURE, _u32(_INDEX, index), _sockets(connections))


def resize(index: int, size_bytes: int) -> None:
    _ask(_RECONFIGURE, _u32(_INDEX, index), _u64(_SIZE_BYTES, size_bytes))


def disconnect(index: int) -> None:
    """It says DISC to the server, and is gone a moment later."""
    _ask(_DISCONNECT, _u32(_INDEX, index))


# ---- messages


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _u32(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("I", value))


def _u64(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("Q", value))


def _sockets(connections: Sequence[socket.socket]) -> bytes:
    items = [_attribute(_ITEM | _NESTED, _u32(_FD, one.fileno())) for one in connections]
    return _attribute(_SOCKETS | _NESTED, b"".join(items))


def _ask(command: int, *attributes: bytes) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC) as netlink:
        netlink.settimeout(10)
        netlink.bind((0, 0))
        _exchange(netlink, _family(netlink), command, b"".join(attributes))


def _family(netlink: socket.socket) -> int:
    """The number that the kernel gave to the family "nbd"."""
    answer = _exchange(netlink, _CONTROL_FAMILY, _GET_FAMILY, _attribute(_FAMILY_NAME, b"nbd\0"))
    while answer:
        length, kind = struct.unpack_from("HH", answer)
        if kind == _FAMILY_ID:
            return int.from_bytes(answer[4:6], "little")
        answer = answer[(length + 3) & ~3 :]
    raise AssertionError("the kernel's answer has no family number")


def _exchange(netlink: socket.socket, family: int, command: int, attributes: bytes) -> bytes:
    """Send it and wait for the acknowledgement; the attributes that came before that."""
    payload = struct.pack("BBH", command, 1, 0) + attributes
    netlink.send(struct.pack("IHHII", 16 + len(payload), family, _REQUEST_ACK, 1, 0) + payload)
    answer = b""
    while True:
        data = netlink.recv(1 << 16)
        while data:
            length, kind = struct.unpack_from("IH", data)
            if kind == _ERROR:
                (error,) = struct.unpack_from("i", data, 16)
                if error:
                    raise OSError(-error, f"netlink {command}: {os.strerror(-error)}")
                return answer
            answer, data = data[20:length], data[(length + 3) & ~3 :]
