"""Namespaces as block devices of the guest's kernel, through its NBD client."""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path

from pmblkd import attach
from tests.harness import nbd_netlink
from tests.harness.daemon import Daemon
from tests.harness.file_systems import drop_loop, run
from tests.harness.nbd_raw import GO, REP_ACK, Client, string
from tests.harness.programs import wait_for

INFO_BLOCK_SIZE = 3


@contextlib.contextmanager
def attached(daemon: Daemon, name: str, *, via: attach.Via = "nbd") -> Iterator[Path]:
    """As `pmblk attach NAME --via VIA` does it, but for 3 s of Python's start-up; then detached."""
    device = attach.attach(daemon.report(name), via=via)
    try:
        yield device
    finally:
        if via == "loop":
            drop_loop(device)
        else:
            run("nbd-client", "-d", str(device))
    if via == "nbd":
        await_gone(device)


def await_gone(device: Path) -> None:
    """Until the kernel has let go of a device that was disconnected."""
    wait_for(lambda: not sysfs(device, "pid").exists() and size_bytes(device) == 0)


def sysfs(device: Path, name: str) -> Path:
    return Path("/sys/block") / device.name / name


def size_bytes(device: Path) -> int:
    return int(sysfs(device, "size").read_text()) * 512


def into_transmission(daemon: Daemon, name: str) -> tuple[Client, int, int]:
    """A connection that the kernel may have, the size of the export in bytes, and its flags."""
    client = Client(daemon.directory / "nbd.sock").greet()
    wanted = string(name) + struct.pack(">HH", 1, INFO_BLOCK_SIZE)
    export, *_, last = client.ask_option(GO, wanted)
    assert last.kind == REP_ACK
    number, size, flags = struct.unpack(">HQH", export.data)
    assert number == 0, "NBD_INFO_EXPORT comes first"
    return client, size, flags


@contextlib.contextmanager
def connected(daemon: Daemon, name: str, index: int) -> Iterator[Path]:
    """By netlink; disconnected at the end."""
    try:
        yield connect(daemon, name, index)
    finally:
        disconnect(index)


def connect(
    daemon: Daemon,
    name: str,
    index: int,
    *,
    timeout_seconds: int = 30,
    dead_connection_seconds: int = 0,
) -> Path:
    """/dev/nbdINDEX by netlink, with blocks of 4096 bytes."""
    client, size, flags = into_transmission(daemon, name)
    with client:  # the kernel has the socket too; it stays open there
        nbd_netlink.connect(
            index,
            [client.sock],
            size_bytes=size,
            block_bytes=4096,
            flags=flags,
            timeout_seconds=timeout_seconds,
            dead_connection_seconds=dead_connection_seconds,
        )
    return Path(f"/dev/nbd{index}")


def take_over(daemon: Daemon, name: str, index: int) -> None:
    """Give the device a connection to this daemon in place of its dead one."""
    client, _, _ = into_transmission(daemon, name)
    with client:
        nbd_netlink.replace_dead(index, [client.sock])


def disconnect(index: int) -> None:
    nbd_netlink.disconnect(index)
    await_gone(Path(f"/dev/nbd{index}"))
