"""Making a namespace a block device of this machine, and undoing it. Runs in the command line.

Never in the daemon: a process that opens a file of its own FUSE mount can hang for ever.

`loop`: a loop device of its own on the namespace's FUSE file (`pmblkd.loop`). Where the engine
delivers no discard, discard is switched off on it, because the kernel would report the first one
as done (and lose it); that switch outlives the file and cannot be turned back (seen on Linux
6.18), which is why no attachment takes a device that others use. `nbd`: nbd-client on one of the
daemon's sockets.
"""

import re
from pathlib import Path
from typing import Literal

from pmblk import PmblkError
from pmblkd import loop, mounts
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


def detach(namespace: NamespaceReport) -> list[Path]:
    """Take every block device of the namespace away; the list of them. Raises PmblkError."""
    loops: list[Path] = []
    if namespace.fuse is not None:
        file = Path(namespace.fuse.path)
        loops = loop.devices_on(lambda backing: backing == file or _was(backing, file))
    clients = [device for device in _nbd_devices() if _serves(namespace, device)]
    for device in (*loops, *clients):
        _refuse_mounted(device)
    for device in loops:
        loop.detach(device)
    for device in clients:
        loop.run("nbd-client", "-d", str(device))
    return [*loops, *clients]


def _was(backing: Path, file: Path) -> bool:
    """Whether the path is what is left of `file` when its killed daemon's mount was taken away."""
    return backing == Path("/") / file.name and not backing.exists()


def _attach_loop(namespace: NamespaceReport) -> Path:
    fuse = namespace.fuse
    if fuse is None:
        raise PmblkError(
            f"{namespace.name} has no FUSE file to attach",
            hint="add [fuse] with a mountpoint to the config, or use --via nbd",
        )
    file = Path(fuse.path)
    with loop.exclusive():
        for device in loop.devices_on(lambda backing: backing == file):
            return device
        return loop.attach(
            file,
            block_bytes=namespace.lba_bytes,
            read_only=namespace.read_only,
            discards=fuse.discards,
        )


def _refuse_mounted(device: Path) -> None:
    mount = mounts.find_source(str(device))
    if mount is not None:
        raise PmblkError(f"{device} is mounted on {mount.path}", hint=f"run: umount {mount.path}")


# ---- nbd


def _attach_nbd(namespace: NamespaceReport) -> Path:
    if not namespace.nbd:
        raise PmblkError(
            f"{namespace.name} has no NBD export", hint="add [nbd] with listen to the config"
        )
    for device in _nbd_devices():
        if _serves(namespace, device):
            return device
    device = _free_nbd_device()
    loop.run("nbd-client", *nbd_client_arguments(namespace, device))
    return device


def nbd_client_arguments(namespace: NamespaceReport, device: Path) -> list[str]:
    """nbd-client(8)'s arguments; a unix socket is preferred."""
    uris = sorted(namespace.nbd, key=lambda uri: not uri.startswith("nbd+unix"))
    if match := re.fullmatch(r"nbd\+unix:///.*\?socket=(.+)", uris[0]):
        server = ["-unix", match[1]]
    else:
        match = re.fullmatch(r"nbd://\[?(.+?)\]?:(\d+)/.*", uris[0])
        assert match is not None, uris[0]
        server = [match[1], match[2]]
    size = str(namespace.lba_bytes)
    options = ["-name", namespace.name, "-block-size", size]
    # With netlink nbd-client is gone at once, and nobody could say which export the device has.
    options.append("-nonetlink")
    if namespace.read_only:
        options.append("-readonly")
    return [*server, str(device), *options]


def _serves(namespace: NamespaceReport, device: Path) -> bool:
    """Whether the nbd-client behind the device was started by us, for this very export."""
    if not namespace.nbd:
        return False
    try:
        pid = (Path("/sys/block") / device.name / "pid").read_text().strip()
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return False
    return arguments[1:-1] == nbd_client_arguments(namespace, device)


def _nbd_devices() -> list[Path]:
    return [Path("/dev") / entry.name for entry in sorted(Path("/sys/block").glob("nbd*"))]


def _free_nbd_device() -> Path:
    devices = _nbd_devices()
    if not devices:
        raise PmblkError(
            "this kernel has no nbd devices", hint="run: modprobe nbd; or attach through loop"
        )
    for device in devices:
        if not (Path("/sys/block") / device.name / "pid").exists():
            return device
    raise PmblkError("every nbd device is in use", hint="detach one")
