"""sd_notify(3): tell systemd that we are ready, stopping, or what we do. Does nothing elsewhere.

A supervisor that is gone is no reason to fail: nobody is there to tell.
"""

import contextlib
import os
import socket


def notify(state: str) -> None:
    """`state` is "READY=1", "STOPPING=1" or "STATUS=...", several separated by newlines."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
    ):
        sock.connect(address)
        sock.sendall(state.encode())
