"""Making a namespace a block device of this machine. Runs in the command line.

Never in the daemon: a process that opens a file of its own FUSE mount can hang for ever.

`loop`: a loop device of its own on the namespace's FUSE file (`pmblkd.loop`). Where the engine
delivers no discard, discard is switched off on it, because the kernel would report the first one
as done (and lose it); that switch outlives the file and cannot be turned back (seen on Linux
6.18), which is why no attachment takes a device that others use. `nbd`: nbd-client on one of the
daemon's sockets.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pmblk import PmblkError
from pmblk.pages import PAGE_BYTES
from pmblkd import loop, mounts
from pmblkd.errors import WorkFailed
from pmblkd.mounts import State
from pmblkd.programs import run
from pmblkd.reports import NamespaceReport

Via = Literal["loop", "nbd"]


def attach(namespace: NamespaceReport, *, via: Via | None) -> Path:
    """The block device of the namespace (as the control socket describes it). Idempotent.

    `via` None: loop where the namespace has a FUSE file, else nbd.
    """
    if namespace.draining:
        raise PmblkError(
            f"{namespace.name} is draining: it takes no new users",
            hint="it left the config; add it again when it is gone",
        )
    if via == "nbd" or (via is None and namespace.fuse is None):
        return _attach_nbd(namespace)
    return _attach_loop(namespace)


def _attach_loop(namespace: NamespaceReport) -> Path:
    fuse = namespace.fuse
    if fuse is None:
        raise PmblkError(
            f"{namespace.name} has no FUSE file to attach",
            hint="add [fuse] with a mountpoint to the config, or use --via nbd",
        )
    file = Path(fuse.path)
    with loop.exclusive():
        mount = _living_mount(file.parent)
        for device in loop.devices_on(lambda backing: backing == file):
            # Another number is another mount: a dead one, which the present one has buried.
            if loop.file_system_of(device) == mount.number:
                return device
        return loop.attach(
            file,
            block_bytes=namespace.lba_bytes,
            read_only=namespace.read_only,
            discards=fuse.discards,
            # The kernel hands what is direct to the media, whose disk may have larger blocks. Such
            # a file has no page cache of its own, so nothing is cached twice.
            direct=fuse.dax != "fast" or namespace.lba_bytes == PAGE_BYTES,
        )


def _living_mount(mountpoint: Path) -> mounts.Mount:
    """What is mounted there. Raises PmblkError unless its daemon answers."""
    mount = mounts.find(mountpoint)
    if mount is None:
        raise PmblkError(
            f"nothing is mounted on {mountpoint} any more", hint="start the daemon again"
        )
    state = mounts.state_of(mount)
    if state is State.SILENT:
        raise mounts.silence(mount)
    if state is State.DEAD:
        raise WorkFailed(
            f"the kernel has ended the mount on {mountpoint}", hint="start the daemon again"
        )
    return mount


# ---- nbd


def _attach_nbd(namespace: NamespaceReport) -> Path:
    if not namespace.nbd:
        raise PmblkError(
            f"{namespace.name} has no NBD export", hint="add [nbd] with listen to the config"
        )
    with loop.exclusive():
        for device in nbd_devices():
            if is_client_of(device, namespace.name, namespace.nbd):
                return device
        device = _free_nbd_device()
        run("nbd-client", *nbd_client_arguments(namespace, device))
        return device


def nbd_client_arguments(namespace: NamespaceReport, device: Path) -> list[str]:
    """nbd-client(8)'s arguments."""
    size = str(namespace.lba_bytes)
    export = _export_arguments(namespace.name, namespace.nbd, device)
    # With netlink nbd-client is gone at once, and nobody could say which export the device has.
    options = ["-block-size", size, "-nonetlink"]
    if namespace.read_only:
        options.append("-readonly")
    return [*export, *options]


def _export_arguments(name: str, uris: Sequence[str], device: Path) -> list[str]:
    """Which export of which server; a unix socket is preferred."""
    uris = sorted(uris, key=lambda uri: not uri.startswith("nbd+unix"))
    if match := re.fullmatch(r"nbd\+unix:///.*\?socket=(.+)", uris[0]):
        server = ["-unix", match[1]]
    else:
        match = re.fullmatch(r"nbd://\[?(.+?)\]?:(\d+)/.*", uris[0])
        assert match is not None, uris[0]
        server = [match[1], match[2]]
    return [*server, str(device), "-name", name]


def is_client_of(device: Path, name: str, uris: Sequence[str]) -> bool:
    """Whether the nbd-client behind the device was started by us, for this very export."""
    if not uris:
        return False
    try:
        pid = (loop.DEVICES / device.name / "pid").read_text().strip()
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return False
    export = _export_arguments(name, uris, device)
    return arguments[1 : 1 + len(export)] == export


def nbd_devices() -> list[Path]:
    return [Path("/dev") / entry.name for entry in sorted(loop.DEVICES.glob("nbd*"))]


def _free_nbd_device() -> Path:
    devices = nbd_devices()
    if not devices:
        raise PmblkError(
            "this kernel has no nbd devices", hint="run: modprobe nbd; or attach through loop"
        )
    for device in devices:
        if not (loop.DEVICES / device.name / "pid").exists():
            return device
    raise PmblkError("every nbd device is in use", hint="detach one")
